"""An attempt at a run on one rank: its right to write into the run directory, its log, and how it ends.

attempt = Attempt(config, world)
attempt.open()                          # stop signals, lease, log; or a UserError on every rank
...                                     # session.py trains; `attempt.reached` says how far the run has come
attempt.end("done", reason, retry=False)   # status.json, what the user reads last, lease, Comet
"""

import contextlib
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from ddp_asr.config import Config
from ddp_asr.data.plan import micro_batches_of_rank
from ddp_asr.errors import UserError, counted
from ddp_asr.files import finite
from ddp_asr.ranks.world import World
from ddp_asr.runs import tracking
from ddp_asr.runs.directory import NoDirectory, RunDirectory
from ddp_asr.runs.display import percent
from ddp_asr.training.loop import Progress
from ddp_asr.training.precision import resolve
from ddp_asr.training.resume import checkpoint_was_saved


def print_at_once(text: str) -> None:
    print(text, flush=True)


@dataclass
class Reached:
    """How far the run has come: at first as the former attempt's status.json says, then as checkpoint and plan say."""

    progress: Progress = field(default_factory=Progress)  # shared with the loop, which changes it
    steps_per_epoch: int | None = None  # None until the plan is read
    former_epoch: int = 0
    total_steps: int | None = None
    checkpoint_saved: bool | None = None  # see RunDirectory.status

    @classmethod
    def by_status(cls, status: dict[str, Any], checkpoint_saved: bool | None) -> "Reached":
        best_wer = status.get("best_wer")
        progress = Progress(step=status.get("step", 0), best=None if best_wer is None else (best_wer,))
        return cls(progress, None, status.get("epoch", 0), status.get("total_steps"), checkpoint_saved)

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return self.progress.step // self.steps_per_epoch if self.steps_per_epoch else self.former_epoch

    @property
    def best_wer(self) -> float | None:
        return None if self.progress.best is None else finite(self.progress.best[0])

    def describe(self) -> str:
        """What happened in all attempts of the run."""
        parts = [f"{self.progress.trained_s / 60:.1f} min in training steps"]
        if self.progress.skipped:
            parts.append(
                f"{counted(self.progress.skipped, 'step')} skipped, {self.progress.overflows} for an fp16 overflow"
            )
        if self.progress.bad_keys:
            bad = self.progress.bad_keys
            parts.append(f"{counted(len(bad), 'utterance')} no longer readable: {', '.join(bad)}")
        return ", ".join(parts)


