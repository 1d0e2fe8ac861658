"""The only module that talks to torch.distributed: who this process is, and the few collectives that a run needs.

    world = join(config.distributed)         # from RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT, or alone
    totals = world.sum(vector)               # the one small all-reduce of a step
    state = world.from_rank_zero(function)   # rank 0 runs it, all get the result, or all raise its UserError
    world.together(function)                 # all run it; if any raises a UserError, all raise that one

With a single process there is no process group and every collective is the identity. NCCL and CUDA where there are
GPUs, gloo and the CPU otherwise. A peer that is gone surfaces as `PeerLost`, one sentence, on every rank that waits.
"""

import contextlib
import datetime
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddp_asr import config
from ddp_asr.errors import UserError

Result = TypeVar("Result")

_HANDSHAKE_S = 10.0  # from a port that is open to a store that answers; it takes milliseconds
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class PeerLost(UserError):
    """A collective failed because another rank is gone, or did not come within the timeout."""


class RaisedElsewhere(UserError):
    """The same user's mistake, seen on another rank, which reports it."""


@dataclass(frozen=True)
class World:
    """This process among the W of a run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    def sum(self, vector: Tensor) -> Tensor:
        """The element-wise sum over all ranks of a small float64 vector; returned on the CPU, the same everywhere."""
        if self.world_size == 1:
            return vector
        on_device = vector.to(self.device)
        with naming_lost_peers(self):
            dist.all_reduce(on_device)
            return on_device.cpu()  # NCCL tells of a lost peer only here

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on at least one rank."""
        return bool(self.sum(torch.tensor([float(flag)], dtype=torch.float64))[0] > 0)

    def all_reduce_s(self, size_bytes: int, repeats: int) -> float:
        """Seconds that an all-reduce of so many bytes takes: the mean of `repeats`, after one that is not counted."""
        vector = torch.zeros(size_bytes // 4, device=self.device)  # float32, as gradients are
        if self.world_size == 1:
            return 0.0
        with naming_lost_peers(self):
            dist.all_reduce(vector)
            self.any(False)  # all start together
            started_s = time.perf_counter()
            for _ in range(repeats):
                dist.all_reduce(vector)
            vector[0].item()  # a GPU works behind
            return (time.perf_counter() - started_s) / repeats

    def gather_objects(self, item: Any) -> list[Any] | None:
        """Every rank's picklable `item`, in rank order, on rank 0; None on the others."""
        everyones = self.all_objects(item)
        return everyones if self.rank == 0 else None

    def all_objects(self, item: Any) -> list[Any]:
        """Every rank's picklable `item`, in rank order, on every rank."""
        if self.world_size == 1:
            return [item]
        everyones: list[Any] = [None] * self.world_size
        with naming_lost_peers(self):
            dist.all_gather_object(everyones, item)
        return everyones

    def together(self, function: Callable[[], Result]) -> Result:
        """Runs `function` on every rank; where any raises a UserError, every rank raises that of the lowest rank."""
        result, message = None, None
        try:
            result = function()
        except UserError as error:
            message = str(error)
        messages = self.all_objects(message)
        for rank, text in enumerate(messages):
            if text is not None:
                raise UserError(text) if rank == self.rank else RaisedElsewhere(text)
        return result  # type: ignore[return-value]

    def from_rank_zero(self, function: Callable[[], Result]) -> Result:
        """Runs `function` on rank 0 only; every rank gets its (picklable) result, or raises its UserError."""
        result, message = None, None
        if self.rank == 0:
            try:
                result = function()
            except UserError as error:
                message = str(error)
        if self.world_size > 1:
            carried = [(result, message)]
            with naming_lost_peers(self):
                dist.broadcast_object_list(carried, src=0)
            result, message = carried[0]
        if message is not None:
            raise UserError(message) if self.rank == 0 else RaisedElsewhere(message)
        return result  # type: ignore[return-value]

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model under DDP, whose gradients are the mean over ranks; as it is when alone."""
        if self.world_size == 1:
            return model
        return nn.parallel.DistributedDataParallel(
            model, device_ids=[self.device] if self.device.type == "cuda" else None, gradient_as_bucket_view=True
        )

    def leave(self) -> None:
        """Ends the process group. Not called after an error: a lost peer would be waited for."""
        if self.world_size > 1:
            dist.destroy_process_group()


def without_sync(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """The context in which a backward pass only adds to this rank's own gradients."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.no_sync()
    return contextlib.nullcontext()


@contextlib.contextmanager
def naming_lost_peers(world: World) -> Iterator[None]:
    """Turns a failed collective into a PeerLost; other errors pass."""
    try:
        yield
    except RuntimeError as error:
        lines = str(error).strip().splitlines() or [""]
        if not isinstance(error, dist.DistError) and not any(
            word in str(error) for word in ("gloo", "NCCL", "timed out")
        ):
            raise
        raise PeerLost(
            f"rank {world.rank} of {world.world_size} lost the others ({lines[0][:160]}): look at the first rank that "
            "ended in the logs; started again, the run resumes from its newest checkpoint"
        ) from error


def join(settings: config.Distributed) -> World:
    """This process's place, from the environment that torchrun, srun or a shell has set; alone where none is set.

    Raises:
        UserError: an incomplete environment, an unusable address or port, peers that do not come in time.
    """
    rank, world_size, local_rank = _place(os.environ)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK = {local_rank}, but this host has {torch.cuda.device_count()} GPU(s): start at most that "
                "many processes a host (torchrun --nproc_per_node)"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world_size > 1:
        _rendezvous(rank, world_size, device, settings.timeout_s)
    return World(rank, world_size, local_rank, device)


def _place(environment: Any) -> tuple[int, int, int]:
    """(rank, world size, local rank) of the environment."""
    missing = [name for name in _VARIABLES if not environment.get(name)]
    if "RANK" in missing and "WORLD_SIZE" in missing:
        return 0, 1, 0
    if missing:
        raise UserError(
            f"{', '.join(missing)} not set beside RANK/WORLD_SIZE: set all of {', '.join(_VARIABLES)}, or start with "
            "torchrun"
        )
    try:
        rank, world_size, local_rank = (int(environment[name]) for name in _VARIABLES[:3])
    except ValueError:
        shown = ", ".join(f"{name}={environment[name]}" for name in _VARIABLES[:3])
        raise UserError(f"{shown} must be whole numbers") from None
    if not 0 <= rank < world_size or local_rank < 0:
        raise UserError(f"RANK = {rank} must lie between 0 and WORLD_SIZE - 1 = {world_size - 1}")
    return rank, world_size, local_rank


def _rendezvous(rank: int, world_size: int, device: torch.device, timeout_s: float) -> None:
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        store = _meet(rank, world_size, timeout)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise UserError(f"{address} is in use by another program: choose another MASTER_PORT") from None
        raise UserError(
            f"rank {rank} could not meet the other {world_size - 1} rank(s) at {address} ({reason[:200]}): check "
            "MASTER_ADDR, MASTER_PORT and that all ranks were started"
        ) from None


def _meet(rank: int, world_size: int, timeout: datetime.timedelta) -> dist.Store:
    """The store through which ranks exchange addresses, as `env://` makes or finds it.

    In a thread, because a store whose port is open but silent is waited for without end, and
    deaf to Ctrl-C: there the port is another program's.
    """
    results: SimpleQueue[dist.Store | Exception] = SimpleQueue()

    def meet() -> None:
        try:
            store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
            store.set_timeout(timeout)
            results.put(store)
        except Exception as error:  # not swallowed: the main thread, which waits for it, raises it
            results.put(error)

    threading.Thread(target=meet, name="rendezvous", daemon=True).start()
    silent_since_s: float | None = None
    while True:
        with contextlib.suppress(Empty):
            result = results.get(timeout=1.0)
            if isinstance(result, Exception):
                raise result
            return result
        if silent_since_s is None and _answers(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])):
            silent_since_s = time.monotonic()
        # Rank 0 itself waits for the others there, until `timeout`.
        if rank and silent_since_s is not None and time.monotonic() - silent_since_s > _HANDSHAKE_S:
            raise RuntimeError("address already in use: what listens there is not rank 0")


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=1.0):
            return True
    except OSError:
        return False
