"""The only module that talks to torch.distributed: who this process is, and the few collectives that a run needs.

    world = join(config.distributed)         # from RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT, or alone
    totals = world.sum(vector)               # the one small all-reduce of a step
    state = world.from_rank_zero(function)   # rank 0 runs it, all get the result, or all raise its UserError
    world.together(function)                 # all run it; if any raises a UserError, all raise that one
    world.at(120, "waiting for data")        # where this rank is, for the others to know (see positions.py)

With a single process there is no process group and every collective is the identity. NCCL and CUDA where there are
GPUs, gloo and the CPU otherwise. A peer that is gone surfaces as `PeerLost`, one sentence that names it, on every rank
that waits. Under Slurm the ranks meet under a key of this job and attempt, so that those of two attempts never do.
"""

import contextlib
import datetime
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddp_asr import config
from ddp_asr.errors import UserError
from ddp_asr.ranks.positions import Alone, Positions

Result = TypeVar("Result")

_HANDSHAKE_S = 10.0  # from a port that is open to a store that answers; it takes milliseconds
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# gloo raises when a collective has taken too long, so it is left the time to. NCCL would end the process with a trace
# of its own: there the watch over positions speaks first, and has as long to write what the flight recorder holds.
_GLOO_GRACE_S, _NCCL_GRACE_S = 5.0, 60.0


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
    positions: Alone = field(default_factory=Alone, compare=False, repr=False)

    def at(self, step: int, phase: str) -> None:
        """Notes where this rank is; costs nothing."""
        self.positions.at(step, phase)

    def sum(self, vector: Tensor) -> Tensor:
        """The element-wise sum over all ranks of a small float64 vector; returned on the CPU, the same everywhere."""
        if self.world_size == 1:
            return vector
        on_device = vector.to(self.device)
        with self._meeting():
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
        with self._meeting():
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
            with self._meeting():
                dist.broadcast_object_list(carried, src=0)
            result, message = carried[0]
        if message is not None:
            raise UserError(message) if self.rank == 0 else RaisedElsewhere(message)
        return result  # type: ignore[return-value]

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model under DDP, whose gradients are the mean over ranks; as it is when alone."""
        if self.world_size == 1:
            return model
        device_ids = [self.device] if self.device.type == "cuda" else None
        with self._meeting():
            return nn.parallel.DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)

    @contextlib.contextmanager
    def _meeting(self) -> Iterator[None]:
        """Around whatever waits for the other ranks."""
        self.positions.meet()
        with naming_lost_peers(self):
            yield
        self.positions.met()

    @contextlib.contextmanager
    def parting(self) -> Iterator[None]:
        """Tells the others of an error that ends this rank, so that those who wait for it can say why it is gone."""
        try:
            yield
        except BaseException as error:  # not swallowed: the others hear of it, and it is raised again
            self.positions.farewell(describe(error))
            self.positions.linger()
            raise

    def leave(self) -> None:
        """Ends the process group. Not called after an error: a lost peer would be waited for."""
        self.positions.close()
        if self.world_size > 1:
            dist.destroy_process_group()


def describe(error: BaseException) -> str:
    """An error in words: a user's mistake is a sentence already, a defect of ours needs its kind."""
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


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
        text = str(error)
        if not isinstance(error, dist.DistError) and not any(word in text for word in ("gloo", "NCCL", "timed out")):
            raise
        first_line = (text.strip().splitlines() or [""])[0]
        reason = re.sub(r"^\[[^\]]*\] *", "", first_line)[:160]  # gloo begins with its source's file and line
        raise PeerLost(world.positions.lose(reason, timed_out="timed out" in text.lower())) from error


def join(settings: config.Distributed, run_directory: Path | None = None) -> World:
    """This process's place, from the environment that torchrun, srun or a shell has set; alone where none is set.

    What NCCL's flight recorder holds when a collective fails is written to the run directory.

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
    if world_size == 1:
        return World(rank, world_size, local_rank, device)
    if device.type == "cuda":
        _record_flights(run_directory)
    positions = _rendezvous(rank, world_size, device, settings.timeout_s)
    return World(rank, world_size, local_rank, device, positions)


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


def _rendezvous(rank: int, world_size: int, device: torch.device, timeout_s: float) -> Positions:
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    backend = "nccl" if device.type == "cuda" else "gloo"
    longest_s = timeout_s + (_NCCL_GRACE_S if backend == "nccl" else 0.0)
    try:
        store = _meet(rank, world_size, datetime.timedelta(seconds=timeout_s))
        store = dist.PrefixStore(_attempt(os.environ), store)
        positions = _post(rank, world_size, backend, store, timeout_s)
        limit = datetime.timedelta(seconds=longest_s)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit)
        positions.start()
        return positions
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise UserError(f"{address} is in use by another program: choose another MASTER_PORT") from None
        raise UserError(
            f"rank {rank} could not meet the other {world_size - 1} rank(s) at {address} ({reason[:200]}): check "
            "MASTER_ADDR, MASTER_PORT and that all ranks were started"
        ) from None


def _attempt(environment: Mapping[str, str]) -> str:
    """The key under which the ranks of this attempt meet: a job that Slurm has requeued may find an old one's store."""
    return f"{environment.get('SLURM_JOB_ID', 'run')}.{environment.get('SLURM_RESTART_COUNT') or 0}"


def _post(rank: int, world_size: int, backend: str, store: dist.Store, timeout_s: float) -> Positions:
    """The positions of the ranks, with this one's first post made: once all have met, all have posted."""
    # A clone has a connection of its own; the store's would be held by a main thread that waits in it.
    own_client = store.clone()  # type: ignore[attr-defined]
    positions = Positions(
        rank,
        world_size,
        own_client,
        timeout_s,
        # torchrun's agent keeps the store of its workers.
        keeps_store=rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        grace_s=_GLOO_GRACE_S if backend == "gloo" else 0.0,
    )
    if backend == "nccl":
        positions.dump = _write_flight
    positions.post()
    return positions


# The name that torch 2.11 reads, an older one that it still heeds, and a value.
_FLIGHT_FILES = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
_FLIGHT_SETTINGS = (
    (("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"), "2000"),
    (("TORCH_NCCL_DUMP_ON_TIMEOUT",), "1"),
)


def _record_flights(run_directory: Path | None) -> None:
    """Has NCCL keep its last collectives and write them down when one fails, unless the environment says otherwise."""
    for names, value in _FLIGHT_SETTINGS:
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = value
    if run_directory is not None and not any(name in os.environ for name in _FLIGHT_FILES):
        os.environ[_FLIGHT_FILES[0]] = f"{run_directory.absolute()}/flight-rank-"


def _write_flight() -> None:
    """Writes this rank's flight record where NCCL would; `torchfrtrace` compares those of all ranks."""
    prefix = next((os.environ[name] for name in _FLIGHT_FILES if os.environ.get(name)), None)
    if prefix is not None:
        from torch._C._distributed_c10d import _dump_nccl_trace  # type: ignore[attr-defined]

        Path(f"{prefix}{dist.get_rank()}").write_bytes(_dump_nccl_trace())


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
