"""The tokeniser of single characters: its alphabet and how transcripts are normalised. See also test_tokenisers.py."""

import pytest

from ddp_asr import config
from ddp_asr.errors import UserError
from ddp_asr.text.characters import Characters


def test_the_default_is_the_tutorials_alphabet():
    english = Characters.from_settings(config.Characters())
    assert english.encode("' az").tolist() == [0, 1, 2, 27]
    assert (english.blank, english.size) == (28, 29)


def test_transcripts_are_normalised():
    tokeniser = Characters(" aéc", drop=".,-")
    assert tokeniser.normalise("  A,\tc - E\u0301. ") == "a c é"
    assert Characters("aA ", lowercase=False).normalise("Aa  a") == "Aa a"


def test_lengths_repeats_and_foreign_characters_of_known_texts():
    counted = Characters(" ab").count(["aab b", "", "a1é1", "bb bb", "\ud800b"])
    assert counted.length.tolist() == [5, 0, 1, 5, 1]
    assert counted.repeats.tolist() == [1, 0, 0, 2, 0]
    assert counted.foreign == ["", "", "1é", "", "\ud800"]


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
        Characters(*arguments)
