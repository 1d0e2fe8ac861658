"""CUDA against the CPU: losses and gradient of one step of the production model, float64 first, then other types."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.gpu import production
from benchmarks.gpu.job import Job
from ddp_asr.config import Config
from ddp_asr.data.corpus import Corpus
from ddp_asr.data.loader import MicroBatch

# What float32 and float64 must keep to; the other types are shown.
_ALLOWED = {"float64": 1e-9, "fp32": 1e-4}
# A bias before a LayerNorm has a gradient of zero but for rounding.
_NO_GRADIENT = re.compile(r"encoder\.blocks\.\d+\.convs\.0\.bias")


@dataclass(frozen=True)
class Gradient:
    """What one step gives before the update."""

    losses: Tensor  # (utterances,)
    weights: dict[str, Tensor]


def run(job: Job) -> None:
    # A few seconds of audio are enough: float64 on a CPU is slow, and sizes that matter are those of the model.
    config = production.settings(job.small, "--batch.max_seconds=20", "--batch.micro_batches=2")
    corpus = production.make_corpus(config, small=job.small, utterances=6, scale=0.4)
    batches = production.first_batches(config, corpus, steps=1)
    cpu = torch.device("cpu")
    reference = _gradient(config, corpus, batches, cpu, "float64")
    audio_s = sum(batch.audio_samples for batch in batches) / 16_000
    job.note(f"{len(reference.losses)} utterances, {audio_s:.0f} s of audio in {len(batches)} micro-batches")
    runs = [(job.device, "float64"), (job.device, "fp32"), (cpu, "fp32")]
    if job.on_gpu:
        runs += [(job.device, kind) for kind in ("tf32", "bf16", "fp16")]
    for device, kind in runs:
        once, again = (_gradient(config, corpus, batches, device, kind) for _ in range(2))
        _compare(job, f"{kind} on {device.type}", once, again, reference, _ALLOWED.get(kind))
    if not job.on_gpu:
        job.note("needs CUDA: here the CPU is compared with itself")


def _gradient(config: Config, corpus: Corpus, batches: list[MicroBatch], device: torch.device, kind: str) -> Gradient:
    """Losses and gradient of the weights that the seed gives in float32, computed in another type on a device."""
    config = replace(config, train=replace(config.train, precision="fp32" if kind == "float64" else kind))
    drawn = production.make_learner(config, corpus, torch.device("cpu")).plain_model.state_dict()
    torch.set_default_dtype(torch.float64 if kind == "float64" else torch.float32)
    try:
        learner = production.make_learner(config, corpus, device)
        learner.plain_model.load_state_dict(drawn)
        losses = []
        for k, batch in enumerate(batches):
            sent = batch.to(device)
            losses.append(learner.accumulate(sent, step=1, last=k == len(batches) - 1))
        gradients = {
            name: weight.grad.double().cpu() / learner.scaler.get_scale()
            for name, weight in learner.plain_model.named_parameters()
            if weight.grad is not None
        }
        return Gradient(torch.cat(losses).double().cpu(), gradients)
    finally:
        torch.set_default_dtype(torch.float32)


def _compare(job: Job, name: str, once: Gradient, again: Gradient, reference: Gradient, allowed: float | None) -> None:
    losses = float(((once.losses - reference.losses).abs() / reference.losses.abs()).max())
    names = [name for name in reference.weights if not _NO_GRADIENT.fullmatch(name)]
    each = {name: production.relative([once.weights[name]], [reference.weights[name]]) for name in names}
    worst = max(each, key=lambda name: each[name])
    gradient, repeated = (
        production.relative(one.weights.values(), other.weights.values())
        for one, other in ((once, reference), (once, again))
    )
    values = {
        "run": name,
        "losses": losses,
        "gradient": gradient,
        "worst tensor": worst,
        "its gradient": each[worst],
        "the same again": repeated,
    }
    if allowed is None:
        job.row("against float64 on the CPU", **values)
    else:
        passes = losses <= allowed and gradient <= allowed
        job.check("against float64 on the CPU", passes, **values, allowed=allowed)
