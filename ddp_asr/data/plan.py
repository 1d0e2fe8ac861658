"""From lengths to the micro-batches of every step: arithmetic on (samples, key hashes, settings, seed, epoch), no I/O.

    plan = Plan(samples, key_hash, settings=config.batch, speeds=config.augment.speeds, seed=config.train.seed)
    plan.steps_per_epoch                       # the same in all epochs
    epoch = plan.epoch(3)                      # computed directly; earlier epochs are not replayed
    for step in range(plan.steps_per_epoch):
        for k in micro_batches_of_rank(plan.micro_batches, rank, world_size):
            rows = epoch.micro_batch(step, k)  # rows of the index

Every utterance is in exactly one micro-batch of an epoch. Every step has exactly K micro-batches and none is empty, for
any number of processes: a plan does not depend on the rank, and each rank takes its own afterwards
(`micro_batches_of_rank`). (seed, epoch, step) is the whole state.

**Buckets.** Utterances are sorted by length and cut into buckets of equal audio. Small sets get fewer buckets, so that
a bucket holds three full steps on average and its micro-batches stay full. A bucket of N utterances with longest L is
split evenly into M = K * ceil(N / (K * c)) micro-batches, c = floor(max_seconds / L). So no micro-batch costs more than
`batch.max_seconds` (utterances x longest), and the K of a step have similar lengths, so that ranks wait little for each
other. Lengths are those at the slowest speed, so the speeds that an epoch draws change neither buckets nor the number
of steps.

This needs N >= K, which always holds: a bucket of three full steps has at least 3 K - 1 utterances, and a single
bucket has all of them. **Where c = 1** (two of the longest do not fit together) each utterance is a micro-batch of its
own, so N must be a multiple of K. Such a bucket takes the utterances it lacks, fewer than K, from the next shorter
bucket; this goes from the longest bucket to the shortest. If the shortest bucket still lacks some, that is a
`UserError`. It cannot happen where `batch.max_seconds` is at least twice the longest utterance, because then c >= 2 and
any N >= K will do.

An epoch shuffles within each bucket, cuts micro-batches, makes steps of K neighbours and shuffles the steps. Order and
speeds depend on the *set* of utterances and not on the order of the index, so the same corpora sharded again, or named
in another order, give the same run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ddp_asr import SAMPLE_RATE_HZ, config
from ddp_asr.draws import seed_of, uniform
from ddp_asr.errors import UserError

_FULL_STEPS_A_BUCKET = 3


@dataclass(frozen=True)
class Bucket:
    """Utterances `start:end` in the order of length, split into `micro_batches` (a multiple of K)."""

    start: int
    end: int
    micro_batches: int

    def most_utterances(self, fuse: int = 1) -> int:
        """Utterances in the fullest of its groups of `fuse` micro-batches: `_deal` puts the larger ones first."""
        each, larger = divmod(self.end - self.start, self.micro_batches)
        return fuse * each + min(fuse, larger)


@dataclass(frozen=True)
class EpochPlan:
    """One epoch: micro-batch m = step * K + k holds `rows[bounds[m]:bounds[m + 1]]`."""

    rows: np.ndarray  # int64 (N,): rows of the index
    bounds: np.ndarray  # int64 (steps * K + 1,)
    speed: np.ndarray  # float64 (N,), aligned with rows; not float32, because lengths follow from it
    samples: np.ndarray  # int64 (N,), aligned with rows: lengths at that speed
    micro_batches: int  # K

    def span(self, step: int, k: int, fuse: int = 1) -> slice:
        """Where `fuse` micro-batches of a step, from k on, lie in `rows`, `speed` and `samples`."""
        m = step * self.micro_batches + k
        return slice(int(self.bounds[m]), int(self.bounds[m + fuse]))

    def micro_batch(self, step: int, k: int) -> np.ndarray:
        return self.rows[self.span(step, k)]

    @cached_property
    def cost(self) -> np.ndarray:
        """Samples that each micro-batch computes, padding included, int64 (steps, K)."""
        longest = np.maximum.reduceat(self.samples, self.bounds[:-1])
        return (longest * np.diff(self.bounds)).reshape(-1, self.micro_batches)

    @property
    def padding(self) -> float:
        """Share of what is computed that is padding."""
        return 1.0 - float(self.samples.sum()) / float(self.cost.sum())

    def balance(self, world_size: int) -> float:
        """Mean over steps of (mean cost of a rank / cost of the slowest rank): 1 where no rank has to wait."""
        ranks = [micro_batches_of_rank(self.micro_batches, rank, world_size) for rank in range(world_size)]
        cost = np.stack([self.cost[:, list(ks)].sum(axis=1) for ks in ranks], axis=1)  # (steps, W)
        return float((cost.mean(axis=1) / cost.max(axis=1)).mean())


class Plan:
    """All epochs of a training on usable utterances (see the module). Rows are those of the arrays given here."""

    def __init__(
        self,
        samples: np.ndarray,
        key_hash: np.ndarray,
        *,
        settings: config.Batch,
        speeds: Sequence[float] = (1.0,),
        seed: int = 0,
    ) -> None:
        self.settings, self.speeds, self.seed = settings, tuple(map(float, speeds)), seed
        self.micro_batches = settings.micro_batches
        _check(settings, self.speeds)
        # One order for the set, by length and then by key hash. Positions in it are shuffled, not rows.
        slowest = speed_samples(np.asarray(samples, np.int64), min(self.speeds))
        self._row = np.lexsort((key_hash, slowest))
        self._samples, self._key_hash = np.asarray(samples, np.int64)[self._row], np.asarray(key_hash)[self._row]
        self._slowest = slowest[self._row]
        self.buckets = _bucket(self._slowest, settings)
        self.steps_per_epoch = sum(bucket.micro_batches for bucket in self.buckets) // self.micro_batches

    def __len__(self) -> int:
        """Utterances."""
        return len(self._row)

    def epoch(self, epoch: int) -> EpochPlan:
        """The plan of one epoch, counted from 0."""
        generator = np.random.default_rng(seed_of("order", self.seed, epoch))
        shuffled = np.concatenate([b.start + generator.permutation(b.end - b.start) for b in self.buckets])
        sizes = np.concatenate([_deal(bucket.end - bucket.start, bucket.micro_batches) for bucket in self.buckets])
        starts = np.cumsum(sizes) - sizes
        steps = generator.permutation(self.steps_per_epoch)
        micro_batch = (steps[:, None] * self.micro_batches + np.arange(self.micro_batches)).ravel()
        sizes, starts = sizes[micro_batch], starts[micro_batch]
        bounds = np.concatenate([[0], np.cumsum(sizes)])
        # Position p of the new order lies in micro-batch m at p - bounds[m]: it is taken from starts[m] + that.
        taken = shuffled[np.arange(len(self)) + np.repeat(starts - bounds[:-1], sizes)]
        speed = draw_speeds(self.speeds, self._key_hash[taken], self.seed, epoch)
        return EpochPlan(
            self._row[taken], bounds, speed, speed_samples(self._samples[taken], speed), self.micro_batches
        )

    def largest_micro_batches(self, target_length: np.ndarray, fuse: int = 1) -> dict[str, np.ndarray]:
        """Rows of the largest groups of `fuse` micro-batches that any epoch can contain (at the slowest speed).

        The K micro-batches of a step are from one bucket, and so are those of a group. The rehearsal runs these.

        Args:
            target_length: (N,), aligned with the arrays the plan was made from.
            fuse: at most K; the neighbouring micro-batches of a step that run as one batch.
        """
        targets = np.asarray(target_length)[self._row]

        def fullest(bucket: Bucket, weight: np.ndarray) -> np.ndarray:
            """The fullest group of a bucket that holds the heaviest, which is its longest in any case."""
            heaviest = np.argsort(weight[bucket.start : bucket.end], kind="stable")[-bucket.most_utterances(fuse) :]
            return self._row[bucket.start + heaviest]

        def most_targets(bucket: Bucket) -> int:
            return bucket.most_utterances(fuse) * int(targets[bucket.start : bucket.end].max())

        def cost(bucket: Bucket) -> int:
            return bucket.most_utterances(fuse) * int(self._slowest[bucket.end - 1])

        return {
            "the longest utterance": fullest(self.buckets[-1], self._slowest),
            "the most audio": fullest(max(self.buckets, key=cost), self._slowest),
            "the most utterances": fullest(max(self.buckets, key=lambda b: b.most_utterances(fuse)), self._slowest),
            "the most targets": fullest(max(self.buckets, key=most_targets), targets),
        }

    def advise(self) -> str | None:
        """A sentence where the longest utterances are alone in their micro-batches, with the setting that ends that."""
        alone = [bucket for bucket in self.buckets if _capacity(self._slowest[bucket.end - 1], self.settings) == 1]
        if not alone:
            return None
        utterances, longest_s = sum(bucket.end - bucket.start for bucket in alone), self._slowest[-1] / SAMPLE_RATE_HZ
        slowed = "" if min(self.speeds) == 1.0 else f" at speed {min(self.speeds):g}"
        return (
            f"{utterances:,} utterances of up to {longest_s:.1f} s{slowed} are alone in their micro-batches, because "
            f"batch.max_seconds = {self.settings.max_seconds:g} is less than twice that: "
            f"{_holding_two(self._slowest):g} would hold two"
        )


def micro_batches_of_rank(micro_batches: int, rank: int, world_size: int) -> range:
    """Numbers of the micro-batches of a step that a rank runs: consecutive, K // W of them or one more."""
    if world_size > micro_batches:
        raise UserError(
            f"{world_size} processes cannot share out {micro_batches} micro-batches a step: start at most "
            f"{micro_batches}, or train anew with batch.micro_batches={world_size} or more"
        )
    return range(rank * micro_batches // world_size, (rank + 1) * micro_batches // world_size)


def speed_samples(samples: np.ndarray, speed: float | np.ndarray) -> np.ndarray:
    """Samples after a change of speed, int64; plan and loader both use this, so that they agree."""
    return np.maximum(np.rint(np.asarray(samples) / speed).astype(np.int64), np.minimum(samples, 1))


def fits(samples: np.ndarray, max_seconds: float, speeds: Sequence[float] = (1.0,)) -> np.ndarray:
    """Which utterances fit into a micro-batch at every speed, bool (N,); a plan accepts only those."""
    return speed_samples(samples, min(speeds)) <= max_seconds * SAMPLE_RATE_HZ


def draw_speeds(speeds: Sequence[float], key_hash: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """A speed for each key, float64, drawn from (seed, epoch, key)."""
    if len(speeds) == 1:
        return np.full(len(key_hash), speeds[0], np.float64)
    choice = uniform(seed, epoch, key_hash, "speed")[:, 0] * len(speeds)
    return np.asarray(speeds, np.float64)[choice.astype(np.int64)]


def _check(settings: config.Batch, speeds: Sequence[float]) -> None:
    for name, value in (("micro_batches", settings.micro_batches), ("buckets", settings.buckets)):
        if value < 1:
            raise UserError(f"batch.{name} is {value}: it must be at least 1")
    if not settings.max_seconds > 0:
        raise UserError(f"batch.max_seconds is {settings.max_seconds}: it must be positive")
    if not speeds or min(speeds) <= 0:
        raise UserError(f"augment.speeds is {list(speeds)}: it must hold at least one factor, all positive")


def _bucket(samples: np.ndarray, settings: config.Batch) -> list[Bucket]:
    """Feasible buckets, ascending, over lengths at the slowest speed, ascending (see the module)."""
    k = settings.micro_batches
    if len(samples) < k:
        remedy = f": set batch.micro_batches={len(samples)} or less" if len(samples) else ""
        raise UserError(f"{len(samples)} usable utterances cannot fill the {k} micro-batches of a step{remedy}")
    if not _capacity(samples[-1], settings):
        raise ValueError(
            f"an utterance of {samples[-1]} samples exceeds batch.max_seconds: leave it out first (`fits`)"
        )
    cuts = _cuts(samples, settings)
    buckets: list[Bucket] = []  # descending while they are built
    end = len(samples)
    while end:
        start = int(cuts[np.searchsorted(cuts, end) - 1])  # the last cut before `end`
        capacity = _capacity(samples[end - 1], settings)
        if capacity == 1:
            start -= -(end - start) % k
        if start < 0:
            _refuse(samples, settings)
        assert end - start >= k, "a bucket of three full steps cannot be so small"
        buckets.append(Bucket(start, end, k * -(-(end - start) // (k * capacity))))
        end = start
    return buckets[::-1]


def _capacity(longest: np.int64, settings: config.Batch) -> int:
    """Utterances of so many samples that fit into a micro-batch."""
    return int(settings.max_seconds * SAMPLE_RATE_HZ) // int(longest)


def _holding_two(samples: np.ndarray) -> float:
    """The `batch.max_seconds` that holds two of the longest utterances, in tenths of a second."""
    return float(np.ceil(2 * samples[-1] / SAMPLE_RATE_HZ * 10) / 10)


def _refuse(samples: np.ndarray, settings: config.Batch) -> None:
    raise UserError(
        f"batch.max_seconds {settings.max_seconds:g} holds only one of the longest utterances "
        f"({samples[-1] / SAMPLE_RATE_HZ:.1f} s), and {len(samples)} utterances cannot be divided evenly among the "
        f"{settings.micro_batches} micro-batches of a step: set batch.max_seconds={_holding_two(samples):g} or lower "
        "batch.micro_batches"
    )


def _cuts(samples: np.ndarray, settings: config.Batch) -> np.ndarray:
    """Where buckets start, ascending from 0, so that they hold equal audio."""
    audio = np.cumsum(samples, dtype=np.float64)
    full_step = settings.micro_batches * settings.max_seconds * SAMPLE_RATE_HZ
    buckets = int(np.clip(audio[-1] // (_FULL_STEPS_A_BUCKET * full_step), 1, settings.buckets))
    return np.unique(np.searchsorted(audio, audio[-1] * np.arange(buckets) / buckets))


def _deal(utterances: int, micro_batches: int) -> np.ndarray:
    """Sizes of micro-batches that differ by one at most, int64 (micro_batches,)."""
    sizes = np.full(micro_batches, utterances // micro_batches, np.int64)
    sizes[: utterances % micro_batches] += 1
    return sizes
