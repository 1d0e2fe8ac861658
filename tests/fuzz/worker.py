"""A process that runs cases one after the other, each within limits of time and memory.

    worker = Worker(targets)
    worker.assign(Chunk("arpa", seed=0, start=0, stop=500))
    worker.connection.recv()        # a Finding, or Counts when the chunk is done
    worker.current()                # the case that runs now: what killed it, if it is dead
    worker.stuck_s()                # how long it has been there, without the time in which it waited for a core

Too much computing is stopped from within, by a timer of CPU time. What waits, or computes in C, does not see that: the
runner ends such a worker. Neither counts the time of other programs on the machine. Memory is the peak of the process,
so a worker that went beyond the limit ends as well, since the next cases could not be judged.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import mmap
import multiprocessing
import os
import resource
import shutil
import signal
import struct
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ddp_asr.errors import run_entry_point
from tests.fuzz.mutate import Tree, write_tree
from tests.fuzz.target import Target, make_input

REPOSITORY = Path(__file__).resolve().parents[2]

CPU_LIMIT_S = 5.0
STUCK_LIMIT_S = 7.0  # the timer comes first where it can
MEMORY_LIMIT_BYTES = 2 << 30
ADDRESS_SPACE_BYTES = 4 << 30  # beyond what the worker has at first: protects the machine, and judges nothing
LONGEST_SENTENCE = 4_000
BROKEN_SUITE = 70  # exit status of a worker that met a mistake of its own
_STATE = struct.Struct("qqq")  # number of the case, accepted, refused

_processes = multiprocessing.get_context("fork")  # torch and pyarrow are imported once


class TooSlow(BaseException):
    """Raised by the timer; no reader catches it by accident."""


@dataclass(frozen=True)
class Chunk:
    """Cases of one target."""

    target: str
    seed: int
    start: int
    stop: int


@dataclass(frozen=True)
class Counts:
    """What became of the cases of a chunk that caused no finding."""

    accepted: int
    refused: int


@dataclass(frozen=True)
class Finding:
    """A case that ended in another way than it may."""

    target: str
    case: str
    kind: str  # the type of the exception, or: slow, hang, died, memory
    place: str  # file:function of the product
    message: str
    detail: str  # the traceback
    tree: Tree = field(repr=False)  # the input

    @property
    def group(self) -> str:
        return f"{self.target} {self.kind} {self.place}"


class Worker:
    """The process, for the one that started it."""

    def __init__(self, targets: dict[str, type[Target]]) -> None:
        self.chunk: Chunk | None = None
        self.directory = Path(tempfile.mkdtemp(prefix="fuzz-", dir=_memory_disk()))
        self.trace = self.directory / "trace.txt"
        self._state = mmap.mmap(-1, _STATE.size)
        self._looked: tuple[int, float, float] = (-2, 0.0, 0.0)  # at which case, when, and what it had waited till then
        self.connection, child = _processes.Pipe()
        arguments = (targets, child, self._state, self.directory, self.trace)
        self.process = _processes.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        child.close()

    def assign(self, chunk: Chunk) -> None:
        self.chunk = chunk
        _STATE.pack_into(self._state, 0, -1, 0, 0)
        self._looked = -2, 0.0, 0.0
        self.connection.send(chunk)

    def current(self) -> tuple[int, Counts]:
        """The number of the case that runs (-1: none yet), and what became of those before it."""
        number, accepted, refused = _STATE.unpack_from(self._state)
        return number, Counts(accepted, refused)

    def stuck_s(self) -> float:
        """Since it was first seen at its case, without the time in which it waited for a core."""
        number, now_s, waited_s = self.current()[0], time.monotonic(), _waited_for_cores_s(self.process.pid)
        if number != self._looked[0]:
            self._looked = number, now_s, waited_s
        _, since_s, before_s = self._looked
        return (now_s - since_s) - (waited_s - before_s)

    def kill(self) -> str:
        """Ends the process, however it hangs; returns where it was."""
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGUSR1)  # faulthandler writes the trace, from inside C, too
            time.sleep(0.3)
            self.process.kill()
            self.process.join()
        return self.close()

    def close(self) -> str:
        """Waits for the end of the process; returns what faulthandler wrote."""
        if self.connection.closed:
            return ""
        with contextlib.suppress(BrokenPipeError):  # it may have ended by itself
            self.connection.send(None)
        self.process.join()
        self.connection.close()
        trace = self.trace.read_text(errors="replace") if self.trace.exists() else ""
        shutil.rmtree(self.directory, ignore_errors=True)
        return trace


def _memory_disk() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _waited_for_cores_s(pid: int | None) -> float:
    """How long the threads of a process were ready to run while others ran, all together."""
    waited_ns = 0
    for file in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # the thread has ended
            waited_ns += int(file.read_text().split()[1])
    return waited_ns / 1e9


# ---- in the process ------------------------------------------------------------------------------------------------


def _work(
    targets: dict[str, type[Target]],
    connection: Connection,
    state: mmap.mmap,
    directory: Path,
    trace: Path,
) -> None:
    silence = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(silence, descriptor)
    file = trace.open("w")
    faulthandler.enable(file)
    faulthandler.register(signal.SIGUSR1, file)
    signal.signal(signal.SIGPROF, _too_slow)
    for number in (signal.SIGINT, signal.SIGTERM):  # the runner ends this process
        signal.signal(number, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    os.chdir(directory)
    try:
        _serve(targets, connection, state, directory)
    except BaseException:
        traceback.print_exc(file=file)  # a mistake of the suite
        file.flush()
        os._exit(BROKEN_SUITE)


def _serve(targets: dict[str, type[Target]], connection: Connection, state: mmap.mmap, directory: Path) -> None:
    made: dict[str, tuple[Target, list[Tree]]] = {}
    while (chunk := connection.recv()) is not None:
        if chunk.target not in made:
            scratch = directory / "scratch" / chunk.target
            scratch.mkdir(parents=True)
            target = targets[chunk.target](scratch)
            made[chunk.target] = target, target.seeds()
            _limit_address_space()
        if not _run_chunk(chunk, *made[chunk.target], connection, state, directory / "case"):
            return


def _run_chunk(
    chunk: Chunk, target: Target, seeds: list[Tree], connection: Connection, state: mmap.mmap, directory: Path
) -> bool:
    """Runs the cases; returns whether the process may run more, which it may not after too much memory."""
    accepted = refused = 0
    limit_kb = (_resident_bytes() + MEMORY_LIMIT_BYTES) // 1024
    for number in range(chunk.start, chunk.stop):
        tree = make_input(target, seeds, chunk.seed, number)
        _STATE.pack_into(state, 0, number, accepted, refused)
        outcome = run_case(target, tree, directory, valid=number < len(seeds))
        if too_much := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > limit_kb:
            _, place, _, detail = outcome if isinstance(outcome, tuple) else ("", "?", "", outcome)
            outcome = "memory", place, f"the case took more than {MEMORY_LIMIT_BYTES >> 30} GB", detail
        if isinstance(outcome, tuple):
            connection.send(Finding(target.name, f"{target.name}:{chunk.seed}:{number}", *outcome, tree))
        accepted += outcome == "accepted"
        refused += outcome == "refused"
        _STATE.pack_into(state, 0, number + 1, accepted, refused)
        if too_much:
            return False
    connection.send(Counts(accepted, refused))
    return True


def run_case(target: Target, tree: Tree, directory: Path, valid: bool) -> str | tuple[str, str, str, str]:
    """ "accepted", "refused", or what is wrong: kind, place, message and traceback."""
    write_tree(tree, directory)
    raised: BaseException | None = None

    def read() -> int:
        nonlocal raised
        try:
            signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_S)
            try:
                target.read(directory)
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
        except BaseException as error:
            raised = error
            raise
        return 0

    try:
        with contextlib.redirect_stderr(io.StringIO()) as printed:
            status = run_entry_point(read)  # as every door of the program does
    except TooSlow as error:
        return "slow", place_of(error), f"more than {CPU_LIMIT_S:g} s of computing", traceback.format_exc()
    except (Exception, SystemExit) as error:
        return type(error).__name__, place_of(error), str(error)[:300], traceback.format_exc()
    if raised is None:
        return "accepted"
    sentence = _sentence(printed.getvalue())
    wrong = _wrong_with(sentence) if status == 2 else f"exit status {status}"
    if not valid and not wrong:
        return "refused"
    kind = "sentence" if wrong else "refused though valid"
    return kind, place_of(raised), wrong or sentence, "".join(traceback.format_exception(raised))


def _sentence(printed: str) -> str:
    """What the entry point printed last, without the warnings before it."""
    return ("\n" + printed).rpartition("\nerror: ")[2].removesuffix("\n")


def _wrong_with(sentence: str) -> str:
    """What is wrong with the text of a UserError; "" where nothing is."""
    if not sentence.strip():
        return "the sentence is empty"
    if len(sentence) > LONGEST_SENTENCE:
        return f"the sentence has {len(sentence):,} characters: {sentence[:200]}"
    broken = [character for character in sentence if character < " " or character == "\x7f"]
    if broken:
        return f"the sentence has {broken[0]!r} in it: {sentence[:300]!r}"
    if any(words in sentence for words in ("Unable to allocate", "bad_alloc", "DefaultCPUAllocator")):
        return f"memory was asked for that there is not: {sentence[:300]}"
    return ""


def place_of(error: BaseException) -> str:
    """The innermost function of the product in a traceback, else of the suite."""
    found = "?"
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if path.is_relative_to(REPOSITORY):
            inside = path.relative_to(REPOSITORY)
            if inside.parts[0] in ("ddp_asr", "launch") or found == "?" or found.startswith("tests/"):
                found = f"{inside}:{frame.name}"
    return found


def _too_slow(number: int, frame: Any) -> None:
    raise TooSlow


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def _limit_address_space() -> None:
    size_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (size_bytes + ADDRESS_SPACE_BYTES, hard))
