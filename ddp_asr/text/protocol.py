"""What every tokeniser offers: text to classes and back, counts for the plan, and its state for the checkpoint.

    tokeniser.encode("A cab")                            # array([2, 1, 4, 2, 3])
    tokeniser.decode([2, 1, 4, 2, 3])                    # "a cab"
    tokeniser.count(["A cab", "aa"]).length              # array([5, 2])

tests/test_tokenisers.py checks each registered kind: decoding gives the normalised text back, counts are those of each
text encoded alone, the state gives the same tokeniser, and characters it cannot write are named or skipped.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class TextCounts:
    """What a training must know of N texts before it can plan: how many classes CTC has to write for each."""

    length: np.ndarray  # int64 (N,): classes of the text
    repeats: np.ndarray  # int64 (N,): pairs of equal neighbours among them, between which CTC must write a blank
    foreign: list[str]  # N: the different characters that the tokeniser cannot write; "" where there are none


class Tokeniser(Protocol):
    """Text to classes and back; the blank is the last class."""

    size: int
    """V: the number of classes, the blank included."""
    blank: int
    """V - 1."""
    unit: str
    """What a class writes: "char" or "piece"; language models of other units are refused."""

    @property
    def symbols(self) -> Sequence[str]:
        """What each class but the blank writes, in class order; models of equal symbols can share weights."""
        ...

    @classmethod
    def from_settings(cls, settings: Any, transcripts: Iterable[str]) -> Tokeniser:
        """Of the kind's own settings, the section `vocabulary`, and for a kind that is learnt of transcripts."""
        ...

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Tokeniser: ...

    def state(self) -> dict[str, Any]:
        """All that makes this tokeniser, as plain containers, with its kind under `kind`."""
        ...

    def files(self) -> Mapping[str, bytes]:
        """Files by name that a run directory holds for other programs."""
        ...

    def normalise(self, text: str) -> str:
        """The text as it is scored and encoded."""
        ...

    def encode(self, text: str, *, skip_foreign: bool = False) -> np.ndarray:
        """The classes of a transcript, int64 (U,); normalises it first.

        Raises:
            ValueError: the transcript has a character that the tokeniser cannot write, unless those are to be skipped.
        """
        ...

    def decode(self, classes: Sequence[int] | np.ndarray) -> str:
        """The text of class numbers; the blank writes nothing."""
        ...

    def count(self, texts: Sequence[str]) -> TextCounts:
        """Counts over `encode(text, skip_foreign=True)` of every text, fast enough for a whole corpus."""
        ...
