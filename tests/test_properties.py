"""Properties 1, 2, 5 and 6 (docs/architecture.md) on one to four real processes: the same training for any number."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch

from ddp_asr.config import load_config
from ddp_asr.data.corpus import read_corpus
from ddp_asr.data.index import Index
from ddp_asr.data.loader import train_loader
from ddp_asr.encoders import ENCODERS
from ddp_asr.features.log_mel import LogMel
from ddp_asr.model import make_model
from ddp_asr.objective import Objective
from ddp_asr.ranks.world import World
from ddp_asr.runs import checkpoint
from ddp_asr.text import TOKENISERS
from ddp_asr.training.learner import Learner
from ddp_asr.training.optim import make_optimizer
from tests import tiny_training as tiny

WORLD_SIZES = (1, 2, 3, 4)
EPOCHS = 13
STEPS = EPOCHS * tiny.STEPS_PER_EPOCH  # 52
TOLERANCE = {"float32": 1e-4, "float64": 1e-9}


@pytest.fixture(scope="module", params=list(TOLERANCE))
def runs(request, tmp_path_factory, tiny_corpus) -> tuple[Path, str]:
    """The same 52 steps on 1, 2, 3 and 4 processes, each with what its ranks were given; and the type they ran in."""
    directory = tmp_path_factory.mktemp(request.param)
    for processes in WORLD_SIZES:
        (directory / f"given-{processes}").mkdir()
        patches: list[tiny.Patch] = [partial(tiny.writing_down, directory / f"given-{processes}")]
        patches += [tiny.in_double] if request.param == "float64" else []
        options = (f"--train.epochs={EPOCHS}", "--train.eval_every_steps=26", "--train.save_every_steps=26")
        tiny.train(tiny_corpus.arguments(directory, f"w{processes}", *options), processes, patches)
    return directory, request.param


def given(directory: Path, processes: int) -> list[dict]:
    files = (directory / f"given-{processes}").iterdir()
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("processes", WORLD_SIZES)
def test_every_utterance_is_trained_once_an_epoch(runs, processes):
    directory, _ = runs
    lines = given(directory, processes)
    positions = sorted((line["step"], line["micro_batch"]) for line in lines)
    assert positions == [(step, k) for step in range(1, STEPS + 1) for k in range(4)]
    for epoch in range(EPOCHS):
        keys = [key for line in lines if (line["step"] - 1) // tiny.STEPS_PER_EPOCH == epoch for key in line["keys"]]
        assert sorted(keys) == [f"train-{number:02d}" for number in range(26)]


@pytest.mark.slow
@pytest.mark.parametrize("processes", WORLD_SIZES[1:])
def test_the_number_of_processes_changes_nothing(runs, processes):
    directory, dtype = runs
    alone, together = directory / "w1", directory / f"w{processes}"
    assert tiny.final_state(alone, STEPS)["model"]["encoder.bridge.weight"].dtype == getattr(torch, dtype)
    tiny.assert_close_runs(together, alone, TOLERANCE[dtype], STEPS)


@pytest.mark.slow
def test_the_runs_did_learn_and_were_random(runs):
    """Else the agreement above would say little."""
    directory, _ = runs
    losses = [line["loss"] for line in tiny.metrics(directory / "w1") if line["kind"] == "train"]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    assert tiny.final_state(directory / "w1", STEPS)["average_updates"] == STEPS
    rates = [line["learning_rate"] for line in tiny.metrics(directory / "w1") if line["kind"] == "train"]
    assert max(rates) == pytest.approx(3e-3, rel=0.05) and rates[-1] == pytest.approx(3e-3 / 25 / 1e4)
    orders = [[line["keys"] for line in given(directory, 1) if line["step"] == step] for step in (1, 5, 9)]
    assert orders[0] != orders[1] != orders[2]


# ---- properties 1 to 3 of every kind ---------------------------------------------------------------------------------
# Properties 4 and 5 of every encoder are in tests/test_encoders.py and below, in one process.


# Every encoder spells characters, and every other tokeniser is that of the first encoder.
KINDS = [(encoder, "characters") for encoder in ENCODERS]
KINDS += [(next(iter(ENCODERS)), tokeniser) for tokeniser in TOKENISERS if tokeniser != "characters"]


@pytest.fixture(scope="module", params=KINDS, ids="-".join)
def trained(request, tmp_path_factory, tiny_corpus) -> tuple[Path, Callable[..., list[str]]]:
    """12 steps in float64 with every term of the objective on 1 to 4 processes; and the arguments of such a run."""
    encoder, tokeniser = request.param
    directory = tmp_path_factory.mktemp(f"{encoder}-{tokeniser}")

    def arguments(name: str, *more: str) -> list[str]:
        return tiny_corpus.arguments(directory, name, *tiny.VOCABULARIES[tokeniser], *more, kind=encoder)

    for processes in WORLD_SIZES:
        (directory / f"given-{processes}").mkdir()
        patches: list[tiny.Patch] = [tiny.in_double, partial(tiny.writing_down, directory / f"given-{processes}")]
        tiny.train(arguments(f"w{processes}", *tiny.OBJECTIVES["all of it"]), processes, patches)
    return directory, arguments


@pytest.mark.slow
def test_every_kind_is_trained_on_each_utterance_once_an_epoch(trained):
    for processes in WORLD_SIZES:
        lines = given(trained[0], processes)
        for epoch in range(tiny.STEPS // tiny.STEPS_PER_EPOCH):
            keys = [
                key for line in lines if (line["step"] - 1) // tiny.STEPS_PER_EPOCH == epoch for key in line["keys"]
            ]
            assert sorted(keys) == [f"train-{number:02d}" for number in range(26)]


@pytest.mark.slow
def test_every_kind_is_the_same_on_any_number_of_processes(trained):
    directory, arguments = trained
    for processes in WORLD_SIZES[1:]:
        tiny.assert_close_runs(directory / f"w{processes}", directory / "w1", TOLERANCE["float64"])

    once = (tiny.SHORT_CONTEXT, tiny.INTERMEDIATE, "--objective.consistency_weight=0.6", "--train.stop_at_step=1")
    tiny.train(arguments("stronger", *once), patches=[tiny.in_double])
    first, stronger = (tiny.metrics(directory / name)[0]["loss"] for name in ("w1", "stronger"))
    assert stronger > first  # the same weights and views, and twice the pull


@pytest.mark.slow
def test_a_stop_is_invisible_in_every_kind(trained):
    """Bit for bit, in the middle of an epoch."""
    directory, arguments = trained
    for stop in (6, 0):
        options = (*tiny.OBJECTIVES["all of it"], f"--train.stop_at_step={stop}")
        tiny.train(arguments("stopped", *options), 2, [tiny.in_double])
    tiny.assert_same_run(directory / "stopped", directory / "w2")


# ---- property 2 with fused micro-batches -----------------------------------------------------------------------------

# (type, processes, train.fuse_micro_batches): with K = 4 all pairs of 1 to 4 that differ from one at a time. Each of
# two processes has two micro-batches, the last of three has two and the others one, and each of four has one.
FUSED = [("float64", processes, fuse) for processes, fuse in ((1, 2), (1, 3), (1, 4), (2, 2), (3, 2))]
FUSED += [("float32", 1, 4), ("float32", 3, 2)]


def fused(fuse: int) -> str:
    return f"--train.fuse_micro_batches={fuse}"


@pytest.fixture(scope="module")
def one_at_a_time(tmp_path_factory, tiny_corpus) -> Callable[[str], tuple[Path, list[tiny.Patch]]]:
    """For a type: the directory of runs in it, with the one to compare with, and the patches for the type."""

    @cache
    def in_type(dtype: str) -> tuple[Path, list[tiny.Patch]]:
        directory = tmp_path_factory.mktemp(f"fused-{dtype}")
        patches: list[tiny.Patch] = [tiny.in_double] if dtype == "float64" else []
        tiny.train(tiny_corpus.arguments(directory, "one", fused(1)), 1, patches)
        return directory, patches

    return in_type


@pytest.mark.slow
@pytest.mark.parametrize("dtype, processes, fuse", FUSED)
def test_how_many_micro_batches_run_as_one_changes_nothing(one_at_a_time, tiny_corpus, dtype, processes, fuse):
    directory, patches = one_at_a_time(dtype)
    name, written = f"w{processes}-{fuse}", directory / f"given-{processes}-{fuse}"
    written.mkdir()
    patches = [*patches, partial(tiny.writing_down, written)]
    output = tiny.train(tiny_corpus.arguments(directory, name, fused(fuse)), processes, patches)
    tiny.assert_close_runs(directory / name, directory / "one", TOLERANCE[dtype], ignored=("padding",))
    shares = {1: [4], 2: [2, 2], 3: [1, 1, 2]}[processes]
    assert f"micro-batches that run as one batch: {min(fuse, shares[0])} on " in output
    assert tiny.environment(directory / name)["fused_micro_batches"] == [min(fuse, share) for share in shares]
    batches = [line for file in written.iterdir() for line in file.read_text().splitlines()]
    assert len(batches) == tiny.STEPS * sum(-(-share // fuse) for share in shares) < 4 * tiny.STEPS
    one, other = (outline(checkpoint.read(checkpoint.step_path(directory / run, tiny.STEPS))) for run in ("one", name))
    assert one == other


def outline(value):
    """A checkpoint without numbers that are only alike, and without the names of run and setting."""
    if isinstance(value, dict):
        free = ("name", "fuse_micro_batches", "comet_key", "best", "trained_s")
        return {key: outline(part) for key, part in value.items() if key not in free}
    return (value.dtype, value.shape) if isinstance(value, torch.Tensor) else value


@pytest.mark.slow
def test_ranks_may_run_different_numbers_as_one(one_at_a_time, tiny_corpus):
    directory, patches = one_at_a_time("float64")
    arguments = tiny_corpus.arguments(directory, "uneven", fused(0))
    tiny.train(arguments, 2, [*patches, fusing_on_the_second_rank])
    assert tiny.environment(directory / "uneven")["fused_micro_batches"] == [1, 2]
    tiny.assert_close_runs(directory / "uneven", directory / "one", TOLERANCE["float64"], ignored=("padding",))


def fusing_on_the_second_rank() -> None:
    """As where one GPU has more free memory than another."""
    from ddp_asr.training import session

    session.sizes_to_try = lambda setting, micro_batches, device: [2 if os.environ["RANK"] == "1" else 1]


@pytest.mark.slow
def test_a_stop_may_change_how_many_run_as_one(one_at_a_time, tiny_corpus):
    """And the number of processes with it; stopped in the middle of an epoch."""
    directory, patches = one_at_a_time("float64")
    for processes, fuse, stop in ((2, 2, 6), (3, 1, 9), (1, 4, 0)):
        arguments = tiny_corpus.arguments(directory, "stopped", fused(fuse), f"--train.stop_at_step={stop}")
        tiny.train(arguments, processes, patches)
    tiny.assert_close_runs(directory / "stopped", directory / "one", TOLERANCE["float64"], ignored=("padding",))


# ---- property 5 ----------------------------------------------------------------------------------------------------


@pytest.fixture
def double():
    """float64 for whatever casts to nothing else."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def step_of(tiny_corpus, *options, kind=None, index_of=lambda index: index, fuse=1):
    """A learner, and a step of four micro-batches of which some have an utterance more."""
    path, *overrides = tiny_corpus.arguments(Path("runs"), "run", *options, kind=kind)[1:]
    config = load_config(Path(path), overrides)
    corpus = read_corpus(config)
    torch.manual_seed(0)
    model = make_model(config, corpus.tokeniser.size)
    learner = Learner(
        world=World(0, 1, 0, torch.device("cpu")),
        model=model,
        log_mel=LogMel(config.features),
        objective=Objective(config.objective, seed=0, frame_s=config.frame_s),
        optimizer=make_optimizer(model, config.optim),
        optim=config.optim,
        precision="fp32",
    )
    sizes = np.diff(corpus.plan.epoch(0).bounds).reshape(-1, 4)
    step = next(step for step, of_step in enumerate(sizes) if len(set(of_step)) > 1)
    place = {"rank": 0, "world_size": 1, "start": (0, step), "fuse": fuse}
    loader = train_loader(index_of(corpus.index), corpus.tokeniser, corpus.plan, config, **place)
    return learner, [next(loader) for _ in range(0, 4, fuse)]


