"""results.jsonl: what the blocks have measured, a line at a time, and read back as a `Result` for each block.

    {"block": "gru", "started": {"limit_s": 30, "small": false, "time_s": ...}}
    {"block": "gru", "machine": {...}}
    {"block": "gru", "table": "forward", "row": {...}}
    {"block": "gru", "note": "..."}
    {"block": "gru", "ended": "ok", "seconds": 12.3}

A block that is run again begins with a new `started`, which puts the lines before it out of force.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddp_asr.files import json_lines, read_json_lines

FILE = "results.jsonl"
OK, FAILED, TIMED_OUT, KILLED = "ok", "failed", "timed out", "not ended"


@dataclass
class Result:
    """What one block has left."""

    small: bool
    time_s: float
    limit_s: float
    machine: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    ended: str = KILLED  # until a line says more
    seconds: float | None = None


def append(folder: Path, block: str, **values: Any) -> None:
    """Adds a line, in one write, and returns when it is on the disk."""
    line = json_lines([{"block": block, **values}]).encode()
    descriptor = os.open(folder / FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(descriptor, line)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(folder: Path) -> dict[str, Result]:
    """The newest result of each block; none where nothing has run."""
    found: dict[str, Result] = {}
    for line in read_json_lines(folder / FILE):
        name = line["block"]
        if "started" in line:
            found[name] = Result(**line["started"])
        result = found[name]
        if "machine" in line:
            result.machine = line["machine"]
        if "row" in line:
            result.tables.setdefault(line["table"], []).append(line["row"])
        if "note" in line:
            result.notes.append(line["note"])
        if "ended" in line:
            result.ended, result.seconds = line["ended"], line["seconds"]
    return found
