"""Lists runs and their states: `ddp-asr status [DIR]`, from their files and one query to Slurm for all.

    status.json, lease.json   -.
    job.json  ->  squeue, sacct ->  Evidence -> run_state -.
    the end of metrics.jsonl  -----------------------------+-> RunSummary -> table or JSON

No single source is enough. status.json says how the last attempt ended, but not that a new one waits in the queue.
Slurm knows nothing of a run without a job. A lease says who writes, but not why nobody does. `run_state` combines them.

No query waits: one look cannot tell whether the owner of a lease on another machine is alive, so the state is then
"running?". `--watch` looks repeatedly and finds out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ddp_asr.errors import UserError, run_entry_point
from ddp_asr.files import only, open_input, parse_json_line
from ddp_asr.runs.directory import LINE, read_status
from ddp_asr.runs.display import duration, number, percent
from ddp_asr.runs.lease import DEAD_AFTER_S, Verdict, Watch

from . import cluster
from .cluster import JobState
from .submit import read_job

MARKS = ("status.json", "job.json", "lease.json", "metrics.jsonl")  # a directory with one of these files is a run
# How much of the end of metrics.jsonl is read: mostly the first, and up to the second (about 12,000 steps) if the first
# holds no evaluation. An older evaluation is not found.
TAIL_BYTES = (1 << 16, 1 << 22)

EXAMPLES = """\
examples:
  ddp-asr status
  ddp-asr status runs/my_sweep --watch
  ddp-asr status runs/librispeech_960 --json

states:
  PENDING, RUNNING ...   Slurm's state of the run's job, with its reason
  starting, running      a run outside Slurm; "running?": no sign of life for over a minute, --watch finds out
  done                   trained to the end
  stopped, cancelled     resumable: submit it again, and it continues from its newest checkpoint
  failed                 ended with an error, shown below the table
  dead                   killed, or its node was lost: submit it again, and it continues
  unknown                neither its files nor Slurm say what happened to its job