def by_micro_batches(learner, batches):
    """Loss and gradients of a step as the trainer takes them."""
    losses = [learner.accumulate(batch, step=1, last=k == len(batches) - 1) for k, batch in enumerate(batches)]
    utterances = sum(batch.utterances for batch in batches)
    gradients = [parameter.grad / utterances for parameter in learner.model.parameters()]
    learner.discard()
    return float(torch.cat(losses).sum()) / utterances, gradients


def joined(batches):
    """One micro-batch of all utterances of several, padded to the longest."""

    def rows(name):
        parts = [getattr(batch, name) for batch in batches]
        longest = max(part.shape[-1] for part in parts)
        return torch.cat([torch.nn.functional.pad(part, (0, longest - part.shape[-1])) for part in parts])

    def numbers(name):
        return torch.cat([getattr(batch, name) for batch in batches])

    return replace(
        batches[0],
        **{name: rows(name) for name in ("waveforms", "targets")},
        **{name: numbers(name) for name in ("samples", "target_lengths", "weight", "rows", "dropout_seeds")},
        masks={name: torch.cat([batch.masks[name] for batch in batches]) for name in batches[0].masks},
    )


def alone(batch):
    """A micro-batch for each utterance of another, without padding."""

    def one(row):
        samples, length = int(batch.samples[row]), int(batch.target_lengths[row])
        names = ("samples", "target_lengths", "weight", "rows", "dropout_seeds")
        tensors = {name: getattr(batch, name)[row : row + 1] for name in names}
        masks = {name: spans[row : row + 1] for name, spans in batch.masks.items()}
        waveforms, targets = batch.waveforms[row : row + 1, :samples], batch.targets[row : row + 1, :length]
        return replace(batch, waveforms=waveforms, targets=targets, masks=masks, **tensors)

    return [one(row) for row in range(batch.utterances)]


