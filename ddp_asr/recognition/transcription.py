"""Recordings of any length to text, in the order in which they come.

    Recording --read, in a thread ahead--> waveform (S,) --cut--> pieces --sorted by length, batched--> logits
    --decoder--> words --joined--> Transcript, or Failure and why

A recogniser was trained on utterances of seconds: its features are normalised over the whole input and its BiGRU runs
over all of it, so an hour at once would take gigabytes and be unlike anything it was trained on. Longer recordings are
therefore cut, in pauses (`cut_in_pauses`) or by voice activity (voice.py); pieces are recognised apart and their words
joined. Padding is invisible, so a transcript does not depend on what else is in a batch.

Recordings are taken in windows of ten minutes: the pieces of a window are sorted by length, so that a batch has little
padding, and the next window is read meanwhile. So memory holds two windows, however many recordings there are. A file
is read block by block, so an hour of it takes 230 MB at most, whatever its format; only stdin is kept whole, because
libsndfile seeks.
"""

import io
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from torch import Tensor

from ddp_asr import SAMPLE_RATE_HZ
from ddp_asr.data import audio
from ddp_asr.data.storage import Unreachable
from ddp_asr.decoding import Word
from ddp_asr.errors import UserError, counted
from ddp_asr.files import open_input
from ddp_asr.recognition.recogniser import Recogniser, print_warning

BATCH_SECONDS = 120.0  # pieces recognised at once, in seconds of audio
WINDOW_SECONDS = 600.0  # recordings sorted together, in seconds of audio
LOUDNESS_SAMPLES = SAMPLE_RATE_HZ // 100  # loudness is looked at every 10 ms
PAUSE_BLOCKS = 20  # and averaged over 200 ms, so that the closure of a [p] is no pause

Cut = Callable[[np.ndarray], list[slice]]
"""From a waveform (S,) to its pieces, in order and without overlap."""


@dataclass(frozen=True)
class Recording:
    """Something to transcribe, not read yet."""

    key: str
    """Its name: what the transcript is found by."""
    read: Callable[[], np.ndarray]
    """int16 (S,) at 16 kHz; raises UserError where it cannot be read."""
    reference: str | None = None
    """What it says, if that is known."""


@dataclass(frozen=True)
class Transcript:
    """What a recording says, and when."""

    key: str
    seconds: float
    words: list[Word]
    reference: str | None = None
    """What it should say, normalised, if that is known."""

    @property
    def text(self) -> str:
        return " ".join(word.text for word in self.words)


@dataclass(frozen=True)
class Failure:
    """A recording that could not be read."""

    key: str
    error: UserError


class Read(NamedTuple):
    """A recording in memory with its pieces; both are empty where it could not be read."""

    recording: Recording
    waveform: np.ndarray
    pieces: list[slice]
    error: UserError | None = None


def transcribe(
    recogniser: Recogniser,
    recordings: Iterable[Recording],
    cut: Cut,
    on_batch: Callable[[float], None] = lambda seconds: None,
) -> Iterator[Transcript | Failure]:
    """The transcript of each recording, in their order; `on_batch` is told the seconds of audio of each batch."""
    windows = _windows(recordings, cut)
    ahead = _next_in_thread(windows)
    while (window := ahead.result()) is not None:
        ahead = _next_in_thread(windows)
        yield from _transcribe_window(recogniser, window, on_batch)


def _windows(recordings: Iterable[Recording], cut: Cut) -> Iterator[list[Read]]:
    """The recordings, read and cut, so many at a time that together they last WINDOW_SECONDS or a little longer."""
    window: list[Read] = []
    samples = 0
    for recording in recordings:
        try:
            waveform = recording.read()
            window.append(Read(recording, waveform, cut(waveform)))
            samples += len(waveform)
        except Unreachable:  # and so are all that follow
            raise
        except UserError as error:
            window.append(Read(recording, np.zeros(0, np.int16), [], error))
        if samples >= WINDOW_SECONDS * SAMPLE_RATE_HZ:
            yield window
            window, samples = [], 0
    if window:
        yield window


