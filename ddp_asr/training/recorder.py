"""What rank 0 records of a training: the run's files, the display, checkpoints, the tracking process.

recorder.begin()                        # what stands in the run directory before the first step
recorder.rehearsed(fused)               # what the rehearsal found
recorder.log(line)                      # after each step
recorder.save(state, best)              # a checkpoint, written in the background
recorder.evaluated(step, summary)       # after each evaluation
recorder.close()
"""

import contextlib
import json
import math
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch

from ddp_asr import SAMPLE_RATE_HZ, __version__
from ddp_asr.data.corpus import Corpus
from ddp_asr.data.loader import Recordings, Work
from ddp_asr.data.storage import CHECK_SHARDS
from ddp_asr.data.targets import explain_left_out
from ddp_asr.errors import UserError, counted
from ddp_asr.features import masks as augment
from ddp_asr.files import finite, json_lines, read_json
from ddp_asr.model import count_parameters
from ddp_asr.ranks.world import World
from ddp_asr.recognition.evaluation import Summary
from ddp_asr.runs import checkpoint, comet, plots, tracking
from ddp_asr.runs.checkout import git_checkout
from ddp_asr.runs.directory import RunDirectory, read_lines
from ddp_asr.runs.display import Display, describe_epoch
from ddp_asr.settings import describe
from ddp_asr.training.attempt import Attempt, print_at_once
from ddp_asr.training.learner import Learner
from ddp_asr.training.loop import Evaluation, Schedule


