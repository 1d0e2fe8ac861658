"""What runs inside a job: each rank's training, and what becomes of the job when all ranks have ended.

    every rank     Training()  ->  place from submitit  ->  RANK, MASTER_PORT ...  ->  ddp_asr.train
    batch script   python -m launch.job conclude  ->  status.json, `scontrol show job`  ->  requeue, or why not

The trainer takes every signal over, so whichever one Slurm sends, and to whichever process, all ranks agree on a stop,
write a checkpoint and end; `conclude` then asks for the same job again. It is judged by two witnesses and not by an
exit code, which torchrun makes 1 after any signal and Slurm 0 for a job that it then takes for finished:

- status.json of this very attempt: `done`, `refused`, and `failed` with `retry: false`, are never requeued. A failure
  that may pass (a lost node, an out-of-memory kill) is, but only `MAX_FAILURES` times in a row without a step of
  progress.
- Slurm's state of the job: a CANCELLED one is never requeued, although `scancel` sends the same SIGTERM as a
  pre-emption; one that Slurm is requeueing by itself (a lost node) is left to it.

A job's attempts (its restarts) never share a rendezvous: the port follows from job id and attempt, and the ranks' keys
in the store carry both (distributed.py).
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shlex
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ddp_asr.config import load_config
from ddp_asr.errors import UserError, run_entry_point
from ddp_asr.runs.directory import read_status
from launch import cluster

MAX_FAILURES = 3
# Below what Linux gives to outgoing connections (32768 and up), above what services are known by.
_PORTS = range(20000, 32000)
# Slurm's states in which nobody but the batch script asks for another attempt.
_OURS_TO_REQUEUE = ("RUNNING", "TIMEOUT")
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT)

EXAMPLES = """\
examples, for a batch script of your own (slurm/train.sbatch is one):
  python -m launch.job port
  python -m launch.job conclude --config configs/librispeech_100.yaml --exit-code $status
  python -m launch.job conclude --run runs/librispeech_100 --exit-code $status