def in_one_batch(learner, batches):
    """Loss and gradients of one plain batch of the same utterances, by the objective itself: the mean of its losses."""
    loss = learner.losses(joined([batch for batch in batches if batch.utterances]), step=1).mean()
    return float(loss.detach()), list(torch.autograd.grad(loss, list(learner.model.parameters())))


def one_by_one(learner, batches):
    """Loss and gradients of the same utterances, each in a batch of its own."""
    loss = torch.cat([learner.losses(one, step=1) for batch in batches for one in alone(batch)]).mean()
    return float(loss.detach()), list(torch.autograd.grad(loss, list(learner.model.parameters())))


def assert_equal_steps(ours, plain):
    assert ours[0] == pytest.approx(plain[0], rel=1e-12)
    whole = sum(float(gradient.square().sum()) for gradient in plain[1]) ** 0.5
    apart = sum(float((a - b).square().sum()) for a, b in zip(ours[1], plain[1], strict=True)) ** 0.5
    assert whole > 0.1 and apart < 1e-10 * whole


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("options", tiny.OBJECTIVES.values(), ids=tiny.OBJECTIVES)
def test_loss_and_gradient_of_uneven_micro_batches_are_those_of_one_batch_and_of_each_alone(
    tiny_corpus, double, options, kind
):
    learner, batches = step_of(tiny_corpus, *options, kind=kind)
    assert len({batch.utterances for batch in batches}) > 1 and batches[0].masks["time"].any()
    assert batches[0].masks["time"].shape[1] == 2 * learner.objective.views  # the tiny corpus has two time masks
    ours = by_micro_batches(learner, batches)
    assert_equal_steps(ours, in_one_batch(learner, batches))
    assert_equal_steps(ours, one_by_one(learner, batches))


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("fuse", [2, 3, 4])
def test_loss_and_gradient_of_a_step_are_the_same_however_many_micro_batches_run_as_one(
    tiny_corpus, double, fuse, kind
):
    learner, batches = step_of(tiny_corpus, *tiny.OBJECTIVES["all of it"], kind=kind)
    _, fused = step_of(tiny_corpus, *tiny.OBJECTIVES["all of it"], kind=kind, fuse=fuse)
    assert [batch.micro_batches for batch in fused] == {2: [2, 2], 3: [3, 1], 4: [4]}[fuse]
    assert_equal_steps(by_micro_batches(learner, fused), by_micro_batches(learner, batches))


