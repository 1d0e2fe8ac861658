"""Reverberation of some of the utterances: an utterance as it sounds in a room, given the room's impulse response.

    utterance (S,) * response (R,) --cut to S from the peak of the response on--> scaled to the utterance's loudness

The peak of the response is the direct path of the sound. It stays in its place, so that words stay at their times, and
what comes before it (in a measured response: noise, or the rounding of a filter) is kept.

The convolution is done by overlap-save in float32: each block of the utterance, with the R - 1 samples before it, goes
through a Fourier transform of a power of two. For 16 s and a response of 1 s that takes 5 ms on a core, one transform
over all 17 s 8 ms, and one over 271,999 samples (a length with a large prime factor), as
`torchaudio.functional.fftconvolve` takes it, 80 ms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddp_asr import config
from ddp_asr.draws import Draw
from ddp_asr.features import Clips

_SMALLEST_TRANSFORM = 1 << 15


@dataclass(frozen=True)
class Room:
    """The sound of a room."""

    share: float  # of the utterances
    clips: Clips

    purpose = "room"

    @classmethod
    def from_settings(cls, settings: config.Augment, clips: Mapping[str, Clips]) -> Room | None:
        room = settings.room
        return cls(room.share, clips["room"]) if room.share else None

    def __call__(self, waveform: NDArray[np.int16], draw: Draw) -> NDArray[np.int16]:
        chance, which = draw.uniform(2)
        if chance >= self.share:
            return waveform
        number = int(which * len(self.clips.samples))
        response = self.clips.read(number, 0, int(self.clips.samples[number]))
        peak = int(np.abs(response.astype(np.int32)).argmax())  # -32768 has no absolute value in int16
        first = max(0, peak - len(waveform) + 1)  # what is further away than the utterance is long reaches no sample
        response = response[first : peak + len(waveform)]
        reverberated = convolve(waveform.astype(np.float32), response * np.float32(1 / 32768), peak - first)
        loudness, dry_loudness = _loudness(reverberated), _loudness(waveform)
        if not loudness:  # silence, or a response without a sound
            return waveform
        reverberated *= np.float32(dry_loudness / loudness)
        np.rint(reverberated, out=reverberated)
        return np.clip(reverberated, -32768, 32767, out=reverberated).astype(np.int16)


def convolve(waveform: NDArray[np.float32], response: NDArray[np.float32], delay: int) -> NDArray[np.float32]:
    """(S,) * (R,) -> (S,): the convolution from sample `delay` < R on, as many samples as the waveform has."""
    before = len(response) - 1  # samples that a block needs of what lies before it
    in_one = 1 << (len(waveform) + before - 1).bit_length()
    transform = min(in_one, max(_SMALLEST_TRANSFORM, 1 << (2 * before).bit_length()))
    hop = transform - before
    blocks = -(-len(waveform) // hop)
    padded = np.zeros(blocks * hop + before, np.float32)
    padded[before - delay : before - delay + len(waveform)] = waveform
    overlapping = np.lib.stride_tricks.sliding_window_view(padded, transform)[::hop]  # (blocks, transform)
    spectrum = np.fft.rfft(overlapping) * np.fft.rfft(response, transform)
    convolved = np.fft.irfft(spectrum, transform)[:, before:]  # the first ones hold what wraps around
    return convolved.reshape(-1)[: len(waveform)].astype(np.float32, copy=False)


def _loudness(waveform: NDArray[np.float32] | NDArray[np.int16]) -> float:
    """The root of the mean square."""
    return float(np.sqrt(np.square(waveform, dtype=np.float32).mean()))
