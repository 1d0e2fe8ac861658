"""Logits to text: the greedy path, and where in time its words lie.

    logits (B, T', V), frames (B,)  --argmax a frame-->  path (B, T')  --collapse-->  symbols  --vocabulary-->  text

CTC's rule: equal neighbours are one symbol, then blanks go. Text comes out tidy, words parted by single spaces and
none at the ends, because a space, a blank and a space again would otherwise count as a wrong character.

Times come from the same path: a word lasts from the first frame of its first symbol to the last frame of its last one.
CTC emits a symbol in one or two frames somewhere within its sound, so a word's true end lies a little later; good
enough to jump to a word or to cut subtitles, not to measure phones.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ddp_asr.text.characters import Vocabulary


@dataclass(frozen=True)
class Word:
    """A recognised word and the part of the recording it lies in."""

    text: str
    start_s: float
    end_s: float


def greedy(logits: Tensor, frames: Tensor, vocabulary: Vocabulary) -> list[str]:
    """The text of each utterance; `logits` (B, T', V), `frames` (B,) valid frames of each."""
    return [tidy(vocabulary.decode(symbols)) for symbols, _, _ in emissions(logits, frames, vocabulary.blank)]


def word_times(logits: Tensor, frames: Tensor, vocabulary: Vocabulary, frame_s: float) -> list[list[Word]]:
    """The words of each utterance with their times; their texts are those of `greedy`."""
    return [
        _words([vocabulary.decode(np.array([symbol])) for symbol in symbols], start * frame_s, end * frame_s)
        for symbols, start, end in emissions(logits, frames, vocabulary.blank)
    ]


def tidy(text: str) -> str:
    return " ".join(text.split())


def emissions(logits: Tensor, frames: Tensor, blank: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each utterance the symbols of its greedy path, their first frames and the frames after their last."""
    # One copy from the device for the whole batch, of numbers and not of logits.
    path = logits.detach().argmax(dim=-1).cpu().numpy()  # (B, T')
    return [_collapse(row[:length], blank) for row, length in zip(path, frames.tolist(), strict=True)]


def _collapse(path: np.ndarray, blank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    changes = np.flatnonzero(path[1:] != path[:-1]) + 1
    start = np.concatenate([[0], changes])[: len(path)]  # an empty path has no run
    end = np.append(start[1:], len(path))[: len(path)]
    spoken = path[start] != blank
    return path[start][spoken], start[spoken], end[spoken]


def _words(symbols: list[str], start_s: np.ndarray, end_s: np.ndarray) -> list[Word]:
    words: list[Word] = []
    letters: list[int] = []
    for place, symbol in enumerate([*symbols, " "]):  # the space at the end closes the last word
        if not symbol.isspace():
            letters.append(place)
        elif letters:
            text = "".join(symbols[letter] for letter in letters)
            words.append(Word(text, float(start_s[letters[0]]), float(end_s[letters[-1]])))
            letters = []
    return words
