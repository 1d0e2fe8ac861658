"""One attempt at a run, put together: who writes where, what to go on from, and what the loop's hooks do.

    session = Session(config, world)         # signals, lease, run directory: what must be had before anything else
    outcome = session.run(resume)            # corpus, checkpoint, learner, rehearsal, Trainer.run
    session.end(outcome.state, ...)          # status.json, curves, Comet, lease

The trainer knows no error rate and no tracker; this module gives it both.
"""

import contextlib
import json
import logging
import math
import os
import platform
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ddp_asr import __version__
from ddp_asr.config import Config, config_from_dict
from ddp_asr.data.corpus import Corpus, read_corpus
from ddp_asr.data.index import Index, read_index
from ddp_asr.data.loader import MicroBatch, Recordings, Work, eval_loader, on_device, train_loader
from ddp_asr.data.plan import share
from ddp_asr.data.storage import cache_shards
from ddp_asr.data.targets import explain_left_out
from ddp_asr.errors import UserError
from ddp_asr.features import masks as augment
from ddp_asr.features.log_mel import LogMel
from ddp_asr.files import finite, json_lines, read_json_lines
from ddp_asr.model import AcousticModel, count_parameters, make_model
from ddp_asr.objective import Objective
from ddp_asr.ranks.world import World
from ddp_asr.recognition.evaluation import gather, recognise
from ddp_asr.recognition.recogniser import Recogniser, make_recogniser
from ddp_asr.runs import checkpoint, comet, display, plots, tracking
from ddp_asr.runs.checkout import git_checkout
from ddp_asr.runs.directory import RunDirectory, read_status
from ddp_asr.runs.lease import Lease
from ddp_asr.settings import describe, differences, to_dict
from ddp_asr.text import Tokeniser, tokeniser_from_state
from ddp_asr.training.learner import Learner
from ddp_asr.training.loop import Evaluation, Hooks, Outcome, Progress, Schedule, Trainer
from ddp_asr.training.optim import WeightAverage, make_optimizer
from ddp_asr.training.precision import resolve, set_matmul_precision
from ddp_asr.training.rehearsal import fix_gradient_buckets, rehearse


