"""The kinds of fault: each is a function that makes one attempt at a run and has one fault happen to it.

    KINDS["SIGKILL a rank"].happen(episode)   # -> Happened: whether it happened, how long the attempt took to end

A kind may damage what is on the disk, but it repairs at the end what only a person can repair: room on a disk, rights,
shards. What is left is compared with an undisturbed run by the caller (campaign.py), and the next attempt goes on.
"""

import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from ddp_asr.runs import checkpoint
from tests import tiny_training as tiny
from tests.comet_stand_in import StandIn
from tests.conftest import REPOSITORY
from tests.faults import comparison, hooks
from tests.faults.scene import WORLD_SIZES, Attempt, Scene

WINDOW_STEPS = 3  # a fault happens in one of so many steps after those that the newest checkpoint holds
SHORT_TIMEOUT = ("--distributed.timeout_s=8",)
STEP_POINTS = ("forward", "reduction", "update")
ANY_POINT = (*STEP_POINTS, "loader", "evaluation", "metrics line", "checkpoint")


@dataclass
class Happened:
    """What a kind reports of its attempt."""

    injected: bool
    end_s: float | None = None  # from the fault to the end of all processes; None: the fault ended none
    problems: list[str] = field(default_factory=list)  # what the comparison with the undisturbed run cannot see
    traceback_allowed: bool = False


