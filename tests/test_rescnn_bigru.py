"""The acoustic model against its oracles: the tutorial's size, PyTorch's packed GRU, and an utterance alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ddp_asr import config
from ddp_asr.encoders.gru import _GRURecurrence, run_gru
from ddp_asr.encoders.rescnn_bigru import AcousticModel, BiGRU, count_parameters, reverse_by_length, run_in_spans
from ddp_asr.features.log_mel import LogMel, frame_mask
from ddp_asr.training.precision import autocast

FEATURES = config.Features(mel_bands=16, n_fft=512)
STRIDES = [[2], [1], [2, 1], [2, 2], [3, 2]]


def small(time_strides=(2,), vocabulary_size=6, intermediate=False, **sizes):
    """A model of all parts, its weights drawn from a fixed seed, that drops nothing out."""
    strides = list(time_strides)
    settings = config.RescnnBigru(conv_channels=3, time_strides=strides, residual_blocks=2, rnn_layers=2, **sizes)
    torch.manual_seed(0)
    return AcousticModel(FEATURES, settings, vocabulary_size, intermediate).eval()


@torch.no_grad()
def relative(one, other):
    """The largest difference, as a share of the largest number."""
    return ((one - other).abs().max() / other.abs().max()).item()


def test_the_default_sizes_are_the_tutorials():
    defaults = config.Config()
    model = AcousticModel(defaults.features, defaults.encoder, len(defaults.vocabulary.symbols) + 1)
    assert count_parameters(model) == 23_705_373


@given(st.lists(st.integers(1, 90), min_size=1, max_size=4), st.sampled_from(STRIDES))
def test_the_frames_foretold_are_the_frames_that_come_out(frames, strides):
    model = small(strides, rnn_size=4)
    lengths = torch.tensor(frames)
    logits, left, _ = model(torch.zeros(len(frames), max(frames), 16), lengths)
    assert logits.shape == (len(frames), left.max(), 6)
    assert left.tolist() == [model.sizes.output_frames(T) for T in frames]
    assert left.tolist() == model.sizes.output_frames(lengths.numpy()).tolist()


def default_model():
    settings = config.Config()
    torch.manual_seed(0)
    return settings.features, AcousticModel(settings.features, settings.encoder, 29).eval()


@pytest.mark.parametrize("strides", [*STRIDES, "default"], ids=str)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
@torch.no_grad()
def test_an_utterance_alone_and_beside_31_longer_ones_gives_the_same_logits(strides, dtype, tolerance):
    """DESIGN 2.4, from waveform to logits; every length leaves another remainder over hop and strides."""
    features, model = default_model() if strides == "default" else (FEATURES, small(strides, rnn_size=8))
    model, log_mel = model.to(dtype), LogMel(features).to(dtype)
    samples = torch.tensor([4_001] + [4_200 + 97 * n for n in range(31)])
    waveforms = torch.randint(-9_000, 9_000, (32, int(samples.max())), dtype=torch.int16)
    waveforms[torch.arange(waveforms.shape[1]) >= samples[:, None]] = 0
    together, frames, _ = model(*log_mel(waveforms, samples))
    for row in (0, 1, 17):
        alone, (own,), _ = model(*log_mel(waveforms[row : row + 1, : samples[row]], samples[row : row + 1]))
        assert own == frames[row] == alone.shape[1]
        assert relative(together[row, :own], alone[0]) < tolerance


def test_what_lies_in_the_padding_cannot_be_heard():
    model, frames = small(rnn_size=8).double(), torch.tensor([20, 31])
    clean = torch.randn(2, 31, 16, dtype=torch.float64)
    dirty = clean.clone()
    dirty[0, 20:] = 1e6
    assert torch.equal(model(clean, frames)[0][0, :10], model(dirty, frames)[0][0, :10])


def test_time_runs_along_time_and_never_from_one_utterance_to_another():
    """The tutorial's GRUs from the second on ran over the batch."""
    model, frames = small(rnn_size=8).double(), torch.tensor([30, 30, 30])
    features = torch.randn(3, 30, 16, dtype=torch.float64, requires_grad=True)
    logits, *_ = model(features, frames)
    (gradient,) = torch.autograd.grad(logits[1, 7].sum(), features)
    heard = gradient.abs().sum(2) > 0  # (B, T): which frames logit 7 of utterance 1 depends on
    assert heard[1].all()
    assert not heard[0].any() and not heard[2].any()


