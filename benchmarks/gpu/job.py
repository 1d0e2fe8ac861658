"""What a block is given: the device it runs on, time that is left, and where its rows go.

    job.row("forward", utterances=3, ms=7.1)                   # a measurement: a line of a table
    job.check("losses", difference < 1e-9, difference=...)     # one that must hold; else the block has failed
    job.note("needs CUDA: ...")                                # a sentence below the tables

Each is appended to results.jsonl at once, so what was measured stays when the block hangs and is killed.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu import results
from ddp_asr.runs.checkout import git_checkout

if TYPE_CHECKING:
    import torch

REPOSITORY = Path(__file__).resolve().parents[2]


class Job:
    """A block at work."""

    def __init__(self, block: str, *, out: Path, folder: Path, small: bool, limit_s: float) -> None:
        """`out` is for what is kept, `folder` for what is not."""
        self.block, self.out, self.folder, self.small = block, out, folder, small
        self.failures = 0
        self._ends_s = time.monotonic() + limit_s

    @cached_property
    def device(self) -> torch.device:
        import torch

        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def left_s(self) -> float:
        """Seconds until this process is killed."""
        return self._ends_s - time.monotonic()

    def row(self, table: str, **values: Any) -> None:
        results.append(self.out, self.block, table=table, row=values)

    def check(self, table: str, passes: bool, **values: Any) -> None:
        self.failures += not passes
        self.row(table, **values, holds=passes)

    @contextmanager
    def guarding(self, table: str, **values: Any) -> Iterator[None]:
        """Around a measurement that may fail without ending the block: its traceback goes to the log."""
        try:
            yield
        except Exception:  # it fails the check, and the measurements after it still run
            traceback.print_exc()
            self.check(table, False, **values)

    def note(self, text: str) -> None:
        results.append(self.out, self.block, note=text)

    def describe_machine(self) -> None:
        """Notes what this block runs on; without torch, which takes seconds to import."""
        facts = {"python": platform.python_version(), "cpu_cores": len(os.sched_getaffinity(0))}
        facts |= {"commit": git_checkout()["git_commit"], **_gpu(), **_versions()}
        results.append(self.out, self.block, machine=facts)


def _gpu() -> dict[str, str]:
    """Name, memory and driver of the first GPU; nothing where there is none."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader", "--id=0"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(("gpu", "gpu_memory", "driver"), answer.split(", "), strict=False))


def _versions() -> dict[str, str]:
    """Of torch and of the libraries that it brings."""
    wanted = ("torch", "triton", "nvidia-cuda-runtime", "nvidia-cudnn", "nvidia-nccl", "nvidia-cublas")
    return {
        each.name: each.version
        for each in importlib.metadata.distributions()
        if re.fullmatch(rf"({'|'.join(wanted)})(-cu\d+)?", each.name)
    }
