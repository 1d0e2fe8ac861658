"""SpecAugment: masks drawn for each utterance by (seed, epoch, key), applied to the batch on its device.

    masks = draw(settings, seed, epoch, key_hash, frames, mel_bands, views)     # in the loader, numpy
    (features,) = apply(features, masks, views)                                 # on the device, torch

Park et al., "SpecAugment" (2019), with its time masks as a share of the utterance ("SpecAugment on large scale
datasets", 2020). A mask hides with zero, which is each band's mean after normalisation. Where the objective takes two
views of each utterance, each has masks of its own.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddp_asr import config
from ddp_asr.draws import uniform

Masks = dict[str, NDArray[np.int32]]


def draw(
    settings: config.Augment,
    seed: int,
    epoch: int,
    key_hash: NDArray[np.uint64],
    frames: NDArray[np.int64],
    mel_bands: int,
    views: int = 1,
) -> Masks:
    """Masks of B utterances: `frequency` (B, views x masks, 2) and `time` (B, views x masks, 2), each [first, end).

    Widths are uniform between 0 and the widest allowed, both included; places are uniform among those that fit.
    """
    numbers = 2 * views  # a width and a place for each mask of each view
    bands = np.full_like(frames, mel_bands)
    widest_time = np.floor(settings.time_mask_share * frames).astype(np.int64)
    widest_frequency = np.full_like(frames, settings.frequency_mask_bands)
    return {
        "frequency": _spans(
            uniform(seed, epoch, key_hash, "frequency masks", numbers * settings.frequency_masks),
            widest_frequency,
            bands,
        ),
        "time": _spans(
            uniform(seed, epoch, key_hash, "time masks", numbers * settings.time_masks), widest_time, frames
        ),
    }


def _spans(numbers: NDArray[np.float64], widest: NDArray[np.int64], length: NDArray[np.int64]) -> NDArray[np.int32]:
    """(B, 2 x masks) uniform numbers -> (B, masks, 2) spans [first, end) inside `length` (B,)."""
    for_width, for_place = np.split(numbers, 2, axis=1)
    width = np.floor(for_width * (widest[:, None] + 1))
    first = np.floor(for_place * (length[:, None] - width + 1))
    return np.stack([first, first + width], axis=2).astype(np.int32)


def fired(masks: Masks) -> dict[str, int]:
    """How many of the utterances lose at least one band, and one frame."""
    return {name: int((spans[:, :, 1] > spans[:, :, 0]).any(1).sum()) for name, spans in masks.items()}


def apply(features: Tensor, masks: dict[str, Tensor], views: int) -> list[Tensor]:
    """Features (B, T, F) once for each view, with that view's share of the masked bands and frames set to zero."""
    T, F = features.shape[1:]
    masked = []
    for view in range(views):
        hidden_bands = _hidden(masks["frequency"][:, view::views], F)[:, None, :]  # (B, 1, F)
        hidden_frames = _hidden(masks["time"][:, view::views], T)[:, :, None]  # (B, T, 1)
        masked.append(features.masked_fill(hidden_bands | hidden_frames, 0.0))
    return masked


def _hidden(spans: Tensor, length: int) -> Tensor:
    """(B, masks, 2) spans -> (B, length) True where any of an utterance's masks lies."""
    place = torch.arange(length, device=spans.device)
    return ((place >= spans[:, :, :1]) & (place < spans[:, :, 1:])).any(1)
