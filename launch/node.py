"""Starts the ranks of a node with torchrun: `python -m ddp_asr.launch.node ddp_asr.train --config F` under `srun`.

    environment of a Slurm task  ->  torchrun_command  ->  torchrun (replaces this process)  ->  a rank for each GPU

Every launcher starts ranks in this way and in no other: slurm/train.sbatch and slurm/evaluate.sbatch by the command
above, `launch.submit` by `start` in each of its tasks. Outside of a Slurm step torchrun serves this machine alone.

All ranks of a job's attempt meet at a port and under a key that follow from job id and restart count. Two attempts may
be alive at once, when a node is cut off from Slurm but its processes go on; like this their ranks never meet.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import signal
import socket
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from ddp_asr.errors import counted
from ddp_asr.ranks.signals import STOP_SIGNALS

# Linux gives outgoing connections ports from 32768 up; well-known services listen below 20000.
PORTS = range(20000, 32000)
STORE_TIMEOUT_S = 120  # until the first node's torchrun answers: Python may start slowly from a busy file system

EXAMPLES = """\
examples:
  srun --ntasks-per-node=1 python -m ddp_asr.launch.node ddp_asr.train --config configs/librispeech_960.yaml
  srun --ntasks-per-node=1 python -m ddp_asr.launch.node --ignore SIGTERM ddp_asr.evaluate runs/an4 shards/an4-test
  RANKS_PER_NODE=2 python -m ddp_asr.launch.node ddp_asr.train --config configs/an4.yaml

A node gets a rank for each of its GPUs, or RANKS_PER_NODE, or one where there are no GPUs.
"""


@dataclass(frozen=True)
class Step:
    """A Slurm step with one task on each node, as one of its tasks sees it; elsewhere this machine alone."""

    hosts: list[str]
    number: int  # of this node among the hosts
    job_id: str  # empty where there is no Slurm
    attempt: int  # counts from 1

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Step:
        attempt = attempt_of_job(environment)
        if "SLURM_STEP_NODELIST" not in environment:
            return cls([socket.gethostname()], 0, "", attempt)
        hosts = expanded(environment["SLURM_STEP_NODELIST"])
        return cls(hosts, int(environment["SLURM_NODEID"]), environment["SLURM_JOB_ID"], attempt)

    @property
    def port(self) -> int:
        """Where the first node serves the rendezvous."""
        return rendezvous_port(self.job_id, self.attempt)


def attempt_of_job(environment: Mapping[str, str] = os.environ) -> int:
    """How many times Slurm has started this job, this time included."""
    return int(environment.get("SLURM_RESTART_COUNT") or 0) + 1


def rendezvous_port(job_id: str, attempt: int) -> int:
    """A port that no other attempt of the job uses; two jobs of one node share it with probability 1 / 12,000."""
    return PORTS[(zlib.crc32(job_id.encode()) + attempt) % len(PORTS)]


def expanded(nodes: str) -> list[str]:
    """The hosts of a Slurm node list: node1, node2, login of `node[1-2],login`."""
    hosts: list[str] = []
    for name in re.findall(r"(?:\[[^\]]*\]|[^,\[])+", nodes):
        texts = [_numbers(part) if index % 2 else [part] for index, part in enumerate(re.split(r"[\[\]]", name))]
        hosts += map("".join, itertools.product(*texts))
    return hosts


def _numbers(ranges: str) -> list[str]:
    """001, 002, 007 of `001-002,007`."""
    pairs = [piece.partition("-")[::2] for piece in ranges.split(",")]
    return [f"{number:0{len(low)}}" for low, high in pairs for number in range(int(low), int(high or low) + 1)]


def ranks_of_node(environment: Mapping[str, str]) -> int:
    """RANKS_PER_NODE, else the number of GPUs that Slurm has given the job on this node, else 1."""
    if environment.get("RANKS_PER_NODE"):
        return int(environment["RANKS_PER_NODE"])
    gpus = environment.get("SLURM_GPUS_ON_NODE") or environment.get("SLURM_GPUS_PER_NODE") or "0"
    return max(1, int(gpus.rpartition(":")[2]))  # the latter may be h100:8


def rank_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What the ranks find in their environment, where it is not set already."""
    cpus = environment.get("SLURM_CPUS_PER_TASK") or environment.get("SLURM_CPUS_ON_NODE") or "1"
    wanted = {
        "OMP_NUM_THREADS": str(max(1, int(cpus) // ranks_of_node(environment))),
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # otherwise each process warns of host names that it cannot look up
    }
    return {name: environment.get(name) or value for name, value in wanted.items()}


def torchrun_command(
    environment: Mapping[str, str],
    module: str,
    arguments: Sequence[str],
    *,
    ignored: Sequence[str] = (),
    join_timeout_s: int = 600,
) -> list[str]:
    """The command that starts this node's ranks of `python -m MODULE ARGUMENTS`.

    Args:
        environment: that of a task, see `Step`.
        ignored: signals that are not handed on to the ranks.
        join_timeout_s: from the first torchrun until all have met.
    """
    step = Step.of(environment)
    rendezvous = _rendezvous(step, join_timeout_s) if step.job_id else ["--standalone"]
    handed_on = ",".join(number.name for number in STOP_SIGNALS if number.name not in ignored)
    return [
        *(sys.executable, "-m", "ddp_asr.ranks.torchrun"),
        *rendezvous,
        f"--nproc-per-node={ranks_of_node(environment)}",
        "--max-restarts=0",
        f"--signals-to-handle={handed_on}",
        *("-m", module, *arguments),
    ]


def _rendezvous(step: Step, join_timeout_s: int) -> list[str]:
    # A single node need not be able to resolve its own name.
    hosts = step.hosts if len(step.hosts) > 1 else ["127.0.0.1"]
    waits = f"join_timeout={join_timeout_s},read_timeout={STORE_TIMEOUT_S}"
    return [
        f"--nnodes={len(hosts)}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={hosts[0]}:{step.port}",
        f"--rdzv-id={step.job_id}.{step.attempt}",
        f"--rdzv-conf=is_host={int(step.number == 0)},{waits}",  # torchrun would guess from names who the host is
        f"--local-addr={hosts[step.number]}",
    ]


def start(module: str, arguments: Sequence[str], ignored: Sequence[str] = ()) -> NoReturn:
    """Becomes the torchrun of this node; signals in `ignored` reach neither torchrun nor its ranks."""
    for name in ignored:  # what is ignored stays ignored in the programs that a process starts
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    command = torchrun_command(os.environ, module, arguments, ignored=ignored)
    step, ranks = Step.of(os.environ), ranks_of_node(os.environ)
    if step.job_id and step.number == 0:
        told = (
            f"job {step.job_id}, attempt {step.attempt}: {counted(len(step.hosts), 'node')} x {counted(ranks, 'rank')}"
        )
        print(f"{time.strftime('%F %T')} {told}, the first node is {step.hosts[0]}", flush=True)
    os.execve(command[0], command, os.environ | rank_variables(os.environ))


def main(argv: Sequence[str] | None = None) -> NoReturn:
    options = _parse(argv)
    start(options.module, options.arguments, options.ignore)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ddp_asr.launch.node",
        description="Runs a module on all ranks of this node with torchrun, together with the other nodes of the Slurm "
        "step if there are any.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        choices=[number.name for number in STOP_SIGNALS],
        help="a signal that must not reach the ranks; may be repeated",
    )
    parser.add_argument("module", metavar="MODULE", help="such as ddp_asr.train")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="ARGUMENT", help="of the module")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
