"""One writer per run: `lease.json` names the process that may write into the run directory, and shows that it runs.

    lease = Lease.acquire(run_directory, job_id="4711", attempt=2)   # UserError: another living run holds it
    lease.start_renewing()                                           # a thread changes the file every 10 s
    lease.check()                                                    # before every rename or append; or LeaseLost
    lease.release()

A lease is dead when a reader has watched it unchanged for 60 s by its own clock, and at once when its process is gone
on this host. A higher attempt of the same job takes over even a living one. The clocks of two hosts are never compared.

It works on NFS, where flock does not, because it needs three things only:

- A lease is taken with `open(O_CREAT | O_EXCL)`: of any number of processes exactly one succeeds.
- A dead lease is first renamed aside, then read again: a process that was too slow, and has moved a fresh lease aside,
  puts it back. A crash in between leaves no lease at all, which is free to take.
- The owner renews through the descriptor that it opened when it took the lease: an owner that was frozen and continues
  after another process took over writes into its own removed file, never into the new one.

A process can still be frozen between `check` and the write that it allows. It then writes a complete file of the same
training, so nothing is torn; the next `check` ends it.
"""

from __future__ import annotations

import contextlib
import json
import operator
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from ddp_asr.errors import UserError
from ddp_asr.files import Fields, is_count, is_text, only, open_input

RENEW_EVERY_S = 10.0
DEAD_AFTER_S = 60.0
POLL_S = 0.5
# A process that has moved a living lease aside by mistake puts it back within microseconds.
PUT_BACK_WITHIN_S = 1.0
# Every renewal overwrites the same bytes in place, so that a full disk stops none and a reader finds no half-old file.
FILE_BYTES = 1024

Verdict = Literal["free", "dead", "alive", "unknown"]


class LeaseLost(UserError):
    """The run directory may no longer be written by this process: it ends, non-zero, without writing."""


@dataclass(frozen=True)
class Owner:
    """Who holds a lease; `nonce` tells two leases of one process apart."""

    host: str
    pid: int
    start_time: int | None  # clock ticks after boot, so that a reused pid is another process; None: no /proc
    pid_space: str  # boot and pid namespace in which `pid` means something: containers may share their host's name
    job_id: str | None
    attempt: int
    nonce: str

    def __str__(self) -> str:
        job = f"job {self.job_id}, " if self.job_id is not None else ""
        return f"{self.host}, pid {self.pid}, {job}attempt {self.attempt}"


_OWNER: Fields = {
    **dict.fromkeys(("host", "pid_space", "nonce"), is_text),
    "pid": lambda value: is_count(value) and 0 < value < 2**31,
    "attempt": is_count,
    "start_time": lambda value: value is None or is_count(value),
    "job_id": lambda value: value is None or is_text(value),
}


def this_process(job_id: str | None, attempt: int) -> Owner:
    process = _process(os.getpid())
    return Owner(
        host=socket.gethostname(),
        pid=os.getpid(),
        start_time=process.start_time if process else None,
        pid_space=_pid_space(),
        job_id=job_id,
        attempt=attempt,
        nonce=secrets.token_hex(8),
    )


def is_gone(owner: Owner) -> bool:
    """Whether the process has certainly ended: known only on its own host and in its pid namespace."""
    if owner.start_time is None or (owner.host, owner.pid_space) != (socket.gethostname(), _pid_space()):
        return False
    process = _process(owner.pid)
    if process is None:
        return not _answers_signals(owner.pid)
    return process.start_time != owner.start_time or process.ended