@dataclass
class Fault:
    """One fault, drawn from its seed: all that a kind needs to know."""

    scene: Scene
    processes: int
    random: random.Random
    saved_step: int  # of the newest checkpoint

    @property
    def rank(self) -> int:
        return self.random.randrange(self.processes)

    def step(self) -> int:
        return min(self.saved_step + self.random.randint(1, WINDOW_STEPS), self.scene.stage.shape.steps)

    def start(
        self,
        point: str = "",
        action: str = "",
        *options: str,
        rank: int | None = None,
        nth: int = 1,
        step: int | None = None,
        agent: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> Attempt:
        """An attempt in which the fault happens at the point, if any; it stops soon after, if the fault does not."""
        trigger, stop = None, min(self.saved_step + WINDOW_STEPS + 1, self.scene.stage.shape.steps)
        if point:
            rank = rank if rank is not None else 0 if point in hooks.RANK_0 else self.rank
            step = step if step is not None else 0 if point in hooks.BEFORE_TRAINING else self.step()
            if point == "evaluation":
                step = next(each for each in self.scene.stage.shape.evaluated if each >= min(step, stop))
                stop = max(stop, step)
            trigger = self.scene.trigger(point, action, rank=rank, step=step, nth=nth)
        save = f"--train.save_every_steps={self.random.choice([1, 1, 2])}"
        limits = (f"--train.stop_at_step={stop}", save)
        return self.scene.start(self.processes, trigger, *limits, *options, agent=agent, **(environment or {}))

    def draw_point(self, points: Sequence[str] = ANY_POINT) -> tuple[str, int]:
        """A point, and at which of its entries."""
        point = self.random.choice(points)
        return point, {"forward": self.random.randint(1, 2), "checkpoint": self.random.randint(1, 20)}.get(point, 1)


@dataclass(frozen=True)
class Kind:
    """A kind of fault."""

    name: str
    happen: Callable[[Fault], Happened]
    world_sizes: tuple[int, ...] = WORLD_SIZES
    needs: str = ""  # "root" where it mounts file systems or makes networks
    person: bool = False  # whether a person has to repair something, and no launcher goes on by itself
    weight: int = 1  # how often in a round of all kinds


KINDS: dict[str, Kind] = {}
_networks = itertools.count()
SEVERAL = tuple(size for size in WORLD_SIZES if size > 1)


def kind(name: str, **facts) -> Callable[[Callable[[Fault], Happened]], Callable[[Fault], Happened]]:
    def register(function: Callable[[Fault], Happened]) -> Callable[[Fault], Happened]:
        KINDS[name] = Kind(name, function, **facts)
        return function

    return register


# ---- a rank, all ranks or the agent are signalled ------------------------------------------------------------------


def one_rank(fault: Fault, action: str, points: Sequence[str] = ANY_POINT, traceback_allowed: bool = False) -> Happened:
    """A rank does something to itself at a drawn point."""
    point, nth = fault.draw_point(points)
    attempt = fault.start(point, action, nth=nth)
    attempt.end(hand_on=fault.random.random() < 0.5)
    return Happened(attempt.end_s is not None, attempt.end_s, traceback_allowed=traceback_allowed)


def everything(fault: Fault, number: int) -> Happened:
    """All ranks are signalled at once while one of them is at a drawn point."""
    point, nth = fault.draw_point()
    attempt = fault.start(point, "hold", nth=nth)
    if not attempt.reach():
        return not_reached(attempt)
    attempt.signal(number)
    attempt.open()
    attempt.end()
    return Happened(True, attempt.end_s)


def not_reached(attempt: Attempt) -> Happened:
    attempt.end()
    return Happened(False)


def held_rank(attempt: Attempt) -> int:
    """Process id of the rank of the trigger."""
    assert attempt.trigger is not None
    return attempt.pids[attempt.trigger.rank]


for _name in ("SIGKILL", "SIGTERM", "SIGINT"):
    kind(f"{_name} of a rank", weight=2)(partial(one_rank, action=_name))
    kind(f"{_name} of everything")(partial(everything, number=signal.Signals[_name]))


@kind("SIGSTOP of a rank, continued")
def frozen_for_a_while(fault: Fault) -> Happened:
    point, nth = fault.draw_point()
    return _freeze(fault, fault.start(point, "hold", nth=nth), everyone=False)


@kind("SIGSTOP of everything, continued")
def all_frozen_for_a_while(fault: Fault) -> Happened:
    point, nth = fault.draw_point()
    return _freeze(fault, fault.start(point, "hold", nth=nth), everyone=True)


def _freeze(fault: Fault, attempt: Attempt, *, everyone: bool) -> Happened:
    """The ranks stand still for a moment; the run goes on as if nothing had been."""
    if not attempt.reach():
        return not_reached(attempt)
    frozen = attempt.pids if everyone else [held_rank(attempt)]
    attempt.signal(signal.SIGSTOP, *frozen)
    attempt.open()
    time.sleep(fault.random.uniform(0.2, 2.0))
    attempt.signal(signal.SIGCONT, *frozen)
    attempt.end(goes_on=True)
    return Happened(True, None, went_on(attempt))


def went_on(attempt: Attempt) -> list[str]:
    """What is wrong with an attempt that the fault should not have ended."""
    return [] if set(attempt.codes) == {0} else [f"the fault ended the run: {attempt.codes} {attempt.errors}"]


@kind("SIGSTOP of a rank for good", world_sizes=SEVERAL)
def frozen_for_good(fault: Fault) -> Happened:
    """The others end; then the frozen one is killed, or continues and must end by itself."""
    attempt = fault.start(fault.random.choice(STEP_POINTS), "hold", *SHORT_TIMEOUT)
    if not attempt.reach():
        return not_reached(attempt)
    pid = held_rank(attempt)
    attempt.signal(signal.SIGSTOP, pid)
    attempt.open()
    if fault.random.random() < 0.5:
        attempt.end(stuck=[pid])
    else:
        attempt.end(but=[pid])
        attempt.signal(signal.SIGCONT, pid)
        attempt.end()
    return Happened(True, attempt.end_s)


def agent(fault: Fault, number: int, *, frozen_s: float = 0.0) -> Happened:
    """torchrun's agent is signalled while a rank is at a drawn point."""
    point, nth = fault.draw_point(STEP_POINTS)
    attempt = fault.start(point, "hold", nth=nth, agent=True)
    while not attempt.reach() and "could not meet" in attempt.output:
        # The agent forks its ranks while it has threads, and now and then a rank hangs at once (2 in 86 attempts). The
        # real one starts new processes.
        attempt.end()
        fault.scene.started.remove(attempt)
        attempt = fault.start(point, "hold", nth=nth, agent=True)
    if attempt.fired_at_s is None:
        return not_reached(attempt)
    attempt.signal(number, attempt.agent.pid)
    attempt.open()
    if frozen_s:
        time.sleep(frozen_s)
        attempt.signal(signal.SIGCONT, attempt.agent.pid)
    attempt.end(goes_on=frozen_s > 0)
    return Happened(True, None if frozen_s else attempt.end_s)


for _name in ("SIGKILL", "SIGTERM", "SIGINT"):
    kind(f"{_name} of the agent")(partial(agent, number=signal.Signals[_name]))
kind("SIGSTOP of the agent, continued")(partial(agent, number=signal.SIGSTOP, frozen_s=1.0))


@kind("SIGKILL of torchrun, the real command", world_sizes=(2,))
def real_torchrun(fault: Fault) -> Happened:
    """`ddp-asr train`'s torchrun, each rank a Python of its own."""
    scene = fault.scene
    scene.attempts.append(2)
    stop = min(fault.saved_step + WINDOW_STEPS + 1, scene.stage.shape.steps)
    arguments = scene.corpus.arguments(scene.runs, "run", f"--train.stop_at_step={stop}", "--train.save_every_steps=1")
    placed = [str(scene.ledger), str(len(scene.attempts)), *arguments]
    torchrun = tiny.Torchrun(placed, 2, module="tests.faults.rank")
    ranks = torchrun.ranks()
    wanted = scene.ledger / f"{len(scene.attempts):03d}-0.jsonl"
    with contextlib.suppress(AssertionError):
        tiny.wait_until(lambda: wanted.exists() and wanted.stat().st_size, "the first step")
    began_s = time.monotonic()
    os.kill(torchrun.popen.pid, signal.SIGKILL)
    try:
        tiny.wait_until(lambda: not any(map(tiny.is_alive, ranks)), "the ranks to end", limit_s=60)
        problems = []
    except AssertionError:
        problems = ["the ranks outlived torchrun by a minute"]
    torchrun.kill()
    return Happened(True, time.monotonic() - began_s, problems)


# ---- inside a process ----------------------------------------------------------------------------------------------

kind("segmentation fault in a step")(partial(one_rank, action="segfault", points=STEP_POINTS))
kind("abort in a step")(partial(one_rank, action="abort", points=STEP_POINTS))
kind("a rank exits with 0")(partial(one_rank, action="exit with 0", points=STEP_POINTS))
kind("an exception in a rank")(partial(one_rank, action="raise", points=STEP_POINTS, traceback_allowed=True))
kind("a loader thread raises")(partial(one_rank, action="raise", points=["loader"], traceback_allowed=True))


@kind("the GIL held for ever", world_sizes=SEVERAL)
def gil_held(fault: Fault) -> Happened:
    attempt = fault.start(fault.random.choice(STEP_POINTS), "hold the GIL", *SHORT_TIMEOUT)
    attempt.end(stuck=[held_rank(attempt)])
    return Happened(attempt.end_s is not None, attempt.end_s)


@kind("a loader thread hangs")
def loader_hangs(fault: Fault) -> Happened:
    """The others end and so does its rank; a single rank ends by a SIGTERM, within the grace time."""
    attempt = fault.start("loader", "hang", *SHORT_TIMEOUT, "--distributed.stop_grace_s=3")
    if fault.processes == 1 and attempt.reach():
        attempt.signal(signal.SIGTERM)
    attempt.end()
    return Happened(attempt.end_s is not None, attempt.end_s)


@kind("the clock set back")
def clock_set_back(fault: Fault) -> Happened:
    attempt = fault.start(fault.random.choice(STEP_POINTS), "set the clock back", rank=0)
    attempt.end(goes_on=True)
    return Happened(attempt.end_s is not None, None, went_on(attempt))


# ---- killed while something is written -----------------------------------------------------------------------------

for _what, _point, _most in (
    ("a checkpoint", "checkpoint", 20),
    ("the rename of a checkpoint", "checkpoint's rename", 1),
    ("a metrics line", "metrics line", 1),
    ("status.json", "status", 1),
    ("an evaluation", "evaluation", 1),
    ("a rehearsal", "rehearsal", 1),
    ("the choice of a checkpoint", "choice of a checkpoint", 1),
    ("the cut of the metrics", "cut of the metrics", 1),
):

    def _killed_in(fault: Fault, point: str = _point, most: int = _most) -> Happened:
        attempt = fault.start(point, "SIGKILL", nth=fault.random.randint(1, most))
        attempt.end(hand_on=fault.random.random() < 0.5)
        return Happened(attempt.end_s is not None, attempt.end_s)

    kind(f"killed in {_what}")(_killed_in)


@kind("killed in the last step of an epoch")
def killed_at_the_end_of_an_epoch(fault: Fault) -> Happened:
    spe = fault.scene.stage.shape.steps_per_epoch
    last = (fault.saved_step // spe + 1) * spe
    point = fault.random.choice([*STEP_POINTS, "metrics line"])
    fault.saved_step = max(fault.saved_step, last - WINDOW_STEPS)  # so that the attempt lives until then
    attempt = fault.start(point, "SIGKILL", step=last)
    attempt.end()
    return Happened(attempt.end_s is not None, attempt.end_s)


# ---- the disk ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def full_disk(scene: Scene, left_bytes: int) -> Iterator[None]:
    balloon = scene.runs / "balloon"
    with balloon.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(balloon, balloon.stat().st_size - left_bytes)
    try:
        yield
    finally:
        balloon.unlink()


@contextlib.contextmanager
def unwritable(scene: Scene) -> Iterator[None]:
    places = [scene.run, *filter(Path.is_dir, [scene.run / "checkpoints"])]
    for place in places:
        place.chmod(0o500)
    try:
        yield
    finally:
        for place in places:
            place.chmod(0o755)


@contextlib.contextmanager
def vanished(scene: Scene) -> Iterator[None]:
    away = scene.runs / "away"
    scene.run.rename(away)
    try:
        yield
    finally:
        if scene.run.exists():
            shutil.move(scene.run, scene.directory / f"left-{len(scene.attempts)}")
        away.rename(scene.run)


def broken_disk(fault: Fault, broken: Callable[[Fault], contextlib.AbstractContextManager[None]]) -> Happened:
    attempt = fault.start("forward", "hold", rank=0)
    if not attempt.reach():
        return not_reached(attempt)
    with broken(fault):
        attempt.open()
        attempt.end()
    problems = [] if any(attempt.codes) else ["the run says that it ended well although it could not write"]
    return Happened(True, attempt.end_s, problems)


@kind("a full disk", needs="root", person=True)
def disk_full(fault: Fault) -> Happened:
    return broken_disk(fault, lambda each: full_disk(each.scene, 4096 * each.random.choice([0, 1, 4])))


kind("an unwritable run directory", person=True)(lambda fault: broken_disk(fault, lambda each: unwritable(each.scene)))
kind("a vanished run directory", person=True)(lambda fault: broken_disk(fault, lambda each: vanished(each.scene)))


def damaged_checkpoint(fault: Fault, damage: Callable[[Path, random.Random], None]) -> Happened:
    """Stopped or killed, and then the newest checkpoint is damaged: the next attempt takes the one before."""
    action = fault.random.choice(["SIGTERM", "SIGKILL"])
    attempt = fault.start("forward", action, "--train.save_every_steps=1", rank=0, step=fault.saved_step + 4)
    attempt.end()
    saved = checkpoint.numbered(fault.scene.run)
    if len(saved) < 2:
        return Happened(False)
    damage(saved[-1][1], fault.random)
    return Happened(True)


def _flip(path: Path, draw: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def _make_directory(path: Path, draw: random.Random) -> None:
    path.unlink()
    path.mkdir()


for _name, _damage in {
    "cut": lambda path, draw: os.truncate(path, draw.randrange(1, path.stat().st_size)),
    "with a flipped bit": _flip,
    "empty": lambda path, draw: os.truncate(path, 0),
    "a directory": _make_directory,
}.items():
    kind(f"the newest checkpoint {_name}")(partial(damaged_checkpoint, damage=_damage))


# ---- shards and caches ---------------------------------------------------------------------------------------------


def _shards(fault: Fault) -> list[Path]:
    fault.scene.own_corpus()
    return sorted(fault.scene.corpus.train.glob("*.tar"))


@kind("shards damaged while they are read", person=True)
def shards_damaged(fault: Fault) -> Happened:
    """Bytes in the files that the ranks have open; repaired once the run has ended with a sentence."""
    shards = _shards(fault)
    attempt = fault.start("forward", "hold", step=fault.saved_step + 1)
    if not attempt.reach():
        return not_reached(attempt)
    good = {path: path.read_bytes() for path in shards}
    for path, data in good.items():
        with path.open("r+b") as file:
            for _ in range(8):
                file.seek(fault.random.randrange(len(data)))
                file.write(fault.random.randbytes(2_000)[: len(data) - file.tell()])
    attempt.open()
    attempt.end()
    for path, data in good.items():
        path.write_bytes(data)
    return Happened(True, attempt.end_s)


@kind("a shard missing", person=True)
def shard_missing(fault: Fault) -> Happened:
    def repair(path: Path) -> None:
        path.with_suffix(".away").rename(path)

    return _at_the_start(fault, lambda path: path.rename(path.with_suffix(".away")), repair)


@kind("a shard replaced", person=True)
def shard_replaced(fault: Fault) -> Happened:
    """By one of the same size with other bytes in it, as of another corpus."""
    shards = _shards(fault)
    good = {path: path.read_bytes() for path in shards}

    def replace(path: Path) -> None:
        path.unlink()
        path.write_bytes(good[path][1536:] + good[path][:1536])

    def repair(path: Path) -> None:
        path.unlink()
        path.write_bytes(good[path])

    return _at_the_start(fault, replace, repair)


def _at_the_start(fault: Fault, damage: Callable[[Path], object], repair: Callable[[Path], object]) -> Happened:
    """A shard is damaged between two attempts; the next one ends with a sentence, and the one after it goes on."""
    path = fault.random.choice(_shards(fault))
    damage(path)
    fault.start().end()  # well if it has not read the shard in its few steps
    repair(path)
    return Happened(True)


def damaged_cache(fault: Fault, damage: Callable[[Path], object]) -> Happened:
    """A node-local copy of a shard is damaged between two attempts."""
    scene = fault.scene
    cache = scene.directory / "cache"
    option = f"--data.cache_dir={cache}"
    if not cache.exists():
        scene.start(fault.processes, None, option, f"--train.stop_at_step={fault.saved_step + 1}").end()
        fault.saved_step = scene.saved_step()
    copies = sorted(cache.glob("*.tar"))
    if not copies:
        return Happened(False)
    damage(fault.random.choice(copies))
    attempt = fault.start("", "", option)
    attempt.end()
    if any(attempt.codes):  # it has said so: a person removes the copies
        shutil.rmtree(cache)
    return Happened(True)


def _overwrite(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[1536:] + data[:1536])


kind("a node-local copy cut", person=True)(lambda fault: damaged_cache(fault, lambda path: os.truncate(path, 1_000)))
kind("a node-local copy missing", person=True)(lambda fault: damaged_cache(fault, Path.unlink))
kind("a node-local copy replaced", person=True)(lambda fault: damaged_cache(fault, _overwrite))


# ---- the network between two hosts ---------------------------------------------------------------------------------


@contextlib.contextmanager
def two_hosts(scene: Scene, processes: int) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Network namespaces for half of the ranks each, with a link between them: (environment, the link's ends)."""
    tag = f"{os.getpid()}-{next(_networks)}"
    hosts, links = [f"faults-{tag}-{end}" for end in "ab"], [f"f{tag}{end}" for end in "ab"]

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        for host in hosts:
            ip("netns", "add", host)
            ip("-n", host, "link", "set", "lo", "up")
        ip("link", "add", links[0], "netns", hosts[0], "type", "veth", "peer", "name", links[1], "netns", hosts[1])
        for number, (host, link) in enumerate(zip(hosts, links, strict=True), 1):
            ip("-n", host, "link", "set", link, "name", "faults0")
            ip("-n", host, "addr", "add", f"10.99.0.{number}/24", "dev", "faults0")
            ip("-n", host, "link", "set", "faults0", "up")
        scene.network = [hosts[rank * 2 // processes] for rank in range(processes)]
        yield {"MASTER_ADDR": "10.99.0.1", "GLOO_SOCKET_IFNAME": "faults0"}, ["-n", hosts[1]]
    finally:
        scene.network = []
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host], check=False, capture_output=True)


def network_cut(fault: Fault, *, mended_s: float | None) -> Happened:
    with two_hosts(fault.scene, fault.processes) as (environment, host):
        attempt = fault.start(fault.random.choice(STEP_POINTS), "hold", *SHORT_TIMEOUT, environment=environment)
        if not attempt.reach():
            return not_reached(attempt)
        subprocess.run(["ip", *host, "link", "set", "faults0", "down"], check=True)
        attempt.open()
        if mended_s is not None:
            time.sleep(mended_s)
            subprocess.run(["ip", *host, "link", "set", "faults0", "up"], check=True)
        attempt.end(goes_on=mended_s is not None)
    return Happened(True, None if mended_s is not None else attempt.end_s)


kind("a network cut and mended", world_sizes=SEVERAL, needs="root")(
    lambda fault: network_cut(fault, mended_s=fault.random.uniform(0.1, 1.5))
)
kind("a network cut for good", world_sizes=SEVERAL, needs="root")(lambda fault: network_cut(fault, mended_s=None))


# ---- Comet ---------------------------------------------------------------------------------------------------------


def comet(fault: Fault, misbehave: Callable[[StandIn], object], *, once: bool) -> Happened:
    """Comet misbehaves while a run is tracked; later it has all of it, and the run has noticed nothing."""
    stand_in = StandIn()
    place = {"COMET_URL_OVERRIDE": stand_in.url, "COMET_API_KEY": "k" * 25, "NO_PROXY": "127.0.0.1"}
    try:
        misbehave(stand_in)
        attempt = fault.start("", "", "--tracking.mode=online", environment=place)
        attempt.end()
        problems = went_on(attempt)
        stand_in.holds, stand_in.delay_s = False, 0.0
        stand_in.refusals.clear()
        command = [sys.executable, "-m", "ddp_asr.tracking", str(fault.scene.run), "--mode", "online"]
        for _ in range(30):  # the process of the run may still be ending, which takes it 20 s
            done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | place, capture_output=True, text=True)
            if done.returncode == 0:
                break
            time.sleep(1.0)
        step = max(line["step"] for line in tiny.metrics(fault.scene.run) if line["kind"] == "train")
        problems += comparison.of_values(Counter(stand_in.counts()), fault.scene.stage.shape, step, once=once)
    finally:
        stand_in.close()
    (fault.scene.run / "tracking.json").unlink(missing_ok=True)  # the next stand-in knows nothing
    return Happened(True, None, problems)


kind("Comet answers late")(lambda fault: comet(fault, lambda each: setattr(each, "delay_s", 1.0), once=True))
kind("Comet answers wrong")(
    lambda fault: comet(fault, lambda each: each.refusals.update({"experiment/metric": 3, "log-other": 2}), once=False)
)
kind("Comet never answers")(lambda fault: comet(fault, lambda each: setattr(each, "holds", True), once=False))


@kind("the tracking process killed")
def tracking_killed(fault: Fault) -> Happened:
    attempt = fault.start("forward", "hold", "--tracking.mode=offline", rank=0)
    if not attempt.reach():
        return not_reached(attempt)
    for pid in tiny.children(attempt.pids[0]):
        attempt.signal(signal.SIGKILL, pid)
    attempt.open()
    attempt.end(goes_on=True)
    return Happened(True, None, went_on(attempt))


# ---- two at a run --------------------------------------------------------------------------------------------------


@kind("a second start while the first trains")
def second_start(fault: Fault) -> Happened:
    attempt = fault.start("forward", "hold", rank=0)
    if not attempt.reach():
        return not_reached(attempt)
    scene = fault.scene
    first = len(scene.attempts)
    second = scene.start(1, None, "--train.stop_at_step=99")
    second.end()
    scene.attempts[first:] = []
    attempt.open()
    attempt.end(goes_on=True)
    problems = went_on(attempt)
    if second.codes != [2] or "another run holds" not in second.output:
        problems.append(f"the second start was not refused: {second.codes} {second.errors}")
    return Happened(True, None, problems)


@kind("a frozen rank 0 wakes after the take-over")
def wakes_after_the_take_over(fault: Fault) -> Happened:
    """The next attempt of the same job takes the run over; the frozen one must write nothing when it continues."""
    job = {"SLURM_JOB_ID": str(fault.random.randrange(10**6)), "SLURM_RESTART_COUNT": str(len(fault.scene.attempts))}
    frozen = fault.start(fault.random.choice(STEP_POINTS), "hold", rank=0, environment=job)
    if not frozen.reach():
        return not_reached(frozen)
    pids = frozen.pids
    frozen.signal(signal.SIGSTOP, pids[0])
    frozen.signal(signal.SIGKILL, *pids[1:])
    frozen.open()
    job["SLURM_RESTART_COUNT"] = str(len(fault.scene.attempts))
    taking = fault.start("forward", "hold", rank=0, step=fault.scene.saved_step() + 2, environment=job)
    reached = taking.reach()
    frozen.signal(signal.SIGCONT, pids[0])
    frozen.end()
    if reached:
        taking.open()
    taking.end(goes_on=True)
    problems = went_on(taking) if reached else ["the take-over did not train"]
    if frozen.codes[0] == 0:
        problems.append("the process that had lost its lease ended as if all were well")
    return Happened(reached, None, problems)
