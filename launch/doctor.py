"""Looks at nodes before a long run is spent on them: `python -m launch.doctor --nodes 4 --gpus-per-node 8`, a minute.

    Slurm's nodes  ->  a job, examination.Examination on every rank  ->  the nodes' reports  ->  findings.judge
                   ->  a table, one sentence for each thing wrong, exit status 1 if there is any

Nothing here waits for a node that cannot answer: a job that cannot start for want of nodes is taken back and Slurm's
reason told, and one that has started has `--timeout` seconds. The job is cancelled when it is not needed any more, by
Ctrl-C as well.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddp_asr.config import Config, load_config
from ddp_asr.errors import UserError, run_entry_point
from launch import cluster, findings, job, probes
from launch.cluster import JobState, Node, Request, Submission
from launch.examination import Desk, Examination
from launch.findings import AllReduce, Evidence, Finding, Report
from launch.probes import Target

if TYPE_CHECKING:
    from rich.table import Table

RUN_BYTES = 2 * 10**9  # four checkpoints of the default model with its moments are 1.1 GB
TMP_BYTES = 5 * 10**8
SHARED_MEMORY_BYTES = 64 << 20  # a rank: what its loader processes hand over, and NCCL
LOOK_EVERY_S = 0.5
ASK_SLURM_EVERY_S = 2.0
BLOCKED_FOR_S = 6.0  # before it is believed: nodes change their state while a job starts
LAST_WORDS_S = 5.0
END_WITHIN_S = 20.0
# Reasons for which Slurm holds a job back until somebody changes the job or the cluster.
_HOPELESS = re.compile(
    "Partition(Config|NodeLimit|TimeLimit|Down|Inactive)|BadConstraints|Invalid(Account|QOS)|PerJob|JobHeld|held"
)

EXAMPLES = """\
examples:
  python -m launch.doctor --nodes 4 --gpus-per-node 8
  python -m launch.doctor --cluster infiniband8 --nodes 4 --config configs/librispeech_960.yaml
  python -m launch.doctor --nodes 2 --tasks-per-node 2 --partition main --path shards/train-clean-100 --json
  python -m launch.doctor --cluster local --tasks-per-node 2

Run it with the settings and the options of the run that you are going to submit. It ends with 0 when nothing is wrong,
with 1 otherwise, with 2 when Slurm refuses the job.
"""


def main(argv: Sequence[str] | None = None) -> int:
    options, settings = _parse(sys.argv[1:] if argv is None else argv)
    config = load_config(options.config, settings)
    request = cluster.request_from(options)
    if options.time is None:
        request = dataclasses.replace(request, time=str(math.ceil(options.timeout / 60) + 2))
    runs = Path(config.run.dir).absolute()
    named = options.config is not None or any(text.startswith("--data.") for text in settings)
    with _folder(runs) as folder, _tokens(options.path, folder) as others:
        targets = [*_targets(config, runs, folder, request, shards=named), *others]
        consultation = examine(request, folder, targets, options.timeout)
        found = findings.judge(consultation)
        if not any(finding.wrong for finding in found):
            shutil.rmtree(folder, ignore_errors=True)
    print(_as_json(consultation, found) if options.json else _as_text(consultation, found), flush=True)
    return int(any(finding.wrong for finding in found))


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="python -m launch.doctor",
        description="Runs a job of about a minute that says of each node what would break or slow a long one:\n"
        "names, links, the rendezvous port, GPUs, disks, run directory, shards, and an all-reduce over all ranks.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s [--config FILE] [--path DIR] [--timeout S] [--json] [job options] [--section.key=value ...]",
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="settings of the run: its directory, its shards, its cache"
    )
    parser.add_argument(
        "--path",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="another directory that every node must see: shards, or one to write to; may be repeated",
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=180.0,
        metavar="S",
        help="seconds to wait for the nodes once the job has started (default: 180); half a minute is the least "
        "that makes sense",
    )
    parser.add_argument("--json", action="store_true", help="print all that was found as JSON")
    cluster.add_options(parser)
    return parser.parse_known_args(argv)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"must be a number of seconds from 1 to 86400, not {text!r}")
    return seconds


# ---- what is looked at ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _folder(runs: Path) -> Iterator[Path]:
    """A new folder for the job below the runs; one whose job was never sent is removed."""
    folder = runs / ".doctor" / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    try:
        (folder / "desk").mkdir(parents=True)
        (folder / "token").write_text(secrets.token_hex(32))
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or folder} ({error.strerror}): the job's files and its nodes' reports lie "
            "there; choose a directory that you may write and all nodes share, with --run.dir=DIR"
        ) from None
    try:
        yield folder
    except (UserError, KeyboardInterrupt):
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        with contextlib.suppress(OSError):  # others may be in there
            folder.parent.rmdir()


def _targets(config: Config, runs: Path, folder: Path, request: Request, *, shards: bool) -> list[Target]:
    """What the nodes look at, by the run's settings."""
    token = folder / "token"
    evidence = str(token.relative_to(runs))
    found = [
        Target(str(runs), "the run directory", evidence, probes.digest_of(token), write=True, needed_bytes=RUN_BYTES)
    ]
    paths = dict.fromkeys(Path(path).absolute() for path in (*config.data.train, *config.data.test)) if shards else {}
    found += [_shards(path) for path in paths]
    if shards and config.data.cache_dir:
        needed = sum(size for path in paths for size in probes.shard_bytes(path).values())
        cache = str(Path(config.data.cache_dir).absolute())
        found.append(Target(cache, "the shards' copies", write=True, needed_bytes=needed))
    found.append(Target("/tmp", "temporary files", needed_bytes=TMP_BYTES))
    found.append(Target("/dev/shm", "shared memory", needed_bytes=SHARED_MEMORY_BYTES * request.ranks_per_node))
    return found


