"""The grid of a tiny model with random weights over real shards: every point is what `evaluate` finds with it."""

import json

import pytest

from ddp_asr import evaluate, tune
from ddp_asr.config import Beam, load_decoder
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
    assert [(weight, bonus) for weight, bonus, *_ in points] == [(w, b) for w in ("0.5", "1") for b in ("0", "1", "2")]
    best = min(points, key=lambda point: (float(point[2]), float(point[4])))
    assert load_decoder(out) == Beam(size=2, lm=lm, lm_weight=float(best[0]), symbol_bonus=float(best[1]))
    assert f"the best of --lm-weights is {best[0]}, an end of the grid" in warned  # there are only ends
    assert evaluate.main([str(checkpoint), str(shards), "--decoder", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [f"{100 * facts['wer']:.2f}", f"{100 * facts['cer']:.2f}"] == [best[2], best[4]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lm-weights", "0.5;1"], "--lm-weights must be finite numbers with commas between, not '0.5;1'"),
        (["--lm-weights=-1,1"], "--lm-weights must be 0 or more, not -1"),
        (["--symbol-bonuses", "nan"], "--symbol-bonuses must be finite numbers"),
        (["--size", "0"], "--size must be 1 or more"),
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
