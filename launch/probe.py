"""What one node of a job finds out, printed as one JSON line, then how the all-reduce went, as a second one.

    {"report": {"node": "node1", "links": {"node2": "timed out"}, ...}}    names, links, GPUs, directories: see `Report`
    {"all_reduce": {"node": "node1", "error": "", "measured": {...}}}      measured: on the node of rank 0

Every step has a time limit, because a name server or a network file system may never answer: what takes longer is left
behind in a daemon thread. `launch.doctor` starts a `Probe` on every node and reads the lines in the logs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from ddp_asr.errors import counted
from ddp_asr.files import parse_json_line, sha256_of

from .node import Step, rank_variables, torchrun_command

Result = TypeVar("Result")

# Parts of the doctor's timeout. A node that starts later than `LINKS` after another is not reached by it.
LINKS, DIRECTORIES, ALL_REDUCE = 0.2, 0.2, 0.5
ANSWER_S = 4.0  # for one connection (Linux sends its request again after 1 s and 3 s), and for a name server
RETRY_S = 0.2
UNKNOWN_NAME = "unknown name"  # of a link; `wrong_name` has the sentence
MEASURE_S, MEASURE_BYTES, BLOCK_BYTES = 3.0, 64 << 20, 4 << 20  # reading and writing are timed for so long at most


@dataclass(frozen=True)
class Directory:
    """A directory that every node looks at."""

    path: str
    what: str  # how it is called in sentences, such as "the shards"
    needed_bytes: int = 0  # free space that a run wants here
    shards: bool = False  # read dataset.json and, timed, the largest shard
    write: bool = False  # time writing


class Report(TypedDict):
    """What a node found out."""

    node: str
    address: str  # its own, on the way to another node
    listening: bool  # whether it could listen on the rendezvous port
    links: dict[str, str]  # by other node: why its rendezvous port was not reached; empty: it was
    called_by: list[str]  # the nodes that have reached this one
    gpus: list[str]  # "NVIDIA H100, driver 550.54"
    directories: dict[str, dict[str, Any]]  # by path: free_bytes, read_mb_per_s, write_mb_per_s, dataset (a checksum)
    wrong: list[str]  # sentences about this node alone


@dataclass(frozen=True)
class Probe:
    """What the doctor's job calls once on every node."""

    directories: tuple[Directory, ...]
    gpus_per_node: int
    timeout_s: float

    def __call__(self) -> None:
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, signal.SIG_DFL)  # submitit's handlers ignore them
        for line in self.lines(os.environ):
            print(json.dumps(line), flush=True)

    def lines(self, environment: Mapping[str, str]) -> Iterator[dict[str, Any]]:
        """What this node finds out; `environment` is that of its task, see `node.Step`."""
        step = Step.of(environment)
        report = self.examine(step.hosts, step.number, step.port)
        yield {"report": report}
        result = {"error": "", "measured": None}
        if not any(report["links"].values()) and len(report["called_by"]) == len(report["links"]):
            result = all_reduce(environment, ALL_REDUCE * self.timeout_s)
        yield {"all_reduce": {"node": report["node"], **result}}

    def examine(self, hosts: Sequence[str], number: int, port: int) -> Report:
        """All but the all-reduce."""
        node, own_name = hosts[number], socket.gethostname()
        others = [host for host in hosts if host != node]
        listen_error, called_by, calls = connect(node, others, port, LINKS * self.timeout_s)
        wrong = [listen_error]
        if others:
            names = (*others, own_name)
            checks = {host: partial(wrong_name, host, hosts, own=host == own_name) for host in names}
            checked = within(ANSWER_S, checks)
            wrong += [checked.get(host, f"the name server does not answer for {host}: repair it") for host in names]
        gpus, gpu_error = nvidia_smi() if self.gpus_per_node else ([], "")
        if gpu_error or len(gpus) < self.gpus_per_node:
            what = gpu_error or f"nvidia-smi shows {counted(len(gpus), 'GPU')}"
            wrong.append(
                f"{what}, and the job asked for {counted(self.gpus_per_node, 'GPU')}: see 'nvidia-smi' and 'dmesg'"
            )
        looked: dict[str, dict[str, Any]] = {}
        for directory in self.directories:  # one after the other: they may be on the same disk
            limit_s = DIRECTORIES * self.timeout_s / len(self.directories)
            found: dict[str, Any] = {}
            look = {"": partial(look_at, directory, node, found)}
            wrong.append(within(limit_s, look).get("", unusable(directory, f"no answer within {limit_s:.3g} s")))
            looked[directory.path] = dict(found)  # a copy: a thread that is left behind may go on
        return Report(
            node=node,
            address=next((own for _, own in calls.values() if own), ""),
            listening=not listen_error,
            links={other: calls.get(other, ("timed out", ""))[0] for other in others},
            called_by=sorted(called_by),
            gpus=gpus,
            directories=looked,
            wrong=[sentence for sentence in wrong if sentence],
        )