def _shards(path: Path) -> Target:
    """Shards need not be visible here; then the nodes are compared with each other."""
    try:
        digest = probes.digest_of(path / "dataset.json")
    except OSError:
        digest = ""
    return Target(str(path), "the shards", "dataset.json", digest, read=True)


@contextlib.contextmanager
def _tokens(paths: Sequence[Path], folder: Path) -> Iterator[list[Target]]:
    """Targets of the directories given by hand; in those that hold no shards lies a file for as long as this lasts."""
    found, tokens = [], []
    try:
        for path in (given.absolute() for given in paths):
            if (path / "dataset.json").exists():
                found.append(_shards(path))
                continue
            token = path / f".doctor-{folder.name}"
            try:
                shutil.copy(folder / "token", token)
            except OSError as error:
                raise UserError(
                    f"cannot write {token} ({error.strerror}): --path takes directories of shards, and such as you "
                    "may write to"
                ) from None
            tokens.append(token)
            found.append(Target(str(path), "the directory", token.name, probes.digest_of(token), write=True))
        yield found
    finally:
        for token in tokens:
            token.unlink(missing_ok=True)


# ---- the job -------------------------------------------------------------------------------------------------------


def examine(request: Request, folder: Path, targets: Sequence[Target], timeout_s: float) -> Evidence:
    """Sends the job, waits for it, and gathers what there is to judge; the job is gone afterwards."""
    desk = Desk(folder / "desk")
    examination = Examination(desk.folder, tuple(targets), timeout_s)
    submission = cluster.submit([examination], folder, request, name="doctor", code=job.freeze_code(folder))
    patient = _Job(submission, request, desk)
    try:
        patient.tell(f"job {patient.id}; its logs: {folder}")
        ended = patient.wait(timeout_s)
        return patient.evidence(targets, ended)
    finally:
        patient.leave()


