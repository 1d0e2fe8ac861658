"""What is wrong with a cluster, in sentences: the nodes' reports -> findings, each naming nodes and what to do.

    judge(Evidence(hosts, reports, ...))  ->  [Finding("node3 cannot be reached from node1, node2 (...): check ...")]

Pure functions of what `launch.doctor` has gathered: nothing is asked here, so every sentence can be tested without a
cluster. A finding that is not `wrong` is worth knowing and stops no run.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from launch.cluster import Node, Request
from launch.probes import Directory, Gpus, Link, Name, Target

# LibriSpeech's 960 hours are 60 GB of FLAC.
AUDIO_BYTES_PER_S = 17_400
SLOW_MB_PER_S = 20.0  # less than this feeds 1,150 s of audio a second, which one GPU may ask for
_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
VARIABLES = (*_INTERFACE_VARIABLES, "NCCL_IB_DISABLE", "NCCL_IB_HCA", "NCCL_DEBUG")
_DOING = {"arrived": "names and links were tried", "connected": "its GPUs and directories were looked at"}


@dataclass(frozen=True)
class Report:
    """What a node says of itself; written anew after each stage."""

    node: str
    stage: str  # arrived, connected, done
    ports: list[int]  # that it listens on
    port_error: str = ""  # why it cannot listen on the rendezvous port
    hostname: str = ""
    own: Name = field(default_factory=Name)  # what its own host name means to itself
    names: dict[str, Name] = field(default_factory=dict)  # the other nodes'
    links: list[Link] = field(default_factory=list)  # to the other nodes
    routes: list[str] = field(default_factory=list)  # "10.0.0.1 (eth0)": what it is to the others
    interfaces: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)
    gpus: Gpus = field(default_factory=Gpus)
    directories: list[Directory] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        record = json.loads(text)
        return cls(
            **record
            | {
                "own": Name(**record["own"]),
                "names": {host: Name(**name) for host, name in record["names"].items()},
                "links": [Link(**link) for link in record["links"]],
                "gpus": Gpus(**record["gpus"]),
                "directories": [Directory(**directory) for directory in record["directories"]],
            }
        )

    @property
    def unreached(self) -> list[Link]:
        return [link for link in self.links if link.error]


@dataclass(frozen=True)
class AllReduce:
    """How the all-reduce went: rank 0's numbers, and what ranks complained of."""

    measured: dict[str, Any] | None = None  # ddp_asr.bandwidth's line
    errors: dict[int, str] = field(default_factory=dict)  # by rank


@dataclass(frozen=True)
class Evidence:
    """All that is known when the waiting is over."""

    hosts: Sequence[str]  # of the job; empty: it never started
    reports: Mapping[str, Report]
    request: Request
    targets: Sequence[Target]
    folder: str = ""  # of the submission: logs
    job_id: str = ""
    port: int = 0  # of the rendezvous
    all_reduce: AllReduce = field(default_factory=AllReduce)
    expect_all_reduce: bool = True
    nodes: Sequence[Node] = ()  # as Slurm has them
    ended: str = ""  # why nobody waits any longer, where the reports are incomplete
    complaints: Sequence[str] = ()  # Slurm's own, in the job's log


@dataclass(frozen=True)
class Finding:
    """One thing, in one sentence."""

    sentence: str
    wrong: bool = True


def judge(evidence: Evidence) -> list[Finding]:
    """Everything that is wrong, the graver first, then what is worth knowing; no sentence twice."""
    reports = [evidence.reports[host] for host in evidence.hosts if host in evidence.reports]
    findings = [
        *_job(evidence),
        *_missing(evidence),
        *_ports(evidence, reports),
        *_links(evidence, reports),
        *_names(reports),
        *_interfaces(reports),
        *_directories(evidence, reports),
        *_gpus(evidence, reports),
        *_all_reduce(evidence, reports),
        *_nodes_left_out(evidence),
    ]
    return sorted(dict.fromkeys(findings), key=lambda finding: not finding.wrong)


def listed(nodes: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(nodes))


# ---- what Slurm says -----------------------------------------------------------------------------------------------

_OUT_OF_USE = ("down", "drain", "fail", "error", "unknown", "inval", "maint")


