"""What runs inside a job: the training of each node, and the decision about the job when all ranks have ended.

    task on each node   Training()    ->  node.start  ->  torchrun  ->  ddp_asr.train
    batch script        job conclude  ->  status.json, `scontrol show job`  ->  requeue, or why not

The trainer handles every signal that Slurm may send: all ranks agree on a step, write a checkpoint and end. `conclude`
then requeues the job under the same id. It does not look at the exit code, because torchrun ends with an error after
any signal. It looks at two things:

- status.json of this very attempt. A run that is `done`, `refused`, or `failed` with `retry: false`, is never requeued.
  A failure that may pass (a lost node, out of memory) is, but not after `MAX_FAILURES` in a row without a step of
  progress.
- Slurm's state of the job. A CANCELLED job is never requeued, although `scancel` sends the same SIGTERM as a
  pre-emption. A pre-emption never counts as a failure. What Slurm is requeueing by itself (a lost node) is left alone.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ddp_asr
from ddp_asr.config import load_config
from ddp_asr.errors import UserError, run_entry_point
from ddp_asr.files import is_count, is_text, read_json, replace_file
from ddp_asr.runs.directory import read_status

from . import cluster, node
from .node import attempt_of_job

MAX_FAILURES = 3
# Slurm's states in which the job ends unless the batch script requeues it.
_OURS_TO_REQUEUE = ("RUNNING", "TIMEOUT", "PREEMPTED")

EXAMPLES = """\
examples, for a batch script of your own (slurm/train.sbatch is one):
  python -m ddp_asr.launch.job conclude --config configs/librispeech_100.yaml --exit-code $status
  python -m ddp_asr.launch.job conclude --run runs/librispeech_100 --exit-code $status
