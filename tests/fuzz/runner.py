"""Cases shared out over workers, what they found by group, and the table of it.

    cases --Chunk--> workers --Finding, Counts--> Results --> table, OUT/findings/GROUP/CASE/{finding.txt, input/}

A worker that dies, hangs or has had too much memory is replaced, and the new one goes on with the next case.
"""

from __future__ import annotations

import collections
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

from tests.fuzz.mutate import read_tree, write_tree
from tests.fuzz.target import Target
from tests.fuzz.worker import BROKEN_SUITE, STUCK_LIMIT_S, Chunk, Counts, Finding, Worker

CHUNKS_OF_TARGET = 16  # at least: a worker that is done takes the next one
LARGEST_CHUNK = 500
PREPARE_LIMIT_S = 60.0  # to make the valid inputs of a target
MOST_DEAD_WORKERS = 8  # of a target: the rest of its cases is left out then, and the table says so
STORED_OF_GROUP = 3

Targets = Mapping[str, type[Target]]


@dataclass
class Row:
    """What became of the cases of a target."""

    accepted: int = 0
    refused: int = 0
    findings: int = 0
    left_out: int = 0
    dead_workers: int = 0
    seconds: float = 0.0  # of workers

    def add(self, counts: Counts) -> None:
        self.accepted += counts.accepted
        self.refused += counts.refused


@dataclass
class Results:
    """All that came out."""

    rows: dict[str, Row] = field(default_factory=dict)
    groups: dict[str, list[Finding]] = field(default_factory=dict)  # the first ones of each
    found: collections.Counter[str] = field(default_factory=collections.Counter)  # how many of each group

    def add(self, finding: Finding) -> None:
        self.rows[finding.target].findings += 1
        self.found[finding.group] += 1
        first = self.groups.setdefault(finding.group, [])
        if len(first) < STORED_OF_GROUP:
            first.append(finding)

    def table(self) -> str:
        """A row for each target, as Markdown."""
        lines = ["| target | cases | accepted | refused | findings | cases a second |", "|---|---|---|---|---|---|"]
        total = Row()
        for name, row in self.rows.items():
            for each in vars(total):
                setattr(total, each, getattr(total, each) + getattr(row, each))
            lines.append(_line(name, row))
        return "\n".join([*lines, _line("all", total)])

    def listed(self) -> str:
        """A line for each group of findings, the most frequent first."""
        return "\n".join(
            f"{number:6,} x {group}: {self.groups[group][0].message[:160]!r} ({self.groups[group][0].case})"
            for group, number in self.found.most_common()
        )


def _line(name: str, row: Row) -> str:
    cases = row.accepted + row.refused + row.findings
    left_out = f" ({row.left_out:,} left out)" if row.left_out else ""
    speed = f"{cases / row.seconds:,.0f}" if row.seconds else "-"
    return f"| {name} | {cases:,}{left_out} | {row.accepted:,} | {row.refused:,} | {row.findings:,} | {speed} |"