def out_of_use(node: Node) -> bool:
    """Whether Slurm starts nothing there; `*`: the node does not answer it."""
    return node.state.lower().startswith(_OUT_OF_USE) or node.state.endswith("*")


def _standing(node: Node) -> str:
    return f"is {node.state} for Slurm" + (f" ({node.reason})" if node.reason else "")


def _remedy(node: Node) -> str:
    if node.state.endswith("*"):
        return f"check its link and its slurmd, or do without it: --exclude {node.name}"
    return (
        f"'scontrol update nodename={node.name} state=resume' once it is mended, or do without: --exclude {node.name}"
    )


def _job(evidence: Evidence) -> Iterator[Finding]:
    if evidence.ended:
        silent = [host for host in evidence.hosts if not _said_all(host, evidence)]
        waited = f"; it waited for {listed(silent)}" if silent else ""
        said = f"; Slurm says: {'; '.join(evidence.complaints)}" if evidence.complaints else ""
        yield Finding(f"{evidence.ended}{waited}{said}")


def _said_all(host: str, evidence: Evidence) -> bool:
    report = evidence.reports.get(host)
    return report is not None and report.stage == "done"


def _missing(evidence: Evidence) -> Iterator[Finding]:
    """Nodes of the job that did not report, or not to the end; with all that speaks about them."""
    silent = [host for host in evidence.hosts if not _said_all(host, evidence)]
    blamed = [host for host in silent if _blamed(host, evidence)]
    for host in blamed or silent:  # one that is lost takes the others' tasks with it
        yield _explained(host, evidence)


def _blamed(host: str, evidence: Evidence) -> bool:
    """Whether somebody else speaks ill of it."""
    named = any(re.search(rf"\b{re.escape(host)}\b", complaint) for complaint in evidence.complaints)
    return named or host in _lost_for_slurm(evidence) or bool(_dead_links(host, evidence))


def _lost_for_slurm(evidence: Evidence) -> dict[str, Node]:
    return {node.name: node for node in evidence.nodes if out_of_use(node)}


def _dead_links(host: str, evidence: Evidence) -> list[tuple[str, Link]]:
    """(node, link) of those that find no way to the host; where one is refused, only the listener is missing."""
    tried = [(r.node, link) for r in evidence.reports.values() for link in r.unreached if link.to == host]
    return [(node, link) for node, link in tried if link.error != "connection refused"]


def _explained(host: str, evidence: Evidence) -> Finding:
    report, dead = evidence.reports.get(host), _dead_links(host, evidence)
    lost = _lost_for_slurm(evidence).get(host)
    slurm = f" and {_standing(lost)}" if lost else ""
    if report is not None:
        return Finding(
            f"{host} hung while {_DOING.get(report.stage, 'it reported')}{slurm}: log in there and look at its file "
            f"systems (df) and name server; logs: {evidence.folder}"
        )
    if dead:
        port, error = dead[0][1].port, dead[0][1].error
        return Finding(
            f"{host} did not report, cannot be reached from {listed(node for node, _ in dead)} (port {port}: {error})"
            f"{slurm}: check its link and its firewall, or do without it: --exclude {host}"
        )
    if lost:
        return Finding(f"{host} did not report{slurm}: {_remedy(lost)}")
    if _blamed(host, evidence):
        return Finding(
            f"{host} did not report, and Slurm could not start a task there: check its link and its slurmd, or do "
            f"without it: --exclude {host}"
        )
    return Finding(
        f"{host} did not report: see that it can read {evidence.folder} (is that on a file system that all nodes "
        "share?) and the interpreter there; its log, if any, lies in the same place"
    )


def _nodes_left_out(evidence: Evidence) -> Iterator[Finding]:
    """Nodes that are out of use: wrong where the job could not start for want of them."""
    for node in evidence.nodes:
        if out_of_use(node) and node.name not in evidence.hosts:
            yield Finding(f"{node.name} {_standing(node)}: {_remedy(node)}", wrong=bool(evidence.ended))


