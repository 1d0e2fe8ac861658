"""One recording of any format -> mono 16 kHz FLAC that is known to decode, or the reason why it cannot be used.

    flac, samples, reason, detail = pack(utterance)

`pack` decodes every recording, because a header proves nothing. FLAC that is mono and 16 kHz already is passed through
byte by byte; anything else is averaged over its channels, resampled and encoded with 16 bits.

A header can state anything, and a few kilobytes can decode to hours. So what no recording of speech has is refused by
the bounds below, here and in `ddp_asr.transcribe`, before it takes gigabytes of memory or is trained as noise.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import threading
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from ddp_asr import SAMPLE_RATE_HZ
from ddp_asr.data.sources import (
    BAD_AUDIO,
    EMPTY_TRANSCRIPT,
    IMPLAUSIBLE,
    MISSING_AUDIO,
    MISSING_TRANSCRIPT,
    TOO_LONG,
    Utterance,
)

if TYPE_CHECKING:
    import numpy as np
    import soundfile

DURATION_TOLERANCE_S = 0.25  # manifests round, some to tenths of a second
BLOCK_FRAMES = 1 << 18  # read at once: 64 MB of 64 channels

MIN_RATE_HZ, MAX_RATE_HZ = 4_000, 384_000
MAX_CHANNELS = 64
MAX_UTTERANCE_S = 3_600.0  # --max-seconds may ask for less
MAX_RECORDING_S = 12 * 3_600.0  # of a file to transcribe; all of it lies in memory, with 2 bytes a sample
MAX_ARCHIVED_BYTES = 1 << 30  # of an audio file in an archive, which is read as a whole
# Samples beyond full scale are clipped. A few are usual in floating point and in MP3; in a file whose samples are
# integers in floating point, nearly all are.
MAX_BEYOND_FULL_SCALE = 0.01
MAX_PEAK = 16.0

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
    """The utterance's audio as it goes into a shard; longer ones than `max_seconds` or MAX_UTTERANCE_S are not used."""
    if refused := check_listed(utterance):
        return refused
    try:
        return _pack(utterance, min(max_seconds or MAX_UTTERANCE_S, MAX_UTTERANCE_S))
    except OSError as error:
        return Packed(reason=MISSING_AUDIO, detail=error.strerror or str(error))
    except Unusable as error:
        return Packed(reason=error.args[0], detail=error.args[1])
    except (RuntimeError, ValueError, TypeError, MemoryError) as error:  # soundfile raises all of these
        # libsndfile's words alone: soundfile adds the number of the descriptor, which depends on the threads.
        return Packed(reason=BAD_AUDIO, detail=getattr(error, "error_string", str(error)))


def check_listed(utterance: Utterance) -> Packed | None:
    """Why the utterance cannot be used, as far as it shows without its audio; None where nothing does."""
    if utterance.reason:
        return Packed(reason=utterance.reason, detail=utterance.detail)
    if utterance.has_text and utterance.text is None:
        return Packed(reason=MISSING_TRANSCRIPT)
    if utterance.has_text and not (utterance.text or "").strip():
        return Packed(reason=EMPTY_TRANSCRIPT)
    return None


def _pack(utterance: Utterance, max_seconds: float) -> Packed:
    with _descriptor_of(utterance) as file, _open(file.fileno(), closefd=False) as audio:
        check_header(audio)
        start, stop = _bounds(utterance, audio)
        check_length(stop - start, audio.samplerate, max_seconds)
        whole = utterance.offset_s is None and stop == audio.frames
        is_flac = os.pread(file.fileno(), 4, 0) == b"fLaC"
        audio.seek(start)
        if whole and is_flac and audio.samplerate == SAMPLE_RATE_HZ and audio.channels == 1:
            waveform = _read_integers(audio, stop)
            _check_truncation(utterance.duration_s, audio, len(waveform), stop - start, whole)
            file.seek(0)
            flac, samples = file.read(), len(waveform)
            _check_md5(flac, waveform)
        else:
            waveform, frames = read_mono(audio, stop - start, max_seconds)
            _check_truncation(utterance.duration_s, audio, frames, stop - start, whole)
            flac, samples = _encode(waveform), len(waveform)
    check_length(samples, SAMPLE_RATE_HZ, max_seconds)
    return Packed(flac, samples)


def _descriptor_of(utterance: Utterance) -> IO[bytes]:
    """The utterance's file; an archive's is put into memory behind a descriptor.

    libsndfile reads a descriptor by itself. From a Python object it would call back for every few kilobytes, and each
    time wait for Python's lock.
    """
    if utterance.data is None and utterance.path:
        mode = utterance.path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a pipe may be waited for, a device be read, for ever
            raise Unusable(MISSING_AUDIO, "not a regular file")
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


