"""From a plan to collated micro-batches: threads read byte ranges of the shards and decode them to int16.

    train_loader: Plan --this rank's Work, across all epochs--> threads --MicroBatch, in order--> on_device --> loop
                  (with fuse=n a Work and its MicroBatch stand for n neighbouring micro-batches of a step)
    eval_loader:  lengths --batches of similar lengths, round-robin over ranks--> threads --> MicroBatch or None a round

    Recordings: Work --Store, soundfile, speed, waveform augmentations, masks--> MicroBatch

The position (epoch, step) is the whole state: `train_loader` starts at any position at once, and its threads live
through all epochs. What becomes of an utterance depends on (seed, epoch, key) and never on thread, rank or attempt.

`data.threads` threads of the rank decode, and the rank itself where that is 0. They are enough because reading,
decoding, resampling and numpy release Python's lock (GIL): two threads decode nearly twice as fast as one. Memory is
bounded: of n fused micro-batches max(`data.prefetch` // n, `data.threads`) batches are decoded ahead of the one that is
handed out, each of at most n x `batch.max_seconds` x 32 kB. (Of 32 micro-batches of 55 s a batch is 56 MB, and two
threads hold 112 MB ahead.) An evaluation decodes one batch a thread ahead.

A recording that no longer decodes to what the index says is left out of its batch and named in `MicroBatch.bad`. A
batch that loses all its recordings carries one silent utterance of weight 0, so that every rank still runs it.
Any other error of a thread is raised where its batch would have been handed out.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass, field, replace
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

from ddp_asr import SAMPLE_RATE_HZ, draws
from ddp_asr.config import Config
from ddp_asr.data import flac
from ddp_asr.data.clips import open_clips, read_clips
from ddp_asr.data.index import Index
from ddp_asr.data.plan import Plan, micro_batches_of_rank, speed_samples
from ddp_asr.data.storage import Shards
from ddp_asr.draws import Draw
from ddp_asr.features import WaveformAugmentation, masks, speed_name, turned_on, waveform_augmentations
from ddp_asr.features.speed import change_speed
from ddp_asr.text import Tokeniser

Batches = Generator["MicroBatch", None, None]  # closing it ends its threads
Tasks = SimpleQueue["tuple[Work, Future[MicroBatch]] | None"]  # None ends the thread that takes it

_SILENCE_SAMPLES = SAMPLE_RATE_HZ // 2  # of the silent utterance; gives a frame at any sensible setting
_CLOSE_S = 2.0  # how long closing waits for threads that are in the middle of a micro-batch


@dataclass(frozen=True)
class Work:
    """What one batch is to be made of: a micro-batch, or several neighbouring ones of a step."""

    epoch: int
    step: int
    micro_batch: int  # k of the first, or the number of an evaluation's micro-batch
    rows: np.ndarray  # int64 (B,)
    speed: np.ndarray | None = None  # float64 (B,)
    micro_batches: int = 1


@dataclass
class MicroBatch:
    """B utterances of one micro-batch, or of several neighbouring ones of a step, zero-padded on the right.

    The silent utterance of an emptied batch is row -1 with key ''. Lengths and rows stay on the CPU, where they are
    read as numbers.
    """

    waveforms: Tensor  # int16 (B, S)
    samples: Tensor  # int64 (B,)
    targets: Tensor  # int64 (B, U)
    target_lengths: Tensor  # int64 (B,)
    weight: Tensor  # float32 (B,): 1; 0 for the silent utterance
    rows: Tensor  # int64 (B,): rows of the index
    masks: dict[str, Tensor] | None  # what features.masks.draw drew
    dropout_seeds: Tensor | None  # int64 (B, views)
    keys: list[str]
    bad: list[tuple[str, str]]  # (key, reason) of those left out because they no longer decode
    epoch: int
    step: int
    micro_batch: int  # k of the first
    micro_batches: int  # how many it stands for
    utterances: int  # without the silent one; a number of the host, so that reading it needs no synchronisation
    audio_samples: int  # without padding and the silent utterance
    fired: dict[str, int] = field(default_factory=dict)  # utterances of each augmentation that is turned on

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MicroBatch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> MicroBatch:
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        """A copy with every tensor changed that belongs on the device."""
        masks, seeds = self.masks, self.dropout_seeds
        return replace(
            self,
            waveforms=change(self.waveforms),
            targets=change(self.targets),
            weight=change(self.weight),
            masks=None if masks is None else {name: change(mask) for name, mask in masks.items()},
            dropout_seeds=None if seeds is None else change(seeds),
        )


# what the training loop sees


def train_loader(
    index: Index,
    tokeniser: Tokeniser,
    plan: Plan,
    config: Config,
    *,
    rank: int,
    world_size: int,
    start: tuple[int, int] = (0, 0),
    fuse: int = 1,
    epochs: int | None = None,
    clips: Mapping[str, Index] | None = None,
    pin_memory: bool | None = None,
) -> Batches:
    """A rank's micro-batches in the order (epoch, step, k), from `start` = (epoch, step) to the end of the last epoch.

    `index` holds exactly the rows the plan was made from. `fuse` neighbouring micro-batches of a step are one batch;
    the last batch of a rank's part of a step may stand for fewer. `clips` is `Corpus.clips`, and read
    here without it. Closing the iterator ends its threads.
    """
    if len(index) != len(plan):
        raise ValueError(f"an index of {len(index)} rows does not belong to a plan of {len(plan)}")
    recordings = Recordings(index, tokeniser, config, training=True, clips=clips)
    last = config.train.epochs if epochs is None else epochs
    work = _train_work(plan, micro_batches_of_rank(plan.micro_batches, rank, world_size), start, fuse, last)
    return _load(recordings, work, config.data.threads, config.data.prefetch // fuse, pin_memory)


def eval_loader(
    index: Index,
    tokeniser: Tokeniser,
    config: Config,
    *,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool | None = None,
) -> Iterator[MicroBatch | None]:
    """Every utterance once over all ranks, unchanged, in equally many rounds on every rank.

    What is in a micro-batch depends on neither rank nor world size; round r gives rank i micro-batch r * W + i, or None
    where the last round has none for it. The longest come first, so that a lack of memory shows at once and the last
    round is a short one.
    """
    recordings = Recordings(index, tokeniser, config, training=False)
    batches = _eval_batches(index, config.data.test_max_seconds)
    numbers = range(rank, len(batches), world_size)
    work = [Work(0, number // world_size, number, batches[number]) for number in numbers]
    yield from _load(recordings, work, config.data.threads, 1, pin_memory)
    rounds = -(-len(batches) // world_size)
    yield from [None] * (rounds - len(work))


def on_device(batches: Batches, device: torch.device) -> Batches:
    """The same micro-batches on the device, each sent there before the one ahead of it is handed out."""
    with closing(batches):
        if device.type == "cpu":
            yield from batches
            return
        ahead = None
        for batch in batches:
            # The copy is queued before the kernels of the micro-batch ahead, so it is done when those are.
            sent = batch.to(device, non_blocking=True)
            if ahead is not None:
                yield ahead
            ahead = sent
        if ahead is not None:
            yield ahead


def _train_work(plan: Plan, micro_batches: range, start: tuple[int, int], fuse: int, epochs: int) -> Iterator[Work]:
    """A rank's part of all epochs from a position on, planned an epoch at a time."""
    first_epoch, first_step = start
    for epoch in range(first_epoch, epochs):
        planned = plan.epoch(epoch)
        for step in range(first_step if epoch == first_epoch else 0, plan.steps_per_epoch):
            for k in micro_batches[::fuse]:
                fused = min(fuse, micro_batches.stop - k)
                span = planned.span(step, k, fused)
                yield Work(epoch, step, k, planned.rows[span], planned.speed[span], fused)


