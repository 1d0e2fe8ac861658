"""Which utterances a training leaves out, by reason and by character, and what the user is told about it."""

import itertools

import numpy as np
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddp_asr import config
from ddp_asr.data.corpus import read_corpus
from ddp_asr.data.targets import REASONS, explain_left_out, fit_targets
from ddp_asr.errors import UserError
from ddp_asr.text.characters import Characters
from tests import tiny_speech

ENGLISH = Characters.from_settings(config.Characters())


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


def fit(texts, samples=10_000, **options):
    return fit_targets(FakeIndex(texts, np.broadcast_to(samples, len(texts))), ENGLISH, frames_of, **options)


TEXT = st.text("ab é'1\n", max_size=12)


@given(st.lists(st.tuples(TEXT, st.integers(0, 3_000)), min_size=1, max_size=40))
def test_the_fit_is_that_of_each_utterance_alone(utterances):
    texts, samples = zip(*utterances, strict=True)
    targets = fit(texts, samples, max_seconds=2_000 / 16_000)
    for row, (text, length) in enumerate(utterances):
        normal = ENGLISH.normalise(text)
        pairs = [a for a, b in itertools.pairwise(normal) if a == b]
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
        if first == "usable":
            assert targets.length[row] == len(normal)


def test_what_is_left_out_is_counted_and_named():
    targets = fit(["ab", "a1", "", "aab"], [400, 400, 400, 300])
    assert targets.usable_rows.tolist() == [0]
    assert list(targets.counts().values()) == [1, 1, 1]
    assert [key for key, _ in targets.left_out(FakeIndex([], []))] == ["key-1", "key-2", "key-3"]


def test_frames_are_counted_at_the_fastest_speed_and_length_at_the_slowest():
    texts, samples = ["abc", "abc"], [320, 400]
    assert fit(texts, samples).counts() == {}
    fast = fit(texts, samples, speeds=(1.0, 1.25))  # 320 / 1.25 = 256 samples: 2 frames
    assert fast.usable_rows.tolist() == [1]
    slow = fit(texts, samples, speeds=(0.8, 1.0), max_seconds=450 / 16_000)  # 400 / 0.8 = 500
    assert slow.usable_rows.tolist() == [0]


def test_counting_in_blocks_changes_nothing(monkeypatch):
    texts = ["aab b", "", "c1", "zz"] * 5
    whole = fit(texts)
    monkeypatch.setattr("ddp_asr.data.targets._BLOCK", 3)
    cut = fit(texts)
    assert (whole.length == cut.length).all() and (whole.reason == cut.reason).all() and whole.foreign == cut.foreign


# what the user is told


def test_each_character_is_counted_by_the_utterances_that_it_leaves_out():
    foreign = fit(["a1", "b", "11é", "é", "..1"]).foreign
    assert {character: (found.utterances, found.example) for character, found in foreign.items()} == {
        "1": (3, "key-0"),
        "é": (2, "key-2"),
        ".": (1, "key-4"),
    }


def test_where_nothing_is_left_out_nothing_is_said():
    assert explain_left_out(fit(["ab", "b"])) == []


def test_characters_are_named_the_most_frequent_first_and_rare_ones_counted():
    texts = ["ab"] * 300 + ["é1"] * 4 + ["1"] * 3 + [chr(0x10D0 + n) for n in range(12)]
    headline, reason, characters, warning = explain_left_out(fit(texts))
    assert headline == "19 of 319 utterances (6.0%) are left out"
    assert reason.split(maxsplit=1) == ["19", "the transcript has a character outside vocabulary.symbols"]
    assert characters.strip().startswith(
        "'1' in 7 (such as key-300), 'é' in 4 (such as key-300), 'ა' in 1 (such as key-3"
    )
    assert characters.endswith(", and 4 more characters") and characters.count(" in 1 ") == 8
    assert warning.startswith("WARNING: 6.0% of the utterances will not be trained: ")
    assert "--vocabulary.symbols" in warning and "--vocabulary.drop" in warning and "'1éა" in warning


def test_only_above_a_twentieth_there_is_a_warning():
    assert not explain_left_out(fit(["ab"] * 95 + ["1"] * 5))[-1].startswith("WARNING")
    assert explain_left_out(fit(["ab"] * 94 + ["1"] * 6))[-1].startswith("WARNING")


def test_the_warning_names_the_remedy_of_every_reason():
    warning = explain_left_out(fit(["ab", "", "ab", "a" * 50], [400, 400, 2_500, 400], max_seconds=0.1))[-1]
    assert "vocabulary.drop removes" in warning and "--batch.max_seconds" in warning and "hop_ms" in warning
    assert "--vocabulary.symbols" not in warning


def test_an_error_for_too_few_utterances_says_where_the_others_went(tmp_path):
    shards = tiny_speech.shard(tiny_speech.librispeech(tmp_path / "source"), tmp_path / "shards")
    settings = config.Config(
        data=config.Data(train=[str(shards)]), vocabulary=config.Characters(symbols=" abcdefghijklmn")
    )
    with pytest.raises(UserError) as refused:
        read_corpus(settings)
    said = str(refused.value)
    assert said.startswith(
        "0 usable utterances cannot fill the 8 micro-batches of a step; 12 of 12 utterances (100.0%)"
    )
    assert "character outside vocabulary.symbols" in said and "'s' in 12 (such as 100-7-0000)" in said
    assert "WARNING" in said and "\n" not in said
