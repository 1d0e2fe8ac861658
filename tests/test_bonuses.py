"""The automaton of bonuses against words that are counted in the finished text."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddp_asr.decoding.bonuses import make_bonuses, read_hot_words
from ddp_asr.errors import UserError
from ddp_asr.text.characters import Characters

SYMBOL_BONUS, WORD_BONUS, HOT_WORD_BONUS = 0.3, -0.4, 1.7
ALPHABETS = {
    "with a space": ["b", " ", "a"],
    "without a space": ["a", "b"],
    "pieces of words": [" a", "a", "b", " ", "ba", "a ", "b a", " ab", "\u00a0b"],
}
lists_of_hot_words = st.lists(
    st.text("ab ", min_size=1, max_size=6).map(lambda text: " ".join(text.split())), max_size=5
)


def occurrences(text: str, hot_words, has_space: bool) -> int:
    """At how many places of the text a hot word stands, as whole words if there is a space."""
    text = " ".join(text.split())
    found = 0
    for word in {*hot_words} - {""}:
        pattern = rf"(?<!\S){re.escape(word)}(?!\S)" if has_space else re.escape(word)
        found += len(re.findall(f"(?={pattern})", text))
    return found


def follow(table, numbers) -> tuple[float, float]:
    """(what all symbols have added, what they and the end of the text have)."""
    total, state = 0.0, table.start
    for number in numbers:
        total += float(table.log_p[state, number])
        state = int(table.next_state[state, number])
    return total, total + float(table.end[state])


@pytest.mark.parametrize("alphabet", ALPHABETS)
@given(lists_of_hot_words, st.data())
def test_a_finished_text_has_the_bonus_of_each_place_where_a_hot_word_stands(alphabet, hot_words, data):
    symbols = ALPHABETS[alphabet]
    has_space = " " in "".join(symbols)
    hot_words = [word for word in hot_words if word and (has_space or " " not in word)]
    table = make_bonuses(symbols, SYMBOL_BONUS, WORD_BONUS, hot_words, HOT_WORD_BONUS)
    numbers = data.draw(st.lists(st.integers(0, len(symbols) - 1), max_size=14))
    text = "".join(symbols[number] for number in numbers)
    expected = SYMBOL_BONUS * len(numbers) + WORD_BONUS * len(text.split())
    expected += HOT_WORD_BONUS * occurrences(text, hot_words, has_space)
    assert follow(table, numbers)[1] == pytest.approx(expected, abs=1e-9)


def test_every_short_text():
    symbols, hot_words = ["a", " ", "b"], ["a", "ab", "b a", "ab ab", "bb"]
    table = make_bonuses(symbols, 0, 0, hot_words, HOT_WORD_BONUS)
    for numbers in itertools.product(range(3), repeat=7):
        text = "".join(symbols[number] for number in numbers)
        assert follow(table, numbers)[1] == pytest.approx(HOT_WORD_BONUS * occurrences(text, hot_words, True))


def test_the_bonus_comes_character_by_character_and_goes_where_the_word_is_left():
    symbols = ["a", "b", "c", " "]
    table = make_bonuses(symbols, hot_words=["abcb"], hot_word_bonus=4.0)
    so_far = [
        follow(table, [symbols.index(symbol) for symbol in text])[0] for text in ("a", "ab", "abc", "abcb", "abcb ")
    ]
    assert so_far == pytest.approx([1, 2, 3, 4, 4])
    assert [follow(table, [symbols.index(s) for s in text])[0] for text in ("abca", "abcba", "ab ", "aab", "b a")] == (
        pytest.approx([0, 0, 0, 0, 1])
    )


def test_without_hot_words_there_are_two_states():
    table = make_bonuses(["a", " "], 0.5, 2.0)
    assert table.log_p.tolist() == [[0.5, 0.5], [2.5, 0.5]]
    assert (table.next_state.tolist(), table.end.tolist(), table.start) == ([[0, 1], [0, 1]], [0.0, 0.0], 1)


def test_a_file_of_hot_words_is_normalised_as_transcripts_are(tmp_path):
    (tmp_path / "hot.txt").write_bytes("\ufeffAb\r\n\n  b   a. \nab\n".encode())
    assert read_hot_words(tmp_path / "hot.txt", Characters("ab ", drop=".")) == ["ab", "b a", "ab"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"ab\n\nabc\n", r"hot.txt, line 3: 'abc' cannot be recognised, because the recogniser cannot write 'c'"),
        (b"ab\n...\n", r"hot.txt, line 2: '...' cannot be recognised, because the recogniser drops all its characters"),
        (b"", r"hot.txt has no words: write a word or phrase a line"),
        (b" \n\n", r"hot.txt has no words"),
        (b"\xff\xfe", r"hot.txt are not UTF-8"),
        (None, r"hot.txt cannot be read \(No such file or directory\)"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path, content, said):
    if content is not None:
        (tmp_path / "hot.txt").write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        read_hot_words(tmp_path / "hot.txt", Characters("ab ", drop="."))
    assert "\n" not in str(error.value)
