"""Memory over many batches, hardly two of the same shape: what stays allocated, and what lies beside the allocator."""

from __future__ import annotations

import os
import resource

import torch

from benchmarks.gpu import production
from benchmarks.gpu.job import Job

SHAPES, ROWS = 2_000, 8


def run(job: Job) -> None:
    if not job.on_gpu and "expandable_segments:False" in os.environ["PYTORCH_ALLOC_CONF"]:
        job.note("needs CUDA: on a CPU there are no such segments")
        return
    # A quarter of the length and one GRU layer, so that 2,000 shapes take half a minute and not ten.
    config = production.settings(job.small, "--encoder.rnn_layers=1", "--batch.max_seconds=14")
    corpus = production.make_corpus(config, small=job.small, scale=0.25)
    learner = production.make_learner(config, corpus, job.device)
    shapes = 16 if job.small else SHAPES
    K = config.batch.micro_batches
    batches = production.first_batches(config, corpus, steps=-(-shapes // K))[:shapes]
    seen: set[tuple[int, ...]] = set()
    name = os.environ["PYTORCH_ALLOC_CONF"]
    for number, batch in enumerate(batches, start=1):
        seen.add(tuple(batch.waveforms.shape))
        learner.accumulate(batch.to(job.device), step=1, last=True)
        learner.discard()
        if number % (shapes // ROWS) == 0 or number == 1:
            job.row(name, batches=number, shapes=len(seen), **_memory(job.device))
    if not job.on_gpu:
        job.note("needs CUDA: on a CPU only the memory of the process is shown")


def _memory(device: torch.device) -> dict[str, float]:
    host = {"host GB": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9}
    if device.type != "cuda":
        return host
    production.synchronise(device)
    free, total = torch.cuda.mem_get_info(device)
    return {
        "allocated GB": torch.cuda.memory_allocated(device) / 1e9,
        "most allocated GB": torch.cuda.max_memory_allocated(device) / 1e9,
        "reserved GB": torch.cuda.memory_reserved(device) / 1e9,
        "outside the allocator GB": (total - free - torch.cuda.memory_reserved(device)) / 1e9,
        **host,
    }
