"""One change at a time to a fused step: two streams, one bidirectional call, compiled parts, other dropouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import cast
from unittest.mock import patch

import torch
from torch import Tensor, nn

from benchmarks.gpu import bigru, production
from benchmarks.gpu.job import Job
from ddp_asr.encoders import dropout, rescnn_bigru
from ddp_asr.encoders.layer_norm import LayerNorm
from ddp_asr.features.log_mel import LogMel

Change = Callable[[], AbstractContextManager[object]]


def run(job: Job) -> None:
    config = production.settings(job.small)
    corpus = production.make_corpus(config, small=job.small)
    batches = production.first_batches(config, corpus, steps=3, fuse=config.batch.micro_batches)
    as_it_is: production.Step | None = None
    for name, change in _changes(job).items():
        learner = production.make_learner(config, corpus, job.device)
        with job.guarding("a fused step", variant=name), change():
            first, *steps = production.train(learner, config, batches, steps=3)
            as_it_is = as_it_is or first
            values = {"s the first step": first.seconds, **production.describe(steps)}
            values["loss's difference"] = abs(first.loss - as_it_is.loss) / as_it_is.loss
            job.row("a fused step", variant=name, **values)
    if not job.on_gpu:
        job.note("needs CUDA: compiled parts and dropout without its kernel; two streams are one on a CPU")


def _changes(job: Job) -> dict[str, Change]:
    changes: dict[str, Change] = {
        "as it is": nullcontext,
        "GRU directions in two streams": lambda: gru_by(bigru.in_two_streams),
        "GRU in one bidirectional call": lambda: gru_by(bigru.in_one_call),
        "torch's dropout": lambda: patch.object(dropout.Dropout, "forward", _torch_dropout),
        "LayerNorm in float32, as autocast has it": lambda: patch.object(LayerNorm, "forward", nn.LayerNorm.forward),
    }
    if job.on_gpu:
        from ddp_asr.encoders import dropout_cuda

        changes |= {
            "dropout without its kernel": lambda: patch.object(dropout_cuda, "drop", dropout._drop_eagerly),
            "features compiled": lambda: patch.object(LogMel, "forward", _compiled(LogMel.forward)),
            "residual blocks compiled": lambda: patch.object(
                rescnn_bigru.ResidualBlock, "forward", _compiled(rescnn_bigru.ResidualBlock.forward)
            ),
        }
    return changes


def _torch_dropout(self: dropout.Dropout, x: Tensor, seeds: object, **axes: int) -> Tensor:
    """Another mask, drawn by a generator."""
    return nn.functional.dropout(x, self.p, self.training)


def _compiled(function: Callable[..., object]) -> Callable[..., object]:
    compiled: Callable[..., object] = torch.compile(function, dynamic=True)
    return compiled


@contextmanager
def gru_by(way: bigru.Way) -> Iterator[None]:
    """Layers that run their GRUs in another way; the encoder hands them what `reversal` gives."""

    def forward(
        self: rescnn_bigru.BiGRU, x: Tensor, lengths: bigru.Lengths, context: object = None, seeds: Tensor | None = None
    ) -> Tensor:
        x = nn.functional.gelu(self.norm(x))
        return cast(Tensor, self.dropout(way(self, x, lengths), seeds, rows=1, frames=0))

    with (
        patch.object(rescnn_bigru, "reversal", bigru.lengths_of),
        patch.object(rescnn_bigru.BiGRU, "forward", forward),
    ):
        yield
