"""Random numbers by address: the same for an utterance whoever asks, unlike for everything else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddp_asr.draws import Draw, seed_of, uniform

HASHES = np.random.default_rng(0).integers(0, 2**64, 20_000, np.uint64)


def test_a_run_goes_on_under_a_later_version():
    """Numbers written down once: other ones would give every resumed run other masks, speeds and orders."""
    assert seed_of("dropout", 0, 17, 3) == 4578784339475819782
    drawn = uniform(0, 3, np.array([1, 2**63], np.uint64), "speed", 2)
    assert drawn.tolist() == [[0.5221548917076325, 0.12175586311844722], [0.7795382134017086, 0.6904608236137636]]


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20), st.integers(0, 2**40), st.integers(0, 10**6))
def test_a_number_is_its_utterances_own_whoever_it_is_drawn_with(keys, seed, epoch):
    together = uniform(seed, epoch, np.array(keys, np.uint64), "noise", 3)
    assert together.shape == (len(keys), 3)
    assert ((together >= 0) & (together < 1)).all()
    alone = [uniform(seed, epoch, np.array([key], np.uint64), "noise", 3)[0] for key in keys]
    assert (together == alone).all()
    assert (uniform(seed, epoch, np.array(keys, np.uint64), "noise", 1) == together[:, :1]).all()


def test_the_draw_of_one_utterance_is_its_row_of_all(key_hash=2**64 - 7):
    draw = Draw("noise", 3, 5, key_hash)
    hashes = np.array([1, key_hash], np.uint64)
    assert draw.uniform(2).tolist() == draw.uniform(3)[:2].tolist() == uniform(3, 5, hashes, "noise", 2)[1].tolist()
    expected = np.random.default_rng(seed_of("noise", 3, 5, key_hash)).random(4).tolist()
    assert draw.generator().random(4).tolist() == draw.generator().random(4).tolist() == expected


def test_numbers_are_spread_evenly():
    drawn = uniform(0, 0, HASHES, "speed", 5)
    counts = np.apply_along_axis(lambda column: np.histogram(column, 50, (0, 1))[0], 0, drawn)  # (50, 5), 400 each
    assert abs(counts - 400).max() < 100  # 5 standard deviations
    # Keys that differ in one bit, and counters, are the hard cases for a mix.
    neighbours = uniform(0, 0, np.arange(20_000, dtype=np.uint64), "speed")[:, 0]
    assert abs(np.histogram(neighbours, 50, (0, 1))[0] - 400).max() < 100


@pytest.mark.parametrize(
    "one, other",
    [
        ((0, 0, "speed"), (1, 0, "speed")),
        ((0, 0, "speed"), (0, 1, "speed")),
        ((0, 1, "speed"), (1, 0, "speed")),
        ((0, 0, "speed"), (0, 0, "noise")),
        ((1, 11, "speed"), (11, 1, "speed")),
    ],
    ids=str,
)
def test_another_address_has_nothing_to_do_with_it(one, other):
    drawn = [uniform(seed, epoch, HASHES, purpose)[:, 0] for seed, epoch, purpose in (one, other)]
    assert abs(np.corrcoef(drawn)[0, 1]) < 0.035  # 5 standard deviations


def test_the_numbers_of_one_utterance_have_nothing_to_do_with_each_other():
    correlation = np.corrcoef(uniform(0, 0, HASHES, "time masks", 6), rowvar=False)
    assert abs(correlation - np.eye(6)).max() < 0.035


@given(st.lists(st.one_of(st.integers(), st.sampled_from(["dropout", "order"])), min_size=1, max_size=4))
def test_a_seed_fits_every_generator(address):
    seed = seed_of(*address)
    assert 0 <= seed < 2**63
    assert seed == seed_of(*address) != seed_of(*address, 0)


def test_parts_of_an_address_do_not_run_together():
    assert seed_of("dropout", 1, 23) != seed_of("dropout", 12, 3)
