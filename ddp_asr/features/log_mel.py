"""From int16 waveforms (B, S) to normalised log-mel features (B, T, F), batched, on the model's device.

Frames are cut by the *window*, and `n_fft` only pads each frame with zeros, so a frame sees its own samples and nothing
of its neighbours or of the batch's padding: T = 1 + (S - window) // hop. (`torch.stft` with `center=False` would cut by
`n_fft`.) 1024 points at 16 kHz leave no mel filter empty at 128 bands; 400 points leave four.

The Fourier transform is one matrix product (400 x 1,026 at the defaults, about 1 % of a training step's arithmetic).
cuFFT would make a plan for each shape (B, T), thousands in an epoch, and cache up to 4,096 of them in memory that
PyTorch does not count (pytorch issue 94893).

Each band is normalised per utterance, over that utterance's own frames, and everything beyond them is zero.
Always computed in float32 (or the waveform's own float type), outside autocast: the logarithm of a small power has no
meaning in eight bits of mantissa.
"""

import contextlib
import math
from collections.abc import Iterator

import torch
import torchaudio.functional
from torch import Tensor, nn

from ddp_asr import SAMPLE_RATE_HZ, config

# Added to the power before the logarithm: below the quantisation noise of 16 bits in a 25 ms window, so that digital
# silence is a floor and not minus infinity.
POWER_FLOOR = 1e-6
# Of a band: one without variation (silence, one frame) has nothing to scale up, and rounding must not become signal.
DEVIATION_FLOOR = 1e-2
INT16_SCALE = 32768.0


def frame_mask(lengths: Tensor, longest: int, device: torch.device) -> Tensor:
    """(B, longest) True where a frame is the utterance's own; the lengths (B,) are on the CPU, the mask is not."""
    return torch.arange(longest, device=device) < lengths.to(device, non_blocking=True)[:, None]


class LogMel(nn.Module):
    """Log-mel features, normalised per utterance and band."""

    transform: Tensor  # (window samples, 2 x (n_fft // 2 + 1)): cosines, then sines, under the window
    filters: Tensor  # (n_fft // 2 + 1, F)

    def __init__(self, settings: config.Features) -> None:
        super().__init__()
        self.settings = settings
        bins = settings.n_fft // 2 + 1
        self.register_buffer(
            "transform", _windowed_transform(settings.window_samples, settings.n_fft), persistent=False
        )
        filters = torchaudio.functional.melscale_fbanks(
            n_freqs=bins,
            f_min=0.0,
            f_max=SAMPLE_RATE_HZ / 2,
            n_mels=settings.mel_bands,
            sample_rate=SAMPLE_RATE_HZ,
        )
        self.register_buffer("filters", filters, persistent=False)

    @torch.no_grad()
    def forward(self, waveforms: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Waveforms (B, S), int16 or float in [-1, 1], and samples (B,), on the CPU -> features (B, T, F), frames (B,).

        The frames are on the CPU, as the samples are.
        """
        window_samples = self.settings.window_samples
        with torch.autocast(waveforms.device.type, enabled=False), _without_tf32():
            if waveforms.dtype == torch.int16:
                waveforms = waveforms.to(self.transform.dtype) / INT16_SCALE
            shortfall = window_samples - waveforms.shape[1]
            if shortfall > 0:  # a batch of fragments shorter than a window: one frame, masked below
                waveforms = nn.functional.pad(waveforms, (0, shortfall))
            frames = self.settings.frames(samples)
            cut = waveforms.unfold(1, window_samples, self.settings.hop_samples)  # (B, T, window)
            spectrum = (cut @ self.transform).unflatten(2, (2, -1))  # (B, T, 2, n_fft // 2 + 1)
            power = spectrum.square().sum(2)
            log_mel = torch.log(power @ self.filters + POWER_FLOOR)  # (B, T, F)
            return _normalise(log_mel, frames), frames


def _windowed_transform(window_samples: int, n_fft: int) -> Tensor:
    """(window samples, 2 x (n_fft // 2 + 1)) Hann window times cosines and sines, computed in float64."""
    window = torch.hann_window(window_samples, dtype=torch.float64)
    samples, bins = torch.arange(window_samples), torch.arange(n_fft // 2 + 1)
    angle = (samples[:, None] * bins % n_fft).double() * (2 * math.pi / n_fft)
    return (window[:, None] * torch.cat([angle.cos(), angle.sin()], dim=1)).to(torch.get_default_dtype())


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    """Products in full float32: with TF32's ten bits a weak band would drown in the error of a strong one."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def _normalise(log_mel: Tensor, frames: Tensor) -> Tensor:
    """Mean 0 and deviation 1 in each band over an utterance's own frames; zero beyond them."""
    own = frame_mask(frames, log_mel.shape[1], log_mel.device)[:, :, None]  # (B, T, 1)
    count = frames.clamp(min=1).to(log_mel.device, non_blocking=True)[:, None, None]
    mean = (log_mel * own).sum(1, keepdim=True) / count  # (B, 1, F)
    centred = (log_mel - mean) * own
    deviation = (centred.square().sum(1, keepdim=True) / count).sqrt()
    return centred / deviation.clamp(min=DEVIATION_FLOOR)