"""


# ---- the state of a run --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evidence:
    """All that can be found out about a run without waiting."""

    status: dict[str, Any] | None = None  # status.json
    job: JobState | None = None  # Slurm's state of the run's newest job; None: no job, or no Slurm
    process: bool | None = None  # whether the process of the run's local job exists; None: no local job
    lease: Verdict = "free"
    lease_age_s: float = 0.0  # since lease.json was last written, by this machine's clock


@dataclass(frozen=True)
class RunState:
    """The state of a run, and what follows from it."""

    state: str
    note: str = ""
    living: bool = False  # it trains, or its job is queued
    finished: bool = False  # nothing is left to train under its settings


def run_state(seen: Evidence) -> RunState:
    """Combines all evidence into one state."""
    status = seen.status or {}
    recorded, reason = status.get("state"), str(status.get("reason", ""))
    refused = "newest attempt refused" if "refused" in status else ""
    if recorded == "done":
        return RunState("done", refused, finished=True)
    if seen.job is not None and seen.job.living:
        note = seen.job.reason
        if seen.job.state == "RUNNING":
            note = {"free": "starting", "dead": "its lease is no longer renewed"}.get(seen.lease, "")
        return RunState(seen.job.state, note, living=True)
    if seen.process:
        return RunState("running" if recorded == "running" and seen.lease != "dead" else "starting", living=True)
    # Slurm's state of a job that has ended; "" also if Slurm has forgotten the job.
    ended = seen.job.state if seen.job is not None and seen.job.state != "UNKNOWN" else ""
    if seen.lease == "alive":
        return RunState("running", f"although Slurm says {ended}" if ended else "", living=True)
    if recorded == "failed":
        return RunState("failed", "" if ended in ("FAILED", "COMPLETED") else ended)
    if recorded == "stopped":
        note = ", ".join(filter(None, (reason, refused)))
        if not status.get("retry", True):
            return RunState("stopped", note, finished=True)
        return RunState("cancelled" if ended == "CANCELLED" else "stopped", note)
    if ended == "CANCELLED":
        return RunState("cancelled")
    if ended:
        return RunState("failed" if recorded is None or ended in ("FAILED", "OUT_OF_MEMORY") else "dead", ended)
    return _state_by_lease(seen, recorded)


def _state_by_lease(seen: Evidence, recorded: str | None) -> RunState:
    """The state of a run of which neither Slurm nor status.json can tell how it ended."""
    if seen.lease == "unknown":
        state = "running" if recorded == "running" else "starting"
        if seen.lease_age_s > DEAD_AFTER_S:
            return RunState(f"{state}?", f"no sign of life for {duration(seen.lease_age_s)}", living=True)
        return RunState(state, living=True)
    if seen.lease == "dead" or recorded == "running":
        return RunState("dead")
    return RunState("failed", "its process is gone") if seen.process is False else RunState("unknown")


# ---- reading runs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RunSummary(RunState):
    """A row of the table; None: not known."""

    name: str
    path: Path
    step: int | None = None
    total_steps: int | None = None
    epoch: int | None = None
    loss: float | None = None
    wer: float | None = None
    best_wer: float | None = None
    audio_s_per_s: float | None = None
    job_id: str | None = None
    attempt: int | None = None
    submitted_s: float | None = None  # Unix times
    updated_s: float | None = None  # of the newest line of metrics.jsonl, or of status.json
    error: str = ""  # what ended the run
    refused: str = ""  # why its newest attempt was refused, which did not change the run


class RunReader:
    """Reads runs; it watches their leases from one call to the next."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.slurm_error = ""  # why Slurm could not be asked
        self._clock = clock
        self._watches: dict[Path, Watch] = {}

    def read(self, runs: Sequence[Path], root: Path | None = None) -> list[RunSummary]:
        """The runs in their order, named relative to `root`."""
        statuses = [read_status(run) for run in runs]
        jobs = [read_job(run) or _job_of_status(status) for run, status in zip(runs, statuses, strict=True)]
        asked = [
            str(job["job_id"])
            for job, status in zip(jobs, statuses, strict=True)
            if job and job["executor"] == "slurm" and (status or {}).get("state") != "done"
        ]
        self.slurm_error, states = "", {}
        try:
            states = cluster.job_states(asked) if asked else {}
        except UserError as error:
            self.slurm_error = str(error)
        return [
            self._summary(run, str(run.relative_to(root)) if root else run.name, status, job, states)
            for run, status, job in zip(runs, statuses, jobs, strict=True)
        ]

    def _summary(
        self,
        run: Path,
        name: str,
        status: dict[str, Any] | None,
        job: dict[str, Any] | None,
        states: dict[str, JobState],
    ) -> RunSummary:
        watch = self._watches.setdefault(run, Watch(run, clock=self._clock))
        evidence = Evidence(
            status=status,
            job=_slurm_state(job, status, states) if job else None,
            process=has_process(job) if job and job["executor"] == "local" else None,
            lease=watch.verdict(),
            lease_age_s=_age_s(run / "lease.json"),
        )
        state = run_state(evidence)
        train, test = last_lines(run / "metrics.jsonl")
        status = status or {}
        rates = [rate for rate in (status.get("best_wer"), test.get("wer")) if rate is not None]
        return RunSummary(
            **dataclasses.asdict(state),
            name=name,
            path=run,
            step=train.get("step", status.get("step")),
            total_steps=status.get("total_steps"),
            epoch=train.get("epoch"),
            loss=train.get("loss"),
            wer=test.get("wer"),
            best_wer=min(rates, default=None),
            audio_s_per_s=train.get("audio_s_per_s"),
            job_id=str(job["job_id"]) if job else status.get("job_id"),
            attempt=status.get("attempt"),
            submitted_s=job.get("time_s") if job else None,
            updated_s=max((float(line["time_s"]) for line in (train, test, status) if "time_s" in line), default=None),
            error="" if state.living or state.finished else _error(state, status, job),
            refused="" if state.living else str(status.get("refused", "")),
        )


def find_runs(directory: Path) -> list[Path]:
    """The directory itself if it is a run, else the runs in it and in its subdirectories, such as a sweep's."""
    if not directory.is_dir():
        raise UserError(f"there is no directory {directory}: name the one that holds the runs, or a run")
    if _is_run(directory):
        return [directory]
    found: list[Path] = []
    for child in sorted(filter(Path.is_dir, directory.iterdir())):
        found += [child] if _is_run(child) else sorted(filter(_is_run, child.iterdir()))
    return found


def _is_run(directory: Path) -> bool:
    return any((directory / mark).is_file() for mark in MARKS)


