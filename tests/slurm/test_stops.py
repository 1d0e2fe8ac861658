"""Pre-empted, out of time, cancelled, broken: what is stopped goes on as the same run, unless it must not."""

import re
import shutil

import pytest

from ddp_asr.runs import checkpoint
from launch.job import read_history
from tests import tiny_training as tiny
from tests.slurm import harness
from tests.slurm.harness import Gate, Shape
from tests.slurm.test_launch import TOLERANCE


def test_preempted_three_times_and_out_of_time_once(undisturbed, tiny_corpus, tmp_path):
    shape = Shape(partition="low", signal_s=10)
    jobs = harness.by_both(tiny_corpus, tmp_path, shape, hold=(2, 5, 8, 10))
    keys = {job: set() for job in jobs}
    for step in (2, 5, 8):
        for job in jobs:
            job.held(step)
            keys[job] |= harness.comet_keys(job.run)
        harness.preempt()
    for job in jobs:
        job.held(10)
        job.let_time_run_out()
    for job in jobs:  # nobody opens the gate: the time limit ends the wait
        harness.wait_until(lambda: job.restarts == 4, "the time limit to end the fourth attempt", job)  # noqa: B023
        job.limit_time(10)
    for job in jobs:
        job.succeed()
        assert harness.stops(job.run) == [(2, "SIGTERM"), (5, "SIGTERM"), (8, "SIGTERM"), (10, "SIGUSR2")]
        *before, last = job.accounted()
        assert last == "COMPLETED" and set(before) <= {"PREEMPTED", "REQUEUED"} and len(before) == job.restarts == 4
        assert len(keys[job] | harness.comet_keys(job.run)) == 1
        found = tiny.status(job.run)
        assert (found["state"], found["job_id"], found["attempt"]) == ("done", job.id, job.restarts + 1)
        tiny.assert_same_run(job.run, undisturbed(2))


@pytest.fixture
def preempt_send_user_signal():
    """A pre-emption is announced by the signal of `--signal` instead of SIGTERM."""
    harness.warn_with_user_signal(True)
    yield
    harness.warn_with_user_signal(False)


def test_preempted_by_a_user_signal_while_starting_and_in_training(
    undisturbed, tiny_corpus, tmp_path, preempt_send_user_signal
):
    """While it starts nothing can be saved, and that is no failure of the run."""
    gate = Gate(tmp_path / "gate").hold(0, attempt=1).hold(5)
    job = harness.submit(tiny_corpus, tmp_path, Shape(partition="low"), gate=gate)
    job.held(0)
    harness.preempt()
    job.held(5)
    assert "pre-empted before it could write a checkpoint: requeued" in job.output()
    assert read_history(job.run).failures == 0
    harness.preempt()
    job.succeed()
    assert harness.stops(job.run) == [(5, "SIGUSR2")] and job.restarts == 2
    tiny.assert_same_run(job.run, undisturbed(2))


def test_a_smaller_allocation_goes_on_with_fewer_ranks(undisturbed, tiny_corpus, tmp_path):
    gate = Gate(tmp_path / "gate").hold(4, 8)
    job = harness.submit(tiny_corpus, tmp_path, Shape(nodes="1-4", partition="low"), gate=gate)
    assert job.held(4)["world_size"] == 4
    with harness.occupied(2):
        assert job.held(8)["world_size"] == 2
        gate.open(8)
        job.succeed()
    assert job.restarts == 1
    tiny.assert_close_runs(job.run, undisturbed(1), TOLERANCE)


def test_a_cancelled_job_stays_away_and_its_run_goes_on(undisturbed, tiny_corpus, tmp_path):
    """The one on as many nodes as before, the other on one node with another number of ranks."""
    cancelled = harness.by_both(tiny_corpus, tmp_path, Shape(), hold=(7,))
    for job in cancelled:
        job.held(7)
    for job in cancelled:
        harness.ask("scancel", job.id)
    for job in cancelled:
        assert job.wait() == "CANCELLED" and job.restarts == 0
        found = tiny.status(job.run)
        assert (found["state"], found["retry"], found["step"]) == ("stopped", True, 7)
        assert checkpoint.step_path(job.run, 7).is_file()
    same = harness.submit(tiny_corpus, tmp_path, Shape(), name="submit")
    other = harness.sbatch(tiny_corpus, tmp_path, Shape(nodes="1", ranks=3), name="sbatch")
    for job in (same, other):
        job.succeed()
        assert "going on from step 7" in job.output()
    tiny.assert_same_run(same.run, undisturbed(2))
    assert "3 processes" in other.output()
    tiny.assert_close_runs(other.run, undisturbed(1), TOLERANCE)
    assert [job.accounted() for job in cancelled] == [["CANCELLED"], ["CANCELLED"]]


# ---- broken --------------------------------------------------------------------------------------------------------


def test_data_that_went_bad_in_the_queue_ends_the_job_for_good(tiny_corpus, tmp_path):
    damaged, removed = (tiny.copy_of(tiny_corpus, tmp_path / name) for name in ("damaged", "removed"))
    with harness.occupied():
        first = harness.submit(damaged, tmp_path, Shape(nodes="1", ranks=2), name="first")
        second = harness.submit(removed, tmp_path, Shape(nodes="1"), name="second")
        for shard in damaged.train.glob("*.tar"):
            shard.write_bytes(bytes(shard.stat().st_size))
        shutil.rmtree(removed.train)
    assert first.wait() == "FAILED" and first.restarts == 0
    found = tiny.status(first.run)
    assert (found["state"], found["retry"]) == ("failed", False)
    assert "utterances could not be read" in found["reason"]
    assert "not requeued, because it would fail again" in first.output()

    assert second.wait() == "FAILED" and second.restarts <= 2
    assert "there are no shards at" in second.output() and "Traceback" not in second.output()


def test_one_that_fails_again_and_again_without_progress_is_given_up(tiny_corpus, tmp_path):
    gate = Gate(tmp_path / "gate").crash(5)
    job = harness.sbatch(tiny_corpus, tmp_path, Shape(nodes="1"), gate=gate)
    assert job.wait() == "FAILED" and job.restarts == 2
    assert re.search("not requeued: 3 attempts in a row have failed at step 4", job.output())
    assert read_history(job.run).failures == 3
    assert tiny.status(job.run)["reason"].startswith("ZeroDivisionError")