"""


# ---- on every rank -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a task stands among those of its job."""

    rank: int
    world_size: int
    local_rank: int
    hosts: tuple[str, ...]  # of the job, rank 0's first
    job_id: str
    attempt: int  # counts from 1

    @classmethod
    def of_task(cls) -> Place:
        """This process's place, in a job that submitit has started."""
        from submitit import JobEnvironment

        task = JobEnvironment()
        return cls(
            rank=task.global_rank,
            world_size=task.num_tasks,
            local_rank=task.local_rank,
            hosts=tuple(task.hostnames),
            job_id=task.raw_job_id,
            attempt=attempt_of_job(),
        )

    def environment(self) -> dict[str, str]:
        """All that the trainer reads of it."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            # A single host need not be able to resolve its own name.
            "MASTER_ADDR": self.hosts[0] if len(self.hosts) > 1 else "127.0.0.1",
            "MASTER_PORT": str(rendezvous_port(self.job_id, self.attempt)),
        }


def attempt_of_job() -> int:
    """How often Slurm has started this job by now."""
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0) + 1


def rendezvous_port(job_id: str, attempt: int) -> int:
    """A port that no other attempt of this job uses, and another job of a node with a chance of 1 in 12,000."""
    return _PORTS[(zlib.crc32(job_id.encode()) + attempt) % len(_PORTS)]


@dataclass(frozen=True)
class Training:
    """A rank of a training; what submitit calls in each task."""

    config: Path
    resume: str = "auto"

    def __call__(self) -> None:
        for number in _STOP_SIGNALS:
            # submitit's handlers ignore SIGTERM. Until the trainer has its own there is nothing to save.
            signal.signal(number, signal.SIG_DFL)
        os.environ.update(Place.of_task().environment())
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does: ranks share the node's cores
        # As `python -m ddp_asr.train` in this process; nothing in `launch` imports what needs torch.
        sys.argv = ["ddp_asr.train", "--config", str(self.config), "--resume", self.resume]
        try:
            runpy.run_module("ddp_asr.train", run_name="__main__", alter_sys=True)
        except SystemExit as end:
            # Passed on, not raised anew: submitit prints no traceback below the sentence that the trainer has said.
            if end.code:
                raise


def freeze_code(folder: Path) -> Path:
    """Copies the code that runs now to `folder`/code, so that editing the checkout never changes a queued job."""
    source, target = Path(__file__).parent.parent, folder / "code"
    for package in ("ddp_asr", "launch"):
        shutil.copytree(source / package, target / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    return target


# ---- when all ranks have ended -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class History:
    """What former attempts of a job left behind, in requeues.json."""

    job_id: str = ""
    requeues: int = 0
    failures: int = 0  # in a row, without a step of progress between them
    failed_step: int = -1


@dataclass(frozen=True)
class Verdict:
    """What becomes of a job."""

    requeue: bool
    good: bool  # whether the job, as far as it has come, is all right
    sentence: str
    failures: int = 0


@dataclass(frozen=True)
class Ended:
    """An attempt that has ended: what the judgement rests on."""

    job_id: str
    attempt: int
    slurm_state: str  # of the job now, see `slurm_state_of`
    status: dict[str, Any] | None  # the run's status.json
    exit_code: int  # srun's; only tells whether ranks died of a signal to stop before they could write a status


def judge(ended: Ended, history: History) -> Verdict:
    """Whether the job is asked for again."""
    if ended.slurm_state == "CANCELLED":
        return Verdict(False, False, "cancelled: not requeued; submitted again, the run goes on from its checkpoint")
    status = ended.status or {}
    own = (status.get("job_id"), status.get("attempt")) == (ended.job_id, ended.attempt)
    if own and "refused" in status:  # state and reason are those of the attempt before
        return Verdict(False, False, f"refused: {status['refused']}; not requeued, because it would be refused again")
    state = status.get("state") if own else None
    reason = status.get("reason", "")
    if state == "done":
        return Verdict(False, True, f"done: {reason}")
    if state == "stopped" and not status["retry"]:
        return Verdict(False, True, f"stopped: {reason}; nothing is left to do under these settings")
    if state == "failed" and not status["retry"]:
        return Verdict(False, False, f"failed: {reason}; not requeued, because it would fail again")
    if ended.slurm_state not in _OURS_TO_REQUEUE:
        return Verdict(False, False, f"Slurm says {ended.slurm_state}: it requeues the job by itself, or has ended it")
    if state == "stopped":
        return Verdict(True, True, f"stopped by {reason}: requeued")
    if state is None and _died_of_a_stop(ended.exit_code):
        return Verdict(True, True, "stopped while it was still starting: requeued")
    return _judge_failure(_what_failed(state, reason, ended.exit_code), status.get("step", 0), ended, history)


def _judge_failure(what: str, step: int, ended: Ended, history: History) -> Verdict:
    known = history.job_id == ended.job_id and history.failed_step == step
    failures = history.failures + 1 if known else 1
    if failures >= MAX_FAILURES:
        sentence = f"{what}; not requeued: {failures} attempts in a row have failed at step {step} without progress"
        return Verdict(False, False, sentence, failures)
    return Verdict(
        True, True, f"{what}; requeued (failure {failures} at step {step}, at most {MAX_FAILURES})", failures
    )


def _what_failed(state: str | None, reason: str, exit_code: int) -> str:
    if state == "failed":
        return f"failed: {reason}"
    if state == "running":
        return f"the ranks ended without a word (srun's exit code {exit_code}), killed perhaps for memory"
    return f"the ranks ended before the run began (srun's exit code {exit_code}); see their logs"


def _died_of_a_stop(exit_code: int) -> bool:
    """Whether a rank was ended by a signal to stop before the trainer could take it over."""
    return exit_code - 128 in [int(number) for number in _STOP_SIGNALS]


def slurm_state_of(job: dict[str, str], attempt: int) -> str:
    """What Slurm has in mind with a job whose batch script still runs, from what `scontrol show job` says.

    A job that it is ending is COMPLETING, for whatever reason: TimeLimit is named, `scancel` is not. Of one that it is
    requeueing, the restart is counted already; so it is when the next attempt runs, and this one is left on a node that
    was cut off.
    """
    state = job.get("JobState", "UNKNOWN")
    if int(job.get("Restarts", attempt - 1)) >= attempt:
        return "REQUEUED"
    if state == "COMPLETING":
        return "TIMEOUT" if job.get("Reason") == "TimeLimit" else "CANCELLED"
    return state


def conclude(run: Path, exit_code: int) -> Verdict:
    """Judges the attempt that has just ended in `run` and requeues its job where that is due; for batch scripts.

    Raises:
        UserError: Slurm does not do it.
    """
    job_id = os.environ.get("SLURM_JOB_ID")
    if job_id is None:
        raise UserError("SLURM_JOB_ID is not set: 'conclude' is for the batch script of a Slurm job, after srun")
    slurm_state = slurm_state_of(cluster.scontrol_job(job_id) or {}, attempt_of_job())
    history = _read_history(run) if run.is_dir() else _history_without_a_run(job_id)
    ended = Ended(job_id, attempt_of_job(), slurm_state, read_status(run), exit_code)
    verdict = judge(ended, history)
    before = history if history.job_id == job_id else History(job_id)
    step = (ended.status or {}).get("step", 0)
    if slurm_state != "REQUEUED":  # else the next attempt may be writing here
        _write_history(run, History(job_id, before.requeues + verdict.requeue, verdict.failures, step))
    if verdict.requeue:
        cluster.run(["scontrol", "requeue", _name_of_job()])
    return verdict


def _name_of_job() -> str:
    """The last task of an array has the array's own id as its job id, by which all tasks would be requeued."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def _read_history(run: Path) -> History:
    try:
        return History(**json.loads((run / "requeues.json").read_text(encoding="utf8")))
    except (OSError, ValueError, TypeError):
        return History()


