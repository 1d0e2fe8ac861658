"""Run directories as a training leaves them, without training, and reading from a pseudo-terminal.

run = write_run(tmp_path / "run", "stopped", lines=[train_line(1), evaluation_line(1, wer=0.4)], reason="SIGTERM")
shown = read_until(screen, rb"done")
"""

import json
import os
import re
import time
from pathlib import Path
from typing import Any, cast

from ddp_asr.runs.directory import RunDirectory
from ddp_asr.runs.lease import Lease


def train_line(step: int, **changes: Any) -> dict[str, Any]:
    """A train line of metrics.jsonl."""
    line = {"kind": "train", "step": step, "epoch": 1 + (step - 1) // 10, "loss": 3.0 / step, "audio_s_per_s": 312.4}
    return line | {"time_s": time.time()} | changes


def evaluation_line(step: int, wer: float | None, **changes: Any) -> dict[str, Any]:
    """A test line of metrics.jsonl."""
    line = {"kind": "test", "step": step, "epoch": 1, "loss": 0.5, "wer": wer, "cer": 0.1, "time_s": 1.7e9}
    return line | changes


class _AnyLease:
    def check(self) -> None:
        pass

    def release(self) -> None:
        pass


def write_run(
    path: Path, state: str | None = None, *, lines=(), job=None, reason="", retry=True, job_id=None, attempt=1, **more
) -> Path:
    """Writes status.json with `state`, metrics.jsonl with `lines`, and job.json with `job`, each only if given."""
    path.mkdir(parents=True, exist_ok=True)
    files = RunDirectory(path, cast(Lease, _AnyLease()), job_id, attempt)
    for line in lines:
        files.append("metrics.jsonl", line)
    if state is not None:
        step = max((line["step"] for line in lines), default=0)
        files.status(state, reason, retry=retry, step=step, epoch=0, **more)
    files.close()
    if job is not None:
        (path / "job.json").write_text(json.dumps({"executor": "slurm", "folder": str(path), "time_s": 1.8e9} | job))
    return path


def read_until(descriptor: int, pattern: bytes) -> bytes:
    """What comes from a pseudo-terminal, up to and including the pattern."""
    seen = b""
    while not re.search(pattern, seen):
        seen += os.read(descriptor, 4096)
    return seen


def read_to_end(descriptor: int) -> bytes:
    """What comes from a pseudo-terminal until the process at its other end closes it."""
    seen = b""
    while True:
        try:
            chunk = os.read(descriptor, 4096)
        except OSError:  # how Linux says that the other end is closed
            chunk = b""
        if not chunk:
            os.close(descriptor)
            return seen
        seen += chunk
