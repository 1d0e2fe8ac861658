"""ResCNN + BiGRU: log-mel (B, T, F) -> strided convolutions -> residual blocks -> BiGRU layers -> hidden (B, T', D).

The network of AssemblyAI's "Building an End-to-End Speech Recognition Model in PyTorch", Deep Speech 2 in shape
(Amodei et al., 2015). With its classifier (model.py) it has the same 23,705,373 parameters at the default sizes. Two
things are mended:

- The tutorial's GRUs from the second on run over the batch axis (`batch_first` is set in the first only); here all run
  over time.
- Padding is invisible. The backward direction of a BiGRU is a one-directional GRU over the sequence reversed by its own
  length. (On a CPU that is 1.4 times faster than packing.)

Autocast of the caller covers convolutions and linear layers; `encoders.gru` casts for itself.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from ddp_asr import config
from ddp_asr.encoders.dropout import Dropout
from ddp_asr.encoders.gru import run_gru
from ddp_asr.encoders.layer_norm import LayerNorm
from ddp_asr.encoders.protocol import Encoded, Encoder
from ddp_asr.features.log_mel import frame_mask


class ResidualBlock(nn.Module):
    """Pre-activation residual block: LayerNorm over the bands, GELU, dropout, Conv 3x3, twice."""

    def __init__(self, channels: int, bands: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(LayerNorm(bands) for _ in range(2))
        self.dropouts = nn.ModuleList(Dropout(dropout) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor, own: Tensor, seeds: Tensor | None) -> Tensor:
        """(B, C, T', bands) -> the same shape; `own` (B, 1, T', 1) is True where a frame is the row's own."""
        residual = x
        for norm, dropout, conv in zip(self.norms, self.dropouts, self.convs, strict=True):
            x = dropout(nn.functional.gelu(norm(x)), seeds, rows=0, frames=2)
            # LayerNorm's bias makes padding non-zero again, and a kernel at the last frame would see it.
            x = conv(x * own)
        return x + residual


def reversal(frames: Tensor, longest: int, device: torch.device) -> Tensor:
    """(T, B) which frame of (T, B, D) stands where once the first `frames[b]` of each row are reversed in place."""
    place = torch.arange(longest, device=device)[:, None]
    lengths = frames.to(device, non_blocking=True)
    return torch.where(place < lengths, lengths - 1 - place, place)


class _Reverse(Function):
    """(T, B, D) and its reversal (T, B) -> (T, B, D).

    A reversal is its own inverse, so the backward pass gathers, too; autograd's would be an atomic scatter on a GPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, reversal: Tensor) -> Tensor:
        ctx.save_for_backward(reversal)
        return x.gather(0, reversal[:, :, None].expand_as(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (reversal,) = ctx.saved_tensors
        return _Reverse.apply(grad, reversal), None


def reverse(x: Tensor, reversal: Tensor) -> Tensor:
    """(T, B, D) with each row's own frames in reverse order, the rest in place."""
    reversed_: Tensor = _Reverse.apply(x, reversal)
    return reversed_


