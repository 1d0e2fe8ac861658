"""The training of configs/librispeech_100.yaml without its audio: noise of LibriSpeech's lengths, letters at random.

    config = settings(job.small)
    corpus = make_corpus(config, small=job.small)                  # an index of drawn lengths; nothing on the disk
    batches = first_batches(config, corpus, steps=3, fuse=4)       # on the host
    learner = make_learner(config, corpus, device)                 # as a session makes it
    steps = train(learner, config, batches, steps=3)               # the real loop; what each step took and gave

Settings, plan, collation, masks, model, objective, optimiser and loop are those of a run. Only the decoder is replaced.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any
from unittest.mock import patch

import numpy as np
import pyarrow
import torch

from benchmarks.gpu.job import REPOSITORY
from benchmarks.plan import librispeech_like
from ddp_asr import SAMPLE_RATE_HZ
from ddp_asr.config import Config, load_config
from ddp_asr.data import corpus as corpora
from ddp_asr.data import loader
from ddp_asr.data.corpus import Corpus
from ddp_asr.data.index import Index
from ddp_asr.data.loader import MicroBatch, Recordings, on_device, train_loader
from ddp_asr.ranks.signals import StopRequest
from ddp_asr.ranks.world import World
from ddp_asr.training import precision, session
from ddp_asr.training.learner import Learner
from ddp_asr.training.loop import Evaluation, Hooks, Progress, Schedule, Trainer

CONFIG = REPOSITORY / "configs" / "librispeech_100.yaml"
UTTERANCES = 28_539  # of train-clean-100
_LETTERS_PER_S = 14.5

# A training of a second, for the reduced form.
SMALL = (
    *("--features.mel_bands=16", "--features.n_fft=512", "--augment.frequency_mask_bands=4"),
    *("--encoder.conv_channels=4", "--encoder.residual_blocks=1", "--encoder.rnn_layers=2", "--encoder.rnn_size=16"),
    *("--batch.max_seconds=3", "--batch.micro_batches=4", "--train.precision=fp32"),
)
SMALL_UTTERANCES, SMALL_SCALE = 40, 0.1


def settings(small: bool, *overrides: str) -> Config:
    """The production settings, or small ones, with more on top."""
    return load_config(CONFIG, [*(SMALL if small else ()), *overrides])


def make_corpus(config: Config, *, small: bool, utterances: int = UTTERANCES, scale: float = 1.0) -> Corpus:
    """So many utterances of LibriSpeech's lengths times `scale`, planned as a run would."""
    if small:
        utterances, scale = min(utterances, SMALL_UTTERANCES), SMALL_SCALE
    samples, key_hash = librispeech_like(utterances)
    samples = np.maximum(samples * scale, SAMPLE_RATE_HZ // 5).astype(np.int64)
    generator = np.random.default_rng(0)
    letters = "".join(generator.choice(list("etaoinshrdlu "), 100_000))
    starts = generator.integers(0, 90_000, utterances)
    lengths = (samples / SAMPLE_RATE_HZ * _LETTERS_PER_S).astype(np.int64)
    texts = [letters[start : start + length] + "e" for start, length in zip(starts, lengths, strict=True)]
    zeros = np.zeros(utterances, np.int64)
    index = Index(
        shards=(),
        checksums=(),
        shard=zeros.astype(np.int32),
        offset=zeros,
        bytes=zeros,
        samples=samples,
        keys=pyarrow.array([f"noise-{n:06d}" for n in range(utterances)]),
        texts=pyarrow.array(texts),
        speakers=pyarrow.array([""] * utterances),
        key_hash=key_hash,
    )
    with patch.object(corpora, "read_index", lambda directories: index):
        return corpora.read_corpus(config)


_NOISE = np.random.default_rng(0).integers(-8_000, 8_000, 30 * SAMPLE_RATE_HZ, dtype=np.int16)


def _noise(self: Recordings, row: int, speed: float, out: np.ndarray) -> None:
    """In place of `Recordings._decode`: what an utterance gets depends on its row alone."""
    start = row * 7_919 % (len(_NOISE) - len(out))
    out[:] = _NOISE[start : start + len(out)]


def first_batches(config: Config, corpus: Corpus, *, steps: int, fuse: int = 1) -> list[MicroBatch]:
    """The batches of the first steps on the host, `fuse` micro-batches in each."""
    batches = train_loader(corpus.index, corpus.tokeniser, corpus.plan, config, rank=0, world_size=1, fuse=fuse)
    with patch.object(loader.Recordings, "_decode", _noise):
        taken = list(islice(batches, steps * -(-config.batch.micro_batches // fuse)))
        batches.close()  # its threads are decoding ahead
    return taken


def make_learner(config: Config, corpus: Corpus, device: torch.device) -> Learner:
    """As a session makes it, for one process."""
    chosen = precision.resolve(config.train.precision, device)
    precision.set_matmul_precision(chosen)
    config = replace(config, train=replace(config.train, precision=chosen))
    return session.make_learner(config, World(0, 1, 0, device), corpus, None)


@dataclass(frozen=True)
class Step:
    """What one step took and gave."""

    seconds: float
    audio_s: float  # without padding
    loss: float
    norm: float
    memory_gb: float | None  # the most that PyTorch's allocator handed out; None on a CPU


def describe(steps: Sequence[Step]) -> dict[str, float | None]:
    """Columns for the mean of some steps."""
    return {
        "s a step": sum(step.seconds for step in steps) / len(steps),
        "audio-h per GPU-s": sum(step.audio_s for step in steps) / 3600 / sum(step.seconds for step in steps),
        "GPU memory GB": max((step.memory_gb for step in steps if step.memory_gb is not None), default=None),
    }


def train(learner: Learner, config: Config, batches: Sequence[MicroBatch], steps: int) -> list[Step]:
    """So many steps of the real loop on batches of the host; the rate is that of the run's first steps."""
    taken: list[Step] = []
    at = time.perf_counter()
    audio = [sum(part) / SAMPLE_RATE_HZ for part in _split([b.audio_samples for b in batches], steps)]

    def log(line: dict[str, Any]) -> None:  # the loop has waited for the step's loss and norm
        nonlocal at
        if line["kind"] == "train":
            now = time.perf_counter()
            measured = (line["loss"], line["gradient_norm"], line["gpu_memory_gb"])
            taken.append(Step(now - at, audio[len(taken)], *measured))
            at = now

    def say(text: str) -> None:
        print(text, flush=True)

    hooks = Hooks(
        log=log,
        save=lambda state, best: None,
        flush=lambda: None,
        message=say,
        evaluate=lambda step, should_stop: Evaluation(score=None),
        dump=lambda step, batches: None,
    )
    schedule = Schedule(1_000, 1, 1_000, 0, 0.0, stop_at_step=steps, max_nonfinite_steps=0, max_bad_samples=0)
    trainer = Trainer(learner.world, learner, schedule, hooks, StopRequest())
    sent = on_device((batch for batch in batches), learner.world.device)
    trainer.run(sent, range(config.batch.micro_batches), Progress())
    return taken


def _split(values: Sequence[int], parts: int) -> list[Sequence[int]]:
    size = len(values) // parts
    return [values[part * size : (part + 1) * size] for part in range(parts)]


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(device: torch.device, work: Callable[[], object], repeats: int, warm_up: int = 2) -> float:
    """Median wall-clock milliseconds of `work`, each to the end of what it has queued on the GPU."""
    taken: list[float] = []
    for number in range(warm_up + repeats):
        synchronise(device)
        started = time.perf_counter()
        work()
        synchronise(device)
        if number >= warm_up:
            taken.append(1e3 * (time.perf_counter() - started))
    return float(np.median(taken))


def relative(ours: Iterable[torch.Tensor], reference: Iterable[torch.Tensor]) -> float:
    """||ours - reference|| / ||reference|| over all tensors together, in float64 on the CPU."""
    apart = whole = 0.0
    for one, other in zip(ours, reference, strict=True):
        one, other = one.detach().double().cpu(), other.detach().double().cpu()
        apart += float((one - other).square().sum())
        whole += float(other.square().sum())
    return (apart / max(whole, 1e-300)) ** 0.5
