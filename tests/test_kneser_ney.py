"""Estimation against the published equations, written down slowly, and against what KenLM's lmplz wrote.

tests/lmplz-words.arpa and tests/lmplz-letters.arpa are what lmplz of KenLM at commit 4cb443e60b7b wrote for `LMPLZ`, a
sentence a line and spaces between the symbols: `lmplz --order 3 --discount_fallback` and `lmplz --order 4`.
"""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddp_asr.decoding.kneser_ney import FALLBACK, estimate
from ddp_asr.decoding.ngram import END, START, UNKNOWN, read_arpa
from tests.back_off import BackOff, by_symbols
from tests.conftest import REPOSITORY

texts = st.lists(st.lists(st.sampled_from("abcd"), max_size=8), min_size=1, max_size=12)
WORDS = ["the", "of", "and", "to", "a", "in", "is", "it", "you", "that", "he", "was", "for", "on", "are", "with", "as"]


def sentences() -> list[list[str]]:
    """Words of unequal frequency and with favourite neighbours, drawn by a linear congruence."""
    state, words = 1, WORDS[:1]
    while len(words) < 700:
        state = (1103515245 * state + 12345) % 2**31
        share = state / 2**31
        neighbour = WORDS[(7 * WORDS.index(words[-1]) + 1) % len(WORDS)]
        words.append(neighbour if share < 0.3 else WORDS[int(len(WORDS) * share**3)])
    return [*(words[start : start + 3 + start % 5] for start in range(0, len(words), 7)), ["q"]]


def model_of(lines, order):
    symbols = sorted({symbol for line in lines for symbol in line})
    number = {symbol: place for place, symbol in enumerate(symbols)}
    text = np.array([number[symbol] for line in lines for symbol in line], np.int64)
    return estimate(text, np.array([len(line) for line in lines]), symbols, order)


class Reference:
    """Chen and Goodman's equations, one n-gram at a time."""

    def __init__(self, lines, order):
        grams = Counter()
        for line in lines:
            tokens = (START, *line, END)
            for length in range(1, order + 1):
                grams.update(tokens[i : i + length] for i in range(len(tokens) - length + 1))
        self.count = {}
        for gram, occurs in grams.items():
            if len(gram) == order or gram[0] == START:
                self.count[gram] = occurs
            else:
                self.count[gram] = len({other[0] for other in grams if other[1:] == gram})
        self.count[START,] = 0
        self.vocabulary = {UNKNOWN, *(gram[0] for gram in grams if len(gram) == 1)}
        self.discount = {length: self.discounts(length) for length in range(1, order + 1)}

    def discounts(self, length):
        t = Counter(count for gram, count in self.count.items() if len(gram) == length)
        if not (t[1] and t[2] and t[3]):
            return (0, *FALLBACK)
        y = t[1] / (t[1] + 2 * t[2])
        found = [k - (k + 1) * y * t[k + 1] / t[k] for k in (1, 2, 3)]
        return (0, *found) if min(found) > 0 else (0, *FALLBACK)

    def discounted(self, gram):
        count = self.count.get(gram, 0)
        return count - self.discount[len(gram)][min(count, 3)]

    def back_off(self, context):
        following = [self.count[gram] for gram in self.count if len(gram) == len(context) + 1 and gram[:-1] == context]
        if not sum(following):
            return 1.0
        taken = sum(self.discount[len(context) + 1][min(count, 3)] for count in following)
        return taken / sum(following)

    def p(self, context, symbol):
        total = sum(self.count[gram] for gram in self.count if len(gram) == len(context) + 1 and gram[:-1] == context)
        lower = self.p(context[1:], symbol) if context else 1 / (len(self.vocabulary) - 1)
        if not total:
            return lower
        return max(self.discounted((*context, symbol)), 0) / total + self.back_off(context) * lower


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@given(lines=texts)
def test_it_is_what_the_equations_say(order, lines):
    model, discounts = model_of(lines, order)
    expected = Reference(lines, order)
    assert [tuple(d.amounts) for d in discounts] == [
        pytest.approx(expected.discount[length][1:]) for length in range(1, order + 1)
    ]
    assert set(model.symbols) == expected.vocabulary
    for length in range(1, order + 1):
        found = by_symbols(model, length)
        assert found.keys() - {(UNKNOWN,)} == {gram for gram in expected.count if len(gram) == length}
        for gram, (log10_p, log10_back_off) in found.items():
            if gram != (START,):
                assert 10**log10_p == pytest.approx(expected.p(gram[:-1], gram[-1]), rel=1e-9), gram
            if length < order:
                assert 10**log10_back_off == pytest.approx(expected.back_off(gram), rel=1e-9), gram


@given(lines=texts, order=st.integers(1, 5))
def test_probabilities_sum_to_one_after_every_context(lines, order):
    model, _ = model_of(lines, order)
    contexts = [(), ("d", "d", "d"), (START, UNKNOWN)]
    for length in range(1, order):
        contexts += by_symbols(model, length)
    log10_p = BackOff(model)
    for context in contexts:
        total = math.fsum(10 ** log10_p(context, symbol) for symbol in model.symbols if symbol != START)
        assert total == pytest.approx(1, abs=1e-9), context


# The last symbol occurs once, because lmplz counts otherwise there (see ddp_asr/decoding/kneser_ney.py).
LMPLZ = {"words": (sentences(), 3), "letters": ([list(" ".join(line)) for line in sentences()], 4)}


@pytest.mark.parametrize("unit", LMPLZ)
def test_it_is_the_model_that_lmplz_makes(unit):
    lines, order = LMPLZ[unit]
    model, discounts = model_of(lines, order)
    expected = read_arpa(REPOSITORY / "tests" / f"lmplz-{unit}.arpa")
    for length in range(1, order + 1):
        found, written = by_symbols(model, length), by_symbols(expected, length)
        assert found.keys() == written.keys()
        for gram, values in written.items():
            assert found[gram] == pytest.approx(values, abs=2e-6), gram  # it computes in float32
    assert any(discount.are_fallback for discount in discounts) == (unit == "words")
