"""A search over settings: `ddp-asr sweep SWEEP.yaml`; one run a trial, ranked by their best test WER.

    SWEEP.yaml  ->  trials, each with a checked Config (search.py)  ->  the state of each run (status.py)
      ->  those that are missing or resumable: one Slurm array, or on this machine N at a time
      ->  ranking

Nothing is stored beside the runs themselves: which trials are done, queued or missing is read from their directories
and from Slurm each time. So the same command continues a sweep on any login node and after any crash, and of a sweep
that is given more values it trains only the new ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import multiprocessing
import os
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from ddp_asr.errors import UserError, counted, run_entry_point
from ddp_asr.runs.directory import read_lines
from ddp_asr.runs.display import number, percent

from . import cluster, job, status, submit
from .cluster import Request
from .search import Trial, make_trials, read_sweep, short_names
from .status import RunReader, RunSummary

POLL_S = 1.0  # how often a sweep on this machine looks whether a trial has ended

EXAMPLES = """\
examples:
  ddp-asr sweep configs/sweeps/an4.yaml --cpus-per-task 2 --parallel 4
  ddp-asr sweep configs/sweeps/an4.yaml --cluster infiniband8 --gpus-per-node 1
  ddp-asr sweep configs/sweeps/an4.yaml --cluster local --train.epochs=3
  ddp-asr sweep configs/sweeps/an4.yaml --dry-run
  ddp-asr sweep configs/sweeps/an4.yaml --rank

a sweep's file:
  config: configs/an4.yaml
  name: an4_rates                    # directory under run.dir (default: the file's stem)
  search: grid                       # all combinations, or random
  trials: 20                         # random only: number of trials
  seed: 0                            # random only
  parallel: 4                        # jobs at a time; 0: all
  settings:
    encoder.rnn_size: [256, 512]     # random: one of them is drawn
    optim.learning_rate: {min: 1e-4, max: 1e-2, scale: log}     # random only; scale: linear or log
  fixed:
    train.epochs: 20                 # the same in all trials

