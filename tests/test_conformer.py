"""The Conformer against its oracles: attention and convolution written out, chunks run one by one, and float32.

What it shares with every encoder is in tests/test_encoders.py.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ddp_asr.encoders.conformer import Batch, cut_up, in_chunks, rotary_angles, rotate
from ddp_asr.training.precision import autocast
from tests.tiny_encoders import encoder_of

SIZE, HEADS = 16, 2  # of the first case


@pytest.fixture
def block():
    """A block in float64, with norms that do something."""
    block = encoder_of("conformer").double().blocks[0]
    for parameter in block.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return block


def batch_of(frames, context=None):
    angles = rotary_angles(max(frames), SIZE // HEADS, torch.device("cpu")).double()
    parts = cut_up(torch.tensor(frames), max(frames), torch.device("cpu"), context)
    return Batch(parts, angles.cos(), angles.sin(), None)


def test_attention_is_the_softmax_of_rotated_products_over_own_frames(block):
    """Written out with complex numbers, frame by frame: a position multiplies each pair by exp(i angle)."""
    x, frames = torch.randn(2, 9, SIZE, dtype=torch.float64), [9, 5]
    attention = block.attention
    actual = attention(x, batch_of(frames))
    query, key = attention.query_key(attention.norm(x)).unflatten(2, (2, HEADS, -1)).unbind(2)
    value = attention.value(attention.norm(x)).unflatten(2, (HEADS, -1))
    half = SIZE // HEADS // 2
    position = torch.arange(9)[:, None]
    turn = torch.polar(torch.ones(9, half), position * 10_000.0 ** (-torch.arange(half) / half)).to(torch.complex128)
    for row, own in enumerate(frames):
        expected = torch.zeros(9, HEADS, SIZE // HEADS, dtype=torch.float64)
        for head in range(HEADS):
            pairs = [
                torch.complex(part[row, :, head, :half], part[row, :, head, half:]) * turn for part in (query, key)
            ]
            products = (pairs[0] @ pairs[1].mH).real[:, :own] / (2 * half) ** 0.5
            expected[:, head] = products.softmax(1) @ value[row, :own, head]
        torch.testing.assert_close(
            actual[row, :own], attention.projection(expected.flatten(1))[:own], atol=1e-6, rtol=0
        )


@given(st.integers(0, 500))
def test_products_of_rotated_vectors_know_the_distance_alone(shift):
    x = torch.randn(1, 2, 1, 8, dtype=torch.float64)  # a query and a key, 7 frames apart
    here, there = (rotary_angles(600, 8, torch.device("cpu")).double()[[start, start + 7]] for start in (0, shift))
    products = [rotate(x, angle.cos(), angle.sin()).prod(1).sum() for angle in (here, there)]
    torch.testing.assert_close(*products, atol=1e-3, rtol=0)


def test_the_convolution_along_time_is_that_of_each_channel_over_own_frames(block):
    x, frames = torch.randn(2, 9, SIZE, dtype=torch.float64), [9, 5]
    convolution = block.convolution
    given, gate = convolution.gated(convolution.norm(x)).chunk(2, dim=2)
    gated, kernel = given * gate.sigmoid(), convolution.depthwise.weight[:, 0]  # (D, 5)
    along = convolution.depthwise.bias.expand_as(x).clone()
    for row, own in enumerate(frames):
        for frame in range(9):
            for place in range(5):
                if 0 <= (other := frame + place - 2) < own:
                    along[row, frame] += kernel[:, place] * gated[row, other]
    expected = convolution.projection(nn.functional.silu(convolution.inner_norm(along)))
    torch.testing.assert_close(convolution(x, batch_of(frames)), expected)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.integers(1, 9))
def test_each_row_is_cut_into_chunks_of_its_own(context, longest):
    frames = torch.tensor([longest] + [1 + row % longest for row in range(len(context) - 1)])
    x = torch.randn(len(context), longest, 3)
    parts = cut_up(frames, longest, x.device, context)

    def summed(chunks, part):
        """What `run` may do: a sum along a chunk, over its own frames."""
        return (chunks * part.own[:, :, None]).cumsum(1)

    together = in_chunks(summed, parts, x)
    for row, limit in enumerate(context):
        for start in range(0, longest, limit or longest):
            chunk = x[row, start : min(start + (limit or longest), longest)].clone()
            chunk[max(0, int(frames[row]) - start) :] = 0
            torch.testing.assert_close(together[row, start : start + len(chunk)], chunk.cumsum(0))


def test_a_block_in_chunks_is_the_block_of_each_chunk(block):
    x = torch.randn(3, 11, SIZE, dtype=torch.float64)
    together = block(x, batch_of([11, 11, 8], [4, 0, 5]))
    for row, limit, own in ((0, 4, 11), (1, 11, 11), (2, 5, 8)):
        for start in range(0, own, limit):
            end = min(start + limit, own)
            alone = block(x[row : row + 1, start:end], batch_of([end - start]))
            torch.testing.assert_close(together[row, start:end], alone[0], atol=1e-6, rtol=0)


def test_rows_and_chunks_of_padding_alone_have_finite_states_and_gradients():
    """Each sees a frame: over none, softmax is 0 / 0 on some devices, and its gradient goes to every weight."""
    assert all(part.seen.any(3).all() for part in batch_of([40, 0, 3], [0, 0, 4]).parts)
    encoder = encoder_of("conformer")
    hidden = encoder(torch.zeros(3, 40, 16), torch.tensor([40, 0, 3]), [0, 0, 4]).hidden
    assert hidden.isfinite().all()
    hidden.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in encoder.parameters())


def test_bf16_is_near_fp32():
    encoder, frames, features = encoder_of("conformer"), torch.tensor([40]), torch.randn(1, 40, 16)
    exact = encoder(features, frames).hidden
    with autocast("bf16", torch.device("cpu")):
        rounded = encoder(features, frames).hidden
    assert rounded.dtype == torch.bfloat16
    assert 0 < (rounded - exact).abs().max() / exact.abs().max() < 0.05
