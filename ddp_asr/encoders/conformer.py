"""Conformer: log-mel (B, T, F) -> strided convolutions -> blocks of attention and convolution -> hidden (B, T', D).

Gulati et al., "Conformer: Convolution-augmented Transformer for Speech Recognition" (2020). A block is half a
feed-forward layer, self-attention, a convolution along time, and another half, each added to its input; then LayerNorm.
Four things differ from the paper, so that no utterance changes another and memory does not grow with T' x T':

- Positions are rotary (Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021) and not those
  of Transformer-XL. So PyTorch's fused attention computes all of it, and B x heads x T' x T' weights are never stored.
- LayerNorm takes the place of the BatchNorm in the convolution module, which would couple the utterances of a batch.
- Frames beyond a row's own are zero before each convolution, and no frame attends to them.
- Attention weights are not dropped, because fused attention draws from a generator. Other dropout is by utterance.

`context` cuts rows into chunks, which attention and the convolution along time see as rows of their own.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddp_asr import config
from ddp_asr.encoders.dropout import Dropout
from ddp_asr.encoders.layer_norm import LayerNorm
from ddp_asr.encoders.protocol import Encoded, Encoder
from ddp_asr.features.log_mel import frame_mask

_ROTARY_BASE = 10_000.0  # RoFormer's


class Part(NamedTuple):
    """Neighbouring rows of a batch whose chunks are of the same length."""

    rows: int
    chunk_frames: int  # 0: the part is the whole batch, and each row is one chunk
    own: Tensor  # (rows x chunks, chunk_frames) True where a frame is the row's own
    seen: Tensor  # (rows x chunks, 1, 1, chunk_frames) True where attention looks at a frame


def cut(x: Tensor, chunk_frames: int) -> Tensor:
    """(B, T', ...) -> (B x chunks, chunk_frames, ...), with zeros behind the last frame."""
    if missing := -x.shape[1] % chunk_frames:
        x = nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (0, missing))
    return x.reshape(-1, chunk_frames, *x.shape[2:])


class Batch(NamedTuple):
    """What the blocks need to know of a batch beside its hidden states (B, T', D)."""

    parts: list[Part]
    cosine: Tensor  # (T', 1, d / 2) of the angles by which a position turns queries and keys of d numbers
    sine: Tensor
    seeds: Tensor | None


def cut_up(frames: Tensor, longest: int, device: torch.device, context: Sequence[int] | None) -> list[Part]:
    """The parts of a batch with so many frames in each row (B,), on the CPU; `context` as in the encoder's."""
    own, parts, start = frame_mask(frames, longest, device), [], 0
    first = torch.arange(longest, device=device) == 0
    if context is None:  # no number of this batch is used, so an export by tracing holds for any batch
        return [Part(0, 0, own, (own | first)[:, None, None, :])]
    for limit, rows in itertools.groupby(context):
        chunk_frames = min(limit or longest, longest)  # a longer chunk would be padding for the most part
        end = start + len(list(rows))
        chunks = cut(own[start:end], chunk_frames)
        # The first frame always: over no frame at all, as in a chunk of padding, softmax is 0 / 0 on some devices.
        parts.append(Part(end - start, chunk_frames, chunks, (chunks | first[:chunk_frames])[:, None, None, :]))
        start = end
    return parts


def in_chunks(run: Callable[..., Tensor], parts: list[Part], *tensors: Tensor) -> Tensor:
    """Tensors (B, T', ...) -> (B, T', D); `run` gets a part's chunks of each, (chunks, frames, ...), and the part."""
    if not parts[0].chunk_frames:
        return run(*tensors, parts[0])
    outputs, rows = [], [part.rows for part in parts]
    for part, *pieces in zip(parts, *(x.split(rows) for x in tensors), strict=True):
        output = run(*(cut(piece, part.chunk_frames) for piece in pieces), part)
        outputs.append(output.reshape(part.rows, -1, output.shape[2])[:, : tensors[0].shape[1]])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def rotary_angles(frames: int, size: int, device: torch.device) -> Tensor:
    """(frames, 1, size / 2) by which each position turns each pair of numbers."""
    pairs = torch.arange(0, size, 2, device=device) / size
    return torch.arange(frames, device=device)[:, None, None] * _ROTARY_BASE**-pairs


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """(B, T', H, d) with each pair of numbers turned, so that products of two positions know their distance alone."""
    cosine, sine = cosine.to(x.dtype), sine.to(x.dtype)
    first, second = x.chunk(2, dim=3)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=3)


class FeedForward(nn.Module):
    """LayerNorm, a linear layer that widens, SiLU, and one that narrows."""

    def __init__(self, settings: config.Conformer) -> None:
        super().__init__()
        inner = settings.feed_forward_factor * settings.size
        self.norm = LayerNorm(settings.size)
        self.widen, self.narrow = nn.Linear(settings.size, inner), nn.Linear(inner, settings.size)
        self.inner_dropout, self.dropout = Dropout(settings.dropout), Dropout(settings.dropout)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """(B, T', D) -> the same shape."""
        inner = self.inner_dropout(nn.functional.silu(self.widen(self.norm(x))), batch.seeds)
        return self.dropout(self.narrow(inner), batch.seeds)


