"""Greedy decoding: the most probable symbol of each frame, and the time at which the words lie.

    logits (B, T', V), frames (B,)  --argmax a frame-->  path (B, T')  --collapse-->  symbols  --tokeniser-->  text

CTC's rule: equal neighbours are one symbol, then blanks go. Words are parted by single spaces with none at the ends,
because a space, a blank and a space again would otherwise count as a wrong character.

Times come from the same path: a word lasts from the first frame of its first symbol to the last frame of its last one.
CTC emits a symbol in one or two frames somewhere within its sound, so a word's true end lies a little later: good
enough to jump to a word or to cut subtitles, not to measure phones.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ddp_asr import config
from ddp_asr.decoding.protocol import Hypothesis, Word
from ddp_asr.text import Tokeniser


@dataclass(frozen=True)
class Greedy:
    """The decoder; its score is the log-probability of the best path, not of all paths that spell the text."""

    settings: config.Greedy
    tokeniser: Tokeniser
    frame_s: float  # from one frame of the logits to the next

    def __call__(self, logits: Tensor, frames: Tensor) -> list[Hypothesis]:
        best = logits.detach().argmax(-1, keepdim=True)  # (B, T', 1)
        log_probabilities = logits.detach().float().log_softmax(-1).gather(-1, best)
        # Two copies from the device for the whole batch, of a number a frame each and not of logits.
        paths, scores = best[:, :, 0].cpu().numpy(), log_probabilities[:, :, 0].cpu().numpy()  # (B, T')
        return [
            self._hypothesis(path[:length], float(score[:length].sum(dtype=np.float64)))
            for path, score, length in zip(paths, scores, frames.tolist(), strict=True)
        ]

    def _hypothesis(self, path: np.ndarray, score: float) -> Hypothesis:
        symbols, start, end = collapse(path, self.tokeniser.blank)
        texts = [self.tokeniser.decode(np.array([symbol])) for symbol in symbols]
        words = _words(texts, start * self.frame_s, end * self.frame_s)
        return Hypothesis(" ".join(word.text for word in words), words, score)


def collapse(path: np.ndarray, blank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The symbols of a path (T',), their first frames and the frames after their last."""
    changes = np.flatnonzero(path[1:] != path[:-1]) + 1
    start = np.concatenate([[0], changes])[: len(path)]  # an empty path has no run
    end = np.append(start[1:], len(path))[: len(path)]
    emitted = path[start] != blank
    return path[start][emitted], start[emitted], end[emitted]


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
