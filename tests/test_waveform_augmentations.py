"""What every waveform augmentation promises, over all that are registered, and how loud white noise is."""

import numpy as np
import pytest
import torch
import torchaudio

from ddp_asr.config import Augment, Background, Noise, Pitch, Room, Volume
from ddp_asr.draws import Draw
from ddp_asr.features import registered, waveform_augmentations
from ddp_asr.features.pitch import shift, stretch
from ddp_asr.features.room import convolve

# Settings that turn each one on, for `share` of the utterances.
EXAMPLES = {
    "pitch": lambda share: Augment(pitch=Pitch(share=share)),
    "room": lambda share: Augment(room=Room(share=share)),
    "background": lambda share: Augment(background=Background(share=share, snr_db_min=10.0, snr_db_max=20.0)),
    "noise": lambda share: Augment(noise=Noise(share=share, snr_db_min=10.0, snr_db_max=20.0)),
    "volume": lambda share: Augment(volume=Volume(share=share, db_min=-20.0, db_max=-1.0)),
}
KINDS = {kind.purpose: kind for kind in registered()}
every = pytest.mark.parametrize("kind", registered(), ids=lambda kind: kind.__name__)

SPEECH = (np.random.default_rng(0).normal(size=3_000) * np.linspace(0, 3_000, 3_000)).astype(np.int16)
HASHES = np.random.default_rng(1).integers(0, 2**64, 2_000, np.uint64).tolist()


class Kept:
    """Recordings in memory, in place of those in shards; `heard` are the stretches that were read."""

    def __init__(self, *recordings):
        self.recordings = [np.asarray(recording, np.int16) for recording in recordings]
        self.samples = np.array([len(recording) for recording in self.recordings])
        self.heard = []

    def read(self, number, first, samples):
        assert first >= 0 and 0 < samples <= self.samples[number] - first
        self.heard.append((number, first, samples))
        return self.recordings[number][first : first + samples]


def hum(samples, seed):
    return np.cumsum(np.random.default_rng(seed).normal(size=samples)) * 20


def response(samples, seed, peak=0, decay=0.3):
    """Noise that dies away from its peak on, louder than all of it; `decay` in natural logarithms for 100 samples."""
    random = np.random.default_rng(seed)
    found = random.normal(size=samples) * 5_000 * np.exp(-decay * np.arange(samples) / 100)
    found = np.clip(found, -12_000, 12_000)
    found[:peak] *= 0.01
    found[peak] = -30_000
    return found


CLIPS = {
    "background": Kept(hum(500, 2), hum(9_000, 3), hum(3_000, 4)),
    "room": Kept(*(response(800 + 30 * seed, seed, peak=10 * seed) for seed in range(60))),
}


def make(kind, share=1.0, clips=CLIPS):
    (op,) = waveform_augmentations(EXAMPLES[kind.purpose](share), clips)
    assert isinstance(op, kind)
    return op


def applied(op, waveform=SPEECH, *, seed=0, epoch=0, key_hash=7):
    return op(waveform, Draw(op.purpose, seed, epoch, key_hash))


def test_every_one_has_an_example_and_a_purpose_of_its_own():
    assert [kind.purpose for kind in registered()] == list(EXAMPLES)


def test_all_are_off_by_default():
    assert waveform_augmentations(Augment()) == []


@every
@pytest.mark.parametrize("samples", [1, 2, 400, 3_000])
def test_length_and_type_stay_and_the_waveform_given_is_not_touched(kind, samples):
    waveform = SPEECH[:samples].copy()
    changed = applied(make(kind), waveform)
    assert changed.shape == (samples,) and changed.dtype == np.int16
    assert (waveform == SPEECH[:samples]).all()
    assert (applied(make(kind), np.zeros(samples, np.int16)).shape) == (samples,)


