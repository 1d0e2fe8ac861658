"""How runs stand: `python -m launch.status [DIR]`, from their files and one question to Slurm for all of them.

    status.json, lease.json, the end of metrics.jsonl  -.
    job.json  ->  cluster.job_states (squeue, sacct)   --> judge -> Overview -> a table, or JSON

Three witnesses speak of a run, and none of them alone is enough: status.json says how the last attempt ended but not
that a new one waits in the queue, Slurm knows nothing of a run without a job, and a lease says who writes and not why
nobody does. `judge` puts the three together. Nothing here waits: whether a lease lives that has just been looked at for
the first time is unknown, and `--watch`, which looks again and again, finds out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddp_asr.errors import UserError, run_entry_point
from ddp_asr.runs.directory import read_status
from ddp_asr.runs.display import duration, number, percent
from ddp_asr.runs.lease import DEAD_AFTER_S, Verdict, Watch
from launch import cluster
from launch.cluster import JobState
from launch.submit import read_job

if TYPE_CHECKING:
    from rich.text import Text

MARKS = ("status.json", "job.json", "lease.json", "metrics.jsonl")  # a directory that has one of them is a run
BLOCK_BYTES = 1 << 16
# Of a long run's metrics.jsonl, about 12,000 steps: the newest evaluation is looked for no further back.
MOST_BYTES = 1 << 22
LONGEST_NOTE = 48

EXAMPLES = """\
examples:
  python -m launch.status
  python -m launch.status runs/my_sweep --watch
  python -m launch.status runs/librispeech_960 --json

states:
  PENDING, RUNNING ...   what Slurm says of the run's job, with its reason
  starting, running      outside Slurm; "running?" has been silent for over a minute, and --watch finds out
  done                   trained to the end
  stopped, cancelled     resumable: submit it again and it goes on from its newest checkpoint
  failed                 with the last line of the error
  dead                   ended without a word (killed, lost node): submit it again and it goes on
  unknown                neither its files nor Slurm know what became of its job
"""


# ---- what became of a run ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Standing:
    """What the witnesses together say."""

    state: str
    note: str = ""
    living: bool = False  # trains, or waits for its turn
    finished: bool = False  # nothing is left to do under its settings


@dataclass(frozen=True)
class Witnesses:
    """All that is known of a run without waiting for anything."""

    status: dict[str, Any] | None = None  # status.json
    job: JobState | None = None  # what Slurm says of the run's newest job; None: no such job, or no Slurm
    process: bool | None = None  # whether that job, a local one, still has its process; None: not a local one
    lease: Verdict = "free"
    silent_s: float = 0.0  # since the lease was last written, by this machine's clock
    requeues: int = 0


def judge(seen: Witnesses) -> Standing:
    """How a run stands."""
    status = seen.status or {}
    recorded, reason = status.get("state"), str(status.get("reason", ""))
    if recorded == "done":
        return Standing("done", finished=True)
    if seen.job is not None and seen.job.living:
        return _judge_job(seen.job, seen)
    if seen.process:
        return Standing("running" if recorded == "running" and seen.lease != "dead" else "starting", living=True)
    # What Slurm says of a job that has ended; "" also where it has forgotten the job.
    ended = seen.job.state if seen.job is not None and seen.job.state != "UNKNOWN" else ""
    if seen.lease == "alive":
        return Standing("running", f"though Slurm says {ended}" if ended else "", living=True)
    if recorded == "failed":
        return Standing("failed", "" if ended in ("FAILED", "COMPLETED") else ended)
    if recorded == "stopped":
        if not status.get("retry", True):
            return Standing("stopped", reason, finished=True)
        return Standing("cancelled" if ended == "CANCELLED" else "stopped", reason)
    if ended:
        return _judge_wordless(ended, recorded)
    return _judge_lease(seen, recorded)


def _judge_job(job: JobState, seen: Witnesses) -> Standing:
    notes = [job.reason] if job.reason else []
    if job.state == "RUNNING":
        notes = {"free": ["starting"], "dead": ["silent: nobody renews its lease"]}.get(seen.lease, [])
    if seen.requeues:
        notes.append(f"requeued {'once' if seen.requeues == 1 else f'{seen.requeues} times'}")
    return Standing(job.state, ", ".join(notes), living=True)


def _judge_wordless(ended: str, recorded: str | None) -> Standing:
    """Slurm has ended the job, and the run did not come to say anything of it."""
    if ended == "CANCELLED":
        return Standing("cancelled")
    if recorded is None or ended in ("FAILED", "OUT_OF_MEMORY"):
        return Standing("failed", ended)
    return Standing("dead", ended)


def _judge_lease(seen: Witnesses, recorded: str | None) -> Standing:
    """Slurm has nothing to say: the run's own files are all there is."""
    if seen.lease == "dead":
        return Standing("dead")
    if seen.lease == "unknown":
        silent = seen.silent_s > DEAD_AFTER_S
        state = "running" if recorded == "running" else "starting"
        note = f"no sign of life for {duration(seen.silent_s)}" if silent else ""
        return Standing(state + "?" * silent, note, living=True)
    if recorded == "running":
        return Standing("dead")
    if seen.process is False:
        return Standing("failed", "ended without a word")
    return Standing("unknown")


