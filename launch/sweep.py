"""A search over settings: `python -m launch.sweep SWEEP.yaml`, one Slurm array, a run each, a ranking at the end.

    SWEEP.yaml  ->  trials, each with its own Config (search.py), all checked
      ->  how each run stands (status.py)  ->  submit_training of those that have nothing to show yet
      ->  follow them to their ends  ->  ranking by best test WER

Nothing is kept beside the runs themselves: which trials are done, queued or missing is read from them and from Slurm
each time. So the same command goes on where it was left, on any login node and after any crash, and a sweep that is
given more values trains only the new ones.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddp_asr.config import Config
from ddp_asr.errors import UserError, run_entry_point
from ddp_asr.runs.display import number, percent
from launch import cluster, job, status, submit
from launch.cluster import Request, Submission
from launch.search import Trial, plan, read_sweep
from launch.status import Overview

SETTLED_AFTER_S = 15.0  # a job that requeues itself may look as if it had ended
FORGOTTEN_AFTER_S = 60.0  # Slurm's accounting may lag behind its queue
LOOK_EVERY_S = {"slurm": 5.0, "local": 1.0}

EXAMPLES = """\
examples:
  python -m launch.sweep configs/sweeps/an4.yaml --cpus-per-task 2 --parallel 4
  python -m launch.sweep configs/sweeps/an4.yaml --cluster infiniband8 --gpus-per-node 1 --no-wait
  python -m launch.sweep configs/sweeps/an4.yaml --cluster local --train.epochs=3
  python -m launch.sweep configs/sweeps/an4.yaml --dry-run

a sweep's file:
  config: configs/an4.yaml
  name: an4_rates                    # directory under run.dir (default: the file's stem)
  search: grid                       # all combinations, or random
  trials: 20                         # random only: how many
  seed: 0                            # random only
  parallel: 4                        # jobs at a time; 0: all
  settings:
    encoder.rnn_size: [256, 512]       # random: one of them is drawn
    optim.learning_rate: {min: 1e-4, max: 1e-2, scale: log}     # random only; scale: linear or log
  fixed:
    train.epochs: 20                 # the same in all trials

The same command again goes on: it submits what is missing (and with --retry-failed what has failed), follows the
others, and prints the ranking when all have ended.
"""


# ---- what is to be done --------------------------------------------------------------------------------------------


def is_due(run: Overview, retry_failed: bool) -> bool:
    """Whether a trial is to be submitted (again): missing, or resumable and in nobody's hands."""
    if run.living or run.finished:
        return False
    return retry_failed or run.state != "failed"


