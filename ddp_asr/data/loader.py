"""From a plan to collated micro-batches: worker processes read byte ranges of the shards and decode them to int16.

    train_loader: Plan --this rank's Work, across all epochs--> workers --MicroBatch, in order--> on_device --> trainer
    eval_loader:  lengths --batches of neighbours, round-robin over ranks--> workers --> one MicroBatch or None a round

    Recordings[Work] --Store, soundfile, soxr, noise, masks--> MicroBatch

The position (epoch, step) is the whole state: `train_loader` starts anywhere at once, and its workers live through all
epochs. What a utterance becomes depends on (seed, epoch, key) and never on worker, rank or attempt.

Workers ignore the signals that ask a run to stop: torchrun signals the whole process group, and a rank must still get
the rest of its step from them. A worker that dies (most often for memory) is one clear error. A recording that no
longer decodes to what the index says is dropped from its micro-batch, and named there; a micro-batch that loses all of
them carries one silent stand-in of weight 0, so that every rank still runs it.
"""

from __future__ import annotations

import io
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ddp_asr import SAMPLE_RATE_HZ
from ddp_asr.config import Augment, Config, Data
from ddp_asr.data.index import Index
from ddp_asr.data.plan import Plan, share, speed_samples
from ddp_asr.data.storage import Shards
from ddp_asr.draws import Draw
from ddp_asr.errors import UserError
from ddp_asr.features import waveform_augmentations
from ddp_asr.text import Tokeniser

# draw(settings, seed, epoch, key_hash (B,), frames (B,), mel_bands, views) -> masks; see augment.py
DrawMasks = Callable[[Augment, int, int, np.ndarray, np.ndarray, int, int], dict[str, np.ndarray] | None]
Batches = Generator["MicroBatch", None, None]  # closing it ends its workers

_STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT}
_SILENCE_SAMPLES = SAMPLE_RATE_HZ // 2  # of the stand-in; enough for a frame at any sensible setting


@dataclass(frozen=True)
class Work:
    """What one micro-batch is to be made of."""

    epoch: int
    step: int
    micro_batch: int  # k, or the number of an evaluation's micro-batch
    rows: np.ndarray  # int64 (B,)
    speed: np.ndarray | None = None  # float64 (B,)


@dataclass
class MicroBatch:
    """B utterances, zero-padded on the right. The stand-in of an emptied micro-batch is row -1 with key ''."""

    waveforms: Tensor  # int16 (B, S)
    samples: Tensor  # int64 (B,)
    targets: Tensor  # int64 (B, U)
    target_lengths: Tensor  # int64 (B,)
    weight: Tensor  # float32 (B,): 1; 0 for the stand-in
    rows: Tensor  # int64 (B,): rows of the index
    masks: dict[str, Tensor] | None  # what augment.draw drew
    keys: list[str]
    bad: list[tuple[str, str]]  # (key, reason) of those dropped because they no longer decode
    epoch: int
    step: int
    micro_batch: int
    utterances: int  # without the stand-in; known without asking the device
    audio_samples: int  # without padding and stand-in

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MicroBatch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> MicroBatch:
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> MicroBatch:
        return MicroBatch(**_change(vars(self), Tensor, change))

    # Between processes only the waveforms go through shared memory: every other tensor would cost a file descriptor
    # and a socket's round trip, which for a handful of numbers is more than copying them.
    def __getstate__(self) -> dict[str, Any]:
        return {**_change(vars(self), Tensor, lambda tensor: tensor.numpy(force=True)), "waveforms": self.waveforms}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(_change(state, np.ndarray, torch.from_numpy))


