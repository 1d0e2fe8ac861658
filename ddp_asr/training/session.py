"""A training put together: what to go on from, corpus, learner, rehearsal, hooks, `Trainer.run`.

    attempt = Attempt(config, world)
    attempt.open()
    outcome = run(attempt, resume, on_step)
    attempt.end(outcome.state, ...)

What a run goes on from is decided in resume.py, what rank 0 writes is in recorder.py, and how an attempt ends in
attempt.py.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from ddp_asr.config import Config
from ddp_asr.data.corpus import Corpus, new_tokeniser, read_corpus
from ddp_asr.data.index import Index, read_index
from ddp_asr.data.loader import MicroBatch, eval_loader, on_device, train_loader
from ddp_asr.data.plan import micro_batches_of_rank
from ddp_asr.data.storage import cache_shards
from ddp_asr.decoding import Decoder, make_decoder
from ddp_asr.errors import UserError, counted
from ddp_asr.features.log_mel import LogMel
from ddp_asr.model import AcousticModel, count_parameters, make_model
from ddp_asr.objective import Objective
from ddp_asr.ranks.world import World
from ddp_asr.recognition.evaluation import gather, recognise
from ddp_asr.recognition.recogniser import Recogniser
from ddp_asr.runs import checkpoint, comet, tracking
from ddp_asr.runs.directory import RunDirectory
from ddp_asr.text import Tokeniser, tokeniser_from_state
from ddp_asr.training.attempt import Attempt, Reached
from ddp_asr.training.first_weights import take_weights
from ddp_asr.training.learner import Learner
from ddp_asr.training.loop import Evaluation, Hooks, Outcome, Schedule, Trainer
from ddp_asr.training.optim import WeightAverage, make_optimizer
from ddp_asr.training.precision import set_matmul_precision
from ddp_asr.training.recorder import Recorder
from ddp_asr.training.rehearsal import fix_gradient_buckets, is_out_of_memory, rehearse, sizes_to_try
from ddp_asr.training.resume import find_checkpoint, is_of_run, make_progress, read_state, require_same_corpus


def run(attempt: Attempt, resume: str, on_step: Callable[[], None]) -> Outcome:
    """Trains to the end, or to a stop.

    Raises:
        UserError: on every rank alike, for whatever the user can mend.
    """
    world, config, reached = attempt.world, attempt.config, attempt.reached
    set_matmul_precision(config.train.precision)
    world.set_phase(0, "looking for a checkpoint")
    found = world.run_on_rank_zero(
        lambda: find_checkpoint(
            attempt.path, resume, reached.checkpoint_saved, attempt.message, requeued=attempt.files.requeued
        )
    )
    world.set_phase(0, "reading the checkpoint")
    state = world.run_on_all(lambda: read_state(found, config))
    world.set_phase(0, "making the tokeniser")
    # A run that goes on has that of its checkpoint. Another is made once for all ranks, because it may be learnt.
    written = state["tokeniser"] if state else world.run_on_rank_zero(lambda: new_tokeniser(config).state())
    world.set_phase(0, "reading the corpus")
    corpus, test = world.run_on_all(lambda: _read_data(config, world, tokeniser_from_state(written)))
    world.run_on_all(lambda: require_same_corpus(found, state, config, corpus.whole, corpus.clips))
    schedule = make_schedule(config, corpus.plan.steps_per_epoch)
    progress = make_progress(found, state, attempt.path)
    attempt.reached = Reached(
        progress,
        schedule.steps_per_epoch,
        total_steps=schedule.total_steps,
        checkpoint_saved=True if checkpoint.numbered(attempt.path) else reached.checkpoint_saved,
    )
    if progress.step >= schedule.total_steps and progress.evaluated_step == progress.step:
        world.run_on_rank_zero(lambda: _finish_tracking(attempt))
        return Outcome("done", f"already finished at step {progress.step}")
    world.set_phase(progress.step, "making the decoder")
    decoder = world.run_on_all(lambda: make_decoder(config.decoder, corpus.tokeniser, config.frame_s))
    world.set_phase(progress.step, "making the model")
    learner = world.run_on_all(lambda: make_learner(config, world, corpus, state, attempt.message))
    learner.model = world.wrap(learner.model)
    own = found is not None and is_of_run(found, attempt.path)
    comet_key = state["comet_key"] if state and own else None
    with _recording(attempt, corpus, learner, schedule, on_step) as recorder:
        world.set_phase(progress.step, "opening the run's files")
        world.run_on_rank_zero(lambda: recorder.begin(comet_key, resumed=state is not None) if recorder else None)
        return _train(attempt, corpus, test, learner, decoder, schedule, recorder)


def _train(
    attempt: Attempt,
    corpus: Corpus,
    test: Index | None,
    learner: Learner,
    decoder: Decoder,
    schedule: Schedule,
    recorder: Recorder | None,
) -> Outcome:
    world, config, progress = attempt.world, attempt.config, attempt.reached.progress
    mine = micro_batches_of_rank(config.batch.micro_batches, world.rank, world.world_size)
    fuse = _rehearse(attempt, corpus, learner, recorder, len(mine))
    fix_gradient_buckets(corpus, learner)
    batches = train_loader(
        corpus.index,
        corpus.tokeniser,
        corpus.plan,
        config,
        rank=world.rank,
        world_size=world.world_size,
        start=divmod(progress.step, corpus.plan.steps_per_epoch),
        fuse=fuse,
        clips=corpus.clips,
    )
    hooks = _hooks(attempt, corpus, test, learner, decoder, recorder)
    trainer = Trainer(world, learner, schedule, hooks, attempt.stop)
    # Closed after an error, too, which ends the threads of the loader.
    with contextlib.closing(on_device(batches, world.device)) as sent:
        return trainer.run(sent, mine, progress)


def _rehearse(attempt: Attempt, corpus: Corpus, learner: Learner, recorder: Recorder | None, micro_batches: int) -> int:
    """How many of its micro-batches of a step this rank runs as one batch; says and records it for all ranks."""
    world = attempt.world
    world.set_phase(attempt.reached.progress.step, "rehearsing")
    sizes = sizes_to_try(attempt.config.train.fuse_micro_batches, micro_batches, world.device)
    rehearsed = world.run_on_all(lambda: rehearse(corpus, learner, sizes))
    for line in rehearsed.lines:
        attempt.message(f"rehearsed {line}")
    everyones = world.all_gather_objects((rehearsed.fuse, rehearsed.peak_bytes))
    fused, peaks_bytes = zip(*everyones, strict=True)
    ranks = ", ".join(f"{number} on {counted(fused.count(number), 'rank')}" for number in sorted(set(fused)))
    memory = f"; at most {max(peaks_bytes) / 2**30:.1f} GiB of a GPU" if any(peaks_bytes) else ""
    attempt.message(f"micro-batches that run as one batch: {ranks}{memory}")
    world.run_on_rank_zero(lambda: recorder.rehearsed(fused) if recorder else None)
    return rehearsed.fuse


def _read_data(config: Config, world: World, tokeniser: Tokeniser) -> tuple[Corpus, Index | None]:
    data = config.data
    corpus = read_corpus(config, tokeniser)
    test = read_index(data.test) if data.test else None
    if data.cache_dir:
        world.set_phase(0, "copying shards")
        cache = partial(cache_shards, cache_dir=data.cache_dir, limit_bytes=data.cache_gb * 1e9 or math.inf)
        corpus = replace(corpus, index=cache(corpus.index))
        corpus = replace(corpus, clips={name: cache(index) for name, index in corpus.clips.items()})
        test = cache(test) if test is not None else None
    return corpus, test


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


def _finish_tracking(attempt: Attempt) -> None:
    """Sends what a tracker still lacks of a finished run whose tracking process was killed."""
    if not comet.TrackingStatus.load(attempt.path).finished:
        settings = attempt.config.tracking
        attempt.tracking = tracking.start(attempt.path, settings.mode, settings.to)


def make_learner(
    config: Config,
    world: World,
    corpus: Corpus,
    state: dict[str, Any] | None,
    message: Callable[[str], None] = lambda line: None,
) -> Learner:
    """The learner of a run, with the weights of a checkpoint, of `train.init_from` or of the seed.

    Args:
        message: is told what was taken from `train.init_from`.
    """
    # Weights are drawn on the CPU, so that they are the same wherever the run begins.
    torch.manual_seed(config.train.seed)
    # On a CPU beside the weights their gradients and AdamW's two moments.
    model = make_model(config, corpus.tokeniser.size, copies=4 if world.device.type == "cpu" else 1)
    if state is None and config.train.init_from:
        for line in take_weights(model, config, corpus.tokeniser):
            message(line)
    try:
        learner = _on_device(model, config, world)
        if state is not None:
            learner.load(state)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"{world.device} of rank {world.rank} has too little free memory for the {count_parameters(model):,} "
            "parameters of the model, their gradients and the optimiser's state: lower the sizes in encoder, or end "
            "what else runs there (see nvidia-smi)"
        ) from None
    return learner


def _on_device(model: AcousticModel, config: Config, world: World) -> Learner:
    model = model.to(world.device)
    average = WeightAverage(model.parameters(), config.optim.ema_decay) if config.optim.ema_decay else None
    return Learner(
        world=world,
        model=model,
        log_mel=LogMel(config.features).to(world.device),
        objective=Objective(config.objective, seed=config.train.seed, frame_s=config.frame_s),
        optimizer=make_optimizer(model, config.optim),
        optim=config.optim,
        precision=config.train.precision,
        average=average,
    )


# ---- what the loop calls -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _recording(
    attempt: Attempt, corpus: Corpus, learner: Learner, schedule: Schedule, on_step: Callable[[], None]
) -> Iterator[Recorder | None]:
    """The recorder on rank 0, closed at the end; None on the other ranks."""
    if not isinstance(attempt.files, RunDirectory):
        yield None
        return
    with contextlib.closing(Recorder(attempt, attempt.files, corpus, learner, schedule, on_step)) as recorder:
        yield recorder


def _hooks(
    attempt: Attempt,
    corpus: Corpus,
    test: Index | None,
    learner: Learner,
    decoder: Decoder,
    recorder: Recorder | None,
) -> Hooks:
    config, world = attempt.config, attempt.world
    recogniser = Recogniser(
        config=config,
        tokeniser=corpus.tokeniser,
        log_mel=learner.log_mel,
        model=learner.plain_model,
        decoder=decoder,
        device=world.device,
        precision=config.train.precision,
    )

    def evaluate(step: int, should_stop: Callable[[], bool]) -> Evaluation | None:
        """One evaluation, shared over all ranks; None where `should_stop` said yes."""
        if test is None:
            return Evaluation(score=None)
        batches = eval_loader(test, corpus.tokeniser, config, rank=world.rank, world_size=world.world_size)
        with learner.averaged_weights():
            results = recognise(recogniser, test, batches, should_stop)
        if results is None:
            return None
        summary = gather(world, results)

        def record() -> Evaluation:
            assert recorder is not None and summary is not None, "they are on rank 0"
            return recorder.evaluated(step, summary, len(test))

        return world.run_on_rank_zero(record)

    def nothing(*arguments: object) -> None:
        """On the other ranks."""

    return Hooks(
        log=recorder.log if recorder else nothing,
        save=recorder.save if recorder else nothing,
        flush=recorder.flush if recorder else nothing,
        message=attempt.message,
        evaluate=evaluate,
        dump=partial(_dump, attempt),
    )


def _dump(attempt: Attempt, step: int, batches: list[MicroBatch]) -> None:
    path = attempt.path / f"nonfinite-step-{step:08d}-rank-{attempt.world.rank}.pt"
    try:
        torch.save([asdict(batch) for batch in batches], path)
    except (OSError, RuntimeError) as error:  # the run ends with the reason for the dump, not with this
        attempt.message(f"{path} could not be written: {error}")
