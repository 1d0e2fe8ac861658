"""Measures how fast ranks sum their gradients: `torchrun --nproc_per_node=8 -m ddp_asr.bandwidth` times all-reduces.

    RANK, WORLD_SIZE ... -> join the other ranks -> all-reduces of several sizes -> one JSON line on rank 0

The bus bandwidth is that of NVIDIA's nccl-tests, `S / t x 2 (n - 1) / n` (their doc/PERFORMANCE.md). It does not depend
on the number of ranks n, so it can be compared with the bandwidth of the link. `launch.doctor` runs this on all ranks
of a job.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
from collections.abc import Sequence
from typing import Any

from ddp_asr.config import Distributed
from ddp_asr.errors import UserError, run_entry_point
from ddp_asr.ranks.environment import before_torch

SIZES_MIB = (1, 8, 64)  # the default model has 90 MiB of gradients; DDP sends them in buckets of up to 25 MiB
REPEATS = 5

EXAMPLES = """\
examples:
  torchrun --nproc_per_node=8 -m ddp_asr.bandwidth
  srun torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=node1:29500 -m ddp_asr.bandwidth
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m ddp_asr.bandwidth",
        description="Times all-reduces over all ranks; rank 0 prints the bandwidths as one JSON line.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--limit-s",
        type=_positive,
        default=120,
        metavar="N",
        help="seconds after which the process ends, even if it hangs (default: %(default)s)",
    )
    measured = _measure(parser.parse_args(argv).limit_s)
    if measured is not None:
        print(json.dumps(measured), flush=True)
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text!r}")
    return int(text)


def _measure(limit_s: int) -> dict[str, Any] | None:
    """The measurement on rank 0, None on the others."""
    before_torch(os.environ)
    import torch

    from ddp_asr.ranks.rendezvous import join

    # The default action of SIGALRM ends a process that waits in C code too: for a rank that hangs, or for a driver.
    signal.alarm(limit_s)
    world = join(Distributed(timeout_s=0.75 * limit_s))  # less than the limit, so that a missing rank is reported
    total = world.sum(torch.ones(1, dtype=torch.float64)).item()
    if total != world.world_size:
        raise UserError(
            f"the sum of {world.world_size} ones over all ranks is {total:g} on rank {world.rank}: the network or "
            "a GPU gives wrong results; do not train on these nodes"
        )
    places = world.gather_objects({"host": socket.gethostname(), "device": str(world.device)})
    sizes = [bandwidth(size << 20, world.all_reduce_s(size << 20, REPEATS), world.world_size) for size in SIZES_MIB]
    world.leave()
    return None if places is None else {"world_size": world.world_size, "ranks": places, "sizes": sizes}


def bandwidth(size_bytes: int, seconds: float, world_size: int) -> dict[str, Any]:
    """The figures of one size; no bandwidth for a single rank, which sends nothing."""
    bus = size_bytes / seconds * 2 * (world_size - 1) / world_size / 1e9 if seconds else None
    return {"bytes": size_bytes, "seconds": seconds, "bus_gb_per_s": bus}


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
