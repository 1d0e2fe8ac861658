"""Text against text: how many words and characters are wrong, and how sure that number is.

    references, hypotheses  --jiwer, an utterance each-->  counts (N, 8)  --sum-->  Counts: WER, CER
                                                                          --resample-->  confidence intervals
                                                                          --sort-->  the worst utterances

Rates are those of the corpus, all errors / all reference units, never a mean of utterances' rates: in a mean a wrong
one-word answer weighs as much as a lost minute. Counts are integers and additive, so ranks add theirs up and nothing
depends on who scored what. Spaces at the ends and double ones are no characters; anything else in a text counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import jiwer
import numpy as np


@dataclass(frozen=True)
class Counts:
    """Errors and reference units, over words and over characters; the order of a row of `count_each`."""

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

    def array(self) -> np.ndarray:
        """int64 (8,), to be added up over ranks."""
        return np.array(astuple(self), dtype=np.int64)

    def __add__(self, other: Counts) -> Counts:
        return Counts.from_array(self.array() + other.array())

    @property
    def word_errors(self) -> int:
        return self.word_substitutions + self.word_deletions + self.word_insertions

    @property
    def char_errors(self) -> int:
        return self.char_substitutions + self.char_deletions + self.char_insertions

    @property
    def wer(self) -> float:
        return rate(self.word_errors, self.words)

    @property
    def cer(self) -> float:
        return rate(self.char_errors, self.chars)


def rate(errors: int, units: int) -> float:
    """`errors / units`; with no reference at all, nothing said is right and anything said infinitely wrong."""
    if units:
        return errors / units
    return float("inf") if errors else 0.0


def count(references: Sequence[str], hypotheses: Sequence[str]) -> Counts:
    """The counts of a corpus."""
    return Counts.from_array(count_each(references, hypotheses).sum(axis=0))


def count_each(references: Sequence[str], hypotheses: Sequence[str]) -> np.ndarray:
    """int64 (N, 8): a row an utterance, its columns the fields of `Counts`."""
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references but {len(hypotheses)} hypotheses: one of each an utterance")
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
    """The rates between which a like test set would fall, `confidence` of the time."""

    low: float
    high: float


def intervals(
    each: np.ndarray, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[Interval, Interval]:
    """Percentile bootstrap over utterances: (of the WER, of the CER).

    Utterances are drawn with replacement and not words, because errors cluster in utterances. A speaker's utterances
    hang together too, so with few speakers the true intervals are wider.
    """
    totals = np.stack([each[:, 0:3].sum(1), each[:, 3], each[:, 4:7].sum(1), each[:, 7]])  # (4, N)
    sums = _resampled_sums(totals, resamples, seed)  # (resamples, 4)
    tails = [50 * (1 - confidence), 50 * (1 + confidence)]
    found = []
    for errors, units in ((sums[:, 0], sums[:, 1]), (sums[:, 2], sums[:, 3])):
        low, high = np.percentile(errors / np.maximum(units, 1), tails)
        found.append(Interval(float(low), float(high)))
    return found[0], found[1]


def _resampled_sums(totals: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    utterances = totals.shape[1]
    if not utterances:
        return np.zeros((resamples, len(totals)))
    random = np.random.default_rng(seed)
    # A block of draws at a time: all of them at once would take 2 GB for LibriSpeech's 281,241 utterances.
    block = max(1, 4_000_000 // utterances)
    sums = []
    for start in range(0, resamples, block):
        drawn = random.integers(0, utterances, size=(min(block, resamples - start), utterances))
        sums.append(np.stack([column[drawn].sum(axis=1) for column in totals], axis=1))
    return np.concatenate(sums)


def worst(each: np.ndarray, most: int = 10) -> np.ndarray:
    """The utterances that cost the most, as row numbers: most word errors first, then most character errors.

    By number and not by rate, since a one-word utterance with one error has a rate of 100 % and tells nothing.
    Utterances without an error are left out.
    """
    word_errors, char_errors = each[:, 0:3].sum(axis=1), each[:, 4:7].sum(axis=1)
    order = np.lexsort((-char_errors, -word_errors))  # stable: equal ones stay in the corpus's order
    return order[(word_errors + char_errors)[order] > 0][:most]
