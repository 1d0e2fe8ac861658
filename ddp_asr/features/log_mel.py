"""From int16 waveforms (B, S) to normalised log-mel features (B, T, F), batched, on the model's device.

Frames are cut by the *window*, and `n_fft` only pads each frame with zeros, so a frame sees its own samples and nothing
of its neighbours or of the batch's padding: T = 1 + (S - window) // hop. (`torch.stft` with `center=False` would cut by
`n_fft`.) 1024 points at 16 kHz leave no mel filter empty at 128 bands; 400 points leave four.

Each band is normalised per utterance, over that utterance's own frames, and everything beyond them is zero.
Always computed in float32 (or the waveform's own float type), outside autocast: the logarithm of a small power has no
meaning in eight bits of mantissa.
"""

import torch
import torchaudio.functional
from torch import Tensor, nn

from ddp_asr import SAMPLE_RATE_HZ, config

# Added to the power before the logarithm: below the quantisation noise of 16 bits in a 25 ms window, so that digital
# silence is a floor and not minus infinity.
POWER_FLOOR = 1e-6
INT16_SCALE = 32768.0


def frame_mask(lengths: Tensor, longest: int) -> Tensor:
    """(B, longest) True where a frame is the utterance's own."""
    return torch.arange(longest, device=lengths.device) < lengths[:, None]


class LogMel(nn.Module):
    """Log-mel features, normalised per utterance and band."""

    window: Tensor  # (window samples,)
    filters: Tensor  # (n_fft // 2 + 1, F)

    def __init__(self, settings: config.Features) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer("window", torch.hann_window(settings.window_samples), persistent=False)
        filters = torchaudio.functional.melscale_fbanks(
            n_freqs=settings.n_fft // 2 + 1,
            f_min=0.0,
            f_max=SAMPLE_RATE_HZ / 2,
            n_mels=settings.mel_bands,
            sample_rate=SAMPLE_RATE_HZ,
        )
        self.register_buffer("filters", filters, persistent=False)

    @torch.no_grad()
    def forward(self, waveforms: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Waveforms (B, S), int16 or float in [-1, 1], and samples (B,) -> features (B, T, F), frames (B,)."""
        window = self.window
        with torch.autocast(waveforms.device.type, enabled=False):
            if waveforms.dtype == torch.int16:
                waveforms = waveforms.to(window.dtype) / INT16_SCALE
            shortfall = window.numel() - waveforms.shape[1]
            if shortfall > 0:  # a batch of fragments shorter than a window: one frame, masked below
                waveforms = nn.functional.pad(waveforms, (0, shortfall))
            lengths = self.settings.frames(samples)
            cut = waveforms.unfold(1, window.numel(), self.settings.hop_samples) * window  # (B, T, window)
            spectrum = torch.view_as_real(torch.fft.rfft(cut, n=self.settings.n_fft))
            power = spectrum.square().sum(-1)  # (B, T, n_fft // 2 + 1); `abs` would take roots only to square them
            log_mel = torch.log(power @ self.filters + POWER_FLOOR)  # (B, T, F)
            return _normalise(log_mel, lengths), lengths


def _normalise(log_mel: Tensor, lengths: Tensor) -> Tensor:
    """Mean 0 and deviation 1 in each band over an utterance's own frames; zero beyond them."""
    own = frame_mask(lengths, log_mel.shape[1])[:, :, None]  # (B, T, 1)
    count = lengths.clamp(min=1)[:, None, None]
    mean = (log_mel * own).sum(1, keepdim=True) / count  # (B, 1, F)
    centred = (log_mel - mean) * own
    deviation = (centred.square().sum(1, keepdim=True) / count).sqrt()
    # A band without variation (silence, one frame) has nothing to scale up: the floor keeps rounding from becoming
    # signal.
    return centred / deviation.clamp(min=1e-2)