def _job_of_status(status: dict[str, Any] | None) -> dict[str, Any] | None:
    """The Slurm job of a run that was not submitted by `launch`, such as one of slurm/train.sbatch."""
    job_id = (status or {}).get("job_id")
    return {"job_id": job_id, "executor": "slurm"} if job_id is not None and shutil.which("squeue") else None


def _slurm_state(job: dict[str, Any], status: dict[str, Any] | None, states: dict[str, JobState]) -> JobState | None:
    state = states.get(str(job["job_id"]))
    # An interactive allocation lives on when the run in it has ended; a job submitted by `launch` is for one run alone.
    if "folder" not in job and state and state.state == "RUNNING" and (status or {}).get("state") != "running":
        return None
    return state


def has_process(job: dict[str, Any]) -> bool:
    """Whether the process of a local job exists; its pid alone may have been given to another process."""
    with contextlib.suppress(OSError):
        arguments = Path(f"/proc/{job['job_id']}/cmdline").read_bytes().split(b"\0")
        return str(job["folder"]).encode() in arguments
    return False


def _age_s(path: Path) -> float:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return 0.0


def last_lines(metrics: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The newest train and the newest test line of metrics.jsonl, {} for none."""
    train: dict[str, Any] = {}
    test: dict[str, Any] = {}
    for size_bytes in TAIL_BYTES:
        lines = _tail(metrics, size_bytes).splitlines(keepends=True)
        train, test = _newest(lines, "train"), _newest(lines, "test")
        if train and test:
            break
    return train, test


def _newest(lines: Sequence[bytes], kind: str) -> dict[str, Any]:
    quoted = f'"{kind}"'.encode()
    for text in reversed(lines):
        # The search for the text spares parsing the thousands of train lines behind an evaluation.
        if quoted in text and (line := only(parse_json_line(text) or {}, LINE)).get("kind") == kind and "step" in line:
            return line
    return {}


def _tail(path: Path, size_bytes: int) -> bytes:
    """The complete lines within the last `size_bytes` of a file; nothing if it cannot be read."""
    with contextlib.suppress(OSError), open_input(path) as file:
        start = max(0, file.seek(0, 2) - size_bytes)
        file.seek(start)
        content = file.read()
        return content.partition(b"\n")[2] if start else content
    return b""


# What is looked for in a job's logs, the best first. torchrun's and srun's errors come last in a log and say least.
_ERRORS = (
    rb"error: .*\S",
    rb"(?!torch\.distributed\.elastic)[\w.]*(?:Error|Exception)\b.*\S",
    rb"(?:srun|slurmstepd): error: .*\S",
)


def _error(state: RunState, status: dict[str, Any], job: dict[str, Any] | None) -> str:
    """The last line of the error that ended a run, from status.json or its job's logs; "" if none is found."""
    if state.state == "failed" and status.get("state") == "failed":
        return str(status.get("reason", ""))
    if job is None or "folder" not in job or state.state not in ("failed", "dead", "unknown"):
        return ""
    logs = sorted(Path(job["folder"]).glob(f"{job['job_id']}_*_log.out"), key=lambda path: (len(path.name), path.name))
    texts = [_tail(log, TAIL_BYTES[0]) for log in logs]
    for pattern in _ERRORS:
        for text in texts:
            if found := re.findall(rb"^" + pattern, text, flags=re.MULTILINE):
                return str(found[-1].decode(errors="replace").removeprefix("error: "))
    return ""


# ---- showing runs --------------------------------------------------------------------------------------------------

_COLOURS = {"done": "green", "failed": "red", "dead": "red", "cancelled": "yellow", "stopped": "yellow"}


def in_order(runs: Iterable[RunSummary]) -> list[RunSummary]:
    """The living first, the newest job first; then the others, the one that ended last first."""

    def key(run: RunSummary) -> tuple[bool, float, str]:
        # The living by their job's time: by their newest line they would change places at every look.
        time_s = run.submitted_s if run.living else run.updated_s
        return not run.living, -(time_s or 0.0), run.name

    return sorted(runs, key=key)


def run_table(runs: Sequence[RunSummary], now_s: float) -> RenderableType:
    """A row for each run, and below the table what ended them."""
    headings = ["run", "state", "step", "epoch", "loss", "WER", "best", "audio-s/s", "job", "attempt", "updated"]
    rows = [
        [
            run.name,
            f"{run.state} ({run.note})" if run.note else run.state,
            "-" if run.step is None else f"{run.step}/{'?' if run.total_steps is None else run.total_steps}",
            "-" if run.epoch is None else str(run.epoch),
            number(run.loss),
            percent(run.wer),
            percent(run.best_wer),
            number(run.audio_s_per_s, 0),
            run.job_id or "-",
            "-" if run.attempt is None else str(run.attempt),
            "-" if run.updated_s is None else f"{duration(now_s - run.updated_s)} ago",
        ]
        for run in runs
    ]
    return Group(table(headings, rows, [run.state for run in runs]), *error_lines(runs))


def table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    states: Iterable[str],
    left: Sequence[str] = ("run", "state"),
) -> Table:
    """Cells in columns, each row in the colour of its run's state; the columns `left` aligned to the left."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        if heading in left:  # on a narrow terminal these are folded first; then the last columns are cut off
            shown.add_column(heading, overflow="fold", min_width=12)
        else:
            shown.add_column(heading, justify="right", no_wrap=True)
    for cells, state in zip(rows, states, strict=True):
        shown.add_row(*map(Text, cells), style=_COLOURS.get(state, "dim" if state == "PENDING" else ""))
    return shown


def error_lines(runs: Iterable[RunSummary]) -> list[Text]:
    """What ended the runs, and why attempts were refused."""
    found = [(f"{run.name}: {run.error}", "red") for run in runs if run.error]
    found += [(f"{run.name}: newest attempt refused: {run.refused}", "yellow") for run in runs if run.refused]
    return [Text(text, style=style) for text, style in found]


def show(*parts: RenderableType) -> None:
    """Prints to a terminal at its width, and elsewhere plain lines of any length."""
    if sys.stdout.isatty():
        Console(highlight=False, markup=False, emoji=False).print(*parts, sep="\n")
        return
    plain = io.StringIO()
    Console(file=plain, width=10_000, color_system=None, highlight=False, markup=False, emoji=False).print(
        *parts, sep="\n"
    )
    print("\n".join(line.rstrip() for line in plain.getvalue().splitlines()), flush=True)


# ---- the command ---------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(sys.argv[1:] if argv is None else argv)
    reader = RunReader()
    if options.watch is None:
        _show_once(options, reader)
        return 0
    with contextlib.suppress(KeyboardInterrupt):
        _watch(options, reader)
    return 0


def _look(options: argparse.Namespace, reader: RunReader) -> list[RunSummary]:
    root = options.directory
    runs = find_runs(root)
    return in_order(reader.read(runs, None if runs == [root] else root))


def _rendered(options: argparse.Namespace, reader: RunReader) -> RenderableType:
    runs = _look(options, reader)
    shown = run_table(runs, time.time()) if runs else Text(f"no runs in {options.directory}")
    warning = [Text(f"Slurm could not be asked: {reader.slurm_error}", style="yellow")] if reader.slurm_error else []
    return Group(shown, *warning)


def _show_once(options: argparse.Namespace, reader: RunReader) -> None:
    if options.json:
        found = [dataclasses.asdict(run) for run in _look(options, reader)]
        print(json.dumps(found, indent=None if options.watch else 1, default=str), flush=True)
    else:
        show(_rendered(options, reader))


def _watch(options: argparse.Namespace, reader: RunReader) -> None:
    """Looks again and again; in place on a terminal, one table below the other elsewhere."""
    if options.json or not sys.stdout.isatty():
        while True:
            _show_once(options, reader)
            time.sleep(options.watch)
    with Live(auto_refresh=False, vertical_overflow="ellipsis") as live:
        while True:
            live.update(_rendered(options, reader), refresh=True)
            time.sleep(options.watch)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ddp-asr status",
        description="Lists runs: their state, progress and error rates, and the error that ended them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "directory", nargs="?", type=Path, default=Path("runs"), metavar="DIR", help="runs, a sweep, or one run"
    )
    parser.add_argument(
        "--watch", nargs="?", type=_seconds, const=5.0, metavar="SECONDS", help="repeat every SECONDS (default: 5)"
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects; with --watch, one list a line")
    return parser.parse_args(argv)


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) < float("inf"):
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0 (DIR comes before --watch)")


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
