"""This process among the ranks of a run, and the few collectives that a run needs.

    totals = world.sum(vector)                  # the one small all-reduce of a step
    state = world.run_on_rank_zero(function)    # rank 0 runs it; all ranks get its result or raise its UserError
    world.run_on_all(function)                  # all ranks run it; if one raises a UserError, all raise that one
    world.set_phase(120, "waiting for data")    # where this rank is, for the other ranks to read (watchdog.py)

`rendezvous.join` makes a World. With a single process there is no process group, and every collective returns its
input. A collective that fails because another rank is gone or late raises `PeerLost`, a sentence that names that rank.

gloo raises in the collective that fails. NCCL works on the GPU while the host goes on: when NCCL notices a dead rank,
its communicator is aborted (environment.py), the kernels of DDP's all-reduce end, and what they leave in the gradients
is part of a sum. So the update needs proof that the step's collectives have ended well, and `sum`, which comes between
DDP's all-reduce and the update, on the same communicator, gives it: it waits on the host for its own all-reduce, which
raises if the communicator has failed, and it sums a one from each rank, which an aborted all-reduce does not.

Not tried, for want of several GPUs: any of this under NCCL. It follows the sources of torch. The collectives of objects
have no such proof: an aborted communicator leaves bytes that do not unpickle, and the run ends with a traceback.
"""

import contextlib
import datetime
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddp_asr.errors import UserError, users_error
from ddp_asr.ranks.watchdog import Watchdog

Result = TypeVar("Result")

BACKEND_GRACE_S = 60.0  # gloo and NCCL wait longer than the watchdog, which names the rank to blame


class PeerLost(UserError):
    """A collective failed because another rank is gone, or did not come within the timeout."""


class RaisedElsewhere(UserError):
    """A UserError that another rank has raised, and reports."""