def blocked(nodes: Sequence[Node], request: Request, wanted: Sequence[str], excluded: Sequence[str]) -> str:
    """Why a job that waits for nodes would wait until somebody mends one; empty: it has only to wait its turn."""
    broken = {node.name for node in nodes if out_of_use(node)}
    missing = [name for name in wanted if name in broken]
    if missing:
        return (
            f"the job cannot start: it asks for {listed(missing)} by name (--nodelist), and Slurm starts nothing there"
        )
    least = int(request.nodes.partition("-")[0])
    usable = {node.name for node in nodes} - broken - set(excluded)
    if broken and len(usable) < least:
        known = len({node.name for node in nodes})
        return (
            f"the job cannot start: it asks for {least} node(s), and of {known} only {len(usable)} can be used (not "
            f"{listed(sorted(broken | set(excluded)))})"
        )
    return ""


# ---- the network ---------------------------------------------------------------------------------------------------


def _ports(evidence: Evidence, reports: Sequence[Report]) -> Iterator[Finding]:
    first = evidence.hosts[0] if evidence.hosts else ""
    for report in reports:
        if report.port_error:
            yield Finding(
                f"{report.node} cannot listen on the rendezvous port {evidence.port} ({report.port_error}): "
                + ("see who does with 'ss -ltnp', or submit again: each job has another port"),
                wrong=report.node == first,
            )


def _links(evidence: Evidence, reports: Sequence[Report]) -> Iterator[Finding]:
    """Failed links by the node that they have in common, so that a cut cable is one sentence."""
    examined = [report.node for report in reports]
    failed: dict[tuple[str, str], Link] = {}
    for report in reports:
        for link in report.unreached:
            if link.to in examined:
                failed.setdefault((report.node, link.to), link)  # the rendezvous port, tried first, tells more
    while failed:
        node = _culprit(examined, failed) or next(iter(failed))[1]
        yield _unreachable(node, failed, evidence)
        failed = {pair: link for pair, link in failed.items() if node not in pair}
    for report in reports:
        for link in report.links:
            if link.answered and link.answered != link.to:
                yield Finding(
                    f"{report.node} calls {link.to} on port {link.port} and {link.answered} answers: see what the name "
                    f"means there ('getent hosts {link.to}'); two hosts may share a name or an address"
                )


def _culprit(examined: Sequence[str], failed: Mapping[tuple[str, str], Link]) -> str:
    """The node that the most failed links have in common; empty: none has two counterparts."""
    shared = {node: {other for pair in failed if node in pair for other in pair} - {node} for node in examined}
    most = max(examined, key=lambda node: len(shared[node]))
    return most if len(shared[most]) > 1 else ""


def _unreachable(node: str, failed: Mapping[tuple[str, str], Link], evidence: Evidence) -> Finding:
    """What the failed links from and to one node mean."""
    callers = [caller for caller, called in failed if called == node]
    called = [called for caller, called in failed if caller == node]
    pair = (callers[0], node) if callers else (node, called[0])
    link = failed[pair]
    why = f"(port {link.port}: {link.error})"
    if not callers:
        what = f"{node} cannot reach {listed(called)} {why}"
    elif len(callers) == 1 and called == callers:
        return Finding(f"{node} and {callers[0]} cannot reach each other {why}: check their links and firewalls")
    elif set(called) == set(callers):
        what = f"{node} cannot be reached from {listed(callers)} {why}, and reaches none of them"
    else:
        what = f"{node} cannot be reached from {listed(callers)} {why}"
        what += f", and does not reach {listed(called)}" if called else ""
    passes = [way for way in evidence.reports[pair[0]].links if way.to == pair[1] and not way.error]
    if not passes:
        return Finding(f"{what}: check its link and its firewall")
    return Finding(
        f"{what}: a firewall lets port {passes[0].port} pass and not this one, but gloo and NCCL listen on ports that "
        "the system chooses: open all of them between the nodes"
    )


