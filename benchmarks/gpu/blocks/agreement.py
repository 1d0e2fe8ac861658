"""CUDA against the CPU: losses and gradient of one step of the production model, float64 first, then other types."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.gpu import production
from benchmarks.gpu.job import Job
from benchmarks.gpu.trainings import NO_GRADIENT
from ddp_asr import SAMPLE_RATE_HZ
from ddp_asr.config import Config
from ddp_asr.data.corpus import Corpus
from ddp_asr.data.loader import MicroBatch

_TABLE = "against float64 on the CPU"
# What float32 and float64 must keep to; the other types are shown.
_ALLOWED = {"float64": 1e-9, "fp32": 1e-4}


@dataclass(frozen=True)
class Gradient:
    """What one step gives before the update."""

    losses: Tensor  # (utterances,)
    weights: dict[str, Tensor]


def run(job: Job) -> None:
    # A few seconds of audio are enough: float64 on a CPU is slow, and the sizes that matter are the model's.
    config = production.settings(job.small, "--batch.max_seconds=20", "--batch.micro_batches=2")
    corpus = production.make_corpus(config, small=job.small, utterances=6, scale=0.4)
    cpu, apart, fused = (
        torch.device("cpu"),
        *(production.first_batches(config, corpus, steps=1, fuse=fuse) for fuse in (1, 2)),
    )
    weights = production.make_learner(config, corpus, cpu).plain_model.state_dict()

    def gradient(device: torch.device, kind: str, batches: list[MicroBatch] = apart) -> Gradient:
        return _gradient(config, corpus, weights, batches, device, kind)

    reference = gradient(cpu, "float64")
    audio_s = sum(batch.audio_samples for batch in apart) / SAMPLE_RATE_HZ
    job.note(f"{len(reference.losses)} utterances, {audio_s:.0f} s of audio in {len(apart)} micro-batches")
    here = job.device.type
    for kind in ("float64", "fp32"):
        found = gradient(job.device, kind)
        _compare(job, f"{kind} on {here}", found, reference, _ALLOWED[kind])
        _compare(job, f"{kind} on {here}, fused", gradient(job.device, kind, fused), reference, _ALLOWED[kind])
        again = production.relative(gradient(job.device, kind).weights.values(), found.weights.values())
        job.note(f"the same {kind} step on {here} once more: ||dg|| / ||g|| = {again:.1e}")
    _compare(job, "fp32 on cpu", gradient(cpu, "fp32"), reference, None)
    for kind in ("tf32", "bf16", "fp16") if job.on_gpu else ():
        _compare(job, f"{kind} on {here}", gradient(job.device, kind), reference, None)
    if not job.on_gpu:
        job.note("needs CUDA: here the CPU is compared with itself")


def _gradient(
    config: Config,
    corpus: Corpus,
    weights: dict[str, Tensor],
    batches: list[MicroBatch],
    device: torch.device,
    kind: str,
) -> Gradient:
    """Losses and gradient of one step at these weights, computed in one type on one device."""
    config = replace(config, train=replace(config.train, precision="fp32" if kind == "float64" else kind))
    torch.set_default_dtype(torch.float64 if kind == "float64" else torch.float32)
    try:
        learner = production.make_learner(config, corpus, device)
        learner.plain_model.load_state_dict(weights)
        last = batches[-1]
        losses = [learner.accumulate(batch.to(device), step=1, last=batch is last) for batch in batches]
    finally:
        torch.set_default_dtype(torch.float32)
    scale = learner.scaler.get_scale()
    named = learner.plain_model.named_parameters()
    gradients = {name: weight.grad.double().cpu() / scale for name, weight in named if weight.grad is not None}
    return Gradient(torch.cat(losses).double().cpu(), gradients)


def _compare(job: Job, name: str, found: Gradient, reference: Gradient, allowed: float | None) -> None:
    losses = float(((found.losses - reference.losses).abs() / reference.losses.abs()).max())
    gradient = production.relative(found.weights.values(), reference.weights.values())
    each = {
        name: production.relative([found.weights[name]], [weight])
        for name, weight in reference.weights.items()
        if not NO_GRADIENT.fullmatch(name)
    }
    worst = max(each, key=lambda name: each[name])
    values = {"run": name, "losses": losses, "gradient": gradient, "worst tensor": worst, "its gradient": each[worst]}
    if allowed is None:
        job.row(_TABLE, **values)
    else:
        job.check(_TABLE, losses <= allowed and gradient <= allowed, **values, allowed=allowed)
