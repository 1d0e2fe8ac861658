"""Whether a job whose ranks have ended is requeued, and the copy of the code that a job runs."""

import json
import os
import re
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddp_asr.errors import UserError
from launch import job
from launch.job import Ended, History, judge
from tests.conftest import REPOSITORY

NOTHING_BEFORE = History()


def ended(
    state=None, *, retry=True, reason="SIGTERM", slurm="RUNNING", exit_code=0, step=40, job_id="7", attempt=2, **more
):
    status = None
    if state is not None:
        status = {"state": state, "reason": reason, "retry": retry, "step": step, "job_id": job_id, "attempt": attempt}
        status |= more
    return Ended("7", 2, slurm, status, exit_code)


@pytest.mark.parametrize(
    ("attempt", "requeued", "good", "said"),
    [
        (ended("done", reason="all 3 epochs"), False, True, "done: all 3 epochs"),
        (ended("stopped"), True, True, "stopped by SIGTERM: requeued"),
        (ended("stopped", slurm="TIMEOUT"), True, True, "stopped by SIGTERM: requeued"),
        (ended("stopped", slurm="CANCELLED"), False, False, "cancelled: not requeued"),
        (ended("running", slurm="CANCELLED"), False, False, "cancelled: not requeued"),
        (
            ended("stopped", retry=False, reason="train.stop_at_step = 9"),
            False,
            True,
            "stopped: train.stop_at_step = 9",
        ),
        (ended("failed", retry=False, reason="bad shards"), False, False, "failed: bad shards; not requeued"),
        (
            ended("failed", reason="rank 3 is gone"),
            True,
            True,
            r"failed: rank 3 is gone; requeued \(failure 1 at step 40",
        ),
        (ended("running", exit_code=137), True, True, r"ended without writing why \(srun's exit code 137\)"),
        (ended("stopped", slurm="NODE_FAIL"), False, False, "Slurm says NODE_FAIL: it requeues the job by itself"),
        (ended("stopped", slurm="PENDING"), False, False, "Slurm says PENDING"),
        (ended(slurm="PREEMPTED", exit_code=1), True, True, "pre-empted before it could write a checkpoint: requeued"),
        (ended("running", slurm="PREEMPTED", exit_code=1), True, True, "pre-empted before it could write a checkpoint"),
        (ended("failed", slurm="PREEMPTED", reason="rank 3 is gone"), True, True, "pre-empted before it could write"),
        (ended("stopped", slurm="PREEMPTED"), True, True, "stopped by SIGTERM: requeued"),
        (ended("done", slurm="PREEMPTED", reason="all 3 epochs"), False, True, "done: all 3 epochs"),
        (ended("failed", retry=False, slurm="PREEMPTED"), False, False, "not requeued, because it would fail again"),
        (ended(exit_code=2), True, True, "ended before the run began"),
        (ended("done", refused="bad shards"), False, False, "^refused: bad shards; not requeued"),
        (ended("stopped", refused="bad shards"), False, False, "^refused: bad shards; not requeued"),
        (ended("stopped", refused="bad shards", attempt=1), True, True, "ended before the run began"),
        # What another job, or an attempt before, left there says nothing of this one.
        (ended("done", job_id="6", exit_code=2), True, True, "ended before the run began"),
        (ended("failed", attempt=1, retry=False, slurm="PREEMPTED"), True, True, "pre-empted before it could write"),
    ],
)
def test_what_becomes_of_a_job(attempt, requeued, good, said):
    verdict = judge(attempt, NOTHING_BEFORE)
    assert (verdict.requeue, verdict.good) == (requeued, good)
    assert re.search(said, verdict.sentence), verdict.sentence


@pytest.mark.parametrize(
    ("said", "state"),
    [
        ("JobState=RUNNING Reason=None Restarts=1", "RUNNING"),
        ("JobState=RUNNING Reason=None Restarts=1 PreemptTime=None", "RUNNING"),
        ("JobState=RUNNING Reason=None Restarts=1 PreemptTime=2026-11-28T14:56:49", "PREEMPTED"),
        ("JobState=RUNNING Reason=None Restarts=2 PreemptTime=2026-11-28T14:56:49", "REQUEUED"),
        ("JobState=COMPLETING Reason=TimeLimit Restarts=1", "TIMEOUT"),
        ("JobState=COMPLETING Reason=None Restarts=1", "CANCELLED"),
        ("JobState=COMPLETING Reason=None Restarts=2", "REQUEUED"),  # pre-empted, and its grace time is over
        ("JobState=PENDING Reason=BeginTime Restarts=2", "REQUEUED"),
        ("JobState=RUNNING Reason=None Restarts=2", "REQUEUED"),  # the next attempt's, and not ours to requeue
        ("", "UNKNOWN"),
    ],
)
def test_what_slurm_has_in_mind_with_the_second_attempt_of_a_job(said, state):
    assert job.slurm_state_of(dict(word.split("=") for word in said.split()), attempt=2) == state


statuses = st.sampled_from([None, "running", "stopped", "done", "failed"])


@given(statuses, st.booleans(), st.integers(0, 255), st.integers(0, 9))
def test_a_cancelled_job_is_never_requeued(state, retry, exit_code, failures):
    verdict = judge(ended(state, retry=retry, slurm="CANCELLED", exit_code=exit_code), History("7", failures=failures))
    assert not verdict.requeue