def chunks_of(targets: Targets, cases: int, seed: int) -> list[Chunk]:
    """The cases of each target by its share, those of different targets in turn."""
    shares = sum(target.share for target in targets.values())
    placed: list[tuple[float, Chunk]] = []
    for name, target in targets.items():
        number = max(20, round(cases * target.share / shares))
        size = min(LARGEST_CHUNK, max(20, -(-number // CHUNKS_OF_TARGET)))
        for start in range(0, number, size):
            placed.append((start / number, Chunk(name, seed, start, min(number, start + size))))
    return [chunk for _, chunk in sorted(placed, key=lambda item: item[0])]


def run(targets: Targets, chunks: Iterable[Chunk], processes: int, report: Callable[[Results], None]) -> Results:
    """Runs all cases; `report` is called about once a second."""
    results = Results({name: Row() for name in targets})
    waiting = collections.deque(chunks)
    workers = [Worker(dict(targets)) for _ in range(min(processes, len(waiting)))]
    busy: dict[Worker, float] = {}  # since when it has its chunk
    reported_s = time.monotonic()
    try:
        while waiting or busy:
            for worker in workers:
                if worker not in busy and waiting:
                    busy[worker] = time.monotonic()
                    worker.assign(waiting.popleft())
            wait([worker.connection for worker in busy], timeout=0.2)
            for number, worker in enumerate(workers):
                if worker in busy and _look_at(worker, results):
                    results.rows[_chunk(worker).target].seconds += time.monotonic() - busy.pop(worker)
                elif worker in busy and (ended := _end_of(worker, results)):
                    row = results.rows[_chunk(worker).target]
                    row.seconds += time.monotonic() - busy.pop(worker)
                    _put_back(ended, row, waiting)
                    workers[number] = Worker(dict(targets))
            if time.monotonic() - reported_s > 1:
                reported_s = time.monotonic()
                report(results)
    except KeyboardInterrupt:  # what there is so far is worth its table
        for chunk in waiting:
            results.rows[chunk.target].left_out += chunk.stop - chunk.start
        for worker in busy:
            number, counts = worker.current()
            row = results.rows[_chunk(worker).target]
            row.add(counts)
            row.left_out += _chunk(worker).stop - max(number, _chunk(worker).start)
    finally:
        for worker in workers:
            if worker in busy:
                worker.kill()
            else:
                worker.close()
    return results


def _chunk(worker: Worker) -> Chunk:
    assert worker.chunk is not None
    return worker.chunk


def _look_at(worker: Worker, results: Results) -> bool:
    """Takes what the worker has sent; returns whether its chunk is done."""
    try:
        while worker.connection.poll():
            message = worker.connection.recv()
            if isinstance(message, Counts):
                results.rows[_chunk(worker).target].add(message)
                return True
            results.add(message)
    except EOFError:
        pass
    return False


def _end_of(worker: Worker, results: Results) -> Chunk | None:
    """The cases that are left over of a worker that is dead, or that is ended here because it hangs."""
    chunk = _chunk(worker)
    number, counts = worker.current()
    hangs = worker.stuck_s() > (PREPARE_LIMIT_S if number < 0 else STUCK_LIMIT_S)
    if worker.process.is_alive() and not hangs:
        return None
    # It may have finished, or told of a finding, since it was looked at.
    if _look_at(worker, results):
        worker.kill()
        return Chunk(chunk.target, chunk.seed, chunk.stop, chunk.stop)
    tree = read_tree(worker.directory / "case")
    trace = worker.kill()
    number, counts = worker.current()
    status = worker.process.exitcode
    if number < 0 or status == BROKEN_SUITE:
        raise RuntimeError(f"the suite is broken, in {chunk.target} after case {number}:\n{trace}")
    results.rows[chunk.target].add(counts)
    if not hangs and status == 0:  # it has sent its finding: too much memory; `number` is the next case
        return Chunk(chunk.target, chunk.seed, number, chunk.stop)
    kind = "hang" if hangs else "died"
    message = f"no end within {STUCK_LIMIT_S:g} s" if hangs else f"the process ended with status {status}"
    case = f"{chunk.target}:{chunk.seed}:{number}"
    results.add(Finding(chunk.target, case, kind, _place_in(trace), message, trace, tree))
    return Chunk(chunk.target, chunk.seed, number + 1, chunk.stop)


def _put_back(left: Chunk, row: Row, waiting: collections.deque[Chunk]) -> None:
    row.dead_workers += 1
    if row.dead_workers >= MOST_DEAD_WORKERS:
        others = [chunk for chunk in waiting if chunk.target == left.target]
        row.left_out += sum(chunk.stop - chunk.start for chunk in (left, *others))
        for chunk in others:
            waiting.remove(chunk)
    elif left.start < left.stop:
        waiting.appendleft(left)


def _place_in(trace: str) -> str:
    """The innermost function of the product in what faulthandler wrote, which begins with the newest call."""
    found = re.findall(r'File ".*?/((?:ddp_asr|launch)/[^"]+)", line \d+ in (\S+)', trace)
    return f"{found[0][0]}:{found[0][1]}" if found else "?"


def store(results: Results, out: Path) -> None:
    """Writes the first findings of each group: GROUP/CASE/finding.txt and the input beside it."""
    for group, findings in results.groups.items():
        for finding in findings:
            directory = out / re.sub(r"[^\w.]+", "-", group) / finding.case.replace(":", "-")
            write_tree(finding.tree, directory / "input")
            text = f"{finding.case}\n{finding.kind} in {finding.place}: {finding.message}\n\n{finding.detail}\n"
            text += f"\nrepeat it: python -m tests.fuzz --only {finding.case}\n"
            (directory / "finding.txt").write_text(text, errors="backslashreplace")
