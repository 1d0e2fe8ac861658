"""Everything that only a GPU can show, in ten minutes: `python -m benchmarks.gpu`, also as `make gpu-run`.

blocks, each in a process of its own --> OUT/results.jsonl, OUT/log.txt --> docs/gpu/ --> docs/gpu.md

It needs torch, torchaudio, numpy, pyarrow and pytest; what else is missing travels as wheels. Without a GPU the same
blocks run in a reduced form (--small), so that they cannot rot.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu import report, results, runner, wheels
from benchmarks.gpu.blocks import BLOCKS
from ddp_asr.errors import UserError, run_entry_point

EXAMPLES = """\
examples:
  python -m benchmarks.gpu
  python -m benchmarks.gpu --blocks gru step --out build/gpu-run
  python -m benchmarks.gpu --small
  python -m benchmarks.gpu --download-wheels wheels --python 3.12     # where there is a network
  python -m benchmarks.gpu --wheels wheels                            # where there is a GPU and no network
  python -m benchmarks.gpu --report                                   # docs/gpu/results.jsonl -> docs/gpu.md

To keep the results, copy results.jsonl and log.txt to docs/gpu, write the report, and commit all three.

blocks:
"""


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    if arguments.download_wheels:
        wheels.download(arguments.download_wheels, arguments.python)
        return 0
    if arguments.report:
        report.PAGE.write_text(report.render(results.read(report.RESULTS)), encoding="utf-8")
        return 0
    chosen = {name: BLOCKS[name] for name in arguments.blocks}
    with contextlib.ExitStack() as stack:
        site = None
        if arguments.wheels:
            site = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            wheels.unpack(arguments.wheels, site)
        if not wheels.require_packages(site) and not arguments.small:
            raise UserError("torch sees no CUDA GPU here: --small runs the reduced form, which needs none")
        at_once = len(os.sched_getaffinity(0)) if arguments.small else 1
        status = runner.run(
            chosen, arguments.out, small=arguments.small, total_s=arguments.total_s, at_once=at_once, site=site
        )
    print(report.render(results.read(arguments.out)))
    return status


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    listed = "".join(f"  {name:20}{block.limit_s:3.0f} s  {block.title}\n" for name, block in BLOCKS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Runs the checks and measurements that take a GPU, each block under its own time limit.",
        epilog=EXAMPLES + listed,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--blocks", nargs="+", default=list(BLOCKS), choices=BLOCKS, metavar="NAME", help="which (default: all)")
    default_out = Path(os.environ.get("OUT") or "build/gpu-run")
    add(
        "--out", type=Path, default=default_out, metavar="DIR", help="for the results (default: $OUT, else %(default)s)"
    )
    add("--total-s", type=float, default=540, metavar="S", help="limit for all blocks (default: %(default)s)")
    add("--small", action="store_true", help="the reduced form: tiny models, a minute on two cores, no GPU needed")
    add("--wheels", type=Path, metavar="DIR", help="packages for a machine that lacks some, as wheels")
    add("--download-wheels", type=Path, metavar="DIR", help="fetch these wheels, and run nothing")
    add("--python", default="3.12", metavar="VERSION", help="Python of that machine (default: %(default)s)")
    add("--report", action="store_true", help="write docs/gpu.md from docs/gpu, and run nothing")
    arguments = parser.parse_args(argv)
    if arguments.total_s <= 0:
        raise UserError(f"--total-s must be above 0, not {arguments.total_s:g}")
    return arguments


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