class Session:
    """An attempt at a run on this rank."""

    def __init__(self, config: Config, world: World) -> None:
        self.world = world
        self.path = Path(config.run.dir) / config.run.name
        self.progress = Progress()
        self.lease: Lease | None = None
        self.files: RunDirectory | None = None  # rank 0 only
        self.show: display.Display | None = None
        self.tracking: tracking.TrackingProcess | None = None
        self.log: logging.Logger | None = None
        self.config = config
        self.former: dict[str, Any] = {}  # status.json of the attempt before; emptied when this one begins to write
        self.checkpoint_saved: bool | None = None  # see RunDirectory.status
        self.steps_per_epoch = 0  # until the plan says it
        self.total_steps: int | None = None  # as soon as the plan says it
        self.stop = world.watchdog.stop
        world.watchdog.on_end, world.watchdog.on_long_wait = self._ended_by_watchdog, self._note

    def open(self) -> None:
        """Takes the signals over, and the run directory, or raises on every rank the UserError of any."""
        world, config = self.world, self.config
        world.set_phase(0, "taking the run directory")
        world.watchdog.watch_signals(config.distributed.stop_grace_s)
        if world.world_size > config.batch.micro_batches:
            world.run_on_all(partial(share, config.batch.micro_batches, 0, world.world_size))
        precision = world.run_on_all(lambda: resolve(config.train.precision, world.device))
        # What `auto` became belongs to the result: a resume on other hardware must not change it silently.
        self.config = replace(config, train=replace(config.train, precision=precision))
        world.run_on_rank_zero(self._take_lease)
        self.log = world.run_on_all(lambda: open_rank_log(self.path, world))

    def _take_lease(self) -> None:
        job_id = os.environ.get("SLURM_JOB_ID")
        status = read_status(self.path) or {}
        if job_id is not None:
            attempt = int(os.environ.get("SLURM_RESTART_COUNT") or 0) + 1
        else:
            attempt = int(status.get("attempt", 0)) + 1
        self.lease = Lease.acquire(self.path, job_id=job_id, attempt=attempt, on_wait=self.message)
        self.lease.start_renewing()
        self.files = RunDirectory(self.path, self.lease, job_id, attempt)
        status = self.former = read_status(self.path) or {}  # again: its writer may have ended just before the lease
        # What a status says until the checkpoint and the plan are read.
        best_wer = status.get("best_wer")
        self.progress.step = int(status.get("step", 0))
        self.progress.best = None if best_wer is None else (best_wer,)
        self.total_steps = status.get("total_steps")
        self.checkpoint_saved = status.get("checkpoint_saved") if self._has_results() else False

    def message(self, text: str) -> None:
        """Notes a sentence in the rank's log and, on rank 0, shows it where the user looks."""
        if self.log is not None:
            self.log.info(text)
        if self.world.rank == 0:
            with contextlib.suppress(OSError):  # a terminal that is gone must not end a run
                if self.show is not None:
                    self.show.message(text)
                else:
                    print(text, flush=True)

    # ---- the run -------------------------------------------------------------------------------------------------

    def run(self, resume: str, on_step: Callable[[], None]) -> Outcome:
        """Trains to the end, or to a stop.

        Raises:
            UserError: on every rank alike, for whatever the user can mend.
        """
        world, config = self.world, self.config
        set_matmul_precision(config.train.precision)
        world.set_phase(0, "looking for a checkpoint")
        found = world.run_on_rank_zero(lambda: self._find(resume))
        world.set_phase(0, "reading the corpus")
        corpus, test = world.run_on_all(self._read_data)
        world.set_phase(0, "reading the checkpoint")
        state = world.run_on_all(lambda: self._read_checkpoint(found, corpus))
        self.steps_per_epoch = corpus.plan.steps_per_epoch
        schedule = make_schedule(config, corpus.plan.steps_per_epoch)
        self.total_steps = schedule.total_steps
        self.progress = self._progress(found, state)
        if self.progress.step >= schedule.total_steps and self.progress.evaluated_step == self.progress.step:
            world.run_on_rank_zero(self._finish_tracking)
            return Outcome("done", f"already finished at step {self.progress.step}")
        world.set_phase(self.progress.step, "making the model")
        learner = world.run_on_all(lambda: self._make_learner(corpus, state))
        learner.model = world.wrap(learner.model)
        world.set_phase(self.progress.step, "opening the run's files")
        world.run_on_rank_zero(lambda: self._open_files(corpus, learner, schedule, found, state))
        world.set_phase(self.progress.step, "rehearsing")
        for line in world.run_on_all(lambda: rehearse(corpus, learner)):
            self.message(f"rehearsed {line}")
        fix_gradient_buckets(corpus, learner)
        batches = train_loader(
            corpus.index,
            corpus.tokeniser,
            corpus.plan,
            config,
            rank=world.rank,
            world_size=world.world_size,
            start=divmod(self.progress.step, corpus.plan.steps_per_epoch),
        )
        hooks = self._hooks(learner, corpus, test, on_step)
        trainer = Trainer(world, learner, schedule, hooks, self.stop)
        mine = share(config.batch.micro_batches, world.rank, world.world_size)
        # Closed after an error, too, which ends the threads of the loader.
        with contextlib.closing(self._writer), contextlib.closing(on_device(batches, world.device)) as sent:
            return trainer.run(sent, mine, self.progress)

    def _read_data(self) -> tuple[Corpus, Index | None]:
        data = self.config.data
        corpus = read_corpus(self.config)
        test = read_index(data.test) if data.test else None
        if data.cache_dir:
            self.world.set_phase(0, "copying shards")
            corpus = replace(corpus, index=cache_shards(corpus.index, Path(data.cache_dir)))
            test = cache_shards(test, Path(data.cache_dir)) if test is not None else None
        return corpus, test

    # ---- what to go on from --------------------------------------------------------------------------------------

    def _find(self, resume: str) -> Path | None:
        """The checkpoint to go on from; rank 0 decides for all."""
        if resume not in ("auto", "never"):
            checkpoint.read(Path(resume))
            return Path(resume)
        found = checkpoint.newest_good(
            self.path, on_damage=lambda path, why: self.message(f"{path} is damaged ({why}): trying the one before")
        )
        if found is None:
            return self._find_without_checkpoints(resume)
        if resume == "never":
            raise UserError(
                f"{self.path} holds checkpoints, the newest of step {found.step}, and --resume never was given: choose "
                "another --run.name, or remove the directory"
            )
        self.checkpoint_saved = True
        return found.path

    def _find_without_checkpoints(self, resume: str) -> Path | None:
        """Where a run goes on whose checkpoints/ is empty or missing; refuses to train over results.

        A run that was killed before its first checkpoint must start again without a human, because Slurm requeues it.
        Its status.json says `checkpoint_saved: false`. Any other run with results has lost its checkpoints: somebody
        deleted them, or copied the directory without them.
        """
        if not self._has_results():
            return None
        best = self.path / "best.pt"
        if resume == "auto" and self.checkpoint_saved is False:
            return best if best.exists() else None  # an evaluation may come before the first checkpoint is due
        step = max((line["step"] for line in read_json_lines(self.path / "metrics.jsonl")), default=0)
        go_on = f"go on from its best one with --resume {best}, " if best.exists() else ""
        raise UserError(
            f"{self.path} holds the results of a run up to step {step} and no checkpoint in {self.path}/checkpoints: "
            f"{go_on}choose another --run.name, or remove the directory to begin anew"
        )

    def _has_results(self) -> bool:
        return (self.path / "best.pt").exists() or any(read_json_lines(self.path / "metrics.jsonl"))

    def _read_checkpoint(self, path: Path | None, corpus: Corpus) -> dict[str, Any] | None:
        """The state in `path`, after a check that it is of this very run."""
        if path is None:
            return None
        state = checkpoint.read(path)
        if not {"progress", "config", "fingerprint", "model", "optimizer"} <= state.keys():
            raise UserError(f"{path} is no checkpoint of ddp_asr.train: choose one under runs/NAME/checkpoints")
        theirs = config_from_dict(state["config"], f"the checkpoint {path}")
        for name, ours, other in differences(self.config, theirs):
            raise UserError(
                f"{path} was trained with {name} = {other!r} and this run has {ours!r}: set --{name}={_shown(other)} "
                "to go on, or choose another --run.name to begin anew"
            )
        if state["fingerprint"] != corpus.whole.fingerprint():
            raise UserError(
                f"{path} was trained on other utterances than those in {', '.join(self.config.data.train)}: name the "
                "shards it was trained on in data.train, or choose another --run.name to begin anew"
            )
        return state

    def _progress(self, path: Path | None, state: dict[str, Any] | None) -> Progress:
        if path is None or state is None:
            return Progress()
        progress = Progress(**state["progress"])
        if not self._is_own(path):  # another run's best checkpoint and evaluations are not in this directory
            progress.best, progress.evaluated_step = None, 0
        return progress

    def _is_own(self, path: Path) -> bool:
        return self.path.resolve() in path.resolve().parents

    def _make_learner(self, corpus: Corpus, state: dict[str, Any] | None) -> Learner:
        config, device = self.config, self.world.device
        # Weights are drawn on the CPU, so that they are the same wherever the run begins.
        torch.manual_seed(config.train.seed)
        model = make_model(config, corpus.tokeniser.size)
        if state is None and config.train.init_from:
            load_weights(model, Path(config.train.init_from), corpus.tokeniser)
        model = model.to(device)
        average = WeightAverage(model.parameters(), config.optim.ema_decay) if config.optim.ema_decay else None
        learner = Learner(
            world=self.world,
            model=model,
            log_mel=LogMel(config.features).to(device),
            objective=Objective(config.objective, seed=config.train.seed, frame_s=config.frame_s),
            optimizer=make_optimizer(model, config.optim),
            optim=config.optim,
            precision=config.train.precision,
            seed=config.train.seed,
            average=average,
        )
        if state is not None:
            learner.load(state)
        return learner

    # ---- files and hooks -----------------------------------------------------------------------------------------

    def _open_files(
        self,
        corpus: Corpus,
        learner: Learner,
        schedule: Schedule,
        found: Path | None,
        state: dict[str, Any] | None,
    ) -> None:
        """Rank 0: what stands in the run directory before the first step."""
        assert self.files is not None and self.lease is not None
        self.fingerprint, self.tokeniser_state = corpus.whole.fingerprint(), corpus.tokeniser.state()
        own = state is not None and found is not None and self._is_own(found)
        self.comet_key = comet.experiment_key(self.path, known=state["comet_key"] if state and own else None)
        self.former = {}  # from here on this attempt changes the run
        # In this order: metrics that end before the newest checkpoint would lack steps for good.
        checkpoint.set_aside_beyond(self.path, self.progress.step, self.lease.check)
        self.files.cut_after(self.progress.step, self.progress.evaluated_step)
        self.files.write("config.yaml", describe(self.config))
        self.files.write("environment.json", json.dumps(environment(self.world), indent=1) + "\n")
        left_out = [{"key": key, "reason": reason} for key, reason in corpus.targets.left_out(corpus.whole)]
        self.files.write("left_out.jsonl", json_lines(left_out))
        self._draw_spectrogram(corpus, learner)
        self._status("running", f"attempt began at step {self.progress.step}", retry=True)
        config = self.config
        self.show = display.Display(schedule.total_steps, config.train.epochs, schedule.steps_per_epoch)
        self.tracking = tracking.start(self.path, config.tracking.mode)
        self.message(
            f"run {self.path}: {count_parameters(learner.plain_model):,} parameters, {corpus.hours:.2f} h in "
            f"{len(corpus.index):,} utterances, {len(left_out)} left out, {schedule.steps_per_epoch} steps x "
            f"{config.train.epochs} epochs, {self.world.world_size} process(es) on {self.world.device.type}, "
            f"{config.train.precision}" + (f", going on from step {self.progress.step}" if state else "")
        )
        for line in explain_left_out(corpus.targets):
            self.message(line)

    def _draw_spectrogram(self, corpus: Corpus, learner: Learner) -> None:
        """Rank 0, once a run: what SpecAugment does to the first utterance of the plan."""
        assert self.files is not None
        if (self.path / "spectrogram.png").exists():
            return
        rows = corpus.plan.epoch(0).rows[:1]
        recordings = Recordings(corpus.index, corpus.tokeniser, self.config, training=True)
        work = Work(epoch=0, step=0, micro_batch=0, rows=rows)
        batch = recordings.micro_batch(work).to(self.world.device)
        before, _ = learner.log_mel(batch.waveforms, batch.samples)
        after = augment.apply(before, batch.masks, self.config.objective.views)[0] if batch.masks else before
        pictures = (before[0].cpu().numpy(), after[0].cpu().numpy())
        self.files.produce("spectrogram.png", lambda: plots.draw_spectrogram(self.path, batch.keys[0], *pictures))

    def _finish_tracking(self) -> None:
        """Rank 0: what Comet still lacks of a finished run whose tracking process was killed."""
        if not comet.TrackingStatus.load(self.path).finished:
            self.tracking = tracking.start(self.path, self.config.tracking.mode)

    @property
    def _writer(self) -> checkpoint.BackgroundWriter:
        if not hasattr(self, "_background"):
            self._background = checkpoint.BackgroundWriter(self._check_lease)
        return self._background

    def _check_lease(self) -> None:
        if self.lease is not None:
            self.lease.check()

    def _hooks(self, learner: Learner, corpus: Corpus, test: Index | None, on_step: Callable[[], None]) -> Hooks:
        recogniser = make_recogniser(
            self.config, corpus.tokeniser, learner.log_mel, learner.plain_model, self.config.train.precision
        )

        def log(line: dict[str, Any]) -> None:
            if self.files is None or self.show is None:
                return
            self._writer.raise_if_failed()
            self.files.append("metrics.jsonl", line)
            with contextlib.suppress(OSError):  # a terminal that is gone must not end a run
                self.show.train(line)
            on_step()

        return Hooks(
            log=log,
            save=self._save,
            flush=self._writer.wait,
            message=self.message,
            evaluate=partial(self._evaluate, learner, recogniser, test),
            dump=self._dump,
        )

    def _save(self, state: dict[str, Any], best: bool) -> None:
        """Rank 0: hands a snapshot of the run to the background writer."""
        assert self.files is not None
        state = checkpoint.snapshot(
            {
                **state,
                "step": self.progress.step,
                "epoch": self.progress.step // self.steps_per_epoch,
                "config": to_dict(self.config),
                "tokeniser": self.tokeniser_state,
                "fingerprint": self.fingerprint,
                "comet_key": self.comet_key,
                "versions": {
                    "ddp_asr": __version__,
                    "torch": str(torch.__version__),
                    "python": platform.python_version(),
                },
            }
        )
        self.files.sync()
        path = self.path / "best.pt" if best else checkpoint.step_path(self.path, self.progress.step)
        keep_last = self.config.train.keep_last
        self._writer.submit(path, state, then=lambda: self._prune(keep_last))
        if not best and not self.checkpoint_saved:
            # Once in a run training waits for the disk, so that status.json never claims a checkpoint that is not
            # there: a run killed in that moment would be refused when Slurm requeues it.
            self._writer.wait()
            self.checkpoint_saved = True
        self._status("running", "training", retry=True)

    def _prune(self, keep_last: int) -> None:
        self._check_lease()
        checkpoint.prune(self.path, keep_last)

    def _evaluate(
        self,
        learner: Learner,
        recogniser: Recogniser,
        test: Index | None,
        step: int,
        should_stop: Callable[[], bool],
    ) -> Evaluation | None:
        """One evaluation, shared over all ranks; None where `should_stop` said yes."""
        if test is None:
            return Evaluation(score=None)
        batches = eval_loader(
            test, recogniser.tokeniser, self.config, rank=self.world.rank, world_size=self.world.world_size
        )
        with learner.averaged_weights():
            results = recognise(recogniser, test, batches, should_stop)
        if results is None:
            return None
        summary = gather(self.world, results)

        def record() -> Evaluation:
            assert summary is not None and self.files is not None and self.show is not None
            for key, reason in summary.bad:
                self.message(f"left out of the evaluation, no longer readable: {key} ({reason})")
            if summary.is_unusable(self.config.data.max_bad_samples):
                raise UserError(
                    f"only {len(summary.utterances)} of {len(test)} test utterances could be read "
                    f"(data.max_bad_samples = {self.config.data.max_bad_samples}): check the shards of data.test with "
                    "'python -m ddp_asr.shard --verify --out DIR'"
                )
            epoch = (step - 1) // self.steps_per_epoch + 1
            place = {"step": step, "epoch": epoch}
            line = {"kind": "test", **place, "loss": finite(summary.loss)}
            line |= {"wer": finite(summary.wer), "cer": finite(summary.cer), "time_s": time.time()}
            self.files.append("metrics.jsonl", line)
            samples = [
                {"key": u.key, "reference": u.reference, "hypothesis": u.hypothesis}
                for u in summary.utterances[: self.config.tracking.samples]
            ]
            self.files.append("samples.jsonl", {**place, "samples": samples})
            self.files.produce("curves.png", lambda: plots.draw_curves(self.path))
            with contextlib.suppress(OSError):
                self.show.test(line)
            # Of equal error rates the lower loss is the better one; no loss at all is the worst.
            loss = summary.loss if math.isfinite(summary.loss) else math.inf
            return Evaluation(score=(summary.wer, loss))

        return self.world.run_on_rank_zero(record)

    def _dump(self, step: int, batches: list[MicroBatch]) -> None:
        path = self.path / f"nonfinite-step-{step:08d}-rank-{self.world.rank}.pt"
        try:
            torch.save([asdict(batch) for batch in batches], path)
        except (OSError, RuntimeError) as error:  # the run ends with the reason for the dump, not with this
            self.message(f"{path} could not be written: {error}")

    # ---- the end -------------------------------------------------------------------------------------------------

    def _status(self, state: str, reason: str, *, retry: bool) -> None:
        if self.files is not None:
            progress = self.progress
            # Before the plan is read, step and epoch are those of the attempt before.
            epoch = progress.step // self.steps_per_epoch if self.steps_per_epoch else self.former.get("epoch", 0)
            self.files.status(
                state,
                reason,
                retry=retry,
                step=progress.step,
                epoch=epoch,
                total_steps=self.total_steps,
                best_wer=None if progress.best is None else finite(progress.best[0]),
                checkpoint_saved=self.checkpoint_saved,
            )

    def _account(self) -> str:
        """What a run that ends has to tell of all its attempts."""
        progress = self.progress
        told = [f"{progress.trained_s / 60:.1f} min in training steps"]
        if progress.skipped:
            told.append(f"{progress.skipped} step(s) skipped, {progress.overflows} of them for an fp16 overflow")
        if progress.bad_keys:
            told.append(f"{len(progress.bad_keys)} utterance(s) no longer readable: {', '.join(progress.bad_keys)}")
        return ", ".join(told)

    def _ended_by_watchdog(self, state: str, sentence: str) -> None:
        """Called by the watchdog's thread just before it ends this process."""
        self._note(sentence)
        self._status(state, sentence, retry=True)

    def _note(self, words: str) -> None:
        if self.log is not None:
            self.log.info(words)

    def end(self, state: str, reason: str, *, retry: bool) -> None:
        """Closes what is open, says how the attempt ended and gives the directory free; never hides an error."""
        self.stop.mark_handled()
        failed = state == "failed"
        if not failed:
            self.message(f"{state} at step {self.progress.step}: {reason}; {self._account()}")
        elif self.log is not None:
            self.log.info(f"failed at step {self.progress.step}: {reason}", exc_info=True)
        if self.files is None or self.lease is None:
            return
        with contextlib.suppress(UserError):  # the lease may be lost, which is then the error that is being reported
            if failed and not retry and self.former.get("state") in ("done", "stopped"):
                self.files.refuse(self.former, reason)  # a mistyped setting does not make a finished run a failed one
            else:
                self._status(state, reason, retry=retry)
        if self.show is not None:
            self.show.close()
            self.show = None
        self.files.close()
        self.lease.release()
        if self.tracking is not None:
            # Nobody waits long for Comet but a run that is done: torchrun kills a rank 30 s after its signal, and the
            # tracking process continues by itself until its own deadline.
            patience_s = {"done": tracking.CLOSE_S + 10, "stopped": 5.0}.get(state, 0.0)
            report = self.tracking.close(timeout_s=patience_s)
            if not failed:
                self.message(report.summary(self.path))