def _history_without_a_run(job_id: str) -> History:
    """Of a job whose ranks have failed before there was a run directory to note it in: so did each attempt before."""
    return History(job_id, requeues=attempt_of_job() - 1, failures=attempt_of_job() - 1, failed_step=0)


def _write_history(run: Path, history: History) -> None:
    if run.is_dir():  # a run that failed before it had a directory leaves none behind
        aside = run / ".requeues.json.tmp"
        aside.write_text(json.dumps(asdict(history)) + "\n", encoding="utf8")
        aside.replace(run / "requeues.json")


def requeues(run: Path) -> int:
    """How often the run's newest job has been asked for again."""
    return _read_history(run).requeues


def run_of_submission(folder: Path) -> Path:
    """The run directory of this job among those of its submission."""
    runs = json.loads((folder / "submission.json").read_text(encoding="utf8"))["runs"]
    return Path(runs[int(os.environ.get("SLURM_ARRAY_TASK_ID") or 0)])


def conclude_command(folder: Path) -> str:
    """The shell line that concludes a job of the submission in `folder`."""
    command = [sys.executable, "-m", "launch.job", "conclude", "--submission", str(folder)]
    return f"{shlex.join(command)} --exit-code $status"


# ---- the commands --------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    options, settings = _parse(sys.argv[1:] if argv is None else argv)
    if options.command == "port":
        print(rendezvous_port(os.environ.get("SLURM_JOB_ID", "0"), attempt_of_job()))
        return 0
    verdict = conclude(_run_directory(options, settings), options.exit_code)
    print(f"{time.strftime('%F %T')} job {os.environ['SLURM_JOB_ID']}, attempt {attempt_of_job()}: {verdict.sentence}")
    return 0 if verdict.good else 1


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m launch.job",
        description="What a batch script asks for: the rendezvous port, and what becomes of the job after srun.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=["conclude", "port"], help="what to do")
    parser.add_argument("--run", type=Path, metavar="DIR", help="the run directory to judge by")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="settings that name the run, with --section.key=value"
    )
    parser.add_argument("--submission", type=Path, metavar="DIR", help="a folder that launch.submit has made")
    parser.add_argument("--exit-code", type=int, default=0, metavar="N", help="srun's")
    options, settings = parser.parse_known_args(argv)
    if options.command == "conclude" and [options.run, options.config, options.submission].count(None) != 2:
        parser.error("conclude needs one of --run, --config and --submission")
    return options, settings


def _run_directory(options: argparse.Namespace, settings: list[str]) -> Path:
    if options.submission is not None:
        return run_of_submission(options.submission)
    if options.run is not None:
        return options.run
    # Neither changes where the run lies, and both may stand on a trainer's command line.
    config = load_config(options.config, [text for text in settings if "." in text])
    return Path(config.run.dir) / config.run.name


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