class Watch:
    """Watches one lease: `verdict()` at any rhythm, by the reader's own clock alone.

    `unknown` turns into `alive` at the first renewal seen, or into `dead` after `dead_after_s` without one.
    """

    def __init__(
        self,
        run_directory: Path,
        *,
        dead_after_s: float = DEAD_AFTER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.content: bytes | None = None
        self._path = run_directory / "lease.json"
        self._dead_after_s = dead_after_s
        self._clock = clock
        self._unchanged_since_s = 0.0
        self._seen_alive = False

    def verdict(self) -> Verdict:
        now_s = self._clock()  # before reading: what is read is unchanged up to now at least
        content = _read(self._path)
        owner = _parse(content) if content is not None else None
        if content is None or content != self.content:
            self._seen_alive = content is not None and self.content is not None
            self.content = content
            self._unchanged_since_s = self._clock()  # after reading, for the same reason
        elif now_s - self._unchanged_since_s >= self._dead_after_s:
            return "dead"
        if content is None:
            return "free"
        if owner is not None and is_gone(owner):
            return "dead"
        return "alive" if self._seen_alive else "unknown"

    @property
    def owner(self) -> Owner | None:
        """The owner at the last verdict."""
        return _parse(self.content) if self.content is not None else None


class Lease:
    """The right to write into one run directory; `Lease.acquire` takes it."""

    def __init__(
        self,
        run_directory: Path,
        owner: Owner,
        descriptor: int,
        *,
        renew_every_s: float,
        dead_after_s: float,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        self.run_directory = run_directory
        self.owner = owner
        self._path = run_directory / "lease.json"
        self._descriptor = descriptor
        self._renew_every_s, self._dead_after_s = renew_every_s, dead_after_s
        self._clock, self._sleep = clock, sleep
        self._renewals = 0
        self._renewed_at_s = clock()
        self._renewal_error = "this process did not run for so long"
        self._lost_because: str | None = None
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    @classmethod
    def acquire(
        cls,
        run_directory: Path,
        *,
        job_id: str | None,
        attempt: int,
        renew_every_s: float = RENEW_EVERY_S,
        dead_after_s: float = DEAD_AFTER_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        on_wait: Callable[[str], None] = print,
    ) -> Lease:
        """Takes the lease; watches one that may be dead for up to `dead_after_s` first.

        Raises UserError if another living run holds it or the directory cannot be written.
        """
        owner = this_process(job_id, attempt)
        path = run_directory / "lease.json"
        watch = Watch(run_directory, dead_after_s=dead_after_s, clock=clock)
        with _naming_the_remedy(run_directory):
            run_directory.mkdir(parents=True, exist_ok=True)
            while (descriptor := _create(path)) is None:
                _remove_when_allowed(path, owner, watch, dead_after_s, sleep, on_wait)
            lease = cls(
                run_directory,
                owner,
                descriptor,
                renew_every_s=renew_every_s,
                dead_after_s=dead_after_s,
                clock=clock,
                sleep=sleep,
            )
            try:
                lease.renew()
            except OSError:  # a full disk: an empty lease would make the next process wait
                path.unlink(missing_ok=True)
                os.close(descriptor)
                raise
        lease.check()  # a slower process may have moved it aside in the meantime
        return lease

    def renew(self) -> None:
        """Changes the file, so that readers see its owner alive. Raises OSError."""
        now_s = self._clock()  # before writing: a reader cannot have begun to wait earlier
        self._renewals += 1
        record = asdict(self.owner) | {"renewals": self._renewals, "time_s": round(time.time(), 3)}
        os.pwrite(self._descriptor, (json.dumps(record).ljust(FILE_BYTES - 1) + "\n").encode(), 0)
        os.fsync(self._descriptor)  # NFS clients keep it to themselves otherwise
        self._renewed_at_s = now_s

    def start_renewing(self) -> None:
        """Renews every `renew_every_s` in a thread, until `release`."""
        self._thread = threading.Thread(target=self._keep_renewing, name="lease", daemon=True)
        self._thread.start()

    def _keep_renewing(self) -> None:
        while not self._released.wait(self._renew_every_s):
            # After so long another process may already be taking it over: a renewal would make the lease look alive.
            if self._is_lost():
                return
            try:
                self.renew()
            except OSError as error:
                self._renewal_error = str(error)

    def _is_lost(self) -> bool:
        """Whether the lease is lost, which it is for good; it is if it could not be renewed for too long."""
        if self._lost_because is None and self._clock() - self._renewed_at_s >= self._dead_after_s:
            self._lost_because = (
                f"the lease of {self.run_directory} could not be renewed for {self._dead_after_s:g} s "
                f"({self._renewal_error}), so another run may have taken it over: this one ends without writing; "
                "start it again, it goes on from the newest checkpoint"
            )
        return self._lost_because is not None

    def check(self) -> None:
        """Returns when this process may write now; reads the file anew. Raises LeaseLost, then always."""
        missing_since_s: float | None = None
        while not self._is_lost():
            try:
                content = _read(self._path)
            except OSError:  # a network file system may answer again before the lease is overdue
                self._sleep(POLL_S)
                continue
            holder = _parse(content) if content is not None else None
            if holder is not None and holder.nonce == self.owner.nonce:
                return
            if content is None:
                missing_since_s = self._clock() if missing_since_s is None else missing_since_s
                if self._clock() - missing_since_s < PUT_BACK_WITHIN_S:
                    self._sleep(PUT_BACK_WITHIN_S / 20)
                    continue
            self._lost_because = self._taken_by(content, holder)
        assert self._lost_because is not None, "the loop ends when it is lost"
        raise LeaseLost(self._lost_because)

    def _taken_by(self, content: bytes | None, holder: Owner | None) -> str:
        if content is None:
            return (
                f"{self._path} is gone (removed, or the directory was moved), so another run may start there: "
                "this one ends without writing; start it again where the directory now is"
            )
        return (
            f"{self.run_directory} was taken over by another run ({holder or 'just starting'}): this one "
            f"({self.owner}) ends without writing; stop the other one first if it was not meant to take over"
        )

    def release(self) -> None:
        """Removes the lease, unless it is another process's by now. May be called twice."""
        if self._released.is_set():
            return
        self._released.set()
        if self._thread is not None:
            self._thread.join()
        with contextlib.suppress(OSError):
            _remove(self._path, partial(_is_of, nonce=self.owner.nonce))
        os.close(self._descriptor)


def _remove_when_allowed(
    path: Path,
    starter: Owner,
    watch: Watch,
    dead_after_s: float,
    sleep: Callable[[float], None],
    on_wait: Callable[[str], None],
) -> None:
    """Removes the lease in the way as soon as that is allowed; returns, too, if it is gone or has another owner."""
    told = False
    while (verdict := watch.verdict()) != "free":
        holder, content = watch.owner, watch.content
        if holder is not None and _supersedes(starter, holder):
            _remove(path, partial(_is_of, nonce=holder.nonce))
            return
        if verdict == "dead":
            _remove(path, partial(operator.eq, content))
            return
        whose = str(holder) if holder is not None else "just starting"
        if verdict == "alive":
            raise UserError(
                f"another run holds {path.parent} ({whose}): stop it, or wait until it has been silent for "
                f"{dead_after_s:g} s, or train elsewhere with --run.name=ANOTHER"
            )
        if not told:
            on_wait(f"{path} names another run ({whose}): waiting up to {dead_after_s:g} s for a sign of life")
            told = True
        sleep(POLL_S)


def _supersedes(starter: Owner, holder: Owner) -> bool:
    return starter.job_id is not None and starter.job_id == holder.job_id and starter.attempt > holder.attempt


def _create(path: Path) -> int | None:
    """The descriptor of a lease that did not exist before; None: it exists."""
    try:
        return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        return None


def _remove(path: Path, may_go: Callable[[bytes], bool]) -> None:
    """Moves the lease aside and removes it there if it still may go; puts it back otherwise."""
    aside = path.with_name(f".lease-{secrets.token_hex(8)}.aside")
    content = _read(path)
    if content is None or not may_go(content):
        return
    try:
        os.rename(path, aside)
    except FileNotFoundError:
        return
    content = _read(aside)
    if content is not None and not may_go(content):
        # link, not rename: a third process may have created its own in the meantime.
        with contextlib.suppress(OSError):
            os.link(aside, path)
    aside.unlink(missing_ok=True)


def _read(path: Path) -> bytes | None:
    """The lease's bytes; None: there is none."""
    try:
        with open_input(path) as file:
            return file.read()
    except FileNotFoundError:
        return None


def _parse(content: bytes) -> Owner | None:
    """The owner; None while a new lease is still empty, and for a file of something else."""
    try:
        record = json.loads(content)
        if not isinstance(record, dict) or _OWNER.keys() - only(record, _OWNER).keys():
            return None
        return Owner(**{name: record[name] for name in _OWNER})
    except (ValueError, RecursionError):
        return None


def _is_of(content: bytes, nonce: str) -> bool:
    owner = _parse(content)
    return owner is not None and owner.nonce == nonce


@contextlib.contextmanager
def _naming_the_remedy(run_directory: Path) -> Iterator[None]:
    """Turns an OSError into what the user can do about it."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the run directory {run_directory} cannot be written ({error.strerror}): "
            "make it writable and see that its disk has room, or choose another with --run.dir=DIR"
        ) from error


@dataclass(frozen=True)
class _Process:
    start_time: int
    ended: bool


def _process(pid: int) -> _Process | None:
    """What /proc knows of a process; None: nothing."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat[stat.rindex(")") + 2 :].split()  # from the third field on: the second, the name, may hold anything
    # A killed process is a zombie until it is reaped; one with threads left may still be inside a write.
    return _Process(start_time=int(fields[19]), ended=fields[0] in "ZX" and int(fields[17]) <= 1)


def _answers_signals(pid: int) -> bool:
    """Whether the pid exists; /proc may hide other users' processes, signals do not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _pid_space() -> str:
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