def _next_in_thread(windows: Iterator[list[Read]]) -> Future[list[Read] | None]:
    """The next item, or None at the end. The thread is a daemon, so that Ctrl-C need not wait for a file to be read."""
    future = Future[list[Read] | None]()

    def work() -> None:
        try:
            future.set_result(next(windows, None))
        except BaseException as error:  # raised where the result is waited for
            future.set_exception(error)

    threading.Thread(target=work, name="reader", daemon=True).start()
    return future


def _transcribe_window(
    recogniser: Recogniser, window: list[Read], on_batch: Callable[[float], None]
) -> Iterator[Transcript | Failure]:
    pieces = [(number, piece) for number, read in enumerate(window) for piece in read.pieces]
    pieces.sort(key=lambda numbered: numbered[1].stop - numbered[1].start)
    found: dict[tuple[int, int], list[Word]] = {}  # (number in the window, first sample) -> words of the piece
    for batch in batches_of([piece.stop - piece.start for _, piece in pieces]):
        clips = [window[number].waveform[piece] for number, piece in pieces[batch]]
        hypotheses = recogniser.decoder(*logits_of(recogniser, clips))
        for (number, piece), hypothesis in zip(pieces[batch], hypotheses, strict=True):
            start_s, stop_s = piece.start / SAMPLE_RATE_HZ, piece.stop / SAMPLE_RATE_HZ
            # The last frame of a piece may reach beyond its end, since strides round up.
            found[number, piece.start] = [
                replace(word, start_s=start_s + word.start_s, end_s=min(start_s + word.end_s, stop_s))
                for word in hypothesis.words
            ]
        on_batch(sum(map(len, clips)) / SAMPLE_RATE_HZ)
    for number, read in enumerate(window):
        key, reference = read.recording.key, read.recording.reference
        if read.error:
            yield Failure(key, read.error)
            continue
        words = [word for piece in read.pieces for word in found[number, piece.start]]
        normalised = None if reference is None else recogniser.tokeniser.normalise(reference)
        yield Transcript(key, len(read.waveform) / SAMPLE_RATE_HZ, words, normalised)


def batches_of(lengths: Sequence[int]) -> Iterator[slice]:
    """Neighbouring pieces of these lengths in samples, as many as stay within BATCH_SECONDS with padding."""
    start, longest = 0, 0
    for number, length in enumerate(lengths):
        longest = max(longest, length)
        if number > start and (number - start + 1) * longest > BATCH_SECONDS * SAMPLE_RATE_HZ:
            yield slice(start, number)
            start, longest = number, length
    if lengths:
        yield slice(start, len(lengths))


