"""Transcripts to classes and back, and which utterances a training leaves out, by reason."""

import itertools

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddp_asr import config
from ddp_asr.errors import UserError
from ddp_asr.text.characters import REASONS, Vocabulary, fit_targets

ENGLISH = Vocabulary.from_config(config.Characters())


class FakeIndex:
    """The columns that `fit_targets` reads."""

    def __init__(self, texts, samples):
        self.texts = pyarrow.array(texts, pyarrow.string())
        self.samples = np.array(samples, np.int64)

    def __len__(self):
        return len(self.texts)

    def key(self, row):
        return f"key-{row}"


def frames_of(samples):
    return samples // 100


def test_the_default_is_the_tutorials_alphabet():
    assert ENGLISH.encode("' az").tolist() == [0, 1, 2, 27]
    assert (ENGLISH.blank, ENGLISH.size) == (28, 29)


def test_transcripts_are_normalised():
    vocabulary = Vocabulary(" aéc", drop=".,-")
    assert vocabulary.normalise("  A,\tc - E\u0301. ") == "a c é"
    assert Vocabulary("aA ", lowercase=False).normalise("Aa  a") == "Aa a"


@given(st.text("' abcxyzABCXYZ", max_size=40))
def test_decoding_gives_the_normalised_text_back(text):
    assert ENGLISH.decode(ENGLISH.encode(text)) == ENGLISH.normalise(text)


def test_the_blank_is_silent():
    assert ENGLISH.decode(np.array([2, 28, 3])) == "ab"


def test_a_foreign_character_is_named_or_skipped():
    with pytest.raises(ValueError, match=r"'é' in 'Café'"):
        ENGLISH.encode("Café")
    assert ENGLISH.decode(ENGLISH.encode("Café 9b", skip_foreign=True)) == "caf b"


@pytest.mark.parametrize(
    "arguments, named",
    [
        (("",), "is empty"),
        (("abca",), "'a' more than once"),
        (("abC",), "'C', which normalisation"),
        (("ab.", False, "."), "'.', which normalisation"),
    ],
)
def test_symbols_that_cannot_work_are_refused(arguments, named):
    with pytest.raises(UserError, match=named):
        Vocabulary(*arguments)


TEXT = st.text("ab é'1\n", max_size=12)


@given(st.lists(st.tuples(TEXT, st.integers(0, 3_000)), min_size=1, max_size=40))
def test_the_fit_is_that_of_each_utterance_alone(utterances):
    texts, samples = zip(*utterances, strict=True)
    targets = fit_targets(FakeIndex(texts, samples), ENGLISH, frames_of, max_seconds=2_000 / 16_000)
    for row, (text, length) in enumerate(utterances):
        normal = ENGLISH.normalise(text)
        assert targets.length[row] == len(normal)
        pairs = [a for a, b in itertools.pairwise(normal) if a == b and a in ENGLISH.symbols]
        assert targets.repeats[row] == len(pairs)
        expected = {
            "the transcript is empty after normalisation": not normal,
            "the transcript has a character outside vocabulary.symbols": bool(set(normal) - set(ENGLISH.symbols)),
            "fewer frames than CTC needs for the transcript (symbols + adjacent equal ones)": (
                length // 100 < len(normal) + len(pairs)
            ),
            "longer than batch.max_seconds": length > 2_000,
        }
        first = next((reason for reason, holds in expected.items() if holds), "usable")
        assert REASONS[targets.reason[row]] == first


def test_what_is_left_out_is_counted_and_named():
    targets = fit_targets(FakeIndex(["ab", "a1", "", "aab"], [400, 400, 400, 300]), ENGLISH, frames_of)
    assert targets.usable_rows.tolist() == [0]
    assert list(targets.counts().values()) == [1, 1, 1]
    assert [key for key, _ in targets.left_out(FakeIndex([], []))] == ["key-1", "key-2", "key-3"]


def test_frames_are_counted_at_the_fastest_speed_and_length_at_the_slowest():
    index = FakeIndex(["abc", "abc"], [320, 400])
    assert fit_targets(index, ENGLISH, frames_of).counts() == {}
    fast = fit_targets(index, ENGLISH, frames_of, speeds=(1.0, 1.25))  # 320 / 1.25 = 256 samples: 2 frames
    assert fast.usable_rows.tolist() == [1]
    slow = fit_targets(index, ENGLISH, frames_of, speeds=(0.8, 1.0), max_seconds=450 / 16_000)  # 400 / 0.8 = 500
    assert slow.usable_rows.tolist() == [0]


def test_blocks_do_not_show(monkeypatch):
    texts = ["aab b", "", "c1", "zz"] * 5
    index = FakeIndex(texts, [1_000] * len(texts))
    whole = fit_targets(index, ENGLISH, frames_of)
    monkeypatch.setattr("ddp_asr.text.characters._BLOCK", 3)
    cut = fit_targets(index, ENGLISH, frames_of)
    assert all((getattr(whole, name) == getattr(cut, name)).all() for name in ("length", "repeats", "reason"))
