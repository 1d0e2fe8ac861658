"""Three ways to run a bidirectional GRU layer: as the encoder does, in two streams, and as one call of cuDNN.

Each takes a `BiGRU` and x (T', B, D) behind norm and GELU, and gives (T', B, 2 H). They differ only in frames
beyond a row's own.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from ddp_asr.encoders.gru import run_gru
from ddp_asr.encoders.rescnn_bigru import BiGRU, reversal, reverse


class Lengths(NamedTuple):
    """What a layer needs to know of the rows' lengths."""

    frames: Tensor  # (B,) on the CPU
    reversal: Tensor  # (T', B), see `rescnn_bigru.reversal`


Way = Callable[[BiGRU, Tensor, Lengths], Tensor]


def lengths_of(frames: Tensor, longest: int, device: torch.device) -> Lengths:
    return Lengths(frames, reversal(frames, longest, device))


def in_turn(layer: BiGRU, x: Tensor, lengths: Lengths) -> Tensor:
    """What the encoder does."""
    ahead = run_gru(layer.forward_gru, x)
    back = reverse(run_gru(layer.backward_gru, reverse(x, lengths.reversal)), lengths.reversal)
    return torch.cat([ahead, back], dim=2)


_side: list[torch.cuda.Stream] = []


def in_two_streams(layer: BiGRU, x: Tensor, lengths: Lengths) -> Tensor:
    """The backward direction in a stream of its own; its gradients are computed there, too."""
    if not x.is_cuda:
        return in_turn(layer, x, lengths)
    if not _side:
        _side.append(torch.cuda.Stream())
    here, side = torch.cuda.current_stream(), _side[0]
    side.wait_stream(here)
    with torch.cuda.stream(side):
        back = reverse(run_gru(layer.backward_gru, reverse(x, lengths.reversal)), lengths.reversal)
    ahead = run_gru(layer.forward_gru, x)
    here.wait_stream(side)
    for tensor, stream in ((x, side), (lengths.reversal, side), (back, here)):
        tensor.record_stream(stream)  # the allocator must not hand its memory out while the other stream uses it
    return torch.cat([ahead, back], dim=2)


def in_one_call(layer: BiGRU, x: Tensor, lengths: Lengths) -> Tensor:
    """Packed, so that the backward direction of each row begins at its own last frame."""
    packed = pack_padded_sequence(x, lengths.frames, enforce_sorted=False)
    data = _bidirectional(layer, packed.data, packed.batch_sizes)
    output = PackedSequence(data, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
    return pad_packed_sequence(output, total_length=len(x))[0]


def in_one_call_without_lengths(layer: BiGRU, x: Tensor, lengths: Lengths) -> Tensor:
    """The bound of what one call could bring: right only where all rows are equally long."""
    return _bidirectional(layer, x, None)


def _bidirectional(layer: BiGRU, x: Tensor, batch_sizes: Tensor | None) -> Tensor:
    device, size = x.device.type, layer.forward_gru.hidden_size
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    rows = x.shape[1] if batch_sizes is None else int(batch_sizes[0])
    with torch.autocast(device, enabled=False):
        weights = _both_directions(layer, dtype)
        x, state = x.to(dtype), x.new_zeros(2, rows, size, dtype=dtype)
        if batch_sizes is None:
            return torch.gru(x, state, weights, True, 1, 0.0, True, True, False)[0]
        return torch.gru(x, batch_sizes, state, weights, True, 1, 0.0, True, True)[0]


def _both_directions(layer: BiGRU, dtype: torch.dtype) -> list[Tensor]:
    """Weights of both directions in one piece of memory as cuDNN lays them out: all matrices, then all biases."""
    ahead, back = layer.forward_gru.all_weights[0], layer.backward_gru.all_weights[0]
    in_memory = [*ahead[:2], *back[:2], *ahead[2:], *back[2:]]
    flat = torch.cat([weight.flatten() for weight in in_memory]).to(dtype)
    parts = flat.split([weight.numel() for weight in in_memory])
    shaped = [part.view_as(weight) for part, weight in zip(parts, in_memory, strict=True)]
    return [shaped[place] for place in (0, 1, 4, 5, 2, 3, 6, 7)]
