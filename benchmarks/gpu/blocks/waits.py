"""Where the CPU waits for the GPU in a step, and which kernels a fused step is made of."""

from __future__ import annotations

import collections
import gzip
import shutil
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import production
from benchmarks.gpu.job import REPOSITORY, Job

_SHOWN = 25
_MAX_TRACE_BYTES = 12_000_000


def run(job: Job) -> None:
    config = production.settings(job.small)
    corpus = production.make_corpus(config, small=job.small)
    learner = production.make_learner(config, corpus, job.device)
    apart = production.settings(job.small, "--batch.micro_batches=4")
    batches = production.first_batches(apart, production.make_corpus(apart, small=job.small), steps=1)
    production.train(learner, apart, batches, steps=1)  # what is set up once is not counted
    with _counting_waits() as places:
        production.train(learner, apart, batches, steps=1)
    for place, count in sorted(places.items(), key=lambda item: -item[1]):
        job.row("host waits in a step of 4 micro-batches", place=place, waits=count)
    if not job.on_gpu:
        job.note("needs CUDA: there are no host waits on a CPU; the profile below is of CPU operations")
    _profile(job, learner, config, corpus)


@contextmanager
def _counting_waits() -> Iterator[collections.Counter[str]]:
    """Counts the synchronising CUDA calls by the innermost line of ours that led to them."""
    found: collections.Counter[str] = collections.Counter()

    def note(message: object, *rest: object) -> None:
        if "synchronizing" in str(message):
            found[_place()] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note  # type: ignore[assignment]
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if torch.cuda.is_available():
                torch.cuda.set_sync_debug_mode("default")


def _place() -> str:
    ours = str(REPOSITORY / "ddp_asr")
    frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(ours)]
    if not frames:
        return "elsewhere"
    file = frames[-1].filename.removeprefix(f"{REPOSITORY}/")
    return f"{file}:{frames[-1].lineno} {frames[-1].line}"


def _profile(job: Job, learner: production.Learner, config: production.Config, corpus: production.Corpus) -> None:
    batches = production.first_batches(config, corpus, steps=1, fuse=config.batch.micro_batches)
    production.train(learner, config, batches, steps=1)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if job.on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        (step,) = production.train(learner, config, batches, steps=1)
        production.synchronise(job.device)
    averages = profiler.key_averages()
    kind = "self_device_time_total" if job.on_gpu else "self_cpu_time_total"
    print(averages.table(sort_by=kind, row_limit=60, max_name_column_width=90))
    # A kernel has an event of its own; operations and named regions repeat the time of the kernels in them.
    on_gpu = torch.autograd.DeviceType.CUDA
    events = [e for e in averages if not e.is_user_annotation and (not job.on_gpu or e.device_type == on_gpu)]
    total_us = sum(getattr(event, kind) for event in events)
    busy = total_us / 1e6 / step.seconds
    job.note(f"a step of {step.seconds:.3f} s under the profiler, of which kernels took {100 * busy:.0f} %")
    for event in sorted(events, key=lambda event: -getattr(event, kind))[:_SHOWN]:
        ms = getattr(event, kind) / 1e3
        share = getattr(event, kind) / max(total_us, 1)
        job.row("kernels of a fused step", kernel=event.key[:90], calls=event.count, ms=ms, share=share)
    for event in averages:
        if event.key.startswith(("cudaLaunch", "cuLaunch", "cudaStream", "cudaDevice", "cudaEvent", "cudaMemcpy")):
            job.row("calls of the host", call=event.key, calls=event.count, ms=event.self_cpu_time_total / 1e3)
    _keep_trace(job, profiler)


def _keep_trace(job: Job, profiler: profile) -> None:
    trace, kept = job.folder / "trace.json", job.out / "trace.json.gz"
    profiler.export_chrome_trace(str(trace))
    with trace.open("rb") as plain, gzip.open(kept, "wb", compresslevel=6) as packed:
        shutil.copyfileobj(plain, packed)
    if kept.stat().st_size > _MAX_TRACE_BYTES:
        job.note(f"the trace has {kept.stat().st_size / 1e6:.0f} MB and was not kept")
        kept.unlink()
