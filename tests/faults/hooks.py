"""What a rank does differently here: it writes a ledger of what it trains, and at one point a fault happens to it.

    Hooks(ledger, attempt, Trigger(point, action, step, rank))()     # in the rank, before `ddp_asr.train` runs

Nothing of this is in the product: the functions of POINTS are wrapped in the forked rank. A trigger fires once, at the
`nth` entry of its point at or after its step, on its rank. It does something to its own process, or it holds the rank
until the program that injects faults (attempt.py) lets it go on.
"""

import ctypes
import importlib
import json
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# The functions at whose entry a fault can happen. Those of RANK_0 run on rank 0 only.
POINTS = {
    "forward": ("ddp_asr.training.learner", "Learner.accumulate"),
    "reduction": ("ddp_asr.training.loop", "Tally.over_all_ranks"),
    "update": ("ddp_asr.training.learner", "Learner.update"),
    "loader": ("ddp_asr.data.loader", "Recordings.micro_batch"),
    "evaluation": ("ddp_asr.recognition.evaluation", "recognise_batch"),
    "rehearsal": ("ddp_asr.training.session", "rehearse"),
    "metrics line": ("ddp_asr.runs.directory", "RunDirectory.append"),
    "status": ("ddp_asr.runs.directory", "RunDirectory.status"),
    "checkpoint": ("ddp_asr.runs.checkpoint", "_Watched.write"),
    "checkpoint's rename": ("ddp_asr.files", "sync_directory"),
    "choice of a checkpoint": ("ddp_asr.training.session", "find_checkpoint"),
    "cut of the metrics": ("ddp_asr.runs.directory", "RunDirectory.cut_after"),
}
RANK_0 = tuple(list(POINTS)[6:])
DEADLY = ("SIGKILL", "segfault", "abort", "exit with 0")
BEFORE_TRAINING = ("rehearsal", "choice of a checkpoint", "cut of the metrics")
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2
CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Trigger:
    """One fault, and where it happens."""

    point: str
    action: str  # a key of ACTIONS, or the name of a signal
    pipes: Path  # directory of a note of when it fired, and of the pipe that a held rank reads
    step: int = 0  # not before this step
    nth: int = 1  # entry of the point from there on
    rank: int = 0

    def make_pipes(self) -> None:
        self.pipes.mkdir()
        os.mkfifo(self.pipes / "opened")


@dataclass(frozen=True)
class Hooks:
    """A patch for tests/tiny_training.py: everything that is different in a rank of this suite."""

    ledger: Path
    attempt: int
    trigger: Trigger | None = None
    network: str = ""  # a network namespace for each rank, in rank order, separated by commas

    def __call__(self) -> None:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _write_as_a_user()
        if self.network:
            _enter_network(self.network.split(",")[int(os.environ["RANK"])])
        keep_ledger(self.ledger, self.attempt)
        if self.trigger is not None and int(os.environ["RANK"]) == self.trigger.rank:
            arm(self.trigger)