class _Job:
    """The doctor's job while it is waited for."""

    def __init__(self, submission: Submission, request: Request, desk: Desk) -> None:
        self.submission, self.request, self.desk = submission, request, desk
        self.id = submission.job_ids[0]
        self._slurm = request.executor == "slurm"
        self._told = ""
        self._hosts: list[str] = []
        self._started_s: float | None = None
        self._blocked_since_s: float | None = None

    def tell(self, text: str) -> None:
        """A line on stderr, each once in a row; stdout is for the result."""
        if text != self._told:
            print(text, file=sys.stderr, flush=True)
            self._told = text

    def wait(self, timeout_s: float) -> str:
        """Returns when the nodes have said all that they are going to, or why nobody waits any longer."""
        while not self._complete():
            if why := self._why_stop(self.state(), timeout_s):
                return why
            self._pause()
        return ""

    def _why_stop(self, state: JobState, timeout_s: float) -> str:
        """Why waiting on is of no use; empty: it may be."""
        if not state.living:
            return self._ended(state)
        if state.state == "PENDING":
            return self._why_not_started(state)
        if self._started_s is None and state.state == "RUNNING":
            self._started_s = time.monotonic()
            self.tell(f"job {self.id} runs on {findings.listed(self.hosts())}")
        if self._started_s is not None and time.monotonic() - self._started_s > timeout_s:
            return f"not every node had said all within {timeout_s:g} s (--timeout)"
        return ""

    def _why_not_started(self, state: JobState) -> str:
        if self._started_s is not None:
            return f"Slurm has taken the job back and would start it anew ({state.reason or 'a node failed'})"
        if state.reason:
            self.tell(f"job {self.id} waits ({state.reason}); Ctrl-C takes it back")
        why = self._blocked(state)
        self._blocked_since_s = (self._blocked_since_s or time.monotonic()) if why else None
        believed = self._blocked_since_s is not None and time.monotonic() - self._blocked_since_s >= BLOCKED_FOR_S
        return why if believed else ""

    def _pause(self) -> None:
        """Looks at the desk more often than it asks Slurm."""
        until_s = time.monotonic() + (ASK_SLURM_EVERY_S if self._slurm else LOOK_EVERY_S)
        while time.monotonic() < until_s and not self._complete():
            time.sleep(LOOK_EVERY_S)

    def _complete(self) -> bool:
        decision = self.desk.decision()
        return decision is not None and (decision != "" or self._reduced())

    def _reduced(self) -> bool:
        result = self.desk.all_reduce()
        return result.measured is not None or 0 in result.errors

    def _ended(self, state: JobState) -> str:
        """The last reports may still be on their way through a network file system."""
        deadline_s = time.monotonic() + LAST_WORDS_S
        while not self._complete() and time.monotonic() < deadline_s:
            time.sleep(LOOK_EVERY_S)
        return "" if self._complete() else f"the job ended ({state.state}) before its nodes had said all"

    def _blocked(self, state: JobState) -> str:
        """Why the job will not start by waiting; empty: it may."""
        if _HOPELESS.search(state.reason):
            return f"Slurm holds the job back for good ({state.reason}): compare it with 'scontrol show partition'"
        request = self.request
        return findings.blocked(self.nodes(), request, _expanded(request.nodelist), _expanded(request.exclude))

    def state(self) -> JobState:
        """The job's state, also where there is no Slurm."""
        if self._slurm:
            return cluster.job_states([self.id])[self.id]
        return JobState("RUNNING" if self.request.executor == "local" and _lives(int(self.id)) else "COMPLETED")

    def nodes(self) -> list[Node]:
        """The nodes of the job's partition."""
        if not self._slurm:
            return []
        known = cluster.scontrol_job(self.id) or {}
        return cluster.nodes(known.get("Partition", self.request.partition))

    def hosts(self) -> list[str]:
        """The nodes that the job was given; empty: it never started."""
        if not self._slurm:
            return [socket.gethostname()]
        given = (cluster.scontrol_job(self.id) or {}).get("NodeList", "(null)")
        # A job that is taken back has none any more, and which they were is what one wants to know.
        self._hosts = _expanded(given) if given != "(null)" else self._hosts
        return self._hosts

    def evidence(self, targets: Sequence[Target], ended: str) -> Evidence:
        """All that is known now."""
        reports = self.desk.reports()
        return Evidence(
            hosts=self.hosts() or sorted(reports),
            reports=reports,
            request=self.request,
            targets=targets,
            job_id=self.id,
            folder=str(self.submission.folder),
            port=job.rendezvous_port(self.id, 1),
            all_reduce=self.desk.all_reduce(),
            expect_all_reduce=self.desk.decision() == "",
            nodes=self.nodes(),
            ended=ended,
            complaints=complaints(self.submission.folder) if ended else [],
        )

    def leave(self) -> None:
        """Ends the job where it has not ended by itself, and waits until it is gone: nothing may write any more."""
        if self._complete():
            self._gone_within(END_WITHIN_S / 2)
        # What a task does with SIGINT, which a local job is ended by, depends on the shell that all this runs in.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            if self._gone_within(0.0):
                return
            self._cancel(number)
            self._gone_within(END_WITHIN_S)

    def _gone_within(self, limit_s: float) -> bool:
        deadline_s = time.monotonic() + limit_s
        # COMPLETING may last until a node that is cut off answers again.
        while (state := self.state()).living and state.state != "COMPLETING":
            if time.monotonic() >= deadline_s:
                return False
            time.sleep(LOOK_EVERY_S)
        return True

    def _cancel(self, number: int) -> None:
        if self._slurm:
            cluster.run(["scancel", self.id])
        else:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(self.id), number)


def _lives(pid: int) -> bool:
    """Whether a child of this process still runs."""
    try:
        return os.waitpid(pid, os.WNOHANG) == (0, 0)
    except ChildProcessError:
        return False


def _expanded(hosts: str) -> list[str]:
    """node[1-3] as Slurm means it."""
    return cluster.run(["scontrol", "show", "hostnames", hosts]).split() if hosts else []


