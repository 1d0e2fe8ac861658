"""White noise under some of the utterances, as loud as a drawn signal-to-noise ratio says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddp_asr import config
from ddp_asr.draws import Draw


@dataclass(frozen=True)
class WhiteNoise:
    """Gaussian noise with the same power at all frequencies."""

    share: float  # of the utterances
    snr_db_min: float
    snr_db_max: float

    purpose = "noise"

    @classmethod
    def from_settings(cls, settings: config.Augment) -> WhiteNoise | None:
        noise = settings.noise
        return cls(noise.share, noise.snr_db_min, noise.snr_db_max) if noise.share else None

    def __call__(self, waveform: NDArray[np.int16], draw: Draw) -> NDArray[np.int16]:
        chance, place = draw.uniform(2)
        if chance >= self.share:
            return waveform
        snr_db = self.snr_db_min + place * (self.snr_db_max - self.snr_db_min)
        speech = waveform.astype(np.float32)
        loudness = np.sqrt(np.mean(speech**2, dtype=np.float64)) * 10 ** (-snr_db / 20)  # root mean square
        speech += draw.generator().standard_normal(len(speech), np.float32) * np.float32(loudness)
        return np.clip(np.rint(speech), -32768, 32767).astype(np.int16)
