"""The mask of dropout.py and its use in one pass over the elements, as a Triton kernel; imported on CUDA alone."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddp_asr.encoders import dropout

_FIRST_FACTOR = tl.constexpr(dropout.FIRST_FACTOR)
_SECOND_FACTOR = tl.constexpr(dropout.SECOND_FACTOR % 2**32)
_COLUMN_FACTOR = tl.constexpr(dropout.COLUMN_FACTOR % 2**32)
_BLOCK = 1024


@triton.jit
def _kernel(x, hashes, out, elements, size, lowest, SCALE: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < elements
    column = (place % size).to(tl.uint32) * _COLUMN_FACTOR
    column = (column ^ (column >> 15)) * _FIRST_FACTOR
    mixed = tl.load(hashes + place // size, mask=inside).to(tl.uint32, bitcast=True) ^ column
    mixed = mixed * _FIRST_FACTOR
    mixed = mixed ^ (mixed >> 15)
    mixed = (mixed * _SECOND_FACTOR).to(tl.int32, bitcast=True)
    kept = (mixed >= lowest).to(tl.float32)
    value = tl.load(x + place, mask=inside)
    tl.store(out + place, (value * kept * SCALE).to(value.dtype), mask=inside)


def drop(x: Tensor, hashes: Tensor, p: float) -> Tensor:
    """As `dropout.drop`."""
    out, elements = torch.empty_like(x), x.numel()
    if elements:
        grid = (triton.cdiv(elements, _BLOCK),)
        # SCALE is a constant of the kernel, because Triton makes float32 of a number that it is given.
        _kernel[grid](x, hashes, out, elements, x.shape[-1], dropout.lowest_kept(p), SCALE=1 / (1 - p), BLOCK=_BLOCK)
    return out
