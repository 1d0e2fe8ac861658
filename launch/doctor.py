"""Tests nodes before a long run is started on them: `ddp-asr doctor --nodes 4 --gpus-per-node 8`, a minute.

    a Slurm job      ->  probe.Probe on every node  ->  JSON lines in the job's logs  ->  Evidence
    --cluster local  ->  the same probe in this process                               ->  Evidence
    Evidence         ->  wrong(): a sentence for each thing wrong  ->  a table, the sentences, exit status 1 if any

A job that cannot start because nodes are missing is cancelled, and one that has started has `--timeout` seconds; nodes
that have not answered by then are named. Ctrl-C cancels the job as well.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import re
import secrets
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddp_asr.config import Config, load_config
from ddp_asr.errors import UserError, counted, run_entry_point
from ddp_asr.files import read_json_lines, scheme_of

from . import cluster, job
from .cluster import Node, Request
from .node import expanded
from .probe import UNKNOWN_NAME, Directory, Probe, Report

RUN_BYTES = 2 * 10**9  # four checkpoints of the default model with its moments are 1.1 GB
TMP_BYTES = 5 * 10**8
SHARED_MEMORY_BYTES = 64 << 20  # a rank, for NCCL
ASK_SLURM_EVERY_S = 2.0
BLOCKED_FOR_S = 6.0  # before it is believed: nodes change their state while a job starts
LOGS_WITHIN_S = 5.0  # after the job's end, on a network file system
_OUT_OF_USE = ("down", "drain", "fail", "error", "unknown", "inval", "maint")

EXAMPLES = """\
examples:
  ddp-asr doctor --nodes 4 --gpus-per-node 8
  ddp-asr doctor --cluster infiniband8 --nodes 4 --config configs/librispeech_960.yaml
  ddp-asr doctor --nodes 2 --tasks-per-node 2 --partition main --data.train=shards/train-clean-100 --json
  ddp-asr doctor --cluster local --tasks-per-node 2

Run it with the settings and the options of the run that you are going to submit. The exit status is 0 when nothing is
wrong, 1 when something is, 2 when an option is wrong or Slurm refuses the job.
"""


def main(argv: Sequence[str] | None = None) -> int:
    options, settings = _parse(sys.argv[1:] if argv is None else argv)
    config = load_config(options.config, settings)
    request = cluster.request_from(options)
    shards = options.config is not None or any(text.startswith("--data.") for text in settings)
    targets = tuple(directories(config, request, shards=shards))
    probe = Probe(targets, request.gpus_per_node, options.timeout)
    if request.executor == "slurm":
        limit = options.time or str(math.ceil(options.timeout / 60) + 2)
        evidence = on_slurm(probe, dataclasses.replace(request, time=limit), Path(config.run.dir).absolute())
    else:
        evidence = on_this_machine(probe, request)
    sentences = wrong(evidence)
    if evidence.logs and not sentences:
        shutil.rmtree(evidence.logs, ignore_errors=True)
    if options.json:
        found = {"ok": not sentences, "wrong": sentences, **dataclasses.asdict(evidence)}
        print(json.dumps(found, indent=1), flush=True)
    else:
        _show(evidence, sentences)
    return int(bool(sentences))


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="ddp-asr doctor",
        description="Runs a job of about a minute that tests on each node what would stop or slow down a long one:\n"
        "names, links, the rendezvous port, GPUs, disks, run directory, shards, and an all-reduce over all ranks.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s [--config FILE] [--timeout S] [--json] [job options] [--section.key=value ...]",
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="settings of the run: its directory, its shards, its cache"
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=180.0,
        metavar="S",
        help="seconds that the nodes have once the job has started (default: 180; below 60 slow nodes may fail)",
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


def directories(config: Config, request: Request, *, shards: bool) -> list[Directory]:
    """What the nodes look at, by the run's settings."""
    found = [Directory(str(Path(config.run.dir).absolute()), "the run directory", RUN_BYTES, write=True)]
    named = (*config.data.train, *config.data.test) if shards else ()
    paths = dict.fromkeys(Path(path).absolute() for path in named if not scheme_of(path))
    found += [Directory(str(path), "the shards", shards=True) for path in paths]
    if shards and config.data.cache_dir:
        needed = sum(file.stat().st_size for path in paths for file in path.glob("*.tar"))
        needed = min(needed, round(config.data.cache_gb * 1e9) or needed)
        found.append(Directory(str(Path(config.data.cache_dir).absolute()), "the cache of shards", needed, write=True))
    found.append(Directory("/tmp", "temporary files", TMP_BYTES))
    found.append(Directory("/dev/shm", "shared memory", SHARED_MEMORY_BYTES * request.ranks_per_node))
    return found