def logits_of(recogniser: Recogniser, clips: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """Logits (B, T', V) and frames (B,) of B waveforms (S,) as one batch."""
    samples = torch.tensor([len(clip) for clip in clips])
    waveforms = torch.zeros(len(clips), int(samples.max()), dtype=torch.int16)  # (B, S)
    for row, clip in enumerate(clips):
        waveforms[row, : len(clip)] = torch.from_numpy(clip)
    return recogniser.logits(waveforms, samples)


def cut_in_pauses(waveform: np.ndarray, longest_samples: int) -> list[slice]:
    """Pieces that cover `waveform` (S,) without gap or overlap, none longer than `longest_samples`.

    A recording that fits is one piece. Else each piece ends in the quietest moment of its second half, and none is
    shorter than a quarter of the longest.
    """
    loudness = _loudness(waveform)
    pieces, start = [], 0
    while len(waveform) - start > longest_samples:
        remaining = len(waveform) - start
        first = start + longest_samples // 2
        last = start + min(longest_samples, remaining - longest_samples // 4)
        blocks = loudness[first // LOUDNESS_SAMPLES : last // LOUDNESS_SAMPLES + 1]
        quietest = first // LOUDNESS_SAMPLES + int(blocks.argmin())
        stop = min(max(quietest * LOUDNESS_SAMPLES, first), last)
        pieces.append(slice(start, stop))
        start = stop
    pieces.append(slice(start, len(waveform)))
    return pieces


def _loudness(waveform: np.ndarray) -> np.ndarray:
    """Power around every 10 ms, float32, averaged over 200 ms."""
    whole = len(waveform) // LOUDNESS_SAMPLES
    blocks = waveform[: whole * LOUDNESS_SAMPLES].reshape(whole, LOUDNESS_SAMPLES)
    power = np.einsum("ij,ij->i", blocks, blocks, dtype=np.float32)  # no float copy of hours of audio
    window = np.ones(PAUSE_BLOCKS, dtype=np.float32) / PAUSE_BLOCKS
    # Centred; beyond the ends it is loud, so that no cut prefers them.
    padded = np.pad(power, PAUSE_BLOCKS // 2, constant_values=np.float32(2**40))
    return np.convolve(padded, window, mode="valid")


def read_audio(
    source: str | Path | io.BytesIO, name: str = "", warn: Callable[[str], None] = print_warning
) -> np.ndarray:
    """The recording as int16 (S,) at 16 kHz, channels averaged.

    Args:
        source: a file, or one in memory.
        name: in the sentences about it, where `source` has none.
        warn: gets the sentence about a file that ends before its header says.

    Raises:
        UserError: it cannot be read, or is no recording of speech.
    """
    name = name or str(source)
    try:
        with soundfile.SoundFile(_seekable(source)) as file:
            audio.check_header(file)
            if file.frames < 1 << 62:  # libsndfile's way to say that a length is unknown is a huge one
                audio.check_length(file.frames, file.samplerate, audio.MAX_RECORDING_S)
            waveform, frames = audio.read_mono(file, sys.maxsize, audio.MAX_RECORDING_S)
            if missing := _missing_bytes(source):
                warn(f"{name} is cut off, {counted(missing, 'byte')} before its end; what is there is transcribed")
            if frames < file.frames < 1 << 62:
                promised_s, found_s = file.frames / file.samplerate, frames / file.samplerate
                warn(
                    f"{name} promises {promised_s:.1f} s and holds {found_s:.1f} s that decode: it is cut off "
                    "or damaged; what is there is transcribed"
                )
    except (OSError, ValueError, soundfile.LibsndfileError) as error:  # ValueError: NUL in a name
        reason = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot read {name}: {reason} (WAV, FLAC, OGG, MP3, ... can be read)") from None
    except audio.Unusable as error:
        reason, detail = error.args
        raise UserError(f"cannot use {name}: {reason} ({detail})") from None
    if not len(waveform):
        raise UserError(f"{name} holds no audio")
    return waveform


def _missing_bytes(source: str | Path | io.BytesIO) -> int:
    """How many bytes the header of a WAV file promises and the file has not; libsndfile says nothing of them."""
    if not isinstance(source, io.BytesIO) and not Path(source).is_file():
        return 0  # a pipe, which has no size
    size = source.getbuffer().nbytes if isinstance(source, io.BytesIO) else Path(source).stat().st_size
    with source if isinstance(source, io.BytesIO) else open_input(str(source)) as file:
        file.seek(0)
        head = file.read(12)
    promised = int.from_bytes(head[4:8], "little") + 8
    is_wav, is_stated = head[:4] == b"RIFF" and head[8:] == b"WAVE", promised < 0xFFFFFF00  # which a pipe writes
    return max(0, promised - size) if is_wav and is_stated else 0


def _seekable(source: str | Path | io.BytesIO) -> str | io.BytesIO:
    """What libsndfile can seek in: a file by its name, whose ending it may need, or the content of a pipe."""
    if isinstance(source, io.BytesIO):
        return source
    name = str(source)
    if name.lower().endswith(".raw"):  # soundfile would ask for the rate and raise a TypeError
        raise UserError(f"cannot read {name}: raw samples have no header that says their rate; convert them to WAV")
    with open_input(name) as file:
        return name if file.seekable() else io.BytesIO(file.read())
