"""Noise under some of the utterances, as loud as a drawn signal-to-noise ratio (SNR) says: white, or recorded.

    noise, scaled so that 10 log10(power of the utterance / power of the noise) is the SNR in dB, + utterance

Power is the mean square over the whole utterance. Silence has no power: nothing is added to a silent utterance, and
a silent noise adds nothing.

White noise is a stretch of one long recording of Gaussian noise, the same in every process, from a drawn place on: to
draw it anew for each utterance took more than half as long as to decode the utterance. Recorded noise is a stretch of
one of the recordings in `data.noise`; one that is shorter than the utterance is repeated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from ddp_asr import config
from ddp_asr.draws import Draw
from ddp_asr.features import Clips

_RECORDING_SAMPLES = 1 << 20  # 65 s, 4 MB


@dataclass(frozen=True)
class WhiteNoise:
    """Gaussian noise with the same power at all frequencies."""

    share: float  # of the utterances
    snr_db_min: float
    snr_db_max: float

    purpose = "noise"

    @classmethod
    def from_settings(cls, settings: config.Augment, clips: Mapping[str, Clips]) -> WhiteNoise | None:
        noise = settings.noise
        return cls(noise.share, noise.snr_db_min, noise.snr_db_max) if noise.share else None

    def __call__(self, waveform: NDArray[np.int16], draw: Draw) -> NDArray[np.int16]:
        chance, place, first = draw.uniform(3)
        if chance >= self.share:
            return waveform
        snr_db = self.snr_db_min + place * (self.snr_db_max - self.snr_db_min)
        return _mix(waveform, _stretch(first, len(waveform)), 1.0, snr_db)


@dataclass(frozen=True)
class Background:
    """A stretch of recorded noise."""

    share: float  # of the utterances
    snr_db_min: float
    snr_db_max: float
    clips: Clips

    purpose = "background"

    @classmethod
    def from_settings(cls, settings: config.Augment, clips: Mapping[str, Clips]) -> Background | None:
        background = settings.background
        if not background.share:
            return None
        return cls(background.share, background.snr_db_min, background.snr_db_max, clips["background"])

    def __call__(self, waveform: NDArray[np.int16], draw: Draw) -> NDArray[np.int16]:
        chance, place, which, first = draw.uniform(4)
        if chance >= self.share:
            return waveform
        snr_db = self.snr_db_min + place * (self.snr_db_max - self.snr_db_min)
        noise = self._noise(int(which * len(self.clips.samples)), first, len(waveform))
        loudness = float(np.sqrt(np.square(noise, dtype=np.float32).mean()))
        return _mix(waveform, noise, loudness, snr_db) if loudness else waveform

    def _noise(self, number: int, place: float, samples: int) -> NDArray[np.int16]:
        """So many samples of a recording, from a place in [0, 1) of it on."""
        there = int(self.clips.samples[number])
        if there < samples:
            return np.resize(np.roll(self.clips.read(number, 0, there), -int(place * there)), samples)
        return self.clips.read(number, int(place * (there - samples + 1)), samples)


def _mix(
    waveform: NDArray[np.int16], noise: NDArray[np.float32] | NDArray[np.int16], noise_loudness: float, snr_db: float
) -> NDArray[np.int16]:
    """The waveform with the noise under it; loudness is the root of the mean square."""
    mixed = np.square(waveform, dtype=np.float32)  # one array for all that follows: a new one costs page faults
    loudness = np.sqrt(mixed.mean()) * 10 ** (-snr_db / 20)
    np.multiply(noise, np.float32(loudness / noise_loudness), out=mixed)
    mixed += waveform
    np.rint(mixed, out=mixed)
    return np.clip(mixed, -32768, 32767, out=mixed).astype(np.int16)


def _stretch(place: float, samples: int) -> NDArray[np.float32]:
    """So many samples of the white noise, from a place in [0, 1) of it on."""
    recording = _recording()
    if samples > len(recording):
        return np.resize(np.roll(recording, -int(place * len(recording))), samples)
    first = int(place * (len(recording) - samples + 1))
    return recording[first : first + samples]


@cache
def _recording() -> NDArray[np.float32]:
    return np.random.Generator(np.random.PCG64(0)).standard_normal(_RECORDING_SAMPLES, np.float32)