class Attention(nn.Module):
    """LayerNorm, self-attention of H heads with rotary positions, a linear layer."""

    def __init__(self, settings: config.Conformer) -> None:
        super().__init__()
        self.heads = settings.heads
        self.norm = LayerNorm(settings.size)
        # Values apart: a view of one product of all three would keep queries and keys from before the rotation.
        self.query_key = nn.Linear(settings.size, 2 * settings.size)
        self.value = nn.Linear(settings.size, settings.size)
        self.projection = nn.Linear(settings.size, settings.size)
        self.dropout = Dropout(settings.dropout)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """(B, T', D) -> the same shape."""
        x = self.norm(x)
        turned = rotate(self.query_key(x).unflatten(2, (2 * self.heads, -1)), batch.cosine, batch.sine)
        query, key = turned.chunk(2, dim=2)  # (B, T', H, D / H)
        value = self.value(x).unflatten(2, (self.heads, -1))
        return self.dropout(self.projection(in_chunks(_attend, batch.parts, query, key, value)), batch.seeds)


def _attend(query: Tensor, key: Tensor, value: Tensor, part: Part) -> Tensor:
    """(B, T', H, d) each -> (B, T', D)."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=part.seen)
    return attended.transpose(1, 2).flatten(2)


class Convolution(nn.Module):
    """LayerNorm, a gated linear layer, a convolution along time for each channel, LayerNorm, SiLU, a linear layer."""

    def __init__(self, settings: config.Conformer) -> None:
        super().__init__()
        size, kernel = settings.size, settings.kernel
        self.norm, self.gated = LayerNorm(size), nn.Linear(size, 2 * size)
        self.depthwise = nn.Conv1d(size, size, kernel, padding=kernel // 2, groups=size)
        self.inner_norm, self.projection = LayerNorm(size), nn.Linear(size, size)
        self.dropout = Dropout(settings.dropout)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """(B, T', D) -> the same shape."""
        x = in_chunks(self._along_time, batch.parts, nn.functional.glu(self.gated(self.norm(x))))
        return self.dropout(self.projection(nn.functional.silu(self.inner_norm(x))), batch.seeds)

    def _along_time(self, x: Tensor, part: Part) -> Tensor:
        return self.depthwise((x * part.own[:, :, None]).transpose(1, 2)).transpose(1, 2)


class Block(nn.Module):
    """A layer of the Conformer."""

    def __init__(self, settings: config.Conformer) -> None:
        super().__init__()
        self.before, self.after = FeedForward(settings), FeedForward(settings)
        self.attention, self.convolution = Attention(settings), Convolution(settings)
        self.norm = LayerNorm(settings.size)

    def forward(self, x: Tensor, batch: Batch) -> Tensor:
        """(B, T', D) -> the same shape."""
        x = x + 0.5 * self.before(x, batch)
        x = x + self.attention(x, batch)
        x = x + self.convolution(x, batch)
        return self.norm(x + 0.5 * self.after(x, batch))


class Conformer(Encoder):
    """The encoder; its taps lie behind each block."""

    layers_name = "blocks"

    def __init__(self, settings: config.Conformer, mel_bands: int) -> None:
        super().__init__()
        self.settings, self.size = settings, settings.size
        channels, bands = settings.conv_channels, mel_bands // settings.band_reduction
        self.strided = nn.ModuleList(
            nn.Conv2d(channels if number else 1, channels, 3, stride=(stride, 2), padding=1)
            for number, stride in enumerate(settings.time_strides)
        )
        self.bridge = nn.Linear(channels * bands, settings.size)
        self.dropout = Dropout(settings.dropout)
        self.blocks = nn.ModuleList(Block(settings) for _ in range(settings.blocks))
        self.tap_sizes = dict.fromkeys(range(1, settings.blocks + 1), settings.size)

    def forward(
        self, features: Tensor, frames: Tensor, context: Sequence[int] | None = None, seeds: Tensor | None = None
    ) -> Encoded:
        x = features[:, None]  # (B, 1, T, F)
        for conv, stride in zip(self.strided, self.settings.time_strides, strict=True):
            own = frame_mask(frames, x.shape[2], x.device)[:, None, :, None]
            x = nn.functional.silu(conv(x * own))  # (B, C, T / stride, bands / 2)
            frames = (frames + stride - 1) // stride
        x = self.dropout(self.bridge(x.transpose(1, 2).flatten(2)), seeds)  # (B, T', D)
        angles = rotary_angles(x.shape[1], self.size // self.settings.heads, x.device)
        batch, taps = Batch(cut_up(frames, x.shape[1], x.device, context), angles.cos(), angles.sin(), seeds), {}
        for number, block in enumerate(self.blocks, start=1):
            taps[number] = x = block(x, batch)
        return Encoded(x, frames, taps)