On Slurm the command submits one job array and returns; follow it with 'ddp-asr status DIR --watch'. With
--cluster local it trains until all trials have ended; Ctrl-C stops them, each with a checkpoint. The same command again
submits what is missing or was stopped (with --retry-failed also what has failed) and prints the ranking.
"""


# ---- starting trials -----------------------------------------------------------------------------------------------


def read_runs(trials: Sequence[Trial], reader: RunReader) -> list[RunSummary]:
    """The runs of the trials, in their order."""
    return [
        dataclasses.replace(run, state="not submitted") if run.state == "unknown" and run.job_id is None else run
        for run in reader.read([trial.run for trial in trials])
    ]


def is_due(run: RunSummary, retry_failed: bool) -> bool:
    """Whether a trial is to be submitted (again): it is missing or resumable, and no job is training it."""
    return not run.living and not run.finished and (retry_failed or run.state != "failed")


def train_here(trials: Sequence[Trial], due: Sequence[Trial], request: Request, parallel: int) -> None:
    """Trains the `due` trials on this machine, `parallel` at a time; returns when none is running any more.

    Trials that still run from an earlier call count among the `parallel`. Ctrl-C stops those that this call started and
    waits for their checkpoints; a second Ctrl-C does not wait.
    """
    submit.check_all([trial.config for trial in due], request)  # all of them before the first is started
    reader, waiting = RunReader(), list(due)
    running: set[str] = set()
    try:
        while True:
            runs = read_runs(trials, reader)
            for run in runs:
                if run.name in running and not run.living:
                    running.remove(run.name)
                    print(f"{run.name}: {run.state}{f': {run.error}' if run.error else ''}", flush=True)
            free = max(0, parallel - sum(run.living for run in runs))
            for trial in waiting[:free]:
                running.add(trial.name)  # before it is started, so that Ctrl-C meanwhile stops it, too
                print(f"{trial.name}: starting, log {_start_here(trial, request)}", flush=True)
            waiting = waiting[free:]
            if not waiting and not running:
                return
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        print(
            f"stopping {counted(len(running), 'trial')} at a checkpoint; the same command continues the sweep",
            flush=True,
        )
        _stop_here([trial for trial in trials if trial.name in running])
        raise


def _start_here(trial: Trial, request: Request) -> Path:
    """Starts a trial in a session of its own, which the terminal's Ctrl-C does not reach; returns its log.

    submitit's controller of a local job answers Ctrl-C by killing the ranks one second later, in the middle of their
    checkpoints. A signal to the controller is passed on to them instead.
    """
    folder = submit.submission_folder(trial.run.parent.absolute())
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=os.setsid) as pool:
        future = pool.submit(submit.submit_training, [trial.config], request, folder, name=trial.name)
        return future.result().log()


def _stop_here(trials: Sequence[Trial]) -> None:
    """Stops trials of this machine and waits for their ends."""
    jobs = [record for trial in trials if (record := submit.read_job(trial.run))]
    for record in filter(status.has_process, jobs):
        os.kill(int(record["job_id"]), signal.SIGTERM)
    while any(map(status.has_process, jobs)):
        time.sleep(POLL_S / 10)


# ---- the ranking ---------------------------------------------------------------------------------------------------


def score(evaluation: Mapping[str, Any]) -> tuple[float, float]:
    """What evaluations are compared by, the best first: WER, then loss."""
    wer, loss = (math.inf if (value := evaluation.get(key)) is None else float(value) for key in ("wer", "loss"))
    return wer, loss


def best_evaluation(run: Path) -> dict[str, Any]:
    """The best test line of metrics.jsonl; {} for none."""
    lines = (line for line in read_lines(run / "metrics.jsonl") if line.get("kind") == "test")
    return min(lines, key=score, default={})


Result = tuple[Trial, RunSummary, dict[str, Any]]  # a trial, its run and its best evaluation


def ranked(results: Iterable[Result]) -> list[Result]:
    """The finished trials first, the best of them at the top."""
    return sorted(results, key=lambda result: (not result[1].finished, *score(result[2])))


def show_ranking(trials: Sequence[Trial], runs: Sequence[RunSummary], request: Request) -> None:
    """Prints a line for each trial, the best first, those that have not finished last, and what to do next."""
    results = ranked((trial, run, best_evaluation(trial.run)) for trial, run in zip(trials, runs, strict=True))
    folder = trials[0].run.parent
    rows = [
        [
            str(place) if run.finished else "-",
            *trial.values.values(),
            percent(best.get("wer")),
            number(best.get("loss")),
            str(best.get("step", "-")),
            run.state,
            trial.name,
        ]
        for place, (trial, run, best) in enumerate(results, start=1)
    ]
    headings = ["rank", *short_names(trials[0].values).values(), "best WER", "loss", "step", "state", "run"]
    counts = Counter(run.state for run in runs)
    status.show(
        f"{folder}: {sum(run.finished for run in runs)} of {len(runs)} trials finished "
        f"({', '.join(f'{count} {state}' for state, count in counts.items())})",
        status.table(headings, rows, [run.state for _, run, _ in results]),
        *status.error_lines(run for _, run, _ in results),
    )
    trial, run, best = results[0]
    if run.finished and best.get("wer") is not None:
        command = ["python", "-m", "ddp_asr.evaluate", str(trial.run), *trial.config.data.test]
        print(f"best    {trial.run}\n        {shlex.join(command)}")
    if living := [run for run in runs if run.living]:
        job_ids = dict.fromkeys(str(run.job_id).partition("_")[0] for run in living)
        print(f"watch   ddp-asr status {shlex.quote(str(folder))} --watch")
        print(f"cancel  {'scancel' if request.executor == 'slurm' else 'kill'} {' '.join(job_ids)}")
        print("rank    the same command again, at any time")
    elif any(run.state == "failed" for run in runs):
        print("retry   the same command with --retry-failed")


# ---- the command ---------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    options, overrides = _parse(sys.argv[1:] if argv is None else argv)
    sweep = read_sweep(options.sweep, overrides)
    request = cluster.request_from(options)
    if request.executor == "debug":
        raise UserError("--cluster debug trains in this process, and a sweep is many trainings: use --cluster local")
    trials, reader = make_trials(sweep), RunReader()
    runs = read_runs(trials, reader)
    due = [trial for trial, run in zip(trials, runs, strict=True) if is_due(run, options.retry_failed)]
    parallel = sweep.parallel if options.parallel is None else options.parallel
    if options.dry_run:
        _show_dry_run(sweep.name, trials, runs, due, request, parallel)
        return 0
    if due and not options.rank:
        if reader.slurm_error:
            raise UserError(f"cannot tell which trials are queued, so nothing was submitted: {reader.slurm_error}")
        if request.executor == "local":
            try:
                train_here(trials, due, request, parallel or 1)
            except KeyboardInterrupt:
                return 130
        else:
            configs, folder = [trial.config for trial in due], submit.submission_folder(due[0].run.parent.absolute())
            submission = submit.submit_training(configs, request, folder, name=sweep.name, parallel=parallel)
            limit = f", {parallel} at a time" if parallel else ""
            print(
                f"submitted {counted(len(due), 'trial')} as job {submission.job_ids[0].partition('_')[0]}{limit}",
                flush=True,
            )
        runs = read_runs(trials, reader)
    show_ranking(trials, runs, request)
    if reader.slurm_error:
        print(f"Slurm could not be asked: {reader.slurm_error}")
    return 0 if any(run.living for run in runs) or all(run.finished for run in runs) else 1


def _show_dry_run(
    name: str,
    trials: Sequence[Trial],
    runs: Sequence[RunSummary],
    due: Sequence[Trial],
    request: Request,
    parallel: int,
) -> None:
    """Prints the trials, what would be done with each, and the batch script of the array."""
    submit.check_all([trial.config for trial in due], request)
    rows = [
        [*trial.values.values(), "to submit" if trial in due else run.state, trial.name]
        for trial, run in zip(trials, runs, strict=True)
    ]
    status.show(
        status.table([*short_names(trials[0].values).values(), "state", "run"], rows, [run.state for run in runs])
    )
    if due and request.executor == "slurm":
        folder = submit.submission_folder(due[0].run.parent.absolute())
        after = [job.conclude_command(folder)]
        code = folder / "code"
        print()
        print(
            cluster.sbatch_text(folder, request, name=name, code=code, jobs=len(due), parallel=parallel, after=after),
            end="",
        )


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="ddp-asr sweep",
        description="Trains a config under many settings, as one job array, and ranks the runs by their best test WER.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s SWEEP.yaml [job options] [--parallel N] [--dry-run] [--rank] [--section.key=value ...]",
    )
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml", help="what to search (see below)")
    parser.add_argument(
        "--parallel", type=_count, metavar="N", help="jobs at a time; 0: all, on this machine 1 (default: the file's)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the trials and the sbatch file; submit nothing")
    parser.add_argument("--rank", action="store_true", help="print the ranking; submit nothing")
    parser.add_argument("--retry-failed", action="store_true", help="also submit the trials that have failed")
    cluster.add_options(parser)
    return parser.parse_known_args(argv)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of jobs, 0 or more")
    return int(text)


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