def run_in_chunks(gru: nn.GRU, x: Tensor, chunk_frames: int) -> Tensor:
    """(T', B, D) -> (T', B, H) of a GRU whose state is zero again every `chunk_frames`; the chunks run as one batch."""
    T, B, _ = x.shape
    chunk_frames = min(chunk_frames, T)  # a longer chunk would be padding for the most part
    chunks = -(-T // chunk_frames)
    padded = nn.functional.pad(x, (0, 0, 0, 0, 0, chunks * chunk_frames - T))
    as_batch = padded.unflatten(0, (chunks, chunk_frames)).transpose(0, 1).flatten(1, 2)  # (chunk, chunks x B, D)
    return run_gru(gru, as_batch).unflatten(1, (chunks, B)).transpose(0, 1).flatten(0, 1)[:T]


def run_with_context(gru: nn.GRU, x: Tensor, context: Sequence[int] | None) -> Tensor:
    """(T', B, D) -> (T', B, H), each row in chunks of its own `context`, or whole where that is 0."""
    if context is None or not any(context):
        return run_gru(gru, x)
    parts, start = [], 0
    for chunk_frames, rows in itertools.groupby(context):  # neighbours with the same context run as one batch
        end = start + len(list(rows))
        part = x[:, start:end]
        parts.append(run_in_chunks(gru, part, chunk_frames) if chunk_frames else run_gru(gru, part))
        start = end
    return torch.cat(parts, dim=1)


class BiGRU(nn.Module):
    """LayerNorm, GELU, a GRU in each direction, dropout."""

    def __init__(self, input_size: int, size: int, dropout: float) -> None:
        super().__init__()
        self.norm = LayerNorm(input_size)
        self.forward_gru = nn.GRU(input_size, size)
        self.backward_gru = nn.GRU(input_size, size)
        self.dropout = Dropout(dropout)

    def forward(
        self, x: Tensor, reversal: Tensor, context: Sequence[int] | None = None, seeds: Tensor | None = None
    ) -> Tensor:
        """(T', B, D) -> (T', B, 2 x size); `context` and `seeds` as in the encoder's."""
        x = nn.functional.gelu(self.norm(x))
        ahead = run_with_context(self.forward_gru, x, context)
        back = reverse(run_with_context(self.backward_gru, reverse(x, reversal), context), reversal)
        return self.dropout(torch.cat([ahead, back], dim=2), seeds, rows=1, frames=0)


class ResCNNBiGRU(Encoder):
    """The encoder; its taps lie behind each BiGRU layer."""

    layers_name = "rnn"

    def __init__(self, settings: config.RescnnBigru, mel_bands: int) -> None:
        super().__init__()
        self.settings = settings
        channels, bands = settings.conv_channels, mel_bands
        self.strided = nn.ModuleList()
        for stride in settings.time_strides:
            incoming = channels if len(self.strided) else 1
            self.strided.append(nn.Conv2d(incoming, channels, 3, stride=(stride, 2), padding=1))
            bands //= 2
        self.blocks = nn.ModuleList(
            ResidualBlock(channels, bands, settings.dropout) for _ in range(settings.residual_blocks)
        )
        self.bridge = nn.Linear(channels * bands, settings.rnn_size)
        self.rnn = nn.ModuleList(
            BiGRU(2 * settings.rnn_size if layer else settings.rnn_size, settings.rnn_size, settings.dropout)
            for layer in range(settings.rnn_layers)
        )
        self.projection = nn.Linear(2 * settings.rnn_size, settings.rnn_size)
        self.dropout = Dropout(settings.dropout)
        self.size = settings.rnn_size
        self.tap_sizes = dict.fromkeys(range(1, settings.rnn_layers + 1), 2 * settings.rnn_size)

    def forward(
        self, features: Tensor, frames: Tensor, context: Sequence[int] | None = None, seeds: Tensor | None = None
    ) -> Encoded:
        x = features[:, None]  # (B, 1, T, F)
        own = _own(frames, x)
        for conv, stride in zip(self.strided, self.settings.time_strides, strict=True):
            x = conv(x * own)  # (B, C, T / stride, bands / 2)
            frames = (frames + stride - 1) // stride
            own = _own(frames, x)
        for block in self.blocks:
            x = block(x, own, seeds)
        x = self.bridge(x.transpose(1, 2).flatten(2))  # (B, T', rnn_size)
        x = x.transpose(0, 1)  # (T', B, rnn_size)
        backwards, taps = reversal(frames, x.shape[0], x.device), {}
        for number, layer in enumerate(self.rnn, start=1):
            x = layer(x, backwards, context, seeds)  # (T', B, 2 x rnn_size)
            taps[number] = x.transpose(0, 1)
        hidden = self.dropout(nn.functional.gelu(self.projection(x.transpose(0, 1))), seeds)
        return Encoded(hidden, frames, taps)


def _own(frames: Tensor, x: Tensor) -> Tensor:
    """(B, 1, T, 1) True where a frame of (B, C, T, F) is the row's own."""
    return frame_mask(frames, x.shape[2], x.device)[:, None, :, None]
