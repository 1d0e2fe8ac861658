"""What one node can find out by itself, each within a time limit: names, links, GPUs, disks, directories.

    resolve("node2")                     ->  Name: its addresses, and the name that belongs to them
    Listener("node1", port), reach(...)  ->  Link: whether a port of another node answers, and who answers there
    gpus()                               ->  Gpus: what nvidia-smi sees, and what the job was given
    look_at(target)                      ->  Directory: whether it is there, the same bytes, how fast, what is free

Nothing here raises for what it finds, and nothing hangs: a file system that never answers, or a name server, is left
behind in a thread. `launch.doctor` runs these on every node of a job and judges what they say.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import TypeVar

Result = TypeVar("Result")

GREETING = "ddp-asr doctor on "  # a listener says on which node it is: names and addresses may lead elsewhere
CONNECT_S = 4.0  # for one attempt; Linux itself asks again after 1 and 3 s
RETRY_S = 0.2
MEASURE_S = 3.0  # the longest that reading or writing is timed
MEASURE_BYTES = 64 << 20
BLOCK_BYTES = 4 << 20
ENDS_BYTES = 1 << 20  # of each end of a file: enough to tell two files apart
_SIOCGIFADDR = 0x8915


def bounded(function: Callable[[], Result], limit_s: float, otherwise: Result) -> Result:
    """What `function` returns or raises, or `otherwise` when it takes longer; its thread is left behind then."""
    results: SimpleQueue[Result | Exception] = SimpleQueue()

    def run() -> None:
        try:
            results.put(function())
        except Exception as error:  # not swallowed: raised below
            results.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        result = results.get(timeout=limit_s)
    except Empty:
        return otherwise
    if isinstance(result, Exception):
        raise result
    return result


# ---- names ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Name:
    """What a host's name means here."""

    addresses: list[str] = field(default_factory=list)
    back: str = ""  # the name of the first address; empty: it has none
    error: str = ""

    @property
    def loopback(self) -> str:
        """The address of this very machine that the name stands for; empty: it is a real one."""
        return next((address for address in self.addresses if is_loopback(address)), "")


def is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def resolve(host: str, limit_s: float = 10.0) -> Name:
    """Name to address and back, as this machine's resolver has it."""
    return bounded(lambda: _resolve(host), limit_s, Name(error=f"no answer within {limit_s:g} s"))


def _resolve(host: str) -> Name:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return Name(error=_reason(error))
    addresses = [str(item[4][0]) for item in found]
    try:
        back = socket.gethostbyaddr(addresses[0])[0]
    except (OSError, UnicodeError):
        back = ""
    return Name(list(dict.fromkeys(addresses)), back)


def _reason(error: BaseException) -> str:
    """The system's own words, without numbers: 'connection refused'."""
    if isinstance(error, TimeoutError):
        return "timed out"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    text = text.partition(" (while attempting")[0]  # socket.create_server adds the address
    return text[:1].lower() + text[1:]


def resolve_all(hosts: Sequence[str], limit_s: float) -> dict[str, Name]:
    """All at once: a name server that is away answers none of them."""
    with ThreadPoolExecutor(max_workers=_workers(hosts)) as pool:
        return dict(zip(hosts, pool.map(lambda host: resolve(host, limit_s), hosts), strict=True))


def _workers(items: Sequence[object]) -> int:
    return min(256, max(1, len(items)))


# ---- interfaces ----------------------------------------------------------------------------------------------------


def interfaces() -> dict[str, str]:
    """The network interfaces that have an IPv4 address, and that address."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):  # one without an address
                found[name] = socket.inet_ntoa(fcntl.ioctl(asking, _SIOCGIFADDR, request)[20:24])
    return found


def route_to(address: str) -> str:
    """This machine's own address on the way to `address`, without sending anything; empty: there is no way."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as asking:
            asking.connect((address, 9))
            return str(asking.getsockname()[0])
    except OSError:
        return ""


# ---- links ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """A node's attempt to reach a port of another."""

    to: str
    port: int
    error: str = ""  # empty: it was reached
    answered: str = ""  # the node that answered


