"""How the ranks of a run meet: place from the environment -> store -> first posts -> process group -> World.

    world = join(config.distributed)      # from RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT

NCCL and CUDA where there are GPUs, gloo and the CPU otherwise. The ranks of a Slurm job meet under a key of the job and
its attempt, so that ranks of two attempts never meet.
"""

import contextlib
import datetime
import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from queue import Empty, SimpleQueue

import torch
import torch.distributed as dist

from ddp_asr import config
from ddp_asr.errors import UserError
from ddp_asr.ranks.watchdog import Watchdog
from ddp_asr.ranks.world import World

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_HANDSHAKE_S = 10.0  # from an open port to an answer of the store; it takes milliseconds
# gloo raises an error after the timeout, and gets this much time to do so. NCCL would end the process with a trace of
# its own: there the watchdog acts first, and has this much time to write the flight record.
_GLOO_GRACE_S, _NCCL_GRACE_S = 5.0, 60.0


def join(settings: config.Distributed, run_directory: Path | None = None) -> World:
    """This process among the others, by the environment that torchrun, srun or a shell has set; alone if none is set.

    If a collective fails, NCCL's flight record is written to the run directory.

    Raises:
        UserError: an incomplete environment, an unusable address or port, ranks that do not come in time.
    """
    rank, world_size, local_rank = place(os.environ)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"LOCAL_RANK = {local_rank}, but this host has {torch.cuda.device_count()} GPU(s): start at most that "
                "many processes per host (torchrun --nproc_per_node)"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if world_size == 1:
        return World(rank, world_size, local_rank, device)
    if device.type == "cuda":
        _configure_flight_recorder(run_directory)
    try:
        watchdog = _join_group(rank, world_size, "nccl" if device.type == "cuda" else "gloo", settings.timeout_s)
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise UserError(f"{address} is in use by another program: choose another MASTER_PORT") from None
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"rank {rank} could not meet the other {world_size - 1} rank(s) at {address} ({reason[:200]}): check "
            "MASTER_ADDR, MASTER_PORT and that all ranks were started"
        ) from None
    return World(rank, world_size, local_rank, device, watchdog)


def place(environment: Mapping[str, str]) -> tuple[int, int, int]:
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
    if not 0 <= rank < world_size:
        raise UserError(f"RANK = {rank} must lie between 0 and WORLD_SIZE - 1 = {world_size - 1}")
    if local_rank < 0:
        raise UserError(f"LOCAL_RANK = {local_rank} must be 0 or more")
    return rank, world_size, local_rank


def _join_group(rank: int, world_size: int, backend: str, timeout_s: float) -> Watchdog:
    """Joins the process group; returns the watchdog, started, with the first posts of all ranks."""
    timeout = datetime.timedelta(seconds=timeout_s)
    attempt = f"{os.environ.get('SLURM_JOB_ID', 'run')}.{os.environ.get('SLURM_RESTART_COUNT') or 0}"
    store = dist.PrefixStore(attempt, _connect(rank, world_size, timeout))
    # A clone has a connection of its own; that of `store` is in use while the main thread waits in it. `clone` is
    # documented, but missing in the type stubs of torch 2.11.0.
    own_client = store.clone()  # type: ignore[attr-defined]
    own_client.set_timeout(timeout)
    watchdog = Watchdog(
        rank,
        world_size,
        own_client,
        timeout_s,
        # Internal to torchrun (torch 2.11.0): "True" if the store lives in its agent. If the name changes, rank 0 keeps
        # a store up that is not its own, so that a failed rank 0 ends up to 3 s later.
        hosts_store=rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        backend_grace_s=_GLOO_GRACE_S if backend == "gloo" else 0.0,
    )
    watchdog.exchange()  # returns when all ranks have posted
    if backend == "nccl":
        watchdog.dump = _write_flight_record
        timeout += datetime.timedelta(seconds=_NCCL_GRACE_S)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    watchdog.start()
    return watchdog


def _connect(rank: int, world_size: int, timeout: datetime.timedelta) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT; rank 0 starts it, unless torchrun has.

    In a thread: if another program listens at the port and does not answer, the call never returns and ignores Ctrl-C.
    """
    results: SimpleQueue[dist.Store | Exception] = SimpleQueue()

    def connect() -> None:
        try:
            store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
            results.put(store)
        except Exception as error:  # the main thread raises it
            results.put(error)

    threading.Thread(target=connect, name="rendezvous", daemon=True).start()
    silent_since_s: float | None = None
    while True:
        with contextlib.suppress(Empty):
            result = results.get(timeout=1.0)
            if isinstance(result, Exception):
                raise result
            return result
        if silent_since_s is None:
            with contextlib.suppress(OSError):  # nothing listens there yet
                address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
                socket.create_connection(address, timeout=1.0).close()
                silent_since_s = time.monotonic()
        # Not on rank 0, which waits for the others in that call, until `timeout`.
        if rank and silent_since_s is not None and time.monotonic() - silent_since_s > _HANDSHAKE_S:
            raise RuntimeError("address already in use: another program listens there")


# Each setting has the name that torch 2.11 reads and an older one that it still accepts.
_RECORD_FILE = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
_RECORD_SIZE = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")


def _configure_flight_recorder(run_directory: Path | None) -> None:
    """Has NCCL keep its last collectives and write them down when one fails, unless the environment says otherwise."""
    settings = {_RECORD_SIZE: "2000", ("TORCH_NCCL_DUMP_ON_TIMEOUT",): "1"}
    if run_directory is not None:
        settings[_RECORD_FILE] = f"{run_directory.absolute()}/flight-rank-"
    for names, value in settings.items():
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = value


def _write_flight_record() -> None:
    """Writes this rank's flight record where NCCL would; `torchfrtrace` compares those of all ranks."""
    prefix = next((os.environ[name] for name in _RECORD_FILE if os.environ.get(name)), None)
    if prefix is not None:
        # Private (torch 2.11.0), because NCCL writes the record only after its own timeout, when this process is gone.
        # If it is renamed, the record is missing; the sentence and status.json come before it.
        from torch._C._distributed_c10d import _dump_nccl_trace  # type: ignore[attr-defined]

        Path(f"{prefix}{dist.get_rank()}").write_bytes(_dump_nccl_trace())