class Follower:
    """Submits what is due and watches the trials until all have ended."""

    def __init__(
        self,
        name: str,
        trials: Sequence[Trial],
        request: Request,
        parallel: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.trials, self.request = name, trials, request
        self.parallel = parallel
        self.folder = Path(trials[0].config.run.dir)
        self.waiting: list[Trial] = []
        self.submitted: list[str] = []  # job ids
        self.runs: dict[str, Overview] = {}
        self.complaint = ""
        self._clock = clock
        self._reader = status.Reader()
        self._followed: set[str] = set()  # trials that lived, or were submitted, while we were looking
        self._quiet_since_s: dict[str, float] = {}

    def look(self) -> None:
        """Reads how all trials stand; where Slurm does not answer, they stand as they stood."""
        found = self._reader.read([trial.run for trial in self.trials])
        self.complaint = self._reader.complaint
        if self.complaint and self.runs:
            return
        for trial, run in zip(self.trials, found, strict=True):
            if run.state == "unknown" and run.job_id is None:
                run = dataclasses.replace(run, state="waiting")
            self.runs[trial.name] = run
            if run.living:
                self._followed.add(trial.name)
                self._quiet_since_s.pop(trial.name, None)
            else:
                self._quiet_since_s.setdefault(trial.name, self._clock())

    def start(self, retry_failed: bool) -> None:
        """Submits what is due: all of it to Slurm, as much as may run at a time on this machine."""
        if self.complaint:
            raise UserError(f"what is still in the queue cannot be told, so nothing was submitted: {self.complaint}")
        self.waiting = [trial for trial in self.trials if is_due(self.runs[trial.name], retry_failed)]
        if self.request.executor == "local":  # one after the other, so that the last is submitted long after the first
            submit.check_all([trial.config for trial in self.waiting], self.request)
        self.go_on()

    def go_on(self) -> None:
        """Submits those of the waiting that may start."""
        if self.request.executor == "slurm":
            now, self.waiting = self.waiting, []
        else:
            free = self.parallel - sum(run.living for run in self.runs.values())
            now, self.waiting = self.waiting[: max(0, free)], self.waiting[max(0, free) :]
        if not now:
            return
        folder = submit.submission_folder(self.folder.absolute())
        hand_over = _submit if self.request.executor == "slurm" else _submit_detached
        submission = hand_over([trial.config for trial in now], self.request, folder, self.name, self.parallel)
        self.submitted += submission.job_ids
        for trial in now:
            self._followed.add(trial.name)
            self._quiet_since_s.pop(trial.name, None)
        self.look()

    @property
    def ended(self) -> bool:
        """Whether nothing is waiting, queued, or running any more."""
        return not self.waiting and all(self._has_ended(trial.name) for trial in self.trials)

    def _has_ended(self, name: str) -> bool:
        run = self.runs[name]
        if run.living or run.finished or name not in self._followed:
            return not run.living
        patience_s = FORGOTTEN_AFTER_S if run.state in ("unknown", "waiting") else SETTLED_AFTER_S
        if self.request.executor != "slurm":
            patience_s = 0.0
        return self._clock() - self._quiet_since_s[name] >= patience_s

    @property
    def summary(self) -> str:
        """`2 done, 1 RUNNING, 3 PENDING`"""
        counts = Counter(run.state for run in self.runs.values())
        return ", ".join(f"{count} {state}" for state, count in counts.items())


def _submit(configs: Sequence[Config], request: Request, folder: Path, name: str, parallel: int) -> Submission:
    return submit.submit_training(configs, request, folder, name=name, parallel=parallel)


def _submit_detached(configs: Sequence[Config], request: Request, folder: Path, name: str, parallel: int) -> Submission:
    """From a process in a session of its own, so that Ctrl-C and the end of the terminal do not reach the trials."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_leave_the_terminal) as pool:
        return pool.submit(_submit, configs, request, folder, name, parallel).result()


def _leave_the_terminal() -> None:
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nowhere, descriptor)  # a pipe that the trials held open would never end for its reader


# ---- the ranking ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What came of a trial: its best evaluation."""

    trial: Trial
    run: Overview
    wer: float | None
    loss: float | None
    step: int | None

    @property
    def key(self) -> tuple[bool, float, float]:
        """The finished before the others; of them the lowest WER first, the lowest loss where that is the same."""
        wer, loss = (math.inf if value is None else value for value in (self.wer, self.loss))
        return not self.run.finished, wer, loss


def result_of(trial: Trial, run: Overview) -> Result:
    """The trial's best evaluation, chosen as the ranking chooses between trials."""
    lines = evaluations(trial.run / "metrics.jsonl")
    found = [Result(trial, run, line.get("wer"), line.get("loss"), line.get("step")) for line in lines]
    return min(found, key=lambda result: result.key, default=Result(trial, run, None, None, None))


def evaluations(path: Path) -> Iterator[dict[str, Any]]:
    """The test lines of metrics.jsonl; the many train lines are not parsed."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        for text in file:
            if b'"test"' in text and text.endswith(b"\n"):
                with contextlib.suppress(ValueError):
                    line = json.loads(text)
                    if line.get("kind") == "test":
                        yield line


def ranking(results: Iterable[Result]) -> list[str]:
    """A line a trial, best first, those that have not finished last and with their reason."""
    ordered = sorted(results, key=lambda result: result.key)
    settings = list(ordered[0].trial.values)
    headings = ["rank", "trial", *settings, "best WER", "loss", "at step", "state"]
    rows = []
    for place, result in enumerate(ordered, start=1):
        run = result.run
        rows.append(
            [
                str(place) if run.finished else "-",
                result.trial.name.partition("-")[0],
                *result.trial.values.values(),
                percent(result.wer),
                number(result.loss),
                "-" if result.step is None else str(result.step),
                run.state,
            ]
        )
    heading, *lines = status.aligned(headings, rows, left=("state",))
    errors = [f": {result.run.error}" if result.run.error else "" for result in ordered]
    return [heading, *(line + error for line, error in zip(lines, errors, strict=True))]


def conclusion(results: Sequence[Result], folder: Path) -> str:
    """What a finished sweep prints."""
    finished = sum(result.run.finished for result in results)
    lines = [f"{folder}: {finished} of {len(results)} trials finished", *ranking(results)]
    best = min(results, key=lambda result: result.key)
    if best.run.finished and best.wer is not None:
        command = ["python", "-m", "ddp_asr.evaluate", str(best.trial.run), *best.trial.config.data.test]
        lines += [f"best: {best.trial.run}", f"  {shlex.join(command)}"]
    if any(result.run.state == "failed" for result in results):
        lines.append("the same command with --retry-failed submits the failed ones again")
    return "\n".join(lines)


# ---- the command ---------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    options, overrides = _parse(arguments)
    sweep = read_sweep(options.sweep)
    request = cluster.request_from(options)
    if request.executor == "debug":
        raise UserError("'debug' trains in this very process, and a sweep is many trainings: use --cluster local")
    trials = plan(sweep, overrides)
    parallel = sweep.parallel if options.parallel is None else options.parallel
    if request.executor == "local":
        parallel = parallel or 1
    follower = Follower(sweep.name, trials, request, parallel)
    follower.look()
    if options.dry_run:
        print(_dry_run(follower, options.retry_failed))
        return 0
    follower.start(options.retry_failed)
    print(_submitted(follower), flush=True)
    if not options.no_wait:
        try:
            follow(follower)
        except KeyboardInterrupt:
            print(_come_back(follower, arguments), flush=True)
            return 130
    elif not follower.ended:
        print(_come_back(follower, arguments))
        return 0
    results = [result_of(trial, follower.runs[trial.name]) for trial in trials]
    print(conclusion(results, follower.folder))
    return 0 if all(result.run.finished for result in results) else 1


def follow(follower: Follower) -> None:
    """Shows the trials until all have ended: a table in place on a terminal, a line for each change elsewhere."""
    with _shown(follower) as show:
        while True:
            show()
            if follower.ended:
                return
            time.sleep(LOOK_EVERY_S[follower.request.executor])
            follower.look()
            if not follower.complaint:
                follower.go_on()


@contextlib.contextmanager
def _shown(follower: Follower) -> Iterator[Callable[[], None]]:
    if not sys.stdout.isatty():
        yield _Lines(follower).show
        return
    from rich.live import Live

    with Live(auto_refresh=False, transient=True, vertical_overflow="ellipsis") as live:
        yield lambda: live.update(status.coloured(_live_table(follower)), refresh=True)


def _live_table(follower: Follower) -> list[tuple[str, str]]:
    head = f"sweep {follower.name}: {follower.summary}   (Ctrl-C leaves the jobs running)"
    complaint = [(f"Slurm does not answer: {follower.complaint}", "yellow")] if follower.complaint else []
    return [(head, ""), *status.table(list(follower.runs.values()), time.time()), *complaint]


class _Lines:
    """A line for every trial whose state or newest evaluation has changed."""

    def __init__(self, follower: Follower) -> None:
        self._follower = follower
        self._told: dict[str, tuple[str, float | None]] = {}

    def show(self) -> None:
        for name, run in self._follower.runs.items():
            told = (run.state, run.wer)
            if self._told.get(name) != told:
                self._told[name] = told
                print(_line(run), flush=True)


def _line(run: Overview) -> str:
    parts = [f"{run.state} ({run.note})" if run.note else run.state]
    if run.step is not None:
        parts.append(f"step {run.step}/{'?' if run.total_steps is None else run.total_steps}")
    if run.wer is not None:
        parts.append(f"WER {percent(run.wer)}, best {percent(run.best_wer)}")
    if run.living and run.job_id:
        parts.append(f"job {run.job_id}")
    return f"{run.name}: {', '.join(parts)}{f': {run.error}' if run.error else ''}"


def _submitted(follower: Follower) -> str:
    job_ids = dict.fromkeys(job_id.partition("_")[0] for job_id in follower.submitted)
    what = f"submitted {len(follower.submitted)} as job {', '.join(job_ids)}" if job_ids else "nothing to submit"
    limit = f", {follower.parallel} at a time" if follower.parallel and (job_ids or follower.waiting) else ""
    return f"sweep {follower.name}: {len(follower.trials)} trials in {follower.folder}: {what}{limit}"


def _come_back(follower: Follower, arguments: Sequence[str]) -> str:
    """What a user who leaves wants to know."""
    living = [run for run in follower.runs.values() if run.living]
    again = [argument for argument in arguments if argument not in ("--no-wait", "--retry-failed")]
    lines = [
        f"sweep {follower.name}: {follower.summary}; what runs or is queued goes on without this command",
        f"watch   python -m launch.status {shlex.quote(str(follower.folder))} --watch",
        f"follow  {shlex.join(['python', '-m', 'launch.sweep', *again])}",
    ]
    if follower.waiting:
        lines[0] += f"; {len(follower.waiting)} wait for it to be given again"
    if living:
        job_ids = dict.fromkeys(str(run.job_id).partition("_")[0] for run in living)
        command = "scancel" if follower.request.executor == "slurm" else "kill"
        lines.append(f"cancel  {command} {' '.join(job_ids)}")
    return "\n".join(lines)


def _dry_run(follower: Follower, retry_failed: bool) -> str:
    """The trials and what would become of each, and the array that would be submitted."""
    due = [trial for trial in follower.trials if is_due(follower.runs[trial.name], retry_failed)]
    submit.check_all([trial.config for trial in due], follower.request)
    settings = list(follower.trials[0].values)
    rows = [
        [trial.name, *trial.values.values(), "to submit" if trial in due else follower.runs[trial.name].state]
        for trial in follower.trials
    ]
    lines = status.aligned(["run", *settings, "now"], rows, left=("run", "now"))
    if due and follower.request.executor == "slurm":
        folder = submit.submission_folder(follower.folder.absolute())
        lines += ["", *_sbatch_lines(follower, folder, len(due))]
    return "\n".join(lines)


def _sbatch_lines(follower: Follower, folder: Path, jobs: int) -> list[str]:
    text = cluster.sbatch_text(
        folder,
        follower.request,
        name=follower.name,
        code=folder / "code",
        jobs=jobs,
        parallel=follower.parallel,
        after=[job.conclude_command(folder)],
    )
    return text.splitlines()


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m launch.sweep",
        description="Trains a config under many settings, as one job array, and ranks them by their best test WER.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s SWEEP.yaml [job options] [--parallel N] [--dry-run] [--no-wait] [--section.key=value ...]",
    )
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml", help="what to search (see below)")
    parser.add_argument(
        "--parallel", type=_whole, metavar="N", help="jobs at a time; 0: all, on this machine 1 (default: the file's)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print trials and sbatch file, and submit nothing")
    parser.add_argument("--no-wait", action="store_true", help="submit, and do not follow")
    parser.add_argument("--retry-failed", action="store_true", help="submit those that have failed, too")
    cluster.add_options(parser)
    return parser.parse_known_args(argv)


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of jobs, 0 or more")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
