"""Dropout by hashing: shares, independence, what a mask depends on, its gradient, and the CUDA kernel's arithmetic."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddp_asr.encoders.dropout import Dropout, drop, hash_vectors
from tests.conftest import REPOSITORY

SEEDS = torch.tensor([5, -7, 2**62])


def dropout(p=0.1, site=11):
    module = Dropout(p)
    module.site = site
    return module


def kept(shape, p=0.1, site=11, seeds=SEEDS, rows=0, frames=1):
    """Which elements are kept, as 1.0 and 0.0."""
    return (dropout(p, site)(torch.ones(shape), seeds, rows=rows, frames=frames) > 0).float()


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_so_many_are_dropped_and_the_others_make_up_for_them(p):
    out = dropout(p)(torch.ones(3, 2000, 128), SEEDS)
    share = (out == 0).float().mean()
    assert abs(share - p) < 5 * (p * (1 - p) / out.numel()) ** 0.5
    assert torch.equal(out.unique(), torch.tensor([0.0, 1 / (1 - p)]))


def correlation(one, other):
    return torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1].abs().item()


def test_elements_are_independent():
    """Columns, neighbouring frames, channels, rows, sites, and next seeds: correlations as those of true randomness."""
    mask = kept((3, 4000, 64))
    columns = torch.corrcoef(mask.flatten(0, 1).t()) - torch.eye(64)
    assert columns.abs().max() < 5.5 / 12_000**0.5  # the largest of 2,016
    noise = 5 / (4000 * 64) ** 0.5
    assert correlation(mask[:, 1:], mask[:, :-1]) < noise
    assert correlation(mask[0], mask[1]) < noise
    assert correlation(mask, kept((3, 4000, 64), site=12)) < noise
    assert correlation(mask, kept((3, 4000, 64), seeds=SEEDS + 1)) < noise
    channels = kept((3, 8, 500, 64), frames=2)
    assert correlation(channels[:, 1:], channels[:, :-1]) < noise
    assert len(kept((1, 20_000, 64), p=0.5, seeds=SEEDS[:1])[0].unique(dim=0)) == 20_000  # no frame repeats


def test_four_neighbours_in_a_square_are_independent():
    mask = kept((3, 4000, 64), p=0.5)
    square = mask[:, 1:, 1:] + 2 * mask[:, 1:, :-1] + 4 * mask[:, :-1, 1:] + 8 * mask[:, :-1, :-1]
    counts = torch.bincount(square.flatten().long(), minlength=16).double()
    expected = counts.sum() / 16
    assert ((counts - expected).square() / expected).sum() < 60  # chi squared of 15 degrees of freedom; squares overlap


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 5))
def test_a_mask_depends_on_row_frame_and_channel_alone(frames, more, channels):
    whole = kept((3, channels, frames + more, 8), p=0.5, frames=2)
    short = kept((2, channels, frames, 8), p=0.5, seeds=SEEDS[1:], frames=2)
    assert torch.equal(short, whole[1:, :, :frames])
    sequence = kept((frames + more, 3, 8), p=0.5, rows=1, frames=0)
    assert torch.equal(sequence.transpose(0, 1), kept((3, frames + more, 8), p=0.5))


def test_the_gradient_has_the_same_mask():
    module = dropout(0.3)
    x = torch.randn(3, 7, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: module(x, SEEDS), x)
    out = module(x, SEEDS)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(gradient > 0, out != 0)


def test_what_is_not_finite_stays_so():
    out = dropout(0.5)(torch.full((1, 50, 8), torch.nan), SEEDS[:1])
    assert out.isnan().all()


def test_nothing_happens_without_training_or_probability():
    x = torch.randn(3, 7, 5)
    assert dropout(0.5).eval()(x, None) is x
    assert dropout(0.0)(x, None) is x


def test_pytorch_may_trace_and_differentiate_the_operation():
    x = torch.randn(3, 7, 5, requires_grad=True)
    torch.library.opcheck(drop, (x, hash_vectors(SEEDS, x.shape[:-1], 0, 1), 0.3))


# The kernel in Triton's interpreter, which is chosen at import; its bfloat16 cuts where hardware rounds.
IN_THE_INTERPRETER = """
import torch
from ddp_asr.encoders import dropout, dropout_cuda
for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
    for shape in ((3, 5, 7), (2, 3, 11, 64), (1, 1), (0, 4), (1100, 3)):
        x = torch.randn(shape, dtype=dtype)
        hashes = torch.randint(-2**31, 2**31, shape[:-1]).to(torch.int32)
        here, there = dropout._drop_eagerly(x, hashes, 0.3), dropout_cuda.drop(x, hashes, 0.3)
        assert torch.equal(here == 0, there == 0), (dtype, shape)
        tolerance = 0.01 if dtype is torch.bfloat16 else 0.0
        torch.testing.assert_close(here, there, rtol=tolerance, atol=0.0)
"""


def test_the_kernel_for_cuda_computes_the_same():
    pytest.importorskip("triton", reason="a torch without CUDA comes without Triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", IN_THE_INTERPRETER], cwd=REPOSITORY, env=environment, check=True)
