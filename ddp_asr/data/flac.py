"""Stretches of recordings that lie in memory as FLAC, decoded to int16 and compared with what the index says.

decode(flac, samples, out)                   # the whole recording, of so many samples
decode(flac, samples, out, first=16_000)     # as many samples as `out` has, from the second second on
"""

from __future__ import annotations

import os

import numpy as np
import soundfile
from numpy.typing import NDArray

from ddp_asr import SAMPLE_RATE_HZ

ERRORS = (OSError, soundfile.SoundFileError)  # of a recording that can no longer be read or decoded


class Mismatch(soundfile.SoundFileError):
    """A recording that decodes, to something else than the index says."""


def decode(flac: bytes, samples: int, out: NDArray[np.int16], first: int = 0) -> None:
    """Fills `out` with the recording's samples from `first` on.

    Raises:
        soundfile.SoundFileError: it does not decode, or not to mono 16 kHz of so many samples.
    """
    with _open(flac) as recording:
        found = (recording.samplerate, recording.channels, recording.frames)
        if found != (SAMPLE_RATE_HZ, 1, samples):
            raise Mismatch(f"(rate, channels, samples) is {found}, not {(SAMPLE_RATE_HZ, 1, samples)}")
        if first:
            recording.seek(first)
        decoded = len(recording.read(out=out))
    if decoded != len(out):  # older versions of libsndfile end early where newer ones raise
        raise Mismatch(f"{decoded} of {len(out)} samples decode")


def reason(error: Exception) -> str:
    """One line, without the name that soundfile gives the file."""
    if isinstance(error, soundfile.LibsndfileError):  # which often has no text, for a broken frame for instance
        return " ".join(f"does not decode: {error.error_string or 'damaged'}".split())
    return str(error)


def _open(flac: bytes) -> soundfile.SoundFile:
    """The recording in `flac`, as a file in memory that libsndfile reads by itself.

    `SoundFile(io.BytesIO(flac))` would call back into Python for every few kilobytes, and each time wait until the main
    thread releases Python's lock: beside a busy main thread that decodes several times slower.
    """
    descriptor = os.memfd_create("flac", os.MFD_CLOEXEC)
    try:
        os.pwrite(descriptor, flac, 0)
    except OSError:
        os.close(descriptor)
        raise
    return soundfile.SoundFile(descriptor)  # closes the descriptor, also where it raises