class Attempt:
    """An attempt at a run on this rank."""

    def __init__(self, config: Config, world: World) -> None:
        self.config = config
        self.world = world
        self.path = Path(config.run.dir) / config.run.name
        self.stop = world.watchdog.stop
        self.files: RunDirectory | NoDirectory = NoDirectory()  # `open` takes the directory on rank 0
        self.reached = Reached()
        self.has_begun = False  # whether this attempt has changed the run
        self.tracking = tracking.TrackingProcess(self.path, "off")  # until there is something to track
        self.show: Callable[[str], None] = print_at_once  # or the display's method while it is open
        self.log = logging.getLogger(f"ddp_asr.rank{world.rank}")  # without a file until `open`
        self.log.propagate = False
        self.log.setLevel(logging.INFO)
        self.log.addHandler(logging.NullHandler())
        world.watchdog.on_end, world.watchdog.on_long_wait = self._end_by_watchdog, self.log.info

    def open(self) -> None:
        """Takes the stop signals and the run directory; raises the UserError of any rank on every rank."""
        world, config = self.world, self.config
        world.set_phase(0, "taking the run directory")
        world.watchdog.watch_signals(config.distributed.stop_grace_s)
        if world.world_size > config.batch.micro_batches:
            world.run_on_all(partial(micro_batches_of_rank, config.batch.micro_batches, 0, world.world_size))
        precision = world.run_on_all(lambda: resolve(config.train.precision, world.device))
        # What `auto` stands for shapes the result: a resume on other hardware must not change it silently.
        self.config = replace(config, train=replace(config.train, precision=precision))
        world.run_on_rank_zero(self._take_directory)
        world.run_on_all(self._open_log)

    def _take_directory(self) -> None:
        self.files = RunDirectory.take(self.path, on_wait=self.message)
        former = self.files.former
        self.reached = Reached.by_status(former, checkpoint_was_saved(self.path, former))

    def _open_log(self) -> None:
        """Opens the rank's own log in the run directory: the console shows rank 0 only."""
        world = self.world
        path = self.path / f"rank-{world.rank:04d}.log"
        try:
            handler = logging.FileHandler(path, encoding="utf8")
        except OSError as error:
            raise UserError(
                f"rank {world.rank} cannot write {path} ({error.strerror}): all ranks must see the run directory"
            ) from None
        handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk is reported elsewhere
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self.log.addHandler(handler)
        self.log.info(
            f"rank {world.rank} of {world.world_size}, {socket.gethostname()}, pid {os.getpid()}, {world.device}"
        )

    def message(self, text: str) -> None:
        """Writes a sentence to the rank's log and, on rank 0, shows it to the user."""
        self.log.info(text)
        if self.world.rank == 0:
            with contextlib.suppress(OSError):  # a terminal that is gone must not end a run
                self.show(text)

    # ---- the end -------------------------------------------------------------------------------------------------

    def status(self, state: str, reason: str, *, retry: bool) -> None:
        """Writes status.json, see RunDirectory.status; on other ranks than 0 nothing."""
        self.files.status(
            state,
            reason,
            retry=retry,
            step=self.reached.progress.step,
            epoch=self.reached.epoch,
            total_steps=self.reached.total_steps,
            best_wer=self.reached.best_wer,
            checkpoint_saved=self.reached.checkpoint_saved,
        )

    def _end_by_watchdog(self, state: str, sentence: str) -> None:
        """Called by the watchdog's thread just before it ends this process."""
        self.log.info(f"{state} at step {self.reached.progress.step}: {sentence}")
        self._record_end(state, sentence, retry=True)

    def _record_end(self, state: str, reason: str, *, retry: bool) -> None:
        """Writes how the attempt ended, unless it was refused: then the status stays that of the run.

        A mistyped setting must not make a healthy run a failed one, nor anything at all a finished one.
        """
        former = self.files.former
        refused = state != "done" and former and not self.has_begun
        if refused and (not retry or former.get("state") == "done"):
            self.files.refuse(reason)
        else:
            self.status(state, reason, retry=retry)

    def end(self, state: str, reason: str, *, retry: bool) -> None:
        """Says and writes how the attempt ended, and gives the directory free; hides no error that is on its way."""
        self.stop.mark_handled()
        ended = f"{state} at step {self.reached.progress.step}: {reason}"
        if state == "failed":
            self.log.info(ended, exc_info=True)
        else:
            again = "; the same command goes on" if state == "stopped" and retry else ""
            self.message(f"{ended}{again}; {self.reached.describe()}")
        with contextlib.suppress(UserError):  # the lease may be lost, which is then the error that is reported
            self._record_end(state, reason, retry=retry)
        self.files.close()
        # Nobody waits long for Comet but a run that is done: torchrun kills a rank 30 s after its signal, and the
        # tracking process continues by itself until its own deadline.
        patience_s = {"done": tracking.CLOSE_S + 10, "stopped": 5.0}.get(state, 0.0)
        tracked = self.tracking.close(timeout_s=patience_s)
        if state != "failed" and self.tracking.to:
            self.message(tracked.summary(self.path))
        if state == "done":
            self._show_results()

    def _show_results(self) -> None:
        best, wer = self.path / "best.pt", self.reached.best_wer
        if wer is not None:
            self.message(f"best WER {percent(wer)} at step {self.reached.progress.best_step}: {best}")
            self.message(f"curves: {self.path / 'curves.png'}")
        shards = " ".join(self.config.data.test) or "SHARDS"
        self.message(f"next: ddp-asr evaluate {self.path} {shards}")
