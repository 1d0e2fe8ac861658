"""Log-mel features against PyTorch's and torchaudio's own, frame by frame; and what a frame may not see."""

import contextlib
import warnings

import numpy as np
import pytest
import torch
import torchaudio
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ddp_asr import config
from ddp_asr.errors import UserError
from ddp_asr.features.log_mel import POWER_FLOOR, LogMel, frame_mask

DEFAULT = config.Features()
SMALL = config.Features(mel_bands=20, window_ms=20.0, hop_ms=7.5, n_fft=512)


def noise(*shape, seed=0):
    """int16 noise."""
    return torch.randint(-9_000, 9_000, shape, dtype=torch.int16, generator=torch.Generator().manual_seed(seed))


def features_of(waveform, settings=DEFAULT, dtype=torch.float64):
    """(T, F) of one utterance alone."""
    features, (frames,) = log_mel_of(settings, dtype)(waveform[None], torch.tensor([len(waveform)]))
    return features[0, :frames]


@contextlib.contextmanager
def default_type(dtype):
    """Tables made inside are computed and kept in this type."""
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def log_mel_of(settings, dtype=torch.float64):
    with default_type(dtype):
        return LogMel(settings)


@given(st.integers(0, 100_000), st.sampled_from([DEFAULT, SMALL]))
def test_frames_are_the_complete_windows(samples, settings):
    windows = len(range(0, samples - settings.window_samples + 1, settings.hop_samples))
    assert settings.frames(samples) == windows
    assert settings.frames(np.array([samples]))[0] == windows
    assert settings.frames(torch.tensor([samples]))[0] == windows


@pytest.mark.parametrize("settings", [DEFAULT, SMALL], ids=["default", "small"])
def test_the_features_are_those_of_torch_stft_and_torchaudio_frame_by_frame(settings):
    waveform, window = noise(9_137), torch.hann_window(settings.window_samples, dtype=torch.float64)
    with default_type(torch.float64):
        filters = torchaudio.functional.melscale_fbanks(
            settings.n_fft // 2 + 1, 0.0, 8_000.0, n_mels=settings.mel_bands, sample_rate=16_000
        )
    expected = []
    for start in range(0, len(waveform) - settings.window_samples + 1, settings.hop_samples):
        frame = waveform[start : start + settings.window_samples].double() / 32_768
        # One frame of zeros around the window's samples: `stft` would take its neighbours in from the signal.
        alone = torch.nn.functional.pad(frame * window, (0, settings.n_fft - len(frame)))
        ones = torch.ones(settings.n_fft, dtype=torch.float64)
        spectrum = torch.stft(alone, settings.n_fft, window=ones, center=False, return_complex=True)
        expected.append((spectrum.abs().square().T @ filters + POWER_FLOOR).log()[0])
    log_mel = torch.stack(expected)
    normalised = (log_mel - log_mel.mean(0)) / log_mel.std(0, correction=0)
    assert torch.allclose(features_of(waveform, settings), normalised, rtol=0, atol=1e-9)


def test_the_recipe_by_torchaudio_where_window_and_transform_are_as_long():
    settings = config.Features(mel_bands=40, window_ms=25.0, hop_ms=12.5, n_fft=400)
    with default_type(torch.float64):
        spectrogram = torchaudio.transforms.MelSpectrogram(
            16_000, n_fft=400, hop_length=200, n_mels=40, center=False, f_min=0.0, f_max=8_000.0
        )
    waveform = noise(16_000)
    log_mel = (spectrogram(waveform.double() / 32_768).T + POWER_FLOOR).log()
    normalised = (log_mel - log_mel.mean(0)) / log_mel.std(0, correction=0)
    assert torch.allclose(features_of(waveform, settings), normalised, rtol=0, atol=1e-8)


@given(st.integers(0, 7_999))
def test_a_frame_sees_the_samples_of_its_own_window_only(sample):
    before = noise(8_000).double() / 32_768
    after = before.clone()
    after[sample] += 0.5
    cut = torch.stack([before, after]).unfold(1, DEFAULT.window_samples, DEFAULT.hop_samples)
    untouched = (cut[0] == cut[1]).all(1)  # (T,)
    assert untouched.sum() >= DEFAULT.frames(8_000) - 2
    # The utterance's mean and deviation have changed, so the untouched frames are compared by their own.
    one, other = (features_of(waveform)[untouched] for waveform in (before, after))
    one, other = ((frames - frames.mean(0)) / frames.std(0) for frames in (one, other))
    assert torch.allclose(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["fp32", "fp64"])
