"""The interface for programs and notebooks: `ddp_asr.load` makes a `Recogniser`. docs/api.md describes it.

audio: a file, or an array or tensor with its sampling rate, or a list of these --> Transcript, or logits

An array takes the same way as a file: it becomes one in memory, so both are checked and resampled alike. Nothing is
printed, and no signal handler and no process group is set up; a file that is cut off gives a Python warning.
"""

from __future__ import annotations

import io
import warnings
from functools import partial
from pathlib import Path
from typing import Any, overload

import numpy as np
import soundfile
from torch import Tensor

from ddp_asr import SAMPLE_RATE_HZ
from ddp_asr.config import load_decoder
from ddp_asr.data.audio import MAX_RATE_HZ, MIN_RATE_HZ
from ddp_asr.decoding import Word
from ddp_asr.errors import UserError
from ddp_asr.recognition import recogniser, transcription, voice
from ddp_asr.recognition.transcription import Failure, Recording, Transcript

__all__ = ["Recogniser", "Transcript", "Word"]

Audio = str | Path | np.ndarray | Tensor
Several = list[str] | list[Path] | list[np.ndarray] | list[Tensor] | list[Audio] | tuple[Audio, ...]


class Recogniser:
    """A trained model with its decoder. Use it from one thread at a time."""

    def __init__(
        self,
        checkpoint: str | Path,
        *,
        decoder: str | Path | None = None,
        cut: str | None = None,
        piece_seconds: float | None = None,
    ) -> None:
        for name, value in {"checkpoint": checkpoint, "decoder": decoder}.items():
            if not isinstance(value, str | Path) and (value is not None or name == "checkpoint"):
                raise UserError(f"{name} must be a path, not {value!r}")
        if piece_seconds is not None and not isinstance(piece_seconds, int | float):
            raise UserError(f"piece_seconds must be a number, not {piece_seconds!r}")
        settings = load_decoder(Path(decoder)) if decoder is not None else None
        self._recogniser = recogniser.load_recogniser(checkpoint, decoder=settings, warn=_warn)
        piece_s = self._recogniser.piece_s if piece_seconds is None else piece_seconds
        if not 1 <= piece_s <= 3600:
            raise UserError(f"piece_seconds must be between 1 and 3600, not {piece_s}")
        if cut not in (None, "pauses", "voice"):
            raise UserError(f"cut must be 'pauses' or 'voice', not {cut!r}")
        _, self._cut = voice.choose_cut(cut, int(piece_s * SAMPLE_RATE_HZ))

    @overload
    def transcribe(self, audio: Audio, rate_hz: float | None = None) -> Transcript: ...
    @overload
    def transcribe(self, audio: Several, rate_hz: float | None = None) -> list[Transcript]: ...
    def transcribe(self, audio: Audio | Several, rate_hz: float | None = None) -> Transcript | list[Transcript]:
        """What is said, of one recording or of each in a list.

        Args:
            audio: a path, or samples (S,): int16, or floating point from -1 to 1; or a list of these.
            rate_hz: of samples; every array of a list has this one.

        Raises:
            UserError: one of them cannot be read or is no recording of speech.
        """
        each = list(audio) if isinstance(audio, list | tuple) else [audio]
        recordings = [_recording(one, rate_hz, number) for number, one in enumerate(each)]
        found: list[Transcript] = []
        for item in transcription.transcribe(self._recogniser, recordings, self._cut):
            if isinstance(item, Failure):
                raise item.error
            found.append(item)
        return found if isinstance(audio, list | tuple) else found[0]

    def logits(self, audio: Audio, rate_hz: float | None = None) -> Tensor:
        """The logits (T', V) of one recording, on the CPU, which is not cut; the last class is the blank."""
        waveform = _recording(audio, rate_hz, 0).read()
        logits, _ = transcription.logits_of(self._recogniser, [waveform])
        return logits[0].float().cpu()


def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=2)


def _recording(audio: Any, rate_hz: Any, number: int) -> Recording:
    """One of a list. Samples are checked at once, a file when it is read."""
    if isinstance(audio, str | Path):
        return Recording(str(audio), partial(transcription.read_audio, Path(audio), warn=_warn))
    if not isinstance(audio, np.ndarray | Tensor):
        raise UserError(f"audio is a {type(audio).__name__}: it must be a path, a numpy array or a torch tensor")
    name = f"array {number}"
    return Recording(name, partial(transcription.read_audio, _as_file(audio, rate_hz, name), name))


def _as_file(audio: np.ndarray | Tensor, rate_hz: Any, name: str) -> io.BytesIO:
    """The samples as a WAV file in memory."""
    is_number = isinstance(rate_hz, int | float | np.integer | np.floating)
    if not is_number or not MIN_RATE_HZ <= rate_hz <= MAX_RATE_HZ or int(rate_hz) != rate_hz:
        allowed = f"a whole number from {MIN_RATE_HZ:,} to {MAX_RATE_HZ:,} Hz"
        raise UserError(f"the sampling rate of {name} is {rate_hz!r}: give it as the second argument, {allowed}")
    if isinstance(audio, Tensor):
        audio = audio.detach().cpu()
        audio = (audio.float() if audio.is_floating_point() else audio).numpy()  # numpy has no bfloat16
    if audio.ndim != 1:
        raise UserError(
            f"{name} has the shape {audio.shape}: give one channel, samples (S,), such as audio.mean(axis=0)"
        )
    if not len(audio):
        raise UserError(f"{name} is empty: give at least one sample")
    if audio.dtype != np.int16 and not np.issubdtype(audio.dtype, np.floating):
        raise UserError(f"{name} is of type {audio.dtype}: give int16, or floating point from -1 to 1")
    file = io.BytesIO()
    subtype = "PCM_16" if audio.dtype == np.int16 else "FLOAT"
    with np.errstate(over="ignore"):  # what is too large becomes infinite, which is refused where it is read
        samples = audio if audio.dtype == np.int16 else audio.astype(np.float32)
    soundfile.write(file, samples, int(rate_hz), subtype, format="RF64")  # a WAV file ends at 4 GB
    file.seek(0)
    return file
