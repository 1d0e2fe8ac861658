"""From transcripts to class numbers and back, and which utterances a training can use at all.

    vocabulary = Vocabulary("' abc...z", lowercase=True, drop="")
    vocabulary.encode("A cab")                      # array([2, 1, 4, 2, 3])
    targets = fit_targets(index, vocabulary, frames_of, speeds=(0.9, 1.0, 1.1), max_seconds=120)
    rows = targets.usable_rows                      # what the plan is made from
    for key, reason in targets.left_out(index): ... # what the run lists in left_out.jsonl

A transcript is normalised first (Unicode NFC, lower case and dropped characters as the settings say, runs of white
space to one space), so symbols and punctuation of any language are settings. The blank is one class more, the last.

`fit_targets` passes once over the `text` column, in blocks joined to one long array of code points: 281,241
transcripts take two seconds instead of a minute, and no Python object a transcript stays.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ddp_asr import config
from ddp_asr.data.plan import fits, speed_samples
from ddp_asr.errors import UserError

if TYPE_CHECKING:
    from ddp_asr.data.index import Index

# A reason's code is its position; 0 is usable.
REASONS = (
    "usable",
    "the transcript is empty after normalisation",
    "the transcript has a character outside vocabulary.symbols",
    "fewer frames than CTC needs for the transcript (symbols + adjacent equal ones)",
    "longer than batch.max_seconds",
)
EMPTY, FOREIGN, TOO_FEW_FRAMES, TOO_LONG = range(1, len(REASONS))
_BLOCK = 1 << 14  # transcripts in a block of `fit_targets`
_CODE_POINTS = 0x110000


class Vocabulary:
    """The symbols a recogniser writes, one code point each, in class order; the blank is the last class."""

    def __init__(self, symbols: str, lowercase: bool = True, drop: str = "") -> None:
        symbols = unicodedata.normalize("NFC", symbols)
        repeated = sorted({symbol for symbol in symbols if symbols.count(symbol) > 1})
        if not symbols or repeated:
            wrong = f"has {''.join(repeated)!r} more than once" if repeated else "is empty"
            raise UserError(f"vocabulary.symbols {wrong}: it must list every symbol once, in class order")
        unreachable = [s for s in symbols if s in drop or (lowercase and s != s.lower())]
        if unreachable:
            raise UserError(
                f"vocabulary.symbols has {''.join(unreachable)!r}, which normalisation removes or lower-cases: "
                "take it out, or change vocabulary.lowercase or vocabulary.drop"
            )
        self.symbols, self.lowercase, self.drop = symbols, lowercase, drop
        self.blank = len(symbols)
        self.size = len(symbols) + 1
        self._dropped = {ord(character): None for character in unicodedata.normalize("NFC", drop)}
        self._classes = np.full(_CODE_POINTS, -1, np.int32)
        self._classes[_code_points(symbols)] = np.arange(len(symbols))

    @classmethod
    def from_config(cls, settings: config.Characters) -> Vocabulary:
        return cls(settings.symbols, settings.lowercase, settings.drop)

    def normalise(self, text: str) -> str:
        if not text.isascii():
            text = unicodedata.normalize("NFC", text)
        if self.lowercase:
            text = text.lower()
        if self._dropped:
            text = text.translate(self._dropped)
        return " ".join(text.split())

    def classes(self, text: str) -> np.ndarray:
        """Class of each character of a *normalised* text, int32; -1 where it is no symbol."""
        return self._classes[_code_points(text)]

    def encode(self, text: str, *, skip_foreign: bool = False) -> np.ndarray:
        """Classes of a transcript, int64 (U,); a character outside the symbols is a ValueError, or skipped."""
        normalised = self.normalise(text)
        classes = self.classes(normalised).astype(np.int64)
        foreign = classes < 0
        if not foreign.any():
            return classes
        if skip_foreign:
            return classes[~foreign]
        character = normalised[int(np.argmax(foreign))]
        raise ValueError(f"{character!r} in {text!r} is not among the symbols {self.symbols!r}")

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of class numbers; the blank writes nothing."""
        return "".join(self.symbols[i] for i in np.asarray(ids, np.int64).tolist() if i != self.blank)


@dataclass(frozen=True)
class Targets:
    """What CTC needs to know of each row of an index."""

    length: np.ndarray  # int32 (N,): symbols, U
    repeats: np.ndarray  # int32 (N,): adjacent equal symbols, between which CTC must write a blank
    reason: np.ndarray  # uint8 (N,): code into REASONS; 0 is usable

    @property
    def usable_rows(self) -> np.ndarray:
        return np.flatnonzero(self.reason == 0)

    def counts(self) -> dict[str, int]:
        """Reason -> how many rows it leaves out, those that occur only."""
        counts = np.bincount(self.reason, minlength=len(REASONS))
        return {REASONS[code]: int(counts[code]) for code in range(1, len(REASONS)) if counts[code]}

    def left_out(self, index: Index) -> Iterator[tuple[str, str]]:
        """(key, reason) of every row that is left out."""
        for row in np.flatnonzero(self.reason).tolist():
            yield index.key(row), REASONS[self.reason[row]]


def fit_targets(
    index: Index,
    vocabulary: Vocabulary,
    frames_of: Callable[[np.ndarray], np.ndarray],
    *,
    speeds: Sequence[float] = (1.0,),
    max_seconds: float = float("inf"),
) -> Targets:
    """Target length, repeats and fit of every row.

    `frames_of` gives the model's output frames T' of a number of samples; it is asked at the fastest speed, where
    frames are fewest, and `max_seconds` is held against the slowest, so that a row is usable in all epochs or in none.
    """
    length, repeats = np.empty(len(index), np.int32), np.empty(len(index), np.int32)
    foreign = np.empty(len(index), bool)
    for start in range(0, len(index), _BLOCK):
        block = slice(start, start + _BLOCK)
        length[block], repeats[block], foreign[block] = _count(index.texts[block].to_pylist(), vocabulary)
    frames = np.asarray(frames_of(speed_samples(index.samples, max(speeds))))
    reason = np.zeros(len(index), np.uint8)
    # The last one written wins: what is wrong with the text comes before what is wrong with the length.
    reason[~fits(index.samples, max_seconds, speeds)] = TOO_LONG
    reason[frames < length + repeats] = TOO_FEW_FRAMES
    reason[foreign] = FOREIGN
    reason[length == 0] = EMPTY
    return Targets(length, repeats, reason)


def _count(texts: list[str], vocabulary: Vocabulary) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Symbols, adjacent equal symbols and whether any is foreign, of each text."""
    normalised = [vocabulary.normalise(text) for text in texts]
    length = np.fromiter(map(len, normalised), np.int64, len(texts))
    # A line feed ends each text (no normalised text holds one), so that no text is empty for `reduceat` and equal
    # symbols on both sides of a border are not neighbours.
    classes = vocabulary.classes("".join(f"{text}\n" for text in normalised))
    starts = np.cumsum(length + 1) - (length + 1)
    ends = starts + length
    equal = np.zeros(len(classes), np.int32)
    equal[1:] = classes[1:] == classes[:-1]
    foreign = classes < 0
    equal[foreign] = 0
    foreign[ends] = False
    return length, np.add.reduceat(equal, starts), np.logical_or.reduceat(foreign, starts)


def _code_points(text: str) -> np.ndarray:
    # "surrogatepass": a lone surrogate (from a broken manifest) is a foreign character, not a crash.
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
