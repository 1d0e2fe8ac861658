"""The weights of a decoder, found on a development set: each point of a grid decodes the same logits.

    shards --compute_logits--> logits and references in memory --try_each--> errors of each point --best--> settings

The network runs once, so a point costs a search only. An hour of audio needs 17 MB at 29 classes and 40 frames a
second.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ddp_asr.config import DecoderSettings
from ddp_asr.data.index import Index
from ddp_asr.data.loader import MicroBatch
from ddp_asr.decoding import DECODERS
from ddp_asr.recognition.recogniser import Recogniser
from ddp_asr.text.score import Counts, count_each


@dataclass(frozen=True)
class CorpusLogits:
    """The logits of a corpus, a batch an item, with its references."""

    logits: list[Tensor] = field(default_factory=list)  # (B, T', V), on the CPU
    frames: list[Tensor] = field(default_factory=list)  # (B,)
    references: list[str] = field(default_factory=list)  # of all batches
    bad: list[tuple[str, str]] = field(default_factory=list)  # (key, reason) of utterances that could not be read


@dataclass(frozen=True)
class Trial:
    """A point of the grid and its errors."""

    settings: DecoderSettings
    counts: Counts


def compute_logits(recogniser: Recogniser, index: Index, batches: Iterable[MicroBatch | None]) -> CorpusLogits:
    """The logits of all batches."""
    corpus = CorpusLogits()
    for batch in batches:
        if batch is None:
            continue
        corpus.bad.extend(batch.bad)
        kept = batch.weight.nonzero()[:, 0]  # without the silent stand-in of an empty batch
        if len(kept):
            logits, frames = recogniser.logits(batch.waveforms, batch.samples)
            corpus.logits.append(logits.cpu()[kept])
            corpus.frames.append(frames[kept])
            rows = batch.rows[kept].tolist()
            corpus.references.extend(recogniser.tokeniser.normalise(index.text(row)) for row in rows)
    return corpus


def try_each(
    recogniser: Recogniser, corpus: CorpusLogits, points: Iterable[DecoderSettings], language: Any
) -> Iterator[Trial]:
    """The errors of each point, in order; `language` is the language model of all points as their decoder holds it."""
    for point in points:
        decoder = DECODERS[point.kind](point, recogniser.tokeniser, recogniser.config.frame_s, language)
        hypotheses: list[str] = []
        for logits, frames in zip(corpus.logits, corpus.frames, strict=True):
            hypotheses += [each.text for each in decoder(logits.to(recogniser.device), frames)]
        yield Trial(point, Counts.from_array(count_each(corpus.references, hypotheses).sum(axis=0)))


def best(trials: Iterable[Trial]) -> Trial:
    """The trial with the fewest word errors; among equal ones with the fewest character errors, then the first."""
    return min(trials, key=lambda trial: (trial.counts.word_errors, trial.counts.char_errors))