def _eval_batches(index: Index, max_seconds: float) -> list[np.ndarray]:
    """Rows of similar length, the longest first; one longer than `max_seconds` is a batch of its own."""
    order = np.lexsort((index.key_hash, index.samples))[::-1]
    lengths, batches, start = index.samples[order], [], 0
    while start < len(order):
        utterances = max(1, int(max_seconds * SAMPLE_RATE_HZ) // max(1, int(lengths[start])))
        batches.append(order[start : start + utterances])
        start += utterances
    return batches


# from rows to a micro-batch


class Recordings:
    """Makes the micro-batch of a Work, from any number of threads at once."""

    def __init__(
        self,
        index: Index,
        tokeniser: Tokeniser,
        config: Config,
        *,
        training: bool,
        clips: Mapping[str, Index] | None = None,
    ) -> None:
        self.index, self.tokeniser, self.config, self.training = index, tokeniser, config, training
        self._shards = Shards(index.shards)
        self._augmentations: list[WaveformAugmentation] = []
        self._turned_on: list[str] = []
        if training:
            opened = open_clips(read_clips(config) if clips is None else clips)
            self._augmentations = waveform_augmentations(config.augment, opened)
            self._turned_on = turned_on(config.augment, self._augmentations)

    def micro_batch(self, work: Work) -> MicroBatch:
        speed = np.ones(len(work.rows)) if work.speed is None else work.speed
        samples = speed_samples(self.index.samples[work.rows], speed)
        waveforms = np.zeros((len(work.rows), int(samples.max())), np.int16)
        good, bad = [], []
        fired = dict.fromkeys(self._turned_on, 0)
        for i, row in enumerate(work.rows.tolist()):
            waveform = waveforms[i, : samples[i]]
            try:
                self._decode(row, float(speed[i]), waveform)
            except flac.ERRORS as error:
                bad.append((self.index.key(row), flac.reason(error)))
                continue
            good.append(i)
            if speed[i] != 1.0:
                fired[speed_name(speed[i])] += 1
            for op in self._augmentations:
                draw = Draw(op.purpose, self.config.train.seed, work.epoch, int(self.index.key_hash[row]))
                changed = op(waveform, draw)
                if changed is not waveform and not np.array_equal(changed, waveform):
                    fired[op.purpose] += 1
                    waveform[:] = changed
        if bad:
            samples = samples[good]
            waveforms = waveforms[good, : samples.max(initial=0)]
        return self._collate(work, work.rows[good], samples, waveforms, bad, fired)

    def _decode(self, row: int, speed: float, out: np.ndarray) -> None:
        """Fills `out`, which has the length after the change of speed."""
        recording = self._shards.read(
            int(self.index.shard[row]), int(self.index.offset[row]), int(self.index.bytes[row])
        )
        samples = int(self.index.samples[row])
        waveform = out if speed == 1.0 else np.empty(samples, np.int16)
        flac.decode(recording, samples, waveform)
        if speed != 1.0:
            change_speed(waveform, speed, out)

    def _collate(
        self,
        work: Work,
        rows: np.ndarray,
        samples: np.ndarray,
        waveforms: np.ndarray,
        bad: list[tuple[str, str]],
        fired: dict[str, int],
    ) -> MicroBatch:
        utterances, audio_samples = len(rows), int(samples.sum())
        keys = [self.index.key(row) for row in rows]
        # Only an evaluation has transcripts with characters that the tokeniser cannot write; they count in its WER.
        targets = [self.tokeniser.encode(self.index.text(row), skip_foreign=not self.training) for row in rows]
        key_hash = self.index.key_hash[rows]
        if not utterances:
            rows, samples, keys, key_hash = np.array([-1]), np.array([_SILENCE_SAMPLES]), [""], np.zeros(1, np.uint64)
            waveforms, targets = np.zeros((1, _SILENCE_SAMPLES), np.int16), [np.zeros(1, np.int64)]
        target_lengths = np.array([len(target) for target in targets], np.int64)
        padded = np.zeros((len(targets), max(1, int(target_lengths.max()))), np.int64)
        for target, into in zip(targets, padded, strict=True):
            into[: len(target)] = target
        drawn = self._masks(work.epoch, key_hash, samples) if self.training else None
        if drawn is not None and utterances:
            fired |= {f"{name} masks": count for name, count in masks.fired(drawn).items() if f"{name} masks" in fired}
        return MicroBatch(
            waveforms=torch.from_numpy(waveforms),
            samples=torch.from_numpy(samples),
            targets=torch.from_numpy(padded),
            target_lengths=torch.from_numpy(target_lengths),
            weight=torch.full((len(rows),), float(utterances > 0)),
            rows=torch.from_numpy(rows),
            masks=None if drawn is None else {name: torch.from_numpy(spans) for name, spans in drawn.items()},
            dropout_seeds=self._dropout_seeds(work.epoch, key_hash) if self.training else None,
            keys=keys,
            bad=bad,
            epoch=work.epoch,
            step=work.step,
            micro_batch=work.micro_batch,
            micro_batches=work.micro_batches,
            utterances=utterances,
            audio_samples=audio_samples,
            fired=fired,
        )

    def _masks(self, epoch: int, key_hash: np.ndarray, samples: np.ndarray) -> masks.Masks:
        config = self.config
        frames, bands, views = config.features.frames(samples), config.features.mel_bands, config.objective.views
        return masks.draw(config.augment, config.train.seed, epoch, key_hash, frames, bands, views)

    def _dropout_seeds(self, epoch: int, key_hash: np.ndarray) -> Tensor:
        drawn = draws.hashes(self.config.train.seed, epoch, key_hash, "dropout", self.config.objective.views)
        return torch.from_numpy(drawn.view(np.int64))


# threads


def _load(recordings: Recordings, work: Iterable[Work], threads: int, ahead: int, pin_memory: bool | None) -> Batches:
    """The batch of each work, in order, made by so many threads, `ahead` or one a thread at a time; or right here."""
    pin = torch.cuda.is_available() if pin_memory is None else pin_memory
    if threads:
        pin_for = torch.cuda.current_device() if pin else None
        yield from _load_in_threads(recordings, iter(work), threads, max(ahead, threads), pin_for)
        return
    for one in work:
        batch = recordings.micro_batch(one)
        yield batch.pin_memory() if pin else batch


def _load_in_threads(
    recordings: Recordings, works: Iterator[Work], threads_wanted: int, most_ahead: int, pin_for: int | None
) -> Batches:
    tasks: Tasks = SimpleQueue()
    ahead: deque[Future[MicroBatch]] = deque()  # in order: what is made, being made or waiting for a thread
    threads = [
        # daemons, because one that is stuck in a read must not keep the process from ending
        threading.Thread(target=_make, args=(recordings, tasks, pin_for), name=f"loader-{number}", daemon=True)
        for number in range(threads_wanted)
    ]
    for thread in threads:
        thread.start()

    def fill() -> None:
        while len(ahead) < most_ahead and (work := next(works, None)) is not None:
            ahead.append(Future())
            tasks.put((work, ahead[-1]))

    try:
        fill()
        while ahead:
            batch = ahead.popleft().result()
            fill()
            yield batch
    finally:
        for future in ahead:
            future.cancel()
        for _ in threads:
            tasks.put(None)
        deadline_s = time.monotonic() + _CLOSE_S
        for thread in threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))


def _make(recordings: Recordings, tasks: Tasks, pin_for: int | None) -> None:
    """One thread: makes micro-batches, and hands on their errors, until it is given None."""
    if pin_for is not None:
        torch.cuda.set_device(pin_for)  # a thread starts with GPU 0, and pinning for it would allocate memory there
        torch.set_num_threads(1)  # else the copy into pinned memory takes all cores
    while True:
        task = tasks.get()
        if task is None:
            return
        _make_one(recordings, *task, pin=pin_for is not None)
        del task  # its future holds the micro-batch, which must not stay while this thread waits for the next task


def _make_one(recordings: Recordings, work: Work, future: Future[MicroBatch], *, pin: bool) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        batch = recordings.micro_batch(work)
        future.set_result(batch.pin_memory() if pin else batch)
    except BaseException as error:  # raised in the main thread, where the micro-batch would have been handed out
        future.set_exception(error)