# ---- what the files say --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overview:
    """A run as it is listed; None: not known."""

    name: str
    path: Path
    state: str
    note: str
    living: bool
    finished: bool
    step: int | None
    total_steps: int | None
    epoch: int | None
    loss: float | None
    wer: float | None
    best_wer: float | None
    audio_s_per_s: float | None
    job_id: str | None
    attempt: int | None
    submitted_s: float | None  # Unix times
    seen_s: float | None  # of the last line
    error: str


class Reader:
    """Reads runs; what it has seen of their leases makes its next look wiser."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.complaint = ""  # why Slurm was not heard
        self._clock = clock
        self._watches: dict[Path, Watch] = {}

    def read(self, runs: Sequence[Path], root: Path | None = None) -> list[Overview]:
        """How the runs stand, named relative to `root`; in their order."""
        found = [(run, status, read_job(run) or _job_of(status)) for run in runs for status in [read_status(run)]]
        states = self._ask_slurm([job for _, status, job in found if job and (status or {}).get("state") != "done"])
        return [self._overview(run, root, status, job, states) for run, status, job in found]

    def _ask_slurm(self, jobs: Iterable[dict[str, Any]]) -> dict[str, JobState]:
        self.complaint = ""
        job_ids = [str(job["job_id"]) for job in jobs if job["executor"] == "slurm"]
        try:
            return cluster.job_states(job_ids) if job_ids else {}
        except UserError as error:
            self.complaint = str(error)
            return {}

    def _overview(
        self,
        run: Path,
        root: Path | None,
        status: dict[str, Any] | None,
        job: dict[str, Any] | None,
        states: dict[str, JobState],
    ) -> Overview:
        watch = self._watches.setdefault(run, Watch(run, clock=self._clock))
        seen = Witnesses(
            status=status,
            job=_state_of(job, status, states) if job else None,
            process=_has_process(job) if job and job["executor"] == "local" else None,
            lease=watch.verdict(),
            silent_s=_age_s(run / "lease.json"),
            requeues=_requeues(run, status, job),
        )
        standing = judge(seen)
        train, test = last_lines(run / "metrics.jsonl")
        status = status or {}
        rates = [rate for rate in (status.get("best_wer"), test.get("wer")) if rate is not None]
        return Overview(
            name=str(run.relative_to(root)) if root is not None else run.name,
            path=run,
            state=standing.state,
            note=standing.note,
            living=standing.living,
            finished=standing.finished,
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
            seen_s=max((float(line["time_s"]) for line in (train, test, status) if "time_s" in line), default=None),
            error="" if standing.living or standing.finished else error_of(standing, status, job),
        )


def find_runs(directory: Path) -> list[Path]:
    """The runs in a directory and in those below it, such as a sweep's; or the directory itself, if it is a run."""
    if not directory.is_dir():
        raise UserError(f"there is no directory {directory}: name the one that holds the runs, or a run")
    if is_run(directory):
        return [directory]
    found: list[Path] = []
    for child in sorted(filter(Path.is_dir, directory.iterdir())):
        found += [child] if is_run(child) else sorted(filter(is_run, child.iterdir()))
    return found


def is_run(directory: Path) -> bool:
    return any((directory / mark).is_file() for mark in MARKS)


def _job_of(status: dict[str, Any] | None) -> dict[str, Any] | None:
    """The Slurm job of a run that no launcher has submitted, such as one of slurm/train.sbatch."""
    job_id = (status or {}).get("job_id")
    return {"job_id": job_id, "executor": "slurm"} if job_id is not None and shutil.which("squeue") else None


