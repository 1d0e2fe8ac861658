"""Pre-empted, out of time, cancelled, broken: what is stopped goes on as the same run, unless it must not."""

import json
import shutil

import pytest

from ddp_asr import checkpoint
from tests import tiny_training as tiny
from tests.slurm import harness
from tests.slurm.harness import Gate, Shape
from tests.slurm.test_launch import TOLERANCE


@pytest.fixture(params=[False, True], ids=["warned by SIGTERM", "warned by the job's own signal"])
def warning(request):
    """What a cluster announces a pre-emption by, as `preempt_send_user_signal` decides."""
    harness.warn_with_user_signal(request.param)
    yield "SIGUSR2" if request.param else "SIGTERM"
    harness.warn_with_user_signal(False)


def preempted_three_times_and_out_of_time_once(launcher, corpus, directory, warning):
    gate = Gate(directory / "gate").hold(2, 5, 8, 10)
    job = launcher(corpus, directory, Shape(partition="low", time="1", signal_s=10), gate=gate)
    keys = set()
    for step in (2, 5, 8):
        gate.wait(step, job)
        keys |= harness.comet_keys(job.run)
        harness.preempt()
    gate.wait(10, job)
    job.succeed()  # nobody opens the gate: the time limit does
    assert {(2, warning), (5, warning), (8, warning), (10, "SIGUSR2")} <= set(harness.stops(job.run))
    assert job.restarts >= 4
    *before, last = job.accounted()
    assert last == "COMPLETED" and set(before) <= {"PREEMPTED", "REQUEUED"} and len(before) == job.restarts
    assert len(keys | harness.comet_keys(job.run)) == 1
    found = tiny.status(job.run)
    assert (found["state"], found["job_id"], found["attempt"]) == ("done", job.id, job.restarts + 1)
    return job.run


def test_submitted_it_survives_preemptions_and_its_time_limit(undisturbed, tiny_corpus, tmp_path, warning):
    run = preempted_three_times_and_out_of_time_once(harness.submit, tiny_corpus, tmp_path, warning)
    tiny.assert_same_run(run, undisturbed(4))


def test_by_sbatch_it_survives_preemptions_and_its_time_limit(undisturbed, tiny_corpus, tmp_path):
    run = preempted_three_times_and_out_of_time_once(harness.sbatch, tiny_corpus, tmp_path, "SIGTERM")
    tiny.assert_same_run(run, undisturbed(4))


@pytest.mark.parametrize("by", harness.LAUNCHERS)
def test_a_smaller_allocation_goes_on_with_fewer_ranks(undisturbed, tiny_corpus, tmp_path, by):
    gate = Gate(tmp_path / "gate").hold(4, 8)
    job = harness.LAUNCHERS[by](tiny_corpus, tmp_path, Shape(nodes="1-4", ranks=1, partition="low"), gate=gate)
    assert gate.wait(4, job)["world_size"] == 4
    with harness.occupied(2):
        assert gate.wait(8, job)["world_size"] == 2
        gate.open(8)
        job.succeed()
    assert job.restarts == 1
    tiny.assert_close_runs(job.run, undisturbed(1), TOLERANCE)


# ---- cancelled -----------------------------------------------------------------------------------------------------


def cancelled_at_step_7(launcher, corpus, directory):
    gate = Gate(directory / "gate").hold(7)
    job = launcher(corpus, directory, Shape(), gate=gate)
    gate.wait(7, job)
    harness.ask("scancel", job.id)
    assert job.wait() == "CANCELLED" and job.restarts == 0
    found = tiny.status(job.run)
    assert (found["state"], found["retry"], found["step"]) == ("stopped", True, 7)
    assert checkpoint.step_path(job.run, 7).is_file()
    return job


def test_a_cancelled_job_stays_away_and_its_run_goes_on(undisturbed, tiny_corpus, tmp_path):
    cancelled = cancelled_at_step_7(harness.submit, tiny_corpus, tmp_path)
    job = harness.submit(tiny_corpus, tmp_path, Shape())
    job.succeed()
    assert "going on from step 7" in job.output() and job.id != cancelled.id
    assert cancelled.accounted() == ["CANCELLED"]
    tiny.assert_same_run(job.run, undisturbed(4))


def test_cancelled_on_two_nodes_it_goes_on_on_one(undisturbed, tiny_corpus, tmp_path):
    cancelled = cancelled_at_step_7(harness.sbatch, tiny_corpus, tmp_path)
    job = harness.sbatch(tiny_corpus, tmp_path, Shape(nodes="1", ranks=2))
    job.succeed()
    assert "going on from step 7" in job.output() and "2 process(es)" in job.output()
    assert cancelled.accounted() == ["CANCELLED"]
    tiny.assert_close_runs(job.run, undisturbed(1), TOLERANCE)


# ---- broken --------------------------------------------------------------------------------------------------------


def test_data_that_went_bad_in_the_queue_ends_the_job_for_good(tiny_corpus, tmp_path):
    corpus = tiny.copy_of(tiny_corpus, tmp_path / "corpus")
    with harness.occupied():
        job = harness.submit(corpus, tmp_path, Shape(nodes="1", ranks=2))
        for shard in corpus.train.glob("*.tar"):
            shard.write_bytes(bytes(shard.stat().st_size))
    assert job.wait() == "FAILED" and job.restarts == 0
    found = tiny.status(job.run)
    assert (found["state"], found["retry"]) == ("failed", False)
    assert "utterances could not be read" in found["reason"]
    assert "not requeued, because it would fail again" in job.output()


def test_data_that_left_while_it_was_queued_ends_the_job_for_good(tiny_corpus, tmp_path):
    corpus = tiny.copy_of(tiny_corpus, tmp_path / "corpus")
    with harness.occupied():
        job = harness.submit(corpus, tmp_path, Shape(nodes="1", ranks=1))
        shutil.rmtree(corpus.train)
    assert job.wait() == "FAILED" and job.restarts <= 2
    assert "there are no shards at" in job.output() and "Traceback" not in job.output()


@pytest.mark.parametrize("by", harness.LAUNCHERS)
def test_one_that_fails_again_and_again_without_progress_is_given_up(tiny_corpus, tmp_path, by):
    gate = Gate(tmp_path / "gate").crash(5)
    job = harness.LAUNCHERS[by](tiny_corpus, tmp_path, Shape(nodes="1", ranks=1), gate=gate)
    assert job.wait() == "FAILED" and job.restarts == 2
    assert "3 attempts in a row have failed" in job.output()
    assert json.loads((job.run / "requeues.json").read_text())["requeues"] == 2
    assert tiny.status(job.run)["reason"].startswith("ZeroDivisionError")
