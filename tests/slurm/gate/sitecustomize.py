"""Holds a training on the cluster wherever a test wants it: Python imports this by itself from PYTHONPATH.

    DDP_ASR_GATE=DIR      without it, nothing happens
    DIR/hold-5            rank 0 waits before step 5, whatever the attempt, until the file is gone
    DIR/hold-5.2          only in the job's second attempt
    DIR/hold-0.1          before the ranks have met and signals are handled
    DIR/held-5.2          written when it waits there: a JSON object with its host, pid, job and world size
    DIR/crash-5           an error of ours at step 5, in every attempt

A rank that has been asked to stop waits no longer, as a step that takes long would end some time, too. Steps before
those that an attempt goes on from are passed by, so a test can set all its gates at once.
"""

import importlib.abc
import importlib.machinery
import json
import os
import socket
import sys
import time
from pathlib import Path
from types import ModuleType

DIRECTORY = os.environ.get("DDP_ASR_GATE")
POLL_S = 0.05
_asked_to_stop = False


def watch_requests(signals: ModuleType) -> None:
    """Notes when this process is asked to stop."""
    if os.environ.get("RANK") == "0":
        pass_gate(0, int(os.environ["WORLD_SIZE"]))
    request = signals.StopRequest.request

    def noting(self, reason):
        global _asked_to_stop
        request(self, reason)
        _asked_to_stop = True

    signals.StopRequest.request = noting


def gate_steps(trainer: ModuleType) -> None:
    """Puts the gate before the first micro-batch of every step."""
    accumulate, now = trainer.Learner.accumulate, [0]

    def gated(self, batch, *, step, last):
        if self.world.rank == 0 and step != now[0] and step > 0:  # 0 is the rehearsal
            now[0] = step
            pass_gate(step, self.world.world_size)
        return accumulate(self, batch, step=step, last=last)

    trainer.Learner.accumulate = gated


def pass_gate(step: int, world_size: int) -> None:
    directory, attempt = Path(DIRECTORY or ""), int(os.environ.get("SLURM_RESTART_COUNT") or 0) + 1
    if (directory / f"crash-{step}").exists():
        raise ZeroDivisionError(f"the test breaks step {step}")
    holding = [directory / f"hold-{step}", directory / f"hold-{step}.{attempt}"]
    if not any(path.exists() for path in holding):
        return
    place = {"host": socket.gethostname(), "pid": os.getpid(), "job_id": os.environ.get("SLURM_JOB_ID")}
    aside = directory / f".held-{step}.{attempt}"
    aside.write_text(json.dumps({**place, "attempt": attempt, "world_size": world_size}))
    aside.rename(directory / f"held-{step}.{attempt}")
    while not _asked_to_stop and any(path.exists() for path in holding):
        time.sleep(POLL_S)


PATCHES = {"ddp_asr.ranks.signals": watch_requests, "ddp_asr.training.learner": gate_steps}


class Finder(importlib.abc.MetaPathFinder):
    """Patches a module when somebody imports it, so that nothing is imported early."""

    def find_spec(self, name, path, target=None):
        patch = PATCHES.get(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path) if patch else None
        if patch is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def executing(module):
            execute(module)
            patch(module)

        spec.loader.exec_module = executing
        return spec


if DIRECTORY:
    sys.meta_path.insert(0, Finder())
