"""Every registered decoder: words that are the text, times that lie in the row, padding and neighbours that do nothing.

Greedy decoding besides against a brute-force collapse of the best path, and its word times against the frames.
"""

import tempfile
from functools import cache
from importlib.util import find_spec
from itertools import groupby, product
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddp_asr import config
from ddp_asr.decoding import DECODERS, make_decoder
from ddp_asr.text import TOKENISERS as KINDS_OF_TOKENISERS
from ddp_asr.text import Tokeniser, make_tokeniser
from ddp_asr.text.characters import Characters

SYMBOLS = " ab'"
BLANK = len(SYMBOLS)
TOKENISERS: dict[str, Tokeniser] = {
    "characters": Characters(SYMBOLS),
    "pieces": make_tokeniser(config.Pieces(size=9, symbols=SYMBOLS), ["ab a bab", "ab ab aab", "bab a b'a"]),
}
FRAME_S = 0.5
# Every decoder with every kind of tokeniser; `lexicon` refuses all but characters.
CASES = [
    (kind, vocabulary)
    for kind in DECODERS
    for vocabulary in (["characters"] if kind == "lexicon" else TOKENISERS)
    if kind != "lexicon" or find_spec("flashlight")
]
paths_of_a_batch = st.lists(st.lists(st.integers(0, BLANK), max_size=12), min_size=1, max_size=4)
cases_with_paths = st.sampled_from(CASES).flatmap(
    lambda case: st.tuples(
        st.just(case),
        st.lists(st.lists(st.integers(0, TOKENISERS[case[1]].blank), max_size=12), min_size=1, max_size=4),
    )
)


def test_every_kind_of_tokeniser_has_a_case():
    assert TOKENISERS.keys() == KINDS_OF_TOKENISERS.keys()


@cache
def decoder_of(kind, vocabulary="characters", frame_s=FRAME_S):
    """With default settings, and for `lexicon` each text of up to two symbols as a word."""
    with tempfile.TemporaryDirectory() as directory:
        lexicon = Path(directory, "lexicon.txt")
        lexicon.write_text("\n".join([*"ab'", *("".join(pair) for pair in product("ab'", repeat=2))]))
        settings = {"kind": kind, **({"lexicon": str(lexicon)} if kind == "lexicon" else {})}
        return make_decoder(
            config.config_from_dict({"decoder": settings}, "the test").decoder, TOKENISERS[vocabulary], frame_s
        )


def logits_of(paths: list[list[int]], blank: int = BLANK) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits whose best path is the given one; past a row's end, garbage that must not be read."""
    frames = torch.tensor([len(path) for path in paths])
    logits = torch.rand(len(paths), max(int(frames.max()), 1) + 2, blank + 1)
    for row, path in enumerate(paths):
        for frame, symbol in enumerate(path):
            logits[row, frame, symbol] += 2
    return logits, frames


# ---- every decoder -------------------------------------------------------------------------------------------------


@given(cases_with_paths)
def test_words_are_the_text_and_lie_in_their_order_within_the_row(case_with_paths):
    case, paths = case_with_paths
    logits, frames = logits_of(paths, TOKENISERS[case[1]].blank)
    for hypothesis, path in zip(decoder_of(*case)(logits, frames), paths, strict=True):
        assert hypothesis.text == " ".join(word.text for word in hypothesis.words) == " ".join(hypothesis.text.split())
        edges = [edge for word in hypothesis.words for edge in (word.start_s, word.end_s)]
        assert edges == sorted(edges)
        assert all(0 <= word.start_s < word.end_s <= FRAME_S * len(path) for word in hypothesis.words)
        assert all(0 < word.confidence <= 1 for word in hypothesis.words)
        assert hypothesis.score <= 0


@given(cases_with_paths)
def test_a_row_alone_and_in_a_batch_is_the_same(case_with_paths):
    case, paths = case_with_paths
    logits, frames = logits_of(paths, TOKENISERS[case[1]].blank)
    together = decoder_of(*case)(logits, frames)
    for row, length in enumerate(frames.tolist()):
        (alone,) = decoder_of(*case)(logits[row : row + 1, :length], frames[row : row + 1])
        times = [[(word.text, word.start_s, word.end_s) for word in each.words] for each in (alone, together[row])]
        assert alone.text == together[row].text and times[0] == times[1]
        assert alone.score == pytest.approx(together[row].score, rel=1e-6)
        confidences = [[word.confidence for word in each.words] for each in (alone, together[row])]
        assert confidences[0] == pytest.approx(confidences[1], rel=1e-6)


@pytest.mark.parametrize(("kind", "vocabulary"), CASES)
def test_no_frames_are_no_words(kind, vocabulary):
    logits = torch.zeros(2, 0, TOKENISERS[vocabulary].size)
    for hypothesis in decoder_of(kind, vocabulary)(logits, torch.tensor([0, 0])):
        assert (hypothesis.text, hypothesis.words, hypothesis.score) == ("", [], 0.0)


# ---- greedy --------------------------------------------------------------------------------------------------------


def brute_force(path: list[int]) -> str:
    return "".join(SYMBOLS[symbol] for symbol, _ in groupby(path) if symbol != BLANK)


@given(paths_of_a_batch)
def test_greedy_is_the_brute_force_collapse(paths: list[list[int]]) -> None:
    found = [hypothesis.text for hypothesis in decoder_of("greedy")(*logits_of(paths))]
    assert found == [" ".join(brute_force(path).split()) for path in paths]


def test_the_score_of_greedy_is_the_log_probability_of_its_path() -> None:
    path = [1, 1, BLANK, 2]
    logits, frames = logits_of([path])
    expected = sum(float(logits[0].softmax(-1)[frame, symbol].log()) for frame, symbol in enumerate(path))
    assert decoder_of("greedy")(logits, frames)[0].score == pytest.approx(expected, rel=1e-5)


def test_greedys_word_times_are_the_frames_of_the_first_and_last_symbol() -> None:
    a, b, space, blank = SYMBOLS.index("a"), SYMBOLS.index("b"), SYMBOLS.index(" "), BLANK
    path = [blank, a, a, blank, a, b, b, blank, space, blank, b, blank]
    (hypothesis,) = decoder_of("greedy", frame_s=0.025)(*logits_of([path]))
    assert [word.text for word in hypothesis.words] == ["aab", "b"]
    assert [(word.start_s, word.end_s) for word in hypothesis.words] == [
        (pytest.approx(0.025), pytest.approx(0.175)),
        (pytest.approx(0.250), pytest.approx(0.275)),
    ]
