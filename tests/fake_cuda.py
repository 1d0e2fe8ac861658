"""A GPU that computes nothing, for a machine without one: CUDA tensors of a shape and a type, but without contents.

    with FakeCuda() as gpu:
        model = make_model(...).to(DEVICE)         # its weights lie on `cuda:0` and hold no numbers
        trainer.run(...)                           # our code, unchanged
    gpu.waits                                      # where the host waited for the GPU: Wait(file, line, ...)

Tensors of the host stay real, so lengths, masks and learning rates are computed. Those of the device are fake: torch's
FakeTensorMode finds shape and type of each result. Three things fail or are noted, with the innermost line of ours:

- A tensor of the host meets one of the device in an operation. One without dimensions may: as in torch, it travels as a
  number in the call of the kernel, and nothing waits for it.
- The host asks for the contents of a device tensor. It would wait for the GPU; here it gets True, 0.0, 1 or zeros.
- A copy between both that waits: any from the device, and any to it without `non_blocking` or from pageable memory.
  (From there CUDA copies up to 64 KB without waiting. That is more than any vector of B lengths, so a vector may.)

Private interfaces of torch, tried with 2.11.0: FakeTensorMode, on which torch's own compiler is built, the names in
PATCHES, and `_input_metadata`. Nothing public runs for a device that is not there. Only tests break with them.
"""

import linecache
import traceback
from collections import Counter
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.conftest import REPOSITORY

DEVICE = torch.device("cuda", 0)
READS = "reads a number from the GPU"
COPIES = "copies from the GPU"
SENDS = "copies to the GPU, from pageable memory or without non_blocking"
aten = torch.ops.aten


@dataclass(frozen=True)
class Wait:
    """A place where the host waits for the GPU."""

    file: str  # from the top of the repository
    line: int
    code: str  # that line
    why: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.code}  # {self.why}"

    @classmethod
    def here(cls, why: object) -> "Wait":
        """At the innermost line of ours, this file left out."""
        for frame, line in traceback.walk_stack(None):
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(REPOSITORY) and ".venv" not in path.parts and path != Path(__file__):
                code = linecache.getline(str(path), line).strip()
                return cls(str(path.relative_to(REPOSITORY)), line, code, str(why))
        raise AssertionError("no line of ours is on the stack")


class FakeCuda(TorchDispatchMode):
    """`cuda:0` without contents; notes where the host waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []
        self._pinned: dict[int, Tensor] = {}  # tensors of the host that the GPU can read by itself, by their address
        self._entered = ExitStack()

    def __enter__(self):
        for name, stand_in in PATCHES.items():
            self._entered.enter_context(mock.patch(name, stand_in))
        fake = FakeTensorMode(allow_fallback_kernels=False, allow_non_fake_inputs=True)
        self._entered.enter_context(fake)
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        self._entered.close()

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        if operation is torch.ops.prim.device.default:  # half of all calls
            return arguments[0].fake_device
        named = named or {}
        if operation in TRANSFERS:
            return TRANSFERS[operation](self, *arguments, **named)
        on_device = any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((arguments, named)))
        if not on_device and torch.device(named.get("device") or "cpu").type == "cpu":
            with unset_fake_temporarily():
                return operation(*arguments, **named)
        if on_device:
            self._check(operation, arguments)
        try:
            return KERNELS.get(operation, operation)(*arguments, **named)
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise AssertionError(f"the host waits for the GPU: {Wait.here(operation)}") from error
        except RuntimeError as error:
            raise AssertionError(f"fails on a GPU: {Wait.here(operation)}\n{error}") from error

    def _check(self, operation, arguments) -> None:
        """Refuses tensors of the host, and notes what torch's kernels of CTC do with theirs."""
        lengths_from = LENGTHS_FROM.get(operation, len(arguments))
        for tensor in tree_leaves(arguments[:lengths_from]):
            of_host = isinstance(tensor, Tensor) and not isinstance(tensor, FakeTensor)
            if of_host and (tensor.dim() or operation in TAKES_NO_NUMBER_OF_HOST):
                raise AssertionError(f"a tensor of the host meets one of the GPU: {Wait.here(operation)}")
        if operation in SENDS_LENGTHS:
            on_device = [isinstance(lengths, FakeTensor) for lengths in arguments[lengths_from : lengths_from + 2]]
            self.waits += [Wait.here(COPIES)] * sum(on_device) + [Wait.here(SENDS)]

    def _read(self, tensor: Tensor):
        if not isinstance(tensor, FakeTensor):
            with unset_fake_temporarily():
                return aten._local_scalar_dense(tensor)
        self.waits.append(Wait.here(READS))
        return True if tensor.dtype == torch.bool else 0.0 if tensor.is_floating_point() else 1

    def _to_copy(self, source: Tensor, *, device=None, dtype=None, non_blocking=False, **named):
        target = torch.device(device or source.device).type
        if self._moves_to_host(source, target, non_blocking):
            with unset_fake_temporarily():
                return torch.zeros(source.shape, dtype=dtype or source.dtype)
        with unset_fake_temporarily() if target == "cpu" else nullcontext():
            return aten._to_copy(source, device=device, dtype=dtype, non_blocking=non_blocking, **named)

    def _copy(self, target: Tensor, source: Tensor, non_blocking=False):
        if self._moves_to_host(source, target.device.type, non_blocking):
            return target
        with unset_fake_temporarily() if target.device.type == "cpu" else nullcontext():
            return aten.copy_(target, source, non_blocking)

    def _moves_to_host(self, source: Tensor, target: str, non_blocking: bool) -> bool:
        """Notes a copy that waits."""
        between = (source.device.type, target)
        if between == ("cuda", "cpu"):
            self.waits.append(Wait.here(COPIES))
        elif between == ("cpu", "cuda") and not (non_blocking and (source.dim() < 2 or self._is_pinned(source))):
            self.waits.append(Wait.here(SENDS))
        return between == ("cuda", "cpu")

    def _is_pinned(self, tensor: Tensor, *_: object) -> bool:
        return not isinstance(tensor, FakeTensor) and tensor.untyped_storage().data_ptr() in self._pinned

    def _pin(self, tensor: Tensor, *_: object) -> Tensor:
        with unset_fake_temporarily():
            pinned = tensor.clone()
        self._pinned[pinned.untyped_storage().data_ptr()] = pinned
        return pinned


