"""What every decoder offers: logits (B, T', V) and frames (B,) -> a hypothesis for each row.

    decoder(logits, frames)[0].text                      # "six red hens"
    decoder(logits, frames)[0].words[0].start_s          # 0.32

tests/test_decoders.py checks for each registered kind: the words joined by single spaces are the text, times rise and
lie within the row's own frames, padding and neighbours change nothing.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Word:
    """A recognised word and the part of the recording it lies in."""

    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Hypothesis:
    """What a decoder takes a row for."""

    text: str
    """Words parted by single spaces, none at the ends."""
    words: list[Word]
    score: float
    """Natural logarithm of the probability that the decoder gives it; 0 is certain."""


class Decoder(Protocol):
    """Logits to hypotheses."""

    def __call__(self, logits: Tensor, frames: Tensor) -> list[Hypothesis]:
        """The best hypothesis of each row of (B, T', V), of which the first `frames` are the row's own."""
        ...
