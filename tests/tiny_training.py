"""Whole trainings in a second: a tiny corpus, a tiny model, and real processes that run `ddp_asr.train`.

    ranks = start(corpus.arguments(runs, "mine"), processes=3)       # forked from a server that has imported torch
    assert ranks.wait() == [0, 0, 0]
    torchrun = start_torchrun(arguments, processes=2)                # the real command
    final_state(runs / "mine"), metrics(runs / "mine")               # what a run is compared by

`start` gives each process the environment that torchrun would give it, and runs the same `main`. A patch is a callable
that a rank runs first: it holds a rank at a step, breaks a loss, or writes down which utterances it was given.
"""

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch
import yaml

from ddp_asr.ranks.signals import STOP_SIGNALS
from ddp_asr.runs import checkpoint
from tests import tiny_encoders
from tests.conftest import REPOSITORY
from tests.tiny_recogniser import noises
from tests.tiny_speech import shard

# Everything random is on: masks, speeds, noise, dropout and a moving average. K = 4, 4 steps an epoch, 12 in all.
CONFIG = """
vocabulary: {symbols: " ab'"}
data: {threads: 0, test_max_seconds: 2.2}
batch: {max_seconds: 2.2, micro_batches: 4}
features: {mel_bands: 16, n_fft: 512}
augment: {frequency_mask_bands: 4, time_mask_share: 0.1, speeds: [0.9, 1.0, 1.1], noise: {share: 0.5}}
encoder: {conv_channels: 4, residual_blocks: 1, rnn_layers: 2, rnn_size: 16, dropout: 0.2}
optim: {learning_rate: 3.0e-3, ema_decay: 0.9}
train: {epochs: 3, precision: fp32, eval_every_steps: 5, save_every_steps: 3, save_every_min: 0}
tracking: {mode: "off", samples: 2}
"""
STEPS_PER_EPOCH, STEPS = 4, 12

# Options that choose each registered tokeniser.
VOCABULARIES: dict[str, list[str]] = {
    "characters": [],
    "pieces": ["--vocabulary.kind=pieces", "--vocabulary.size=6"],
}

# Options that turn on each term of the objective: alone, with those that need it, and all together.
TWO_VIEWS = "--objective.consistency_weight=0.3"
SHORT_CONTEXT = "--objective.short_context_s=0.1,0.4"
INTERMEDIATE = "--objective.intermediate_weight=0.3"
OBJECTIVES = {
    "one view": [],
    "two views": [TWO_VIEWS],
    "a second view of short context": [TWO_VIEWS, SHORT_CONTEXT],
    "an intermediate loss": [INTERMEDIATE],
    "all of it": [TWO_VIEWS, SHORT_CONTEXT, INTERMEDIATE],
}

LIMIT_S = 120.0  # for a whole run, far above what one takes
TIMES = (
    "time_s",
    "audio_s_per_s",
    "process_audio_s_per_s",
    "data_wait",
    "rank_wait",
    "gpu_memory_gb",
    "host_memory_gb",
)


# ---- the corpus ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TinyCorpus:
    """Shards to train and to test on, and settings for them."""

    directory: Path

    @property
    def train(self) -> Path:
        return self.directory / "shards" / "train"

    @property
    def test(self) -> Path:
        return self.directory / "shards" / "test"

    def arguments(self, runs: Path, name: str = "run", *more: str, kind: str | None = None) -> list[str]:
        """The command line of `ddp_asr.train`; later settings win. `kind`: of the encoder, in tiny_encoders' size."""
        config = "tiny.yaml" if kind is None else f"tiny-{kind}.yaml"
        data = [f"--data.train={self.train}", f"--data.test={self.test}"]
        return ["--config", str(self.directory / config), f"--run.dir={runs}", f"--run.name={name}", *data, *more]


def make_corpus(directory: Path) -> TinyCorpus:
    """26 utterances to train on, 7 to test on, 0.5 to 0.9 s each."""
    (directory / "tiny.yaml").write_text(CONFIG)
    for kind, (encoder, *_) in tiny_encoders.SETTINGS.items():
        tree = {**yaml.safe_load(CONFIG), "encoder": {"kind": kind, "dropout": 0.2, **encoder}}
        (directory / f"tiny-{kind}.yaml").write_text(yaml.safe_dump(tree))
    for name, utterances, seed in (("train", 26, 0), ("test", 7, 1)):
        random = np.random.default_rng(seed)
        lines = []
        for number in range(utterances):
            file = f"{name}-{number:02d}.flac"
            soundfile.write(directory / file, noises(random.uniform(0.5, 0.9), seed=100 * seed + number), 16_000)
            text = "".join(random.choice(list("ab '"), size=4)) + "a"
            lines.append(json.dumps({"audio_filepath": file, "text": text}))
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        shard(directory / f"{name}.jsonl", directory / "shards" / name)
    return TinyCorpus(directory)