def open_rank_log(run_directory: Path, world: World) -> logging.Logger:
    """The rank's own log in the run directory, for what the console of one rank out of many does not show."""
    path = run_directory / f"rank-{world.rank:04d}.log"
    try:
        handler = logging.FileHandler(path, encoding="utf8")
    except OSError as error:
        raise UserError(
            f"rank {world.rank} cannot write {path} ({error.strerror}): all ranks must see the run directory"
        ) from None
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk: the run's files say so
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log = logging.getLogger(f"ddp_asr.rank{world.rank}")
    log.propagate = False
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    log.info(f"rank {world.rank} of {world.world_size}, {socket.gethostname()}, pid {os.getpid()}, {world.device}")
    return log


def make_schedule(config: Config, steps_per_epoch: int) -> Schedule:
    """What is due when, from the settings."""
    train = config.train
    return Schedule(
        steps_per_epoch=steps_per_epoch,
        epochs=train.epochs,
        evaluate_every_steps=train.eval_every_steps,
        save_every_steps=train.save_every_steps,
        save_every_s=60 * train.save_every_min,
        stop_at_step=train.stop_at_step,
        max_nonfinite_steps=train.max_nonfinite_steps,
        max_bad_samples=config.data.max_bad_samples,
    )


def load_weights(model: AcousticModel, path: Path, tokeniser: Tokeniser) -> None:
    """Starts from the weights (the moving average, where there is one) of another run's checkpoint."""
    state = checkpoint.read(path)
    if not {"tokeniser", "model", "averages"} <= state.keys():
        raise UserError(f"train.init_from = {path} is no checkpoint of ddp_asr.train: choose one under runs/NAME")
    theirs = tokeniser_from_state(state["tokeniser"])
    if list(theirs.symbols) != list(tokeniser.symbols):
        raise UserError(
            f"train.init_from = {path} writes the symbols {theirs.symbols!r} and this run has "
            f"{tokeniser.symbols!r}: set --vocabulary.symbols to the former"
        )
    try:
        model.load_state_dict({**state["model"], **(state["averages"] or {})})
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise UserError(
            f"train.init_from = {path} is of another model ({first}): take over its encoder settings"
        ) from None


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


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
