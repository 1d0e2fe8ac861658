"""Recordings of any length to text.

    any file libsndfile reads --mono, 16 kHz, int16--> waveform --cut in pauses--> pieces --recogniser--> words --> text

A recogniser was trained on utterances of seconds: its features are normalised over the whole input and its BiGRU runs
over all of it, so an hour at once would take gigabytes and be unlike anything it was trained on. Longer recordings are
therefore cut, each time in the quietest moment of the piece's second half; pieces are recognised apart and their words
joined. A file is read block by block, so an hour of it takes 230 MB at most, whatever its format; only stdin is kept
whole, because libsndfile seeks.
"""

import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from ddp_asr import SAMPLE_RATE_HZ
from ddp_asr.data import audio
from ddp_asr.decoding import Word
from ddp_asr.errors import UserError
from ddp_asr.files import open_input
from ddp_asr.recognition.recogniser import Recogniser

BATCH_SECONDS = 120.0  # pieces recognised at once, in seconds of audio
LOUDNESS_SAMPLES = SAMPLE_RATE_HZ // 100  # loudness is looked at every 10 ms
PAUSE_BLOCKS = 20  # and averaged over 200 ms, so that the closure of a [p] is no pause


@dataclass(frozen=True)
class Transcript:
    """What a recording says, and when."""

    source: str
    seconds: float
    words: list[Word]

    @property
    def text(self) -> str:
        return " ".join(word.text for word in self.words)

    def as_dict(self) -> dict[str, Any]:
        words = [
            {
                "word": word.text,
                "start_s": round(word.start_s, 3),
                "end_s": round(word.end_s, 3),
                "confidence": round(word.confidence, 4),
            }
            for word in self.words
        ]
        return {"file": self.source, "seconds": round(self.seconds, 3), "text": self.text, "words": words}


def transcribe(recogniser: Recogniser, source: str, longest_samples: int) -> Transcript:
    """The transcript of the file `source`; raises UserError where it cannot be read."""
    waveform = read_audio(source)
    words: list[Word] = []
    for batch in batches_of(cut_in_pauses(waveform, longest_samples)):
        words += _words_of(recogniser, waveform, batch)
    return Transcript(source, len(waveform) / SAMPLE_RATE_HZ, words)


def batches_of(pieces: list[slice]) -> Iterator[list[slice]]:
    """Neighbouring pieces, as many as stay within BATCH_SECONDS with the longest's padding."""
    batch: list[slice] = []
    for piece in pieces:
        longest = max(p.stop - p.start for p in [*batch, piece])
        if batch and (len(batch) + 1) * longest > BATCH_SECONDS * SAMPLE_RATE_HZ:
            yield batch
            batch = []
        batch.append(piece)
    if batch:
        yield batch


def logits_of_pieces(recogniser: Recogniser, waveform: np.ndarray, pieces: list[slice]) -> tuple[Tensor, Tensor]:
    """Logits (B, T', V) and frames (B,) of pieces of a recording (S,), as one batch."""
    samples = torch.tensor([piece.stop - piece.start for piece in pieces])
    waveforms = torch.zeros(len(pieces), int(samples.max()), dtype=torch.int16)  # (B, S)
    for row, piece in enumerate(pieces):
        waveforms[row, : samples[row]] = torch.from_numpy(waveform[piece])
    return recogniser.logits(waveforms, samples)


def _words_of(recogniser: Recogniser, waveform: np.ndarray, pieces: list[slice]) -> list[Word]:
    """The words of `pieces`, in order, with their times in the whole recording."""
    words = []
    hypotheses = recogniser.decoder(*logits_of_pieces(recogniser, waveform, pieces))
    for piece, hypothesis in zip(pieces, hypotheses, strict=True):
        start_s, stop_s = piece.start / SAMPLE_RATE_HZ, piece.stop / SAMPLE_RATE_HZ
        # The last frame of a piece may reach beyond its end, since strides round up.
        words += [
            replace(word, start_s=start_s + word.start_s, end_s=min(start_s + word.end_s, stop_s))
            for word in hypothesis.words
        ]
    return words


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


def read_audio(source: str) -> np.ndarray:
    """The recording as int16 (S,) at 16 kHz, channels averaged; `-` is stdin."""
    name = "stdin" if source == "-" else source
    try:
        with soundfile.SoundFile(_seekable(source)) as file:
            audio.check_header(file)
            if file.frames < 1 << 62:  # libsndfile's way to say that a length is unknown is a huge one
                audio.check_length(file.frames, file.samplerate, audio.MAX_RECORDING_S)
            waveform, frames = audio.read_mono(file, sys.maxsize, audio.MAX_RECORDING_S)
            if frames < file.frames < 1 << 62:
                promised_s, found_s = file.frames / file.samplerate, frames / file.samplerate
                print(
                    f"warning: {name} promises {promised_s:.1f} s and holds {found_s:.1f} s that decode: it is cut off "
                    "or damaged; what is there is transcribed",
                    file=sys.stderr,
                )
    except (OSError, soundfile.LibsndfileError) as error:
        reason = getattr(error, "error_string", None) or getattr(error, "strerror", None) or str(error)
        raise UserError(f"cannot read {name}: {reason} (WAV, FLAC, OGG, MP3, ... can be read)") from None
    except audio.Unusable as error:
        reason, detail = error.args
        raise UserError(f"cannot use {name}: {reason} ({detail})") from None
    if not len(waveform):
        raise UserError(f"{name} holds no audio")
    return waveform


def _seekable(source: str) -> str | io.BytesIO:
    """What libsndfile can seek in: a file by its name, whose ending it may need, or the content of a pipe."""
    if source == "-":
        if sys.stdin is None:  # closed, as by `<&-`
            raise UserError("cannot read stdin: it is closed; pipe a recording into it, or name a file")
        return io.BytesIO(sys.stdin.buffer.read())
    if source.lower().endswith(".raw"):  # soundfile would ask for the rate and raise a TypeError
        raise UserError(f"cannot read {source}: raw samples have no header that says their rate; convert them to WAV")
    with open_input(source) as file:
        return source if file.seekable() else io.BytesIO(file.read())