@dataclass(frozen=True)
class World:
    """This process among the ranks of a run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    watchdog: Watchdog = field(default_factory=Watchdog, compare=False, repr=False)
    backend: str = "gloo"  # or "nccl"; of no meaning for a single process

    def set_phase(self, step: int, phase: str) -> None:
        """Notes where this rank is; costs nothing."""
        self.watchdog.set_phase(step, phase)

    def sum(self, vector: Tensor) -> Tensor:
        """The element-wise sum over all ranks of a small float64 vector; returned on the CPU, the same everywhere."""
        if self.world_size == 1:
            return vector
        counted = torch.cat([vector, vector.new_ones(1)])
        summed = counted.to(self.device) if self.backend == "nccl" else counted
        with self._collective():
            work = dist.all_reduce(summed, async_op=True)
            # Only with a time-out does NCCL's `wait` wait on the host and raise if the communicator has failed.
            # `work.exception()` would be None: NCCL's own thread notes the failure on a copy of `work` (torch 2.11.0).
            work.wait(backend_timeout(self.watchdog.timeout_s))
            total = summed.cpu()
            if total[-1] != self.world_size:
                raise dist.DistBackendError(f"{self.backend} ended an all-reduce before it was complete")
        return total[:-1]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on at least one rank."""
        return bool(self.sum(torch.tensor([float(flag)], dtype=torch.float64))[0] > 0)

    def all_reduce_s(self, size_bytes: int, repeats: int) -> float:
        """Seconds per all-reduce of so many bytes: the mean of `repeats`, after one that is not counted."""
        vector = torch.zeros(size_bytes // 4, device=self.device)  # float32, as gradients are
        if self.world_size == 1:
            return 0.0
        with naming_lost_peers(self):
            dist.all_reduce(vector)
            self.any(False)  # all ranks start together
            started_s = time.perf_counter()
            for _ in range(repeats):
                dist.all_reduce(vector)
            vector[0].item()  # a GPU works asynchronously
            return (time.perf_counter() - started_s) / repeats

    def gather_objects(self, item: Any) -> list[Any] | None:
        """The picklable `item` of every rank, in rank order, on rank 0; None on the others."""
        items = self.all_gather_objects(item)
        return items if self.rank == 0 else None

    def all_gather_objects(self, item: Any) -> list[Any]:
        """The picklable `item` of every rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [item]
        items: list[Any] = [None] * self.world_size
        with self._collective():
            dist.all_gather_object(items, item)
        return items

    def run_on_all(self, function: Callable[[], Result]) -> Result:
        """Runs `function` on every rank; if any raises a UserError, every rank raises that of the lowest rank."""
        result, message = _run(function)
        for rank, text in enumerate(self.all_gather_objects(message)):
            if text is not None:
                raise UserError(text) if rank == self.rank else RaisedElsewhere(text)
        return result  # type: ignore[return-value]

    def run_on_rank_zero(self, function: Callable[[], Result]) -> Result:
        """Runs `function` on rank 0 only; every rank gets its (picklable) result, or raises its UserError."""
        result, message = _run(function) if self.rank == 0 else (None, None)
        if self.world_size > 1:
            carried = [(result, message)]
            with self._collective():
                dist.broadcast_object_list(carried, src=0)
            result, message = carried[0]
        if message is not None:
            raise UserError(message) if self.rank == 0 else RaisedElsewhere(message)
        return result  # type: ignore[return-value]

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model under DDP, whose gradients are the mean over ranks; the model itself for a single process."""
        if self.world_size == 1:
            return model
        with self._collective():
            # Without `device_ids`, for which it would send every argument to the GPU: lengths stay on the host.
            return nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)

    @contextlib.contextmanager
    def reducing_gradients(self, model: nn.Module) -> Iterator[None]:
        """Around the forward and backward pass whose gradients DDP reduces over the ranks.

        The rank waits for the others from its last gradient on. Earlier, a rank that computes slowly or hangs would
        blame the others. A GPU computes after the host has gone on, so there an event marks that moment.
        """
        if self.world_size == 1:
            yield
            return
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        missing = len(parameters)
        computed = torch.cuda.Event() if self.backend == "nccl" else None

        def count(_: Tensor) -> None:
            nonlocal missing
            missing -= 1
            if missing:
                return
            if computed is None:
                self.watchdog.begin_waiting("reducing the gradients")  # gloo waits inside the backward pass
            else:
                computed.record()

        # Not `register_multi_grad_hook`, which holds all gradients until the last: that would copy each.
        hooks = [parameter.register_hook(count) for parameter in parameters]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        if computed is not None:
            computed.synchronize()
            self.watchdog.begin_waiting("reducing the gradients")

    @contextlib.contextmanager
    def _collective(self) -> Iterator[None]:
        """Around a call that waits for the other ranks."""
        self.watchdog.begin_waiting()
        with naming_lost_peers(self):
            yield
        self.watchdog.end_waiting()

    def leave(self) -> None:
        """Ends the process group. Not to be called after an error: it would wait for a rank that is gone."""
        self.watchdog.close()
        if self.world_size > 1:
            dist.destroy_process_group()


def backend_timeout(timeout_s: float) -> datetime.timedelta:
    """How long gloo and NCCL wait where the watchdog waits for `timeout_s`."""
    return datetime.timedelta(seconds=timeout_s + BACKEND_GRACE_S)


def _run(function: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """The function's result, or the text of a mistake of the user's."""
    try:
        return function(), None
    except (UserError, OSError) as error:
        if (mistake := users_error(error)) is None:
            raise
        return None, str(mistake)


def describe(error: BaseException) -> str:
    """The text of an error; with its type if it is not a user's mistake."""
    return str(users_error(error) or f"{type(error).__name__}: {error}")


def no_sync(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """DDP's `no_sync`, under which a backward pass adds to this rank's own gradients; for any model."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


@contextlib.contextmanager
def naming_lost_peers(world: World) -> Iterator[None]:
    """Turns the error of a failed collective into a PeerLost; other errors pass."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        failed = isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "NCCL", "timed out"))
        if world.world_size == 1 or not failed:
            raise
        first_line = (text.strip().splitlines() or [""])[0]
        reason = re.sub(r"^\[[^\]]*\] *", "", first_line)[:160]  # gloo begins with its source's file and line
        raise PeerLost(world.watchdog.name_lost_rank(reason)) from error
