"""A corpus, undisturbed runs, and a run that faults happen to, one attempt after the other.

    stage = Stage(directory)                # corpus, and an undisturbed run for each number of processes
    scene = Scene(stage, directory)         # one run
    attempt = scene.start(3, scene.trigger("forward", "hold", rank=1, step=4))     # an attempt on 3 processes
    attempt.reach(); attempt.signal(signal.SIGKILL); attempt.open(); attempt.end()
    scene.losses(complete=False)

Ranks are forked from a server that has imported torch (tests/tiny_training.py), so that an attempt does not pay for the
start of Python and torch. Where the agent of torchrun is a victim, it is the real one, forked, too.
"""

import contextlib
import ctypes
import hashlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import soundfile
import yaml

from ddp_asr.data.index import read_index
from ddp_asr.ranks.signals import STOP_SIGNALS, StopRequest
from synthetic_speech import corpus
from synthetic_speech.corpus import TEST_SPEAKERS, TRAIN_SPEAKERS, Espeak, record
from tests import tiny_training as tiny
from tests.conftest import REPOSITORY
from tests.faults import comparison
from tests.faults.hooks import Hooks, Trigger
from tests.tiny_speech import manifest, shard

WORLD_SIZES = (1, 2, 3, 5, 7, 8)
EVALUATE_EVERY_STEPS = 5
# 8 micro-batches of a few utterances, for up to 8 processes.
SETTINGS: dict[str, Any] = {
    **yaml.safe_load(tiny.CONFIG),
    "vocabulary": {},
    "batch": {"max_seconds": 2.0, "micro_batches": 8},
    "encoder": {"conv_channels": 2, "residual_blocks": 1, "rnn_layers": 1, "rnn_size": 8, "dropout": 0.2},
    "data": {"threads": 1, "prefetch": 1, "test_max_seconds": 0.5, "max_bad_samples": 0},
    "distributed": {"timeout_s": 60, "stop_grace_s": 30},
}
SETTINGS["train"] = {**SETTINGS["train"], "epochs": 4, "eval_every_steps": EVALUATE_EVERY_STEPS, "keep_last": 99}
END_S = 90.0  # from a fault to the end of all processes, far above what it takes; later it counts as a hang
TRAINING_S = 600.0  # the same for an attempt to which nothing has happened
PR_SET_PDEATHSIG = 1
_ports = itertools.count(20_000 + os.getpid() % 50 * 200)  # below those that the kernel gives to connections


def port() -> str:
    while True:
        number = 20_000 + (next(_ports) - 20_000) % 12_000
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", number))
            return str(number)


# ---- corpus and undisturbed runs -----------------------------------------------------------------------------------


