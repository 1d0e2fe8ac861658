"""Audio as it goes into a shard: what is cut, and what no recording of speech has."""

import io
import struct
import tracemalloc

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from ddp_asr.data import audio
from ddp_asr.data.audio import pack
from ddp_asr.data.sources import BAD_AUDIO, IMPLAUSIBLE, TOO_LONG, Utterance
from tests.tiny_speech import encode, noise


def packed(data, **fields):
    return pack(Utterance("a", "a", "TEXT", data=data, **fields))


def decoded(result):
    return soundfile.read(io.BytesIO(result.flac), dtype="int16")[0]


# ---- offset and duration --------------------------------------------------------------------------------------------

SECONDS = st.one_of(st.none(), st.floats(0.001, 4), st.integers(1, 40).map(lambda tenths: tenths / 10))


@settings(max_examples=200)
@given(
    length_s=st.floats(0.05, 3), rate_hz=st.sampled_from([8_000, 16_000, 44_100]), offset_s=SECONDS, duration_s=SECONDS
)
def test_offset_and_duration_are_cut_to_the_sample_or_refused(length_s, rate_hz, offset_s, duration_s):
    """An `offset` is 0 by default, as in NeMo. Nothing is trained that is much longer or shorter than was stated."""
    waveform = noise(length_s, rate_hz=rate_hz)
    result = packed(encode(waveform, rate_hz), offset_s=offset_s, duration_s=duration_s)
    there = waveform[round((offset_s or 0) * rate_hz) :]
    stated = len(there) if duration_s is None else round(duration_s * rate_hz)
    whole = offset_s is None and 0 <= len(there) - stated <= audio.DURATION_TOLERANCE_S * rate_hz
    expected = there if whole else there[:stated]
    if result.reason:
        missing_s = (stated - len(expected)) / rate_hz
        assert result.reason == BAD_AUDIO
        assert not len(expected) or missing_s > 0.99 * audio.DURATION_TOLERANCE_S
        return
    assert result.samples == pytest.approx(len(expected) * 16_000 / rate_hz, abs=1)
    if duration_s is not None:
        assert abs(result.samples / 16_000 - duration_s) <= audio.DURATION_TOLERANCE_S + 0.01 * duration_s + 0.001
    if rate_hz == 16_000:
        assert np.array_equal(decoded(result), expected)


# ---- what no recording of speech has --------------------------------------------------------------------------------


def wav(rate_hz, channels=1, frames=1_000):
    """16 bits, with a header that states anything."""
    data = noise(frames * channels / 16_000).tobytes()
    form = struct.pack("<HHIIHH", 1, channels, rate_hz, rate_hz * channels * 2 % 2**32, channels * 2, 16)
    return (
        b"RIFF"
        + struct.pack("<I", 36 + len(data))
        + b"WAVEfmt \x10\0\0\0"
        + form
        + b"data"
        + struct.pack("<I", len(data))
        + data
    )


@given(rate_hz=st.one_of(st.integers(1, 10_000), st.integers(1, 2**31 - 1)), channels=st.integers(1, 200))
def test_a_header_is_believed_within_its_bounds_only(rate_hz, channels):
    result = packed(wav(rate_hz, channels))
    believable = audio.MIN_RATE_HZ <= rate_hz <= audio.MAX_RATE_HZ and channels <= audio.MAX_CHANNELS
    assert (result.reason == "") == believable
    if believable:
        assert result.samples == pytest.approx(1_000 * 16_000 / rate_hz, abs=1)
    elif result.reason == IMPLAUSIBLE:
        assert f"{rate_hz:,} Hz" in result.detail or f"{channels} channels" in result.detail
    else:
        assert result.reason == BAD_AUDIO  # libsndfile refuses some of them itself


def test_memory_follows_the_result_and_not_the_header(monkeypatch):
    """16 MB of samples in 30 KB of FLAC, and a file of an hour and more of silence."""
    flac = encode(np.zeros((30 * 192_000, 2), np.int16), 192_000)
    assert len(flac) < 100_000
    packed(encode(noise(), 44_100))  # imports
    tracemalloc.start()
    assert packed(flac).samples == 30 * 16_000
    assert tracemalloc.get_traced_memory()[1] < 16e6
    tracemalloc.stop()
    monkeypatch.setattr(audio, "MAX_UTTERANCE_S", 29.0)
    result = packed(flac)
    assert (result.reason, result.detail) == (TOO_LONG, "30.000 s, at most 29 s are taken")


@given(
    share=st.sampled_from([0, 0.001, 0.009, 0.011, 0.05, 0.5, 1]),
    peak=st.floats(1.0625, 2.0**127, width=32),
    channels=st.integers(1, 3),
    rate_hz=st.sampled_from([8_000, 16_000]),
    format=st.sampled_from(["WAV", "AIFF"]),
)
def test_samples_beyond_full_scale_are_clipped_where_they_are_few_and_else_refused(
    share, peak, channels, rate_hz, format
):
    sound = np.full((10_000, channels), 0.25, np.float32)
    beyond = np.linspace(0, len(sound) - 1, round(share * len(sound))).astype(int)
    sound[beyond] = peak * np.where(np.arange(len(beyond)) % 2, 1, -1)[:, None]
    result = packed(encode(sound, rate_hz, format, "FLOAT"))
    if share > audio.MAX_BEYOND_FULL_SCALE or (share and peak > audio.MAX_PEAK):
        assert result.reason == IMPLAUSIBLE
        assert "beyond full scale" in result.detail and f"the highest is {peak:.4g}" in result.detail
    else:
        assert (result.reason, result.samples) == ("", len(sound) * 16_000 // rate_hz)


def test_16_bit_integers_in_floating_point_are_refused():
    samples = noise(1).astype(np.float32)
    assert packed(encode(samples, format="WAV", subtype="FLOAT")).reason == IMPLAUSIBLE
    assert packed(encode(samples / 32768, format="WAV", subtype="FLOAT")).reason == ""


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_is_refused_in_any_channel(value):
    sound = np.zeros((1_000, 2), np.float32)
    sound[999, 1] = value
    result = packed(encode(sound, format="WAV", subtype="FLOAT"))
    assert (result.reason, result.detail) == (BAD_AUDIO, "samples that are not finite")