# ---- the evidence --------------------------------------------------------------------------------------------------


@dataclass
class Evidence:
    """All that is known about the nodes."""

    request: Request
    directories: Sequence[Directory]
    hosts: Sequence[str] = ()  # the nodes; empty: the job did not start
    reports: Mapping[str, Report] = field(default_factory=dict)  # by node
    all_reduce: Mapping[str, dict[str, Any]] = field(default_factory=dict)  # by node, see probe.all_reduce
    logs: str = ""  # their directory
    ended: str = ""  # why the job ended early, or was not waited for any longer
    complaints: Sequence[str] = ()  # of srun, in the logs
    slurm_nodes: Sequence[Node] = ()

    def read(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Takes the lines of a probe."""
        lines = list(lines)
        self.reports = {line["report"]["node"]: line["report"] for line in lines if "report" in line}
        self.all_reduce = {line["all_reduce"]["node"]: line["all_reduce"] for line in lines if "all_reduce" in line}
        self.hosts = self.hosts or sorted(self.reports)


def on_this_machine(probe: Probe, request: Request) -> Evidence:
    # Without the variables of an allocation in which this command may run.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    evidence = Evidence(request, probe.directories)
    evidence.read(probe.lines(environment | {"RANKS_PER_NODE": str(request.ranks_per_node)}))
    return evidence


def on_slurm(probe: Probe, request: Request, runs: Path) -> Evidence:
    """Submits the job, waits for its end, or cancels it, and reads what its nodes have printed."""
    folder = runs / f".doctor-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"cannot create {folder} ({error.strerror}), which is for the job's files and logs: choose a directory "
            "that you may write and all nodes share, with --run.dir=DIR"
        ) from None
    evidence = Evidence(request, probe.directories, logs=str(folder))
    try:
        (job_id,) = cluster.submit([probe], folder, request, name="doctor", code=job.freeze_code(folder)).job_ids
        try:
            print(f"job {job_id}; logs: {folder}", file=sys.stderr, flush=True)
            evidence.ended = _wait(job_id, evidence, probe.timeout_s)
        finally:
            if cluster.job_states([job_id])[job_id].living:
                cluster.run(["scancel", job_id])
        _read_logs(folder, evidence)
        evidence.slurm_nodes = cluster.nodes()
    except (UserError, KeyboardInterrupt):
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return evidence


def _wait(job_id: str, evidence: Evidence, timeout_s: float) -> str:
    """Returns when the job has ended: empty if it ended well, else how; or why it is of no use to wait any longer."""
    told, deadline_s, blocked_since_s = "", math.inf, math.inf
    while (state := cluster.job_states([job_id])[job_id]).living and state.state != "COMPLETING":
        now_s, message = time.monotonic(), told
        known = cluster.scontrol_job(job_id) or {}
        if state.state == "RUNNING":
            evidence.hosts = evidence.hosts or _expanded(known.get("NodeList", ""))
            deadline_s = min(deadline_s, now_s + timeout_s)
            message = f"job {job_id} runs on {', '.join(evidence.hosts)}"
        elif state.state == "PENDING" and evidence.hosts:
            return f"Slurm has requeued the job ({state.reason or 'a node failed'})"
        elif state.state == "PENDING":
            message = f"job {job_id} is waiting ({state.reason or 'no reason yet'}); Ctrl-C cancels it"
            why = too_few_nodes(evidence.request, cluster.nodes(known.get("Partition", "")))
            blocked_since_s = min(blocked_since_s, now_s) if why else math.inf
            if now_s - blocked_since_s >= BLOCKED_FOR_S:
                return why
        if now_s > deadline_s:
            return f"the job did not end within {timeout_s:g} s (--timeout)"
        if message != told:
            print(told := message, file=sys.stderr, flush=True)
        time.sleep(ASK_SLURM_EVERY_S)
    if not evidence.hosts:
        evidence.hosts = _expanded((cluster.scontrol_job(job_id) or {}).get("NodeList", ""))
    return "" if state.state in ("COMPLETED", "COMPLETING") else f"the job ended as {state.state}"


def _expanded(hosts: str) -> list[str]:
    """The names in node[1-3]; of a job without nodes Slurm says (null)."""
    return [] if hosts == "(null)" else expanded(hosts)


def too_few_nodes(request: Request, nodes: Sequence[Node]) -> str:
    """Why a pending job waits until somebody repairs a node; empty: it only waits for its turn."""
    broken = [node for node in nodes if out_of_use(node)]
    usable = len(nodes) - len(broken)
    if not broken or usable >= int(request.nodes.partition("-")[0]):
        return ""
    standing = "; ".join(f"{node.name} {_standing(node)}" for node in broken)
    nodes_asked = f"{request.nodes} node" if request.nodes == "1" else f"{request.nodes} nodes"
    return (
        f"the job cannot start: it asks for {nodes_asked}, and {usable} can be used ({standing}): "
        "repair these, or ask for fewer nodes"
    )


def out_of_use(node: Node) -> bool:
    """Whether Slurm starts nothing there; `*`: the node does not answer it."""
    return node.state.lower().startswith(_OUT_OF_USE) or node.state.endswith("*")


def _standing(node: Node) -> str:
    return f"is {node.state} for Slurm" + (f" ({node.reason})" if node.reason else "")


def _read_logs(folder: Path, evidence: Evidence) -> None:
    deadline_s = time.monotonic() + LOGS_WITHIN_S
    while True:
        os.utime(folder)  # an NFS client then asks its server which files there are
        logs = sorted(folder.glob("*.out"))
        evidence.read(line for log in logs for line in read_json_lines(log))
        if set(evidence.hosts) <= set(evidence.all_reduce) or time.monotonic() > deadline_s:
            break
        time.sleep(0.5)
    evidence.complaints = complaints("\n".join(log.read_text(errors="replace") for log in logs))


def complaints(log: str) -> list[str]:
    """What srun complains of, without tasks that only ended with the others ("node2: task 1: Killed")."""
    found = dict.fromkeys(re.findall(r"^srun: error: (.*\S)", log, re.MULTILINE))
    return [complaint for complaint in found if not re.search(r": tasks? [\d,-]+: ", complaint)]


# ---- what is wrong -------------------------------------------------------------------------------------------------


def wrong(evidence: Evidence) -> list[str]:
    """A sentence for each thing wrong: where, what, and what to do."""
    reports = [evidence.reports[host] for host in evidence.hosts if host in evidence.reports]
    sentences = [*_silent_nodes(evidence, reports), *_links(reports)]
    if not evidence.hosts:
        sentences.append("; ".join([evidence.ended or "the job ended without a report", *evidence.complaints]))
    same = _grouped((sentence, report["node"]) for report in reports for sentence in report["wrong"])
    sentences += [f"on {nodes}, {sentence}" for sentence, nodes in same]
    for path in (directory.path for directory in evidence.directories if directory.shards):
        copies = _grouped((report["directories"][path].get("dataset", ""), report["node"]) for report in reports)
        if len(places := [nodes for _, nodes in copies]) > 1:
            others = "; ".join(places[1:])
            sentences.append(f"{path} on {places[0]} differs from that on {others}: all nodes need the same shards")
    return sentences + list(_all_reduce(evidence, reports, tried=not sentences))


def _all_reduce(evidence: Evidence, reports: Sequence[Report], *, tried: bool) -> Iterator[str]:
    """`tried`: nothing is known that explains why there is no all-reduce."""
    logs = f"see the logs in {evidence.logs}" if evidence.logs else "see what it has printed"
    errors = {node: found["error"] for node, found in evidence.all_reduce.items() if found["error"]}
    measured = _measured(evidence)
    if reports and len(reports) == len(evidence.hosts) and not any(any(report["links"].values()) for report in reports):
        tried = True  # else the nodes that are connected wait for the others and fail
        for node in sorted(errors, key=list(evidence.hosts).index)[:1]:
            more = f" and {counted(len(errors) - 1, 'other node')}" if len(errors) > 1 else ""
            yield f"the all-reduce failed on {node}{more} ({errors[node]}): {logs}"
    if tried and not measured and not errors:
        yield f"the all-reduce gave no result ({evidence.ended or 'the job ended'}): {logs}"
    ranks = measured["ranks"] if measured and evidence.request.gpus_per_node else []
    if blind := dict.fromkeys(rank["host"] for rank in ranks if not rank["device"].startswith("cuda")):
        yield f"torch finds no GPU on {', '.join(blind)}: it needs a build for CUDA that fits the driver"


def _measured(evidence: Evidence) -> dict[str, Any] | None:
    return next((found["measured"] for found in evidence.all_reduce.values() if found["measured"]), None)


def _grouped(pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """(what, "node1, node2") of the pairs (what, node) whose `what` is not empty."""
    nodes = defaultdict(list)
    for what, node in pairs:
        nodes[what].append(node)
    return ((what, ", ".join(dict.fromkeys(found))) for what, found in nodes.items() if what)


def _silent_nodes(evidence: Evidence, reports: Sequence[Report]) -> Iterator[str]:
    """Nodes without a report. One that is lost ends the tasks of the others, so only those with evidence are named."""
    silent = [host for host in evidence.hosts if host not in evidence.reports]
    known = {host: list(_known_about(host, evidence, reports)) for host in silent}
    for host in filter(known.get, silent):
        yield (
            f"{host} did not answer ({'; '.join(known[host])}): check its link and its slurmd, or leave it out with "
            f"--exclude {host}"
        )
    if silent and not any(known.values()):
        why = "; ".join([evidence.ended or "the job ended", *evidence.complaints])
        yield (
            f"{', '.join(silent)} did not answer ({why}): see the logs in {evidence.logs}, and whether all nodes share "
            f"that directory and can start {sys.executable}"
        )


def _known_about(host: str, evidence: Evidence, reports: Sequence[Report]) -> Iterator[str]:
    """Why a node did not answer."""
    yield from (text for text in evidence.complaints if re.search(rf"\b{re.escape(host)}\b", text))
    yield from (f"it {_standing(node)}" for node in evidence.slurm_nodes if node.name == host and out_of_use(node))
    # Where a connection is refused the link is good.
    errors = [(report["links"][host], report["node"]) for report in reports if host in report["links"]]
    yield from (f"{error} from {nodes}" for error, nodes in _grouped(errors) if error != "connection refused")


def _links(reports: Sequence[Report]) -> Iterator[str]:
    """Failed links, by the node that most of them have in common: a cable that is cut is one sentence."""
    listening = [report["node"] for report in reports if report["listening"]]
    links = {(report["node"], other): error for report in reports for other, error in report["links"].items()}
    failed = {pair: error for pair, error in links.items() if error not in ("", UNKNOWN_NAME) and pair[1] in listening}
    while failed:
        peers = {node: {other for pair in failed if node in pair for other in pair} for pair in failed for node in pair}
        node = max(peers, key=lambda node: len(peers[node]))
        callers = [caller for caller, called in failed if called == node]
        called = [called for caller, called in failed if caller == node]
        parts = [f"cannot be reached from {', '.join(callers)}"] if callers else []
        parts += [f"cannot reach {', '.join(called)}"] if called else []
        error = next(error for pair, error in failed.items() if node in pair)
        whose = "its link" if len(peers[node]) > 2 else "the links of both"
        yield f"{node} {' and '.join(parts)} ({error}): check {whose}, and the firewalls between the nodes"
        failed = {pair: error for pair, error in failed.items() if node not in pair}


# ---- what is shown -------------------------------------------------------------------------------------------------


def _show(evidence: Evidence, sentences: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("node", "address", "reached by", "GPUs", box=None, padding=(0, 2, 0, 0))
    for directory in evidence.directories:
        table.add_column(f"{directory.what}\n{directory.path}")
    for host in evidence.hosts:
        if (report := evidence.reports.get(host)) is None:
            table.add_row(host, "no answer")
            continue
        gpus = "\n".join(f"{report['gpus'].count(gpu)} x {gpu}" for gpu in dict.fromkeys(report["gpus"]))
        reached = f"{len(report['called_by'])} of {len(report['links'])}" if report["links"] else ""
        cells = [_cell(report["directories"][directory.path]) for directory in evidence.directories]
        table.add_row(host, report["address"], reached, gpus, *cells)
    width = shutil.get_terminal_size((160, 24)).columns
    if evidence.hosts:
        Console(width=width, highlight=False, markup=False).print(table)
    measured = _measured(evidence) or {"sizes": []}
    for size in measured["sizes"]:
        if size["bus_gb_per_s"] is not None:
            speed = f"{1000 * size['seconds']:.1f} ms, {size['bus_gb_per_s']:.2f} GB/s bus bandwidth"
            print(f"all-reduce of {size['bytes'] >> 20} MiB over {measured['world_size']} ranks: {speed}")
    for sentence in sentences:
        print(f"wrong: {sentence}")
    if not sentences:
        print(f"nothing is wrong with {counted(len(evidence.hosts), 'node')}")


def _cell(found: dict[str, Any]) -> str:
    lines = [f"{found['free_bytes'] / 1e9:.0f} GB free"] if "free_bytes" in found else []
    lines += [f"{what}s {found[key]:.0f} MB/s" for what in ("read", "write") if (key := f"{what}_mb_per_s") in found]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