class Stage:
    """What all runs have in common: made once for a state of the code, and kept for the next start of the program."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.corpus = directory, tiny.TinyCorpus(directory / "corpus")
        self._lock = threading.Lock()
        os.environ["TINY_TRAINING_LOGS"] = str(directory / "logs")
        code = _code()
        if not (directory / "code").exists() or (directory / "code").read_text() != code:
            shutil.rmtree(directory, ignore_errors=True)
            self._make_corpus()
            (directory / "code").write_text(code)
        (directory / "logs").mkdir(exist_ok=True)
        self.shape = self._shape()

    def _make_corpus(self) -> None:
        home = self.corpus.directory
        home.mkdir(parents=True)
        (home / "tiny.yaml").write_text(yaml.safe_dump(SETTINGS))
        speak_words(home)
        for name in ("train", "test"):
            shard(home / f"{name}.jsonl", home / "shards" / name, "--shard-mb", "0.3")

    def undisturbed(self, processes: int) -> Path:
        """A run on so many processes to which nothing happens, with a checkpoint of every step."""
        run = self.directory / "undisturbed" / f"w{processes}"
        with self._lock:
            if not (run / "status.json").exists() or tiny.status(run)["state"] != "done":
                shutil.rmtree(run, ignore_errors=True)
                tiny.train(
                    self.corpus.arguments(run.parent, run.name, "--train.save_every_steps=1"),
                    processes,
                    MASTER_PORT=port(),
                )
        return run

    def _shape(self) -> comparison.Shape:
        run = self.undisturbed(1)
        epochs = [line for line in tiny.metrics(run) if line["kind"] == "epoch"]
        index = read_index([str(self.corpus.train)])
        left_out = {line["key"] for line in tiny.read_lines(run / "left_out.jsonl")}
        return comparison.Shape(
            steps_per_epoch=epochs[0]["step"],
            steps=epochs[-1]["step"],
            evaluate_every_steps=EVALUATE_EVERY_STEPS,
            micro_batches=SETTINGS["batch"]["micro_batches"],
            keys=frozenset({index.key(row) for row in range(len(index))} - left_out),
        )


def _code() -> str:
    """A checksum of the code that the undisturbed runs are made by."""
    paths = [*sorted((REPOSITORY / "ddp_asr").rglob("*.py")), Path(__file__)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def speak_words(directory: Path) -> None:
    """Manifests of single words that espeak-ng speaks, half a second each: sentences would cost each step a second."""
    espeak, words = Espeak(), [*corpus.ANIMALS, *corpus.VERBS, *corpus.PLACES, *corpus.LOOKS]
    for name, utterances, speakers in (("train", 56, TRAIN_SPEAKERS[:2]), ("test", 8, TEST_SPEAKERS[:1])):
        lines = []
        for number in range(utterances):
            speaker, word = speakers[number * len(speakers) // utterances], words[number % len(words)]
            if number * len(speakers) % utterances < len(speakers):
                espeak.choose(speaker.voice)
            speech = espeak.speak(word, speaker.pitch, speaker.words_per_minute)
            file = f"{name}-{number:02d}.flac"
            soundfile.write(directory / file, record(speech, espeak.rate_hz, peak_db=-6), 16_000, subtype="PCM_16")
            lines.append({"audio_filepath": file, "text": word})
        manifest(directory / f"{name}.jsonl", lines)


# ---- an attempt ----------------------------------------------------------------------------------------------------


@dataclass
class Attempt:
    """The processes of one attempt: its ranks, or torchrun's agent that has forked them."""

    ranks: tiny.Ranks
    trigger: Trigger | None = None
    agent: Any = None
    ended_at_s: float | None = None
    forked_by_agent: Sequence[int] = ()  # the agent's ranks, once a fault has been reached
    _opened: int = -1  # the end of a pipe that the held rank reads

    @property
    def pids(self) -> list[int]:
        """Of the ranks, in their order if there is no agent."""
        if self.agent is not None:
            return sorted(tiny.children(self.agent.pid))
        return [process.pid for process in self.ranks.processes]

    @property
    def fired_at_s(self) -> float | None:
        """When the fault happened, by the monotonic clock; None before, and where its point was never reached."""
        note = self.trigger.pipes / "fired" if self.trigger is not None else None
        return float(note.read_text()) if note is not None and note.exists() else None

    @property
    def end_s(self) -> float | None:
        """Seconds from the fault to the end of all processes."""
        fired_at_s = self.fired_at_s
        return None if fired_at_s is None or self.ended_at_s is None else self.ended_at_s - fired_at_s

    @property
    def codes(self) -> list[int]:
        return [process.exitcode for process in self.ranks.processes]

    @property
    def output(self) -> str:
        return self.ranks.output

    @property
    def errors(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith("error: ")]

    def _alive(self) -> list[Any]:
        return [process for process in self.ranks.processes if process.exitcode is None]

    def reach(self) -> bool:
        """Waits until the trigger holds its rank; False if the processes have ended without it."""
        deadline_s = time.monotonic() + TRAINING_S
        while self.fired_at_s is None and self._alive() and time.monotonic() < deadline_s:
            time.sleep(0.01)
        self.forked_by_agent = self.pids if self.agent is not None else ()
        return self.fired_at_s is not None

    def open(self) -> None:
        """Lets the held rank go on."""
        assert self.trigger is not None
        # For both ways, so that neither opening nor writing depends on a reader that may be dead.
        self._opened = os.open(self.trigger.pipes / "opened", os.O_RDWR | os.O_NONBLOCK)
        os.write(self._opened, b".")

    def signal(self, number: int, *pids: int) -> None:
        """Sends a signal, to all ranks that run if no pids are given."""
        running = {process.pid for process in self._alive()}
        for pid in pids or [pid for pid in self.pids if self.agent is not None or pid in running]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def end(
        self, *, goes_on: bool = False, hand_on: bool = False, stuck: Sequence[int] = (), but: Sequence[int] = ()
    ) -> None:
        """Waits until all have ended.

        Args:
            goes_on: the fault ends nothing, so all may take the time of a training.
            hand_on: as torchrun does, send SIGTERM to the others once one has failed.
            stuck: pids that end only by SIGKILL, which they get once all others have ended.
            but: pids that are not waited for.

        Raises:
            Hang: a process that should have ended by itself has not; it is killed.
        """
        began_s = time.monotonic()
        while True:
            running = self._alive()
            left = [process.pid for process in running if process.pid not in but]
            left += [pid for pid in self.forked_by_agent if tiny.is_alive(pid)]
            since_s = time.monotonic() - (self.fired_at_s or began_s)
            if not left:
                break
            if running and all(process.pid in stuck for process in running):
                self.signal(signal.SIGKILL, *stuck)
            elif since_s > (TRAINING_S if goes_on or self.fired_at_s is None else END_S):
                self.kill()
                raise Hang(f"{len(left)} process(es) did not end within {since_s:.0f} s: {self.output[-500:]}")
            elif hand_on and any(process.exitcode for process in self.ranks.processes):
                self.signal(signal.SIGTERM, *(process.pid for process in running))
                hand_on = False
            time.sleep(0.02)
        self.ended_at_s = time.monotonic()
        if not but and self._opened >= 0:
            os.close(self._opened)
            self._opened = -1

    def kill(self) -> None:
        """Ends what is left; nothing where all have ended, whose pids may be those of others by now."""
        if self.ended_at_s is None:
            if ranks := [*self.forked_by_agent, *(self.pids if self.agent is not None else [])]:
                self.signal(signal.SIGKILL, *ranks)
            self.ranks.kill()
            self.ended_at_s = time.monotonic()


