"""A change of pitch of some of the utterances, by a drawn number of semitones; their tempo and length stay.

    waveform (S,) --features/speed--> (S / factor,), higher --windows, repeated or left out--> (S,)

The second step (WSOLA: Verhelst and Roelands, 1993) adds up windows of 32 ms, 16 ms apart. Each is looked for within
10 ms of the place where it belongs: the one is taken that is most like what follows the window before, so the periods
of a voice go on without a break. 16 s take 13 ms on a core, most of it in Python.

What did not do: `torchaudio.functional.pitch_shift` takes 2 to 9 s, because it resamples by whole numbers without a
small common divisor. A phase vocoder took 23 ms, and a tone after a pause lost 5 to 10 dB: the phases of neighbouring
frequencies come out of the pause unrelated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddp_asr import config
from ddp_asr.draws import Draw
from ddp_asr.features import Clips
from ddp_asr.features.speed import change_speed, to_int16

_WINDOW, _HOP, _REACH = 512, 256, 160  # samples; the last is half a period of a voice of 50 Hz
_COARSE = 4  # samples that the search takes as one at first
_STEPS = 4  # of a semitone: each pitch has a kernel of features/speed, which is kept
# All periods of a steady tone are alike; of them the nearest is taken, so that times stay.
_NEARNESS = 1.0 - 0.2 * np.abs(np.linspace(-1.0, 1.0, 2 * _REACH // _COARSE + 1))
_HANN = np.hanning(_WINDOW + 1)[:-1].astype(np.float32)


@dataclass(frozen=True)
class Pitch:
    """A pitch higher or lower by up to so many semitones, in quarters."""

    share: float  # of the utterances
    semitones: float

    purpose = "pitch"

    @classmethod
    def from_settings(cls, settings: config.Augment, clips: Mapping[str, Clips]) -> Pitch | None:
        pitch = settings.pitch
        return cls(pitch.share, pitch.semitones) if pitch.share else None

    def __call__(self, waveform: NDArray[np.int16], draw: Draw) -> NDArray[np.int16]:
        chance, place, direction = draw.uniform(3)
        if chance >= self.share:
            return waveform
        steps = 1 + int(place * int(_STEPS * self.semitones))
        return shift(waveform, 2.0 ** ((steps if direction < 0.5 else -steps) / _STEPS / 12))


def shift(waveform: NDArray[np.int16], factor: float) -> NDArray[np.int16]:
    """The waveform with every frequency multiplied by the factor."""
    higher = np.empty(max(1, round(len(waveform) / factor)), np.float32)
    change_speed(waveform, factor, higher)
    return to_int16(stretch(higher, len(waveform), factor)).astype(np.int16)


def stretch(waveform: NDArray[np.float32], samples: int, factor: float) -> NDArray[np.float32]:
    """(S,) -> (samples,), factor times as long, with the same frequencies."""
    windows = samples // _HOP + 2  # that the output is made of, the first around its first sample
    before = _WINDOW + _REACH
    padded = np.zeros(before + max(len(waveform), int(windows * _HOP / factor)) + 2 * before, np.float32)
    padded[before : before + len(waveform)] = waveform
    coarse = padded[: len(padded) // _COARSE * _COARSE].reshape(-1, _COARSE).sum(1)  # a sixteenth of the arithmetic
    energy = np.concatenate(([0.0], np.cumsum(np.square(coarse, dtype=np.float64))))
    stretched = np.zeros((windows + 1) * _HOP, np.float32)
    place = before - _HOP
    for number in range(windows):
        if number:
            own = before - _HOP + round(number * _HOP / factor)
            place = _most_alike(padded, coarse, energy, place + _HOP, own)
        stretched[number * _HOP : number * _HOP + _WINDOW] += padded[place : place + _WINDOW] * _HANN
    return stretched[_HOP : _HOP + samples]


def _most_alike(
    padded: NDArray[np.float32], coarse: NDArray[np.float32], energy: NDArray[np.float64], wanted: int, own: int
) -> int:
    """Where around `own` the window begins that has the highest normalised correlation with the one at `wanted`."""
    first, length = (own - _REACH) // _COARSE, _WINDOW // _COARSE
    last = first + len(_NEARNESS)
    template = coarse[wanted // _COARSE : wanted // _COARSE + length]
    alike = np.correlate(coarse[first : last + length - 1], template)
    alike *= _NEARNESS / np.sqrt(energy[first + length : last + length] - energy[first:last] + 1.0)
    best = int(alike.argmax())
    if alike[best] <= 0:  # silence
        return own
    start = (first + best) * _COARSE - _COARSE + 1
    fine = np.correlate(padded[start : start + _WINDOW + 2 * _COARSE - 2], padded[wanted : wanted + _WINDOW])
    return start + int(fine.argmax())
