"""Counts against an independent edit distance, their sums, and the bootstrap against a plain loop."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddp_asr.text import score
from ddp_asr.text.score import Counts


def edit_distance(reference: list[str] | str, hypothesis: list[str] | str) -> int:
    """Levenshtein by the textbook's recurrence."""
    row = list(range(len(hypothesis) + 1))
    for i, r in enumerate(reference, start=1):
        diagonal, row[0] = row[0], i
        for j, h in enumerate(hypothesis, start=1):
            diagonal, row[j] = row[j], min(diagonal + (r != h), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def total(references: list[str], hypotheses: list[str]) -> Counts:
    """The counts of a corpus."""
    return Counts.from_array(score.count_each(references, hypotheses).sum(axis=0))


UTTERANCES = score.units_of([""] * 60)
texts = st.text(alphabet="ab ", max_size=12)
corpora = st.lists(st.tuples(texts, texts), max_size=6)


@given(corpora)
def test_rates_are_those_of_the_edit_distance(pairs: list[tuple[str, str]]) -> None:
    references, hypotheses = [r for r, _ in pairs], [h for _, h in pairs]
    counts = total(references, hypotheses)
    assert counts.word_errors == sum(edit_distance(r.split(), h.split()) for r, h in pairs)
    assert counts.words == sum(len(r.split()) for r in references)
    tidy = [(" ".join(r.split()), " ".join(h.split())) for r, h in pairs]
    assert counts.char_errors == sum(edit_distance(r, h) for r, h in tidy)
    assert counts.chars == sum(len(r) for r, _ in tidy)
    # What was added less what was lost is the difference of the lengths, whichever alignment is chosen.
    assert counts.word_insertions - counts.word_deletions == sum(len(h.split()) - len(r.split()) for r, h in pairs)


@given(corpora, corpora)
def test_counts_add_up(first: list[tuple[str, str]], second: list[tuple[str, str]]) -> None:
    def count(pairs: list[tuple[str, str]]) -> np.ndarray:
        return score.count_each([r for r, _ in pairs], [h for _, h in pairs])

    assert (np.concatenate([count(first), count(second)]) == count(first + second)).all()


def test_the_three_kinds_of_error() -> None:
    counts = total(["the cat sat", "on it"], ["the hat sat", "now on it"])
    assert (counts.word_substitutions, counts.word_deletions, counts.word_insertions, counts.words) == (1, 0, 1, 5)
    assert counts.wer == pytest.approx(2 / 5)
    assert total(["the cat sat"], ["the sat"]).word_deletions == 1


def test_the_rate_is_the_corpus_and_not_the_mean_of_utterances() -> None:
    assert total(["a", "a b c d e f g h i"], ["b", "a b c d e f g h i"]).wer == pytest.approx(0.1)


def test_empty_hypothesis_and_empty_reference() -> None:
    lost = total(["two words"], [""])
    assert (lost.word_deletions, lost.wer, lost.char_deletions, lost.cer) == (2, 1.0, 9, 1.0)
    made_up = total([""], ["two words"])
    assert (made_up.word_insertions, made_up.words, made_up.wer) == (2, 0, float("inf"))
    assert total(["", "one"], ["x", "one"]).wer == 1.0
    assert total([""], [""]).wer == 0.0
    assert total([], []) == Counts()


def test_intervals_are_those_of_a_plain_bootstrap() -> None:
    random = np.random.default_rng(1)
    references = ["a b c d e f g h"] * 60
    hypotheses = [" ".join(w if random.random() > 0.2 else "x" for w in r.split()) for r in references]
    each = score.count_each(references, hypotheses)
    wer, cer = score.intervals(each, UTTERANCES, resamples=2000)

    draws = np.random.default_rng(2)
    plain = []
    for _ in range(2000):
        drawn = each[draws.integers(0, 60, size=60)]
        plain.append(drawn[:, 0:3].sum() / drawn[:, 3].sum())
    assert wer.low == pytest.approx(np.percentile(plain, 2.5), abs=0.01)
    assert wer.high == pytest.approx(np.percentile(plain, 97.5), abs=0.01)
    assert wer.low < total(references, hypotheses).wer < wer.high
    assert 0 < cer.low < cer.high < wer.high
    assert score.intervals(each, UTTERANCES, resamples=2000) == (wer, cer)  # a fixed seed


def test_the_interval_of_a_difference_is_that_of_a_plain_paired_bootstrap() -> None:
    random = np.random.default_rng(1)
    references = ["a b c d e f g h"] * 60
    worse = [" ".join(w if random.random() > 0.3 else "x" for w in r.split()) for r in references]
    better = [
        " ".join(r if random.random() > 0.8 else w for w, r in zip(t.split(), "abcdefgh", strict=True)) for t in worse
    ]
    first, second = score.count_each(references, better), score.count_each(references, worse)
    interval = score.paired_interval(first, second, UTTERANCES, resamples=2000)

    draws = np.random.default_rng(2)
    plain = []
    for _ in range(2000):
        drawn = draws.integers(0, 60, size=60)
        plain.append((first[drawn, 0:3].sum() - second[drawn, 0:3].sum()) / first[drawn, 3].sum())
    assert interval.low == pytest.approx(np.percentile(plain, 2.5), abs=0.01)
    assert interval.high == pytest.approx(np.percentile(plain, 97.5), abs=0.01)
    assert interval.low < interval.high < 0
    swapped = score.paired_interval(second, first, UTTERANCES, resamples=2000)
    assert (swapped.low, swapped.high) == pytest.approx((-interval.high, -interval.low))
    wer, other = score.intervals(first, UTTERANCES)[0], score.intervals(second, UTTERANCES)[0]
    assert interval.high - interval.low < (wer.high - wer.low) + (other.high - other.low)
    assert score.paired_interval(first, first, UTTERANCES) == score.Interval(0.0, 0.0)


def test_intervals_in_blocks_and_of_nothing() -> None:
    each = np.zeros((5_000_000 // 2, 8), dtype=np.int64)  # one resample a block
    each[:, 3] = each[:, 0] = 1
    wer, cer = score.intervals(each, score.units_of([""] * len(each)), resamples=2)
    assert (wer.low, wer.high, cer.high) == (1.0, 1.0, 0.0)
    assert score.intervals(np.zeros((0, 8), dtype=np.int64), score.units_of([]))[0].high == 0.0


def spoken(random: np.random.Generator, speakers: int, mean: float = 0.12) -> np.ndarray:
    """Counts of 13 utterances of 6 words by each speaker, who has an error rate of their own."""
    rates = np.clip(random.normal(mean, 0.05, speakers), 0.005, 1).repeat(13)
    each = np.zeros((len(rates), 8), dtype=np.int64)
    each[:, 0], each[:, 3], each[:, 7] = random.binomial(6, rates), 6, 1
    return each


def test_speakers_are_drawn_where_there_are_five() -> None:
    names = ["a", "b", "", "c", "a", ""]
    assert score.units_of(names).kind == "utterances" and score.units_of(names).of.tolist() == [0, 1, 2, 3, 4, 5]
    units = score.units_of([*names, "d", "e"])
    assert (units.kind, units.number, units.of.tolist()) == ("speakers", 7, [0, 1, 2, 3, 0, 4, 5, 6])


def test_intervals_over_speakers_hold_the_truth_where_those_over_utterances_do_not() -> None:
    random, held = np.random.default_rng(0), [0, 0]
    for _ in range(200):
        each = spoken(random, 10)
        for way, names in enumerate((np.arange(10).repeat(13).astype(str).tolist(), [""] * 130)):
            wer, _ = score.intervals(each, score.units_of(names), resamples=1000)
            held[way] += wer.low <= 0.12 <= wer.high
    assert 180 <= held[0] <= 198 and held[1] < 170  # 95 % are 190; a plain percentile interval holds 180 at most


def test_p_is_the_share_of_all_exchanges() -> None:
    random = np.random.default_rng(0)
    first, second, units = spoken(random, 7), spoken(random, 7), score.units_of([str(n // 13) for n in range(91)])
    differences = [(first - second)[13 * n : 13 * n + 13, 0].sum() for n in range(7)]
    sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in product((1, -1), repeat=7)]
    assert score.paired_p(first, second, units) == np.mean([each >= abs(sum(differences)) for each in sums])
    assert score.paired_p(first, second, units) == score.paired_p(second, first, units)
    assert score.paired_p(first, first, units) == 1.0
    drawn = score.paired_p(first, second, units, resamples=100)  # fewer than the 128 exchanges
    assert drawn == pytest.approx(score.paired_p(first, second, units), abs=0.15)


def test_chance_alone_is_rarely_a_significant_difference() -> None:
    random, names = np.random.default_rng(0), np.arange(10).repeat(13).astype(str).tolist()
    found = [score.paired_p(spoken(random, 10), spoken(random, 10), score.units_of(names)) for _ in range(200)]
    assert 2 <= sum(p < 0.05 for p in found) <= 20
    better = [
        score.paired_p(spoken(random, 10, 0.08), spoken(random, 10, 0.25), score.units_of(names)) for _ in range(9)
    ]
    assert max(better) < 0.05


@given(texts, texts)
def test_an_alignment_spells_both_texts_and_has_the_errors_that_are_counted(reference: str, hypothesis: str) -> None:
    aligned = score.align_words(reference, hypothesis)
    assert [said for _, said, _ in aligned if said] == reference.split()
    assert [heard for _, _, heard in aligned if heard] == hypothesis.split()
    counts = total([reference], [hypothesis])
    kinds = [kind for kind, _, _ in aligned]
    assert kinds.count("s") == counts.word_substitutions and kinds.count("d") == counts.word_deletions
    assert kinds.count("i") == counts.word_insertions and len(kinds) - kinds.count("i") == counts.words


def test_the_worst_utterances_come_first_and_right_ones_not_at_all() -> None:
    each = score.count_each(["a b c", "a", "a b c", "good"], ["x y c", "b", "x y z", "good"])
    assert score.worst(each, most=9).tolist() == [2, 0, 1]
    assert score.worst(each, most=1).tolist() == [2]
