"""What a run trains on: shard directories and settings -> usable utterances, what is left out and why, and the plan.

Arithmetic on the index: no audio is read and torch is not needed, so `--dry-run` answers for a thousand hours in
seconds.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddp_asr import SAMPLE_RATE_HZ, config
from ddp_asr.data.index import Index, read_index
from ddp_asr.data.plan import Plan
from ddp_asr.text.characters import Targets, Vocabulary, fit_targets


@dataclass(frozen=True)
class Corpus:
    """The training data of a run."""

    whole: Index  # every row of the shards
    targets: Targets  # aligned with `whole`
    index: Index  # the usable rows
    target_lengths: NDArray[np.int32]  # aligned with `index`
    vocabulary: Vocabulary
    plan: Plan  # its rows count within `index`

    @property
    def hours(self) -> float:
        """Usable audio."""
        return float(self.index.samples.sum()) / SAMPLE_RATE_HZ / 3600


def read_corpus(settings: config.Config) -> Corpus:
    """Reads the index of `data.train`, leaves out what cannot be trained and plans the epochs.

    Raises:
        UserError: missing shards, or too few usable utterances for `batch.micro_batches`.
    """
    whole = read_index(settings.data.train)
    vocabulary = Vocabulary.from_config(settings.vocabulary)
    targets = fit_targets(
        whole,
        vocabulary,
        lambda samples: settings.encoder.output_frames(settings.features.frames(samples)),
        speeds=settings.augment.speeds,
        max_seconds=settings.batch.max_seconds,
    )
    rows = targets.usable_rows
    index = whole.take(rows)
    plan = Plan(
        index.samples,
        index.key_hash,
        settings=settings.batch,
        speeds=settings.augment.speeds,
        seed=settings.train.seed,
    )
    return Corpus(whole, targets, index, targets.length[rows], vocabulary, plan)
