"""One recording of any format -> mono 16 kHz FLAC that is known to decode, or the reason why it cannot be used.

    flac, samples, reason, detail = pack(utterance)

`pack` decodes every recording, because a header proves nothing. FLAC that is mono and 16 kHz already is passed through
byte by byte; anything else is averaged over its channels, resampled and encoded with 16 bits.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
import threading
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from ddp_asr import SAMPLE_RATE_HZ
from ddp_asr.data.sources import BAD_AUDIO, EMPTY_TRANSCRIPT, MISSING_AUDIO, MISSING_TRANSCRIPT, TOO_LONG, Utterance

if TYPE_CHECKING:
    import numpy as np
    import soundfile

DURATION_TOLERANCE_S = 0.25  # manifests round, some to tenths of a second
BLOCK_SAMPLES = 1 << 20

_opening = threading.Lock()


class Packed(NamedTuple):
    """FLAC and its number of samples, or a reason why there is none."""

    flac: bytes = b""
    samples: int = 0
    reason: str = ""
    detail: str = ""


class Unusable(Exception):
    """Audio that opens but must not be used: (reason, detail)."""


def pack(utterance: Utterance, max_seconds: float | None = None) -> Packed:
    """The utterance's audio as it goes into a shard; one that is longer than `max_seconds` is not used."""
    if utterance.reason:
        return Packed(reason=utterance.reason, detail=utterance.detail)
    if utterance.text is None:
        return Packed(reason=MISSING_TRANSCRIPT)
    if not utterance.text.strip():
        return Packed(reason=EMPTY_TRANSCRIPT)
    try:
        return _pack(utterance, math.inf if max_seconds is None else max_seconds)
    except OSError as error:
        return Packed(reason=MISSING_AUDIO, detail=error.strerror or str(error))
    except Unusable as error:
        return Packed(reason=error.args[0], detail=error.args[1])
    except (RuntimeError, ValueError, TypeError, MemoryError) as error:  # soundfile raises all of these
        # libsndfile's words alone: soundfile adds the number of the descriptor, which depends on the threads.
        return Packed(reason=BAD_AUDIO, detail=getattr(error, "error_string", str(error)))


def _pack(utterance: Utterance, max_seconds: float) -> Packed:
    with _descriptor_of(utterance) as file, _open(file.fileno(), closefd=False) as audio:
        start, stop = _bounds(utterance, audio)
        _check_length(stop - start, audio.samplerate, max_seconds)
        whole = utterance.offset_s is None and stop == audio.frames
        is_flac = os.pread(file.fileno(), 4, 0) == b"fLaC"
        as_it_is = whole and is_flac and audio.samplerate == SAMPLE_RATE_HZ and audio.channels == 1
        dtype = "float32" if not as_it_is else "int16" if audio.subtype == "PCM_16" else "int32"
        audio.seek(start)
        waveform = _read(audio, stop - start, dtype)
        _check_truncation(utterance.duration_s, audio, len(waveform), stop - start, whole)
        if as_it_is:
            file.seek(0)
            flac, samples = file.read(), len(waveform)
            _check_md5(flac, waveform)
        else:
            flac, samples = convert(waveform, audio.samplerate)
    _check_length(samples, SAMPLE_RATE_HZ, max_seconds)
    return Packed(flac, samples)


def _descriptor_of(utterance: Utterance) -> IO[bytes]:
    """The utterance's file; an archive's is put into memory behind a descriptor.

    libsndfile reads a descriptor by itself. From a Python object it would call back for every few kilobytes, and each
    time wait for Python's lock.
    """
    if utterance.data is None and utterance.path:
        return utterance.path.open("rb")
    file = os.fdopen(os.memfd_create("audio"), "w+b")
    file.write(utterance.data or b"")
    file.seek(0)
    return file


def _open(*arguments: Any, **options: Any) -> soundfile.SoundFile:
    """libsndfile keeps why a file could not be opened in a global, which another thread would overwrite."""
    import soundfile

    with _opening:
        return soundfile.SoundFile(*arguments, **options)


