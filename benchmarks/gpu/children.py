"""The processes that a process has started, by the kernel's tables, and how to kill them all."""

import contextlib
import os
import signal
from pathlib import Path


def descendants(pid: int) -> list[int]:
    """Process ids of children, their children and so on; none where the process is gone."""
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            text = stat.read_text()
            # The name in parentheses may hold anything, parentheses too; the parent's id is the second field after it.
            parents.setdefault(int(text[text.rindex(")") + 2 :].split()[1]), []).append(int(stat.parent.name))
    found, waiting = [], [pid]
    while waiting:
        children = parents.get(waiting.pop(), [])
        found += children
        waiting += children
    return found


def kill_with_descendants(pid: int) -> None:
    """SIGKILL for a process and all that it has started, also what is in a session of its own."""
    for each in [pid, *descendants(pid)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, signal.SIGKILL)
