"""From waveforms to what the encoder hears: waveform augmentations, log-mel features, SpecAugment's masks.

    for op in waveform_augmentations(config.augment, clips):            # those that the settings turn on, in order
        waveform = op(waveform, Draw(op.purpose, seed, epoch, key_hash))

A new waveform augmentation is a module in this package with a class of `WaveformAugmentation`'s methods, a line in
`registered` at the place where it is to run, and its settings; `tests/test_waveform_augmentations.py` runs over all.
It keeps the length, because the plan counts samples; a change of speed changes it and so belongs to the plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ddp_asr import config
from ddp_asr.draws import Draw


class Clips(Protocol):
    """N recordings that an augmentation mixes into utterances; in an order that depends on their keys alone."""

    samples: NDArray[np.int64]
    """(N,): the length of each."""

    def read(self, number: int, first: int, samples: int) -> NDArray[np.int16]:
        """So many samples of a recording from `first` on, all of them inside it.

        Raises:
            UserError: it can no longer be read.
        """
        ...


class WaveformAugmentation(Protocol):
    """Something that is done to the waveform of some training utterances."""

    purpose: str
    """What its random numbers are drawn for; no two augmentations share one, and renaming it changes every run."""

    @classmethod
    def from_settings(cls, settings: config.Augment, clips: Mapping[str, Clips]) -> WaveformAugmentation | None:
        """None where the settings turn it off, as they do by default; `clips` as `Config.clips` names them."""
        ...

    def __call__(self, waveform: NDArray[np.int16], draw: Draw) -> NDArray[np.int16]:
        """int16 (S,) -> int16 (S,), a function of its arguments alone; the waveform given is left as it is.

        It has fired where what it returns differs from what it was given (`MicroBatch.fired`).
        """
        ...


NO_CLIPS: Mapping[str, Any] = MappingProxyType({})


def registered() -> tuple[type[WaveformAugmentation], ...]:
    """All of them, in the order in which they run."""
    from ddp_asr.features.noise import Background, WhiteNoise
    from ddp_asr.features.pitch import Pitch
    from ddp_asr.features.room import Room
    from ddp_asr.features.volume import Volume

    # As sound goes: a voice in a room, noise beside it, and what the microphone and its gain add.
    return (Pitch, Room, Background, WhiteNoise, Volume)


def turned_on(settings: config.Augment, waveform_augmentations: Iterable[WaveformAugmentation]) -> list[str]:
    """The augmentations that the settings turn on, as the log of an epoch names them."""
    return [
        *(speed_name(factor) for factor in settings.speeds if factor != 1.0),
        *(op.purpose for op in waveform_augmentations),
        *(["frequency masks"] if settings.frequency_masks and settings.frequency_mask_bands else []),
        *(["time masks"] if settings.time_masks and settings.time_mask_share else []),
    ]


def speed_name(factor: float) -> str:
    return f"speed {factor:g}"


def waveform_augmentations(
    settings: config.Augment, clips: Mapping[str, Clips] = NO_CLIPS
) -> list[WaveformAugmentation]:
    """Those that the settings turn on, in the order in which they run."""
    made = [kind.from_settings(settings, clips) for kind in registered()]
    return [op for op in made if op is not None]
