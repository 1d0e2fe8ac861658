"""White noise under some of the utterances, as loud as a drawn signal-to-noise ratio says.

The noise is a stretch of one long recording of Gaussian noise, the same in every process, from a drawn place on: to
draw it anew for each utterance took more than half as long as to decode the utterance.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ddp_asr import config
from ddp_asr.draws import Draw

_RECORDING_SAMPLES = 1 << 20  # 65 s, 4 MB


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
        chance, place, first = draw.uniform(3)
        if chance >= self.share:
            return waveform
        snr_db = self.snr_db_min + place * (self.snr_db_max - self.snr_db_min)
        mixed = np.square(waveform, dtype=np.float32)  # one array for all that follows: a new one costs page faults
        loudness = np.float32(np.sqrt(mixed.mean()) * 10 ** (-snr_db / 20))  # root mean square
        np.multiply(_stretch(first, len(waveform)), loudness, out=mixed)
        mixed += waveform
        np.rint(mixed, out=mixed)
        return np.clip(mixed, -32768, 32767, out=mixed).astype(np.int16)


def _stretch(place: float, samples: int) -> NDArray[np.float32]:
    """So many samples of the recording, from a place in [0, 1) of it on."""
    recording = _recording()
    if samples > len(recording):
        return np.resize(np.roll(recording, -int(place * len(recording))), samples)
    first = int(place * (len(recording) - samples + 1))
    return recording[first : first + samples]


@cache
def _recording() -> NDArray[np.float32]:
    return np.random.Generator(np.random.PCG64(0)).standard_normal(_RECORDING_SAMPLES, np.float32)