"""


# ---- on each node --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """A training, as submitit calls it once in each task: it becomes the torchrun of its node."""

    config: Path
    resume: str = "auto"
    in_process: bool = False  # for debugging: a single rank in this process, without torchrun

    def __call__(self) -> None:
        arguments = ["--config", str(self.config), "--resume", self.resume]
        if not self.in_process:
            node.start("ddp_asr.train", arguments)
        train = importlib.import_module("ddp_asr.train")  # by name, because no module of `launch` may import torch
        status = run_entry_point(lambda: train.main(arguments))
        if status:
            raise SystemExit(status)


def freeze_code(folder: Path) -> Path:
    """Copies the code that runs now to `folder`/code, so that editing the checkout never changes a queued job."""
    target = folder / "code"
    for package in (Path(ddp_asr.__file__).parent, Path(__file__).parent):
        shutil.copytree(package, target / package.name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    return target


# ---- when all ranks have ended -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class History:
    """What earlier attempts of a job have left in requeues.json."""

    job_id: str = ""
    failures: int = 0  # in a row, without a step of progress between them
    failed_step: int = -1


@dataclass(frozen=True)
class Verdict:
    """What happens to a job."""

    requeue: bool
    good: bool  # whether the batch script ends with 0
    sentence: str
    failures: int = 0


@dataclass(frozen=True)
class Ended:
    """An attempt that has ended."""

    job_id: str
    attempt: int
    slurm_state: str  # of the job now, see `slurm_state_of`
    status: dict[str, Any] | None  # the run's status.json
    exit_code: int  # srun's; it is told to the user and decides nothing


def judge(ended: Ended, history: History) -> Verdict:
    """Whether the job is requeued."""
    if ended.slurm_state == "CANCELLED":
        return Verdict(False, False, "cancelled: not requeued; submitted again, the run goes on from its checkpoint")
    status = ended.status or {}
    own = (status.get("job_id"), status.get("attempt")) == (ended.job_id, ended.attempt)
    if own and "refused" in status:  # state and reason are those of the attempt before
        return Verdict(False, False, f"refused: {status['refused']}; not requeued, because it would be refused again")
    state, reason = (status.get("state"), status.get("reason", "")) if own else (None, "")
    if state == "done":
        return Verdict(False, True, f"done: {reason}")
    if state == "stopped" and not status.get("retry", True):
        return Verdict(False, True, f"stopped: {reason}; nothing is left to do under these settings")
    if state == "failed" and not status.get("retry", True):
        return Verdict(False, False, f"failed: {reason}; not requeued, because it would fail again")
    if ended.slurm_state not in _OURS_TO_REQUEUE:
        return Verdict(False, False, f"Slurm says {ended.slurm_state}: it requeues the job by itself, or has ended it")
    if state == "stopped":
        return Verdict(True, True, f"stopped by {reason}: requeued")
    if ended.slurm_state == "PREEMPTED":
        return Verdict(True, True, "pre-empted before it could write a checkpoint: requeued")
    return _judge_failure(_what_failed(state, reason, ended.exit_code), status.get("step", 0), ended.job_id, history)


def _judge_failure(what: str, step: int, job_id: str, history: History) -> Verdict:
    no_progress = (history.job_id, history.failed_step) == (job_id, step)
    failures = history.failures + 1 if no_progress else 1
    if failures >= MAX_FAILURES:
        why = f"{failures} attempts in a row have failed at step {step} without progress"
        return Verdict(False, False, f"{what}; not requeued: {why}", failures)
    count = f"failure {failures} at step {step}, at most {MAX_FAILURES}"
    return Verdict(True, True, f"{what}; requeued ({count})", failures)


def _what_failed(state: str | None, reason: str, exit_code: int) -> str:
    if state == "failed":
        return f"failed: {reason}"
    if state == "running":
        return f"the ranks ended without writing why (srun's exit code {exit_code}): killed, perhaps for memory"
    return f"the ranks ended before the run began (srun's exit code {exit_code}); see their logs"


def slurm_state_of(job: dict[str, str], attempt: int) -> str:
    """What Slurm is doing with a job whose batch script still runs, from what `scontrol show job` says.

    A job that Slurm is ending is COMPLETING, whatever the reason; TimeLimit is named, `scancel` is not. When Slurm
    requeues a job, it counts the restart at once. The same holds when the next attempt already runs, and this one is
    left over on a node that was cut off.
    """
    state = job.get("JobState", "UNKNOWN")
    if int(job.get("Restarts", attempt - 1)) >= attempt:
        return "REQUEUED"
    if state == "COMPLETING":
        return "TIMEOUT" if job.get("Reason") == "TimeLimit" else "CANCELLED"
    if state == "RUNNING" and job.get("PreemptTime", "None") != "None":  # a new attempt has None again
        return "PREEMPTED"
    return state


def conclude(run: Path, exit_code: int) -> Verdict:
    """Judges the attempt that has just ended in `run`, and requeues its job if that is the verdict.

    Raises:
        UserError: this is no batch script of a Slurm job, or Slurm refuses.
    """
    job_id, attempt = os.environ.get("SLURM_JOB_ID"), attempt_of_job()
    if job_id is None:
        raise UserError("SLURM_JOB_ID is not set: 'conclude' is for the batch script of a Slurm job, after srun")
    slurm_state = slurm_state_of(cluster.scontrol_job(job_id) or {}, attempt)
    status, has_directory = read_status(run), run.is_dir()
    # Without a run directory, nothing could be written down: each attempt before must have failed like this one.
    history = read_history(run) if has_directory else History(job_id, failures=attempt - 1, failed_step=0)
    verdict = judge(Ended(job_id, attempt, slurm_state, status, exit_code), history)
    if has_directory and slurm_state != "REQUEUED":  # if it is, the next attempt may be writing here
        new = History(job_id, verdict.failures, (status or {}).get("step", 0))
        replace_file(run / "requeues.json", json.dumps(asdict(new)) + "\n")
    if verdict.requeue:
        cluster.run(["scontrol", "requeue", _name_of_job()])
    return verdict


def _name_of_job() -> str:
    """The id by which Slurm requeues this job alone.

    The last task of an array has the array's own id as its SLURM_JOB_ID, by which Slurm would requeue all tasks.
    """
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def read_history(run: Path) -> History:
    try:
        record = read_json(run / "requeues.json", {"job_id": is_text, "failures": is_count, "failed_step": is_count})
        return History(**record or {})
    except (OSError, TypeError):  # unreadable, or written by another version
        return History()


def run_of_submission(folder: Path) -> Path:
    """The run directory of this job among those of its submission."""
    runs: Any = (read_json(folder / "submission.json") or {}).get("runs")
    try:
        return Path(runs[int(os.environ.get("SLURM_ARRAY_TASK_ID") or 0)])
    except (TypeError, LookupError, ValueError):
        raise UserError(f"{folder}/submission.json does not name the run of this job: name it with --run DIR") from None


def conclude_command(folder: Path) -> str:
    """The shell line that concludes a job of the submission in `folder`."""
    command = [sys.executable, "-m", "ddp_asr.launch.job", "conclude", "--submission", str(folder)]
    return f"{shlex.join(command)} --exit-code $status"


# ---- the command ---------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    verdict = conclude(_run_directory(options), options.exit_code)
    print(f"{time.strftime('%F %T')} job {os.environ['SLURM_JOB_ID']}, attempt {attempt_of_job()}: {verdict.sentence}")
    return 0 if verdict.good else 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ddp_asr.launch.job",
        description="Decides in a batch script, after srun, whether the job is requeued, and requeues it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=["conclude"], help="what to do")
    run = parser.add_mutually_exclusive_group(required=True)
    run.add_argument("--run", type=Path, metavar="DIR", help="the run directory")
    run.add_argument("--config", type=Path, metavar="FILE", help="its settings; the trainer's options may follow")
    run.add_argument("--submission", type=Path, metavar="DIR", help="a folder that launch.submit has made")
    parser.add_argument("--exit-code", type=int, default=0, metavar="N", help="srun's")
    for name in ("--run.dir", "--run.name"):
        parser.add_argument(name, metavar="TEXT", help="as on the trainer's command line, with --config")
    # The rest of the trainer's command line does not change where the run lies.
    return parser.parse_known_args(argv)[0]


def _run_directory(options: argparse.Namespace) -> Path:
    if options.submission is not None:
        return run_of_submission(options.submission)
    if options.run is not None:
        return Path(options.run)
    given = {name: getattr(options, name) for name in ("run.dir", "run.name")}
    config = load_config(options.config, [f"--{name}={text}" for name, text in given.items() if text is not None])
    return Path(config.run.dir) / config.run.name


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
