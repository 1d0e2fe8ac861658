"""A stop is invisible (property 3), and what exists is complete (property 7): stopped, killed, resized, damaged."""

import json
import os
import shutil
import signal
import struct
import threading
import zipfile
from functools import partial
from pathlib import Path

import pytest
import torch

from ddp_asr.runs import checkpoint
from tests import tiny_training as tiny
from tests.comet_archive import in_archive


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, tiny_corpus):
    """Gives the run directory of an undisturbed training on so many processes."""
    runs, done = tmp_path_factory.mktemp("undisturbed"), set()

    def of(processes: int, *patches: tiny.Patch) -> Path:
        name = f"w{processes}{'-double' if patches else ''}"
        if name not in done:
            tiny.train(tiny_corpus.arguments(runs, name), processes, patches)
            done.add(name)
        return runs / name

    return of


# ---- stopped -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 3, 4])
def test_a_stop_at_any_step_is_invisible(undisturbed, tiny_corpus, tmp_path, processes):
    """In the middle of an epoch, before an evaluation, at one, and at the end of an epoch."""
    for stop in (2, 4, 5, 8):
        output = tiny.train(tiny_corpus.arguments(tmp_path, "run", f"--train.stop_at_step={stop}"), processes)
        assert f"stopped at step {stop}: train.stop_at_step = {stop}" in output
        found = tiny.status(tmp_path / "run")
        assert (found["state"], found["retry"], found["step"]) == ("stopped", False, stop)  # nothing to go on for
        assert checkpoint.step_path(tmp_path / "run", stop).is_file()
    assert "going on from step 8" in tiny.train(tiny_corpus.arguments(tmp_path), processes)
    found = tiny.status(tmp_path / "run")
    assert (found["state"], found["retry"], found["step"], found["attempt"]) == ("done", False, tiny.STEPS, 5)
    tiny.assert_same_run(tmp_path / "run", undisturbed(processes))


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("float64", 1e-9)])
def test_a_stop_may_change_the_number_of_processes(undisturbed, tiny_corpus, tmp_path, dtype, tolerance):
    patches = [tiny.in_double] if dtype == "float64" else []
    for processes, stop in ((1, 2), (4, 5), (2, 7), (3, 0)):
        tiny.train(tiny_corpus.arguments(tmp_path, "run", f"--train.stop_at_step={stop}"), processes, patches)
    tiny.assert_close_runs(tmp_path / "run", undisturbed(3, *patches), tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2], ids=lambda number: number.name)
def test_a_signal_to_one_rank_stops_all_at_the_next_boundary(undisturbed, tiny_corpus, tmp_path, number):
    """Step 5 is one after which an evaluation is due: the stop comes before it, and the resume makes up for it."""
    gate = tiny.Gate(tmp_path, step=5, rank=2)
    ranks = tiny.start(tiny_corpus.arguments(tmp_path), 3, [gate])
    gate.wait()
    os.kill(ranks.processes[1].pid, number)
    # The rank that was signalled may be waiting for the one that is held.
    gate.open()
    output = ranks.succeed()
    found = tiny.status(tmp_path / "run")
    assert (found["state"], found["retry"], found["step"]) == ("stopped", True, 5)
    assert found["reason"] == number.name and f"stopped at step 5: {number.name}" in output
    lines = [(line["kind"], line["step"]) for line in tiny.metrics(tmp_path / "run")]
    assert lines == [*(("train", step) for step in (1, 2, 3, 4)), ("epoch", 4), ("train", 5)]
    tiny.train(tiny_corpus.arguments(tmp_path), 3)
    tiny.assert_same_run(tmp_path / "run", undisturbed(3))


@pytest.mark.slow
def test_a_stop_in_the_middle_of_an_evaluation_makes_it_anew(undisturbed, tiny_corpus, tmp_path):
    gate = tiny.Gate(tmp_path, step=5, rank=1, evaluation=True)
    ranks = tiny.start(tiny_corpus.arguments(tmp_path), 3, [gate])
    gate.wait()
    os.kill(ranks.processes[1].pid, signal.SIGTERM)
    gate.open()
    assert "stopped at step 5: SIGTERM" in ranks.succeed()
    assert [line["kind"] for line in tiny.metrics(tmp_path / "run")] == [*["train"] * 4, "epoch", "train"]
    tiny.train(tiny_corpus.arguments(tmp_path), 3)
    tiny.assert_same_run(tmp_path / "run", undisturbed(3))