class Listener:
    """Answers every connection with this node's name, on `port` and on one that the system chooses."""

    def __init__(self, node: str, port: int) -> None:
        self.error = ""  # why `port` cannot be listened on
        self._greeting = f"{GREETING}{node}\n".encode()
        self._sockets = []
        for wanted in (port, 0):
            try:
                self._sockets.append(_listen(wanted))
            except OSError as error:
                self.error = _reason(error)
        self.ports = [int(listening.getsockname()[1]) for listening in self._sockets]

    def __enter__(self) -> Listener:
        for listening in self._sockets:
            threading.Thread(target=self._answer, args=[listening], daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for listening in self._sockets:
            with contextlib.suppress(OSError):
                listening.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in accept; close alone does not
            listening.close()

    def _answer(self, listening: socket.socket) -> None:
        while True:
            try:
                caller, _ = listening.accept()
            except OSError as error:
                if error.errno in (errno.ECONNABORTED, errno.EMFILE):
                    continue
                return
            with contextlib.suppress(OSError), caller:
                caller.sendall(self._greeting)


def _listen(port: int) -> socket.socket:
    """On every address of the machine, as rank 0's store does."""
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise
    return socket.create_server(("", port), backlog=512)


def reach(node: str, port: int, limit_s: float) -> Link:
    """Whether the node's listener answers, tried again until `limit_s` is over."""
    deadline_s = time.monotonic() + limit_s
    while True:
        attempt_s = max(RETRY_S, min(CONNECT_S, deadline_s - time.monotonic()))
        try:
            with socket.create_connection((node, port), timeout=attempt_s) as connection:
                return Link(node, port, answered=_greeted(connection))
        except (OSError, UnicodeError) as failed:
            error = _reason(failed)
        if time.monotonic() + RETRY_S >= deadline_s:
            return Link(node, port, error)
        time.sleep(RETRY_S)


def _greeted(connection: socket.socket) -> str:
    with connection.makefile("rb") as answer:
        text = answer.readline(200).decode(errors="replace").strip()
    return text.removeprefix(GREETING) if text.startswith(GREETING) else "another program"


def reach_all(wanted: Sequence[tuple[str, int]], limit_s: float) -> list[Link]:
    """All at once, so that dead links cost their time together."""

    def reach_one(pair: tuple[str, int]) -> Link:
        # Beside its own limit: the name server is asked on the way.
        return bounded(lambda: reach(*pair, limit_s), limit_s + CONNECT_S, Link(*pair, "timed out"))

    with ThreadPoolExecutor(max_workers=_workers(wanted)) as pool:
        return list(pool.map(reach_one, wanted))


# ---- GPUs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gpus:
    """What nvidia-smi says, and which the job was given."""

    names: list[str] = field(default_factory=list)
    driver: str = ""
    given: str | None = None  # CUDA_VISIBLE_DEVICES; None: not set
    error: str = ""


def gpus(limit_s: float = 30.0) -> Gpus:
    """The GPUs of this node; a driver that has to be loaded first takes its time."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except FileNotFoundError:
        return Gpus(given=given, error="there is no nvidia-smi")
    except (OSError, subprocess.TimeoutExpired) as error:
        late = isinstance(error, subprocess.TimeoutExpired)
        return Gpus(given=given, error=f"nvidia-smi: {f'no answer within {limit_s:g} s' if late else error}")
    rows = [line.rsplit(", ", 1) for line in answer.stdout.splitlines() if ", " in line]
    if answer.returncode or not rows:
        said = (answer.stdout + answer.stderr).strip().splitlines() or [f"exit code {answer.returncode}"]
        return Gpus(given=given, error=f"nvidia-smi: {said[0]}")
    return Gpus([name for name, _ in rows], rows[0][1], given)


# ---- directories ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A directory that the nodes are to look at."""

    path: str
    what: str  # "run directory", "shards", "cache", "temporary files": how it is called in sentences
    evidence: str = ""  # a file in it by which nodes know that they see the same directory; empty: node-local
    digest: str = ""  # of that file where the job was submitted; empty: not visible there
    read: bool = False  # time reading its largest shard
    write: bool = False  # time writing
    needed_bytes: int = 0  # free space that a run wants here


@dataclass(frozen=True)
class Directory:
    """What a node finds there."""

    path: str
    what: str
    error: str = ""
    digest: str = ""
    free_bytes: int = -1  # -1: unknown
    read_mb_per_s: float | None = None
    write_mb_per_s: float | None = None


def look_at(target: Target, node: str, limit_s: float) -> Directory:
    """Looks at one directory."""
    silent = Directory(target.path, target.what, f"no answer within {limit_s:g} s")
    return bounded(lambda: _look_at(target, node, limit_s), limit_s, silent)


def _look_at(target: Target, node: str, limit_s: float) -> Directory:
    folder = Path(target.path)
    digest, reading, writing, error = "", None, None, ""
    try:
        if target.evidence:
            digest = digest_of(appears(folder / target.evidence, limit_s / 2))
        if target.read:
            reading = read_mb_per_s(_largest_shard(folder))
        if target.write and (target.evidence or folder.is_dir()):
            writing = write_mb_per_s(folder / f".doctor-{node}.tmp")
        elif target.write:
            _require_makeable(folder)
    except OSError as failed:
        error = _reason(failed)
    return Directory(target.path, target.what, error, digest, free_bytes(folder), reading, writing)


def _require_makeable(folder: Path) -> None:
    """Raises an OSError where a run could not make the directory."""
    existing = next(parent for parent in folder.parents if parent.is_dir())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, f"it is not there, and {existing} may not be written")


