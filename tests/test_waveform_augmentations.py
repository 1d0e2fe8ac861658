"""What every waveform augmentation promises, over all that are registered, and how loud white noise is."""

import numpy as np
import pytest

from ddp_asr.config import Augment, Noise
from ddp_asr.draws import Draw
from ddp_asr.features import registered, waveform_augmentations

# Settings that turn each one on, for `share` of the utterances.
EXAMPLES = {"noise": lambda share: Augment(noise=Noise(share=share, snr_db_min=10.0, snr_db_max=20.0))}
every = pytest.mark.parametrize("kind", registered(), ids=lambda kind: kind.__name__)

SPEECH = (np.random.default_rng(0).normal(size=3_000) * np.linspace(0, 3_000, 3_000)).astype(np.int16)
HASHES = np.random.default_rng(1).integers(0, 2**64, 2_000, np.uint64).tolist()


def make(kind, share=1.0):
    (op,) = waveform_augmentations(EXAMPLES[kind.purpose](share))
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
    op, short = make(kind, share), SPEECH[-50:]
    changed = sum((applied(op, short, key_hash=key_hash) != short).any() for key_hash in HASHES)
    assert changed / len(HASHES) == pytest.approx(share, abs=0.04)


def test_noise_is_as_loud_as_the_settings_say():
    op, ratios_db = make(registered()[0]), []
    for key_hash in HASHES[:500]:
        noise = applied(op, key_hash=key_hash).astype(float) - SPEECH
        ratios_db.append(10 * np.log10(np.mean(SPEECH.astype(float) ** 2) / np.mean(noise**2)))
    assert 9.8 < min(ratios_db) < 10.3 and 19.7 < max(ratios_db) < 20.2
    assert np.histogram(ratios_db, 5, (9.8, 20.2))[0].min() > 60


def test_noise_is_white_and_another_stretch_for_each_utterance():
    """Also under an utterance that is longer than the noise on record (65 s)."""
    op = make(registered()[0])
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
    noisy = applied(make(registered()[0]))
    assert noisy[-6:].tolist() == [-3215, -4717, 2992, -4144, -6006, -2167] and noisy.sum() == -181606
