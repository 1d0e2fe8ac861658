"""What every decoder offers: logits (B, T', V) and frames (B,) -> a hypothesis for each row.

    decoder(logits, frames)[0].text                      # "six red hens"
    decoder(logits, frames)[0].words[0].start_s          # 0.32

tests/test_decoders.py checks for each registered kind: the words joined by single spaces are the text, times rise and
lie within the row's own frames, padding and neighbours change nothing.
"""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Word:
    """A recognised word and the part of the recording it lies in."""

    text: str
    start_s: float
    end_s: float
    confidence: float
    """The geometric mean over its symbols of their posteriors in the logits (see path.py); it is not calibrated."""


@dataclass(frozen=True)
class Hypothesis:
    """What a decoder recognises in a row."""

    text: str
    """Words parted by single spaces, none at the ends."""
    words: list[Word]
    score: float
    """What the decoder ranks hypotheses of one row by, a natural logarithm: see the kind of decoder."""
    others: list[tuple[str, float]] = field(default_factory=list)
    """(text, score) of the next best texts of the row, the best first, if the decoder has any."""


class Decoder(Protocol):
    """Logits to hypotheses."""

    def __call__(self, logits: Tensor, frames: Tensor) -> list[Hypothesis]:
        """The best hypothesis of each row of (B, T', V), of which the first `frames` are the row's own."""
        ...