def mixing(directory: Path) -> list[str]:
    """Options that turn on every augmentation of waveforms, with recordings that are made in the directory."""
    for name, recordings, seconds in (("noise", 5, 0.7), ("rooms", 4, 0.1)):
        (directory / name).mkdir(parents=True)
        for number in range(recordings):
            waveform = noises(seconds * (1 + number / 4), seed=1_000 + number).astype(float)
            if name == "rooms":
                waveform *= np.exp(-np.arange(len(waveform)) / 400)
            soundfile.write(directory / name / f"{number}.flac", waveform.astype(np.int16), 16_000)
        shard(directory / name, directory / "shards" / name, "--no-text")
    return [
        *(f"--data.{name}={directory / 'shards' / name}" for name in ("noise", "rooms")),
        *(f"--augment.{name}.share=0.5" for name in ("pitch", "room", "background", "volume")),
    ]


# ---- processes -----------------------------------------------------------------------------------------------------

_processes = multiprocessing.get_context("forkserver")
# torch._dynamo is what torch's optimisers import when the first one is made; it takes two seconds.
_processes.set_forkserver_preload(["ddp_asr.training.session", "ddp_asr.train", "tests.tiny_training", "torch._dynamo"])

Patch = Callable[[], None]


@dataclass
class Ranks:
    """The processes of a run."""

    processes: list
    logs: list[Path]

    def wait(self, limit_s: float = LIMIT_S) -> list[int]:
        """Exit statuses, by rank; fails where one does not end."""
        deadline_s = time.monotonic() + limit_s
        for process in self.processes:
            process.join(max(0.0, deadline_s - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        if None in codes:
            self.kill()
            raise AssertionError(f"ranks did not end within {limit_s} s: {codes}\n{self.output}")
        return codes

    def succeed(self) -> str:
        """Waits for 0 on every rank; returns what rank 0 printed."""
        codes = self.wait()
        assert codes == [0] * len(codes), self.output
        return self.logs[0].read_text()

    def fail(self, limit_s: float = LIMIT_S) -> str:
        """Waits for a failure of every rank, with one sentence in all; returns the sentence."""
        codes = self.wait(limit_s)
        assert all(codes), self.output
        sentences = re.findall(r"^error: (.*)$", self.output, flags=re.MULTILINE)
        assert len(sentences) == 1 and "Traceback" not in self.output, self.output
        return sentences[0]

    @property
    def output(self) -> str:
        return "\n".join(log.read_text() for log in self.logs)

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def start(arguments: Sequence[str], processes: int = 1, patches: Sequence[Patch] = (), **environment: str) -> Ranks:
    """Runs `ddp_asr.train` on so many ranks of one host, as torchrun would; on CPUs if `environment` is silent."""
    port = str(free_port())
    ranks, logs = [], []
    for rank in range(processes):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        # Bits are compared, and more ranks are started than a machine has GPUs: on CPUs everywhere.
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": "", **environment}
        logs.append(_new_log(rank))
        ranks.append(_processes.Process(target=_run_rank, args=(list(arguments), place, logs[-1], list(patches))))
        ranks[-1].start()
    return Ranks(ranks, logs)


def train(arguments: Sequence[str], processes: int = 1, patches: Sequence[Patch] = (), **environment: str) -> str:
    """A whole run, or an attempt, that ends well; returns what rank 0 printed."""
    return start(arguments, processes, patches, **environment).succeed()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _new_log(rank: int) -> Path:
    directory = Path(os.environ["TINY_TRAINING_LOGS"])
    log = directory / f"{time.monotonic_ns()}-rank-{rank}.txt"
    log.touch()
    return log


def _run_rank(arguments: list[str], place: dict[str, str], log: Path, patches: list[Patch]) -> None:
    os.environ.update(place)
    os.chdir(REPOSITORY)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for patch in [without_pictures, *patches]:
        patch()
    from ddp_asr.errors import run_entry_point
    from ddp_asr.train import main

    raise SystemExit(run_entry_point(partial(main, arguments)))


class Torchrun:
    """The real command, in a process group of its own: torchrun, or `ddp-asr COMMAND`, which is one, too."""

    def __init__(
        self, arguments: Sequence[str], processes: int, module: str = "ddp_asr.train", command: str = ""
    ) -> None:
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        launcher += [f"--signals-to-handle={','.join(number.name for number in STOP_SIGNALS)}", "-m", module]
        if command:
            launcher = ["ddp_asr", command, f"--processes={processes}"]
        self.processes = processes
        self.popen = subprocess.Popen(
            [sys.executable, "-m", *launcher, *arguments],
            cwd=REPOSITORY,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        self.lines.extend(iter(self.popen.stdout.readline, ""))  # until the last rank has closed its end

    def ranks(self) -> list[int]:
        """Process ids of the ranks, once all are there."""
        pids = wait_until(lambda: len(found := children(self.popen.pid)) == self.processes and found, "ranks")
        return sorted(pids)

    def wait(self, limit_s: float = LIMIT_S) -> int:
        """Waits for torchrun and for everything that holds its output; returns torchrun's status."""
        try:
            code = self.popen.wait(limit_s)
            self._reader.join(limit_s)
            assert not self._reader.is_alive(), "a rank outlives torchrun"
        finally:
            self.kill()
        return code

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def kill(self) -> None:
        """kill -9 of everything, at once: torchrun, its ranks and what those have started."""
        for pid in [self.popen.pid, *descendants(self.popen.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.popen.wait()
        self._reader.join(LIMIT_S)
        assert self.popen.stdout is not None
        self.popen.stdout.close()


def children(pid: int) -> list[int]:
    """Process ids of a process's children, by the kernel; none where it is gone."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            text = stat.read_text()
            if int(text[text.rindex(")") + 2 :].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def descendants(pid: int) -> list[int]:
    return [found for child in children(pid) for found in (child, *descendants(child))]


def wait_until(condition: Callable[[], object], what: str, limit_s: float = LIMIT_S):
    """Looks until the condition holds, and returns it: for things of other processes that announce nothing."""
    deadline_s = time.monotonic() + limit_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s, f"waited in vain for {what}"
        time.sleep(0.02)
    return found


# ---- patches: what a rank does differently -------------------------------------------------------------------------


def without_pictures() -> None:
    """Drawing takes longer than a tiny training; runs of the real command draw."""
    from ddp_asr.runs import plots

    plots.draw_curves = plots.draw_spectrogram = lambda *_: None  # type: ignore[assignment]


def in_double() -> None:
    """Weights, features, loss and optimiser in float64: what nothing casts takes the default type."""
    torch.set_default_dtype(torch.float64)


def writing_down(directory: Path) -> None:
    """Each rank writes down the utterances of every batch that it trains."""
    from ddp_asr.training.learner import Learner

    before, file = Learner.accumulate, directory / f"rank-{os.environ['RANK']}.jsonl"

    def accumulate(self, batch, *, step, last):
        if step > 0:  # 0 is the rehearsal
            with file.open("a") as lines:
                lines.write(json.dumps({"step": step, "micro_batch": batch.micro_batch, "keys": batch.keys}) + "\n")
        return before(self, batch, step=step, last=last)

    Learner.accumulate = accumulate  # type: ignore[method-assign]


@dataclass(frozen=True)
class Gate:
    """Holds one rank in the middle of a step, or of the evaluation after it, until the test lets it go on."""

    directory: Path
    step: int
    rank: int = 0
    evaluation: bool = False

    def __post_init__(self) -> None:
        for pipe in (self._reached, self._opened):
            if not pipe.exists():
                os.mkfifo(pipe)

    @property
    def _reached(self) -> Path:
        return self.directory / f"reached-{self.step}-{self.rank}"

    @property
    def _opened(self) -> Path:
        return self.directory / f"opened-{self.step}-{self.rank}"

    def __call__(self) -> None:
        from ddp_asr.recognition import evaluation
        from ddp_asr.training.learner import Learner

        if int(os.environ["RANK"]) != self.rank:
            return
        accumulate, recognise_batch, now = Learner.accumulate, evaluation.recognise_batch, [0]

        def accumulating(learner, batch, *, step, last):
            if step == self.step != now[0] and not self.evaluation:
                self._hold()
            now[0] = step
            return accumulate(learner, batch, step=step, last=last)

        def recognising(*arguments):
            if now[0] == self.step and self.evaluation:
                now[0] = 0
                self._hold()
            return recognise_batch(*arguments)

        Learner.accumulate = accumulating  # type: ignore[method-assign]
        evaluation.recognise_batch = recognising

    def _hold(self) -> None:
        self._reached.write_text("")  # returns when the test reads it
        self._opened.read_text()

    def wait(self) -> None:
        """Returns when the rank is held."""
        self._reached.read_text()

    def open(self) -> None:
        self._opened.write_text("")


def infinite_loss(steps: Sequence[int], rank: int) -> None:
    """One utterance of the rank has an infinite loss in each of the steps."""
    from ddp_asr.training.learner import Learner

    if int(os.environ["RANK"]) != rank:
        return
    before = Learner.losses

    def losses(self, batch, step):
        found = before(self, batch, step)
        return found * torch.where(torch.arange(len(found)) == 0, float("inf"), 1.0) if step in steps else found

    Learner.losses = losses  # type: ignore[method-assign]


def failing_loader() -> None:
    """In rank 0, the first micro-batch of the second step raises a UserError in the thread that makes it."""
    from ddp_asr.data.loader import Recordings
    from ddp_asr.errors import UserError

    if os.environ["RANK"] != "0":
        return
    before = Recordings.micro_batch

    def micro_batch(self, work):
        if threading.current_thread() is not threading.main_thread() and (work.step, work.micro_batch) == (1, 0):
            raise UserError("the shards are gone")
        return before(self, work)

    Recordings.micro_batch = micro_batch  # type: ignore[method-assign]


# ---- what a run left behind ----------------------------------------------------------------------------------------


def status(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def environment(run: Path) -> dict:
    return json.loads((run / "environment.json").read_text())


def metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def state_of(path: Path) -> dict:
    """A checkpoint, without what depends on the clock and on where it was written."""
    state = checkpoint.read(path)
    state["progress"] = {**state["progress"], "trained_s": None}
    return {name: state[name] for name in ("model", "optimizer", "averages", "average_updates", "scaler", "progress")}


def final_state(run: Path, step: int = STEPS) -> dict:
    return state_of(checkpoint.step_path(run, step))


def differences(ours, theirs, where: str = "state") -> list[str]:
    """Where two states differ, in as little as one bit."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        return [found for key in ours for found in differences(ours[key], theirs[key], f"{where}[{key!r}]")]
    if isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [found for number, pair in pairs for found in differences(*pair, f"{where}[{number}]")]
    if isinstance(ours, torch.Tensor):
        same = ours.dtype == theirs.dtype and ours.numpy().tobytes() == theirs.numpy().tobytes()
    else:
        same = ours == theirs
    return [] if same else [where]


def assert_same_run(ours: Path, theirs: Path) -> None:
    """The same bits in weights, optimiser and averages, and the same metrics, line by line."""
    assert differences(final_state(ours), final_state(theirs)) == []
    assert metrics(ours) == metrics(theirs)


# A bias before a LayerNorm has no gradient but rounding, which in float32 Adam blows up to full steps. In a real model
# that is lost among millions of weights; here it would be a tenth of a percent (the next tensor differs by 1e-7).
NO_GRADIENT = re.compile(r"encoder\.blocks\.\d+\.convs\.0\.bias")


def weight_distance(ours: Path, theirs: Path, step: int = STEPS) -> float:
    """||dw|| / ||w|| over all weights together; in float32, over all that have a gradient."""
    return distance(final_state(ours, step)["model"], final_state(theirs, step)["model"])


def distance(first: dict, second: dict) -> float:
    """The same of the weights in two checkpoints."""
    names = [name for name, w in first.items() if w.dtype == torch.float64 or not NO_GRADIENT.fullmatch(name)]
    apart = sum(float((first[name].double() - second[name].double()).square().sum()) for name in names)
    return (apart / sum(float(first[name].double().square().sum()) for name in names)) ** 0.5


def assert_close_runs(
    ours: Path, theirs: Path, tolerance: float, step: int = STEPS, ignored: Sequence[str] = ()
) -> None:
    """Losses, gradient norms and weights agree to the tolerance, and all else that a step logs is equal."""
    first, second = metrics(ours), metrics(theirs)
    assert [(line["kind"], line["step"]) for line in first] == [(line["kind"], line["step"]) for line in second]
    for one, other in zip(first, second, strict=True):
        for name in one:
            if name in ("loss", "gradient_norm"):
                assert abs(one[name] - other[name]) <= tolerance * abs(other[name]), (one, other)
            else:
                assert one[name] == other[name] or name in ("wer", "cer", *ignored), (one, other)
    assert weight_distance(ours, theirs, step) <= tolerance


def lines_of(run: Path) -> int:
    """Lines of metrics.jsonl so far."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def is_alive(pid: int) -> bool:
    """Whether a process runs that need not be ours; one that only waits to be reaped does not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text[text.rindex(")") + 2] not in "ZX"


def matches(pattern: str, sentence: str) -> bool:
    """Whether the sentence holds the pattern, and is one: a line without a full stop in the middle of it."""
    assert re.search(pattern, sentence), sentence
    return "\n" not in sentence


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def copy_of(corpus: TinyCorpus, directory: Path) -> TinyCorpus:
    """A corpus to damage."""
    shutil.copytree(corpus.directory, directory)
    return TinyCorpus(directory)
