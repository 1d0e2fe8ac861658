"""A plan trains every utterance once an epoch, in steps of exactly K micro-batches, for any number of processes."""

import re
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddp_asr import SAMPLE_RATE_HZ
from ddp_asr.config import Batch
from ddp_asr.data.plan import Plan, draw_speeds, fits, micro_batches_of_rank, speed_samples
from ddp_asr.errors import UserError

SPEEDS = st.sampled_from([(1.0,), (0.9, 1.0, 1.1), (0.5, 2.0)])


@st.composite
def plans(draw):
    """Arguments of a `Plan`: few or many utterances, alike or of all lengths, with room for one or for dozens."""
    lengths = draw(
        st.one_of(
            st.lists(st.integers(1, 20 * SAMPLE_RATE_HZ), min_size=1, max_size=120),
            st.lists(st.sampled_from([5, 80_000, 200_000]), min_size=1, max_size=120),
        )
    )
    samples = np.array(lengths, np.int64)
    speeds = draw(SPEEDS)
    # From just above the longest (one fits, two do not) to thirty times as much.
    longest_s = speed_samples(samples, min(speeds)).max() / SAMPLE_RATE_HZ
    max_seconds = float(longest_s * draw(st.floats(1.0, 30.0)) + 1e-6)
    settings = Batch(max_seconds, draw(st.integers(1, 9)), draw(st.integers(1, 12)))
    key_hash = np.random.default_rng(draw(st.integers(0, 99))).integers(0, 2**64, len(samples), np.uint64)
    return {"samples": samples, "key_hash": key_hash, "settings": settings, "speeds": speeds, "seed": 7}


def made(arguments):
    """The plan, or None where there is none; that it is possible with the remedy that the error names."""
    try:
        return Plan(**arguments)
    except UserError as error:
        settings, utterances = arguments["settings"], len(arguments["samples"])
        if utterances < settings.micro_batches:
            assert f"batch.micro_batches={utterances}" in str(error)
        else:
            suffices = float(re.search(r"set batch.max_seconds=([\d.e+]+)", str(error))[1])
            Plan(**{**arguments, "settings": Batch(suffices, settings.micro_batches, settings.buckets)})
        return None


@given(plans())
def test_every_utterance_once_in_exactly_k_micro_batches_a_step_none_too_large(arguments):
    plan = made(arguments)
    if plan is None:
        return
    k, max_samples = plan.micro_batches, plan.settings.max_seconds * SAMPLE_RATE_HZ
    for number in range(3):
        epoch = plan.epoch(number)
        assert sorted(epoch.rows.tolist()) == list(range(len(plan)))
        assert len(epoch.bounds) == plan.steps_per_epoch * k + 1
        assert (np.diff(epoch.bounds) >= 1).all()
        assert epoch.cost.max() <= max_samples
        lengths = speed_samples(arguments["samples"][epoch.rows], epoch.speed)
        assert (lengths == epoch.samples).all()


@given(plans(), st.permutations(range(12)))
def test_the_order_of_the_index_does_not_matter(arguments, blocks):
    plan = made(arguments)
    if plan is None:
        return
    order = np.concatenate([np.arange(len(plan))[block::12] for block in blocks])
    shuffled = {**arguments, "samples": arguments["samples"][order], "key_hash": arguments["key_hash"][order]}
    one, other = plan.epoch(1), Plan(**shuffled).epoch(1)
    assert (arguments["key_hash"][one.rows] == shuffled["key_hash"][other.rows]).all()
    assert (one.bounds == other.bounds).all() and (one.speed == other.speed).all()