def test_each_term_of_the_objective_changes_the_loss(tiny_corpus, double):
    losses = {name: by_micro_batches(*step_of(tiny_corpus, *options))[0] for name, options in tiny.OBJECTIVES.items()}
    assert len({round(loss, 6) for loss in losses.values()}) == len(tiny.OBJECTIVES), losses


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_views_of_an_utterance_drop_out_differently(tiny_corpus, double, kind):
    """Else views without masks would agree, and the weight of their divergence would change nothing."""
    unmasked = ("--augment.time_masks=0", "--augment.frequency_masks=0", "--encoder.dropout=0.2")
    weak, strong = (
        by_micro_batches(*step_of(tiny_corpus, *unmasked, f"--objective.consistency_weight={weight}", kind=kind))[0]
        for weight in (0.3, 0.6)
    )
    assert strong > weak


def test_an_emptied_micro_batch_weighs_nothing(tiny_corpus, double, tmp_path):
    _, (*_, first) = step_of(tiny_corpus)

    def damaged(index: Index) -> Index:
        data = bytearray(Path(index.shards[0]).read_bytes())
        for row in first.rows.tolist():
            data[index.offset[row] : index.offset[row] + 100] = bytes(100)
        (tmp_path / "shard-000000.tar").write_bytes(data)
        return replace(index, shards=(str(tmp_path / "shard-000000.tar"),))

    learner, batches = step_of(tiny_corpus, index_of=damaged)
    assert batches[-1].utterances == 0 and len(batches[-1].bad) == first.utterances
    assert batches[-1].weight.tolist() == [0.0]
    assert_equal_steps(by_micro_batches(learner, batches), in_one_batch(learner, batches))