@every
def test_it_is_a_function_of_seed_epoch_and_key(kind):
    op = make(kind)
    first = applied(op)
    for _ in range(2):
        applied(op, key_hash=8)  # whatever came before
        assert (applied(op) == first).all()
    for other in ({"seed": 1}, {"epoch": 1}, {"key_hash": 8}):
        assert (applied(op, **other) != first).any()


@every
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_it_changes_the_share_of_utterances_that_is_set(kind, share):
    """Of 2,000 utterances: 0.04 are at least 3.5 standard deviations."""
    op, short = make(kind, share), SPEECH[-50:]
    changed = sum((applied(op, short, key_hash=key_hash) != short).any() for key_hash in HASHES)
    assert changed / len(HASHES) == pytest.approx(share, abs=0.04)


@pytest.mark.parametrize("kind", [KINDS["noise"], KINDS["background"]], ids=lambda kind: kind.__name__)
def test_noise_is_as_loud_as_the_settings_say(kind):
    op, ratios_db = make(kind), []
    for key_hash in HASHES[:500]:
        noise = applied(op, key_hash=key_hash).astype(float) - SPEECH
        ratios_db.append(10 * np.log10(np.mean(SPEECH.astype(float) ** 2) / np.mean(noise**2)))
    assert 9.8 < min(ratios_db) < 10.3 and 19.7 < max(ratios_db) < 20.2
    assert np.histogram(ratios_db, 5, (9.8, 20.2))[0].min() > 60


def test_noise_is_white_and_another_stretch_for_each_utterance():
    """Also under an utterance that is longer than the noise on record (65 s)."""
    op = make(KINDS["noise"])
    for samples in (100_000, 1_200_000):
        loud = (np.random.default_rng(2).normal(size=samples) * 1_000).astype(np.int16)
        one, other = (applied(op, loud, key_hash=key_hash).astype(float) - loud for key_hash in (1, 2))
        assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < 0.01 and abs(np.corrcoef(one, other)[0, 1]) < 0.02
        assert np.mean((one / one.std()) ** 4) == pytest.approx(3.0, abs=0.1)  # of a normal distribution


def test_noise_never_wraps_around():
    loud = np.full(2_000, 32_700, np.int16)
    (op,) = waveform_augmentations(Augment(noise=Noise(share=1.0, snr_db_min=0.0, snr_db_max=0.0)))
    assert applied(op, loud).max() == 32_767


def test_a_run_goes_on_under_a_later_version():
    """Samples written down once: other ones would change every run that is resumed."""
    noisy = applied(make(KINDS["noise"]))
    assert noisy[-6:].tolist() == [-3215, -4717, 2992, -4144, -6006, -2167] and noisy.sum() == -181606


# ---- recorded noise --------------------------------------------------------------------------------------------------


def background(*recordings, snr_db=5.0):
    settings = Augment(background=Background(share=1.0, snr_db_min=snr_db, snr_db_max=snr_db))
    clips = Kept(*recordings)
    return waveform_augmentations(settings, {"background": clips})[0], clips


def test_recorded_noise_is_that_of_torchaudio():
    """`add_noise` takes the same ratio of mean squares; rounding to int16 is all that differs."""
    op, clips = background(hum(9_000, 3), hum(3_000, 4))
    for key_hash in range(20):
        mixed = applied(op, key_hash=key_hash)
        number, first, samples = clips.heard.pop()
        speech, noise = (
            torch.from_numpy(part.astype(float)) for part in (SPEECH, clips.recordings[number][first : first + samples])
        )
        expected = torchaudio.functional.add_noise(speech, noise, torch.tensor(5.0, dtype=torch.float64)).numpy()
        assert np.abs(mixed - expected).max() <= 0.51


