"""The design's properties 1, 2, 5 and 6 on one to four real processes: the same training, whoever runs it."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from ddp_asr.config import load_config
from ddp_asr.data.corpus import read_corpus
from ddp_asr.data.index import Index
from ddp_asr.data.loader import train_loader
from ddp_asr.encoders.rescnn_bigru import AcousticModel
from ddp_asr.features import masks as augment
from ddp_asr.features.log_mel import LogMel
from ddp_asr.ranks.world import World
from ddp_asr.training.loop import Learner
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
    assert tiny.final_state(alone, STEPS)["model"]["bridge.weight"].dtype == getattr(torch, dtype)
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


# ---- property 5 ----------------------------------------------------------------------------------------------------


@pytest.fixture
def double():
    """float64 for whatever casts to nothing else."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


TWO_VIEWS = "--objective.consistency_weight=0.3"
SHORT_CONTEXT = "--objective.short_context_s=0.1,0.4"
INTERMEDIATE = "--objective.intermediate_weight=0.3"


def step_of(tiny_corpus, *options, index_of=lambda index: index):
    """A learner without dropout, and a step of four micro-batches of which some have an utterance more."""
    path, *overrides = tiny_corpus.arguments(Path("runs"), "run", "--encoder.dropout=0", *options)[1:]
    config = load_config(Path(path), overrides)
    corpus = read_corpus(config)
    torch.manual_seed(0)
    intermediate = config.objective.intermediate_weight > 0
    model = AcousticModel(config.features, config.encoder, corpus.vocabulary.size, intermediate)
    learner = Learner(
        world=World(0, 1, 0, torch.device("cpu")),
        model=model,
        log_mel=LogMel(config.features),
        optimizer=make_optimizer(model, config.optim),
        optim=config.optim,
        precision="fp32",
        seed=0,
        objective=config.objective,
        frame_s=config.frame_s,
    )
    loader = train_loader(
        index_of(corpus.index), corpus.vocabulary, corpus.plan, augment.draw, config, rank=0, world_size=1
    )
    steps = [[next(loader) for _ in range(4)] for _ in range(corpus.plan.steps_per_epoch)]
    return learner, next(step for step in steps if len({len(batch.rows) for batch in step}) > 1)


def by_micro_batches(learner, batches):
    """Loss and gradients of a step as the trainer takes them."""
    losses = [
        learner.accumulate(batch, step=1, micro_batch=k, last=k == len(batches) - 1) for k, batch in enumerate(batches)
    ]
    utterances = sum(batch.utterances for batch in batches)
    gradients = [parameter.grad / utterances for parameter in learner.model.parameters()]
    learner.discard()
    return float(torch.cat(losses).sum()) / utterances, gradients


def in_one_batch(learner, batches):
    """Loss and gradients of one plain batch of the same utterances, by `nn.CTCLoss(reduction="mean")`."""

    def joined(rows):
        longest = max(row.shape[-1] for row in rows)
        return torch.cat([torch.nn.functional.pad(row, (0, longest - row.shape[-1])) for row in rows])

    batches = [batch for batch in batches if batch.utterances]
    samples, lengths = (torch.cat([getattr(b, name) for b in batches]) for name in ("samples", "target_lengths"))
    features, frames = learner.log_mel(joined([batch.waveforms for batch in batches]), samples)
    masks = {name: torch.cat([batch.masks[name] for batch in batches]) for name in batches[0].masks}
    targets, weight = joined([batch.targets for batch in batches]), learner.objective.consistency_weight
    masked = augment.apply(features, masks, learner.objective.views)
    span = augment.draw_span(learner.objective, learner.seed, 1, learner.frame_s)
    if span:
        both, frames, _ = learner.model(torch.cat(masked), frames.repeat(2), span)
        logits, frames, early = both.chunk(2), frames.chunk(2)[0], (None,)
    else:
        logits, (frames, *_), early = zip(*(learner.model(view, frames) for view in masked), strict=True)

    def ctc(outputs):
        mean = torch.nn.CTCLoss(blank=outputs[0].shape[-1] - 1)
        return sum(mean(output.transpose(0, 1), targets, frames, lengths) for output in outputs) / len(outputs)

    outputs = [view.log_softmax(-1) for view in logits]
    loss = ctc(outputs)
    if early[0] is not None:
        share = learner.objective.intermediate_weight
        loss = (1 - share) * loss + share * ctc([view.log_softmax(-1) for view in early])
    if weight:
        one, other = outputs
        towards = [
            (goal.exp() * (goal - view)).sum(-1) for view, goal in ((one, other.detach()), (other, one.detach()))
        ]
        own = torch.arange(one.shape[1]) < frames[:, None]
        loss = loss + weight * ((sum(towards) * own).sum(1) / lengths).mean() / 2
    gradients = list(torch.autograd.grad(loss, list(learner.model.parameters())))
    return float(loss.detach()), gradients


def assert_equal_steps(ours, plain):
    assert ours[0] == pytest.approx(plain[0], rel=1e-12)
    whole = sum(float(gradient.square().sum()) for gradient in plain[1]) ** 0.5
    apart = sum(float((a - b).square().sum()) for a, b in zip(ours[1], plain[1], strict=True)) ** 0.5
    assert whole > 0.1 and apart < 1e-10 * whole


