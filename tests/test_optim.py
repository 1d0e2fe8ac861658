"""Learning rates against OneCycleLR and a formula, AdamW against one that allocates lazily, the weights' average."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._subclasses import FakeTensorMode

from ddp_asr import config
from ddp_asr.model import make_model
from ddp_asr.training.optim import WeightAverage, learning_rate, make_optimizer


def torchs_rates(total_steps, settings):
    """What OneCycleLR sets at each step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=settings.learning_rate,
        total_steps=total_steps,
        pct_start=settings.warmup_share,
        anneal_strategy={"linear": "linear", "cosine": "cos"}[settings.anneal],
        cycle_momentum=False,
        div_factor=settings.start_divisor,
        final_div_factor=settings.end_divisor,
    )
    rates = [schedule.get_last_lr()[0]]
    for _ in range(total_steps - 1):
        optimizer.step()
        schedule.step()
        rates += schedule.get_last_lr()
    return rates


CYCLES = st.builds(
    config.Optim,
    learning_rate=st.floats(1e-5, 1.0),
    warmup_share=st.sampled_from([0.0, 0.05, 0.3, 0.31, 0.5, 0.97]),
    start_divisor=st.floats(1.0, 100.0),
    end_divisor=st.floats(1.0, 1e5),
    anneal=st.sampled_from(["linear", "cosine"]),
)


@given(CYCLES, st.integers(11, 120))
def test_the_rate_is_torchs_at_every_step(settings, total_steps):
    ours = [learning_rate(step, total_steps, settings) for step in range(1, total_steps + 1)]
    assert ours == pytest.approx(torchs_rates(total_steps, settings), rel=1e-9, abs=1e-15)