@given(plans(), st.integers(1, 9))
def test_the_shares_of_all_ranks_are_the_plan(arguments, world_size):
    plan = made(arguments)
    if plan is None:
        return
    k = plan.micro_batches
    if world_size > k:
        with pytest.raises(UserError, match=rf"{world_size} processes .* batch.micro_batches={world_size}"):
            micro_batches_of_rank(k, 0, world_size)
        return
    shares = [micro_batches_of_rank(k, rank, world_size) for rank in range(world_size)]
    assert [m for mine in shares for m in mine] == list(range(k))
    assert {len(mine) for mine in shares} <= {k // world_size, k // world_size + 1}
    assert 0 < plan.epoch(0).balance(world_size) <= 1


@given(plans(), st.integers(0, 4))
def test_an_epoch_found_at_once_is_the_one_replayed(arguments, number):
    replayed = made(arguments)
    if replayed is None:
        return
    for earlier in range(number):
        replayed.epoch(earlier)
    one, other = replayed.epoch(number), Plan(**arguments).epoch(number)
    for name in ("rows", "bounds", "speed", "samples"):
        assert (getattr(one, name) == getattr(other, name)).all()


@given(plans(), st.data())
def test_no_epoch_has_larger_neighbouring_micro_batches_than_the_largest(arguments, data):
    """One micro-batch, or several that run as one batch, wherever in its step a rank's part of it begins."""
    plan = made(arguments)
    if plan is None:
        return
    k, targets = plan.micro_batches, arguments["samples"] % 97 + 1
    fuse = data.draw(st.integers(1, k), label="fuse")
    largest = plan.largest_micro_batches(targets, fuse)
    slowest = speed_samples(arguments["samples"], min(arguments["speeds"]))
    epoch = plan.epoch(0)
    places = [(step, first) for step in range(plan.steps_per_epoch) for first in range(k - fuse + 1)]
    batches = [epoch.rows[epoch.span(step, first, fuse)] for step, first in places]
    costs = [len(rows) * int(slowest[rows].max()) for rows in batches]
    assert slowest[largest["the longest utterance"]].max() == slowest.max()
    assert len(largest["the most utterances"]) == max(map(len, batches))
    most_audio = largest["the most audio"]
    assert len(most_audio) * slowest[most_audio].max() >= max(costs)
    most_targets = largest["the most targets"]
    assert len(most_targets) * targets[most_targets].max() >= max(len(rows) * targets[rows].max() for rows in batches)


def test_where_the_longest_are_alone_a_plan_names_what_holds_two_of_them():
    samples = np.array([90_000] * 12 + [245_000] * 4)  # 5.6 s and 15.3 s
    key_hash = np.arange(16, dtype=np.uint64)
    assert Plan(samples, key_hash, settings=Batch(31.0, 4, 12)).advise() is None
    advice = Plan(samples, key_hash, settings=Batch(31.0, 4, 12), speeds=(0.9, 1.0)).advise()
    assert advice is not None and "utterances of up to 17.0 s at speed 0.9 are alone" in advice
    assert "batch.max_seconds = 31 " in advice and "34.1 would hold two" in advice
    assert Plan(samples, key_hash, settings=Batch(34.1, 4, 12), speeds=(0.9, 1.0)).advise() is None


def test_epochs_and_seeds_differ():
    samples, key_hash = librispeech_like(2_000)
    plan = Plan(samples, key_hash, settings=Batch())
    other_seed = Plan(samples, key_hash, settings=Batch(), seed=1)
    orders = [plan.epoch(0).rows, plan.epoch(1).rows, other_seed.epoch(0).rows]
    # By chance a handful of 2,000 utterances keep their place.
    assert all((a != b).mean() > 0.95 for a, b in [orders[:2], orders[1:], orders[::2]])


def test_one_long_utterance_a_micro_batch_takes_what_it_lacks_from_the_shorter_ones():
    # 5 utterances of which no two fit together and 11 that do: with K = 4 the 5 must become 8.
    samples = np.array([90_000] * 11 + [200_000] * 5)
    plan = Plan(samples, np.arange(16, dtype=np.uint64), settings=Batch(20.0, 4, 12))
    sizes = np.diff(plan.epoch(0).bounds).reshape(-1, 4)
    assert sorted(map(tuple, sizes.tolist()))[:2] == [(1, 1, 1, 1)] * 2


def test_too_few_utterances_say_what_to_lower():
    with pytest.raises(UserError, match=r"3 usable utterances cannot fill the 8 .* batch.micro_batches=3"):
        Plan(np.full(3, 16_000), np.arange(3, dtype=np.uint64), settings=Batch())


def test_where_one_fits_and_the_count_is_uneven_the_error_names_what_suffices():
    with pytest.raises(UserError, match=r"set batch.max_seconds=20 "):
        Plan(np.full(9, 160_000), np.arange(9, dtype=np.uint64), settings=Batch(15.0, 8))


@pytest.mark.parametrize(
    "settings, speeds, named",
    [
        (Batch(micro_batches=0), (1.0,), "batch.micro_batches is 0"),
        (Batch(buckets=0), (1.0,), "batch.buckets is 0"),
        (Batch(max_seconds=0.0), (1.0,), "batch.max_seconds is 0"),
        (Batch(), (), "augment.speeds is"),
        (Batch(), (1.0, -1.0), "augment.speeds is"),
    ],
)
def test_impossible_settings_are_named(settings, speeds, named):
    with pytest.raises(UserError, match=named):
        Plan(np.full(9, 160_000), np.arange(9, dtype=np.uint64), settings=settings, speeds=speeds)


def test_fits_is_what_a_plan_takes():
    settings, speeds = Batch(10.0, 1), (0.8, 1.0)
    samples = np.array([127_999, 128_000, 128_001, 128_002])  # 128,000 / 0.8 = 160,000 = 10 s
    usable = fits(samples, settings.max_seconds, speeds)
    assert usable.tolist() == [True, True, False, False]
    key_hash = np.arange(4, dtype=np.uint64)
    Plan(samples[usable], key_hash[usable], settings=settings, speeds=speeds)
    with pytest.raises(ValueError, match="leave it out first"):
        Plan(samples, key_hash, settings=settings, speeds=speeds)


@given(st.integers(1, 10**8), st.floats(0.5, 2.0))
def test_the_speed_arithmetic_is_the_same_for_one_and_for_many(samples, speed):
    one = speed_samples(np.array([samples]), speed)[0]
    assert one == speed_samples(np.array([samples, 1]), np.array([speed, 1.0]))[0] == max(1, round(samples / speed))


def test_speeds_are_drawn_evenly_and_anew_each_epoch():
    key_hash = np.random.default_rng(0).integers(0, 2**64, 30_000, np.uint64)
    drawn = draw_speeds((0.9, 1.0, 1.1), key_hash, seed=0, epoch=0)
    assert np.unique(drawn, return_counts=True)[1].min() > 9_700  # 10,000 each, 3.7 standard deviations below
    assert 0.3 < (drawn == draw_speeds((0.9, 1.0, 1.1), key_hash, seed=0, epoch=1)).mean() < 0.37


def librispeech_like(utterances):
    """Lengths like LibriSpeech's: three quarters between 12 and 16.5 s, the others spread below."""
    generator = np.random.default_rng(0)
    long, short = generator.normal(14.5, 1.2, utterances), generator.uniform(1.3, 15.0, utterances)
    seconds = np.where(generator.random(utterances) < 0.75, long, short).clip(1.3, 24.5)
    return (seconds * SAMPLE_RATE_HZ).astype(np.int64), generator.integers(0, 2**64, utterances, np.uint64)


def test_librispeech_960_is_planned_in_under_a_second_with_little_padding():
    samples, key_hash = librispeech_like(281_241)
    started = time.process_time()
    plan = Plan(samples, key_hash, settings=Batch(120.0, 32, 30))
    epoch = plan.epoch(0)
    assert time.process_time() - started < 1.0  # 0.1 s measured
    assert epoch.padding < 0.05
    assert epoch.balance(32) > 0.97
    # Micro-batches are full but for what does not come out even.
    fewest = samples.sum() / SAMPLE_RATE_HZ / (32 * 120.0)
    assert plan.steps_per_epoch < 1.15 * fewest


def test_a_small_set_keeps_full_micro_batches():
    samples, key_hash = librispeech_like(800)  # 2.9 hours: 3 steps of 8 x 120 s are 0.8 hours
    plan = Plan(samples, key_hash, settings=Batch(120.0, 8, 30))
    assert len(plan.buckets) <= 3
    assert plan.epoch(0).cost.mean() > 0.8 * 120 * SAMPLE_RATE_HZ
