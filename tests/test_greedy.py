"""Greedy decoding against a brute-force collapse, and word times against the frames they were made from."""

from itertools import groupby

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddp_asr.decoding import greedy as decode
from ddp_asr.text.characters import Vocabulary

SYMBOLS = " ab'"
BLANK = len(SYMBOLS)
VOCABULARY = Vocabulary(SYMBOLS)


def logits_of(paths: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits whose best path is the given one; past an utterance's end, garbage that must not be read."""
    frames = torch.tensor([len(path) for path in paths])
    logits = torch.rand(len(paths), max(int(frames.max()), 1) + 2, BLANK + 1)
    for row, path in enumerate(paths):
        for frame, symbol in enumerate(path):
            logits[row, frame, symbol] += 2
    return logits, frames


def brute_force(path: list[int]) -> str:
    return "".join(SYMBOLS[symbol] for symbol, _ in groupby(path) if symbol != BLANK)


paths_of_a_batch = st.lists(st.lists(st.integers(0, BLANK), max_size=12), min_size=1, max_size=4)


@given(paths_of_a_batch)
def test_greedy_is_the_brute_force_collapse(paths: list[list[int]]) -> None:
    expected = [" ".join(brute_force(path).split()) for path in paths]
    assert decode.greedy(*logits_of(paths), VOCABULARY) == expected


@given(paths_of_a_batch)
def test_words_with_times_are_the_words_of_the_text(paths: list[list[int]]) -> None:
    logits, frames = logits_of(paths)
    texts = decode.greedy(logits, frames, VOCABULARY)
    timed = decode.word_times(logits, frames, VOCABULARY, 0.5)
    for text, words, path in zip(texts, timed, paths, strict=True):
        assert [word.text for word in words] == text.split()
        edges = [edge for word in words for edge in (word.start_s, word.end_s)]
        assert edges == sorted(edges)
        assert all(0 <= word.start_s < word.end_s <= 0.5 * len(path) for word in words)


def test_word_times_are_the_frames_of_the_first_and_last_symbol() -> None:
    a, b, space, blank = SYMBOLS.index("a"), SYMBOLS.index("b"), SYMBOLS.index(" "), BLANK
    path = [blank, a, a, blank, a, b, b, blank, space, blank, b, blank]
    (words,) = decode.word_times(*logits_of([path]), VOCABULARY, frame_s=0.025)
    assert [word.text for word in words] == ["aab", "b"]
    assert [(word.start_s, word.end_s) for word in words] == [
        (pytest.approx(0.025), pytest.approx(0.175)),
        (pytest.approx(0.250), pytest.approx(0.275)),
    ]


def test_no_frames_say_nothing() -> None:
    logits = torch.zeros(2, 0, BLANK + 1)
    assert decode.greedy(logits, torch.tensor([0, 0]), VOCABULARY) == ["", ""]
    assert decode.word_times(logits, torch.tensor([0, 0]), VOCABULARY, 0.02) == [[], []]