def test_every_recording_and_every_place_of_it_is_heard():
    op, clips = background(hum(3_100, 3), hum(3_000, 4), hum(40_000, 5))
    for key_hash in HASHES:
        applied(op, key_hash=key_hash)
    numbers, firsts = (
        np.array(clips.heard)[:, 0],
        [{f for n, f, _ in clips.heard if n == number} for number in range(3)],
    )
    assert np.bincount(numbers).min() > 590  # of 2,000: five standard deviations below a third are 562
    assert firsts[1] == {0} and {0, 100} <= firsts[0] and max(firsts[0]) == 100
    assert min(firsts[2]) < 500 and max(firsts[2]) > 36_500 and max(firsts[2]) <= 37_000


def test_a_noise_shorter_than_the_utterance_is_repeated_from_a_drawn_place():
    short = hum(700, 3)
    op, clips = background(short)
    added = applied(op).astype(float) - SPEECH
    assert clips.heard == [(0, 0, 700)]
    assert np.abs(added[:700] - added[700:1400]).max() <= 1.0 and np.abs(added[:200] - added[2800:]).max() <= 1.0
    starts = {int(np.argmax(applied(op, key_hash=key).astype(float) - SPEECH)) % 700 for key in range(20)}
    assert len(starts) > 5


@pytest.mark.parametrize("snr_db", [-200.0, 5.0, 200.0])
def test_silence_stays_and_silent_noise_adds_nothing(snr_db):
    """Silence has no power to compare with; no warning, which would be an error here."""
    silence = np.zeros(3_000, np.int16)
    op, _ = background(hum(9_000, 3), snr_db=snr_db)
    assert not applied(op, silence).any()
    op, _ = background(silence, snr_db=snr_db)
    assert (applied(op) == SPEECH).all()


# ---- rooms -----------------------------------------------------------------------------------------------------------


def room(recording):
    return waveform_augmentations(Augment(room=Room(share=1.0)), {"room": Kept(recording)})[0]


def reverberated(waveform, recording):
    """By the formula: a convolution in float64, cut from the peak of the response on, as loud as before."""
    recording = np.asarray(recording, np.int16).astype(float)
    peak = int(np.abs(recording).argmax())
    whole = np.convolve(waveform.astype(float), recording)[peak : peak + len(waveform)]
    return whole * np.sqrt(np.mean(waveform.astype(float) ** 2) / np.mean(whole**2))


@pytest.mark.parametrize("samples", [3_000, 40_000, 70_001])
@pytest.mark.parametrize("length, peak", [(1, 0), (2, 1), (900, 0), (5_000, 37), (16_000, 900), (40_000, 39_999)])
def test_a_room_is_the_convolution_from_the_peak_of_its_response_on(samples, length, peak):
    """Responses longer than the utterance, and a peak beyond its end, too."""
    waveform = hum(samples, 5).clip(-8_000, 8_000).astype(np.int16)
    recording = response(length, 6, peak=peak)
    assert np.abs(applied(room(recording), waveform) - reverberated(waveform, recording)).max() < 0.6


def test_the_convolution_is_that_of_torchaudio():
    waveform, recording = SPEECH.astype(np.float32), np.asarray(response(1_000, 7, peak=50), np.float32)
    expected = torchaudio.functional.fftconvolve(torch.from_numpy(waveform).double(), torch.from_numpy(recording))
    found = convolve(waveform, recording, delay=50)
    assert np.abs(found - expected[50 : 50 + len(waveform)].numpy()).max() < 1e-5 * np.abs(found).max()


def test_a_room_leaves_a_click_where_it_was_and_the_loudness_as_it_was():
    clicks = np.zeros(6_000, np.int16)
    clicks[[1_000, 4_000]] = 20_000
    heard = applied(room(response(2_000, 8, peak=300, decay=5.0)), clicks).astype(float)
    assert set(np.argsort(-np.abs(heard))[:2].tolist()) == {1_000, 4_000}
    loudness = [np.sqrt(np.mean(waveform.astype(float) ** 2)) for waveform in (clicks, heard)]
    assert loudness[0] == pytest.approx(loudness[1], rel=1e-3)


