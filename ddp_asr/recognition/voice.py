"""How recordings are cut that are too long: in pauses, or by voice activity.

    waveform (S,) --silero-vad--> probability of speech every 32 ms --its own rules--> stretches of speech --> pieces

Pieces by voice activity end in silences, and what is no speech is in none of them. silero-vad (extra `vad`) carries its
model in its wheel and needs no network. It runs on one core of the CPU, about 50 times faster than real time.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from ddp_asr import SAMPLE_RATE_HZ
from ddp_asr.errors import UserError
from ddp_asr.recognition.transcription import Cut, cut_in_pauses

# Measured on AN4 joined to one recording (docs/transcribe.md): shorter silences part words from their neighbours,
# longer ones leave several utterances in a piece.
SILENCE_MS = 300
EDGE_MS = 500  # of silence at the ends of a piece, as utterances that are trained on have it


def is_installed() -> bool:
    return find_spec("silero_vad") is not None


def choose_cut(kind: str | None, longest_samples: int) -> tuple[str, Cut]:
    """The kind of cuts, `voice` where it is None and silero-vad is installed, and the function that makes them."""
    kind = kind or ("voice" if is_installed() else "pauses")
    if kind == "voice":
        return kind, _by_voice(longest_samples)
    return kind, partial(cut_in_pauses, longest_samples=longest_samples)


def _by_voice(longest_samples: int) -> Cut:
    """The function that cuts recordings (S,) that are longer than `longest_samples`.

    Raises:
        UserError: silero-vad is not installed.
    """
    if not is_installed():
        raise UserError("cuts by voice need silero-vad: pip install 'ddp-asr[vad]', or take those in pauses")
    load = cache(_load)  # when the first long recording comes, and once

    def cut(waveform: np.ndarray) -> list[slice]:
        if len(waveform) <= longest_samples:
            return [slice(0, len(waveform))]
        model, get_speech = load()
        scaled = torch.from_numpy(waveform).float()
        scaled /= 32768  # in place: an hour takes 230 MB
        speech = get_speech(
            scaled,
            model,
            max_speech_duration_s=longest_samples / SAMPLE_RATE_HZ,
            min_silence_duration_ms=SILENCE_MS,
            speech_pad_ms=EDGE_MS,
        )
        pieces = []
        for stretch in speech:
            start, stop = int(stretch["start"]), int(stretch["end"])
            # Edges may make a stretch a little longer than was asked for.
            pieces += [
                slice(start + each.start, start + each.stop)
                for each in cut_in_pauses(waveform[start:stop], longest_samples)
            ]
        return pieces

    return cut


def _load() -> tuple[Any, Callable[..., list[dict[str, Any]]]]:
    """The model, and the function that applies it."""
    threads = torch.get_num_threads()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # silero-vad 6.2.3 calls torch.jit.load
        import silero_vad

        torch.set_num_threads(threads)  # its import sets one thread
        return silero_vad.load_silero_vad(), silero_vad.get_speech_timestamps
