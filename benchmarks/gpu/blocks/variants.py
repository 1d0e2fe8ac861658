"""One change at a time to a fused step: two streams, one bidirectional call, compiled parts, other dropouts."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.gpu import bigru, production
from benchmarks.gpu.job import Job
from ddp_asr.encoders import rescnn_bigru
from ddp_asr.features.log_mel import LogMel

Change = Callable[[], AbstractContextManager[object]]


def run(job: Job) -> None:
    config = production.settings(job.small)
    corpus = production.make_corpus(config, small=job.small)
    batches = production.first_batches(config, corpus, steps=3, fuse=config.batch.micro_batches)
    as_it_is: production.Step | None = None
    for name, change in _changes(job).items():
        learner = production.make_learner(config, corpus, job.device)
        production.reset_peak(job.device)
        with change():
            started = time.perf_counter()
            first, *steps = production.train(learner, config, batches, steps=3)
        as_it_is = as_it_is or first
        seconds = sum(step.seconds for step in steps) / len(steps)
        job.row(
            "a fused step",
            variant=name,
            **{
                "s a step": seconds,
                "audio-h per GPU-s": sum(step.audio_h_per_s for step in steps) / len(steps),
                "s before that": time.perf_counter() - started - sum(step.seconds for step in steps),
                **production.peak_gb(job.device),
                "loss's difference": abs(first.loss - as_it_is.loss) / as_it_is.loss,
            },
        )
    if not job.on_gpu:
        job.note("needs CUDA: compiled parts, and Triton's dropout; streams are one on a CPU")


def _changes(job: Job) -> dict[str, Change]:
    changes: dict[str, Change] = {
        "as it is": nullcontext,
        "GRU directions in two streams": lambda: _gru_by(bigru.in_two_streams),
        "GRU in one bidirectional call": lambda: _gru_by(bigru.in_one_call),
    }
    if job.on_gpu:
        changes |= {
            "features compiled": lambda: patch.object(LogMel, "forward", _compiled(LogMel.forward)),
            "residual blocks compiled": lambda: patch.object(
                rescnn_bigru.ResidualBlock, "forward", _compiled(rescnn_bigru.ResidualBlock.forward)
            ),
        }
    return changes


def _compiled(function: Callable[..., object]) -> Callable[..., object]:
    compiled: Callable[..., object] = torch.compile(function, dynamic=True)
    return compiled


def _gru_by(way: bigru.Way) -> AbstractContextManager[object]:
    def forward(self: rescnn_bigru.BiGRU, x: Tensor, frames: Tensor, context: object = None) -> Tensor:
        x = nn.functional.gelu(self.norm(x))
        return self.dropout(way(self, x, frames))

    return patch.object(rescnn_bigru.BiGRU, "forward", forward)
