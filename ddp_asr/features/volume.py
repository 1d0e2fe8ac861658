"""A change of volume of some of the utterances, by a drawn number of decibels.

The features are normalised for each utterance, so the volume itself changes next to nothing of what the network gets.
What it changes is what is lost: loud samples are clipped at full scale, and faint ones are rounded to 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddp_asr import config
from ddp_asr.draws import Draw
from ddp_asr.features import Clips


@dataclass(frozen=True)
class Volume:
    """A gain, the same for all samples of an utterance."""

    share: float  # of the utterances
    db_min: float
    db_max: float

    purpose = "volume"

    @classmethod
    def from_settings(cls, settings: config.Augment, clips: Mapping[str, Clips]) -> Volume | None:
        volume = settings.volume
        return cls(volume.share, volume.db_min, volume.db_max) if volume.share else None

    def __call__(self, waveform: NDArray[np.int16], draw: Draw) -> NDArray[np.int16]:
        chance, place = draw.uniform(2)
        if chance >= self.share:
            return waveform
        gain = 10 ** ((self.db_min + place * (self.db_max - self.db_min)) / 20)
        changed = np.multiply(waveform, np.float32(gain), dtype=np.float32)
        np.rint(changed, out=changed)
        return np.clip(changed, -32768, 32767, out=changed).astype(np.int16)