def within(limit_s: float, functions: Mapping[str, Callable[[], Result]]) -> dict[str, Result]:
    """Runs the functions at the same time; the results of those that have returned before the limit."""
    results: dict[str, Result] = {}

    def run(key: str) -> None:
        results[key] = functions[key]()

    threads = [threading.Thread(target=run, args=[key], daemon=True) for key in functions]
    deadline_s = time.monotonic() + limit_s
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline_s - time.monotonic()))
    return dict(results)


def reason(error: Exception) -> str:
    """The system's words alone: 'connection refused'."""
    if isinstance(error, TimeoutError):
        return "timed out"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    text = text.partition(" (while attempting")[0]  # socket.create_server adds the address
    return text[:1].lower() + text[1:]


# ---- the network ---------------------------------------------------------------------------------------------------


def wrong_name(host: str, hosts: Sequence[str], *, own: bool) -> str:
    """What is wrong with what a host name means here, to an address and back; empty: nothing."""
    remedy = "correct the name server, or /etc/hosts"
    if own and os.environ.get("GLOO_SOCKET_IFNAME"):
        return ""  # otherwise gloo tells the other nodes the address that the node's own name means
    try:
        address = str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except (OSError, UnicodeError) as error:
        return f"the name {host} is unknown ({reason(error)}): {remedy}"
    if address.startswith("127.") or address == "::1":
        also = ", or set GLOO_SOCKET_IFNAME to the interface that all nodes share" if own else ""
        return f"the name {host} means {address}, which no other node can reach: {remedy}{also}"
    with contextlib.suppress(OSError):  # an address without a name is harmless
        back = socket.gethostbyaddr(address)[0]
        if _short(back) != _short(host) and _short(back) in map(_short, hosts):
            return f"the name {host} means {address}, and that address means {back}: {remedy}"
    return ""


def _short(host: str) -> str:
    return host.partition(".")[0].lower()


def connect(
    node: str, others: Sequence[str], port: int, limit_s: float
) -> tuple[str, set[str], dict[str, tuple[str, str]]]:
    """Calls all other nodes on the port and answers their calls, until all have called or the limit is over.

    Returns:
        A sentence if the port cannot be listened on, the nodes that have called, and `call` of each other node.
    """
    deadline_s = time.monotonic() + limit_s
    called_by: set[str] = set()
    calls = {other: partial(call, node, other, port, deadline_s) for other in others}
    call_all = partial(within, limit_s + ANSWER_S, calls)  # the name server is asked on the way
    try:
        listening = listen(port)
    except OSError as error:
        sentence = f"the rendezvous port {port} cannot be used ({reason(error)}): run the doctor again, on another port"
        return sentence, called_by, call_all()
    with listening:
        threading.Thread(target=answer_calls, args=[listening, node, called_by], daemon=True).start()
        answers = call_all()
        while len(called_by & set(others)) < len(others) and time.monotonic() < deadline_s:
            time.sleep(RETRY_S)
        listening.shutdown(socket.SHUT_RDWR)  # wakes the thread in `accept`; `close` does not
    return "", called_by & set(others), answers


def listen(port: int) -> socket.socket:
    """On every address of the machine, IPv4 and IPv6, as torch's store does."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    return socket.create_server(("", port), family=family, backlog=512, dualstack_ipv6=both)


def answer_calls(listening: socket.socket, node: str, called_by: set[str]) -> None:
    """Answers every caller with this node's name, and notes the caller's; returns when the socket is shut down."""
    while True:
        try:
            connection, _ = listening.accept()
        except ConnectionAbortedError:
            continue
        except OSError:
            return
        with connection, contextlib.suppress(OSError):  # the caller tries again
            connection.settimeout(ANSWER_S)
            caller = read_line(connection)
            connection.sendall(f"{node}\n".encode())
            called_by.add(caller)


def call(node: str, other: str, port: int, deadline_s: float) -> tuple[str, str]:
    """Why `other` was not reached (empty: it was), and this node's own address; tries again until the deadline."""
    own = ""
    while True:
        left_s = max(RETRY_S, deadline_s - time.monotonic())
        try:
            with socket.create_connection((other, port), timeout=min(ANSWER_S, left_s)) as connection:
                own = connection.getsockname()[0].removeprefix("::ffff:")
                connection.settimeout(left_s)
                connection.sendall(f"{node}\n".encode())
                answer = read_line(connection)
            error = "" if answer == other else f"{answer[:40]!r} answers" if answer else "no answer"
        except (socket.gaierror, UnicodeError):
            error = UNKNOWN_NAME
        except OSError as failed:
            error = reason(failed)
        if not error or time.monotonic() + RETRY_S >= deadline_s:
            return error, own
        time.sleep(RETRY_S)


