"""A CTC path to words with times and confidence.

    path (T',)  --collapse-->  symbols and their frames  --words_on-->  words

CTC's rule: equal neighbours are one symbol, then blanks go. A word lasts from the first frame of its first symbol to
the last frame of its last one. CTC emits a symbol in one or two frames somewhere within its sound, so a word's true end
lies a little later: good enough to jump to a word or to cut subtitles, not to measure phones.

The confidence of a word is exp(mean over its symbols of the mean log-probability of the symbol's frames). It comes from
the logits alone, also where a language model chose the text, and is not calibrated: of the words with 0.9, more or
less than nine in ten are right.
"""

import re

import numpy as np

from ddp_asr.decoding.protocol import Word
from ddp_asr.text import Tokeniser


def words_on(path: np.ndarray, log_p: np.ndarray, tokeniser: Tokeniser, frame_s: float) -> list[Word]:
    """The words that a path (T',) of classes with log-probabilities (T',) spells; a frame lasts `frame_s`."""
    classes, start, end = collapse(path, tokeniser.blank)
    log_p_of = [float(log_p[first:stop].mean(dtype=np.float64)) for first, stop in zip(start, end, strict=True)]
    words: list[Word] = []
    text, places = "", list[int]()  # of the word that is being read, and of its symbols
    written = [tokeniser.symbols[number] for number in classes]
    for place, symbol in enumerate([*written, " "]):  # the space at the end closes the last word
        for number, part in enumerate(re.split(r"\s", symbol)):  # a word piece may begin with a space
            if number and text:
                confidence = float(np.exp(np.mean([log_p_of[each] for each in places])))
                first, last = float(start[places[0]] * frame_s), float(end[places[-1]] * frame_s)
                words.append(Word(text, first, last, confidence))
                text, places = "", []
            if part:
                text, places = text + part, [*places, place]
    return words


def collapse(path: np.ndarray, blank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The symbols of a path (T',), their first frames and the frames after their last."""
    changes = np.flatnonzero(path[1:] != path[:-1]) + 1
    start = np.concatenate([[0], changes])[: len(path)]  # an empty path has no run
    end = np.append(start[1:], len(path))[: len(path)]
    emitted = path[start] != blank
    return path[start][emitted], start[emitted], end[emitted]