def _state_of(job: dict[str, Any], status: dict[str, Any] | None, states: dict[str, JobState]) -> JobState | None:
    state = states.get(str(job["job_id"]))
    # An interactive allocation goes on when the run in it has ended; a job of ours is for this run alone.
    if "folder" not in job and state and state.state == "RUNNING" and (status or {}).get("state") != "running":
        return None
    return state


def _has_process(job: dict[str, Any]) -> bool:
    """Whether a local job's controller runs; its pid alone may be another process's by now."""
    with contextlib.suppress(OSError):
        arguments = Path(f"/proc/{job['job_id']}/cmdline").read_bytes().split(b"\0")
        return str(job["folder"]).encode() in arguments
    return False


def _requeues(run: Path, status: dict[str, Any] | None, job: dict[str, Any] | None) -> int:
    """How often Slurm has put the run's newest job back into its queue, as far as an attempt has told."""
    if status is None or job is None or job["executor"] != "slurm":
        return 0
    attempt = int(status.get("attempt") or 1)
    # An array's task has two numbers, of which an attempt knows the other. A status older than the job is of another.
    if status.get("job_id") != job["job_id"]:
        older = (run / "status.json").stat().st_mtime < (run / "job.json").stat().st_mtime
        if older or "_" not in str(job["job_id"]):
            return 0
    return attempt - 1 if status.get("state") == "running" else attempt


def _age_s(path: Path) -> float:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return 0.0


def last_lines(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The newest train and the newest test line of metrics.jsonl, {} for none; reads it from its end."""
    found: dict[str, dict[str, Any]] = {"train": {}, "test": {}}
    for text in _backwards(path):
        # An evaluation may lie thousands of steps back, which need not all be parsed.
        if found["train"] and b'"test"' not in text:
            continue
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if (kind := line.get("kind")) in ("train", "test") and not found[kind]:
                found[kind] = line
        if all(found.values()):
            break
    return found["train"], found["test"]


def _backwards(path: Path) -> Iterator[bytes]:
    """The complete lines of a JSONL file, the last first."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        position = end = file.seek(0, 2)
        rest = b""
        while position > 0 and end - position < MOST_BYTES:
            start = max(0, position - BLOCK_BYTES)
            file.seek(start)
            lines = (file.read(position - start) + rest).split(b"\n")
            if position == end:
                lines.pop()  # torn, or nothing behind the last line's end
            position = start
            rest = lines.pop(0) if start > 0 and lines else b""
            yield from (line for line in reversed(lines) if line.startswith(b"{"))


# ---- the error -----------------------------------------------------------------------------------------------------

# Ours, then Python's; what srun says of it comes later in the log and says less.
_ERRORS = (r"(?:error: |[\w.]*(?:Error|Exception)\b)", r"(?:srun|slurmstepd): error: ")


def error_of(standing: Standing, status: dict[str, Any], job: dict[str, Any] | None) -> str:
    """The last line of what ended a run; "" where nothing is known."""
    if standing.state == "failed" and status.get("state") == "failed":
        return str(status.get("reason", ""))
    if job is None or "folder" not in job or standing.state not in ("failed", "dead", "unknown"):
        return ""
    logs = sorted(Path(job["folder"]).glob(f"{job['job_id']}_*_log.out"), key=lambda path: (len(path.name), path.name))
    texts = [_tail(log) for log in logs]
    for pattern in _ERRORS:
        for text in texts:
            if found := re.findall(rf"^{pattern}.*\S", text, flags=re.MULTILINE):
                return found[-1].removeprefix("error: ")
    return ""


def _tail(path: Path) -> str:
    with contextlib.suppress(OSError), path.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - BLOCK_BYTES))
        return file.read().decode("utf8", errors="replace")
    return ""


# ---- showing it ----------------------------------------------------------------------------------------------------

HEADINGS = ("run", "state", "step", "epoch", "loss", "WER", "best", "audio-s/s", "job", "attempt", "last line")
_LEFT = {"run", "state"}
_COLORS = {"done": "green", "failed": "red", "dead": "red", "cancelled": "yellow", "stopped": "yellow"}


def in_order(overviews: Iterable[Overview]) -> list[Overview]:
    """The living first, the newest job first; then the others, the one that ended last first."""

    def key(run: Overview) -> tuple[bool, float, str]:
        # By the job's time, because that of the last line would shuffle the living at every look.
        time_s = run.submitted_s if run.living else run.seen_s
        return not run.living, -(time_s or 0.0), run.name

    return sorted(overviews, key=key)