# ---- property 6: the rehearsal -------------------------------------------------------------------------------------


def leaving_no_trace() -> None:
    """Fails a rank whose rehearsal changes a bit of what training goes on from."""
    import random

    from ddp_asr.training import session

    def everything(learner):
        randomness = [torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()]
        return checkpoint.snapshot({"learner": learner.state(), "random": randomness})

    def watched(run):
        def without_a_trace(corpus, learner, *more):
            was = everything(learner)
            found = run(corpus, learner, *more)
            assert tiny.differences(was, everything(learner)) == []
            assert all(parameter.grad is None for parameter in learner.model.parameters())
            print("no trace", flush=True)
            return found

        return without_a_trace

    session.rehearse = watched(session.rehearse)
    session.fix_gradient_buckets = watched(session.fix_gradient_buckets)


def without_rehearsal() -> None:
    from ddp_asr.training import session
    from ddp_asr.training.rehearsal import Rehearsed

    session.rehearse = lambda corpus, learner, sizes: Rehearsed(1, 0, [])
    session.fix_gradient_buckets = lambda corpus, learner: None


def test_the_rehearsal_leaves_no_trace(tiny_corpus, tmp_path):
    tiny.train(tiny_corpus.arguments(tmp_path, "with"), 1, [leaving_no_trace])
    tiny.train(tiny_corpus.arguments(tmp_path, "without"), 1, [without_rehearsal])
    tiny.assert_same_run(tmp_path / "with", tmp_path / "without")


@pytest.mark.slow
def test_the_rehearsal_leaves_no_trace_on_any_rank(tiny_corpus, tmp_path):
    ranks = tiny.start(tiny_corpus.arguments(tmp_path, "run", "--train.epochs=1"), 3, [leaving_no_trace])
    output = ranks.succeed()
    assert ranks.output.count("no trace") == 2 * 3
    assert "rehearsed the longest utterance: 2 utterances of up to 1.0 s" in output