TRANSFERS = {
    aten._local_scalar_dense.default: FakeCuda._read,
    aten._to_copy.default: FakeCuda._to_copy,
    aten.copy_.default: FakeCuda._copy,
    aten.is_pinned.default: FakeCuda._is_pinned,
    aten._pin_memory.default: FakeCuda._pin,
}

# ---- what FakeTensorMode does not know, or takes more lightly than CUDA ---------------------------------------------

# The first of the arguments that are lengths, and may lie on either side.
SENDS_LENGTHS = {  # by a copy that waits, after copying them to the host where they are not there
    aten._ctc_loss.default: 2,
    aten._ctc_loss.Tensor: 2,
    aten._ctc_loss_backward.default: 3,
    aten._ctc_loss_backward.Tensor: 3,
}
LENGTHS_FROM = {
    **SENDS_LENGTHS,
    aten._use_cudnn_ctc_loss.Tensor: 2,
    aten._use_miopen_ctc_loss.Tensor: 1,  # torch hands it targets of the host
}
TAKES_NO_NUMBER_OF_HOST = {aten.stack.default, aten._fused_adamw_.default}


def _ctc_loss(log_probabilities: Tensor, targets: Tensor, *lengths: object):
    T, B, _ = log_probabilities.shape
    return log_probabilities.new_empty(B), log_probabilities.new_empty(B, T, 2 * targets.shape[-1] + 1)


def _ctc_loss_backward(gradient: Tensor, log_probabilities: Tensor, *_: object) -> Tensor:
    return torch.empty_like(log_probabilities)


def _gru_backward(x: Tensor, weights: list[Tensor], stride: int, buffer: Tensor, state: Tensor, *_: object):
    return x.new_empty(x.shape), state.new_empty(state.shape), None, [w.new_empty(w.shape) for w in weights]


def _index_put(tensor: Tensor, indices: list[Tensor | None], value: Tensor, accumulate: bool = False) -> Tensor:
    of_true = any(index is not None and index.dtype == torch.bool for index in indices)
    if of_true and isinstance(value, FakeTensor):  # a number of the host is filled in without waiting
        raise DynamicOutputShapeException(aten.index_put_.default)
    return aten.index_put_(tensor, indices, value, accumulate)


KERNELS = {
    aten._use_cudnn_ctc_loss.Tensor: lambda *_: False,  # as torch answers where the blank is not class 0
    aten._use_miopen_ctc_loss.Tensor: lambda *_: False,
    aten._ctc_loss.default: _ctc_loss,
    aten._ctc_loss.Tensor: _ctc_loss,
    aten._ctc_loss_backward.default: _ctc_loss_backward,
    aten._ctc_loss_backward.Tensor: _ctc_loss_backward,
    aten._cudnn_rnn_backward.default: _gru_backward,
    aten._amp_update_scale_.default: lambda scale, *_: scale,
    aten.index_put_.default: _index_put,
}

