"""The loop: what a step survives, what it names, and where it ends a run on every rank."""

from functools import partial
from pathlib import Path

import pytest
import torch

from ddp_asr.training.loop import Schedule, Tally
from tests import tiny_training as tiny


def schedule(**changes) -> Schedule:
    settings = {"evaluate_every_steps": 0, "save_every_steps": 0, "save_every_s": 0.0, "stop_at_step": 0}
    limits = {"max_nonfinite_steps": 2, "max_bad_samples": 2}
    return Schedule(**{"steps_per_epoch": 4, "epochs": 3, **settings, **limits, **changes})


def test_an_evaluation_is_due_at_each_epochs_end_or_every_so_many_steps_and_at_the_end():
    assert [step for step in range(13) if schedule().evaluation_due(step)] == [4, 8, 12]
    assert [step for step in range(13) if schedule(evaluate_every_steps=5).evaluation_due(step)] == [5, 10, 12]


def test_a_run_that_is_to_stop_at_a_step_wants_none_after_it():
    assert [step for step in range(13) if schedule(stop_at_step=11).stops_at(step)] == [11, 12]
    assert not any(schedule().stops_at(step) for step in range(13))


def test_padding_is_a_share_of_what_is_computed():
    assert Tally(samples=3.0, computed_samples=4.0).padding == 0.25 and Tally().padding == 1.0


# ---- saving --------------------------------------------------------------------------------------------------------


def announcing_checkpoints() -> None:
    """Rank 0 prints the name of every checkpoint that it hands over to be written."""
    from ddp_asr.runs.checkpoint import BackgroundWriter

    before = BackgroundWriter.submit

    def submit(self, path, state, then=None):
        print(f"saving {path.name}", flush=True)
        before(self, path, state, then)

    BackgroundWriter.submit = submit  # type: ignore[method-assign]


def test_a_stop_where_a_save_is_due_writes_one_checkpoint(tiny_corpus, tmp_path):
    """Twice would be within the grace time of a pre-emption."""
    options = ("--train.stop_at_step=6", "--train.eval_every_steps=100")  # save_every_steps is 3
    output = tiny.train(tiny_corpus.arguments(tmp_path, "run", *options), 1, [announcing_checkpoints])
    assert [line for line in output.splitlines() if line.startswith("saving")] == [
        "saving step-00000003.pt",
        "saving step-00000006.pt",
    ]


def announcing_devices() -> None:
    import os

    print(f"devices [{os.environ['CUDA_VISIBLE_DEVICES']}]", flush=True)


def test_a_tiny_training_sees_the_gpus_that_it_is_given(tiny_corpus, tmp_path):
    """tests/test_gpu.py trains on one; all others on CPUs, whatever the machine has."""
    stop = tiny_corpus.arguments(tmp_path, "run", "--train.stop_at_step=1")
    assert "devices []" in tiny.train(stop, 1, [announcing_devices])
    assert "devices [0]" in tiny.train(stop, 1, [announcing_devices], CUDA_VISIBLE_DEVICES="0")


# ---- non-finite steps ----------------------------------------------------------------------------------------------


def test_an_infinite_loss_on_one_rank_skips_the_step_on_all(tiny_corpus, tmp_path):
    """The ranks stay in step: training goes on, and the weights stay finite, on any number of them."""
    for name, processes in (("two", 2), ("one", 1)):
        patches = [partial(tiny.infinite_loss, steps=(3, 6), rank=processes - 1)]
        output = tiny.train(tiny_corpus.arguments(tmp_path, name, "--train.epochs=2"), processes, patches)
        lines = [line for line in tiny.metrics(tmp_path / name) if line["kind"] == "train"]
        assert [line["step"] for line in lines if line["loss"] is None] == [3, 6]
        assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1, 2, 2, 2]
        assert "step 3 skipped: non-finite loss in train-" in output and "step 6 skipped" in output
        state = tiny.final_state(tmp_path / name, 8)
        assert state["progress"]["skipped"] == 2 and state["progress"]["overflows"] == 0
        assert all(bool(weight.isfinite().all()) for weight in state["model"].values())
        # Adam has counted only the steps that were taken.
        assert {float(each["step"]) for each in state["optimizer"]["state"].values()} == {6.0}


@pytest.mark.parametrize("fuse", [1, 3])
def test_a_skipped_step_names_only_the_utterances_that_are_to_blame(tiny_corpus, tmp_path, fuse):
    (tmp_path / "given").mkdir()
    patches = [partial(tiny.infinite_loss, steps=(3,), rank=0), partial(tiny.writing_down, tmp_path / "given")]
    options = ("--train.epochs=1", f"--train.fuse_micro_batches={fuse}")
    output = tiny.train(tiny_corpus.arguments(tmp_path, "run", *options), 1, patches)
    given = [line for line in tiny.read_lines(tmp_path / "given" / "rank-0.jsonl") if line["step"] == 3]
    named = next(line for line in output.splitlines() if line.startswith("step 3 skipped"))
    firsts = [line["keys"][0] for line in given]  # the patch spoils the first of each batch
    assert len(firsts) == {1: 4, 3: 2}[fuse]
    assert named == f"step 3 skipped: non-finite loss in {', '.join(firsts)}"


