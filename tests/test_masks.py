"""SpecAugment's masks: inside the utterance, as wide as allowed, the utterance's own whatever batch it is in."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddp_asr.config import Augment
from ddp_asr.features.masks import apply, draw

SETTINGS = Augment(frequency_masks=2, frequency_mask_bands=15, time_masks=3, time_mask_share=0.1)
HASHES = np.random.default_rng(0).integers(0, 2**64, 4_000, np.uint64)
UTTERANCES = st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 3_000)), min_size=1, max_size=20)


def masks_of(utterances, settings=SETTINGS, seed=0, epoch=0, views=1):
    key_hash, frames = zip(*utterances, strict=True)
    return draw(settings, seed, epoch, np.array(key_hash, np.uint64), np.array(frames, np.int64), 40, views)


def tensors(masks):
    return {name: torch.from_numpy(spans) for name, spans in masks.items()}


@given(UTTERANCES)
def test_masks_lie_within_the_utterance_and_their_widths_within_the_limits(utterances):
    masks = masks_of(utterances)
    assert masks["frequency"].shape == (len(utterances), 2, 2) and masks["time"].shape == (len(utterances), 3, 2)
    frames = np.array([frames for _, frames in utterances])[:, None]
    for spans, length, widest in (
        (masks["frequency"], 40, 15),
        (masks["time"], frames, np.floor(0.1 * frames)),
    ):
        first, end = spans[:, :, 0], spans[:, :, 1]
        assert (first >= 0).all() and (first <= end).all() and (end <= length).all()
        assert (end - first <= widest).all()


def test_every_width_and_every_place_comes_up_evenly():
    frames = np.full(4_000, 100)
    spans = draw(SETTINGS, 0, 0, HASHES, frames, mel_bands=40)["frequency"].reshape(-1, 2)
    widths = np.bincount(spans[:, 1] - spans[:, 0], minlength=16)
    assert len(widths) == 16 and (abs(widths - 500) < 110).all()  # 8,000 over 0 to 15: 5 standard deviations
    widest = spans[spans[:, 1] - spans[:, 0] == 15, 0]
    assert set(widest) == set(range(26))  # from the lowest band to the highest


@given(UTTERANCES, st.randoms())
def test_an_utterances_masks_depend_neither_on_its_batch_nor_on_its_place(utterances, random):
    order = list(range(len(utterances)))
    random.shuffle(order)
    together, shuffled = masks_of(utterances), masks_of([utterances[n] for n in order])
    for name in ("frequency", "time"):
        assert (together[name][order] == shuffled[name]).all()
        assert (masks_of(utterances[:1])[name][0] == together[name][0]).all()


def test_seed_epoch_and_key_each_draw_other_masks():
    utterances = [(int(key), 1_000) for key in HASHES[:50]]
    first = masks_of(utterances)
    for other in (
        masks_of(utterances, seed=1),
        masks_of(utterances, epoch=1),
        masks_of([(key ^ 1, frames) for key, frames in utterances]),
    ):
        for name in ("frequency", "time"):
            # By chance a mask in about 400 comes out the same.
            assert (other[name] == first[name]).all(axis=2).mean() < 0.1


def test_number_and_width_of_the_masks_of_one_kind_do_not_move_the_other():
    utterances = [(int(key), 1_000) for key in HASHES[:50]]
    more = Augment(frequency_masks=5, frequency_mask_bands=15, time_masks=3, time_mask_share=0.1)
    assert (masks_of(utterances, more)["time"] == masks_of(utterances)["time"]).all()


@given(UTTERANCES)
def test_what_is_masked_is_zero_and_nothing_else_is_touched(utterances):
    utterances = [(key, min(frames, 60)) for key, frames in utterances]
    masks = masks_of(utterances)
    features = torch.arange(1.0, len(utterances) * 60 * 40 + 1).view(-1, 60, 40)
    expected = features.clone()
    for row in range(len(utterances)):
        for first, end in masks["frequency"][row]:
            expected[row, :, first:end] = 0
        for first, end in masks["time"][row]:
            expected[row, first:end] = 0
    before = features.clone()
    (masked,) = apply(features, tensors(masks), 1)
    assert torch.equal(masked, expected)
    assert torch.equal(features, before)


@pytest.mark.parametrize(
    "settings",
    [Augment(frequency_masks=0, time_masks=0), Augment(frequency_mask_bands=0, time_mask_share=0.0)],
    ids=["no masks", "masks of no width"],
)
def test_without_masks_nothing_happens(settings):
    features = torch.randn(2, 30, 40)
    assert torch.equal(apply(features, tensors(masks_of([(1, 30), (2, 12)], settings)), 1)[0], features)


def test_two_views_have_masks_of_their_own_and_together_all_of_them():
    settings = Augment(frequency_masks=1, frequency_mask_bands=9, time_masks=2)
    masks = masks_of([(int(key), 60) for key in HASHES[:20]], settings, views=2)
    assert masks["frequency"].shape == (20, 2, 2) and masks["time"].shape == (20, 4, 2)
    one, other = apply(torch.ones(20, 60, 40), tensors(masks), 2)
    assert not torch.equal(one, other)
    everything = apply(torch.ones(20, 60, 40), tensors(masks), 1)[0]
    assert torch.equal(one * other, everything)
