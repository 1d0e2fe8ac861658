"""What every tokeniser promises, over all kinds that are registered: round trips, counts, and its state."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddp_asr import config
from ddp_asr.errors import UserError
from ddp_asr.text import TOKENISERS, make_tokeniser, tokeniser_from_state

# Tokenisers of each kind that write at least the lower-case letters, the apostrophe and the space, and no digit.
EXAMPLES: dict[str, list[config.Characters | config.Pieces]] = {
    "characters": [
        config.Characters(),
        config.Characters(symbols="' zyxwvutsrqponmlkjihgfedcba", drop=".-"),
        config.Characters(symbols="abcdefghijklmnopqrstuvwxyzé 'ABCDEFGHIJKLMNOPQRSTUVWXYZ", lowercase=False),
    ],
    "pieces": [
        config.Pieces(size=28),  # no more than the characters
        config.Pieces(size=48, drop=".-"),
        config.Pieces(size=64, symbols="zyxwvutsrqponmlkjihgfedcbaé 'ABCDEFGHIJKLMNOPQRSTUVWXYZ", lowercase=False),
    ],
}
TRANSCRIPTS = ["a cab aa b", "abc abc cab", "ab 'ab' ac 19", "xyz za zzz abab cabab"]
EVERY = [make_tokeniser(settings, TRANSCRIPTS) for examples in EXAMPLES.values() for settings in examples]
every = pytest.mark.parametrize("tokeniser", EVERY, ids=lambda tokeniser: type(tokeniser).__name__)

WRITABLE = st.text("' abcxyz", max_size=40)
ANY = st.text("' abcxyzABC.-é\u0301 19Ω\n\t\ud800", max_size=20)


def test_every_kind_has_examples():
    assert EXAMPLES.keys() == TOKENISERS.keys()


@every
def test_the_blank_is_the_last_class_and_silent(tokeniser):
    assert tokeniser.blank == tokeniser.size - 1 == len(tokeniser.symbols)
    classes = tokeniser.encode("ab").tolist()
    assert tokeniser.decode([tokeniser.blank, *classes, tokeniser.blank]) == tokeniser.decode(classes) == "ab"


@every
@given(text=WRITABLE)
def test_decoding_gives_the_normalised_text_back(tokeniser, text):
    classes = tokeniser.encode(text)
    assert classes.dtype == np.int64 and ((classes >= 0) & (classes < tokeniser.blank)).all()
    assert tokeniser.decode(classes) == tokeniser.normalise(text)


@every
@given(texts=st.lists(ANY, max_size=12))
def test_counts_are_those_of_each_text_encoded_alone(tokeniser, texts):
    counted = tokeniser.count(texts)
    encoded = [tokeniser.encode(text, skip_foreign=True).tolist() for text in texts]
    assert counted.length.tolist() == [len(classes) for classes in encoded]
    assert counted.repeats.tolist() == [sum(a == b for a, b in itertools.pairwise(classes)) for classes in encoded]
    for text, foreign in zip(texts, counted.foreign, strict=True):
        assert len(set(foreign)) == len(foreign) and set(foreign) <= set(tokeniser.normalise(text))
        if foreign:
            with pytest.raises(ValueError):
                tokeniser.encode(text)
        else:
            assert tokeniser.encode(text).tolist() == tokeniser.encode(text, skip_foreign=True).tolist()


@every
def test_what_it_cannot_write_is_named_and_skipped(tokeniser):
    assert tokeniser.count(["ab", "a9b 19", ""]).foreign == ["", "19", ""]
    with pytest.raises(ValueError, match="'9' in 'a9b'"):
        tokeniser.encode("a9b")
    assert tokeniser.encode("a9b", skip_foreign=True).tolist() == tokeniser.encode("ab").tolist()
    assert tokeniser.encode("99", skip_foreign=True).tolist() == []


@every
@given(text=ANY)
def test_its_state_is_plain_and_gives_the_same_tokeniser(tokeniser, text):
    state = tokeniser.state()
    again = tokeniser_from_state(json.loads(json.dumps(state)))
    assert again.state() == state and list(again.symbols) == list(tokeniser.symbols)
    assert again.normalise(text) == tokeniser.normalise(text)
    assert again.encode(text, skip_foreign=True).tolist() == tokeniser.encode(text, skip_foreign=True).tolist()


def test_an_unknown_kind_is_refused_with_those_there_are():
    with pytest.raises(
        UserError, match=r"tokeniser is of kind 'runes', .* has only: characters, pieces; use the version"
    ):
        tokeniser_from_state({"kind": "runes"})


OTHER_STATES = [{"kind": "pieces", "model": model} for model in (3, "", "é", "AAAA", "a")]


@pytest.mark.parametrize(
    "state",
    [{}, {"kind": []}, [], {"kind": "characters"}, {"kind": "characters", "symbols": 3}, {"kind": "pieces"}]
    + [{**state, "symbols": " ab", "lowercase": True, "drop": ""} for state in OTHER_STATES],
)
def test_a_state_that_is_none_is_refused(state):
    with pytest.raises(UserError, match=r"the checkpoint's tokeniser .*version"):
        tokeniser_from_state(state)


def test_a_part_of_another_type_is_refused():
    with pytest.raises(UserError, match=r"characters.*another type"):
        tokeniser_from_state({"kind": "characters", "symbols": "ab", "lowercase": True, "drop": 3})