@given(CYCLES, st.integers(1, 10_000))
def test_the_cycle_ends_exactly_at_the_end_and_never_leaves_its_bounds(settings, total_steps):
    first = settings.learning_rate / settings.start_divisor
    last = first / settings.end_divisor
    if total_steps > 1:
        assert learning_rate(total_steps, total_steps, settings) == pytest.approx(last, rel=1e-6, abs=1e-15)
        assert learning_rate(total_steps - 1, total_steps, settings) >= last * (1 - 1e-9)
    for step in {1, (total_steps + 1) // 2, total_steps}:
        assert last * (1 - 1e-6) - 1e-15 <= learning_rate(step, total_steps, settings) <= settings.learning_rate * 1.001


@pytest.mark.parametrize("anneal", ["linear", "cosine"])
def test_warming_up_to_the_last_step_and_a_warm_up_of_one_step(anneal):
    rising = config.Optim(warmup_share=1.0, anneal=anneal)
    assert learning_rate(1, 50, rising) == pytest.approx(2e-5)
    assert learning_rate(50, 50, rising) == pytest.approx(5e-4)
    assert learning_rate(1, 10, config.Optim(warmup_share=0.1, anneal=anneal)) == pytest.approx(5e-4)


@given(st.integers(1, 4000), st.integers(1, 400_000), st.integers(1, 1024))
def test_the_inverse_square_root_is_the_formula_of_the_paper(warmup_steps, step, d_model):
    """Vaswani et al. (2017), eq. 3: d_model^-0.5 min(step^-0.5, step warmup_steps^-1.5)."""
    total_steps = 400_000
    settings = config.Optim(
        schedule="inverse_sqrt",
        learning_rate=(d_model * warmup_steps) ** -0.5,
        warmup_share=warmup_steps / total_steps,
    )
    expected = d_model**-0.5 * min(step**-0.5, step * warmup_steps**-1.5)
    assert learning_rate(step, total_steps, settings) == pytest.approx(expected, rel=1e-9)


def test_the_inverse_square_root_by_hand():
    settings = config.Optim(schedule="inverse_sqrt", learning_rate=0.4, warmup_share=0.25)
    rates = [learning_rate(step, 16, settings) for step in (1, 2, 4, 9, 16)]
    assert rates == pytest.approx([0.1, 0.2, 0.4, 0.4 * 2 / 3, 0.2])
    assert learning_rate(1, 1, settings) == pytest.approx(0.4)  # a warm-up of one step at least


def small_model():
    torch.manual_seed(0)
    sizes = config.RescnnBigru(conv_channels=2, residual_blocks=1, rnn_layers=1, rnn_size=4, dropout=0.0)
    return make_model(config.Config(features=config.Features(mel_bands=8), encoder=sizes), 4)


def test_decay_is_on_matrices_and_kernels_only_and_every_weight_is_in_one_group():
    model = small_model()
    decaying, free = make_optimizer(model, config.Optim(weight_decay=0.3)).param_groups
    assert (decaying["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    in_groups = [{names.pop(id(p)) for p in group["params"]} for group in (decaying, free)]
    assert names == {}
    assert {"encoder.strided.0.weight", "encoder.rnn.0.backward_gru.weight_hh_l0", "classifier.weight"} <= in_groups[0]
    assert {"encoder.blocks.0.norms.0.weight", "encoder.rnn.0.forward_gru.bias_hh_l0", "classifier.bias"} <= in_groups[
        1
    ]


def test_the_allocated_optimiser_steps_bit_for_bit_as_a_lazy_one():
    settings = config.Optim(learning_rate=0.01, weight_decay=0.1, beta1=0.8, beta2=0.95)
    ours, theirs = small_model(), small_model()
    allocated = make_optimizer(ours, settings)
    lazy = torch.optim.AdamW(
        [
            {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in theirs.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=0.01,
        betas=(0.8, 0.95),
    )
    assert not lazy.state and len(allocated.state) == len(list(ours.parameters()))
    for step in range(3):
        for model, optimizer in ((ours, allocated), (theirs, lazy)):
            torch.manual_seed(step)
            features = torch.randn(2, 20, 8)
            optimizer.zero_grad()
            model(features, torch.tensor([20, 13]))[0].square().sum().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    one, other = allocated.state_dict()["state"], lazy.state_dict()["state"]
    for number in other:
        for name, value in other[number].items():
            assert torch.equal(one[number][name], value) and one[number][name].dtype == value.dtype


def test_the_allocated_state_is_all_that_a_step_needs():
    """Property 6: the rehearsal stands for a step's memory, so the first step may allocate no state of its own."""
    model = small_model()
    optimizer = make_optimizer(model, config.Optim())
    before = {id(tensor) for state in optimizer.state.values() for tensor in state.values()}
    model(torch.randn(1, 9, 8), torch.tensor([9]))[0].sum().backward()
    optimizer.step()
    assert {id(tensor) for state in optimizer.state.values() for tensor in state.values()} == before


def test_on_a_gpu_it_is_fused_and_a_checkpoint_goes_on_on_either():
    """On CUDA tensors without data: which kernels run shows only on a GPU (tests/test_gpu.py)."""
    on_cpu = make_optimizer(nn.Linear(3, 2), config.Optim())
    for state in on_cpu.state.values():
        state["step"] += 7
    saved = on_cpu.state_dict()
    with FakeTensorMode(allow_non_fake_inputs=True):
        on_gpu = make_optimizer(nn.Linear(3, 2, device="cuda:0"), config.Optim())
        for _ in range(2):
            assert {group["fused"] for group in on_gpu.param_groups} == {True}
            devices = {tensor.device.type for state in on_gpu.state.values() for tensor in state.values()}
            assert devices == {"cuda"} and {state["step"].dtype for state in on_gpu.state.values()} == {torch.float32}
            on_gpu.load_state_dict(saved)
        from_gpu = on_gpu.state_dict()
    assert saved["param_groups"] == from_gpu["param_groups"] and saved["state"].keys() == from_gpu["state"].keys()
    # As it comes back from a file: on the CPU.
    on_cpu.load_state_dict({**saved, "param_groups": from_gpu["param_groups"]})
    assert {group["fused"] for group in on_cpu.param_groups} == {None}
    assert {(state["step"].device.type, float(state["step"])) for state in on_cpu.state.values()} == {("cpu", 7.0)}


def test_the_average_forgets_its_noisy_start_soon_and_then_decays_as_set():
    weight = nn.Parameter(torch.tensor([8.0, -1.0], dtype=torch.float64))
    average, expected = WeightAverage([weight], decay=0.5), weight.detach().clone()
    for update, decay in enumerate([2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5, 0.5], start=1):
        weight.data += torch.tensor([update, 0.25], dtype=torch.float64)
        average.update([weight])
        expected = decay * expected + (1 - decay) * weight.detach()
        assert torch.allclose(average.weights[0], expected, rtol=1e-12)
    assert average.updates == 9


def test_the_average_of_weights_that_stay_is_those_weights_and_touches_none():
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    average = WeightAverage(model.parameters(), decay=0.99)
    for _ in range(5):
        average.update(model.parameters())
    for own, weight, kept in zip(average.weights, model.parameters(), before.values(), strict=True):
        assert torch.equal(weight, kept) and torch.equal(own, kept)
        assert own.data_ptr() != weight.data_ptr() and not own.requires_grad