@pytest.mark.parametrize("processes", [1, 3])
def test_too_many_non_finite_steps_end_the_run_and_keep_the_batch(tiny_corpus, tmp_path, processes):
    patches = [partial(tiny.infinite_loss, steps=range(2, 9), rank=processes - 1)]
    arguments = tiny_corpus.arguments(tmp_path, "run", "--train.max_nonfinite_steps=2")
    sentence = tiny.start(arguments, processes, patches).fail()
    assert sentence.startswith("3 steps had a non-finite loss or gradient, more than train.max_nonfinite_steps = 2")
    assert "lower optim.learning_rate" in sentence
    found = tiny.status(tmp_path / "run")
    assert (found["state"], found["retry"], found["step"]) == ("failed", False, 3) and found["reason"] == sentence
    for rank in range(processes):
        kept = torch.load(tmp_path / "run" / f"nonfinite-step-00000004-rank-{rank}.pt", weights_only=True)
        assert all(batch["keys"] and batch["waveforms"].dtype == torch.int16 for batch in kept)


def test_a_broken_gradient_is_not_taken_either(tiny_corpus, tmp_path):
    output = tiny.train(tiny_corpus.arguments(tmp_path, "run", "--train.epochs=1"), 2, [broken_gradient])
    assert "step 2 skipped: non-finite gradient in train-" in output
    lines = [line for line in tiny.metrics(tmp_path / "run") if line["kind"] == "train"]
    assert [line["gradient_norm"] is None for line in lines] == [False, True, False, False]
    assert lines[1]["loss"] is not None and lines[-1]["skipped"] == 1


def broken_gradient() -> None:
    """The loss of step 2 is finite and its gradient is not, as after an overflow in a backward pass."""
    from ddp_asr.training.learner import Learner

    before = Learner.accumulate

    def accumulate(self, batch, *, step, last):
        losses = before(self, batch, step=step, last=last)
        if step == 2 and last:
            next(iter(self.plain_model.parameters())).grad[0] = float("nan")
        return losses

    Learner.accumulate = accumulate  # type: ignore[method-assign]


# ---- utterances that no longer decode ------------------------------------------------------------------------------


def damaged(tiny_corpus, directory, keys):
    """The corpus with the audio of a few utterances overwritten after it was sharded."""
    from ddp_asr.data.index import read_index

    copy = tiny.copy_of(tiny_corpus, directory)
    index = read_index([copy.train])
    data = bytearray(Path(index.shards[0]).read_bytes())
    for row in range(len(index)):
        if index.key(row) in keys:
            data[index.offset[row] : index.offset[row] + 64] = bytes(64)
    Path(index.shards[0]).write_bytes(data)
    return copy


@pytest.mark.parametrize("processes", [1, 3])
def test_a_bad_sample_is_dropped_named_and_counted(tiny_corpus, tmp_path, processes):
    corpus = damaged(tiny_corpus, tmp_path / "copy", {"train-03", "train-17"})
    output = tiny.train(corpus.arguments(tmp_path, "run", "--train.epochs=2"), processes)
    named = [line for line in output.splitlines() if "no longer readable" in line]
    assert sum(line.count("train-03 (does not decode") for line in named) == 2
    assert sum(line.count("train-17 (does not decode") for line in named) == 2
    state = tiny.final_state(tmp_path / "run", 8)
    # Each once, however often an epoch meets it: one damaged file must not end a run of many epochs.
    assert state["progress"]["bad_keys"] == ["train-03", "train-17"] and state["progress"]["skipped"] == 0


def test_dropped_samples_change_nothing_else_over_processes_and_fused_micro_batches(tiny_corpus, tmp_path):
    corpus = damaged(tiny_corpus, tmp_path / "copy", {f"train-{number:02d}" for number in range(0, 26, 3)})
    for name, processes, fuse in (("w1", 1, 1), ("w3", 3, 1), ("fused", 1, 4)):
        options = ("--data.max_bad_samples=100", "--train.epochs=2", f"--train.fuse_micro_batches={fuse}")
        tiny.train(corpus.arguments(tmp_path, name, *options), processes)
    tiny.assert_close_runs(tmp_path / "w3", tmp_path / "w1", 1e-4, step=8)
    tiny.assert_close_runs(tmp_path / "fused", tmp_path / "w1", 1e-4, step=8, ignored=("padding",))


def test_too_many_bad_samples_end_the_run_on_every_rank(tiny_corpus, tmp_path):
    corpus = damaged(tiny_corpus, tmp_path / "copy", {"train-03", "train-17"})
    sentence = tiny.start(corpus.arguments(tmp_path, "run", "--data.max_bad_samples=1"), 3).fail()
    assert tiny.matches(r"^\d utterances could not be read, more than data.max_bad_samples = 1: .*--verify", sentence)
    found = tiny.status(tmp_path / "run")
    assert (found["state"], found["retry"], found["reason"]) == ("failed", False, sentence)