def _bounds(utterance: Utterance, audio: soundfile.SoundFile) -> tuple[int, int]:
    """First and last + 1 sample of the utterance, at the file's rate, by the rules in sources/manifest.py."""
    start = round((utterance.offset_s or 0.0) * audio.samplerate)
    if utterance.offset_s is not None and start >= audio.frames:
        raise Unusable(BAD_AUDIO, f"starts at {utterance.offset_s} s of {audio.frames / audio.samplerate:.3f} s")
    if utterance.duration_s is None:
        return start, audio.frames
    stop = start + round(utterance.duration_s * audio.samplerate)
    if utterance.offset_s is None and audio.frames - stop <= DURATION_TOLERANCE_S * audio.samplerate:
        return start, audio.frames
    return start, min(audio.frames, stop)


def _check_length(samples: int, rate_hz: int, max_seconds: float) -> None:
    if samples > max_seconds * rate_hz:
        raise Unusable(TOO_LONG, f"{samples / rate_hz:.3f} s")


def _read(audio: soundfile.SoundFile, samples: int, dtype: str) -> np.ndarray:
    """(n, channels), n <= samples; in blocks, because a broken header can state any length."""
    import numpy as np

    blocks = []
    while samples > 0 and len(block := audio.read(min(samples, BLOCK_SAMPLES), dtype=dtype, always_2d=True)):
        blocks.append(block)
        samples -= len(block)
    if not blocks:
        raise Unusable(BAD_AUDIO, "no samples")
    return np.concatenate(blocks)


def _check_truncation(
    stated_s: float | None, audio: soundfile.SoundFile, samples: int, expected: int, whole: bool
) -> None:
    """libsndfile reads a truncated file up to its end and reports the truncation only in its log."""
    if samples < 0.98 * expected:  # MP3 headers are not exact
        raise Unusable(BAD_AUDIO, f"{samples} samples instead of {expected}")
    log = audio.extra_info
    for chunk in re.finditer(r"^ *(data|SSND) *: (\d+) \(should be (\d+)\)", log, re.MULTILINE):
        stated, there = int(chunk[2]), int(chunk[3])
        if there < stated < 0x7FFF0000:  # programs that write to a pipe state 2 or 4 GB
            raise Unusable(BAD_AUDIO, f"{there} bytes of audio instead of {stated}")
    if whole and "lacks an end-of-stream bit" in log:
        raise Unusable(BAD_AUDIO, "the last page is missing")
    seconds = samples / audio.samplerate
    if stated_s is not None and seconds < 0.99 * stated_s - DURATION_TOLERANCE_S:
        raise Unusable(BAD_AUDIO, f"{seconds:.3f} s of audio, where the source states a duration of {stated_s} s")


def _check_md5(flac: bytes, waveform: np.ndarray) -> None:
    """Compares with the MD5 in the FLAC's STREAMINFO, over samples of their own width; all zeros mean no MD5."""
    bits = ((flac[20] & 1) << 4 | flac[21] >> 4) + 1
    if bits % 8 or not any(flac[26:42]):
        return
    width = waveform.dtype.itemsize  # libsndfile puts narrow samples into an int's upper bytes
    pcm = waveform.reshape(-1, 1).view("uint8")[:, width - bits // 8 :]
    if hashlib.md5(pcm.tobytes(), usedforsecurity=False).digest() != flac[26:42]:
        raise Unusable(BAD_AUDIO, "decodes to other samples than were encoded (MD5)")


def convert(waveform: np.ndarray, rate_hz: int) -> tuple[bytes, int]:
    """(n, channels) in [-1, 1) -> 16 bit mono FLAC at 16 kHz and its number of samples."""
    import numpy as np
    import soxr

    mono = waveform.mean(axis=1)
    if not np.isfinite(mono).all():
        raise Unusable(BAD_AUDIO, "samples that are not finite")
    if rate_hz != SAMPLE_RATE_HZ:
        mono = soxr.resample(mono, rate_hz, SAMPLE_RATE_HZ, quality="HQ")
    if not len(mono):
        raise Unusable(BAD_AUDIO, "no samples")
    flac = io.BytesIO()
    with _open(flac, "w", SAMPLE_RATE_HZ, 1, "PCM_16", format="FLAC") as file:
        file.write((mono * 32768).round().clip(-32768, 32767).astype("int16"))
    return flac.getvalue(), len(mono)