def complaints(folder: Path) -> list[str]:
    """What Slurm's own programs have written into the job's logs."""
    found: dict[str, None] = {}
    for log in sorted(folder.glob("*_log.*")):
        with contextlib.suppress(OSError):
            text = log.read_text(encoding="utf8", errors="replace")
            found |= dict.fromkeys(re.findall(r"^srun: error: (.*\S)", text, re.MULTILINE))
    victims = re.compile(r": tasks? [\d,-]+: ")  # "node2: task 1: Killed": tasks that ended with the step
    return [complaint for complaint in found if not victims.search(complaint)][:3]


# ---- what is shown -------------------------------------------------------------------------------------------------


def _as_json(evidence: Evidence, found: Sequence[Finding]) -> str:
    record: dict[str, Any] = {
        "ok": not any(finding.wrong for finding in found),
        "wrong": [finding.sentence for finding in found if finding.wrong],
        "notes": [finding.sentence for finding in found if not finding.wrong],
        "job_id": evidence.job_id,
        "hosts": list(evidence.hosts),
        "nodes": {host: dataclasses.asdict(report) for host, report in evidence.reports.items()},
        "all_reduce": dataclasses.asdict(evidence.all_reduce),
        "slurm": [dataclasses.asdict(node) for node in evidence.nodes],
    }
    return json.dumps(record, indent=1)


def _as_text(evidence: Evidence, found: Sequence[Finding]) -> str:
    lines = [_drawn(_table(evidence))] if evidence.hosts else []
    lines += [f"all-reduce  {_shown_bandwidth(evidence.all_reduce)}"] if evidence.all_reduce.measured else []
    lines += [f"{'wrong' if finding.wrong else 'note'}: {finding.sentence}" for finding in found]
    wrong = sum(finding.wrong for finding in found)
    ranks = len(evidence.hosts) * evidence.request.ranks_per_node
    conclusion = f"{wrong} thing(s) wrong; logs: {evidence.folder}"
    lines.append(conclusion if wrong else f"nothing is wrong with {len(evidence.hosts)} node(s), {ranks} rank(s)")
    return "\n".join(lines)


def _table(evidence: Evidence) -> Table:
    from rich.table import Table

    table = Table("node", "is to the others", "reached by", "GPUs", box=None, header_style="bold", padding=(0, 2, 0, 0))
    for target in evidence.targets:
        table.add_column(f"{target.what.removeprefix('the ')}\n{_last_part(target.path)}")
    for host in evidence.hosts:
        report = evidence.reports.get(host)
        if report is None:
            table.add_row(host, "no report")
            continue
        seen = {directory.path: directory for directory in report.directories}
        cells = [_shown_directory(seen.get(target.path)) for target in evidence.targets]
        table.add_row(host, ", ".join(report.routes) or "-", _reached_by(host, evidence), _shown_gpus(report), *cells)
    return table


def _last_part(path: str) -> str:
    return path if len(path) <= 16 else f".../{Path(path).name}"


def _reached_by(host: str, evidence: Evidence) -> str:
    if len(evidence.hosts) < 2:
        return "-"
    others = [report for report in evidence.reports.values() if report.node != host and report.links]
    reached = [r for r in others if any(link.to == host and not link.error for link in r.links)]
    whole = [r for r in reached if not any(link.to == host for link in r.unreached)]
    return f"{len(whole)} of {len(others)}" if others else "?"


def _shown_gpus(report: Report) -> str:
    gpus = report.gpus
    if not gpus.names:
        return "none" if report.stage == "done" else "?"
    return f"{len(gpus.names)} x {gpus.names[0]}, driver {gpus.driver}"


def _shown_directory(found: probes.Directory | None) -> str:
    if found is None:
        return "?"
    if found.error:
        return found.error
    parts = [f"{found.free_bytes / 1e9:.0f} GB free"] if found.free_bytes >= 0 and found.read_mb_per_s is None else []
    parts += [f"reads {found.read_mb_per_s:.0f} MB/s"] if found.read_mb_per_s is not None else []
    parts += [f"writes {found.write_mb_per_s:.0f} MB/s"] if found.write_mb_per_s is not None else []
    return "\n".join(parts)


def _shown_bandwidth(result: AllReduce) -> str:
    measured = result.measured or {}
    device = measured["ranks"][0]["device"].partition(":")[0]
    sizes = [
        f"{size['bytes'] >> 20} MiB {1000 * size['seconds']:.1f} ms, {size['bus_gb_per_s']:.2f} GB/s"
        for size in measured["sizes"]
        if size["bus_gb_per_s"] is not None
    ]
    return f"{measured['world_size']} rank(s) on {device}: {'; '.join(sizes) or 'nothing to send'} (bus bandwidth)"


def _drawn(table: Table) -> str:
    from rich.console import Console

    width = shutil.get_terminal_size((160, 24)).columns
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
