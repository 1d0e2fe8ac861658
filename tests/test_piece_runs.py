"""Whole runs of word pieces: properties 1 to 3, where their vocabulary comes from, and every command that follows."""

import base64
import json
import os
from functools import partial

import pytest
import soundfile
import torch
import yaml

from ddp_asr import align, cli, evaluate, transcribe
from ddp_asr.encoders import ENCODERS
from ddp_asr.recognition.recogniser import read_trained
from ddp_asr.runs import checkpoint
from ddp_asr.text.pieces import learn
from tests import tiny_training as tiny
from tests.tiny_recogniser import noises

SIZE = 9
PIECES = ("--vocabulary.kind=pieces", f"--vocabulary.size={SIZE}")
OTHER_TEXTS = ["bbbb' bbbb bb", "aaaa aa 'aaa"]


def not_learning() -> None:
    """A rank that must not learn pieces: each but the first, and all of them in a run that goes on."""
    from ddp_asr.text import pieces

    def refuse(*arguments: object) -> bytes:
        raise AssertionError("pieces were learnt again")

    pieces.learn = refuse  # type: ignore[assignment]


def only_the_first_rank_learns() -> None:
    if os.environ["RANK"] != "0":
        not_learning()


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_corpus):
    """A finished run on two processes."""
    runs = tmp_path_factory.mktemp("pieces")
    tiny.train(tiny_corpus.arguments(runs, "run", *PIECES), 2, [only_the_first_rank_learns])
    return runs / "run"


def test_the_vocabulary_is_in_the_checkpoints_and_in_the_run(run):
    state = read_trained(run).tokeniser
    assert state["kind"] == "pieces" and base64.b64decode(state["model"]) == (run / "pieces.model").read_bytes()
    weights = checkpoint.read(checkpoint.step_path(run, tiny.STEPS))["model"]
    assert weights["classifier.weight"].shape[0] == SIZE + 1


