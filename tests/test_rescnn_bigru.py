"""ResCNN + BiGRU against its oracles: PyTorch's packed GRU, a GRU run chunk by chunk, and gradients in float32.

What it shares with every encoder is in tests/test_encoders.py.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ddp_asr.encoders.gru import _GRURecurrence, run_gru
from ddp_asr.encoders.rescnn_bigru import BiGRU, reversal, reverse, run_in_chunks, run_with_context
from ddp_asr.features.log_mel import frame_mask
from ddp_asr.training.precision import autocast
from tests.tiny_encoders import encoder_of


@torch.no_grad()
def relative(one, other):
    """The largest difference, as a share of the largest number."""
    return ((one - other).abs().max() / other.abs().max()).item()


@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 12) | st.just(10**12))
def test_a_gru_in_chunks_begins_anew_in_each(frames, utterances, chunk_frames):
    torch.manual_seed(1)
    gru = nn.GRU(5, 4).double()
    x = torch.randn(frames, utterances, 5, dtype=torch.float64)
    anew = torch.cat([gru(x[start : start + chunk_frames])[0] for start in range(0, frames, chunk_frames)])
    torch.testing.assert_close(run_in_chunks(gru, x, chunk_frames), anew)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=6))
def test_each_row_runs_in_chunks_of_its_own(context):
    torch.manual_seed(1)
    gru = nn.GRU(5, 4).double()
    x = torch.randn(7, len(context), 5, dtype=torch.float64)
    together = run_with_context(gru, x, context)
    for row, chunk_frames in enumerate(context):
        own = x[:, row : row + 1]
        alone = run_in_chunks(gru, own, chunk_frames) if chunk_frames else gru(own)[0]
        torch.testing.assert_close(together[:, row : row + 1], alone)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5))
def test_the_bigru_is_torchs_own_over_packed_sequences(frames):
    torch.manual_seed(2)
    ours = BiGRU(input_size=5, size=4, dropout=0.0).double()
    theirs = nn.GRU(5, 4, bidirectional=True).double()
    for suffix, gru in (("", ours.forward_gru), ("_reverse", ours.backward_gru)):
        for name, weight in gru.named_parameters():
            getattr(theirs, name + suffix).data.copy_(weight)
    lengths = torch.tensor(frames)
    x = torch.randn(max(frames), len(frames), 5, dtype=torch.float64, requires_grad=True)
    packed = nn.utils.rnn.pack_padded_sequence(nn.functional.gelu(ours.norm(x)), lengths, enforce_sorted=False)
    expected, _ = nn.utils.rnn.pad_packed_sequence(theirs(packed)[0])
    inside = frame_mask(lengths, len(x), x.device).t()[:, :, None]
    actual = ours(x, reversal(lengths, len(x), x.device)) * inside
    assert torch.allclose(actual, expected, rtol=0, atol=1e-12)

    weighting = torch.randn_like(expected)
    names = [(suffix, name) for suffix in ("", "_reverse") for name, _ in ours.forward_gru.named_parameters()]
    directions = {"": ours.forward_gru, "_reverse": ours.backward_gru}
    own = [directions[suffix].get_parameter(name) for suffix, name in names]
    oracle = [theirs.get_parameter(name + suffix) for suffix, name in names]
    gradients = torch.autograd.grad((actual * weighting).sum(), [x, *own])
    expectations = torch.autograd.grad((expected * weighting).sum(), [x, *oracle])
    for gradient, expectation in zip(gradients, expectations, strict=True):
        assert torch.allclose(gradient, expectation, rtol=0, atol=1e-11)


def test_gradients_of_the_grus_weights_are_summed_in_float32_over_the_frames():
    """In bfloat16 a sum of like numbers stands still once it is 256 times as large as they are."""
    torch.manual_seed(0)
    gru = nn.GRU(3, 4)
    x = torch.ones(2000, 1, 3)
    exact = torch.autograd.grad(run_gru(gru, x).sum(), list(gru.parameters()))
    with autocast("bf16", torch.device("cpu")):
        hidden = run_gru(gru, x)
    rounded = torch.autograd.grad(hidden.float().sum(), list(gru.parameters()))
    assert max(relative(one, other) for one, other in zip(rounded, exact, strict=True)) < 0.05


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4))
def test_reversing_by_length_twice_is_nothing_and_once_is_flip(frames):
    x, lengths = torch.randn(9, len(frames), 2), torch.tensor(frames)
    backwards = reversal(lengths, len(x), x.device)
    back = reverse(x, backwards)
    assert torch.equal(reverse(back, backwards), x)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(reverse(x, backwards), x, weighting := torch.randn_like(x))
    assert torch.equal(gradient, reverse(weighting, backwards))
    for row, length in enumerate(frames):
        assert torch.equal(back[:length, row], x[:length, row].flip(0))
        assert torch.equal(back[length:, row], x[length:, row])


@pytest.mark.parametrize("precision, expected", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_gru_runs_in_the_type_that_was_asked_for(precision, expected, monkeypatch):
    seen = set()
    run = _GRURecurrence.apply
    monkeypatch.setattr(_GRURecurrence, "apply", lambda *given: seen.add(tuple(x.dtype for x in given)) or run(*given))
    encoder, frames = encoder_of("rescnn_bigru"), torch.tensor([20])
    with autocast(precision, torch.device("cpu")):
        hidden = encoder(torch.randn(1, 20, 16), frames).hidden
    assert seen == {(expected, expected, expected)}
    hidden.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in encoder.parameters())


def test_bf16_is_near_fp32():
    encoder, frames, features = encoder_of("rescnn_bigru"), torch.tensor([20]), torch.randn(1, 20, 16)
    exact = encoder(features, frames).hidden
    with autocast("bf16", torch.device("cpu")):
        rounded = encoder(features, frames).hidden
    assert 0 < relative(rounded.float(), exact) < 0.05