def test_neither_padding_nor_neighbours_change_an_utterance(dtype, tolerance):
    samples = torch.tensor([401, 4_000, 7_777, 16_000])
    waveforms, log_mel = noise(4, 16_000), log_mel_of(DEFAULT, dtype)  # the padding is noise, too
    features, frames = log_mel(waveforms, samples)
    assert features.dtype == dtype and frames.tolist() == [1, 19, 37, 79]
    for row, length in enumerate(samples):
        alone = features_of(waveforms[row, :length], dtype=dtype)
        assert (features[row, : frames[row]] - alone).abs().max() <= tolerance * max(1.0, float(alone.abs().max()))
        assert not features[row, frames[row] :].any()


def test_normalised_over_the_utterances_own_frames():
    features, frames = log_mel_of(DEFAULT)(noise(2, 16_000), torch.tensor([9_000, 16_000]))
    for row in range(2):
        own = features[row, : frames[row]]
        assert own.mean(0).abs().max() < 1e-12
        assert (own.std(0, correction=0) - 1).abs().max() < 1e-12


@pytest.mark.parametrize(
    "n_fft, empty",
    [
        (1024, 0),
        pytest.param(400, 4, marks=pytest.mark.filterwarnings("ignore:At least one mel filterbank")),
        pytest.param(512, 1, marks=pytest.mark.filterwarnings("ignore:At least one mel filterbank")),
    ],
)
def test_the_default_transform_leaves_no_mel_filter_empty(n_fft, empty):
    filters = LogMel(config.Features(n_fft=n_fft)).filters
    assert filters.shape == (n_fft // 2 + 1, 128)
    assert int((filters.sum(0) == 0).sum()) == empty
    assert DEFAULT.n_fft == 1024


@given(mel_bands=st.integers(1, 1024), n_fft=st.integers(2, 5000))
def test_bands_that_hear_nothing_are_refused_and_no_others(mel_bands, n_fft):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is about these bands
        filters = torchaudio.functional.melscale_fbanks(n_fft // 2 + 1, 0.0, 8000.0, mel_bands, 16_000)
    empty = int((filters.amax(0) == 0).sum())
    settings = {"mel_bands": mel_bands, "n_fft": n_fft, "window_ms": 0.0625}
    refused = contextlib.nullcontext()
    if empty:
        refused = pytest.raises(UserError, match=rf"^{empty} of features.mel_bands = {mel_bands} bands lie between")
    with refused:
        config.Features(**settings).check()


@pytest.mark.parametrize("samples", [0, 1, 399, 400, 16_000])
@pytest.mark.parametrize("amplitude", [0, 1, 32_767])
def test_silence_and_fragments_are_finite(samples, amplitude):
    waveforms = torch.full((2, samples), amplitude, dtype=torch.int16)
    features, frames = LogMel(DEFAULT)(waveforms, torch.tensor([samples, 0]))
    assert frames.tolist() == [DEFAULT.frames(samples), 0]
    assert torch.isfinite(features).all()
    assert features.abs().max() < 1e-3  # a constant has nothing that varies: rounding does not become signal


def test_int16_and_float_waveforms_are_the_same_sound():
    waveform = noise(4_000)
    assert torch.equal(features_of(waveform), features_of(waveform.double() / 32_768))


def test_autocast_does_not_reach_the_features():
    waveform, samples = noise(1, 4_000), torch.tensor([4_000])
    expected, _ = LogMel(DEFAULT)(waveform, samples)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, _ = LogMel(DEFAULT)(waveform, samples)
    assert torch.equal(actual, expected)


def test_the_frame_mask_is_true_where_a_frame_is_the_utterances_own():
    assert frame_mask(torch.tensor([0, 2, 3]), 3, torch.device("cpu")).tolist() == [
        [False] * 3,
        [True, True, False],
        [True] * 3,
    ]


def test_no_product_of_the_features_runs_in_tf32():
    """Where a run allows it, as train.precision = tf32 does; a CPU has no TF32, so the switch is looked at."""
    seen = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), named=None):
            if operation.overloadpacket.__name__ in ("mm", "bmm", "addmm"):
                seen.append(torch.backends.cuda.matmul.allow_tf32)
            return operation(*arguments, **(named or {}))

    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with Products():
            LogMel(DEFAULT)(noise(1, 16_000), torch.tensor([16_000]))
        assert seen == [False, False] and torch.backends.cuda.matmul.allow_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
