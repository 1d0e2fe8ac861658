"""Readers with a fault each, which the suite must find: tests/test_fuzz.py runs `python -m tests.fuzz.planted`."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from random import Random

from ddp_asr.errors import UserError
from tests.fuzz import runner, worker
from tests.fuzz.mutate import Tree
from tests.fuzz.target import Target, Wrong


class Planted(Target):
    """Accepts the valid input; what it does with another one is its fault."""

    share = 1

    def seeds(self) -> list[Tree]:
        return [{"file.txt": b"valid"}]

    def mutate(self, tree: Tree, random: Random) -> Tree:
        return {"file.txt": b"broken"}

    def read(self, directory: Path) -> None:
        if (directory / "file.txt").read_bytes() != b"valid":
            self.fail()

    def fail(self) -> None:
        raise UserError("file.txt is broken: mend it")


class Refuses(Planted):
    name = "refuses"


class Raises(Planted):
    name = "raises"

    def fail(self) -> None:
        raise KeyError("a key")


class Exits(Planted):
    name = "exits"

    def fail(self) -> None:
        raise SystemExit(0)


class Computes(Planted):
    name = "computes"

    def fail(self) -> None:
        while True:
            pass


class Waits(Planted):
    name = "waits"

    def fail(self) -> None:
        while True:
            signal.pause()


class Crashes(Planted):
    name = "crashes"

    def fail(self) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)


class EatsMemory(Planted):
    name = "eats memory"

    def fail(self) -> None:
        len(b"x" * (worker.MEMORY_LIMIT_BYTES * 2))


class TwoLines(UserError):
    """A UserError removes line feeds from its text, unless it makes it only when it is asked for it."""

    def __str__(self) -> str:
        return "two\nlines"


class Stammers(Planted):
    name = "stammers"

    def fail(self) -> None:
        raise TwoLines


class IsTooStrict(Planted):
    name = "is too strict"

    def read(self, directory: Path) -> None:
        self.fail()


class ChangesSilently(Planted):
    name = "changes silently"

    def fail(self) -> None:
        raise Wrong("another transcript than its checksum covers")


TARGETS: dict[str, type[Target]] = {target.name: target for target in Planted.__subclasses__()}


def main() -> None:
    """Prints what became of each: accepted, refused, and its findings by kind."""
    worker.CPU_LIMIT_S, runner.STUCK_LIMIT_S, worker.MEMORY_LIMIT_BYTES = 0.5, 3.0, 200 << 20
    chunks = [worker.Chunk(name, seed=0, start=0, stop=2) for name in TARGETS]
    results = runner.run(TARGETS, chunks, processes=2, report=lambda _: None)
    rows: dict[str, list] = {name: [row.accepted, row.refused, []] for name, row in results.rows.items()}
    for findings in results.groups.values():
        for finding in findings:
            rows[finding.target][2].append([finding.case, finding.kind])
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
