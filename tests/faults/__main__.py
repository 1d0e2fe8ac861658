"""Injects faults into trainings: `python -m tests.faults`, see docs/reliability.md."""

import argparse
import concurrent.futures
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import REPOSITORY

SHORT_FAULTS = 60

EXAMPLES = f"""\
examples:
  python -m tests.faults                            the short form: {SHORT_FAULTS} faults of all kinds
  python -m tests.faults --faults 1200 --minutes 55 the long form, an hour of it: give the same command to go on
  python -m tests.faults --list                     the kinds
  python -m tests.faults --only "SIGKILL of a rank" --seed 17 --processes 3,5
                                                    one fault again: on 3 processes, and then on 5 to the end
  python -m tests.faults --table                    the table of what has run so far
"""


def main(argv: Sequence[str] | None = None) -> int:
    options = _parse(argv)
    from tests.faults import campaign, kinds

    possible = [name for name, kind in kinds.KINDS.items() if not kind.needs or os.geteuid() == 0]
    if options.list:
        print("\n".join(kinds.KINDS))
        return 0
    if options.only and options.only not in possible:
        print(f"error: --only {options.only} is no kind that can be injected here: see --list", file=sys.stderr)
        return 2
    if skipped := sorted(kinds.KINDS.keys() - possible):
        print(f"left out, for they need root: {', '.join(skipped)}")
    if options.only:
        sizes = [int(size) for size in options.processes.split(",")]
        planned = campaign.Planned(options.only, options.seed, sizes[0])
        episodes = [campaign.Episode(0, (planned,), sizes[-1])]
        results = options.out / "one.jsonl"
        results.unlink(missing_ok=True)
    else:
        episodes = campaign.plan(options.faults, options.seed, possible)
        results = options.out / f"seed-{options.seed}-of-{options.faults}.jsonl"
    options.out.mkdir(parents=True, exist_ok=True)
    if options.fresh:
        results.unlink(missing_ok=True)
    records = _read(results)
    if not options.table:
        _inject(options, episodes, records, results)
    return _report(options, _read(results), len(episodes))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults",
        description="Injects faults into trainings of a small recogniser; compares what is left with undisturbed runs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--faults", type=int, default=SHORT_FAULTS, metavar="N", help=f"how many (default: {SHORT_FAULTS})")
    add("--seed", type=int, default=1, metavar="N", help="of all that is drawn (default: 1)")
    add("--minutes", type=float, default=0.0, metavar="M", help="begin no run after so long; 0: no limit")
    add("--at-a-time", type=int, default=3, metavar="N", help="runs at a time: most of a fault is waiting (default: 3)")
    add("--only", metavar="KIND", help="one fault of this kind, with --seed and --processes as the report names them")
    add("--processes", default="3,2", metavar="W,W", help="for --only: of its attempt and of the one after it")
    add("--out", type=Path, default=REPOSITORY / "build" / "faults", metavar="DIR", help="default: build/faults")
    add("--fresh", action="store_true", help="begin again instead of going on")
    add("--list", action="store_true", help="print the kinds")
    add("--table", action="store_true", help="print the table of what has run so far")
    return parser.parse_args(argv)


def _read(results: Path) -> list[dict]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def _inject(options: argparse.Namespace, episodes: list, records: list[dict], results: Path) -> None:
    """Makes the runs that have no record yet, some at a time, and adds a record of each fault to `results`."""
    from tests.faults import campaign
    from tests.faults.scene import Stage

    done = {record["episode"] for record in records}
    left = [episode for episode in episodes if episode.number not in done]
    if not left:
        return
    began_s = time.monotonic()
    stage = Stage(options.out / "stage")
    (options.out / "shape.json").write_text(json.dumps({"steps_per_epoch": stage.shape.steps_per_epoch}))
    lock, stopping = threading.Lock(), threading.Event()

    def run(episode: campaign.Episode) -> None:
        if stopping.is_set() or (options.minutes and time.monotonic() - began_s > 60 * options.minutes):
            return
        found = campaign.run_episode(stage, options.out / f"run-{episode.number}", episode)
        if stopping.is_set():  # a Ctrl-C reaches the processes of the runs, too
            return
        with lock, results.open("a") as file:
            for record in found:
                file.write(json.dumps(record | {"minutes": round((time.monotonic() - began_s) / 60, 1)}) + "\n")
                _say(record)

    with concurrent.futures.ThreadPoolExecutor(options.at_a_time) as pool:
        try:
            list(pool.map(run, left))
        except KeyboardInterrupt:
            stopping.set()
            print("stopped, once the runs of now have ended; the same command goes on", flush=True)
            raise SystemExit(130) from None


def _say(record: dict) -> None:
    verdict = "not reached" if not record["injected"] else "LOST" if record["lost"] else "survived"
    end = "" if record["end_s"] is None else f", ended after {record['end_s']:.1f} s"
    print(f"{verdict:11} {record['kind']}: seed {record['seed']}, {record['processes']} process(es){end}", flush=True)
    if record["lost"]:
        sizes = f"{record['processes']},{record.get('resumed_on', record['processes'])}"
        again = f"python -m tests.faults --only '{record['kind']}' --seed {record['seed']} --processes {sizes}"
        print(f"            again, alone: {again}")
        for reason in record["lost"]:
            print(f"            {reason}", flush=True)


def _report(options: argparse.Namespace, records: list[dict], runs: int) -> int:
    from tests.faults import campaign

    if not records:
        return 1
    print(f"\nseed {options.seed}\n{campaign.table(records)}\n")
    spe = json.loads((options.out / "shape.json").read_text())["steps_per_epoch"]
    pairs = campaign.pairs_in_mid_epoch(records, spe)
    lost = [record for record in records if record["lost"]]
    missed = sum(not record["injected"] for record in records)
    print(f"{len({record['episode'] for record in records})} of {runs} runs; {missed} faults came too late to happen")
    print(f"{len(pairs)} pairs of numbers of processes changed in mid-epoch: {sorted(pairs)}")
    print(f"lost: {len(lost)}")
    return 1 if lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
