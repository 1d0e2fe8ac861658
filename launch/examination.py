"""What a doctor's job runs on every rank; the nodes meet in a directory, because their network is what is in question.

    each node   arrived   listens on the rendezvous port, and says so
                connected has tried the names and ports of all that have arrived
                done      has looked at its GPUs and directories
    rank 0      decision  whether the all-reduce can be tried
    each rank   all-reduce-RANK.json

A node writes `NODE.json` anew after each stage, at once (rename), so that one which hangs or dies is known by its last
stage. Nobody waits without a limit, a share of the `timeout_s` that the doctor itself waits for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import probes
from launch.findings import VARIABLES, AllReduce, Report
from launch.job import Place
from launch.probes import Directory, Link, Listener, Target

POLL_S = 0.2
# Shares of the doctor's timeout: for the slowest node's start, for dead links, for directories, for the all-reduce.
_ARRIVE, _CONNECT, _LOOK, _REDUCE = 0.25, 0.06, 0.25, 0.3


class Desk:
    """The directory in which nodes put down what they know, and the doctor reads it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, name: str, text: str) -> None:
        """A whole file, at once."""
        aside = self.folder / f".{name}.tmp"
        aside.write_text(text, encoding="utf8")
        aside.replace(self.folder / name)

    def report(self, report: Report) -> None:
        self.put(f"{report.node}.node.json", report.to_json())

    def reports(self) -> dict[str, Report]:
        """The nodes' newest reports, by node."""
        probes.refresh(self.folder)
        found = {}
        for path in sorted(self.folder.glob("*.node.json")):
            with contextlib.suppress(OSError):  # NFS: replaced at this moment; the next look sees it
                report = Report.from_json(path.read_text(encoding="utf8"))
                found[report.node] = report
        return found

    def wait_for(self, enough: Callable[[dict[str, Report]], bool], limit_s: float) -> dict[str, Report]:
        """The reports, as soon as they are enough or the limit is over."""
        deadline_s = time.monotonic() + limit_s
        while not enough(reports := self.reports()) and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
        return reports

    def decide(self, why_not: str) -> None:
        """Rank 0's word on the all-reduce; empty: it is tried."""
        self.put("decision.json", json.dumps({"why_not": why_not}) + "\n")

    def decision(self) -> str | None:
        """Why there is no all-reduce, empty if there is one; None: not decided."""
        probes.refresh(self.folder)
        try:
            return json.loads((self.folder / "decision.json").read_text(encoding="utf8"))["why_not"]
        except FileNotFoundError:
            return None

    def all_reduce(self) -> AllReduce:
        """What the ranks have put down."""
        measured, errors = None, {}
        for path in sorted(self.folder.glob("all-reduce-*.json")):
            record = json.loads(path.read_text(encoding="utf8"))
            measured = record["measured"] or measured
            if record["error"]:
                errors[record["rank"]] = record["error"]
        return AllReduce(measured, errors)


@dataclass(frozen=True)
class Examination:
    """A rank of a doctor's job; what submitit calls in each task."""

    desk: Path
    targets: tuple[Target, ...]
    timeout_s: float

    def __call__(self) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, signal.SIG_DFL)  # submitit would go on after either, and scancel wait for its KILL
        place, desk = Place.of_task(), Desk(self.desk)
        if place.local_rank == 0:
            self._examine(place, _node(place), desk)
        if place.rank == 0:
            desk.decide(self._why_not(place, desk))
        if self._agreed(desk):
            record = all_reduce(place, limit_s=max(5, int(_REDUCE * self.timeout_s)))
            desk.put(f"all-reduce-{place.rank}.json", json.dumps(record) + "\n")

    def _examine(self, place: Place, node: str, desk: Desk) -> None:
        port = int(place.environment()["MASTER_PORT"])
        with Listener(node, port) as listener:
            report = Report(
                node,
                "arrived",
                listener.ports,
                listener.error,
                hostname=socket.gethostname(),
                interfaces=probes.interfaces(),
                variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
            )
            desk.report(report)
            known = desk.wait_for(lambda reports: set(place.hosts) <= set(reports), _ARRIVE * self.timeout_s)
            report = connect(report, [host for host in place.hosts if host != node], known, port, self._connect_s)
            desk.report(report)
            # The others are still trying.
            desk.wait_for(lambda reports: all(r.stage != "arrived" for r in reports.values()), 2 * self._connect_s)
        directories = look_at_all(self.targets, node, _LOOK * self.timeout_s)
        desk.report(dataclasses.replace(report, stage="done", gpus=probes.gpus(), directories=directories))

    @property
    def _connect_s(self) -> float:
        return _CONNECT * self.timeout_s

    def _why_not(self, place: Place, desk: Desk) -> str:
        """Waits until all that have arrived are done: they would fight over disks and cores with the all-reduce."""
        reports = desk.wait_for(lambda reports: _all_done(reports.values()), (_LOOK + _CONNECT) * self.timeout_s)
        return why_not(place.hosts, reports)

    def _agreed(self, desk: Desk) -> bool:
        """Whether rank 0 has decided for the all-reduce."""
        deadline_s = time.monotonic() + (_ARRIVE + 3 * _CONNECT + 2 * _LOOK) * self.timeout_s
        while (decision := desk.decision()) is None and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
        return decision == ""


