"""The terms of the loss against their oracles, and how the objective weighs them."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddp_asr import config
from ddp_asr.model import Output
from ddp_asr.objective import Objective, consistency_loss, ctc_loss


def collapse(path, blank):
    """Repeats merged, then blanks removed."""
    return [symbol for symbol, _ in itertools.groupby(path) if symbol != blank]


def by_brute_force(logits, target):
    """-log of the probability of all paths that spell `target`; logits (T', V), the blank last."""
    probabilities = logits.double().softmax(-1)
    T, V = logits.shape
    paths = (path for path in itertools.product(range(V), repeat=T) if collapse(path, V - 1) == target)
    total = sum(math.prod(float(probabilities[t, symbol]) for t, symbol in enumerate(path)) for path in paths)
    return -math.log(total) if total else math.inf


def loss_of(logits, target):
    """The loss of one utterance alone."""
    targets = torch.tensor([target], dtype=torch.int64)
    return ctc_loss(logits[None], torch.tensor([len(logits)]), targets, torch.tensor([len(target)]))[0]


@given(st.integers(1, 5), st.lists(st.integers(0, 1), min_size=1, max_size=4), st.integers(0, 99))
def test_the_sum_over_all_paths_by_target_length(frames, target, seed):
    logits = torch.randn(frames, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2
    assert loss_of(logits, target).item() == pytest.approx(by_brute_force(logits, target) / len(target), rel=1e-9)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=5))
def test_infinite_exactly_where_target_and_repeats_need_more_frames(target):
    needed = len(target) + sum(a == b for a, b in itertools.pairwise(target))
    enough = torch.zeros(needed, 4)
    assert torch.isfinite(loss_of(enough, target))
    if needed > 1:
        assert loss_of(enough[1:], target) == math.inf


def test_the_blank_is_the_last_class():
    logits = torch.full((3, 4), -9.0)
    logits[0, 1], logits[1:, 3] = 9.0, 9.0  # a symbol, then nothing more
    assert loss_of(logits, [1]) < 1e-6
    assert loss_of(logits, [1, 0]) > 5 and loss_of(logits, [1, 2]) > 5


def test_a_batch_is_its_utterances_one_by_one_whatever_pads_them():
    torch.manual_seed(0)
    frames, lengths = torch.tensor([9, 4, 7]), torch.tensor([3, 1, 2])
    logits, targets = torch.randn(3, 9, 5, dtype=torch.float64), torch.tensor([[0, 1, 1], [2, 3, 3], [1, 2, 0]])
    together = ctc_loss(logits, frames, targets, lengths)
    alone = [loss_of(logits[row, : frames[row]], targets[row, : lengths[row]].tolist()) for row in range(3)]
    assert together.shape == (3,)
    assert torch.allclose(together, torch.stack(alone), rtol=1e-12)


def test_its_sum_by_the_count_is_the_mean_of_torch():
    torch.manual_seed(0)
    frames, lengths = torch.tensor([20, 15]), torch.tensor([6, 4])
    logits, targets = torch.randn(2, 20, 5), torch.randint(0, 4, (2, 6))
    theirs = torch.nn.CTCLoss(blank=4)(logits.log_softmax(-1).transpose(0, 1), targets, frames, lengths)
    assert torch.allclose(ctc_loss(logits, frames, targets, lengths).sum() / 2, theirs)


def test_float32_whatever_autocast_says():
    torch.manual_seed(0)
    logits = torch.randn(12, 5)
    expected = loss_of(logits, [0, 1, 2])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss_of(logits, [0, 1, 2]), expected)
        assert loss_of(logits.bfloat16(), [0, 1, 2]).dtype == torch.float32
    assert loss_of(logits.double(), [0, 1, 2]).dtype == torch.float64


def test_the_gradient_is_that_of_finite_differences():
    torch.manual_seed(0)
    logits = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda logits: loss_of(logits, [0, 0, 2]), [logits])


