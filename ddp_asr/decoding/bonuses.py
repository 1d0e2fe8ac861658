"""Bonuses that a beam search adds to the score of a text: for its symbols, its words, and the hot words among them.

    file of hot words, a word or phrase a line  --read_hot_words-->  texts
    symbols of the recogniser, texts  --make_bonuses-->  an automaton (automaton.py)

A hot word gets its bonus once for each place of the text where it stands. Where the recogniser has a space, it must be
whole words there. The search must not drop a text before its hot word is complete, so each character of a hot word
gives a part of the bonus in advance, and what was given is taken back where the text goes on otherwise. A finished text
has the bonuses of its hot words and nothing else.

The states are the beginnings of hot words, with a space before them, and the state of a text is the longest of its
suffixes among them. They are found from short to long (Aho and Corasick 1975, "Efficient string matching"). Giving a
score in advance, character by character, is known as contextual biasing with a context graph.

The automaton reads characters. A symbol of several characters is as many steps in one, so a hot word counts however its
symbols divide it.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from ddp_asr.decoding.automaton import Table
from ddp_asr.errors import UserError
from ddp_asr.files import open_input
from ddp_asr.text import Tokeniser


def read_hot_words(path: Path, tokeniser: Tokeniser) -> list[str]:
    """The words and phrases of a file, normalised as transcripts are; empty lines do not count.

    Raises:
        UserError: the file cannot be read or has no words, or the recogniser cannot write a line of it.
    """
    try:
        with open_input(path) as file:
            lines = file.read().decode("utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(
            f"hot words {path} cannot be read ({error.strerror}): name a file, a word or phrase a line"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"hot words {path} are not UTF-8 ({error.reason}): convert the file, as with iconv") from None
    filled = {number: line.strip() for number, line in enumerate(lines, 1) if line.strip()}
    if not filled:
        raise UserError(
            f"hot words {path} has no words: write a word or phrase a line, or leave decoder.hot_words empty"
        )
    texts = {}
    for number, line in filled.items():
        texts[number] = tokeniser.normalise(line)
        foreign = tokeniser.count([line]).foreign[0]
        if foreign or not texts[number]:
            reason = f"cannot write {foreign!r}" if foreign else "drops all its characters"
            raise UserError(
                f"hot words {path}, line {number}: {line!r} cannot be recognised, because the recogniser {reason}: "
                "spell it with the symbols of the vocabulary, or take it out"
            )
    return list(texts.values())


def make_bonuses(
    symbols: Sequence[str],
    symbol_bonus: float = 0.0,
    word_bonus: float = 0.0,
    hot_words: Iterable[str] = (),
    hot_word_bonus: float = 0.0,
) -> Table:
    """The automaton of all bonuses, over what each class but the blank writes.

    Spaces at the ends of a text, and all but one of several in a row, make no difference to its words.

    Args:
        hot_words: with single spaces inside and none at the ends.
    """
    written = ["".join(" " if character.isspace() else character for character in symbol) for symbol in symbols]
    hot_words = list(hot_words)
    column = {character: place for place, character in enumerate(sorted({" ", *"".join([*written, *hot_words])}))}
    spaces, has_space = column[" "], any(" " in symbol for symbol in written)
    prefixes, given, complete = _hot_word_prefixes(hot_words, " " * has_space)
    next_state, suffix = _suffixes(prefixes, column)
    for state in range(1, len(prefixes)):  # from short to long
        given[state] = max(given[state], given[suffix[state]])
        complete[state] += complete[suffix[state]]

    # Over characters
    after_space = np.array([prefix.endswith(" ") for prefix in prefixes])
    gain = (
        hot_word_bonus * (complete[next_state] + given[next_state] - given[:, None]) + word_bonus * after_space[:, None]
    )
    end = hot_word_bonus * ((complete[next_state[:, spaces]] if has_space else 0.0) - given)
    gain[after_space, spaces] = 0.0
    end[after_space] = -hot_word_bonus * given[after_space]
    next_state[:, spaces] = np.where(after_space, np.arange(len(prefixes)), next_state[:, spaces])

    # Over symbols
    log_p = np.full((len(prefixes), len(symbols)), symbol_bonus, np.float64)
    reached = np.repeat(np.arange(len(prefixes))[:, None], len(symbols), axis=1)
    for number, symbol in enumerate(written):
        for character in symbol:
            log_p[:, number] += gain[reached[:, number], column[character]]
            reached[:, number] = next_state[reached[:, number], column[character]]
    return Table(torch.from_numpy(log_p), torch.from_numpy(reached), torch.from_numpy(end), prefixes.index(" "))


def _hot_word_prefixes(hot_words: Iterable[str], space: str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """The beginnings of hot words between spaces, from short to long, which are the states.

    Of each the share of the bonus that it gives in advance, and whether it is a complete hot word (1.0 or 0.0).
    """
    given = {"": 0.0, " ": 0.0}  # " ": also before the first symbol, where the first word begins
    complete = set()
    for text in hot_words:
        pattern = space + text + space
        complete.add(pattern)
        for stop in range(1, len(pattern) + 1):
            share = min(stop - len(space), len(text)) / len(text) if stop < len(pattern) else 0.0
            given[pattern[:stop]] = max(given.get(pattern[:stop], 0.0), share)
    prefixes = sorted(given, key=lambda prefix: (len(prefix), prefix))
    return prefixes, np.array([given[each] for each in prefixes]), np.array([float(e in complete) for e in prefixes])


def _suffixes(prefixes: list[str], column: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """The next states (states, characters), and of each state the longest proper suffix that is a state (states,)."""
    state_of = {prefix: state for state, prefix in enumerate(prefixes)}
    longer: dict[str, list[str]] = {prefix: [] for prefix in prefixes}
    for prefix in prefixes[1:]:
        longer[prefix[:-1]].append(prefix)
    next_state, suffix = np.zeros((len(prefixes), len(column)), np.int64), np.zeros(len(prefixes), np.int64)
    for state, prefix in enumerate(prefixes):
        if len(prefix) > 1:  # the rows of shorter states are complete
            suffix[state] = next_state[suffix[state_of[prefix[:-1]]], column[prefix[-1]]]
        next_state[state] = next_state[suffix[state]]
        for extended in longer[prefix]:
            next_state[state, column[extended[-1]]] = state_of[extended]
    return next_state, suffix
