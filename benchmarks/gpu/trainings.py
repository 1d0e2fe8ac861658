"""Trainings by the real command, and what they leave: lines of the metrics, weights of the last checkpoint."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.gpu.children import kill_with_descendants
from benchmarks.gpu.job import REPOSITORY, Job
from benchmarks.gpu.production import CONFIG, SMALL, relative
from ddp_asr.files import read_json_lines
from ddp_asr.runs import checkpoint
from ddp_asr.runs.directory import read_status

# A bias before a LayerNorm has a gradient of rounding alone, which Adam blows up to full steps.
NO_GRADIENT = re.compile(r"encoder\.blocks\.\d+\.convs\.0\.bias")


class Training:
    """`ddp-asr train` in the background."""

    def __init__(self, job: Job, name: str, settings: Sequence[str], processes: int = 1) -> None:
        self.job, self.run = job, job.folder / "runs" / name
        command = [sys.executable, "-m", "ddp_asr", "train", f"--processes={processes}", f"--config={CONFIG}"]
        command += [*(SMALL if job.small else ()), f"--run.dir={self.run.parent}", f"--run.name={name}"]
        self._popen = subprocess.Popen(
            [*command, "--tracking.mode=off", *settings], cwd=REPOSITORY, stdin=subprocess.DEVNULL
        )

    def wait(self) -> int:
        return self._popen.wait()

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: len(self.lines()) >= step, f"step {step}")

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        while not condition():
            if self._popen.poll() is not None and not condition():
                raise RuntimeError(f"{self.run.name} ended with {self._popen.returncode} before {what}")
            time.sleep(0.02)

    def stop(self, number: signal.Signals) -> float:
        """Sends the signal to the command; returns the seconds that it then took to end."""
        started = time.perf_counter()
        self._popen.send_signal(number)
        self._popen.wait()
        return time.perf_counter() - started

    def kill(self) -> None:
        """SIGKILL of the command and all that it has started."""
        kill_with_descendants(self._popen.pid)
        self._popen.wait()

    def lines(self, kind: str = "train") -> list[dict[str, Any]]:
        return [line for line in read_json_lines(self.run / "metrics.jsonl") if line["kind"] == kind]

    def status(self) -> dict[str, Any]:
        return read_status(self.run) or {}

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights of the newest checkpoint that have a gradient."""
        _, newest = checkpoint.numbered(self.run)[-1]
        model = checkpoint.read(newest)["model"]
        return {name: weight for name, weight in model.items() if not NO_GRADIENT.fullmatch(name)}


def differences(ours: Training, theirs: Training) -> dict[str, float]:
    """The largest relative differences of losses and gradient norms, and ||dw|| / ||w||."""
    first, second = ours.lines(), theirs.lines()
    if [line["step"] for line in first] != [line["step"] for line in second]:
        raise RuntimeError(f"{ours.run.name} has {len(first)} steps, {theirs.run.name} {len(second)}")
    found = {
        name: max(abs(a[key] - b[key]) / abs(b[key]) for a, b in zip(first, second, strict=True))
        for name, key in (("losses", "loss"), ("gradient norms", "gradient_norm"))
    }
    return found | {"weights": relative(ours.weights().values(), theirs.weights().values())}
