"""Which utterances a training can use, why the others are left out, and how long their targets are.

    targets = fit_targets(index, tokeniser, frames_of, speeds=(0.9, 1.0, 1.1), max_seconds=120)
    rows = targets.usable_rows                      # what the plan is made from
    for key, reason in targets.left_out(index): ... # the run directory's left_out.jsonl
    explain_left_out(targets)                       # the same as lines to print: counts, characters, a warning

An utterance of the source can be left out at three stages. At each it is decided and listed, with the reason, in one
place:

    sharding   no transcript, no readable audio, a key used twice    data/sources  dropped.jsonl beside the shards
    planning   these settings cannot train it: `REASONS`             here          left_out.jsonl of the run
    reading    no longer decodes to what the index says              data/loader   `MicroBatch.bad`, the run's log
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ddp_asr.data.plan import fits, speed_samples

if TYPE_CHECKING:
    from ddp_asr.data.index import Index
    from ddp_asr.text import Tokeniser

# A reason's code is its position; 0 is usable.
REASONS = (
    "usable",
    "the transcript is empty after normalisation",
    "the transcript has a character outside vocabulary.symbols",
    "fewer frames than CTC needs for the transcript (symbols + adjacent equal ones)",
    "longer than batch.max_seconds",
)
EMPTY, FOREIGN, TOO_FEW_FRAMES, TOO_LONG = range(1, len(REASONS))
_WARN_ABOVE = 0.05  # share of utterances left out
_CHARACTERS_SHOWN = 10
_BLOCK = 1 << 14  # transcripts counted at once, which bounds memory


@dataclass
class ForeignCharacter:
    """A character that the tokeniser cannot write."""

    utterances: int  # that have it, and are left out for that
    example: str  # the key of one of them


@dataclass(frozen=True)
class Targets:
    """What CTC needs to know of each of the N rows of an index."""

    length: np.ndarray  # int32 (N,): classes, U
    reason: np.ndarray  # uint8 (N,): code into REASONS; 0 is usable
    foreign: dict[str, ForeignCharacter]  # by character

    @property
    def usable_rows(self) -> np.ndarray:
        return np.flatnonzero(self.reason == 0)

    def counts(self) -> dict[str, int]:
        """Reason -> how many rows it leaves out; reasons that leave out none are not in it."""
        counts = np.bincount(self.reason, minlength=len(REASONS))
        return {REASONS[code]: int(counts[code]) for code in range(1, len(REASONS)) if counts[code]}

    def left_out(self, index: Index) -> Iterator[tuple[str, str]]:
        """(key, reason) of every row that is left out."""
        for row in np.flatnonzero(self.reason).tolist():
            yield index.key(row), REASONS[self.reason[row]]


def fit_targets(
    index: Index,
    tokeniser: Tokeniser,
    frames_of: Callable[[np.ndarray], np.ndarray],
    *,
    speeds: Sequence[float] = (1.0,),
    max_seconds: float = float("inf"),
) -> Targets:
    """Target length of every row, and whether it can be trained.

    `frames_of` gives the encoder's output frames T' of a number of samples. It is asked at the fastest speed, where
    frames are fewest, and `max_seconds` is compared with the length at the slowest speed, so that a row is usable in
    all epochs or in none.
    """
    length, repeats = np.empty(len(index), np.int32), np.empty(len(index), np.int32)
    has_foreign = np.zeros(len(index), bool)
    foreign: dict[str, ForeignCharacter] = {}
    for start in range(0, len(index), _BLOCK):
        block = slice(start, start + _BLOCK)
        counted = tokeniser.count(index.texts[block].to_pylist())
        length[block], repeats[block] = counted.length, counted.repeats
        for row, characters in enumerate(counted.foreign, start):
            has_foreign[row] = bool(characters)
            for character in characters:
                foreign.setdefault(character, ForeignCharacter(0, index.key(row))).utterances += 1
    frames = np.asarray(frames_of(speed_samples(index.samples, max(speeds))))
    reason = np.zeros(len(index), np.uint8)
    # The last one written wins: what is wrong with the text comes before what is wrong with the length.
    reason[~fits(index.samples, max_seconds, speeds)] = TOO_LONG
    reason[frames < length + repeats] = TOO_FEW_FRAMES
    reason[length == 0] = EMPTY
    reason[has_foreign] = FOREIGN  # a transcript of nothing but foreign characters is not an empty one
    return Targets(length, reason, foreign)


def explain_left_out(targets: Targets) -> list[str]:
    """Lines for a user: how many utterances are left out, why, for which characters, and what would mend it.

    Empty where none is left out. The last line is a warning where more than 5 % are.
    """
    counts, total = targets.counts(), len(targets.reason)
    left_out = sum(counts.values())
    if not left_out:
        return []
    share = left_out / total
    lines = [f"{left_out:,} of {total:,} utterances ({share:.1%}) are left out"]
    for reason, count in sorted(counts.items(), key=lambda item: -item[1]):
        lines.append(f"  {count:8,}  {reason}")
        if reason == REASONS[FOREIGN]:
            lines.append(f"            {_describe_foreign(targets.foreign)}")
    if share > _WARN_ABOVE:
        remedies = [_remedy(REASONS.index(reason), targets) for reason in counts]
        lines.append(f"WARNING: {share:.1%} of the utterances will not be trained: {'; '.join(remedies)}")
    return lines


def _most_frequent(foreign: dict[str, ForeignCharacter]) -> list[tuple[str, ForeignCharacter]]:
    return sorted(foreign.items(), key=lambda item: (-item[1].utterances, item[0]))[:_CHARACTERS_SHOWN]


def _describe_foreign(foreign: dict[str, ForeignCharacter]) -> str:
    shown = _most_frequent(foreign)
    named = [f"{character!r} in {found.utterances:,} (such as {found.example})" for character, found in shown]
    more = len(foreign) - len(shown)
    return ", ".join(named) + (f", and {more:,} more characters" if more else "")


def _remedy(reason: int, targets: Targets) -> str:
    if reason == FOREIGN:
        characters = "".join(character for character, _ in _most_frequent(targets.foreign))
        return (
            "add what is spoken to --vocabulary.symbols, and what is not, such as punctuation, to --vocabulary.drop "
            f"(the most frequent of these characters: {characters!r})"
        )
    return {
        EMPTY: "look at the empty transcripts, and at what vocabulary.drop removes",
        TOO_FEW_FRAMES: "look for transcripts that do not belong to their audio, or lower --features.hop_ms or "
        "--encoder.time_strides",
        TOO_LONG: "raise --batch.max_seconds",
    }[reason]