# ---- properties ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENCODERS)
def test_the_number_of_processes_changes_nothing(tiny_corpus, tmp_path, kind):
    for processes in (1, 3):
        (tmp_path / f"given-{processes}").mkdir()
        patches = [tiny.in_double, partial(tiny.writing_down, tmp_path / f"given-{processes}")]
        tiny.train(tiny_corpus.arguments(tmp_path, f"w{processes}", *PIECES, kind=kind), processes, patches)
        lines = [line for file in (tmp_path / f"given-{processes}").iterdir() for line in tiny.read_lines(file)]
        for epoch in range(tiny.STEPS // tiny.STEPS_PER_EPOCH):
            mine = [line for line in lines if (line["step"] - 1) // tiny.STEPS_PER_EPOCH == epoch]
            assert sorted(key for line in mine for key in line["keys"]) == [
                f"train-{number:02d}" for number in range(26)
            ]
    tiny.assert_close_runs(tmp_path / "w3", tmp_path / "w1", 1e-9)


@pytest.mark.slow
def test_a_stop_is_invisible_and_learns_nothing_again(run, tiny_corpus, tmp_path):
    tiny.train(tiny_corpus.arguments(tmp_path, "run", *PIECES, "--train.stop_at_step=5"), 2)
    tiny.train(tiny_corpus.arguments(tmp_path, "run", *PIECES), 2, [not_learning])
    tiny.assert_same_run(tmp_path / "run", run)


# ---- where the vocabulary comes from -------------------------------------------------------------------------------


def test_a_run_that_goes_on_refuses_another_vocabulary(run, tiny_corpus, tmp_path):
    (tmp_path / "other.model").write_bytes(learn(OTHER_TEXTS, SIZE, " ab'"))
    (tmp_path / "same.model").write_bytes((run / "pieces.model").read_bytes())

    def going_on(*options: str) -> tiny.Ranks:
        return tiny.start(tiny_corpus.arguments(run.parent, "run", *PIECES, *options), 1, [not_learning])

    for option, said in (
        (f"--vocabulary.model={tmp_path / 'other.model'}", r"trained with another vocabulary than .*other\.model"),
        ("--vocabulary.size=8", "was trained with vocabulary.size = 9 and this run has 8"),
        ("--vocabulary.drop=b", "was trained with vocabulary.drop = '' and this run has 'b'"),
    ):
        assert tiny.matches(said, going_on(option).fail())
    characters = tiny.start(tiny_corpus.arguments(run.parent, "run"))
    assert tiny.matches("vocabulary.kind = 'pieces' and this run has 'characters'", characters.fail())
    for model in ("same.model", "gone.model"):
        said = going_on(f"--vocabulary.model={tmp_path / model}", "--dry-run").succeed()
        assert f"from step {tiny.STEPS}" in said


def test_a_run_takes_the_pieces_of_a_file_and_the_weights_of_a_run_that_has_them(run, tiny_corpus, tmp_path):
    model = f"--vocabulary.model={run / 'pieces.model'}"
    options = (model, f"--train.init_from={run}", "--train.stop_at_step=1", "--optim.learning_rate=1e-12")
    tiny.train(tiny_corpus.arguments(tmp_path, "run", *PIECES, *options), 2, [not_learning])
    theirs, tuned = checkpoint.read(run / "best.pt")["averages"], tiny.final_state(tmp_path / "run", 1)["model"]
    assert all(torch.equal(weight, theirs[name]) for name, weight in tuned.items())
    assert (tmp_path / "run" / "pieces.model").read_bytes() == (run / "pieces.model").read_bytes()


@pytest.mark.parametrize("options", [(), ("--vocabulary.kind=pieces", "--vocabulary.size=8")])
def test_weights_of_other_pieces_are_taken_symbol_by_symbol(run, tiny_corpus, tmp_path, options):
    arguments = tiny_corpus.arguments(tmp_path, "run", f"--train.init_from={run}", "--dry-run", *options)
    said = tiny.train(arguments)
    symbols = 8 if options else 4
    assert f"{symbols} of {symbols} symbols; not taken are '" in said


def test_a_dry_run_learns_them_and_says_so(tiny_corpus, tmp_path):
    said = tiny.train(tiny_corpus.arguments(tmp_path, "run", *PIECES, "--dry-run"))
    assert "10 classes\n" in said and f"vocabulary        {SIZE} word pieces, " in said
    assert "learnt from the transcripts, such as '" in said and not (tmp_path / "run").exists()


def test_more_pieces_than_the_transcripts_have_are_one_sentence_of_one_rank(tiny_corpus, tmp_path):
    arguments = tiny_corpus.arguments(tmp_path, "run", *PIECES, "--vocabulary.size=5000")
    assert tiny.matches(
        r"size = 5000 pieces cannot be learnt of .* at most \d+\): lower", tiny.start(arguments, 2).fail()
    )


# ---- the commands that follow --------------------------------------------------------------------------------------


def test_every_command_works_with_a_run_of_pieces(run, tiny_corpus, tmp_path, capsys):
    lm, decoder, audio = tmp_path / "lm.arpa", tmp_path / "beam.yaml", tmp_path / "noise.wav"
    assert cli.main(["lm", "--run", str(run), "--order=3", "--out", str(lm)]) == 0
    assert "symbols (--unit piece)" in capsys.readouterr().out
    (tmp_path / "hot.txt").write_text("ab\na'a\n")
    settings = {"kind": "beam", "size": 6, "lm": str(lm), "hot_words": str(tmp_path / "hot.txt"), "n_best": 2}
    decoder.write_text(yaml.safe_dump({"decoder": settings}))
    assert evaluate.main([str(run), str(tiny_corpus.test), "--decoder", str(decoder)]) == 0
    soundfile.write(audio, noises(1.5), 16_000)
    assert transcribe.main([str(run), str(audio), "--decoder", str(decoder), "--format", "json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["text"] == " ".join(word["word"] for word in said["words"])
    assert align.main([str(run), str(audio), "--text", "Ab a ba'b"]) == 0
    aligned = json.loads(capsys.readouterr().out)
    assert [word["word"] for word in aligned["words"]] == ["ab", "a", "ba'b"]
    edges = [edge for word in aligned["words"] for edge in (word["start_s"], word["end_s"])]
    assert edges == sorted(edges) and edges[-1] <= 1.5