class Recorder:
    """Rank 0's record of an attempt that trains."""

    def __init__(
        self,
        attempt: Attempt,
        files: RunDirectory,
        corpus: Corpus,
        learner: Learner,
        schedule: Schedule,
        on_step: Callable[[], None],
    ) -> None:
        self._attempt, self._files = attempt, files
        self._config, self._path = attempt.config, attempt.path
        self._corpus, self._learner, self._schedule = corpus, learner, schedule
        self._fingerprint = corpus.whole.fingerprint()
        self._longest_s = int(corpus.index.samples.max()) / SAMPLE_RATE_HZ  # `transcribe` cuts recordings so long
        self._clips = {name: index.fingerprint() for name, index in corpus.clips.items()}
        self._on_step = on_step
        self._writer = checkpoint.BackgroundWriter(files.check)
        self._display = Display(schedule.total_steps, schedule.epochs, schedule.steps_per_epoch)
        attempt.show = self._display.message

    # ---- before the first step -----------------------------------------------------------------------------------

    def begin(self, comet_key: str | None, resumed: bool) -> None:
        """Writes what stands in the run directory before the first step, and starts the tracking.

        Args:
            comet_key: the experiment of the checkpoint from which the run goes on.
        """
        attempt, files, progress = self._attempt, self._files, self._attempt.reached.progress
        attempt.has_begun = True
        comet.experiment_key(self._path, known=comet_key)
        # In this order: metrics that end before the newest checkpoint would lack steps for good.
        checkpoint.set_aside_beyond(self._path, progress.step, files.check)
        files.cut_after(progress.step, progress.evaluated_step)
        files.write("config.yaml", describe(self._config))
        files.write("environment.json", json.dumps(environment(attempt.world), indent=1) + "\n")
        left_out = list(self._corpus.targets.left_out(self._corpus.whole))
        files.write("left_out.jsonl", json_lines({"key": key, "reason": reason} for key, reason in left_out))
        for name, content in self._corpus.tokeniser.files().items():
            files.write(name, content)
        draw_spectrogram(files, self._corpus, self._learner, attempt)
        attempt.status("running", f"attempt began at step {progress.step}", retry=True)
        for line in read_lines(self._path / "metrics.jsonl"):
            if line.get("kind") == "test":
                self._display.last_wer = line.get("wer")
        attempt.tracking = tracking.start(self._path, self._config.tracking.mode, self._config.tracking.to)
        self._say_what_begins(len(left_out), resumed)

    def _say_what_begins(self, left_out: int, resumed: bool) -> None:
        corpus, schedule, world = self._corpus, self._schedule, self._attempt.world
        self._attempt.message(
            f"run {self._path}: {count_parameters(self._learner.plain_model):,} parameters, {corpus.hours:.2f} h in "
            f"{len(corpus.index):,} utterances, {left_out} left out, {schedule.steps_per_epoch} steps x "
            f"{counted(schedule.epochs, 'epoch')}, {counted(world.world_size, 'process')} on {world.device.type}, "
            f"{self._config.train.precision}"
            + (f", going on from step {self._attempt.reached.progress.step}" if resumed else "")
        )
        for line in explain_left_out(corpus.targets):
            self._attempt.message(line)
        if not resumed and (advice := corpus.plan.advise()):  # a resumed run cannot follow it
            self._attempt.message(advice)

    def rehearsed(self, fused: Sequence[int]) -> None:
        """Adds to environment.json how many micro-batches each rank runs as one batch."""
        record = {**(read_json(self._path / "environment.json") or {}), "fused_micro_batches": list(fused)}
        self._files.write("environment.json", json.dumps(record, indent=1) + "\n")

    # ---- while it trains -----------------------------------------------------------------------------------------

    def log(self, line: dict[str, Any]) -> None:
        """Records a step, or the end of an epoch."""
        self._writer.raise_if_failed()
        self._files.append("metrics.jsonl", line)
        if line["kind"] == "epoch":
            for sentence in describe_epoch(line):
                self._attempt.message(sentence)
            return
        with contextlib.suppress(OSError):  # a terminal that is gone must not end a run
            self._display.train(line)
        self._on_step()

    def save(self, state: dict[str, Any], best: bool) -> None:
        """Takes a snapshot of the state and has it written in the background."""
        reached = self._attempt.reached
        facts = {
            "step": reached.progress.step,
            "epoch": reached.epoch,
            "config": asdict(self._config),
            "tokeniser": self._corpus.tokeniser.state(),
            "fingerprint": self._fingerprint,
            "longest_s": self._longest_s,
            "clips": self._clips,
            "comet_key": comet.experiment_key(self._path),
            "versions": {
                "ddp_asr": __version__,
                "torch": str(torch.__version__),
                "python": platform.python_version(),
            },
        }
        snapshot = checkpoint.snapshot({**state, **facts})
        self._files.sync()
        path = self._path / "best.pt" if best else checkpoint.step_path(self._path, reached.progress.step)
        self._writer.submit(path, snapshot, then=self._prune)
        if not best and not reached.checkpoint_saved:
            # Once in a run training waits for the disk, so that status.json never claims a checkpoint that is not
            # there: a run killed in that moment would be refused when Slurm requeues it.
            self._writer.wait()
            reached.checkpoint_saved = True
        self._attempt.status("running", "training", retry=True)

    def _prune(self) -> None:
        self._files.check()
        checkpoint.prune(self._path, self._config.train.keep_last)

    def flush(self) -> None:
        """Returns when everything saved is on the disk."""
        self._writer.wait()

    def evaluated(self, step: int, summary: Summary, utterances: int) -> Evaluation:
        """Records an evaluation on a corpus of so many utterances.

        Raises:
            UserError: too many of them could not be read.
        """
        for key, reason in summary.bad:
            self._attempt.message(f"left out of the evaluation, no longer readable: {key} ({reason})")
        if summary.is_unusable(self._config.data.max_bad_samples):
            raise UserError(
                f"only {len(summary.utterances)} of {utterances} test utterances could be read (data.max_bad_samples = "
                f"{self._config.data.max_bad_samples}): {CHECK_SHARDS}"
            )
        place = {"step": step, "epoch": (step - 1) // self._schedule.steps_per_epoch + 1}
        rates = {"wer": finite(summary.wer), "cer": finite(summary.cer)}
        line = {"kind": "test", **place, "loss": finite(summary.loss), **rates, "time_s": time.time()}
        samples = [
            {"key": each.key, "reference": each.reference, "hypothesis": each.hypothesis}
            for each in summary.utterances[: self._config.tracking.samples]
        ]
        self._files.append("metrics.jsonl", line)
        self._files.append("samples.jsonl", {**place, "samples": samples})
        self._files.produce("curves.png", lambda: plots.draw_curves(self._path))
        with contextlib.suppress(OSError):
            self._display.test(line)
        # Of equal error rates the lower loss is the better one; no loss at all is the worst.
        loss = summary.loss if math.isfinite(summary.loss) else math.inf
        return Evaluation(score=(summary.wer, loss))

    def close(self) -> None:
        """Ends the display, and returns when everything saved is on the disk; raises the error of a failed write."""
        self._display.close()
        self._attempt.show = print_at_once
        self._writer.close()


def draw_spectrogram(files: RunDirectory, corpus: Corpus, learner: Learner, attempt: Attempt) -> None:
    """Draws, once a run, what SpecAugment does to the first utterance of the plan."""
    if (files.path / "spectrogram.png").exists():
        return
    config = attempt.config
    rows = corpus.plan.epoch(0).rows[:1]
    recordings = Recordings(corpus.index, corpus.tokeniser, config, training=True, clips=corpus.clips)
    batch = recordings.micro_batch(Work(epoch=0, step=0, micro_batch=0, rows=rows)).to(attempt.world.device)
    before, _ = learner.log_mel(batch.waveforms, batch.samples)
    after = augment.apply(before, batch.masks, config.objective.views)[0] if batch.masks else before
    pictures = (before[0].cpu().numpy(), after[0].cpu().numpy())
    files.produce("spectrogram.png", lambda: plots.draw_spectrogram(files.path, batch.keys[0], *pictures))


def environment(world: World) -> dict[str, Any]:
    """What the run runs on."""
    on_gpu = world.device.type == "cuda"
    return {
        "host": socket.gethostname(),
        "command": " ".join(sys.argv),
        **git_checkout(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": str(torch.__version__),
        "ddp_asr": __version__,
        "processes": world.world_size,
        "device": torch.cuda.get_device_name(world.device) if on_gpu else platform.processor() or platform.machine(),
        "cuda": torch.version.cuda if on_gpu else None,
        "threads": torch.get_num_threads(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
    }
