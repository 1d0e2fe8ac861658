"""The loop: K micro-batches, one reduction, one division, clip, finiteness, step; then log, evaluate, save, stop.

    learner = Learner(world, model, log_mel, objective, optimizer, ...)    # weights and how a step changes them
    trainer = Trainer(world, learner, schedule, hooks, stop)               # what is due when
    outcome = trainer.run(batches, share_of_step, progress)

A step on each of W ranks::

    until its micro-batches are done:                    (a batch is one of them, or several: train.fuse_micro_batches)
        learner.accumulate: sum of losses -> backward    (all but the last batch without synchronisation)
    one all-reduce of `Tally`: loss, utterances, finiteness, stop request, failures
    learner.update: gradients * W / utterances of the step, clip; all finite? -> AdamW -> moving average
                                                         (else the step is skipped, on all ranks)

The loop knows neither model nor loss, no tracker, no decoder and no error rate: it calls the learner and `Hooks`.
"""

import math
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from ddp_asr import SAMPLE_RATE_HZ
from ddp_asr.data.loader import MicroBatch
from ddp_asr.data.storage import CHECK_SHARDS
from ddp_asr.errors import UserError, counted
from ddp_asr.files import finite
from ddp_asr.ranks.signals import StopRequest
from ddp_asr.ranks.world import RaisedElsewhere, World
from ddp_asr.training.learner import Learner
from ddp_asr.training.optim import learning_rate

# What "best" is judged by: numbers that are compared in their order, lower is better.
Score = tuple[float, ...]


@dataclass(frozen=True)
class Evaluation:
    """An evaluation that ran to its end."""

    score: Score | None  # None: there is nothing to evaluate on


@dataclass
class Progress:
    """Where a run stands; all that a resume needs beside the weights and the optimiser."""

    step: int = 0  # finished steps since the start of the run; (epoch, step in epoch) follows from it
    skipped: int = 0  # steps without an update, for a non-finite loss or gradient
    overflows: int = 0  # of these, fp16 overflows that the scaler answered
    emptied: int = 0  # of these, steps of which no utterance could be read
    bad_keys: list[str] = field(default_factory=list)  # utterances that no longer decoded, each once
    evaluated_step: int = 0  # the newest step whose evaluation is in the metrics
    best: Score | None = None  # lowest score of an evaluation
    best_step: int = 0  # the step that it is of
    trained_s: float = 0.0  # wall-clock seconds in steps, over all attempts; evaluations are not in it
    epoch_utterances: int = 0  # of this epoch so far, over all ranks and attempts
    fired: dict[str, int] = field(default_factory=dict)  # of these, those that each augmentation has changed


@dataclass
class Tally:
    """What the one small all-reduce of a step carries, each number summed over the ranks."""

    loss: float = 0.0  # sum of CTC loss / target length
    utterances: float = 0.0
    samples: float = 0.0  # of audio
    computed_samples: float = 0.0  # with padding
    wait_s: float = 0.0  # for data
    rank_wait_s: float = 0.0  # for the gradients of the other ranks
    bad_samples: float = 0.0
    stops: float = 0.0  # ranks that were asked to stop
    failures: float = 0.0  # ranks that cannot go on
    fired: dict[str, float] = field(default_factory=dict)  # see MicroBatch.fired; the same names on all ranks

    def over_all_ranks(self, world: World) -> "Tally":
        numbers = [getattr(self, each.name) for each in fields(self) if each.name != "fired"]
        sums = world.sum(torch.tensor([*numbers, *self.fired.values()], dtype=torch.float64)).tolist()
        everyones = Tally(*sums[: len(numbers)])
        everyones.fired = dict(zip(self.fired, sums[len(numbers) :], strict=True))
        return everyones

    @property
    def padding(self) -> float:
        """Share of the computed samples that is padding."""
        return 1.0 - self.samples / max(self.computed_samples, 1.0)


@dataclass(frozen=True)
class Schedule:
    """At which steps what is due; the same on every rank."""

    steps_per_epoch: int
    epochs: int
    evaluate_every_steps: int
    save_every_steps: int
    save_every_s: float
    stop_at_step: int
    max_nonfinite_steps: int
    max_bad_samples: int

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def evaluation_due(self, step: int) -> bool:
        """After `step`, and in any case at the end of the run."""
        every = self.evaluate_every_steps or self.steps_per_epoch
        return step > 0 and (step % every == 0 or step == self.total_steps)

    def stops_at(self, step: int) -> bool:
        """Whether the settings want no step after `step`."""
        return 0 < self.stop_at_step <= step