# ---- what takes another way on a machine without a GPU --------------------------------------------------------------


def _gru(x, state, weights, has_biases, layers, dropout, train, bidirectional, batch_first):
    """`torch.gru` as a GPU runs it: cuDNN, which takes one type. Else torch would loop over the frames."""
    assert {weight.dtype for weight in weights} == {x.dtype}
    mode, buffer = 3, x.new_empty(sum(weight.numel() for weight in weights))  # 3 is CUDNN_GRU
    output, last, *_ = aten._cudnn_rnn(
        *(x, weights, 4 if has_biases else 2, buffer, state, None, mode, state.shape[2], 0, layers),
        *(batch_first, dropout, train, bidirectional, [], None),
    )
    return output, last


def backward(loss: Tensor, *_: object) -> None:
    """`Tensor.backward`: walks the graph here, because torch's engine asks the driver for streams.

    As there, gradients that meet are added, and each is brought to the shape and type of its tensor.
    """
    waiting: Counter = Counter()  # nodes that lead to a node and have not run yet
    nodes = [loss.grad_fn]
    for node in nodes:  # grows in the loop
        for following in _followers(node):
            nodes += [] if following in waiting else [following]
            waiting[following] += 1
    gradients: dict = {loss.grad_fn: {0: torch.ones_like(loss)}}
    ready = [loss.grad_fn]
    with torch.no_grad():
        while ready:
            node = ready.pop()
            for (following, number), gradient in _run(node, gradients.pop(node, {})):
                summed, gradient = gradients.setdefault(following, {}), _fitted(gradient, following, number)
                summed[number] = summed[number] + gradient if number in summed else gradient
            for following in _followers(node):
                waiting[following] -= 1
                ready += [] if waiting[following] else [following]


def _followers(node) -> set:
    return {following for following, _ in node.next_functions if following is not None}


def _run(node, gradients: dict[int, Tensor]) -> list:
    """[(edge, gradient that goes along it)] of a node, from the gradients of its outputs that there are."""
    if not gradients:
        return []
    outputs, edges = node._input_metadata, node.next_functions
    given = [gradients.get(number) for number in range(len(outputs))]
    if isinstance(node, torch.autograd.function.BackwardCFunction):  # a `Function` in Python
        for number, of in enumerate(outputs):
            if given[number] is None:
                given[number] = torch.zeros(of.shape, dtype=of.dtype, device=of.device)
        found = node.apply(*given)
        # It has an edge for each tensor among its arguments, and returns something for each argument.
        each = zip(found if isinstance(found, tuple) else (found,), node.needs_input_grad, strict=True)
        found, edges = [gradient for gradient, need in each if need], [edge for edge in edges if edge[0] is not None]
    else:
        found = node(*given)
    pairs = zip(edges, found if isinstance(found, (tuple, list)) else (found,), strict=False)  # a leaf has no edges
    return [(edge, gradient) for edge, gradient in pairs if edge[0] is not None and gradient is not None]


def _fitted(gradient: Tensor, node, number: int) -> Tensor:
    of = node._input_metadata[number]
    assert gradient.device == of.device, f"{node.name()} on {of.device} gets a gradient on {gradient.device}"
    gradient = gradient if list(gradient.shape) == of.shape else gradient.sum_to_size(of.shape)
    return gradient if gradient.dtype == of.dtype else gradient.to(of.dtype)


PATCHES = {
    "torch.gru": _gru,
    "torch._VF.gru": _gru,  # that of nn.GRU
    "torch.nn.RNNBase.flatten_parameters": lambda gru: None,  # it asks for addresses
    "torch.Tensor.backward": backward,
    "torch.cuda.is_available": lambda: False,  # a machine with a GPU runs the same
    "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,  # autocast and GradScaler ask it
    "torch.cuda.is_bf16_supported": lambda including_emulation=True: True,
    "torch.cuda.reset_peak_memory_stats": lambda device=None: None,
    # Clipping and AdamW take one kernel for all tensors only if they are of these types.
    "torch.optim.optimizer._foreach_supported_types": [Tensor, torch.nn.Parameter, FakeTensor],
    "torch.utils._foreach_utils._foreach_supported_types": [Tensor, FakeTensor],
}