def check_length(samples: int, rate_hz: int, max_seconds: float) -> None:
    """Refuses what is longer."""
    if samples > max_seconds * rate_hz:
        raise Unusable(TOO_LONG, f"{samples / rate_hz:.3f} s, at most {max_seconds:g} s are taken")


def check_header(audio: soundfile.SoundFile) -> None:
    """Refuses a rate and a number of channels that no recording of speech has."""
    if not MIN_RATE_HZ <= audio.samplerate <= MAX_RATE_HZ:
        allowed = f"{MIN_RATE_HZ:,} to {MAX_RATE_HZ:,} Hz"
        raise Unusable(IMPLAUSIBLE, f"its header states {audio.samplerate:,} Hz, speech has {allowed}")
    if audio.channels > MAX_CHANNELS:
        raise Unusable(IMPLAUSIBLE, f"its header states {audio.channels} channels, at most {MAX_CHANNELS} are read")


def read_mono(audio: soundfile.SoundFile, frames: int, max_seconds: float) -> tuple[np.ndarray, int]:
    """The next `frames` frames, or as many as there are: int16 (S,) at 16 kHz, channels averaged; and their number.

    It is resampled block by block, so memory holds only the result.
    """
    import numpy as np
    import soxr

    rate_hz = audio.samplerate
    stream = soxr.ResampleStream(rate_hz, SAMPLE_RATE_HZ, 1) if rate_hz != SAMPLE_RATE_HZ else None
    parts, read, beyond, peak, last = [], 0, 0, 0.0, False
    while not last:
        wanted = min(BLOCK_FRAMES, frames - read)
        block = audio.read(wanted, dtype="float32", always_2d=True)  # (frames, channels)
        read += len(block)
        last = len(block) < wanted or read == frames
        check_length(read, rate_hz, max_seconds)
        if not np.isfinite(block).all():
            raise Unusable(BAD_AUDIO, "samples that are not finite")
        peak = max(peak, float(np.abs(block).max(initial=0.0)))
        mono = block.mean(axis=1) if peak <= MAX_PEAK else block[:, 0]  # a sum of larger ones could be infinite
        beyond += int(np.count_nonzero(np.abs(mono) > 1.0))
        if peak > MAX_PEAK or (last and beyond > MAX_BEYOND_FULL_SCALE * read):
            share = f"{beyond / read:.1%} of the samples are beyond full scale"
            raise Unusable(IMPLAUSIBLE, f"{share}, the highest is {peak:.4g}; they must be scaled to -1 ... 1")
        if stream is not None:
            mono = stream.resample_chunk(mono, last=last)
        parts.append((mono * 32768).round().clip(-32768, 32767).astype(np.int16))
    return np.concatenate(parts), read


def snr_db(waveform: np.ndarray) -> float:
    """An estimate of the signal-to-noise ratio of int16 (S,) at 16 kHz, from the levels of its frames of 20 ms.

    It is the level that 5 % of the frames exceed less the one that 10 % fall below: speech against its pauses. So it is
    too low for an utterance without pauses, and sees no noise that sounds only while somebody speaks.
    """
    import numpy as np

    frame = SAMPLE_RATE_HZ // 50
    frames = waveform[: max(frame, len(waveform) // frame * frame)].astype(np.float64)
    power = (frames.reshape(-1, min(frame, len(frames))) ** 2).mean(axis=1)
    quiet, loud = np.percentile(10 * np.log10(power + 1 / 12), [10, 95])  # 1/12: the noise of rounding to integers
    return float(loud - quiet)


def _read_integers(audio: soundfile.SoundFile, samples: int) -> np.ndarray:
    """(n,), n <= samples, as wide as they were encoded; in blocks, because a broken header can state any length."""
    import numpy as np

    blocks = []
    dtype = "int16" if audio.subtype == "PCM_16" else "int32"
    while samples > 0 and len(block := audio.read(min(samples, BLOCK_FRAMES), dtype=dtype)):
        blocks.append(block)
        samples -= len(block)
    return np.concatenate(blocks or [np.zeros(0, dtype)])


def _check_truncation(
    stated_s: float | None, audio: soundfile.SoundFile, samples: int, expected: int, whole: bool
) -> None:
    """libsndfile reads a truncated file up to its end and reports the truncation only in its log."""
    if not samples:
        raise Unusable(BAD_AUDIO, "no samples")
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


def _encode(waveform: np.ndarray) -> bytes:
    """int16 (S,) as mono FLAC of 16 kHz."""
    if not len(waveform):
        raise Unusable(BAD_AUDIO, "no samples")
    flac = io.BytesIO()
    with _open(flac, "w", SAMPLE_RATE_HZ, 1, "PCM_16", format="FLAC") as file:
        file.write(waveform)
    return flac.getvalue()
