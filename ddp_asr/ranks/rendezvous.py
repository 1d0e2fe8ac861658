"""How the ranks of a run meet: place from the environment -> store -> first posts -> process group -> World.

    world = join(config.distributed)      # from RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT

NCCL and CUDA where there are GPUs, gloo and the CPU otherwise. Over gloo several ranks may share a GPU, which NCCL
refuses. The ranks of a Slurm job meet under a key of the job and its attempt, so that ranks of two attempts never meet.

NCCL connects in `init_process_group`, because it is given the GPU: a network that does not work shows here, in a phase
of its own, and not in the middle of the first step. Not tried, for want of several GPUs: NCCL between two ranks.
"""

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
from ddp_asr.errors import UserError, counted
from ddp_asr.ranks.environment import before_nccl
from ddp_asr.ranks.watchdog import Watchdog
from ddp_asr.ranks.world import World, backend_timeout

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_HANDSHAKE_S = 10.0  # from an open port to an answer of the store; it takes milliseconds


def join(settings: config.Distributed, run_directory: Path | None = None) -> World:
    """This process among the others, by the environment that torchrun, srun or a shell has set; alone if none is set.

    If the watchdog ends this process, it writes NCCL's flight record to the run directory.

    Raises:
        UserError: an incomplete environment, an unusable address or port, ranks that do not come in time.
    """
    rank, world_size, local_rank = place(os.environ)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    backend, device = choose_device(settings.backend, local_rank, gpus)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1:
        return World(rank, world_size, local_rank, device)
    try:
        watchdog = _join_group(rank, world_size, backend, device, settings.timeout_s)
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise UserError(f"{address} is in use by another program: choose another MASTER_PORT") from None
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(
            f"rank {rank} could not meet the other {counted(world_size - 1, 'rank')} at {address} ({reason[:200]}): "
            "check MASTER_ADDR, MASTER_PORT and that all ranks were started"
        ) from None
    if backend == "nccl" and run_directory is not None:
        watchdog.dump = lambda: _write_flight_record(run_directory / f"flight-rank-{rank}")
    return World(rank, world_size, local_rank, device, watchdog, backend)


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
    return rank, world_size, local_rank


def choose_device(backend: str, local_rank: int, gpus: int) -> tuple[str, torch.device]:
    """(nccl or gloo, device) of a rank of a host on which it sees so many GPUs, by `distributed.backend`."""
    if not gpus:
        if backend == "nccl":
            raise UserError("distributed.backend = nccl needs an NVIDIA GPU, and this host has none: use auto or gloo")
        return "gloo", torch.device("cpu")
    if backend == "gloo":
        return "gloo", torch.device("cuda", local_rank % gpus)
    # Where each task is given one GPU (srun --gpus-per-task=1), each sees only its own, as GPU 0.
    if gpus > 1 and local_rank >= gpus:
        raise UserError(
            f"LOCAL_RANK = {local_rank}, but this host has {gpus} GPUs: start at most that many processes per host "
            "(torchrun --nproc_per_node), or set distributed.backend=gloo, which lets several share a GPU"
        )
    return "nccl", torch.device("cuda", local_rank if gpus > 1 else 0)


def _join_group(rank: int, world_size: int, backend: str, device: torch.device, timeout_s: float) -> Watchdog:
    """Joins the process group; returns the watchdog, started, with the first posts of all ranks."""
    timeout = datetime.timedelta(seconds=timeout_s)
    attempt = f"{os.environ.get('SLURM_JOB_ID', 'run')}.{os.environ.get('SLURM_RESTART_COUNT') or 0}"
    store = dist.PrefixStore(attempt, _connect(rank, world_size, timeout))
    # A clone has a connection of its own; that of `store` is in use while the main thread waits in it. `clone` is
    # documented, but missing in the type stubs of torch 2.11.0.
    own_client = store.clone()  # type: ignore[attr-defined]
    own_client.set_timeout(timeout)
    watchdog = Watchdog(rank, world_size, own_client, timeout_s)
    watchdog.exchange()  # returns when all ranks have posted
    if backend == "nccl":
        before_nccl(os.environ)
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        refuse_shared_gpus(_texts_of_all(store, rank, world_size, "gpu", f"{uuid} of {socket.gethostname()}"))
    watchdog.begin_waiting(f"connecting {backend} on {device}")
    watchdog.start()
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=backend_timeout(timeout_s),
        device_id=device if backend == "nccl" else None,
    )
    watchdog.end_waiting()
    return watchdog


def _texts_of_all(store: dist.Store, rank: int, world_size: int, name: str, text: str) -> list[str]:
    """The text of every rank, in rank order, through the store; rank 0, which may keep it, returns last."""
    store.set(f"{name}/{rank}", text)
    texts = [data.decode() for data in store.multi_get([f"{name}/{other}" for other in range(world_size)])]
    store.set(f"{name} read/{rank}", "")
    if rank == 0:
        store.multi_get([f"{name} read/{other}" for other in range(world_size)])
    return texts


def refuse_shared_gpus(gpus: list[str]) -> None:
    """Raises a UserError if two ranks have the same GPU, which NCCL refuses, or hangs on."""
    for rank, gpu in enumerate(gpus):
        if gpu in gpus[:rank]:
            raise UserError(
                f"ranks {gpus.index(gpu)} and {rank} have the same GPU ({gpu}), and NCCL needs one for each: start as "
                "many processes per host as it has GPUs, or set distributed.backend=gloo"
            )


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

    if rank:
        _wait_for_port(timeout.total_seconds())
    threading.Thread(target=connect, name="rendezvous", daemon=True).start()
    try:
        # Rank 0 waits for the others in that call, until `timeout`.
        result = results.get(timeout=_HANDSHAKE_S if rank else None)
    except Empty:
        raise RuntimeError("address already in use: another program listens there") from None
    if isinstance(result, Exception):
        raise result
    return result


def _wait_for_port(timeout_s: float) -> None:
    address = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection(address, timeout=1.0).close()
            return
        except OSError:
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"nothing listens there after {timeout_s:g} s") from None
            time.sleep(0.1)


def _write_flight_record(file: Path) -> None:
    """Writes NCCL's last collectives, which torch records by default; `torchfrtrace` compares those of all ranks."""
    # Private (torch 2.11.0), because NCCL writes the record only after its own timeout, when this process is gone.
    # If it is renamed, the record is missing; the sentence and status.json come before it.
    from torch._C._distributed_c10d import _dump_nccl_trace  # type: ignore[attr-defined]

    file.write_bytes(_dump_nccl_trace())