@pytest.mark.slow
def test_torchrun_hands_a_sigterm_on(undisturbed, tiny_corpus, tmp_path):
    arguments = tiny_corpus.arguments(tmp_path, "run", "--train.epochs=200")
    torchrun = tiny.Torchrun(arguments, 3)
    ranks = torchrun.ranks()
    tiny.wait_until(lambda: tiny.lines_of(tmp_path / "run") > 2, "the first steps")
    os.kill(torchrun.popen.pid, signal.SIGTERM)
    torchrun.wait()
    assert not any(map(tiny.is_alive, ranks)) and "Traceback" not in torchrun.output.split("torch/distributed")[0]
    found = tiny.status(tmp_path / "run")
    assert (found["state"], found["retry"], found["reason"]) == ("stopped", True, "SIGTERM")
    assert checkpoint.step_path(tmp_path / "run", found["step"]).is_file()
    assert f"stopped at step {found['step']}: SIGTERM" in torchrun.output


@pytest.mark.slow
def test_ranks_whose_torchrun_was_killed_stop_as_on_sigterm(tiny_corpus, tmp_path):
    torchrun = tiny.Torchrun(tiny_corpus.arguments(tmp_path, "run", "--train.epochs=200"), 2)
    ranks = torchrun.ranks()
    tiny.wait_until(lambda: tiny.lines_of(tmp_path / "run") > 2, "the first steps")
    os.kill(torchrun.popen.pid, signal.SIGKILL)
    tiny.wait_until(lambda: not any(map(tiny.is_alive, ranks)), "the ranks to end", limit_s=30)
    torchrun.wait()
    found = tiny.status(tmp_path / "run")
    assert (found["state"], found["retry"]) == ("stopped", True), torchrun.output
    assert found["reason"] == "torchrun is gone"
    assert checkpoint.step_path(tmp_path / "run", found["step"]).is_file()


