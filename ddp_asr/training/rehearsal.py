"""The largest batches of the real plan, run before the first step: what would fail after hours fails at once.

    plan, sizes to try --largest_micro_batches--> batches of noise --forward, backward--> how many micro-batches fit

The longest utterance, the most audio, the most utterances, the most targets: each as a whole batch, with optimiser
state and DDP's buckets allocated. On a GPU a batch is first all micro-batches that the rank runs in a step; where that
does not fit, half as many, and so on down to one. How many run as one batch changes no result, so each rank decides
alone.

The rehearsal leaves no trace: only gradients are made and dropped, and nothing draws from a generator. It runs under
`no_sync`, so if one rank runs out of memory no other rank waits in an all-reduce and all raise the same error.

`fix_gradient_buckets` makes a resume exact: DDP rebuilds its buckets after the first synchronised backward, and their
layout decides the order of summation, so every attempt runs one synchronised backward and a forward before its first
step.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from ddp_asr import SAMPLE_RATE_HZ
from ddp_asr.data.corpus import Corpus
from ddp_asr.data.loader import MicroBatch
from ddp_asr.data.plan import speed_samples
from ddp_asr.errors import UserError, counted
from ddp_asr.ranks.world import no_sync
from ddp_asr.training.learner import Learner

# Steps of other shapes fragment the allocator's memory and give cuDNN other work spaces, so a size counts as fitting
# only if it leaves this part of the memory free. The last one to try has none to fall back to.
_SPARE = 0.1


@dataclass(frozen=True)
class Rehearsed:
    """What a rank found out."""

    fuse: int  # micro-batches that run as one batch
    peak_bytes: int  # most memory of any batch that ran; 0 on a CPU
    lines: list[str]


def sizes_to_try(setting: int, micro_batches: int, device: torch.device) -> list[int]:
    """How many micro-batches to try as one batch, the largest first.

    Halved and rounded up, so that the batches of a step are alike: 11 micro-batches run as 11, 6 + 5, 3 + 3 + 3 + 2 ...

    Args:
        setting: `train.fuse_micro_batches`.
        micro_batches: those that the rank runs in a step.
    """
    if setting or device.type != "cuda":
        return [min(setting or 1, micro_batches)]
    sizes = [micro_batches]
    while sizes[-1] > 1:
        sizes.append(-(-sizes[-1] // 2))
    return sizes


def rehearse(corpus: Corpus, learner: Learner, sizes: list[int]) -> Rehearsed:
    """Runs the largest batches of each size in turn, without any other rank, until all of one size fit.

    Raises:
        UserError: those of the last size do not fit into the GPU's memory.
    """
    device, too_large = learner.world.device, ""
    lines: list[str] = []
    most_bytes = _memory_bytes(device)
    for fuse in sizes:
        may_use_bytes = math.inf if fuse == sizes[-1] else (1 - _SPARE) * most_bytes
        ran, peak_bytes, too_large = _run_largest(corpus, learner, fuse, may_use_bytes)
        if not too_large:
            return Rehearsed(fuse, peak_bytes, [*lines, *ran])
        lines.append(f"{fuse} micro-batches as one batch, which need too much memory: {too_large}")
    if fuse > 1:
        remedy = "lower train.fuse_micro_batches, which changes no result; 0 finds the largest number that fits"
    else:
        remedy = "lower batch.max_seconds (and raise batch.micro_batches by as much to keep the step's audio)"
    free = "" if math.isinf(most_bytes) else f", of which {most_bytes / 2**30:.0f} GiB were free"
    raise UserError(f"{too_large} does not fit into the memory of {device}{free}: {remedy}")


def _run_largest(corpus: Corpus, learner: Learner, fuse: int, may_use_bytes: float) -> tuple[list[str], int, str]:
    """(a line for each batch that ran, the most memory of any in bytes, what needs more than it may use or "")."""
    ran: list[str] = []
    seen, peak_bytes = set(), 0
    with _leaving_no_trace(learner):
        for name, rows in corpus.plan.largest_micro_batches(corpus.target_lengths, fuse).items():
            batch = _stand_in(corpus, rows, learner.objective.views)
            shape = (batch.waveforms.shape, batch.targets.shape)
            if shape in seen:
                continue
            seen.add(shape)
            used_bytes = _peak_bytes(batch, learner)
            if used_bytes is None or used_bytes > may_use_bytes:
                return ran, peak_bytes, f"{name} of the plan ({_describe(batch)})"
            peak_bytes = max(peak_bytes, used_bytes)
            ran.append(f"{name}: {_describe(batch)}" + (f", peak {used_bytes / 2**30:.1f} GiB" if used_bytes else ""))
    return ran, peak_bytes, ""


def _peak_bytes(batch: MicroBatch, learner: Learner) -> int | None:
    """The most memory that forward and backward need, beside everything that is there before; None if there is less."""
    device, fits = learner.world.device, True
    # As in a step's later batches, which find the gradients of the earlier ones.
    for parameter in learner.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # else each peak would be that of all before
    try:
        learner.accumulate(batch.to(device), step=0, last=False)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    # Outside of the except clause, where the error's traceback no longer keeps tensors.
    learner.discard()
    if not fits:
        torch.cuda.empty_cache()  # a block too small for this size is in the way of the next
        return None
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU lacked memory, also where a library of NVIDIA's asked for it and not PyTorch's allocator.

    cuDNN 9 calls it CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED (or HOST), older ones ALLOC_FAILED as cuBLAS
    does; the driver says "out of memory".
    """
    words = ("out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def _memory_bytes(device: torch.device) -> float:
    """What this process can have of its GPU's memory; infinite on a CPU."""
    if device.type != "cuda":
        return math.inf
    torch.cuda.empty_cache()
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return free_bytes + torch.cuda.memory_reserved(device)


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
    device = learner.world.device
    if device.type == "cuda":
        torch.cuda.empty_cache()  # leaves the memory to DDP's buckets and to the shapes that come
        torch.cuda.reset_peak_memory_stats(device)  # the peaks in the metrics are those of training


def _stand_in(corpus: Corpus, rows: np.ndarray, views: int) -> MicroBatch:
    """A batch with the lengths of `rows` and noise for audio: shapes are rehearsed, not contents."""
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
        micro_batches=1,
        utterances=utterances,
        audio_samples=int(samples.sum()),
    )


def _describe(batch: MicroBatch) -> str:
    utterances, longest = batch.waveforms.shape
    length = f"{longest / SAMPLE_RATE_HZ:.1f} s, {batch.targets.shape[1]} targets"
    return f"{counted(utterances, 'utterance')} of up to {length}"
