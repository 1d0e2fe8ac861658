"""A recogniser against references: word and character error rates of a corpus, the same for any number of ranks.

    shards --eval_loader--> this rank's micro-batches --recognise--> Results --gather--> Summary on rank 0

`ddp_asr.evaluate` and the evaluations in training go this way. A round is one micro-batch on every rank, and all ranks
have the same number of rounds, so they can agree on a stop between two of them.

Micro-batches depend on neither rank nor number of processes, padding is invisible and counts are integers, so the
result does not depend on the number of processes. References are scored as normalised text, with the characters outside
the alphabet: leaving such utterances out would flatter the recogniser. They have no loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from ddp_asr import SAMPLE_RATE_HZ
from ddp_asr.data.audio import snr_db
from ddp_asr.data.index import Index
from ddp_asr.data.loader import MicroBatch
from ddp_asr.decoding import Decoder
from ddp_asr.objective import ctc_loss
from ddp_asr.ranks.world import World
from ddp_asr.recognition.recogniser import Recogniser
from ddp_asr.text.score import Counts, Interval, Units, count_each, intervals, paired_interval, units_of


@dataclass(frozen=True)
class Recognised:
    """One utterance and what was recognised in it."""

    row: int
    key: str
    reference: str
    hypothesis: str
    loss: float
    """CTC loss / target length; infinite where the alphabet cannot spell the reference, or not in so few frames."""
    greedy: str = ""
    """The hypothesis of greedy decoding, if it was asked for."""
    score: float = 0.0
    """Of the hypothesis (see its decoder)."""
    others: list[tuple[str, float]] = field(default_factory=list)
    """(text, score) of the next best hypotheses, if the decoder has any."""
    speaker: str = ""
    """"" where it is unknown."""
    seconds: float = 0.0
    snr_db: float = math.nan
    """See `ddp_asr.data.audio.snr_db`; not a number where it was not asked for."""


@dataclass(frozen=True)
class Results:
    """What a rank, or all of them, made of their part of a corpus."""

    utterances: list[Recognised] = field(default_factory=list)
    bad: list[tuple[str, str]] = field(default_factory=list)
    """(key, reason) of utterances that no longer decode; they are in no number."""


@dataclass(frozen=True)
class Beside:
    """The result of greedy decoding on the same logits."""

    counts: Counts
    difference: Interval
    """Of WER minus greedy WER; both are resampled with the same speakers or utterances."""


@dataclass(frozen=True)
class Summary:
    """The result over a corpus."""

    utterances: list[Recognised]
    """In the corpus's order."""
    bad: list[tuple[str, str]]
    each: np.ndarray
    """int64 (N, 8): counts of each utterance, aligned with `utterances`."""
    counts: Counts
    units: Units
    """What the intervals are over."""
    wer_interval: Interval
    cer_interval: Interval
    loss: float
    """The mean over the utterances that have one."""
    without_loss: int
    greedy: Beside | None = None

    @property
    def wer(self) -> float:
        return self.counts.wer

    @property
    def cer(self) -> float:
        return self.counts.cer

    def is_unusable(self, max_bad_samples: int) -> bool:
        """Whether too much of the corpus no longer decodes for its error rate to mean anything."""
        return not self.utterances or len(self.bad) > max_bad_samples


def recognise(
    recogniser: Recogniser,
    index: Index,
    batches: Iterable[MicroBatch | None],
    should_stop: Callable[[], bool] = lambda: False,
    greedy: Decoder | None = None,
    with_snr: bool = False,
) -> Results | None:
    """What is recognised in this rank's micro-batches; None where `should_stop` said yes.

    Args:
        batches: the rank's `eval_loader`, equally many on every rank; None in a round without one.
        should_stop: asked after each round, on all ranks at the same one.
        greedy: a second decoder, whose texts `Recognised.greedy` gets.
        with_snr: whether to estimate `Recognised.snr_db`.
    """
    results = Results()
    was_training = recogniser.model.training
    recogniser.model.eval()
    try:
        for batch in batches:
            if batch is not None:
                results.utterances.extend(recognise_batch(recogniser, index, batch, greedy, with_snr))
                results.bad.extend(batch.bad)
            if should_stop():
                return None
    finally:
        recogniser.model.train(was_training)
    return results


def recognise_batch(
    recogniser: Recogniser, index: Index, batch: MicroBatch, greedy: Decoder | None = None, with_snr: bool = False
) -> list[Recognised]:
    """What is recognised in each utterance of a micro-batch; none for the silent stand-in of an empty one."""
    tokeniser = recogniser.tokeniser
    logits, frames = recogniser.logits(batch.waveforms, batch.samples)
    hypotheses = recogniser.decoder(logits, frames)
    greedy_texts = [each.text for each in greedy(logits, frames)] if greedy else [""] * len(hypotheses)
    losses = ctc_loss(logits, frames, batch.targets.to(logits.device), batch.target_lengths).tolist()
    snrs_db = [math.nan] * len(hypotheses)
    if with_snr:
        lengths = zip(batch.waveforms.numpy(), batch.samples.tolist(), strict=True)
        snrs_db = [snr_db(waveform[:samples]) for waveform, samples in lengths]
    heard = zip(hypotheses, greedy_texts, losses, snrs_db, strict=True)
    found = []
    for row, key, weight, (hypothesis, greedy_text, loss, snr) in zip(
        batch.rows.tolist(), batch.keys, batch.weight.tolist(), heard, strict=True
    ):
        if weight:
            reference = tokeniser.normalise(index.text(row))
            spelt = bool(reference) and not tokeniser.count([reference]).foreign[0]
            loss = loss if spelt else math.inf
            scored = hypothesis.score, hypothesis.others
            speaker, seconds = index.speaker(row), float(index.samples[row]) / SAMPLE_RATE_HZ
            found.append(
                Recognised(row, key, reference, hypothesis.text, loss, greedy_text, *scored, speaker, seconds, snr)
            )
    return found


def gather(world: World, results: Results, beside_greedy: bool = False) -> Summary | None:
    """The summary over all ranks, on rank 0; None on the others."""
    everyones = world.gather_objects((results.utterances, results.bad))
    if everyones is None:
        return None
    utterances = [utterance for theirs, _ in everyones for utterance in theirs]
    return summarise(Results(utterances, [bad for _, theirs in everyones for bad in theirs]), beside_greedy)


def summarise(results: Results, beside_greedy: bool = False) -> Summary:
    """The numbers of a corpus, whichever rank recognised what, and in whichever order."""
    in_order = sorted(results.utterances, key=lambda utterance: utterance.row)
    each = count_each([u.reference for u in in_order], [u.hypothesis for u in in_order])
    losses = [u.loss for u in in_order if u.loss != math.inf]
    units = units_of([u.speaker for u in in_order])
    wer_interval, cer_interval = intervals(each, units)
    greedy = None
    if beside_greedy:
        greedy_each = count_each([u.reference for u in in_order], [u.greedy for u in in_order])
        greedy = Beside(Counts.from_array(greedy_each.sum(axis=0)), paired_interval(each, greedy_each, units))
    return Summary(
        utterances=in_order,
        bad=sorted(results.bad),
        each=each,
        counts=Counts.from_array(each.sum(axis=0)),
        units=units,
        wer_interval=wer_interval,
        cer_interval=cer_interval,
        loss=math.fsum(losses) / len(losses) if losses else math.nan,
        without_loss=len(in_order) - len(losses),
        greedy=greedy,
    )
