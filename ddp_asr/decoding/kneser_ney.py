"""Estimates an n-gram model from text: interpolated modified Kneser-Ney smoothing.

    sentences as numbers  --_count-->  the different n-grams of each length  --estimate-->  NGramModel

The equations are those of Chen and Goodman (1998) in the form in which KenLM's `lmplz` computes them (Heafield,
Pouzyrevsky, Clark and Koehn 2013). Its conventions are kept, so that both make the same model of the same text:

- A sentence is `<s> w1 ... wm </s>`, and no n-gram crosses its ends.
- The count a of the longest n-grams, and of those that begin with <s>, is how often they occur. The count of a shorter
  one is how many different symbols occur before it.
- The n-grams of each length have discounts D(1), D(2) and D(3), the last for all counts from 3 on, computed from how
  many of them have a = 1, 2, 3 and 4: Y = t1 / (t1 + 2 t2), D(k) = k - (k + 1) Y t(k+1) / t(k).
- p(w | h) = (a(hw) - D(a(hw))) / sum over x of a(hx) + b(h) p(w | h'), where h' is h without its first symbol and the
  back-off weight b(h) is what the discounts leave. Unigrams are interpolated with the uniform distribution over all
  symbols but <s>; from it comes the probability of <unk>.

Where a text is small or its symbols are few, as the letters of a language are, some t(k) is 0 or a discount is out of
its range. That length gets D = 0.5, 1, 1.5, which `lmplz --discount_fallback` uses, too.

One difference: of each length but the longest, `lmplz` takes the last n-gram in its own order (the one that ends in the
symbols that came last into its vocabulary) into t by how often it occurs, and not by its a. On a text of some hundred
words that changes a discount in the second digit, on a large one nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ddp_asr.decoding.ngram import END, START, UNKNOWN, NGramModel, NGrams

FALLBACK = (0.5, 1.0, 1.5)
_START, _END, _FIRST = 1, 2, 3  # numbers in the model; <unk> is 0, and the text's own symbols follow


@dataclass(frozen=True)
class Discounts:
    """What is taken off the counts of the n-grams of one length."""

    amounts: tuple[float, float, float]  # of a count of 1, of 2, of 3 and more
    are_fallback: bool


@dataclass(frozen=True, eq=False)
class _Counted:
    """The N different n-grams of one length, sorted by (prefix, symbol)."""

    prefix: np.ndarray  # int64 (N,): place of the n-gram without its last symbol among those one shorter
    suffix: np.ndarray  # int64 (N,): place of the n-gram without its first symbol
    symbol: np.ndarray  # int64 (N,): the last symbol
    occurrences: np.ndarray  # int64 (N,)
    begins_sentence: np.ndarray  # bool (N,): the first symbol is <s>


def estimate(
    text: np.ndarray,
    lengths: np.ndarray,
    symbols: Sequence[str],
    order: int,
    report: Callable[[int, int], None] = lambda length, ngrams: None,
) -> tuple[NGramModel, list[Discounts]]:
    """The model of a text, and the discounts of each length.

    Args:
        text: int (M,): all sentences one after the other; a symbol is a place in `symbols`.
        lengths: int (S,): how many symbols each sentence has.
        symbols: what each symbol writes; the model has those that occur.
        report: called when the n-grams of a length are counted, with the length and their number.
    """
    occurring = np.unique(text)
    number = np.zeros(len(symbols), np.int64)
    number[occurring] = np.arange(_FIRST, _FIRST + len(occurring))
    counted = _count(_with_ends(number[text], lengths), _FIRST + len(occurring), order, report)
    orders: list[NGrams] = []
    discounts: list[Discounts] = []
    p = np.full(1, 1 / (_FIRST + len(occurring) - 1))  # uniform over all but <s>, as if the unigrams' suffix had it
    for length, ngrams in enumerate(counted, 1):
        a = ngrams.occurrences
        if length < order:
            before = np.bincount(counted[length].suffix, minlength=len(a))
            a = np.where(ngrams.begins_sentence, a, before)
        a = np.where(ngrams.symbol == _START, 0, a)  # it never follows
        discounts.append(_discounts(a))
        p, back_off = _interpolate(ngrams, a, discounts[-1], p)
        if length == 1:
            p[_START] = 1.0  # lmplz writes this, others -99; no program reads it
        else:
            orders[-1] = replace(orders[-1], log10_back_off=np.log10(back_off))
        orders.append(NGrams(ngrams.prefix, ngrams.symbol, np.log10(p), np.zeros(len(p))))
    return NGramModel(
        (UNKNOWN, START, END, *(symbols[place] for place in occurring.tolist())), tuple(orders)
    ), discounts


def _with_ends(text: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64 (M + 2 S,): the text with <s> before and </s> after each sentence."""
    after = np.cumsum(lengths + 2)
    tokens = np.zeros(len(text) + 2 * len(lengths), np.int64)
    tokens[after - lengths - 2] = _START
    tokens[after - 1] = _END
    tokens[tokens == 0] = text
    return tokens


def _count(tokens: np.ndarray, size: int, order: int, report: Callable[[int, int], None]) -> list[_Counted]:
    """By length, all n-grams of the tokens, whose numbers are below `size`."""
    occurrences = np.bincount(tokens, minlength=size)
    zeros, everything = np.zeros(size, np.int64), np.arange(size)
    counted = [_Counted(zeros, zeros, everything, occurrences, everything == _START)]
    report(1, size)
    ends = np.arange(len(tokens))  # the places at which the n-grams of the last length end,
    place = tokens  # and which they are
    at = np.empty(len(tokens), np.int64)  # the same by place in the text
    for length in range(2, order + 1):
        at[ends] = place
        follows = ends[tokens[ends] != _END] + 1  # where they go on by one symbol
        key = at[follows - 1] * size + tokens[follows]
        key, first, place, occurrences = np.unique(key, return_index=True, return_inverse=True, return_counts=True)
        prefix, symbol = np.divmod(key, size)
        # An n-gram ends at the same place in the text as its suffix.
        counted.append(_Counted(prefix, at[follows[first]], symbol, occurrences, counted[-1].begins_sentence[prefix]))
        ends = follows
        report(length, len(key))
    return counted


def _discounts(a: np.ndarray) -> Discounts:
    t = np.bincount(np.minimum(a, 5), minlength=5)[1:5].tolist()  # t1 to t4
    if all(t[:3]):
        y = t[0] / (t[0] + 2 * t[1])
        one, two, three = (k - (k + 1) * y * t[k] / t[k - 1] for k in (1, 2, 3))
        # lmplz takes a discount of 0, too; then a context whose counts are all 2 would leave nothing to back off with.
        if one > 0 and two > 0 and three > 0:
            return Discounts((one, two, three), are_fallback=False)
    return Discounts(FALLBACK, are_fallback=True)


def _interpolate(
    ngrams: _Counted, a: np.ndarray, discounts: Discounts, shorter_p: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """p(symbol | prefix) of each n-gram (N,), and the back-off weight of each n-gram one shorter; 1 of no prefix."""
    discount = np.array([0.0, *discounts.amounts])[np.minimum(a, 3)]
    contexts = len(shorter_p)
    total = np.bincount(ngrams.prefix, weights=a, minlength=contexts)
    left = np.bincount(ngrams.prefix, weights=discount, minlength=contexts)
    is_prefix = total > 0
    back_off = np.divide(left, total, out=np.ones(contexts), where=is_prefix)
    return (a - discount) / total[ngrams.prefix] + back_off[ngrams.prefix] * shorter_p[ngrams.suffix], back_off
