"""A bidirectional GRU layer of production size: forward and backward milliseconds of several ways to run it."""

import torch

from benchmarks.gpu import bigru
from benchmarks.gpu.job import Job
from benchmarks.gpu.production import median_ms
from ddp_asr.encoders.rescnn_bigru import BiGRU
from ddp_asr.training.precision import autocast

WAYS: dict[str, bigru.Way] = {
    "in turn": bigru.in_turn,
    "two streams": bigru.in_two_streams,
    "one call, packed": bigru.in_one_call,
    "one call, equal lengths": bigru.in_one_call_without_lengths,
}


def run(job: Job) -> None:
    size, frames, batches = (16, 20, [2, 3]) if job.small else (512, 590, [83, 3, 16, 128, 224])
    precision = "bf16" if job.on_gpu else "fp32"
    table = f"{size} units, {frames} frames, {precision}"
    torch.manual_seed(0)
    layer = BiGRU(2 * size, size, 0.0).to(job.device)
    for B in batches:
        for name, way in WAYS.items():
            with job.guarding(table, B=B, way=name), autocast(precision, job.device):
                forward_ms, backward_ms = _measure(layer, way, B, frames, job)
                values = {"forward ms": forward_ms, "backward ms": backward_ms}
                values |= {f"{key[:-3]} us a frame and direction": 1e3 * ms / frames / 2 for key, ms in values.items()}
                job.row(table, B=B, way=name, **values)


def _measure(layer: BiGRU, way: bigru.Way, B: int, frames: int, job: Job) -> tuple[float, float]:
    """(forward, backward) milliseconds of B rows of nearly equal lengths, as buckets give them."""
    size = 2 * layer.forward_gru.hidden_size
    x = torch.randn(frames, B, size, device=job.device, requires_grad=True)
    lengths = bigru.lengths_of(torch.linspace(0.9 * frames, frames, B).round().long(), frames, job.device)
    grad = torch.randn(frames, B, size, device=job.device)
    repeats = 2 if job.small else 5

    def both() -> None:
        output = way(layer, x, lengths)
        output.backward(grad.to(output.dtype))

    forward_ms = median_ms(job.device, lambda: way(layer, x, lengths), repeats)
    both_ms = median_ms(job.device, both, repeats)
    layer.zero_grad()
    return forward_ms, both_ms - forward_ms
