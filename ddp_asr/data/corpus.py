"""What a run trains on: shard directories and settings -> usable utterances, what is left out and why, and the plan.

Arithmetic on the index: no audio is read and torch is not needed, so `--dry-run` answers for a thousand hours in
seconds.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddp_asr import config
from ddp_asr.data.clips import read_clips
from ddp_asr.data.index import Index, read_index
from ddp_asr.data.plan import Plan
from ddp_asr.data.targets import Targets, explain_left_out, fit_targets
from ddp_asr.errors import UserError
from ddp_asr.text import Tokeniser, make_tokeniser


@dataclass(frozen=True)
class Corpus:
    """The training data of a run."""

    whole: Index  # every row of the shards
    targets: Targets  # aligned with `whole`
    index: Index  # the usable rows
    target_lengths: NDArray[np.int32]  # aligned with `index`
    tokeniser: Tokeniser
    plan: Plan  # its rows count within `index`
    clips: Mapping[str, Index]  # what augmentations mix in, see `Config.clips`

    @property
    def hours(self) -> float:
        """Usable audio."""
        return self.index.hours


def new_tokeniser(settings: config.Config) -> Tokeniser:
    """The tokeniser of a run that begins; where its kind is learnt, of the transcripts of `data.train`."""

    def transcripts() -> Iterator[str]:
        yield from read_index(settings.data.train).texts.to_pylist()

    return make_tokeniser(settings.vocabulary, transcripts())


def read_corpus(settings: config.Config, tokeniser: Tokeniser | None = None) -> Corpus:
    """Reads the index of `data.train`, leaves out what cannot be trained and plans the epochs.

    Args:
        tokeniser: that of the run, without which it is a new one.

    Raises:
        UserError: missing shards, those of augmentations too, or too few usable utterances for `batch.micro_batches`.
    """
    whole = read_index(settings.data.train)
    tokeniser = tokeniser or new_tokeniser(settings)
    targets = fit_targets(
        whole,
        tokeniser,
        lambda samples: settings.encoder.output_frames(settings.features.frames(samples)),
        speeds=settings.augment.speeds,
        max_seconds=settings.batch.max_seconds,
    )
    rows = targets.usable_rows
    index = whole.take(rows)
    try:
        plan = Plan(
            index.samples,
            index.key_hash,
            settings=settings.batch,
            speeds=settings.augment.speeds,
            seed=settings.train.seed,
        )
    except UserError as error:  # most often too few utterances, so say where the others went
        left_out = "".join(f"; {line.strip()}" for line in explain_left_out(targets))
        raise UserError(f"{error}{left_out}") from None
    return Corpus(whole, targets, index, targets.length[rows], tokeniser, plan, read_clips(settings))