class Hang(Exception):
    """A process that did not end."""


class Scene:
    """One run, in a directory of its own, and the attempts at it."""

    def __init__(self, stage: Stage, directory: Path) -> None:
        self.stage, self.directory = stage, directory
        self.runs, self.run, self.ledger = directory / "runs", directory / "runs" / "run", directory / "ledger"
        self.corpus = stage.corpus
        self.attempts: list[int] = []  # number of processes of each
        self.started: list[Attempt] = []
        self.mounted = False
        self.network: list[str] = []
        for each in (self.runs, self.ledger):
            each.mkdir(parents=True)

    # ---- attempts ----

    def start(
        self, processes: int, trigger: Trigger | None = None, *options: str, agent: bool = False, **environment: str
    ) -> Attempt:
        """Starts the next attempt."""
        if trigger is not None:
            trigger.make_pipes()
        self.attempts.append(processes)
        patch = Hooks(self.ledger, len(self.attempts), trigger, ",".join(self.network))
        arguments = self.corpus.arguments(self.runs, "run", *options)
        if agent:
            process, log = start_agent(arguments, processes, patch)
            self.started.append(Attempt(tiny.Ranks([process], [log]), trigger, process))
        else:
            place = {"MASTER_PORT": port(), **environment}
            self.started.append(Attempt(tiny.start(arguments, processes, [patch], **place), trigger))
        return self.started[-1]

    def trigger(self, point: str, action: str, *, rank: int, step: int, nth: int = 1) -> Trigger:
        return Trigger(point, action, self.directory / f"pipes-{len(self.attempts)}", step, nth, rank)

    def finish(self, processes: int) -> Attempt:
        """An attempt without a fault, to the end of the run."""
        attempt = self.start(processes)
        attempt.end()
        return attempt

    def saved_step(self) -> int:
        found = comparison.newest(self.run)
        return 0 if found is None else found.step

    def losses(self, *, complete: bool) -> list[str]:
        """What differs from the undisturbed run, see comparison.py."""
        same = len(set(self.attempts)) == 1
        reference = self.stage.undisturbed(self.attempts[-1])
        return comparison.losses(self.run, self.ledger, reference, self.stage.shape, complete=complete, same_bits=same)

    def make_archive(self) -> None:
        """Makes the Comet archive of the run, as `ddp-asr tracking RUN` does, in a forked process."""
        process = tiny._processes.Process(target=_make_archive, args=(self.run,))
        process.start()
        process.join()

    # ---- the place ----

    def own_corpus(self) -> None:
        """A copy of the shards, to damage."""
        if self.corpus is self.stage.corpus:
            self.corpus = tiny.copy_of(self.stage.corpus, self.directory / "corpus")

    def mount(self) -> None:
        """Puts the runs on a file system of their own, which can be filled; before the first attempt."""
        self.runs.mkdir(exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "faults", str(self.runs)], check=True)
        self.mounted = True

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", str(self.runs)], check=False)


def _make_archive(run: Path) -> None:
    from ddp_asr.tracking import main

    with (run.parent / "archive.log").open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    raise SystemExit(main([str(run)]))


# ---- torchrun's agent ----------------------------------------------------------------------------------------------


def start_agent(arguments: Sequence[str], processes: int, patch: Hooks) -> tuple[Any, Path]:
    """torchrun's agent in a forked process, which forks the ranks: what torchrun does, without the start of Python."""
    log = tiny._new_log(0)
    agent = tiny._processes.Process(target=_run_agent, args=(list(arguments), processes, patch, log))
    agent.start()
    return agent, log


def _run_agent(arguments: list[str], processes: int, patch: Hooks, log: Path) -> None:
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.chdir(REPOSITORY)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=str(os.getpid()),
        max_restarts=0,
        start_method="fork",
        signals_to_handle=",".join(number.name for number in STOP_SIGNALS),
    )
    try:
        elastic_launch(config, _run_rank_of_agent)(arguments, patch)
    except (SignalException, ChildFailedError):
        raise SystemExit(1) from None


def _run_rank_of_agent(arguments: list[str], patch: Hooks) -> None:
    # torch has asked the kernel for a SIGINT to this process when the agent dies; under torchrun nothing comes.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, 0)
    for number in STOP_SIGNALS:  # the agent's own handlers came along
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for each in (tiny.without_pictures, patch):
        each()
    from ddp_asr.errors import run_entry_point
    from ddp_asr.train import main

    agent, signals = os.getppid(), list[str]()
    request = StopRequest.request

    def noting(stop: StopRequest, reason: str) -> None:
        signals.extend([reason] * (not reason.startswith("train.stop_at_step")))
        request(stop, reason)

    StopRequest.request = noting  # type: ignore[method-assign, assignment]
    code = run_entry_point(partial(main, arguments))
    # A rank that returns stays until the agent has its result. An agent that stops, or is gone, does not ask for it. A
    # rank may stop because others have seen that the agent is gone, before it sees it itself.
    if code or signals or os.getppid() != agent:
        os._exit(code)
