"""Many faults: which ones on how many processes, one run after the other, each compared with an undisturbed one.

    plan(faults, seed) --> episodes: runs to which several faults happen, in an attempt each
      --> run_episode: fault, comparison, next fault ... last attempt, comparison --> a record of each fault

A record is a line of results.jsonl. All that is drawn for a fault comes from its kind and its own seed, so that it can
be repeated alone. Half of the runs keep their number of processes and are compared bit by bit; the others change it at
each attempt, through all pairs of WORLD_SIZES in turn.
"""

import itertools
import random
import shutil
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ddp_asr.runs.directory import read_status
from tests.faults.kinds import KINDS, Fault, Happened
from tests.faults.scene import WORLD_SIZES, Hang, Scene, Stage

FAULTS_OF_A_RUN = 4


@dataclass(frozen=True)
class Planned:
    """One fault before it happens."""

    kind: str
    seed: int
    processes: int


@dataclass(frozen=True)
class Episode:
    """One run: its faults, and the processes of its last attempt."""

    number: int
    faults: tuple[Planned, ...]
    last_processes: int


def plan(faults: int, seed: int, kinds: Sequence[str]) -> list[Episode]:
    """So many faults: each kind as often as its weight says in every round, in random order."""
    draw = random.Random(f"faults {seed}")
    rounds = [name for name in kinds for _ in range(KINDS[name].weight)]
    names: list[str] = []
    while len(names) < faults:
        names += draw.sample(rounds, len(rounds))
    used: dict[tuple[int, int], int] = dict.fromkeys(itertools.permutations(WORLD_SIZES, 2), 0)
    episodes = []
    for number, first in enumerate(range(0, faults, FAULTS_OF_A_RUN)):
        chosen = names[first : min(first + FAULTS_OF_A_RUN, faults)]
        allowed = [KINDS[name].world_sizes for name in chosen]
        common = sorted(set(WORLD_SIZES).intersection(*allowed))
        sizes = [draw.choice(common)] * (len(chosen) + 1) if number % 2 and common else _walk(allowed, used, draw)
        planned = [
            Planned(name, 1_000_000 * seed + first + place, size)
            for place, (name, size) in enumerate(zip(chosen, sizes, strict=False))
        ]
        episodes.append(Episode(number, tuple(planned), sizes[-1]))
    return episodes


def _walk(allowed: list[tuple[int, ...]], used: dict[tuple[int, int], int], draw: random.Random) -> list[int]:
    """Numbers of processes of the attempts of a run, by the pairs that were used least."""
    sizes = [draw.choice(allowed[0])]
    for options in [*allowed[1:], WORLD_SIZES]:
        others = [size for size in options if size != sizes[-1]] or list(options)
        fewest = min(used.get((sizes[-1], size), 0) for size in others)
        sizes.append(draw.choice([size for size in others if used.get((sizes[-1], size), 0) == fewest]))
        used[sizes[-2], sizes[-1]] = used.get((sizes[-2], sizes[-1]), 0) + 1
    return sizes


# ---- one run -------------------------------------------------------------------------------------------------------


def run_episode(stage: Stage, directory: Path, episode: Episode) -> list[dict]:
    """Makes a run with its faults; returns a record of each. The directory is kept if something was lost."""
    shutil.rmtree(directory, ignore_errors=True)
    scene, records = Scene(stage, directory), []
    try:
        if any(KINDS[planned.kind].needs == "root" for planned in episode.faults):
            scene.mount()
        for planned in episode.faults:
            record = _happen(scene, planned)
            records.append({"episode": episode.number, **record})
            if record["lost"]:
                break
        else:
            records[-1]["lost"] += _finish(scene, episode.last_processes, records)
    finally:
        lost = not records or any(record["lost"] for record in records)
        if lost and scene.mounted:
            shutil.copytree(scene.runs, directory / "runs-kept", dirs_exist_ok=True)
        scene.close()
    if not lost:
        shutil.rmtree(directory, ignore_errors=True)
    return records


def _happen(scene: Scene, planned: Planned) -> dict:
    saved_step, first, began_s = scene.saved_step(), len(scene.started), time.monotonic()
    former = read_status(scene.run)
    fault = Fault(scene, planned.processes, random.Random(f"{planned.kind} {planned.seed}"), saved_step)
    lost: list[str] = []
    try:
        happened = KINDS[planned.kind].happen(fault)
    except Hang as hang:
        happened = Happened(True, problems=[str(hang)])
    except Exception:  # of this suite, not of the product: told as lost, so that nobody overlooks it
        happened = Happened(True, problems=[traceback.format_exc()])
    finally:
        for attempt in scene.started[first:]:
            attempt.kill()
    lost += happened.problems
    if not happened.traceback_allowed:
        lost += [f"a traceback: {text}" for text in map(_traceback, scene.started[first:]) if text]
    status = read_status(scene.run) or {}
    gives_up = status.get("state") == "failed" and not status["retry"]
    if status != (former or {}) and gives_up and not KINDS[planned.kind].person:
        lost.append(f"no launcher would go on: {status['reason']}")
    if not lost:
        lost += scene.losses(complete=False)
    return {
        "kind": planned.kind,
        "seed": planned.seed,
        "processes": planned.processes,
        "from_step": saved_step,
        "saved_step": scene.saved_step(),
        "injected": happened.injected,
        "end_s": happened.end_s,
        "took_s": round(time.monotonic() - began_s, 1),
        "lost": lost,
    }


def _traceback(attempt) -> str:
    _, found, after = attempt.output.partition("Traceback")
    return after[-800:] if found else ""


def _finish(scene: Scene, processes: int, records: list[dict]) -> list[str]:
    """The last attempt, and the whole comparison; notes at each fault on how many processes the run went on."""
    attempt = scene.finish(processes)
    if attempt.codes != [0] * processes:
        return [f"the last attempt ended with {attempt.codes}: {attempt.errors}"]
    for record, following in itertools.zip_longest(records, records[1:]):
        record["resumed_on"] = following["processes"] if following else processes
    scene.make_archive()
    return scene.losses(complete=True)


def pairs_in_mid_epoch(records: Sequence[dict], steps_per_epoch: int) -> set[tuple[int, int]]:
    """The changes of the number of processes, (before, after), at which a run went on within an epoch."""
    return {
        (record["processes"], record["resumed_on"])
        for record in records
        if record.get("resumed_on") not in (None, record["processes"]) and record["saved_step"] % steps_per_epoch
    }


# ---- the table -----------------------------------------------------------------------------------------------------


def table(records: Sequence[dict]) -> str:
    """Markdown: a line for each kind."""
    lines = ["| kind | injected | survived | lost | slowest end |", "|---|---|---|---|---|"]
    for name in KINDS:
        of_kind = [record for record in records if record["kind"] == name and record["injected"]]
        if not of_kind:
            continue
        ends = [record["end_s"] for record in of_kind if record["end_s"] is not None]
        lost = sum(bool(record["lost"]) for record in of_kind)
        slowest = f"{max(ends):.1f} s" if ends else "-"
        lines.append(f"| {name} | {len(of_kind)} | {len(of_kind) - lost} | {lost} | {slowest} |")
    injected = [record for record in records if record["injected"]]
    lost = sum(bool(record["lost"]) for record in injected)
    ends = [record["end_s"] for record in injected if record["end_s"] is not None]
    slowest = f"{max(ends):.1f} s" if ends else ""
    lines.append(f"| all | {len(injected)} | {len(injected) - lost} | {lost} | {slowest} |")
    return "\n".join(lines)