@dataclass(frozen=True)
class Hooks:
    """What the loop calls; on ranks other than 0 all but `evaluate` and `dump` do nothing."""

    log: Callable[[dict[str, Any]], None]  # a train line of the metrics, or the line of an epoch
    save: Callable[[dict[str, Any], bool], None]  # (state, whether it is the best); takes a snapshot and returns
    flush: Callable[[], None]  # returns when everything saved is on the disk
    message: Callable[[str], None]
    # (step, should_stop): asks `should_stop` between rounds, on all ranks alike; None where it said yes.
    evaluate: Callable[[int, Callable[[], bool]], Evaluation | None]
    dump: Callable[[int, list[MicroBatch]], None]  # keeps a step's batches on the disk


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended, other than by an error."""

    state: str  # "done" or "stopped"
    reason: str
    retry: bool = False  # whether the same command has something left to do


class Trainer:
    """Runs steps until the end, a stop, or an error that all ranks raise together."""

    def __init__(self, world: World, learner: Learner, schedule: Schedule, hooks: Hooks, stop: StopRequest) -> None:
        self.world, self.learner, self.schedule, self.hooks, self.stop = world, learner, schedule, hooks, stop
        self.progress = Progress()
        self._failure: UserError | None = None
        self._saved_at_s = time.monotonic()
        self._saved: dict[str, Any] | None = None  # the progress in the newest checkpoint

    def run(self, batches: Iterator[MicroBatch], share_of_step: range, progress: Progress) -> Outcome:
        """Trains from `progress` on.

        Args:
            batches: this rank's micro-batches from exactly there; a batch may stand for several of a step.
            share_of_step: the numbers of the micro-batches of a step that this rank runs.

        Raises:
            UserError: on every rank, when one of them cannot go on or a limit is passed.
        """
        self.progress = progress
        self.stop.defer_to_boundary()
        if self._evaluate_if_due():  # the attempt before was stopped between a step and its evaluation
            return self._stopped()
        while progress.step < self.schedule.total_steps:
            if self.schedule.stops_at(progress.step):  # a resumed run may be there, or beyond, already
                self.stop.request(f"train.stop_at_step = {self.schedule.stop_at_step}")
                self.stop.mark_handled()
                return self._stopped()
            asked_to_stop = self._step(batches, share_of_step)
            self._save_if_due()
            if asked_to_stop or self._evaluate_if_due():
                return self._stopped()
        self._save()
        self._finish()
        return Outcome("done", f"all {counted(self.schedule.epochs, 'epoch')}")

    def _step(self, batches: Iterator[MicroBatch], share_of_step: range) -> bool:
        """One step; returns whether any rank has been asked to stop."""
        started, waited_s = time.monotonic(), self.world.watchdog.waited_s
        tally, losses, mine = Tally(), [], []
        step = self.progress.step + 1
        left = share_of_step
        while left:
            wait_from = time.monotonic()
            self.world.set_phase(step, "waiting for data")
            batch = next(batches)
            tally.wait_s += time.monotonic() - wait_from
            mine.append(batch)
            assert batch.micro_batch == left[0] and batch.micro_batches <= len(left), "the loader is at another place"
            now, left = left[: batch.micro_batches], left[batch.micro_batches :]
            which = f"micro-batch {now[0]}" if len(now) == 1 else f"micro-batches {now[0]} to {now[-1]}"
            self.world.set_phase(step, f"forward and backward of {which}")
            losses.append(self.learner.accumulate(batch, step=step, last=not left))
            self._count(batch, tally)
        per_utterance = torch.cat(losses)
        tally.loss = float(per_utterance.sum(dtype=torch.float64))
        tally.stops, tally.failures = float(self.stop.reason is not None), float(self._failure is not None)
        self.world.set_phase(step, "reducing")
        tally.rank_wait_s = self.world.watchdog.waited_s - waited_s
        everyones = tally.over_all_ranks(self.world)
        self.world.set_phase(step, "updating")
        if everyones.stops:
            self.stop.mark_handled()  # not before the reduction: a rank waits there for one that is stuck
        if everyones.failures:
            self._raise_together()
        updated, norm = self._update(step, everyones)
        if not updated:
            self._note_skipped(step, everyones, per_utterance, mine)
        self.progress.step = step
        self._note_bad_samples(mine, everyones)
        self._log(step, everyones, norm, time.monotonic() - started)
        self._note_fired(step, everyones)
        return everyones.stops > 0

    def _count(self, batch: MicroBatch, tally: Tally) -> None:
        tally.utterances += batch.utterances
        tally.samples += batch.audio_samples
        tally.computed_samples += batch.waveforms.numel()
        tally.bad_samples += len(batch.bad)
        for name, utterances in batch.fired.items():
            tally.fired[name] = tally.fired.get(name, 0.0) + utterances

    def _update(self, step: int, everyones: Tally) -> tuple[bool, float]:
        """(whether the weights were updated, the gradient's norm)."""
        if not math.isfinite(everyones.loss):  # on at least one rank
            self.learner.discard()
            return False, float("nan")
        norm, updated = self.learner.update(step, self.schedule.total_steps, everyones.utterances)
        return updated, norm

    def _note_skipped(self, step: int, everyones: Tally, losses: Tensor, mine: list[MicroBatch]) -> None:
        """Counts a step without an update, names its utterances, and ends the run at the limit; on all ranks alike."""
        self.progress.skipped += 1
        if not everyones.utterances:  # `_note_bad_samples` names them, and counts them towards its own limit
            self.progress.emptied += 1
            return
        finite_loss = math.isfinite(everyones.loss)
        # An overflow is the scaler's normal work, until it has nothing left to lower.
        if finite_loss and self.learner.scaler.is_enabled() and self.learner.scaler.get_scale() >= 1.0:
            self.progress.overflows += 1
            return
        keys = [key for batch in mine for key in batch.keys]
        if not finite_loss:
            keys = [key for key, loss in zip(keys, losses.tolist(), strict=True) if not math.isfinite(loss)]
        keys = [key for key in keys if key]  # an emptied micro-batch's stand-in has none
        named = self.world.gather_objects(keys)
        what = "loss" if not finite_loss else "gradient"
        if named is not None:
            of_all = [key for of_rank in named for key in of_rank]
            self.hooks.message(f"step {step} skipped: non-finite {what} in {', '.join(of_all)}")
        nonfinite = self.progress.skipped - self.progress.overflows - self.progress.emptied
        if nonfinite > self.schedule.max_nonfinite_steps:
            self.hooks.dump(step, mine)
            raise self.world_error(
                f"{nonfinite} steps had a non-finite loss or gradient, more than train.max_nonfinite_steps = "
                f"{self.schedule.max_nonfinite_steps}; the last one's micro-batches are kept in the run directory: "
                "lower optim.learning_rate or optim.clip_norm, or look at the utterances named in the log"
            )

    def _note_bad_samples(self, mine: list[MicroBatch], everyones: Tally) -> None:
        if not everyones.bad_samples:
            return
        everyones_bad = self.world.all_gather_objects([bad for batch in mine for bad in batch.bad])
        named = dict(bad for of_rank in everyones_bad for bad in of_rank)
        self.progress.bad_keys = sorted({*self.progress.bad_keys, *named})
        texts = [f"{key} ({reason})" for key, reason in named.items()]
        self.hooks.message(f"left out of this step, no longer readable: {', '.join(texts)}")
        if len(self.progress.bad_keys) > self.schedule.max_bad_samples:
            raise self.world_error(
                f"{len(self.progress.bad_keys)} utterances could not be read, more than data.max_bad_samples = "
                f"{self.schedule.max_bad_samples}: {CHECK_SHARDS}"
            )

    def world_error(self, text: str) -> UserError:
        """The same error on all ranks, for rank 0 to report."""
        return UserError(text) if self.world.rank == 0 else RaisedElsewhere(text)

    def _log(self, step: int, everyones: Tally, norm: float, seconds: float) -> None:
        self.progress.trained_s += seconds
        audio_s_per_s = everyones.samples / SAMPLE_RATE_HZ / seconds
        line = {
            "kind": "train",
            "step": step,
            "epoch": (step - 1) // self.schedule.steps_per_epoch + 1,
            "loss": finite(everyones.loss / max(everyones.utterances, 1.0)),
            "learning_rate": learning_rate(step, self.schedule.total_steps, self.learner.optim),
            "gradient_norm": finite(norm),
            "audio_s_per_s": audio_s_per_s,
            "process_audio_s_per_s": audio_s_per_s / self.world.world_size,
            "data_wait": everyones.wait_s / self.world.world_size / seconds,
            "rank_wait": everyones.rank_wait_s / self.world.world_size / seconds,
            "padding": everyones.padding,
            "skipped": self.progress.skipped,
            **peak_memory(self.world.device),
            "time_s": time.time(),
        }
        self.world.set_phase(step, "writing the metrics")
        self._guarded(lambda: self.hooks.log(line))

    def _note_fired(self, step: int, everyones: Tally) -> None:
        """Counts what the augmentations did to the step's utterances, and writes it at the end of each epoch."""
        progress = self.progress
        progress.epoch_utterances += int(everyones.utterances)
        for name, utterances in everyones.fired.items():
            progress.fired[name] = progress.fired.get(name, 0) + int(utterances)
        if step % self.schedule.steps_per_epoch:
            return
        line = {
            "kind": "epoch",
            "step": step,
            "epoch": step // self.schedule.steps_per_epoch,
            "utterances": progress.epoch_utterances,
            "fired": progress.fired,
            "time_s": time.time(),
        }
        self._guarded(lambda: self.hooks.log(line))
        progress.epoch_utterances, progress.fired = 0, {}

    def _evaluate_if_due(self) -> bool:
        """Evaluates after the step where that is due and still missing; returns whether a stop cut it short."""
        step = self.progress.step
        if not self.schedule.evaluation_due(step) or self.progress.evaluated_step == step:
            return False
        self.world.set_phase(step, "evaluating")
        evaluation = self.hooks.evaluate(step, self._agreed_to_stop)
        if evaluation is None:
            return True
        self.progress.evaluated_step = step
        score, best = evaluation.score, self.progress.best
        if score is not None and (best is None or score < best):
            self.progress.best, self.progress.best_step = score, step
            self._save(best=True)
        return False

    def _agreed_to_stop(self) -> bool:
        asked = self.world.any(self.stop.reason is not None)
        if asked:
            self.stop.mark_handled()
        return asked

    def _save_if_due(self) -> None:
        # Saving needs no other rank, so rank 0's clock alone may decide.
        every_steps, every_s = self.schedule.save_every_steps, self.schedule.save_every_s
        by_steps = every_steps and self.progress.step % every_steps == 0
        by_time = every_s and time.monotonic() - self._saved_at_s >= every_s
        if by_steps or by_time:
            self._save()

    def _save(self, best: bool = False) -> None:
        """Saves what the newest checkpoint does not hold already, as where a stop meets a step with a save due."""
        progress = asdict(self.progress)
        if progress == self._saved and not best:
            return
        self.world.set_phase(self.progress.step, "saving")
        if self.world.rank == 0:
            state = {**self.learner.state(), "progress": progress}
            self._guarded(lambda: self.hooks.save(state, best))
        if not best:  # a resume does not look at the best one, so it is no checkpoint of the last minutes
            self._saved, self._saved_at_s = progress, time.monotonic()

    def _stopped(self) -> Outcome:
        self._save()
        self._finish()
        reasons = self.world.gather_objects(self.stop.reason) or [self.stop.reason]
        reason = next((reason for reason in reasons if reason), "another rank was asked to stop")
        # Where it was to stop, whoever asked for it, a launcher that goes on would be here again at once.
        return Outcome("stopped", reason, retry=not self.schedule.stops_at(self.progress.step))

    def _finish(self) -> None:
        self._guarded(self.hooks.flush)
        self._raise_together()

    def _guarded(self, action: Callable[[], None]) -> None:
        """Runs what only this rank does; its error is raised on all ranks at the next boundary, not on this one now."""
        try:
            action()
        except UserError as error:
            self._failure = self._failure or error
        except OSError as error:
            self._failure = self._failure or UserError(
                f"the run directory cannot be written ({error}): free space or mend it, then start again; the run goes "
                "on from its newest checkpoint"
            )

    def _raise_together(self) -> None:
        def raise_own() -> None:
            if self._failure is not None:
                raise self._failure

        self.world.run_on_all(raise_own)


def peak_memory(device: torch.device) -> dict[str, float | None]:
    """The most memory that this process has held, in GB: on its GPU since the last call, on the host so far."""
    gpu_bytes = None
    if device.type == "cuda":
        gpu_bytes = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    host_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB
    return {"gpu_memory_gb": None if gpu_bytes is None else gpu_bytes / 1e9, "host_memory_gb": host_bytes / 1e9}
