"""A GRU in one direction, (T', B, D) -> (T', B, H), in autocast's type: cuDNN's on a GPU, written out on a CPU.

PyTorch's GRU on a CPU leaves its backward pass to autograd: some thirty small operations a frame, and the gradient of
the recurrent weights summed frame by frame in the run's type. A bfloat16 sum stands still once it is 256 times its
next term: over 2,000 like frames that gradient came out 79 % too small. Here a frame costs four operations backwards,
and the gradient is one product over all frames, which BLAS sums in float32: 2 % off. (Both passes took 69 ms instead of
116 at B = 16, D = 512, H = 256, 100 frames, on one core of an AMD EPYC.)

The equations are those of `torch.nn.GRU`; the reset gate stands behind the recurrent product (Cho et al., 2014, v1):

    r, z = sigmoid(W_i x + b_i + W_h h + b_h)        n = tanh(W_in x + b_in + r (W_hn h + b_hn))
    h' = (1 - z) n + z h
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def run_gru(gru: nn.GRU, x: Tensor) -> Tensor:
    """(T', B, D) -> (T', B, H), computed in autocast's type where autocast is on, else in the input's.

    The cast is ours and autocast is off inside: PyTorch's autocast wrapper would send a cuDNN RNN to float16 whatever
    type autocast was asked for (AutocastRNN.cpp).
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        weights: list[Tensor] = [*gru.all_weights[0]]
        if dtype != weights[0].dtype:
            weights = _cast_together(weights, dtype)
        x = x.to(dtype)
        if device == "cpu" and not torch.onnx.is_in_onnx_export():
            input_weight, recurrent_weight, input_bias, recurrent_bias = weights
            given = nn.functional.linear(x, input_weight, input_bias)
            return _GRURecurrence.apply(given, recurrent_weight, recurrent_bias)
        state = x.new_zeros(1, x.shape[1], gru.hidden_size)
        return torch.gru(x, state, weights, True, 1, 0.0, gru.training, False, False)[0]


def _cast_together(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The weights in another type, end to end in one piece of memory: cuDNN copies and warns about scattered ones."""
    flat = torch.cat([weight.flatten() for weight in weights]).to(dtype)
    parts = flat.split([weight.numel() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]


class _GRURecurrence(Function):
    """What each gate is given by the input (T', B, 3 H), weight (3 H, H), bias (3 H,) -> hidden states (T', B, H).

    The three gates stand side by side in PyTorch's order: reset r, update z, new n.
    """

    @staticmethod
    def forward(ctx: Any, given: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        T, B, H = given.shape[0], given.shape[1], weight.shape[1]
        hidden = given.new_zeros(T + 1, B, H)  # hidden[t] is the state before frame t
        recurrent = given.new_empty(T, B, 3 * H)
        switches = given.new_empty(T, B, 2 * H)  # r and z
        new = given.new_empty(T, B, H)
        # Cut into frames once: an index in the loop costs as much as a small operation.
        given_switches, given_new = (part.unbind() for part in given.split([2 * H, H], dim=2))
        recurrent_switches, recurrent_new = (part.unbind() for part in recurrent.split([2 * H, H], dim=2))
        reset, update = (part.unbind() for part in switches.chunk(2, dim=2))
        products, both, fresh, state = recurrent.unbind(), switches.unbind(), new.unbind(), hidden.unbind()
        across = weight.t()
        for t in range(T):
            torch.addmm(bias, state[t], across, out=products[t])
            torch.add(given_switches[t], recurrent_switches[t], out=both[t]).sigmoid_()
            torch.addcmul(given_new[t], reset[t], recurrent_new[t], out=fresh[t]).tanh_()
            torch.lerp(fresh[t], state[t], update[t], out=state[t + 1])
        ctx.save_for_backward(weight, hidden, recurrent[:, :, 2 * H :], switches, new)
        return hidden[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight, hidden, recurrent_new, switches, new = ctx.saved_tensors
        before, (reset, update) = hidden[:-1], switches.chunk(2, dim=2)
        T, B, H = new.shape
        # A gate's gradient is that of h' times a slope, and the slopes of all frames are known beforehand.
        slope_new = (1 - update) * (1 - new * new)
        slope_reset = slope_new * recurrent_new * reset * (1 - reset)
        slope_update = (before - new) * update * (1 - update)
        slopes = torch.cat([slope_reset, slope_update, slope_new * reset], dim=2).view(T, B, 3, H)

        grad_hidden = grad.clone()  # [t] becomes that of h' at t with what the later frames add
        grad_recurrent = torch.empty_like(slopes)
        grads, slope, keep = grad_hidden.unbind(), slopes.unbind(), update.unbind()
        products, rows = grad_recurrent.unbind(), grad_recurrent.view(T, B, 3 * H).unbind()
        for t in reversed(range(T)):
            torch.mul(slope[t], grads[t][:, None], out=products[t])
            if t:
                grads[t - 1].addmm_(rows[t], weight).addcmul_(grads[t], keep[t])

        gates = grad_recurrent.view(T * B, 3 * H)
        grad_given = grad_recurrent.clone()
        torch.mul(grad_hidden, slope_new, out=grad_given[:, :, 2])
        return grad_given.view(T, B, 3 * H), gates.t() @ before.flatten(0, 1), gates.sum(0)