def appears(path: Path, limit_s: float) -> Path:
    """The path, waited for: a network file system may show a directory as it was up to a minute ago."""
    deadline_s = time.monotonic() + limit_s
    while path.parent.is_dir() and not path.exists() and time.monotonic() < deadline_s:
        refresh(path.parent)
        time.sleep(RETRY_S)
    return path


def refresh(folder: Path) -> None:
    """Makes an NFS client ask its server anew: its own change of a directory invalidates what it remembers of it."""
    with contextlib.suppress(OSError):
        os.utime(folder)


def digest_of(path: Path) -> str:
    """Tells two files apart by their size and both ends."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(f"{size}\n".encode() + file.read(ENDS_BYTES))
        file.seek(max(0, size - ENDS_BYTES))
        digest.update(file.read(ENDS_BYTES))
    return digest.hexdigest()


def free_bytes(folder: Path) -> int:
    """What its file system has room for; of the nearest directory above that exists."""
    for existing in (folder, *folder.parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(existing).free
    return -1


def shard_bytes(folder: Path) -> dict[str, int]:
    """The shards of a directory and their sizes."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.tar"))}


def _largest_shard(folder: Path) -> Path:
    sizes = shard_bytes(folder)
    if not sizes:
        raise FileNotFoundError(errno.ENOENT, "it holds no *.tar")
    return folder / max(sizes, key=lambda name: sizes[name])


def read_mb_per_s(path: Path) -> float:
    """Reads a piece of the file, from the disk or network wherever the kernel can be talked out of its cache."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began_s, done = time.perf_counter(), 0
        while done < MEASURE_BYTES and time.perf_counter() - began_s < MEASURE_S:
            block = file.read(BLOCK_BYTES)
            if not block:
                break
            done += len(block)
        return done / 1e6 / max(1e-9, time.perf_counter() - began_s)


def write_mb_per_s(path: Path) -> float:
    """Writes a file of its own, until it is on the disk, and removes it."""
    block = os.urandom(BLOCK_BYTES)  # no file system can make it smaller
    try:
        with path.open("wb", buffering=0) as file:
            began_s, done = time.perf_counter(), 0
            while done < MEASURE_BYTES and time.perf_counter() - began_s < MEASURE_S:
                done += file.write(block)
            os.fsync(file.fileno())
            return done / 1e6 / max(1e-9, time.perf_counter() - began_s)
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
