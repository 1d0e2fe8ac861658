"""References against hypotheses: how many words and characters are wrong, and how certain those numbers are.

    references, hypotheses  --jiwer, an utterance each-->  counts (N, 8)  --sum-->  Counts: WER, CER
                                                                          --resample-->  confidence intervals, also of
                                                                                         a difference of two WERs
                                                                          --exchange-->  p of that difference
                                                                          --sort-->  the worst utterances
    reference, hypothesis   --jiwer-->  the alignment of their words

Rates are those of the corpus, all errors / all reference units, and not the mean of the utterances' rates: in a mean a
wrong one-word answer would weigh as much as a lost minute. Counts are integers and additive, so the result is the same
whichever rank scored which utterance. Spaces at the ends and double ones are not counted as characters; everything
else in a text is.

Errors cluster in utterances and in speakers, so speakers are resampled and not words (Bisani and Ney, "Bootstrap
Estimates for Confidence Intervals in ASR Performance Evaluation", ICASSP 2004; Liu et al., "Statistical Testing on ASR
Performance via Blockwise Bootstrap", Interspeech 2020). `Units` says when it is utterances.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import jiwer
import numpy as np

FEWEST_SPEAKERS = 5  # of fewer than these too few different samples can be drawn
_KINDS = {"equal": "=", "substitute": "s", "delete": "d", "insert": "i"}


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


def align_words(reference: str, hypothesis: str) -> list[tuple[str, str, str]]:
    """(kind, reference's word, hypothesis's word) in order, with the errors of `count_each`.

    Kinds are "=", "s", "d" and "i"; the word that a deletion or an insertion lacks is "".
    """
    out = jiwer.process_words(" ".join(reference.split()), " ".join(hypothesis.split()))
    said, heard = out.references[0], out.hypotheses[0]
    aligned = []
    for chunk in out.alignments[0]:
        r, h = said[chunk.ref_start_idx : chunk.ref_end_idx], heard[chunk.hyp_start_idx : chunk.hyp_end_idx]
        most = max(len(r), len(h))
        pairs = zip(r or [""] * most, h or [""] * most, strict=True)
        aligned += [(_KINDS[chunk.type], *pair) for pair in pairs]
    return aligned


@dataclass(frozen=True)
class Units:
    """What is drawn to find out how certain a rate is: the speakers, or where too few are known the utterances."""

    kind: str
    """"speakers" or "utterances"."""
    number: int
    """How many there are."""
    of: np.ndarray
    """int64 (N,): the unit of each utterance, from 0 on."""


def units_of(speakers: Sequence[str]) -> Units:
    """Speakers, from FEWEST_SPEAKERS on; then an utterance without one ("") counts as a speaker of its own."""
    if len(set(speakers) - {""}) < FEWEST_SPEAKERS:
        return Units("utterances", len(speakers), np.arange(len(speakers)))
    number_of: dict[str | int, int] = {}
    of = [number_of.setdefault(name or row, len(number_of)) for row, name in enumerate(speakers)]
    return Units("speakers", len(number_of), np.array(of, dtype=np.int64))


@dataclass(frozen=True)
class Interval:
    """The bounds within which the rate of a similar test set would lie in 95 of 100 cases."""

    low: float
    high: float


def intervals(each: np.ndarray, units: Units, *, resamples: int | None = None) -> tuple[Interval, Interval]:
    """Bootstrap over units: (of the WER, of the CER)."""
    totals = np.stack([each[:, 0:3].sum(1), each[:, 3], each[:, 4:7].sum(1), each[:, 7]])  # (4, N)
    sums = _resampled_sums(totals, units, resamples)  # (resamples, 4)
    return tuple(_interval(sums[:, first], sums[:, first + 1], units) for first in (0, 2))  # type: ignore[return-value]


def paired_interval(each: np.ndarray, other: np.ndarray, units: Units, *, resamples: int | None = None) -> Interval:
    """Bootstrap over units of the difference of two WERs over the same utterances, the first minus the second.

    Both are resampled with the same units: what is hard is hard for both, so the interval is narrower than that of two
    separate test sets. An interval without 0 shows a difference.
    """
    totals = np.stack([each[:, 0:3].sum(1) - other[:, 0:3].sum(1), each[:, 3]])  # (2, N)
    sums = _resampled_sums(totals, units, resamples)
    return _interval(sums[:, 0], sums[:, 1], units)


def paired_p(each: np.ndarray, other: np.ndarray, units: Units, *, resamples: int | None = None) -> float:
    """How often chance alone makes the word errors of two recognisers differ by as much as they do (two-sided p).

    A matched-pairs test, as NIST's is (Gillick and Cox, "Some Statistical Issues in the Comparison of Speech
    Recognition Algorithms", ICASSP 1989), with units as its segments. Its distribution is found by exchanging both
    recognisers in each unit at random (Fisher's randomisation test), since a normal one would need 50 speakers.
    All exchanges are tried where they are few.
    """
    by_unit = np.bincount(units.of, each[:, 0:3].sum(1) - other[:, 0:3].sum(1), units.number)
    differences = by_unit[by_unit != 0]
    count, found = len(differences), abs(differences.sum())
    tries = resamples or _resamples(count)
    if 2**count <= tries:
        every = 1 - 2 * (np.arange(2**count)[:, None] >> np.arange(count) & 1)
        return float((abs(every @ differences) >= found).mean())
    random, reached = np.random.default_rng(0), 1  # what was found is itself one of the exchanges
    for size in _blocks(tries, count):
        signs = 1.0 - 2.0 * random.integers(0, 2, size=(size, count), dtype=np.int8)
        reached += int((abs(signs @ differences) >= found).sum())
    return reached / (tries + 1)


def _resampled_sums(totals: np.ndarray, units: Units, resamples: int | None) -> np.ndarray:
    """Sums (resamples, C) of totals (C, N), each over as many units as there are, drawn with replacement."""
    tries = resamples or _resamples(units.number)
    if not units.number:
        return np.zeros((tries, len(totals)))
    columns = [np.bincount(units.of, column, units.number) for column in totals]  # sums of integers, so exact
    random = np.random.default_rng(0)
    sums = []
    for size in _blocks(tries, units.number):
        drawn = random.integers(0, units.number, size=(size, units.number))
        sums.append(np.stack([column[drawn].sum(axis=1) for column in columns], axis=1))
    return np.concatenate(sums)


def _resamples(units: int) -> int:
    return 10_000 if units <= 1_000 else 1_000  # the ends of an interval need more draws of few units


def _blocks(tries: int, units: int) -> list[int]:
    """Sizes of blocks of tries: all at once would take 2 GB for LibriSpeech's 281,241 utterances."""
    size = max(1, 4_000_000 // max(1, units))
    return [min(size, tries - start) for start in range(0, tries, size)]


def _interval(errors: np.ndarray, reference_units: np.ndarray, units: Units) -> Interval:
    """The percentiles of resampled rates, expanded for few units.

    A plain percentile interval of 10 units holds the truth in 90 of 100 cases and not in 95: resampling makes the
    variance too small by (n - 1) / n, and knows no Student's t. The expansion is that of Hesterberg, "What Teachers
    Should Know about the Bootstrap", 2014.
    """
    tail = 0.025
    if units.number > 1:
        z, free = NormalDist().inv_cdf(0.975), units.number - 1
        # Student's t by its expansion in 1 / free, to 0.3 % from 4 degrees of freedom on
        student = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
        student += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * free**3)
        tail = NormalDist().cdf(-student * (units.number / free) ** 0.5)
    low, high = np.percentile(errors / np.maximum(reference_units, 1), [100 * tail, 100 * (1 - tail)])
    return Interval(float(low), float(high))


def worst(each: np.ndarray, most: int) -> np.ndarray:
    """Row numbers of the utterances with the most errors: most word errors first, then most character errors.

    They are ordered by number and not by rate, because a one-word utterance with one error has a rate of 100 % and says
    little. Utterances without an error are not in the result.
    """
    word_errors, char_errors = each[:, 0:3].sum(axis=1), each[:, 4:7].sum(axis=1)
    order = np.lexsort((-char_errors, -word_errors))  # stable: equal ones keep the order of the corpus
    return order[(word_errors + char_errors)[order] > 0][:most]