@given(st.sampled_from(["done", "failed", "stopped"]), st.text(min_size=1), st.integers(0, 255))
def test_what_would_only_end_the_same_way_is_never_requeued(state, slurm, exit_code):
    assert not judge(ended(state, retry=False, slurm=slurm, exit_code=exit_code), NOTHING_BEFORE).requeue


@given(st.sampled_from([None, "running", "failed"]), st.lists(st.integers(0, 3), min_size=12, max_size=12))
def test_failures_end_when_there_is_no_progress_and_only_then(state, progress):
    """Each attempt gets some steps further, and fails; three in a row that get nowhere are the last."""
    history, step, stuck = NOTHING_BEFORE, 0, 0
    for attempt, steps in enumerate(progress):
        step += steps
        stuck = 1 if steps or not attempt else stuck + 1
        record = {
            "state": state or "done",
            "retry": True,
            "reason": "",
            "step": step,
            "job_id": "7",
            "attempt": attempt,
        }
        own = attempt if state else attempt + 1  # an attempt that wrote nothing finds what the one before has left
        verdict = judge(Ended("7", own, "RUNNING", record, 1), history)
        assert verdict.requeue == (stuck < job.MAX_FAILURES)
        if not verdict.requeue:
            return
        history = History("7", failures=verdict.failures, failed_step=step)


def test_a_stop_between_two_failures_forgets_the_first():
    assert judge(ended("stopped"), History("7", failures=2, failed_step=40)).failures == 0


@pytest.mark.parametrize("state", [None, "running", "failed"])
def test_a_pre_emption_is_no_failure(state):
    verdict = judge(ended(state, slurm="PREEMPTED"), History("7", failures=2, failed_step=40))
    assert verdict.requeue and verdict.failures == 0


def test_failures_of_another_job_do_not_count():
    assert judge(ended("running"), History("6", failures=2, failed_step=40)).requeue


def test_the_frozen_code_is_what_runs(tmp_path):
    code = job.freeze_code(tmp_path)
    ours = {f"launch/{path.name}" for path in (REPOSITORY / "launch").glob("*.py")}
    ours |= {f"ddp_asr/{name}" for name in ours}  # where the program of a wheel has them
    ours |= {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "ddp_asr").rglob("*.py")}
    assert {str(path.relative_to(code)) for path in code.rglob("*.py")} == ours
    ask = "import ddp_asr.config, launch.job; print(ddp_asr.config.__file__, launch.job.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(code)}
    command = [sys.executable, "-c", ask]
    answer = subprocess.run(command, cwd=code, env=environment, check=True, capture_output=True, text=True)
    assert answer.stdout.split() == [str(code / "ddp_asr/config.py"), str(code / "launch/job.py")]


def test_a_task_of_an_array_finds_its_run(tmp_path, monkeypatch):
    (tmp_path / "submission.json").write_text(json.dumps({"runs": ["/runs/a", "/runs/b"]}))
    assert str(job.run_of_submission(tmp_path)) == "/runs/a"
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    assert str(job.run_of_submission(tmp_path)) == "/runs/b"


def test_a_task_of_an_array_is_requeued_without_the_others(monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert job._name_of_job() == "12"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "5")
    assert job._name_of_job() == "12_5"


def test_conclude_outside_a_job_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(UserError, match="SLURM_JOB_ID is not set: 'conclude' is for the batch script"):
        job.main(["conclude", "--run", str(tmp_path)])


@pytest.mark.parametrize(
    "trainers",
    [
        ["--run.name=other"],
        ["--run.name", "other"],
        ["--resume", "runs/a.b/step.pt", "--run.name=a", "--run.name=other"],
    ],
)
def test_the_run_of_a_trainers_command_line(tmp_path, trainers):
    settings = tmp_path / "small.yaml"
    settings.write_text("run: {dir: elsewhere}\n")
    options = job._parse(
        ["conclude", "--config", str(settings), *trainers, "--optim.learning_rate", "1", "--exit-code", "3"]
    )
    assert options.exit_code == 3
    assert str(job._run_directory(options)) == "elsewhere/other"


def test_failures_are_counted_in_the_run_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr("launch.cluster.scontrol_job", lambda job_id: {"JobState": "RUNNING"})
    monkeypatch.setattr("launch.cluster.run", lambda command: "")
    record = {"state": "failed", "retry": True, "reason": "", "step": 4, "job_id": "7", "attempt": 1}
    (tmp_path / "status.json").write_text(json.dumps(record))
    (tmp_path / "requeues.json").write_text('{"job_id": "7", "requeues": 2}')  # of another version
    for failures in (1, 2):
        assert job.conclude(tmp_path, exit_code=1).requeue
        assert job.read_history(tmp_path) == History("7", failures, failed_step=4)
    assert not job.conclude(tmp_path, exit_code=1).requeue


def test_a_job_that_never_gets_as_far_as_a_run_directory_is_not_requeued_for_ever(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr("launch.cluster.scontrol_job", lambda job_id: {"JobState": "RUNNING"})
    asked = []
    monkeypatch.setattr("launch.cluster.run", lambda command: asked.append(list(command)))
    verdicts = []
    for attempt in range(job.MAX_FAILURES):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(attempt))
        verdicts.append(job.conclude(tmp_path / "never", exit_code=2))
    assert [verdict.requeue for verdict in verdicts] == [True] * (job.MAX_FAILURES - 1) + [False]
    assert asked == [["scontrol", "requeue", "7"]] * (job.MAX_FAILURES - 1)
    assert not (tmp_path / "never").exists()
