"""Recordings that augmentations mix into utterances, such as noises: an index of shards, read by stretches.

    index of data.noise --ShardClips--> read(number, first, samples) --> int16 (samples,)

A stretch costs about as much as to decode an utterance of its length, so nothing is kept in memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow.compute
from numpy.typing import NDArray

from ddp_asr import config
from ddp_asr.data import flac
from ddp_asr.data.index import Index, read_index
from ddp_asr.data.storage import Shards
from ddp_asr.errors import UserError


class ShardClips:
    """The recordings of an index, see `ddp_asr.features.Clips`; from any number of threads at once."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._shards = Shards(index.shards)
        self.samples = index.samples

    def read(self, number: int, first: int, samples: int) -> NDArray[np.int16]:
        """So many samples of a recording from `first` on, all of them inside it."""
        index, out = self._index, np.empty(samples, np.int16)
        place = (int(column[number]) for column in (index.shard, index.offset, index.bytes))
        try:
            flac.decode(self._shards.read(*place), int(index.samples[number]), out, first)
        except flac.ERRORS as error:
            # Without it the utterance would be trained as it is, and the run would no longer be what it says.
            shard = index.shards[index.shard[number]]
            raise UserError(
                f"the recording {index.key(number)} in {shard}, which is mixed into utterances, cannot be read "
                f"({flac.reason(error)}): make its shards again, then start again; the run goes on"
            ) from None
        return out


def read_clips(settings: config.Config) -> dict[str, Index]:
    """The index of each collection of recordings that the settings use, see `Config.clips`.

    Its rows are in the order of their keys, so that what is drawn depends neither on the order of the directories nor
    on how the shards were cut, as the index's fingerprint does not.

    Raises:
        UserError: a directory is missing, incomplete or damaged.
    """
    indexes = {name: read_index(directories) for name, directories in settings.clips.items()}
    return {name: index.take(pyarrow.compute.sort_indices(index.keys).to_numpy()) for name, index in indexes.items()}


def open_clips(indexes: Mapping[str, Index]) -> dict[str, ShardClips]:
    """What the augmentations read."""
    return {name: ShardClips(index) for name, index in indexes.items()}
