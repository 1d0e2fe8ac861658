"""The acoustic model: log-mel (B, T, F) -> strided convolutions -> residual blocks -> BiGRU -> logits (B, T', V).

The network of AssemblyAI's "Building an End-to-End Speech Recognition Model in PyTorch", Deep Speech 2 in shape
(Amodei et al., 2015), with the same 23,705,373 parameters at the default sizes, and two things mended:

- Its GRUs from the second on ran over the batch axis (`batch_first` only in the first); here all run over time.
- Padding is invisible. An utterance's logits are the same alone and beside longer ones: frames beyond its own are zero
  before every operation that looks at neighbours, and the backward direction of a BiGRU is a one-directional GRU over
  the sequence reversed *by its own length*. (On a CPU that is 1.4 times faster than packing, too.)

With `objective.intermediate_weight` a part of the loss is taken behind the first GRU block, which so has to spell by
itself: Lee and Watanabe, "Intermediate loss regularization for CTC-based speech recognition" (2021).

Precision. The caller's autocast covers convolutions and linear layers; `ddp_asr.encoders.gru` casts for itself.
"""

import torch
from torch import Tensor, nn

from ddp_asr import config
from ddp_asr.encoders.gru import run_gru
from ddp_asr.features.log_mel import frame_mask


def _mask_frames(x: Tensor, lengths: Tensor) -> Tensor:
    """(B, C, T, F) with every frame beyond an utterance's own set to zero."""
    return x * frame_mask(lengths, x.shape[2])[:, None, :, None]


class ResidualBlock(nn.Module):
    """Pre-activation residual block: LayerNorm over the bands, GELU, dropout, Conv 3x3, twice."""

    def __init__(self, channels: int, bands: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(bands) for _ in range(2))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """(B, C, T', bands) -> the same shape."""
        residual = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = self.dropout(nn.functional.gelu(norm(x)))
            # LayerNorm's bias makes padding non-zero again, and a kernel at the last frame would see it.
            x = conv(_mask_frames(x, lengths))
        return x + residual


def reverse_by_length(x: Tensor, lengths: Tensor) -> Tensor:
    """(T, B, D) with the first `lengths[b]` frames of each sequence in reverse order, the rest in place."""
    T, B, _ = x.shape
    place = torch.arange(T, device=x.device)[:, None].expand(T, B)
    source = torch.where(place < lengths, lengths - 1 - place, place)
    return x.gather(0, source[:, :, None].expand_as(x))


def run_in_spans(gru: nn.GRU, x: Tensor, span: int) -> Tensor:
    """(T', B, D) -> (T', B, H) of a GRU that knows nothing again every `span` frames: its spans run side by side."""
    T, B, _ = x.shape
    span = min(span, T)  # or a span of minutes would be padding for the most part
    spans = -(-T // span)
    padded = nn.functional.pad(x, (0, 0, 0, 0, 0, spans * span - T))
    beside = padded.unflatten(0, (spans, span)).transpose(0, 1).flatten(1, 2)  # (span, spans x B, D)
    return run_gru(gru, beside).unflatten(1, (spans, B)).transpose(0, 1).flatten(0, 1)[:T]


def _run_views(gru: nn.GRU, x: Tensor, span: int) -> Tensor:
    """(T', B, D) -> (T', B, H), the second half of the batch in spans, if there are any."""
    if not span:
        return run_gru(gru, x)
    whole, cut = x.chunk(2, dim=1)
    return torch.cat([run_gru(gru, whole), run_in_spans(gru, cut, span)], dim=1)


class BiGRU(nn.Module):
    """LayerNorm, GELU, a GRU in each direction, dropout."""

    def __init__(self, input_size: int, size: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(input_size)
        self.forward_gru = nn.GRU(input_size, size)
        self.backward_gru = nn.GRU(input_size, size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, lengths: Tensor, span: int = 0) -> Tensor:
        """(T', B, D) -> (T', B, 2 x size); `span` as in the model's."""
        x = nn.functional.gelu(self.norm(x))
        ahead = _run_views(self.forward_gru, x, span)
        back = reverse_by_length(_run_views(self.backward_gru, reverse_by_length(x, lengths), span), lengths)
        return self.dropout(torch.cat([ahead, back], dim=2))


class AcousticModel(nn.Module):
    """ResCNN + BiGRU with a linear classifier over V symbols, the blank last."""

    def __init__(
        self, features: config.Features, sizes: config.RescnnBigru, vocabulary_size: int, intermediate: bool = False
    ) -> None:
        super().__init__()
        self.sizes = sizes
        channels, bands = sizes.conv_channels, features.mel_bands
        self.strided = nn.ModuleList()
        for stride in sizes.time_strides:
            incoming = channels if len(self.strided) else 1
            self.strided.append(nn.Conv2d(incoming, channels, 3, stride=(stride, 2), padding=1))
            bands //= 2
        self.blocks = nn.ModuleList(ResidualBlock(channels, bands, sizes.dropout) for _ in range(sizes.residual_blocks))
        self.bridge = nn.Linear(channels * bands, sizes.rnn_size)
        self.rnn = nn.ModuleList(
            BiGRU(2 * sizes.rnn_size if layer else sizes.rnn_size, sizes.rnn_size, sizes.dropout)
            for layer in range(sizes.rnn_layers)
        )
        self.classifier = nn.Sequential(
            nn.Linear(2 * sizes.rnn_size, sizes.rnn_size),
            nn.GELU(),
            nn.Dropout(sizes.dropout),
            nn.Linear(sizes.rnn_size, vocabulary_size),
        )
        self.intermediate = nn.Linear(2 * sizes.rnn_size, vocabulary_size) if intermediate else None

    def forward(self, features: Tensor, frames: Tensor, span: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
        """Features (B, T, F), zero beyond each utterance's frames (B,) -> logits (B, T', V) and frames (B,) of T'.

        In training with `objective.intermediate_weight`, third, the logits (B, T', V) that a linear classifier of its
        own reads from the first GRU block.

        With a `span`, in training, the GRUs start anew every so many frames of T' in the second half of the batch,
        which holds the second views: see `objective.short_context_s`.
        """
        x = features[:, None]  # (B, 1, T, F)
        for conv, stride in zip(self.strided, self.sizes.time_strides, strict=True):
            x = conv(_mask_frames(x, frames))  # (B, C, T / stride, bands / 2)
            frames = (frames + stride - 1) // stride
        for block in self.blocks:
            x = block(x, frames)
        x = self.bridge(x.transpose(1, 2).flatten(2))  # (B, T', rnn_size)
        x = x.transpose(0, 1)  # (T', B, rnn_size)
        first, *others = self.rnn
        x = first(x, frames, span)
        early = self.intermediate(x.transpose(0, 1)) if self.training and self.intermediate is not None else None
        for layer in others:
            x = layer(x, frames, span)
        return self.classifier(x.transpose(0, 1)), frames, early


def count_parameters(model: nn.Module) -> int:
    """Trainable numbers."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