def cells(run: Overview, now_s: float) -> list[str]:
    """A run's row under `HEADINGS`."""
    note = run.note if len(run.note) <= LONGEST_NOTE else run.note[: LONGEST_NOTE - 3] + "..."
    return [
        run.name,
        f"{run.state} ({note})" if note else run.state,
        "-" if run.step is None else f"{run.step}/{'?' if run.total_steps is None else run.total_steps}",
        "-" if run.epoch is None else str(run.epoch),
        number(run.loss),
        percent(run.wer),
        percent(run.best_wer),
        number(run.audio_s_per_s, 0),
        run.job_id or "-",
        "-" if run.attempt is None else str(run.attempt),
        "-" if run.seen_s is None else f"{duration(now_s - run.seen_s)} ago",
    ]


def aligned(headings: Sequence[str], rows: Sequence[Sequence[str]], left: Iterable[str] = _LEFT) -> list[str]:
    """Rows as lines of columns under their headings; numbers to the right, the columns `left` to the left."""
    table = [headings, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(headings))]

    def line(row: Sequence[str]) -> str:
        parts = zip(headings, row, widths, strict=True)
        padded = (cell.ljust(width) if name in left else cell.rjust(width) for name, cell, width in parts)
        return "  ".join(padded).rstrip()

    return [line(row) for row in table]


def table(overviews: Sequence[Overview], now_s: float) -> list[tuple[str, str]]:
    """(line, its colour): a row a run, and below it the error that ended it."""
    heading, *rows = aligned(HEADINGS, [cells(run, now_s) for run in overviews])
    lines = [(heading, "bold")]
    for run, row in zip(overviews, rows, strict=True):
        lines.append((row, _COLORS.get(run.state, "dim" if run.state == "PENDING" else "")))
        if run.error:
            lines.append((f"    {run.error}", "red"))
    return lines


def coloured(lines: Iterable[tuple[str, str]]) -> Text:
    """Lines for a terminal that shows them in place: cut at its width."""
    from rich.text import Text

    return Text("\n", no_wrap=True, overflow="ellipsis").join(Text(line, style=style) for line, style in lines)


def as_json(overviews: Iterable[Overview], now_s: float) -> list[dict[str, Any]]:
    """The runs as plain objects."""
    return [
        dataclasses.asdict(run) | {"path": str(run.path), "age_s": None if run.seen_s is None else now_s - run.seen_s}
        for run in overviews
    ]


# ---- the command ---------------------------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(sys.argv[1:] if argv is None else argv)
    reader = Reader()
    if options.watch is None:
        _show_once(options, reader)
        return 0
    with contextlib.suppress(KeyboardInterrupt):
        _watch(options, reader)
    return 0


def _look(options: argparse.Namespace, reader: Reader) -> list[Overview]:
    root = options.directory
    runs = find_runs(root)
    return in_order(reader.read(runs, None if runs == [root] else root))


def _show_once(options: argparse.Namespace, reader: Reader) -> None:
    overviews = _look(options, reader)
    if options.json:
        print(json.dumps(as_json(overviews, time.time()), indent=None if options.watch else 1), flush=True)
        return
    print("\n".join(line for line, _ in _lines(options, reader, overviews)), flush=True)


def _lines(options: argparse.Namespace, reader: Reader, overviews: Sequence[Overview]) -> list[tuple[str, str]]:
    lines = table(overviews, time.time()) if overviews else [(f"no runs in {options.directory}", "")]
    return lines + ([(f"Slurm was not asked: {reader.complaint}", "yellow")] if reader.complaint else [])


def _watch(options: argparse.Namespace, reader: Reader) -> None:
    """Looks again and again; in place on a terminal, one table below the other elsewhere."""
    if options.json or not sys.stdout.isatty():
        while True:
            _show_once(options, reader)
            time.sleep(options.watch)
    from rich.live import Live

    with Live(auto_refresh=False, vertical_overflow="ellipsis") as live:
        while True:
            live.update(coloured(_lines(options, reader, _look(options, reader))), refresh=True)
            time.sleep(options.watch)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.status",
        description="Lists runs: how they stand, how far they are, and what ended them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "directory", nargs="?", type=Path, default=Path("runs"), metavar="DIR", help="runs, a sweep, or one run"
    )
    parser.add_argument(
        "--watch", nargs="?", type=_seconds, const=5.0, metavar="SECONDS", help="look again so often (default: 5)"
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects; with --watch, one a line")
    return parser.parse_args(argv)


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) < float("inf"):
            return seconds
    raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0 (DIR comes before --watch)")


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
