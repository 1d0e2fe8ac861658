"""Runs blocks, each in a process of its own under its own time limit; none stops the others.

run(names, out, small=False, total_s=540)  -->  out/results.jsonl   what each has measured, line by line
                                                out/log.txt         what each has printed
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu import results
from benchmarks.gpu.blocks import Block
from benchmarks.gpu.children import kill_with_descendants
from benchmarks.gpu.job import REPOSITORY

_LEAST_S = 10.0  # a block that would have less is not started: importing torch alone takes some of it
_LINES_SHOWN = 15


def run(
    blocks: Mapping[str, Block], out: Path, *, small: bool, total_s: float, at_once: int = 1, site: Path | None = None
) -> int:
    """Runs the blocks in order, `at_once` at a time; 0 where all of them ended well.

    Args:
        total_s: limit for all of them together.
        site: a directory of packages, for machines that lack some.
    """
    out.mkdir(parents=True, exist_ok=True)
    ends_s = time.monotonic() + total_s

    def run_next(name: str) -> str:
        return _run_one(name, blocks[name], out, small=small, left_s=ends_s - time.monotonic(), site=site)

    with ThreadPoolExecutor(at_once) as pool:
        ended = list(pool.map(run_next, blocks))
    return int(any(state != results.OK for state in ended))


def _run_one(name: str, block: Block, out: Path, *, small: bool, left_s: float, site: Path | None) -> str:
    """Runs a block, notes how it ended, and prints that."""
    limit_s = left_s if small else min(block.limit_s, left_s)  # the reduced form runs on machines of any speed
    results.append(out, name, started={"small": small, "limit_s": round(limit_s, 1), "time_s": round(time.time())})
    started_s = time.monotonic()
    log = out / f"{name}.log"
    state = results.TIMED_OUT
    if left_s >= _LEAST_S:
        state = _in_process(name, block, out, log, small=small, limit_s=limit_s, site=site)
    else:
        results.append(out, name, note="not started: the time for all blocks was used up")
        log.touch()
    seconds = time.monotonic() - started_s
    results.append(out, name, ended=state, seconds=round(seconds, 1))
    text = log.read_text(errors="replace")
    with (out / "log.txt").open("a") as all_logs:
        all_logs.write(f"==== {name}: {state} after {seconds:.0f} s ====\n{text}\n")
    log.unlink()
    shown = [] if state == results.OK else text.splitlines()[-_LINES_SHOWN:]
    print("\n".join([f"{name}: {state} after {seconds:.0f} s", *(f"    {line}" for line in shown)]), flush=True)
    return state


def _in_process(
    name: str, block: Block, out: Path, log: Path, *, small: bool, limit_s: float, site: Path | None
) -> str:
    command = [sys.executable, "-m", "benchmarks.gpu.run_block", name, "--module", block.module]
    command += ["--out", str(out.resolve()), "--limit-s", f"{limit_s:.1f}", *(["--small"] if small else [])]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=_environment(site, small) | dict(block.environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            return results.OK if process.wait(limit_s) == 0 else results.FAILED
        except subprocess.TimeoutExpired:
            return results.TIMED_OUT
        finally:
            kill_with_descendants(process.pid)
            process.wait()


def _environment(site: Path | None, small: bool) -> dict[str, str]:
    folders = [str(REPOSITORY), *([str(site)] if site else []), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "PYTHONUNBUFFERED": "1"}
    if small:
        environment.setdefault("OMP_NUM_THREADS", "1")  # blocks run beside each other
    return environment
