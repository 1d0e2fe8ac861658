"""Tracks a run with Comet or TensorBoard from the run's own files: `python -m ddp_asr.tracking RUN`.

The work is done in `runs/`: records.py reads the files, comet.py sends to Comet or makes the offline archive,
tensorboard.py writes events, tracking.py is the process that does so while a run trains.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from ddp_asr.config import TRACKERS
from ddp_asr.errors import UserError, run_entry_point
from ddp_asr.runs.comet import NO_KEY, resolve_mode
from ddp_asr.runs.records import read_settings
from ddp_asr.runs.tracking import CLOSE_S, require, track

EXAMPLES = """\
examples:
  python -m ddp_asr.tracking runs/an4                 make the archive of a run, even of one that was killed
  comet upload runs/an4/comet/*.zip                   and upload it
  python -m ddp_asr.tracking runs/an4 --mode online   send what Comet does not have yet
  python -m ddp_asr.tracking runs/an4 --to tensorboard   write the events of TensorBoard again
  tensorboard --logdir runs                           and look at them, of all runs
"""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    run_directory: Path = arguments.run
    if not (run_directory / "config.yaml").exists():
        raise UserError(f"{run_directory} is not a run: it has no config.yaml; give a directory such as runs/an4")
    if arguments.parent is None and not (run_directory / "metrics.jsonl").exists():
        raise UserError(f"{run_directory} has no metrics.jsonl, so there is nothing to track: train it first")
    to = _trackers(run_directory, arguments.to)
    mode = resolve_mode(arguments.mode)
    if mode == "online" and "comet" in to and not os.environ.get("COMET_API_KEY"):
        raise UserError(NO_KEY)
    status = track(run_directory, mode, to, parent=arguments.parent, close_s=arguments.close_s)
    print(status.summary(run_directory), flush=True)
    return 0 if status.finished else 1


def _trackers(run_directory: Path, given: str | None) -> list[str]:
    """Those of the command line, or of the run's settings, which may be of an earlier version."""
    of_run = read_settings(run_directory).get("tracking", {}).get("to")
    to = [each for each in TRACKERS if each in of_run] if isinstance(of_run, list) else ["comet"]
    to = to if given is None else given.split(",")
    if wrong := [each for each in to if each not in TRACKERS]:
        raise UserError(f"--to has {wrong[0]!r}; name one or more of {','.join(TRACKERS)}")
    require(to)
    return to


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ddp_asr.tracking",
        description="Sends a run to Comet, or makes its offline archive or the events of TensorBoard again.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory")
    parser.add_argument("--to", metavar="comet,tensorboard", help="one or both (default: tracking.to of the run)")
    parser.add_argument(
        "--mode",
        choices=("auto", "online", "offline"),
        default="offline",
        help="auto: online when COMET_API_KEY is set (default: offline)",
    )
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)  # pid of the rank to follow
    parser.add_argument("--close-s", type=float, default=CLOSE_S, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