@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 12) | st.just(10**12))
def test_a_gru_in_spans_starts_anew_in_each(frames, utterances, span):
    torch.manual_seed(1)
    gru = nn.GRU(5, 4).double()
    x = torch.randn(frames, utterances, 5, dtype=torch.float64)
    anew = torch.cat([gru(x[start : start + span])[0] for start in range(0, frames, span)])
    torch.testing.assert_close(run_in_spans(gru, x, span), anew)


def test_with_a_span_the_second_half_of_a_batch_hears_nothing_from_afar():
    model, frames = small(rnn_size=8).double(), torch.tensor([80, 70, 80, 70])
    features = torch.randn(4, 80, 16, dtype=torch.float64, requires_grad=True)
    logits, *_ = model(features, frames, 5)
    torch.testing.assert_close(logits[:2], model(features, frames)[0][:2])
    for row in range(4):
        (gradient,) = torch.autograd.grad(logits[row, 20].sum(), features, retain_graph=True)
        heard = gradient[row].abs().sum(1) > 0  # (T,): which frames logit 20, around frame 40, depends on
        assert heard[:70].all() if row < 2 else heard[40] and not heard[:10].any() and not heard[70:].any()
        assert not heard[frames[row] :].any()


def test_an_intermediate_classifier_reads_the_first_block_in_training_alone():
    plain, model = small(rnn_size=8).double(), small(rnn_size=8, dropout=0.0, intermediate=True).double()
    features, frames = torch.randn(2, 40, 16, dtype=torch.float64), torch.tensor([40, 33])
    for one, other in zip(plain(features, frames)[:2], model(features, frames)[:2], strict=True):
        assert torch.equal(one, other)  # nothing else changes, from the first weights on
    assert model(features, frames)[2] is None

    logits, _, early = model.train()(features, frames)
    assert early.shape == logits.shape and count_parameters(model) - count_parameters(plain) == 16 * 6 + 6
    early.sum().backward()
    reached = {name.split(".")[0] for name, weight in model.named_parameters() if weight.grad is not None}
    assert reached == {"strided", "blocks", "bridge", "rnn", "intermediate"}
    assert model.rnn[0].forward_gru.weight_hh_l0.grad is not None
    assert all(weight.grad is None for weight in model.rnn[1].parameters())


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
    inside = frame_mask(lengths, len(x)).t()[:, :, None]
    actual = ours(x, lengths) * inside
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
    back = reverse_by_length(x, lengths)
    assert torch.equal(reverse_by_length(back, lengths), x)
    for row, length in enumerate(frames):
        assert torch.equal(back[:length, row], x[:length, row].flip(0))
        assert torch.equal(back[length:, row], x[length:, row])


def test_every_parameter_learns():
    model = small(rnn_size=8)
    model(torch.randn(2, 40, 16), torch.tensor([40, 33]))[0].square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.abs().sum() > 0] == []


@pytest.mark.parametrize("precision, expected", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_the_gru_runs_in_the_type_that_was_asked_for(precision, expected, monkeypatch):
    seen = set()
    run = _GRURecurrence.apply
    monkeypatch.setattr(_GRURecurrence, "apply", lambda *given: seen.add(tuple(x.dtype for x in given)) or run(*given))
    model, frames = small(rnn_size=8), torch.tensor([20])
    with autocast(precision, torch.device("cpu")):
        logits, *_ = model(torch.randn(1, 20, 16), frames)
    assert seen == {(expected, expected, expected)}
    logits.float().sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_bf16_is_near_fp32():
    model, frames, features = small(rnn_size=8), torch.tensor([20]), torch.randn(1, 20, 16)
    exact, *_ = model(features, frames)
    with autocast("bf16", torch.device("cpu")):
        rounded, *_ = model(features, frames)
    assert 0 < relative(rounded.float(), exact) < 0.05
