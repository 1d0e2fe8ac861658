"""The largest micro-batches of the real plan, run before the first step: what would fail after hours fails at once.

The longest utterance, the most audio, the most utterances, the most targets: each as a whole micro-batch, forward and
backward, with optimiser state and DDP's buckets allocated. It leaves no trace: only gradients are made and dropped, and
nothing draws from a generator. Rehearsal runs under `no_sync`, so if one rank runs out of memory no other rank waits in
an all-reduce and all raise the same error.

`fix_gradient_buckets` makes a resume exact: DDP rebuilds its buckets after the first synchronised backward, and their
layout decides the order of summation, so every attempt runs one synchronised backward and a forward before its first
step.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

from ddp_asr import SAMPLE_RATE_HZ
from ddp_asr.data.corpus import Corpus
from ddp_asr.data.loader import MicroBatch
from ddp_asr.data.plan import speed_samples
from ddp_asr.errors import UserError
from ddp_asr.ranks.world import no_sync
from ddp_asr.training.learner import Learner


def rehearse(corpus: Corpus, learner: Learner) -> list[str]:
    """Runs each of the largest micro-batches once, without any other rank; returns a line for each.

    Raises:
        UserError: one does not fit into the GPU's memory.
    """
    ran, seen = [], set()
    with _leaving_no_trace(learner):
        for name, rows in corpus.plan.largest_micro_batches(corpus.target_lengths).items():
            batch = _stand_in(corpus, rows, learner.objective.views)
            shape = (batch.waveforms.shape, batch.targets.shape)
            if shape in seen:
                continue
            seen.add(shape)
            _run(name, batch, learner)
            ran.append(f"{name}: {_describe(batch)}{_peak_memory(learner)}")
    return ran


def fix_gradient_buckets(corpus: Corpus, learner: Learner) -> None:
    """One synchronised backward and a forward, on all ranks together; DDP's buckets stay as they are after it.

    The forward runs under `no_sync`: DDP would otherwise expect its backward, and reduce in the next one even under
    `no_sync` (seen on 3 ranks: those with two micro-batches reduced once more than the others).
    """
    batch = _stand_in(corpus, corpus.plan.epoch(0).micro_batch(0, 0)[:1], learner.objective.views)
    batch = batch.to(learner.world.device)
    with _leaving_no_trace(learner):
        learner.accumulate(batch, step=0, last=True)
        with no_sync(learner.model):
            learner.losses(batch, step=0)


@contextlib.contextmanager
def _leaving_no_trace(learner: Learner) -> Iterator[None]:
    yield
    learner.discard()


def _stand_in(corpus: Corpus, rows: np.ndarray, views: int) -> MicroBatch:
    """A micro-batch with the lengths of `rows` and noise for audio: shapes are rehearsed, not contents."""
    samples = speed_samples(corpus.index.samples[rows], min(corpus.plan.speeds))
    utterances = len(rows)
    target_lengths = torch.from_numpy(corpus.target_lengths[rows].astype(np.int64))
    generator = torch.Generator().manual_seed(0)
    shape = (utterances, int(samples.max()))
    return MicroBatch(
        waveforms=torch.randint(-1000, 1000, shape, dtype=torch.int16, generator=generator),
        samples=torch.from_numpy(samples),
        targets=torch.zeros(utterances, int(target_lengths.max()), dtype=torch.int64),
        target_lengths=target_lengths,
        weight=torch.ones(utterances),
        rows=torch.from_numpy(rows),
        masks=None,
        dropout_seeds=torch.zeros(utterances, views, dtype=torch.int64),
        keys=[],
        bad=[],
        epoch=0,
        step=0,
        micro_batch=0,
        utterances=utterances,
        audio_samples=int(samples.sum()),
    )


def _run(name: str, batch: MicroBatch, learner: Learner) -> None:
    try:
        learner.accumulate(batch.to(learner.world.device), step=0, last=False)
        learner.discard()
    except torch.OutOfMemoryError:
        total_gib = torch.cuda.get_device_properties(learner.world.device).total_memory / 2**30
        raise UserError(
            f"{name} of the plan ({_describe(batch)}) does not fit into the GPU's {total_gib:.0f} GiB: lower "
            "batch.max_seconds (and raise batch.micro_batches by as much to keep the step's audio)"
        ) from None


def _describe(batch: MicroBatch) -> str:
    utterances, longest = batch.waveforms.shape
    return f"{utterances} utterance(s) of up to {longest / SAMPLE_RATE_HZ:.1f} s, {batch.targets.shape[1]} targets"


def _peak_memory(learner: Learner) -> str:
    if learner.world.device.type != "cuda":
        return ""
    return f", peak {torch.cuda.max_memory_allocated(learner.world.device) / 2**30:.1f} GiB"