# ---- killed --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_killed_three_times_is_still_the_same_run(tiny_corpus, tmp_path):
    """kill -9 of everything, torchrun, ranks and tracking: the same weights, and every step once for Comet."""
    arguments = partial(tiny_corpus.arguments, tmp_path)
    options = ("--train.epochs=20", "--train.eval_every_steps=30", "--tracking.mode=offline")
    tiny.train(arguments("undisturbed", *options, "--tracking.mode=off"), 2)
    run = tmp_path / "run"
    for steps in (10, 30, 50):
        torchrun = tiny.Torchrun(arguments("run", *options), 2)
        tiny.wait_until(lambda steps=steps: tiny.lines_of(run) > steps, f"step {steps}")
        torchrun.kill()
        assert torchrun.popen.returncode == -signal.SIGKILL
        assert tiny.status(run)["state"] == "running"
    torchrun = tiny.Torchrun(arguments("run", *options), 2)
    assert torchrun.wait() == 0, torchrun.output
    assert "going on from step" in torchrun.output

    assert tiny.differences(tiny.final_state(run, 80), tiny.final_state(tmp_path / "undisturbed", 80)) == []
    assert tiny.metrics(run) == tiny.metrics(tmp_path / "undisturbed")
    assert tiny.status(run)["state"] == "done" and tiny.status(run)["attempt"] == 4

    counts, _, _ = in_archive(run)
    lines = tiny.metrics(run)
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 81))
    assert [line["step"] for line in lines if line["kind"] == "test"] == [30, 60, 80]
    assert set(counts.values()) == {1}
    assert {step for context, name, step in counts if (context, name) == ("train", "loss")} == set(range(1, 81))
    assert {step for context, name, step in counts if (context, name) == ("test", "wer")} == {30, 60, 80}
    assert (run / "curves.png").is_file() and (run / "spectrogram.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_killed_ends_the_others(undisturbed, tiny_corpus, tmp_path, victim):
    gate = tiny.Gate(tmp_path, step=8, rank=victim)
    ranks = tiny.start(tiny_corpus.arguments(tmp_path), 3, [gate])
    gate.wait()
    ranks.processes[victim].kill()
    codes = ranks.wait(limit_s=30)
    assert codes == [-signal.SIGKILL if rank == victim else 2 for rank in range(3)]
    assert ranks.output.count("error: ") == 2 and ranks.output.count("lost the others") == 2, ranks.output
    assert "Traceback" not in ranks.output
    found = tiny.status(tmp_path / "run")
    assert (found["state"], found["retry"]) == ("failed" if victim else "running", True)
    assert (tmp_path / "run" / "lease.json").exists() == (victim == 0)
    assert "going on from step 6" in tiny.train(tiny_corpus.arguments(tmp_path), 3)  # save_every_steps is 3
    tiny.assert_same_run(tmp_path / "run", undisturbed(3))


@pytest.mark.slow
def test_a_rank_that_does_not_come_is_waited_for_as_long_as_set(undisturbed, tiny_corpus, tmp_path):
    gate = tiny.Gate(tmp_path, step=8, rank=1)
    ranks = tiny.start(tiny_corpus.arguments(tmp_path, "run", "--distributed.timeout_s=4"), 3, [gate])
    gate.wait()
    for rank in (0, 2):
        ranks.processes[rank].join(30)
    threading.Thread(target=gate.open, daemon=True).start()  # waits for ever if the rank has ended by itself
    codes = ranks.wait(limit_s=30)
    assert (codes[0], codes[2]) == (2, 2) and codes[1] in (1, 2)  # 1: it noticed by itself that the others had ended
    assert ranks.output.count("lost the others") == 3 and "Traceback" not in ranks.output, ranks.output
    tiny.train(tiny_corpus.arguments(tmp_path), 3)
    tiny.assert_same_run(tmp_path / "run", undisturbed(3))


def test_a_defect_of_ours_on_one_rank_ends_the_others(tiny_corpus, tmp_path):
    ranks = tiny.start(tiny_corpus.arguments(tmp_path), 3, [failing_at_step_4])
    assert ranks.wait(limit_s=30) == [2, 1, 2]
    assert "ZeroDivisionError" in ranks.logs[1].read_text() and ranks.output.count("Traceback") == 1
    assert ranks.output.count("lost the others") == 2
    assert (tiny.status(tmp_path / "run")["state"], tiny.status(tmp_path / "run")["retry"]) == ("failed", True)


def failing_at_step_4() -> None:
    from ddp_asr.training.learner import Learner

    before = Learner.accumulate

    def accumulate(self, batch, *, step, last):
        if step == 4 and os.environ["RANK"] == "1":
            raise ZeroDivisionError
        return before(self, batch, step=step, last=last)

    Learner.accumulate = accumulate  # type: ignore[method-assign]


# ---- what to go on from --------------------------------------------------------------------------------------------


@pytest.fixture
def stopped(tiny_corpus, tmp_path):
    """A run with checkpoints at steps 3, 6 and 7."""
    tiny.train(tiny_corpus.arguments(tmp_path, "run", "--train.stop_at_step=7"))
    return tmp_path / "run"


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "a flipped bit":  # inside a tensor: what pads the tensors to their alignment belongs to none
        with zipfile.ZipFile(path) as archive:
            member = max(archive.infolist(), key=lambda member: member.file_size)
        name_bytes, extra_bytes = struct.unpack_from("<HH", data, member.header_offset + 26)
        data[member.header_offset + 30 + name_bytes + extra_bytes + member.file_size // 2] ^= 1
    path.write_bytes(data[: len(data) // 2] if how == "truncated" else data)


@pytest.mark.parametrize("how", ["a flipped bit", "truncated"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(undisturbed, tiny_corpus, stopped, how):
    newest = checkpoint.step_path(stopped, 7)
    damage(newest, how)
    output = tiny.train(tiny_corpus.arguments(stopped.parent))
    assert f"{newest} is damaged" in output and "trying the one before" in output
    assert "going on from step 6" in output
    tiny.assert_same_run(stopped, undisturbed(1))


def test_when_all_checkpoints_are_damaged_nothing_is_begun_anew(tiny_corpus, stopped):
    for path in (stopped / "checkpoints").iterdir():
        damage(path, "truncated")
    sentence = tiny.start(tiny_corpus.arguments(stopped.parent), 2).fail()
    assert f"every checkpoint in {stopped / 'checkpoints'} is damaged" in sentence


def test_a_named_checkpoint_goes_on_from_there(undisturbed, tiny_corpus, stopped):
    chosen = checkpoint.step_path(stopped, 3)
    output = tiny.train([*tiny_corpus.arguments(stopped.parent), "--resume", str(chosen)])
    assert "going on from step 3" in output
    tiny.assert_same_run(stopped, undisturbed(1))


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda state: state["model"].popitem(), "Missing key"),
        (lambda state: state["optimizer"]["state"].pop(0), "0"),
        (lambda state: state["optimizer"]["state"][1].update(exp_avg=torch.zeros(())), "exp_avg of weight 1 has the"),
        (lambda state: state["optimizer"]["state"][1].update(exp_avg_sq=None), "exp_avg_sq of weight 1 is no tensor"),
        (lambda state: state.pop("scaler"), "scaler"),
    ],
    ids=["weight missing", "moments missing", "moment of another shape", "moment of another type", "scaler missing"],
)
def test_a_state_that_does_not_fit_is_refused_in_a_sentence(tiny_corpus, stopped, change, why):
    newest = checkpoint.step_path(stopped, 7)
    state = checkpoint.read(newest)
    change(state)
    checkpoint.write(newest, state, may_write=lambda: None)
    sentence = tiny.start(tiny_corpus.arguments(stopped.parent), 1).fail()
    assert tiny.matches(rf"the checkpoint does not fit the model of these settings \(.*{why}.*--resume PATH", sentence)


def test_a_requeued_job_goes_on_from_what_it_has_trained(undisturbed, tiny_corpus, stopped):
    """Slurm gives it the command line of its first attempt again, whose --resume was for that attempt."""
    arguments = tiny_corpus.arguments(stopped.parent, "run", "--train.save_every_steps=2")
    chosen = ["--resume", str(checkpoint.step_path(stopped, 3))]
    output = tiny.train([*arguments, *chosen, "--train.stop_at_step=6"], SLURM_JOB_ID="7")
    assert "going on from step 3" in output
    output = tiny.train([*arguments, *chosen, "--train.stop_at_step=7"], SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    assert "going on from step 6" in output
    output = tiny.train([*arguments, "--resume", "never"], SLURM_JOB_ID="7", SLURM_RESTART_COUNT="2")
    assert "going on from step 7" in output
    tiny.assert_same_run(stopped, undisturbed(1))


def test_a_second_start_in_the_same_allocation_is_no_requeue(tiny_corpus, stopped):
    chosen = checkpoint.step_path(stopped, 3)
    for _ in range(2):
        arguments = tiny_corpus.arguments(stopped.parent, "run", "--train.stop_at_step=6")
        assert "going on from step 3" in tiny.train([*arguments, "--resume", str(chosen)], SLURM_JOB_ID="7")


def test_a_finished_run_says_so(undisturbed, tiny_corpus, tmp_path):
    shutil.copytree(undisturbed(1), tmp_path / "run")
    before = tiny.metrics(tmp_path / "run")
    assert "already finished at step 12" in tiny.train(tiny_corpus.arguments(tmp_path), 2)
    assert tiny.status(tmp_path / "run")["state"] == "done" and tiny.metrics(tmp_path / "run") == before


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--resume", "never"], r"holds checkpoints, the newest of step 7.*--resume never.*another --run.name"),
        (["--optim.learning_rate=0.1"], r"trained with optim.learning_rate = 0.003 .* 0.1: set --optim.learning_rate="),
        (
            ["--encoder.rnn_size=8"],
            r"trained with encoder.rnn_size = 16 and this run has 8: set --encoder.rnn_size=16",
        ),
        (["--augment.speeds=1.0"], r"trained with augment.speeds = \[0.9, 1.0, 1.1\] .* set --augment.speeds=0.9,1.0"),
        (
            ["--train.epochs=9"],
            r"trained with train.epochs = 3 and this run has 9: set --train.epochs=3 to go on, or to train longer "
            r"begin a new run from its weights, .*: --run.name=NEW --train.init_from=\S*/run$",
        ),
        (["--data.train=TEST"], r"trained on other utterances than those in .*name the shards it was trained on"),
        (["--resume", "TINY/tiny.yaml"], r"checkpoint .*tiny.yaml is damaged.*--resume PATH"),
        (["--resume", "nowhere.pt"], r"checkpoint nowhere.pt cannot be read: No such file.*give the path of a .pt"),
    ],
)
def test_what_does_not_fit_the_checkpoint_is_named(tiny_corpus, stopped, options, expected):
    before, status = {path: path.read_bytes() for path in stopped.rglob("*.pt")}, tiny.status(stopped)
    options = [
        option.replace("TEST", str(tiny_corpus.test)).replace("TINY", str(tiny_corpus.directory)) for option in options
    ]
    sentence = tiny.start([*tiny_corpus.arguments(stopped.parent), *options, "--dry-run"]).fail()
    assert tiny.matches(expected, sentence) and tiny.status(stopped) == status
    sentence = tiny.start([*tiny_corpus.arguments(stopped.parent), *options], 2).fail()
    assert tiny.matches(expected, sentence)
    assert {path: path.read_bytes() for path in stopped.rglob("*.pt")} == before
    # Neither `failed` nor another epoch over a run that nothing is wrong with.
    assert tiny.status(stopped) == status | {"refused": sentence, "attempt": 2}


@pytest.mark.parametrize(
    "former", [("running", True), ("failed", True), ("done", False)], ids=["killed", "failed", "finished"]
)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_refusal_leaves_the_status_of_any_run(tiny_corpus, stopped, former, processes):
    status = tiny.status(stopped) | {"state": former[0], "retry": former[1]}
    (stopped / "status.json").write_text(json.dumps(status))
    sentence = tiny.start(tiny_corpus.arguments(stopped.parent, "run", "--train.epochs=7"), processes).fail()
    assert tiny.status(stopped) == status | {"refused": sentence, "attempt": 2}


@pytest.mark.parametrize("options", [["--train.epoch=7"], ["--train.epochs=0"], ["--batch.micro_batches=1"]], ids=str)
def test_a_mistake_in_the_settings_changes_no_file_of_the_run(tiny_corpus, stopped, options):
    before = {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()}
    tiny.start([*tiny_corpus.arguments(stopped.parent), *options], 2).fail()
    assert {path: path.read_bytes() for path in stopped.rglob("*") if path.is_file()} == before


def test_a_dry_run_says_from_where_the_run_would_go_on(tiny_corpus, stopped):
    arguments = [*tiny_corpus.arguments(stopped.parent), "--dry-run", "--train.precision=auto"]
    newest = checkpoint.step_path(stopped, 7)
    assert f"starts            from step 7: {newest}\n" in tiny.train(arguments)
    damage(newest, "truncated")
    output = tiny.train(arguments)
    assert f"warning           {newest} is damaged" in output and "starts            from step 6: " in output
    chosen = checkpoint.step_path(stopped, 3)
    assert "starts            from step 3: " in tiny.train([*arguments, "--resume", str(chosen)])


def test_the_last_error_rate_is_known_after_a_resume(tiny_corpus, stopped):
    (line,) = [line for line in tiny.metrics(stopped) if line["kind"] == "test"]
    gate = tiny.Gate(stopped.parent, step=9)
    ranks = tiny.start(tiny_corpus.arguments(stopped.parent), 1, [gate])
    gate.wait()
    assert "step 8/12  loss" in ranks.output and f"last WER {100 * line['wer']:.1f} %" in ranks.output
    gate.open()
    ranks.succeed()


def files_of(run: Path) -> dict[Path, bytes]:
    """What an attempt that is refused must leave as it was."""
    return {path: path.read_bytes() for path in run.rglob("*") if path.suffix in (".pt", ".jsonl", ".yaml")}


@pytest.mark.parametrize("resume", ["auto", "never"])
@pytest.mark.parametrize("best", ["with best.pt", "without best.pt"])
@pytest.mark.parametrize("status", ["new status", "old status", "no status"])
def test_a_run_that_lost_its_checkpoints_is_not_trained_over(undisturbed, tiny_corpus, tmp_path, resume, best, status):
    run = tmp_path / "run"
    shutil.copytree(undisturbed(1), run, ignore=shutil.ignore_patterns("checkpoints"))
    if best == "without best.pt":
        (run / "best.pt").unlink()
    recorded = tiny.status(run)
    if status == "old status":  # of a version that did not record whether a checkpoint was saved
        recorded.pop("checkpoint_saved")
    (run / "status.json").write_text(json.dumps(recorded))
    if status == "no status":
        (run / "status.json").unlink()
    before = files_of(run)
    sentence = tiny.start([*tiny_corpus.arguments(tmp_path), "--resume", resume], 2).fail()
    assert tiny.matches(r"holds the results of a run up to step 12 and no checkpoint in .*another --run.name", sentence)
    assert (f"--resume {run / 'best.pt'}" in sentence) == (best == "with best.pt")
    assert files_of(run) == before
    assert tiny.status(run)["state"] == ("failed" if status == "no status" else "done")


def test_a_run_that_lost_its_checkpoints_goes_on_from_its_best_one(undisturbed, tiny_corpus, stopped):
    """As the refusal says: best.pt, here of the evaluation after step 5, has all that a checkpoint has."""
    shutil.rmtree(stopped / "checkpoints")
    output = tiny.train([*tiny_corpus.arguments(stopped.parent), "--resume", str(stopped / "best.pt")])
    assert "going on from step 5" in output
    tiny.assert_same_run(stopped, undisturbed(1))


@pytest.mark.parametrize("step, goes_on_from", [(3, None), (8, 5)], ids=["before an evaluation", "after an evaluation"])
def test_a_run_killed_before_its_first_checkpoint_starts_again_by_itself(
    undisturbed, tiny_corpus, tmp_path, step, goes_on_from
):
    """The evaluation after step 5 has written best.pt, which is as good as any checkpoint."""
    arguments = tiny_corpus.arguments(tmp_path, "run", "--train.save_every_steps=1000")
    gate = tiny.Gate(tmp_path, step=step)
    ranks = tiny.start(arguments, 1, [gate])
    gate.wait()
    ranks.kill()
    run = tmp_path / "run"
    assert tiny.lines_of(run) >= step - 1 and not (run / "checkpoints").exists()
    before = files_of(run)
    refused = tiny.start([*arguments, "--resume", "never"]).fail()
    assert tiny.matches(rf"holds the results of a run up to step {step - 1} and no checkpoint", refused)
    assert files_of(run) == before
    output = tiny.train(arguments)
    assert f"going on from step {goes_on_from}" in output if goes_on_from else "going on" not in output
    tiny.assert_same_run(run, undisturbed(1))


def test_a_run_records_its_first_checkpoint_once_it_is_on_the_disk(tiny_corpus, tmp_path):
    """Killed at once after that, without a word of its own; then its checkpoints are deleted."""
    gates = [tiny.Gate(tmp_path, step=3), tiny.Gate(tmp_path, step=4)]
    ranks = tiny.start(tiny_corpus.arguments(tmp_path), 1, gates)
    gates[0].wait()
    assert tiny.status(tmp_path / "run")["checkpoint_saved"] is False
    gates[0].open()
    gates[1].wait()
    assert tiny.status(tmp_path / "run")["checkpoint_saved"] is True
    ranks.kill()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    sentence = tiny.start(tiny_corpus.arguments(tmp_path)).fail()
    assert tiny.matches(r"holds the results of a run up to step 3 and no checkpoint", sentence)
    assert "best.pt" not in sentence


def test_settings_that_do_not_shape_the_result_may_change(undisturbed, tiny_corpus, stopped):
    others = ("--data.threads=1", "--distributed.stop_grace_s=3", "--train.keep_last=1", "--tracking.samples=1")
    tiny.train(tiny_corpus.arguments(stopped.parent, "run", *others))
    tiny.assert_same_run(stopped, undisturbed(1))
    assert [path.name for path in (stopped / "checkpoints").iterdir()] == ["step-00000012.pt"]
