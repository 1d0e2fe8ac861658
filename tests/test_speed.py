"""A change of speed: tones keep their shape and move by its factor, like soxr's; what would alias is gone."""

import numpy as np
import pytest
import soxr

from ddp_asr.data.plan import speed_samples
from ddp_asr.features.speed import change_speed

RATE_HZ, SAMPLES = 16_000, 130_000
SPEEDS = [0.85, 0.9, 0.95, 1.05, 1.1, 1.15]


def changed(waveform, speed):
    out = np.full(speed_samples(len(waveform), speed), 12_345, np.int16)
    change_speed(waveform, speed, out)
    return out.astype(np.float64)


def tone(hz):
    return np.rint(8_000 * np.sin(2 * np.pi * hz * np.arange(SAMPLES) / RATE_HZ)).astype(np.int16)


def below_tone_db(samples):
    """How far below the tone, in the middle, away from its two ends."""
    return 20 * np.log10(samples[500:-500].std() / (8_000 / np.sqrt(2)))


@pytest.mark.parametrize("speed", SPEEDS)
def test_a_tone_is_the_tone_that_a_faster_or_slower_replay_gives(speed):
    for hz in (50, 1_000, 3_000, 5_000):
        angle = 2 * np.pi * hz * speed * np.arange(round(SAMPLES / speed)) / RATE_HZ
        assert below_tone_db(changed(tone(hz), speed) - 8_000 * np.sin(angle)) < -70


@pytest.mark.parametrize("speed", [1.1, 1.15])
def test_what_would_alias_is_filtered_out(speed):
    assert below_tone_db(changed(tone(7_900), speed)) < -60


@pytest.mark.parametrize("speed", SPEEDS)
def test_speech_band_agrees_with_soxr(speed):
    spectrum = np.fft.rfft(np.random.default_rng(0).normal(size=SAMPLES))
    spectrum[np.fft.rfftfreq(SAMPLES, 1 / RATE_HZ) > 5_000] = 0
    noise = np.rint(2_000 * np.fft.irfft(spectrum, SAMPLES)).astype(np.int16)
    ours, theirs = changed(noise, speed), soxr.resample(noise, RATE_HZ * speed, RATE_HZ).astype(np.float64)
    samples = min(len(ours), len(theirs))
    difference = (ours[:samples] - theirs[:samples])[500:-500]
    assert np.abs(difference).max() <= 3  # both round to int16, and soxr adds dither


@pytest.mark.parametrize("samples", [1, 2, 30, 500, 16_001])
@pytest.mark.parametrize("speed", [0.5, 0.9, 1.2345, 1.9])
def test_every_length_is_filled_and_the_mean_stays(samples, speed):
    out = changed(np.full(samples, 1_000, np.int16), speed)
    assert len(out) == speed_samples(samples, speed) and np.abs(out).max() < 1_300
    if samples > 1_000:
        assert out[200:-200] == pytest.approx(1_000, abs=1)


def test_it_never_wraps_around():
    square = np.where(np.arange(4_000) // 40 % 2, 32_767, -32_768).astype(np.int16)  # a filter overshoots at its edges
    out = changed(square, 0.9)
    where_no_edge_is_near = (np.arange(len(out)) * 0.9 % 40 > 8) & (np.arange(len(out)) * 0.9 % 40 < 32)
    assert (np.abs(out[where_no_edge_is_near]) > 25_000).all() and out.min() == -32_768 and out.max() == 32_767