def test_an_echo_of_nothing_is_nothing():
    """A click alone is a room without walls, a silent response is no room, and silence stays silence."""
    click, silence = np.zeros(500, np.int16), np.zeros(500, np.int16)
    click[200] = -32_768
    assert np.abs(applied(room(click)).astype(int) + SPEECH).max() <= 1  # upside down
    assert (applied(room(silence)) == SPEECH).all()
    assert not applied(room(response(900, 1)), silence).any()


# ---- volume ----------------------------------------------------------------------------------------------------------


def test_the_volume_changes_by_a_drawn_number_of_decibels():
    loud = np.full(100, 10_000, np.int16)
    (op,) = waveform_augmentations(Augment(volume=Volume(share=1.0, db_min=-12.0, db_max=6.0)))
    gains_db = [20 * np.log10(applied(op, loud, key_hash=key_hash)[0] / 10_000) for key_hash in HASHES[:500]]
    assert -12.01 < min(gains_db) < -11.7 and 5.7 < max(gains_db) < 6.01
    assert np.histogram(gains_db, 5, (-12.01, 6.01))[0].min() > 60
    assert applied(op, np.full(100, -30_000, np.int16), key_hash=HASHES[int(np.argmax(gains_db))]).min() == -32_768


# ---- pitch -----------------------------------------------------------------------------------------------------------

SEMITONES = [-12, -2, -0.25, 0.25, 1, 2, 12]


def tone(hz, samples=16_000):
    return (8_000 * np.sin(2 * np.pi * hz / 16_000 * np.arange(samples))).astype(np.int16)


def loudest_hz(waveform):
    windowed = waveform * np.hanning(len(waveform))
    return float(np.abs(np.fft.rfft(windowed, 1 << 18)).argmax() * 16_000 / (1 << 18))


@pytest.mark.parametrize("semitones", SEMITONES)
@pytest.mark.parametrize("hz", [220.0, 1_000.0])
def test_every_frequency_is_multiplied_and_as_loud_as_before(hz, semitones):
    factor = 2 ** (semitones / 12)
    shifted = shift(tone(hz), factor)
    assert loudest_hz(shifted) == pytest.approx(hz * factor, rel=5e-3)  # a semitone is 6 %
    middle = shifted[2_000:-2_000].astype(float)
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(8_000 / np.sqrt(2), rel=0.03)


@pytest.mark.parametrize("semitones", SEMITONES)
def test_a_change_of_pitch_keeps_times_and_loudness(semitones):
    """Of three tones with silence between them, each stays in its place, to 4 ms, and as loud as it was."""
    waveform, spans = np.zeros(16_000, np.int16), ((0, 3_000), (6_000, 9_000), (13_000, 16_000))
    for first, last in spans:
        waveform[first:last] = tone(700, last - first)
    energy = shift(waveform, 2 ** (semitones / 12)).astype(float) ** 2
    for first, last in spans:
        around = np.arange(max(0, first - 1_500), min(16_000, last + 1_500))
        centre = (energy[around] * around).sum() / energy[around].sum()
        assert centre == pytest.approx((first + last) / 2, abs=64 if abs(semitones) <= 2 else 256)
        assert energy[first + 400 : last - 400].mean() == pytest.approx(8_000**2 / 2, rel=0.1)
    assert energy[3_500:5_500].max() < 100 and energy[9_500:12_500].max() < 100


def test_nothing_is_stretched_to_itself():
    waveform = SPEECH.astype(np.float32)
    assert np.abs(stretch(waveform, len(waveform), 1.0) - waveform).max() < 0.01


def test_a_change_of_pitch_of_silence_is_silence():
    assert not shift(np.zeros(3_000, np.int16), 1.1).any()


def test_the_ends_of_the_range_of_volume_are_silence_and_full_scale():
    ends = [Augment(volume=Volume(share=1.0, db_min=db, db_max=db)) for db in (-90.0, 90.0)]
    faint, loud = (applied(waveform_augmentations(each)[0]) for each in ends)
    assert not faint.any() and {-32_768, 32_767} <= set(loud.tolist())