def _write_as_a_user() -> None:
    """Drops root's right to write where the permissions forbid it, so that they have an effect."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets) == 0:
        for number in range(3):  # effective, permitted, inheritable
            sets[number] &= ~(1 << CAP_DAC_OVERRIDE | 1 << CAP_DAC_READ_SEARCH)
        libc.capset(header, sets)


def _enter_network(namespace: str) -> None:
    with open(f"/run/netns/{namespace}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {namespace}")


def keep_ledger(directory: Path, attempt: int) -> None:
    """Writes down each micro-batch before its backward pass, and on rank 0 each completed optimiser step after it.

    In this order: what is in an optimiser step has been written down by the rank that trained it, whenever that rank
    dies. Each line is one write, so none is torn by the end of a process.
    """
    from ddp_asr.training.learner import Learner

    rank = int(os.environ["RANK"])
    file = os.open(directory / f"{attempt:03d}-{rank}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    accumulate, update = Learner.accumulate, Learner.update

    def write(step: int, **what) -> None:
        os.write(file, (json.dumps({"attempt": attempt, "rank": rank, "step": step, **what}) + "\n").encode())

    def accumulating(self, batch, *, step, last):
        if step > 0:  # 0 is the rehearsal
            numbers = list(range(batch.micro_batch, batch.micro_batch + batch.micro_batches))
            write(step, epoch=batch.epoch, micro_batches=numbers, keys=[key for key in batch.keys if key])
        return accumulate(self, batch, step=step, last=last)

    def updating(self, step, total_steps, utterances):
        norm, updated = update(self, step, total_steps, utterances)
        if updated and rank == 0:
            write(step, updated=True)
        return norm, updated

    Learner.accumulate, Learner.update = accumulating, updating  # type: ignore[method-assign]


def arm(trigger: Trigger) -> None:
    """Wraps the function of the trigger's point."""
    from ddp_asr.ranks.world import World

    now, left, lock = [0], [trigger.nth], threading.Lock()
    set_phase = World.set_phase

    def noting_the_step(self, step, phase):
        now[0] = step
        set_phase(self, step, phase)

    World.set_phase = noting_the_step  # type: ignore[method-assign]
    module, name = POINTS[trigger.point]
    *owner_names, last = name.split(".")
    owner = importlib.import_module(module)
    for each in owner_names:
        owner = getattr(owner, each)
    before = getattr(owner, last)

    def entering(*arguments, **named):
        due = now[0] >= trigger.step
        if trigger.point == "loader":
            due = due and threading.current_thread() is not threading.main_thread()
        if trigger.point == "checkpoint's rename":
            due = due and arguments[0].name == "checkpoints"
        with lock:
            left[0] -= due
            fires = due and left[0] == 0
        if fires:
            if trigger.point == "metrics line" and trigger.action in DEADLY:
                _tear(*arguments)
            note = trigger.pipes / "note"
            note.write_text(str(time.monotonic()))
            note.rename(trigger.pipes / "fired")
            ACTIONS.get(trigger.action, _signal_self)(trigger)
        return before(*arguments, **named)

    setattr(owner, last, entering)


def _tear(files, name, line) -> None:
    """Writes half of the line, as a process leaves it that is killed where the kernel splits a write."""
    text = json.dumps(line)
    with (files.path / name).open("a") as file:
        file.write(text[: len(text) // 2])


# ---- actions -------------------------------------------------------------------------------------------------------


class PlantedError(Exception):
    """An exception that no code of the product expects."""


def _signal_self(trigger: Trigger) -> None:
    os.kill(os.getpid(), getattr(signal, trigger.action))


def _hold(trigger: Trigger) -> None:
    pipe = os.open(trigger.pipes / "opened", os.O_RDWR)  # for both ways, so that opening it does not wait
    os.read(pipe, 1)
    os.close(pipe)


def _segfault(trigger: Trigger) -> None:
    ctypes.string_at(0)


def _abort(trigger: Trigger) -> None:
    os.abort()


def _hold_gil(trigger: Trigger) -> None:
    """A thread in C that never returns and keeps Python's lock, so that no other thread of this process runs."""
    mutex = ctypes.create_string_buffer(64)  # a normal one, free; locked twice it blocks for good
    for _ in range(2):
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)


def _raise(trigger: Trigger) -> None:
    raise PlantedError(f"planted at {trigger.point}")


def _exit_0(trigger: Trigger) -> None:
    os._exit(0)


def _hang(trigger: Trigger) -> None:
    threading.Event().wait()


def _set_clock_back(trigger: Trigger) -> None:
    real: Callable[[], float] = time.time
    time.time = lambda: real() - 3 * 3600  # as a host whose clock is mended while it trains


ACTIONS: dict[str, Callable[[Trigger], None]] = {
    "hold": _hold,
    "segfault": _segfault,
    "abort": _abort,
    "hold the GIL": _hold_gil,
    "raise": _raise,
    "exit with 0": _exit_0,
    "hang": _hang,
    "set the clock back": _set_clock_back,
}
