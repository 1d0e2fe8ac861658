"""A process group of one rank: DDP and every collective of ranks/world.py, by NCCL; by gloo where there is no GPU."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.gpu import production
from benchmarks.gpu.job import Job
from ddp_asr.ranks import rendezvous
from ddp_asr.ranks.environment import before_nccl
from ddp_asr.ranks.world import backend_timeout


def run(job: Job) -> None:
    backend = "nccl" if job.on_gpu else "gloo"
    if not job.on_gpu:
        job.note("needs CUDA: gloo runs in NCCL's place")
    before_nccl(os.environ)
    started = time.perf_counter()
    dist.init_process_group(
        backend, store=dist.HashStore(), rank=0, world_size=1, device_id=job.device if job.on_gpu else None
    )
    job.row(backend, what="init_process_group", ms=1e3 * (time.perf_counter() - started))
    _collectives(job, backend)
    _ddp(job, backend)
    if job.on_gpu:
        record = job.folder / "flight-record"
        rendezvous._write_flight_record(record)
        job.check(backend, record.stat().st_size > 0, what="flight record", bytes=record.stat().st_size)
    started = time.perf_counter()
    dist.destroy_process_group()
    job.row(backend, what="destroy_process_group", ms=1e3 * (time.perf_counter() - started))


def _collectives(job: Job, backend: str) -> None:
    tally, gradients = (
        torch.ones(8, dtype=torch.float64, device=job.device),
        torch.ones((1 if job.small else 90) << 18, device=job.device),
    )

    def all_reduce_of_a_step() -> None:  # with the time-out by which NCCL waits on the host
        dist.all_reduce(tally, async_op=True).wait(backend_timeout(60.0))

    calls: dict[str, Callable[[], Any]] = {
        "all_reduce of 8 float64, waited for": all_reduce_of_a_step,
        f"all_reduce of {gradients.numel() >> 18} MiB": lambda: dist.all_reduce(gradients),
        "all_gather_object": lambda: dist.all_gather_object([None], {"step": 1}),
        "broadcast_object_list": lambda: dist.broadcast_object_list([{"step": 1}], src=0),
    }
    for what, call in calls.items():
        job.row(backend, what=what, ms=production.median_ms(job.device, call, repeats=5))
    job.check(
        backend, bool((tally == 1).all() and (gradients == 1).all()), what="sums over one rank leave all as it is"
    )


def _ddp(job: Job, backend: str) -> None:
    """Two micro-batches, the first under no_sync, with DDP and without; gradients differ by CTC's order at most."""
    config = production.settings(
        job.small, "--batch.max_seconds=20", "--batch.micro_batches=2", "--train.precision=fp32"
    )
    corpus = production.make_corpus(config, small=job.small, utterances=6, scale=0.4)
    batches = production.first_batches(config, corpus, steps=1)
    gradients = []
    for wrapped in (False, True):
        learner = production.make_learner(config, corpus, job.device)
        if wrapped:  # as World.wrap does for several ranks
            ids = [job.device] if job.on_gpu else None
            learner.model = nn.parallel.DistributedDataParallel(
                learner.model, device_ids=ids, gradient_as_bucket_view=True
            )
        for k, batch in enumerate(batches):
            learner.accumulate(batch.to(job.device), step=1, last=k == len(batches) - 1)
        gradients.append([weight.grad for weight in learner.plain_model.parameters() if weight.grad is not None])
    difference = production.relative(gradients[1], gradients[0])
    job.check(backend, difference < 1e-5, what="gradient under DDP", difference=difference)