def test_the_consistency_is_the_mean_of_both_divergences_over_an_utterances_own_frames():
    torch.manual_seed(0)
    logits, frames, lengths = torch.randn(4, 7, 5, dtype=torch.float64), torch.tensor([7, 4]), torch.tensor([3, 2])
    found = consistency_loss(logits, frames, lengths)
    for row in range(2):
        one, other = (logits[view, : frames[row]].log_softmax(-1) for view in (row, 2 + row))
        both = [
            torch.nn.functional.kl_div(a, b, reduction="sum", log_target=True) for a, b in ((one, other), (other, one))
        ]
        assert found[row].item() == pytest.approx(float(sum(both)) / 2 / int(lengths[row]), rel=1e-12)


def test_equal_views_are_consistent_whatever_lies_in_the_padding():
    view = torch.randn(2, 6, 4, dtype=torch.float64)
    other = view.clone()
    other[1, 3:] = 1e3
    found = consistency_loss(torch.cat([view, other]), torch.tensor([6, 3]), torch.tensor([2, 2]))
    assert found.tolist() == [0.0, 0.0]


def test_each_view_is_pulled_towards_the_other_as_it_stands():
    """The gradient of a view is its probabilities less those of its goal: nothing flows through the goal."""
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
    consistency_loss(logits, torch.tensor([5]), torch.tensor([1])).sum().backward()
    one, other = logits.detach().softmax(-1)
    assert torch.allclose(logits.grad, torch.stack([one - other, other - one]) / 2, rtol=0, atol=1e-12)


# ---- how they are weighed --------------------------------------------------------------------------------------------


def objective(frame_s=0.025, seed=0, **settings):
    return Objective(config.Objective(**settings), seed=seed, frame_s=frame_s)


def output_of(views, intermediate=0):
    """The model's output for 3 utterances in so many views, and their targets."""
    torch.manual_seed(0)
    frames = torch.tensor([9, 4, 7])
    logits = [torch.randn(3 * views, 9, 5, dtype=torch.float64) for _ in range(1 + intermediate)]
    targets, lengths = torch.tensor([[0, 1, 1], [2, 3, 3], [1, 2, 0]]), torch.tensor([3, 1, 2])
    return Output(logits[0], frames.repeat(views), logits[1:]), targets, lengths


def test_alone_it_is_the_ctc_loss():
    output, targets, lengths = output_of(views=1)
    assert torch.equal(objective()(output, targets, lengths), ctc_loss(output.logits, output.frames, targets, lengths))


def test_an_intermediate_layer_takes_its_share():
    output, targets, lengths = output_of(views=1, intermediate=2)
    last, *lower = (
        ctc_loss(logits, output.frames, targets, lengths) for logits in (output.logits, *output.intermediate)
    )
    found = objective(intermediate_weight=0.3, intermediate_layers=[1, 2])(output, targets, lengths)
    assert torch.allclose(found, 0.7 * last + 0.3 * (lower[0] + lower[1]) / 2, rtol=1e-12)


def test_two_views_are_a_mean_and_their_divergence():
    output, targets, lengths = output_of(views=2)
    frames = output.frames[:3]
    one, other = (ctc_loss(logits, frames, targets, lengths) for logits in output.logits.chunk(2))
    divergence = consistency_loss(output.logits, frames, lengths)
    found = objective(consistency_weight=0.4)(output, targets, lengths)
    assert torch.allclose(found, (one + other) / 2 + 0.4 * divergence, rtol=1e-12)


def test_a_short_context_is_any_whole_number_of_frames_between_its_bounds():
    short = {"consistency_weight": 0.2, "short_context_s": [0.1, 0.2]}
    drawn = [objective(**short).context(step, utterances=2) for step in range(200)]
    assert {tuple(rows) for rows in drawn} == {(0, 0, frames, frames) for frames in (4, 5, 6, 7, 8)}
    assert drawn == [objective(**short).context(step, utterances=2) for step in range(200)]
    assert drawn != [objective(**short, seed=1).context(step, utterances=2) for step in range(200)]
    assert objective(**short, frame_s=1.0).context(1, utterances=1) == [0, 1]  # never less than a frame
    assert objective(consistency_weight=0.2).context(1, utterances=2) is None