def read_line(connection: socket.socket) -> str:
    with connection.makefile("rb") as stream:
        return stream.readline(300).decode(errors="replace").strip()


# ---- the machine ---------------------------------------------------------------------------------------------------


def nvidia_smi(limit_s: float = 30.0) -> tuple[list[str], str]:
    """The GPUs of this node with their driver, or why there are none; the first call may have to load the driver."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except FileNotFoundError:
        return [], "there is no nvidia-smi"
    except subprocess.TimeoutExpired:
        return [], f"nvidia-smi did not answer within {limit_s:g} s"
    gpus = [line.replace(", ", ", driver ") for line in answer.stdout.splitlines() if ", " in line]
    if gpus and answer.returncode == 0:
        return gpus, ""
    return [], ((answer.stdout + answer.stderr).strip().splitlines() or [f"exit code {answer.returncode}"])[0]


def look_at(directory: Directory, node: str, found: dict[str, Any]) -> str:
    """Fills `found` and returns what is wrong; looks at the nearest directory above where there is none yet."""
    folder = Path(directory.path)
    try:
        existing = next(path for path in (folder, *folder.parents) if path.is_dir())
        found["free_bytes"] = shutil.disk_usage(existing).free
        if directory.shards:
            found["dataset"] = sha256_of(folder / "dataset.json")
            largest = max(folder.glob("*.tar"), key=lambda path: path.stat().st_size, default=None)
            if largest is None:
                raise FileNotFoundError("it contains no *.tar")
            found["read_mb_per_s"] = read_mb_per_s(largest)
        if directory.write:
            found["write_mb_per_s"] = write_mb_per_s(existing / f".doctor-{node}.tmp")
    except OSError as error:
        return unusable(directory, reason(error))
    if found["free_bytes"] < directory.needed_bytes:
        free_gb, needed_gb = found["free_bytes"] / 1e9, directory.needed_bytes / 1e9
        return unusable(directory, f"{free_gb:.3g} GB are free, and a run needs {needed_gb:.3g} GB")
    return ""


def unusable(directory: Directory, why: str) -> str:
    return f"{directory.what} ({directory.path}) cannot be used ({why}): repair that, or choose another place"


def read_mb_per_s(path: Path) -> float:
    """How fast the beginning of the file is read, past the kernel's cache where that is possible."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return _mb_per_s(lambda: len(file.read(BLOCK_BYTES)))


def write_mb_per_s(path: Path) -> float:
    """How fast a new file is written to the disk; it is removed."""
    block = os.urandom(BLOCK_BYTES)  # a file system that compresses cannot make it smaller
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DSYNC, 0o600)
    try:
        return _mb_per_s(lambda: os.write(descriptor, block))
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)


def _mb_per_s(move: Callable[[], int]) -> float:
    began_s, done = time.perf_counter(), 0
    while done < MEASURE_BYTES and time.perf_counter() - began_s < MEASURE_S and (count := move()):
        done += count
    return done / 1e6 / max(1e-9, time.perf_counter() - began_s)


# ---- the all-reduce ------------------------------------------------------------------------------------------------


def all_reduce(environment: Mapping[str, str], limit_s: float) -> dict[str, Any]:
    """Runs `ddp_asr.bandwidth` on the ranks of this node: what rank 0 measured, if it is here, or why it failed."""
    half_s = max(1, int(limit_s / 2))
    command = torchrun_command(environment, "ddp_asr.bandwidth", [f"--limit-s={half_s}"], join_timeout_s=half_s)
    return run_ranks(command, {**environment, **rank_variables(environment)}, limit_s)


def run_ranks(command: Sequence[str], environment: Mapping[str, str], limit_s: float) -> dict[str, Any]:
    """What the command prints as JSON in its last such line, or why it failed."""
    try:
        ended = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=limit_s, check=False
        )
        printed, exit_code = ended.stdout.decode(errors="replace"), ended.returncode
    except subprocess.TimeoutExpired as late:
        printed, exit_code = (late.output or b"").decode(errors="replace"), None
    if exit_code != 0:
        print(printed, file=sys.stderr, flush=True)
        error = f"it did not end within {limit_s:g} s" if exit_code is None else why_failed(printed, exit_code)
        return {"error": error, "measured": None}
    lines = [line for text in printed.splitlines(keepends=True) if (line := parse_json_line(text))]
    return {"error": "", "measured": lines[-1] if lines else None}


def why_failed(printed: str, exit_code: int) -> str:
    """The line that says most: our own error, else the last exception, else the exit code."""
    lines = [line.strip() for line in printed.splitlines()]
    mistakes = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    exceptions = [line for line in lines if line.split(":")[0].endswith(("Error", "Exception"))]
    return (mistakes or exceptions[-1:] or [f"torchrun ended with exit code {exit_code}"])[0]
