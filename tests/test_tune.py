"""The grid of a tiny model with random weights over real shards: every point is what `evaluate` finds with it."""

import json

import pytest

from ddp_asr import evaluate, tune
from ddp_asr import lm as lm_command
from ddp_asr.config import Beam, Lexicon, load_decoder
from ddp_asr.decoding.ngram import read_arpa
from ddp_asr.errors import UserError
from tests.test_beam import write_arpa
from tests.test_evaluate import make_shards
from tests.tiny_recogniser import tiny_state, write_checkpoint


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    state = tiny_state(data={"threads": 0, "test_max_seconds": 8.0}, decoder={"kind": "beam", "lm": "gone.arpa"})
    return write_checkpoint(tmp_path_factory.mktemp("run") / "best.pt", state)


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return write_arpa(tmp_path_factory.mktemp("lm") / "lm.arpa", ["<space>", "a", "b", "'"])


def test_the_best_point_is_written_and_evaluate_finds_the_same(checkpoint, shards, lm, tmp_path, capsys):
    out = tmp_path / "decoder.yaml"
    grid = ["--size", "2", "--lm-weights", "1,0.5", "--symbol-bonuses", "0,1,2"]
    assert tune.main([str(checkpoint), str(shards), "--lm", lm, "--out", str(out), *grid]) == 0
    shown, warned = capsys.readouterr()
    points = [line.split() for line in shown.splitlines()[2:8]]
    assert [point[:3] for point in points] == [[w, b, "0"] for w in ("0.5", "1") for b in ("0", "1", "2")]
    best = min(points, key=lambda point: (float(point[3]), float(point[5])))
    assert load_decoder(out) == Beam(size=2, lm=lm, lm_weight=float(best[0]), symbol_bonus=float(best[1]))
    assert f"the best of --lm-weights is {best[0]}, an end of the grid" in warned  # there are only ends
    assert evaluate.main([str(checkpoint), str(shards), "--decoder", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [f"{100 * facts['wer']:.2f}", f"{100 * facts['cer']:.2f}"] == [best[3], best[5]]


def test_the_weights_of_a_lexicon_are_found_and_evaluate_finds_the_same(checkpoint, shards, tmp_path, capsys):
    pytest.importorskip("flashlight")
    words, out = tmp_path / "words.arpa.gz", tmp_path / "decoder.yaml"
    vocabulary = ["--vocabulary.symbols= ab'", "--vocabulary.drop=."]
    assert lm_command.main([str(shards), *vocabulary, "--unit=word", "--order=2", "--out", str(words)]) == 0
    capsys.readouterr()
    grid = ["--kind", "lexicon", "--size", "20", "--lm-weights", "0.5,1", "--word-bonuses=0,4"]
    assert tune.main([str(checkpoint), str(shards), "--lm", str(words), "--out", str(out), *grid]) == 0
    shown, warned = capsys.readouterr()
    points = [line.split() for line in shown.splitlines()[2:6]]
    assert [point[:2] for point in points] == [["0.5", "0"], ["0.5", "4"], ["1", "0"], ["1", "4"]]
    best = min(points, key=lambda point: (float(point[2]), float(point[4])))
    assert load_decoder(out) == Lexicon(size=20, lm=str(words), lm_weight=float(best[0]), word_bonus=float(best[1]))
    assert f"the best of --word-bonuses is {best[1]}, an end of the grid" in warned
    hypotheses = tmp_path / "hypotheses.jsonl"
    assert (
        evaluate.main([str(checkpoint), str(shards), *("--decoder", str(out)), *("--out", str(hypotheses)), "--json"])
        == 0
    )
    facts = json.loads(capsys.readouterr().out)
    assert [f"{100 * facts['wer']:.2f}", f"{100 * facts['cer']:.2f}"] == [best[2], best[4]]
    assert facts["wer"] != facts["greedy_wer"]
    known = set(read_arpa(words).symbols)
    found = {word for line in hypotheses.read_text().splitlines() for word in json.loads(line)["hypothesis"].split()}
    assert len(found) > 5 and found <= known


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lm-weights", "0.5;1"], "--lm-weights must be finite numbers with commas between, not '0.5;1'"),
        (["--lm-weights=-1,1"], "--lm-weights must be 0 or more, not -1"),
        (["--symbol-bonuses", "nan"], "--symbol-bonuses must be finite numbers"),
        (["--size", "0"], "decoder.size must be at least 1 and"),
        (["--kind", "lexicon", "--symbol-bonuses", "0,1"], "--symbol-bonuses cannot be given with --kind lexicon"),
        (["--lexicon", "words.txt"], "unknown setting 'decoder.lexicon' in the command line, where .* is 'beam'"),
        (["--kind", "lexicon", "--threshold", "0"], "decoder.threshold must be above 0, not 0.0"),
        (["--out", "no/where.yaml"], "--out no/where.yaml cannot be written"),
    ],
)
def test_arguments_that_make_no_sense(arguments, said):
    with pytest.raises(UserError, match=said):
        tune.main(["runs/none", "shards/none", "--lm", "none.arpa", "--out", "decoder.yaml", *arguments])


def test_a_language_model_of_other_symbols_is_refused_before_any_audio_is_read(checkpoint, tmp_path):
    words = write_arpa(tmp_path / "words.arpa", ["AN", "APPLE"])
    with pytest.raises(UserError, match="one of other symbols"):
        tune.main([str(checkpoint), "shards/none", "--lm", words, "--out", str(tmp_path / "decoder.yaml")])