def _change(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """`value` with everything of a kind in it changed, in dictionaries too."""
    if isinstance(value, dict):
        return {name: _change(part, kind, change) for name, part in value.items()}
    return change(value) if isinstance(value, kind) else value


# what the training loop sees


def train_loader(
    index: Index,
    tokeniser: Tokeniser,
    plan: Plan,
    draw_masks: DrawMasks | None,
    config: Config,
    *,
    rank: int,
    world_size: int,
    start: tuple[int, int] = (0, 0),
    epochs: int | None = None,
    pin_memory: bool | None = None,
) -> Batches:
    """A rank's micro-batches in the order (epoch, step, k), from `start` = (epoch, step) to the end of the last epoch.

    `index` holds exactly the rows the plan was made from. Closing the iterator ends its workers.
    """
    if len(index) != len(plan):
        raise ValueError(f"an index of {len(index)} rows does not belong to a plan of {len(plan)}")
    recordings = Recordings(index, tokeniser, config, draw_masks=draw_masks, training=True)
    last = config.train.epochs if epochs is None else epochs
    work = _TrainWork(plan, share(plan.micro_batches, rank, world_size), start, last)
    return _load(recordings, work, config.data, pin_memory)


def eval_loader(
    index: Index,
    tokeniser: Tokeniser,
    config: Config,
    *,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool | None = None,
) -> EvalLoader:
    """Every utterance once over all ranks, unchanged; see `EvalLoader`."""
    recordings = Recordings(index, tokeniser, config, draw_masks=None, training=False)
    batches = _eval_batches(index, config.batch.max_seconds)
    return EvalLoader(recordings, batches, config.data, rank, world_size, pin_memory)


class EvalLoader:
    """Yields exactly `rounds` items on every rank: a MicroBatch, or None where a rank has none in the last round.

    What is in a micro-batch depends on neither rank nor world size; round r gives rank i micro-batch r * W + i. Longest
    first, so that memory that does not suffice is seen at once and the last round is a short one.
    """

    def __init__(
        self,
        recordings: Recordings,
        batches: Sequence[np.ndarray],
        settings: Data,
        rank: int,
        world_size: int,
        pin_memory: bool | None,
    ) -> None:
        self.rounds = -(-len(batches) // world_size)
        self._recordings, self._settings, self._pin_memory = recordings, settings, pin_memory
        numbers = range(rank, len(batches), world_size)
        self._work = [Work(0, number // world_size, number, batches[number]) for number in numbers]

    def __len__(self) -> int:
        return self.rounds

    def __iter__(self) -> Iterator[MicroBatch | None]:
        yield from _load(self._recordings, self._work, self._settings, self._pin_memory)
        yield from [None] * (self.rounds - len(self._work))


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


@dataclass(frozen=True)
class _TrainWork:
    """A rank's share of all epochs from a position on, drawn in the main process, an epoch's plan at a time."""

    plan: Plan
    micro_batches: range
    start: tuple[int, int]
    epochs: int

    def __iter__(self) -> Iterator[Work]:
        first_epoch, first_step = self.start
        for epoch in range(first_epoch, self.epochs):
            planned = self.plan.epoch(epoch)
            for step in range(first_step if epoch == first_epoch else 0, self.plan.steps_per_epoch):
                for k in self.micro_batches:
                    span = planned.span(step, k)
                    yield Work(epoch, step, k, planned.rows[span], planned.speed[span])


def _eval_batches(index: Index, max_seconds: float) -> list[np.ndarray]:
    """Rows of neighbours in length, longest first; one longer than `max_seconds` is a batch of its own."""
    order = np.lexsort((index.key_hash, index.samples))[::-1]
    lengths, batches, start = index.samples[order], [], 0
    while start < len(order):
        utterances = max(1, int(max_seconds * SAMPLE_RATE_HZ) // max(1, int(lengths[start])))
        batches.append(order[start : start + utterances])
        start += utterances
    return batches


# from rows to a micro-batch


class Recordings(Dataset[MicroBatch]):
    """`recordings[work]` is the micro-batch; holds the index's arrays, and no Python object an utterance."""

    def __init__(
        self, index: Index, tokeniser: Tokeniser, config: Config, *, draw_masks: DrawMasks | None, training: bool
    ) -> None:
        self.index, self.tokeniser, self.config = index, tokeniser, config
        self.draw_masks, self.training = draw_masks, training
        self._shards = Shards(index.shards)
        self._augmentations = waveform_augmentations(config.augment) if training else []

    def __getitem__(self, work: Work) -> MicroBatch:
        speed = np.ones(len(work.rows)) if work.speed is None else work.speed
        samples = speed_samples(self.index.samples[work.rows], speed)
        waveforms = _zeros(len(work.rows), int(samples.max()))
        good, bad = [], []
        for i, (row, out) in enumerate(zip(work.rows.tolist(), waveforms.numpy(), strict=True)):
            waveform = out[: samples[i]]
            try:
                self._decode(row, float(speed[i]), waveform)
            except (OSError, soundfile.SoundFileError, _Mismatch) as error:
                bad.append((self.index.key(row), _reason(error)))
                continue
            good.append(i)
            for op in self._augmentations:
                draw = Draw(op.purpose, self.config.train.seed, work.epoch, int(self.index.key_hash[row]))
                waveform[:] = op(waveform, draw)
        if bad:
            samples = samples[good]
            waveforms = waveforms[good, : samples.max(initial=0)]
        return self._collate(work, work.rows[good], samples, waveforms, bad)

    def _decode(self, row: int, speed: float, out: np.ndarray) -> None:
        """Fills `out`, which has the length after the change of speed."""
        flac = self._shards.read(int(self.index.shard[row]), int(self.index.offset[row]), int(self.index.bytes[row]))
        samples = int(self.index.samples[row])
        with soundfile.SoundFile(io.BytesIO(flac)) as recording:
            found = (recording.samplerate, recording.channels, recording.frames)
            if found != (SAMPLE_RATE_HZ, 1, samples):
                raise _Mismatch(f"(rate, channels, samples) is {found}, not {(SAMPLE_RATE_HZ, 1, samples)}")
            waveform = out if speed == 1.0 else np.empty(samples, np.int16)
            decoded = len(recording.read(out=waveform))
        if decoded != samples:  # older versions of libsndfile end early where newer ones raise
            raise _Mismatch(f"{decoded} of {samples} samples decode")
        if speed != 1.0:
            # Rounding and the filter's delay leave soxr a sample more or less than the plan's arithmetic.
            changed = soxr.resample(waveform, SAMPLE_RATE_HZ * speed, SAMPLE_RATE_HZ)[: len(out)]
            out[: len(changed)] = changed

    def _collate(
        self, work: Work, rows: np.ndarray, samples: np.ndarray, waveforms: Tensor, bad: list[tuple[str, str]]
    ) -> MicroBatch:
        utterances, audio_samples = len(rows), int(samples.sum())
        keys = [self.index.key(row) for row in rows]
        # Only an evaluation meets characters outside the alphabet: no recogniser can spell them, and WER counts them.
        targets = [self.tokeniser.encode(self.index.text(row), skip_foreign=not self.training) for row in rows]
        key_hash = self.index.key_hash[rows]
        if not utterances:
            rows, samples, keys, key_hash = np.array([-1]), np.array([_SILENCE_SAMPLES]), [""], np.zeros(1, np.uint64)
            waveforms, targets = _zeros(1, _SILENCE_SAMPLES), [np.zeros(1, np.int64)]
        target_lengths = np.array([len(target) for target in targets], np.int64)
        padded = np.zeros((len(targets), max(1, int(target_lengths.max()))), np.int64)
        for target, into in zip(targets, padded, strict=True):
            into[: len(target)] = target
        return MicroBatch(
            waveforms=waveforms,
            samples=torch.from_numpy(samples),
            targets=torch.from_numpy(padded),
            target_lengths=torch.from_numpy(target_lengths),
            weight=torch.full((len(rows),), float(utterances > 0)),
            rows=torch.from_numpy(rows),
            masks=self._masks(work.epoch, key_hash, samples),
            keys=keys,
            bad=bad,
            epoch=work.epoch,
            step=work.step,
            micro_batch=work.micro_batch,
            utterances=utterances,
            audio_samples=audio_samples,
        )

    def _masks(self, epoch: int, key_hash: np.ndarray, samples: np.ndarray) -> dict[str, Tensor] | None:
        if self.draw_masks is None:
            return None
        config = self.config
        frames, bands, views = config.features.frames(samples), config.features.mel_bands, config.objective.views
        drawn = self.draw_masks(config.augment, config.train.seed, epoch, key_hash, frames, bands, views)
        return None if drawn is None else _change(drawn, np.ndarray, torch.from_numpy)


def _zeros(utterances: int, longest: int) -> Tensor:
    """int16 (B, S); in a worker, in memory that it shares with the rank, which saves a copy."""
    if torch.utils.data.get_worker_info() is None:
        return torch.zeros((utterances, longest), dtype=torch.int16)
    shared = torch.UntypedStorage._new_shared(2 * utterances * longest)  # zeroed; as torch's own collation does
    return torch.empty(0, dtype=torch.int16).set_(shared).view(utterances, longest)


class _Mismatch(Exception):
    """A recording that decodes, to something else than the index says."""


def _reason(error: Exception) -> str:
    """One line, without the address that soundfile puts where a file's name would stand."""
    if isinstance(error, soundfile.LibsndfileError):  # which often has no text, for a broken frame for instance
        return " ".join(f"does not decode: {error.error_string or 'damaged'}".split())
    return str(error)


# worker processes


def _load(recordings: Recordings, work: Iterable[Work], settings: Data, pin_memory: bool | None) -> Batches:
    """The micro-batch of each work, in order, made by `settings.workers` processes or right here if that is 0."""
    pin = torch.cuda.is_available() if pin_memory is None else pin_memory
    if settings.workers == 0:
        for one in work:
            batch = recordings[one]
            yield batch.pin_memory() if pin else batch
        return
    loader = DataLoader(
        recordings,
        sampler=work,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=settings.workers,
        multiprocessing_context="fork",  # Python 3.14's default would import torch anew in each, and unblock signals
        prefetch_factor=settings.prefetch,
        pin_memory=pin,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # its base seed would otherwise be drawn from the run's own random state
    )
    with _undisturbed():
        batches: Any = iter(loader)
    try:
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:  # the latter two from sockets of a dead worker
                if death := _death(batches._workers):
                    raise UserError(death) from error
                raise
            yield batch
    finally:
        batches._shutdown_workers()
        for process in batches._workers:
            if process.is_alive():  # stuck in a read: it ignores SIGTERM, and the interpreter would wait for it
                process.kill()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Workers are started with stop signals blocked: until they can ignore them, one would kill them.

    Torch's SIGCHLD handler is taken back: it raises wherever the main thread happens to be, in the middle of a backward
    too. Without it a worker's death is seen within five seconds where its micro-batch is waited for.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        if in_main_thread:
            signal.signal(signal.SIGCHLD, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(number: int) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)  # the parent's, inherited by the fork
    for stop in _STOP_SIGNALS:
        signal.signal(stop, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    torch.set_num_threads(1)


def _as_it_is(batch: Any) -> Any:
    return batch


def _death(workers: Sequence[Any]) -> str | None:
    """What to tell the user if a worker has died."""
    # A dying process closes its sockets first, which is what was noticed, and has an exit status later.
    ended = wait([process.sentinel for process in workers], timeout=1.0)
    for process in workers:
        if process.sentinel in ended:
            process.join()
    codes = [process.exitcode for process in workers if process.exitcode]
    if not codes:
        return None
    how = signal.Signals(-codes[0]).name if codes[0] < 0 else f"exit status {codes[0]}"
    remedy = {
        "SIGKILL": "most often the kernel, for want of memory: lower data.workers, data.prefetch or batch.max_seconds",
        "SIGBUS": "/dev/shm is full: enlarge it (docker run --shm-size=8g), or lower data.workers or data.prefetch",
    }.get(how, "data.workers=0 decodes in the rank itself and shows where")
    return f"a loader process died ({how}): {remedy}"
