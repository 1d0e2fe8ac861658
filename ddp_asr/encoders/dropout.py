"""Dropout that belongs to the utterance: an element is dropped by a hash of where it stands, and not by a generator.

    seeds (B,) of the rows: draws.hashes of (seed, epoch, key, view)
    (seed of the row, site, frame, channel) --SplitMix64--> a hash for each vector of the last axis   (hash_vectors)
    (hash of the vector, element)           --32-bit mix--> dropped where it lies below p 2^32        (drop)

So an utterance has the same mask in every micro-batch, at every padded length, on every rank, device and attempt, and
batches can be cut or fused at will: nothing else couples the utterances of a batch. `nn.Dropout` draws from a generator
whose order depends on all of these, and on CUDA on the model of the card.

The mask is not stored: backwards it is computed again. `_drop_eagerly` is the reference. On CUDA a kernel does the same
in one pass (dropout_cuda.py); tests run it in Triton's interpreter.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ddp_asr.draws import seed_of

# Both multipliers are those of Wellons' "lowbias32", an integer hash that was searched for low bias (2018).
FIRST_FACTOR, SECOND_FACTOR = 0x7FEB352D, 0x846CA68B - 2**32
COLUMN_FACTOR = 0x9E3779B1 - 2**32  # 2^32 / golden ratio, odd
_PIECE_ELEMENTS = (
    2**16
)  # their integers stay in the cache: 5 ns an element instead of 9 to 15 at the sizes of a training
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64


class Dropout(nn.Module):
    """Zeroes elements with probability p in training and divides the others by 1 - p."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.site: int | None = None  # which dropout of the encoder this is; set by `number_sites`

    def forward(self, x: Tensor, seeds: Tensor | None, *, rows: int = 0, frames: int = 1) -> Tensor:
        """`x` of any shape, with the utterances along axis `rows` and time along axis `frames`.

        Args:
            seeds: int64 (B,) a random number for each row; may be None where nothing is dropped.
        """
        if not (self.training and self.p):
            return x
        if seeds is None or self.site is None:
            raise ValueError("dropout in training needs a seed for each row, and an encoder from make_encoder")
        return drop(x.contiguous(), hash_vectors(seeds ^ self.site, x.shape[:-1], rows, frames), self.p)


def number_sites(encoder: nn.Module) -> None:
    """Gives each dropout of an encoder a number of its own, by its name."""
    for name, module in encoder.named_modules():
        if isinstance(module, Dropout):
            module.site = seed_of("dropout site", name)


def hash_vectors(seeds: Tensor, shape: torch.Size, rows: int, frames: int) -> Tensor:
    """int32 `shape`: a hash for each place of a tensor without its last axis, by row, frame and the rest of the place.

    The frame counts most, so that a place keeps its hash whatever the padded length is.
    """
    device = seeds.device
    place = torch.zeros((), dtype=torch.int64, device=device)
    # Fastest first: the axes beside rows and frames, then the frames.
    axes = [axis for axis in reversed(range(len(shape))) if axis not in (rows, frames)] + [frames]
    stride = 1
    for axis in axes:
        along = torch.arange(shape[axis], device=device) * stride
        place = place + along.view([-1 if each == axis else 1 for each in range(len(shape))])
        stride *= shape[axis]
    of_rows = _mix(seeds).view([-1 if each == rows else 1 for each in range(len(shape))])
    return (_mix(of_rows + place * _GOLDEN) >> 32).to(torch.int32)


def _mix(state: Tensor) -> Tensor:
    """SplitMix64's finaliser, as in draws.py; int64, whose shifts copy the sign and are masked for that reason."""
    state = state + _GOLDEN
    state = (state ^ ((state >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    state = (state ^ ((state >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return state ^ ((state >> 31) & (2**33 - 1))


def lowest_kept(p: float) -> int:
    """The lowest int32 that is kept: a share p of all int32 lies below it."""
    return round(p * 2**32) - 2**31


@torch.library.custom_op("ddp_asr::dropout", mutates_args=())
def drop(x: Tensor, hashes: Tensor, p: float) -> Tensor:
    """Contiguous `x` (..., D) with elements dropped by the hashes (...) of its vectors, the others divided by 1 - p."""
    if x.is_cuda:
        from ddp_asr.encoders.dropout_cuda import drop as drop_on_cuda

        return drop_on_cuda(x, hashes, p)
    return _drop_eagerly(x, hashes, p)


def _drop_eagerly(x: Tensor, hashes: Tensor, p: float) -> Tensor:
    size = x.shape[-1]
    column = torch.arange(size, dtype=torch.int32, device=x.device) * COLUMN_FACTOR
    column = (column ^ ((column >> 15) & (2**17 - 1))) * FIRST_FACTOR
    out, rows = torch.empty_like(x), max(1, _PIECE_ELEMENTS // max(1, size))
    pieces = (part.split(rows) for part in (x.view(-1, size), hashes.reshape(-1, 1), out.view(-1, size)))
    for piece, hash_of, into in zip(*pieces, strict=True):
        mixed = hash_of ^ column
        mixed *= FIRST_FACTOR
        mixed ^= (mixed >> 15).bitwise_and_(2**17 - 1)
        mixed *= SECOND_FACTOR
        # A product, so that what is not finite stays so.
        torch.mul(piece, mixed >= lowest_kept(p), out=into).mul_(1 / (1 - p))
    return out


@drop.register_fake
def _(x: Tensor, hashes: Tensor, p: float) -> Tensor:
    return torch.empty_like(x)


def _remember(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    _, hashes, ctx.p = inputs
    ctx.save_for_backward(hashes)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (hashes,) = ctx.saved_tensors
    return drop(grad.contiguous(), hashes, ctx.p), None, None


drop.register_autograd(_backward, setup_context=_remember)