def _node(place: Place) -> str:
    """This node's name among the job's hosts."""
    return place.hosts[int(os.environ["SLURM_NODEID"])] if len(place.hosts) > 1 else place.hosts[0]


def _all_done(reports: Iterable[Report]) -> bool:
    return all(report.stage == "done" for report in reports)


def connect(
    report: Report, others: Sequence[str], known: Mapping[str, Report], rendezvous_port: int, limit_s: float
) -> Report:
    """The report with the names of the other nodes and the links to them."""
    names = probes.resolve_all(others, limit_s)
    wanted = []
    for other in others:
        # One that has not arrived may still show by what error it is missed.
        ports = known[other].ports if other in known else [rendezvous_port]
        wanted += [(other, port) for port in ports]
    links: list[Link] = probes.reach_all(wanted, limit_s)
    own = probes.resolve(report.hostname, limit_s)
    towards = [address for name in names.values() or [own] for address in name.addresses[:1]]
    routes = [_shown(address, report.interfaces) for address in map(probes.route_to, towards) if address]
    return dataclasses.replace(
        report, stage="connected", own=own, names=names, links=links, routes=list(dict.fromkeys(routes))
    )


def _shown(address: str, interfaces: Mapping[str, str]) -> str:
    name = next((name for name, own in interfaces.items() if own == address), "")
    return f"{address} ({name})" if name else address


def look_at_all(targets: Sequence[Target], node: str, limit_s: float) -> list[Directory]:
    """One after the other, so that none slows another; together within the limit."""
    deadline_s = time.monotonic() + limit_s
    found = []
    for target in targets:
        left_s = max(1.0, deadline_s - time.monotonic())
        found.append(probes.look_at(target, node, min(left_s, limit_s / 2)))
    return found


def why_not(hosts: Sequence[str], reports: Mapping[str, Report]) -> str:
    """Why an all-reduce would only hang; empty: it can be tried."""
    missing = [host for host in hosts if host not in reports]
    if missing:
        return f"{', '.join(missing)} did not report"
    for report in reports.values():
        if report.stage != "done":
            return f"{report.node} hangs"
        for link in report.unreached:
            return f"{report.node} cannot reach {link.to}"
    return f"{hosts[0]} cannot listen" if reports[hosts[0]].port_error else ""


def all_reduce(place: Place, limit_s: int) -> dict[str, Any]:
    """Runs ddp_asr.bandwidth as this rank; its numbers on rank 0, or in one line why it failed."""
    command = [sys.executable, "-m", "ddp_asr.bandwidth", "--limit-s", str(limit_s)]
    environment = os.environ | place.environment()
    environment.setdefault("OMP_NUM_THREADS", "1")  # ranks share the node's cores
    with subprocess.Popen(
        command,
        cwd=Path(__file__).parent.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as child:
        try:
            printed, _ = child.communicate(timeout=limit_s + 10)  # it ends itself before; a process that hangs may not
        except subprocess.TimeoutExpired:
            printed = ""
        finally:
            child.kill()
    print(printed, flush=True)  # into the rank's log
    error = _why_failed(child.returncode, printed, limit_s)
    lines = [line for line in printed.splitlines() if line.startswith("{")]
    return {"rank": place.rank, "error": error, "measured": json.loads(lines[-1]) if lines and not error else None}


def _why_failed(returncode: int, printed: str, limit_s: int) -> str:
    if returncode == 0:
        return ""
    if returncode in (-signal.SIGALRM, -signal.SIGKILL):
        return f"it did not end within {limit_s} s"
    lines = [line.strip() for line in printed.splitlines() if line.strip()] or [f"exit code {returncode}"]
    mistakes = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (mistakes or lines)[-1]