def _names(reports: Sequence[Report]) -> Iterator[Finding]:
    unknown: dict[tuple[str, str], list[str]] = defaultdict(list)
    looped: dict[tuple[str, str], list[str]] = defaultdict(list)
    others: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    nameless: dict[str, list[str]] = defaultdict(list)
    nodes = [report.node for report in reports]
    for report in reports:
        for host, name in report.names.items():
            if name.error:
                unknown[host, name.error].append(report.node)
            elif name.loopback:
                looped[host, name.loopback].append(report.node)
            elif not name.back:
                nameless[host].append(report.node)
            elif (back := _short(name.back)) != _short(host) and back in map(_short, nodes):
                others[host, name.addresses[0], name.back].append(report.node)
    for (host, error), observers in unknown.items():
        yield Finding(
            f"{listed(observers)} cannot resolve the name {host} ({error}): add it to the name server or to /etc/hosts "
            "there"
        )
    for (host, address), observers in looped.items():
        yield Finding(
            f"on {listed(observers)} the name {host} means {address}, the machine itself: mend /etc/hosts there"
        )
    for (host, address, back), observers in others.items():
        yield Finding(
            f"on {listed(observers)} the name {host} means {address}, but that address means {back}: two nodes share "
            "an address, or the name server is out of date"
        )
    if nameless:
        everywhere = listed(node for observers in nameless.values() for node in observers)
        yield Finding(
            f"the addresses of {listed(nameless)} have no name on {everywhere}: harmless, but messages will show "
            "addresses alone",
            wrong=False,
        )
    yield from _own_names(reports)


def _own_names(reports: Sequence[Report]) -> Iterator[Finding]:
    """gloo tells the others the address that a node's own host name means to itself."""
    alone = len(reports) < 2
    for report in reports:
        if report.variables.get("GLOO_SOCKET_IFNAME"):
            continue
        if report.own.error:
            yield Finding(
                f"{report.node} cannot resolve its own name {report.hostname} ({report.own.error}): add it to "
                "/etc/hosts there, or set GLOO_SOCKET_IFNAME",
                wrong=not alone,
            )
        elif report.own.loopback:
            yield Finding(
                f"{report.node} takes its own name {report.hostname} for {report.own.loopback}, a loopback address, "
                + ("harmless on one node" if alone else "where no other node finds it")
                + f": mend its /etc/hosts, or set GLOO_SOCKET_IFNAME to one of its interfaces ({_shown(report)})",
                wrong=not alone,
            )


def _shown(report: Report) -> str:
    real = [f"{name} {address}" for name, address in report.interfaces.items() if name != "lo"]
    return ", ".join(real) or "it has none with an IPv4 address"


def _short(host: str) -> str:
    return host.partition(".")[0].lower()


def _interfaces(reports: Sequence[Report]) -> Iterator[Finding]:
    """Variables that name an interface which a node does not have."""
    for name in _INTERFACE_VARIABLES:
        absent: dict[str, list[Report]] = defaultdict(list)
        for report in reports:
            value = report.variables.get(name, "")
            if value and not _has_interface(report, name, value):
                absent[value].append(report)
        for value, there in absent.items():
            yield Finding(
                f"{name}={value} names no interface of {listed(report.node for report in there)}, which has "
                f"{_shown(there[0])}: correct it in the profile's setup or your shell"
            )
        if len(reports) > 1 and (looped := [r.node for r in reports if r.variables.get(name) in ("lo", "=lo")]):
            yield Finding(f"{name}=lo on {listed(looped)} keeps the ranks on their own node: name another interface")


def _has_interface(report: Report, variable: str, value: str) -> bool:
    if not report.interfaces or value.startswith("^"):  # NCCL: all but these
        return True
    exact = variable == "GLOO_SOCKET_IFNAME" or value.startswith("=")
    wanted = value.removeprefix("=").split(",")
    return any(has == name or (not exact and has.startswith(name)) for has in report.interfaces for name in wanted)


# ---- the machines --------------------------------------------------------------------------------------------------


def _directories(evidence: Evidence, reports: Sequence[Report]) -> Iterator[Finding]:
    for target in evidence.targets:
        seen = [(r.node, found) for r in reports for found in r.directories if found.path == target.path]
        yield from _unusable(target, seen)
        yield from _other_bytes(target, seen)
        for node, found in seen:
            if 0 <= found.free_bytes < target.needed_bytes:
                yield Finding(
                    f"{node} has {_gb(found.free_bytes)} GB free for {target.what} at {target.path}, and a run wants "
                    f"{_gb(target.needed_bytes)} GB: make room, or choose another place"
                )
        slow = [(node, f.read_mb_per_s) for node, f in seen if f.read_mb_per_s and f.read_mb_per_s < SLOW_MB_PER_S]
        if slow:
            least = min(speed for _, speed in slow)
            yield Finding(
                f"{target.path} is read with {least:.0f} MB/s on {listed(node for node, _ in slow)}, enough for "
                f"{least * 1e6 / AUDIO_BYTES_PER_S:,.0f} s of audio a second: for more, set data.cache_dir to a disk "
                "of the node",
                wrong=False,
            )


