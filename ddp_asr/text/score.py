"""References against hypotheses: how many words and characters are wrong, and how certain those numbers are.

    references, hypotheses  --jiwer, an utterance each-->  counts (N, 8)  --sum-->  Counts: WER, CER
                                                                          --resample-->  confidence intervals, also of
                                                                                         a difference of two WERs
                                                                          --sort-->  the worst utterances

Rates are those of the corpus, all errors / all reference units, and not the mean of the utterances' rates: in a mean a
wrong one-word answer would weigh as much as a lost minute. Counts are integers and additive, so the result is the same
whichever rank scored which utterance. Spaces at the ends and double ones are not counted as characters; everything
else in a text is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jiwer
import numpy as np


@dataclass(frozen=True)
class Counts:
    """Errors and reference units, of words and of characters; the columns of `count_each`, in this order."""

    word_substitutions: int = 0
    word_deletions: int = 0
    word_insertions: int = 0
    words: int = 0
    char_substitutions: int = 0
    char_deletions: int = 0
    char_insertions: int = 0
    chars: int = 0

    @staticmethod
    def from_array(array: np.ndarray) -> Counts:
        return Counts(*(int(number) for number in array))

    @property
    def word_errors(self) -> int:
        return self.word_substitutions + self.word_deletions + self.word_insertions

    @property
    def char_errors(self) -> int:
        return self.char_substitutions + self.char_deletions + self.char_insertions

    @property
    def wer(self) -> float:
        return _rate(self.word_errors, self.words)

    @property
    def cer(self) -> float:
        return _rate(self.char_errors, self.chars)


def _rate(errors: int, units: int) -> float:
    """`errors / units`; without any reference unit 0 where there is no error, else infinite."""
    if units:
        return errors / units
    return float("inf") if errors else 0.0


def count_each(references: Sequence[str], hypotheses: Sequence[str]) -> np.ndarray:
    """int64 (N, 8): one row an utterance, the fields of `Counts` in its columns."""
    rows = [_count_one(" ".join(r.split()), " ".join(h.split())) for r, h in zip(references, hypotheses, strict=True)]
    return np.array(rows, dtype=np.int64).reshape(-1, 8)


def _count_one(reference: str, hypothesis: str) -> list[int]:
    words = jiwer.process_words(reference, hypothesis)
    chars = jiwer.process_characters(reference, hypothesis)
    return [
        number
        for out in (words, chars)
        for number in (out.substitutions, out.deletions, out.insertions, out.hits + out.substitutions + out.deletions)
    ]


@dataclass(frozen=True)
class Interval:
    """The bounds within which the rate of a similar test set would lie in 95 of 100 cases."""

    low: float
    high: float


def intervals(each: np.ndarray, *, resamples: int = 1000) -> tuple[Interval, Interval]:
    """Percentile bootstrap over utterances: (of the WER, of the CER).

    Utterances are drawn with replacement, and not words, because errors cluster in utterances. They cluster in speakers
    too, so with few speakers the true intervals are wider.
    """
    totals = np.stack([each[:, 0:3].sum(1), each[:, 3], each[:, 4:7].sum(1), each[:, 7]])  # (4, N)
    sums = _resampled_sums(totals, resamples)  # (resamples, 4)
    found = []
    for errors, units in ((sums[:, 0], sums[:, 1]), (sums[:, 2], sums[:, 3])):
        low, high = np.percentile(errors / np.maximum(units, 1), [2.5, 97.5])
        found.append(Interval(float(low), float(high)))
    return found[0], found[1]


def paired_interval(each: np.ndarray, other: np.ndarray, *, resamples: int = 1000) -> Interval:
    """Percentile bootstrap of the difference of two WERs over the same utterances, the first minus the second.

    Both are resampled with the same utterances: what is hard is hard for both, so the interval is narrower than that of
    two separate test sets. An interval without 0 shows a difference.
    """
    totals = np.stack([each[:, 0:3].sum(1) - other[:, 0:3].sum(1), each[:, 3]])  # (2, N)
    sums = _resampled_sums(totals, resamples)
    low, high = np.percentile(sums[:, 0] / np.maximum(sums[:, 1], 1), [2.5, 97.5])
    return Interval(float(low), float(high))


def _resampled_sums(totals: np.ndarray, resamples: int) -> np.ndarray:
    utterances = totals.shape[1]
    if not utterances:
        return np.zeros((resamples, len(totals)))
    random = np.random.default_rng(0)
    # A block of draws at a time: all of them at once would take 2 GB for LibriSpeech's 281,241 utterances.
    block = max(1, 4_000_000 // utterances)
    sums = []
    for start in range(0, resamples, block):
        drawn = random.integers(0, utterances, size=(min(block, resamples - start), utterances))
        sums.append(np.stack([column[drawn].sum(axis=1) for column in totals], axis=1))
    return np.concatenate(sums)


def worst(each: np.ndarray, most: int) -> np.ndarray:
    """Row numbers of the utterances with the most errors: most word errors first, then most character errors.

    They are ordered by number and not by rate, because a one-word utterance with one error has a rate of 100 % and says
    little. Utterances without an error are not in the result.
    """
    word_errors, char_errors = each[:, 0:3].sum(axis=1), each[:, 4:7].sum(axis=1)
    order = np.lexsort((-char_errors, -word_errors))  # stable: equal ones keep the order of the corpus
    return order[(word_errors + char_errors)[order] > 0][:most]