def test_loss_and_gradient_of_uneven_micro_batches_are_those_of_one_batch(tiny_corpus, double):
    learner, batches = step_of(tiny_corpus)
    assert len({batch.utterances for batch in batches}) > 1 and batches[0].masks["time"].any()
    assert_equal_steps(by_micro_batches(learner, batches), in_one_batch(learner, batches))


def test_so_are_those_of_two_views(tiny_corpus, double):
    learner, batches = step_of(tiny_corpus, TWO_VIEWS)
    assert batches[0].masks["time"].shape[1] == 4  # two of each view
    assert_equal_steps(by_micro_batches(learner, batches), in_one_batch(learner, batches))


def test_so_are_those_of_a_second_view_of_short_context(tiny_corpus, double):
    learner, batches = step_of(tiny_corpus, TWO_VIEWS, SHORT_CONTEXT)
    short = by_micro_batches(learner, batches)
    assert_equal_steps(short, in_one_batch(learner, batches))
    assert short[0] != pytest.approx(by_micro_batches(step_of(tiny_corpus, TWO_VIEWS)[0], batches)[0], rel=1e-6)


@pytest.mark.parametrize("views", [[], [TWO_VIEWS]], ids=["one view", "two views"])
def test_so_are_those_of_an_intermediate_loss(tiny_corpus, double, views):
    learner, batches = step_of(tiny_corpus, INTERMEDIATE, *views)
    with_it = by_micro_batches(learner, batches)
    assert_equal_steps(with_it, in_one_batch(learner, batches))
    assert with_it[0] != pytest.approx(by_micro_batches(step_of(tiny_corpus, *views)[0], batches)[0], rel=1e-6)


@pytest.mark.slow
def test_two_views_are_the_same_training_on_any_number_of_processes(tiny_corpus, tmp_path):
    for processes in (1, 3):
        arguments = tiny_corpus.arguments(tmp_path, f"w{processes}", TWO_VIEWS, SHORT_CONTEXT, INTERMEDIATE)
        tiny.train(arguments, processes, [tiny.in_double])
    tiny.assert_close_runs(tmp_path / "w3", tmp_path / "w1", TOLERANCE["float64"])

    tiny.train(
        tiny_corpus.arguments(
            tmp_path,
            *("stronger", SHORT_CONTEXT, INTERMEDIATE),
            *("--objective.consistency_weight=0.6", "--train.stop_at_step=1"),
        ),
        patches=[tiny.in_double],
    )
    first, stronger = (tiny.metrics(tmp_path / name)[0]["loss"] for name in ("w1", "stronger"))
    assert stronger > first  # the same weights and views, and twice the pull


def test_an_emptied_micro_batch_weighs_nothing(tiny_corpus, double, tmp_path):
    _, (*_, first) = step_of(tiny_corpus)

    def damaged(index: Index) -> Index:
        data = bytearray(index.shards[0].read_bytes())
        for row in first.rows.tolist():
            data[index.offset[row] : index.offset[row] + 100] = bytes(100)
        (tmp_path / "shard-000000.tar").write_bytes(data)
        return replace(index, shards=(tmp_path / "shard-000000.tar",))

    learner, batches = step_of(tiny_corpus, index_of=damaged)
    assert batches[-1].utterances == 0 and len(batches[-1].bad) == first.utterances
    assert batches[-1].weight.tolist() == [0.0]
    assert_equal_steps(by_micro_batches(learner, batches), in_one_batch(learner, batches))


# ---- property 6: the rehearsal -------------------------------------------------------------------------------------


def leaving_no_trace() -> None:
    """Fails a rank whose rehearsal changes a bit of what training goes on from."""
    import random

    import numpy as np

    from ddp_asr.runs import checkpoint
    from ddp_asr.training import session

    def everything(learner):
        randomness = [torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()]
        return checkpoint.snapshot({"learner": learner.state(), "random": randomness})

    def watched(run):
        def without_a_trace(corpus, learner):
            was = everything(learner)
            lines = run(corpus, learner)
            assert tiny.differences(was, everything(learner)) == []
            assert all(parameter.grad is None for parameter in learner.model.parameters())
            print("no trace", flush=True)
            return lines

        return without_a_trace

    session.rehearse, session.settle = watched(session.rehearse), watched(session.settle)


def without_rehearsal() -> None:
    from ddp_asr.training import session

    session.rehearse = lambda corpus, learner: []
    session.settle = lambda corpus, learner: None


def test_the_rehearsal_leaves_no_trace(tiny_corpus, tmp_path):
    tiny.train(tiny_corpus.arguments(tmp_path, "with"), 1, [leaving_no_trace])
    tiny.train(tiny_corpus.arguments(tmp_path, "without"), 1, [without_rehearsal])
    tiny.assert_same_run(tmp_path / "with", tmp_path / "without")


@pytest.mark.slow
def test_the_rehearsal_leaves_no_trace_on_any_rank(tiny_corpus, tmp_path):
    ranks = tiny.start(tiny_corpus.arguments(tmp_path, "run", "--train.epochs=1"), 3, [leaving_no_trace])
    output = ranks.succeed()
    assert ranks.output.count("no trace") == 2 * 3
    assert "rehearsed the longest utterance: 2 utterance(s) of up to 1.0 s" in output