def _gb(count: int) -> str:
    return f"{count / 1e9:.3g}"


def _unusable(target: Target, seen: Sequence[tuple[str, Directory]]) -> Iterator[Finding]:
    grouped: dict[str, list[str]] = defaultdict(list)
    for node, found in seen:
        if found.error:
            grouped[found.error].append(node)
    for error, nodes in grouped.items():
        remedy = "see that it is on a file system which every node mounts, and may be read"
        if target.write:
            remedy += " and written"
        if not target.evidence:
            remedy = "make it writable there, or choose another place"
        yield Finding(f"{target.what} at {target.path} cannot be used on {listed(nodes)} ({error}): {remedy}")


def _other_bytes(target: Target, seen: Sequence[tuple[str, Directory]]) -> Iterator[Finding]:
    digests = {node: found.digest for node, found in seen if found.digest}
    if not digests:
        return
    expected, whose = target.digest, "the host that submitted"
    if not expected:
        expected, whose = next(iter(digests.values())), next(iter(digests))
    others = [node for node, digest in digests.items() if digest != expected]
    if others:
        yield Finding(
            f"{target.path} on {listed(others)} is not what it is on {whose} ({target.evidence} differs): the nodes "
            "must share its file system, or hold the same copy"
        )


def _gpus(evidence: Evidence, reports: Sequence[Report]) -> Iterator[Finding]:
    wanted = evidence.request.gpus_per_node
    looked = [report for report in reports if report.stage == "done"]
    if not wanted:
        return
    broken: dict[str, list[str]] = defaultdict(list)
    for report in looked:
        given = report.gpus.given
        if report.gpus.error:
            broken[report.gpus.error].append(report.node)
        elif len(report.gpus.names) < wanted:
            yield Finding(
                f"{report.node} shows {len(report.gpus.names)} GPU(s) to the job, which asked for {wanted}: see "
                "'nvidia-smi' and 'dmesg' there for one that fell off the bus"
            )
        if given is not None and len([device for device in given.split(",") if device]) < wanted:
            yield Finding(
                f"{report.node} gives the job the GPUs CUDA_VISIBLE_DEVICES={given or 'none'}, which asked for "
                f"{wanted}: see that your shell or the profile's setup does not set it"
            )
    for error, nodes in broken.items():
        yield Finding(f"no working GPU on {listed(nodes)} ({error}): install or mend the NVIDIA driver there")
    for what, values in (
        ("drivers", {report.gpus.driver for report in looked if report.gpus.driver}),
        ("GPUs", {name for report in looked for name in report.gpus.names}),
    ):
        if len(values) > 1:
            yield Finding(f"the nodes have different {what}: {', '.join(sorted(values))}", wrong=False)


def _all_reduce(evidence: Evidence, reports: Sequence[Report]) -> Iterator[Finding]:
    result, asked = evidence.all_reduce, evidence.request
    if result.errors:
        rank = min(result.errors)
        yield Finding(f"the all-reduce failed on rank {rank} of {_node_of(rank, evidence)}: {result.errors[rank]}")
    elif result.measured is None and evidence.expect_all_reduce and not evidence.ended:
        yield Finding(f"the all-reduce left no result: see the logs in {evidence.folder}")
    elif result.measured is not None and asked.gpus_per_node:
        blind = [place["host"] for place in result.measured["ranks"] if not place["device"].startswith("cuda")]
        if blind:
            yield Finding(
                f"torch sees no GPU on {listed(blind)}: see that its build is one for CUDA (python -c 'import torch; "
                "print(torch.version.cuda)') and fits the driver"
            )


def _node_of(rank: int, evidence: Evidence) -> str:
    number = rank // evidence.request.ranks_per_node
    return evidence.hosts[number] if number < len(evidence.hosts) else "an unknown node"
