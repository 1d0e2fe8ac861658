"""One block in this process: `python -m benchmarks.gpu.run_block NAME`, which the runner starts for each.

1 where a check of the block does not hold; an error keeps its traceback, which goes to the log.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.job import Job
from ddp_asr.ranks.environment import before_torch

_TRACEBACK_BEFORE_S = 2.0  # before the limit, a block that hangs writes where


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.run_block", description=__doc__.split(":")[0])
    parser.add_argument("name", help="the block's name in the results")
    parser.add_argument("--module", required=True, help="where its `run` is")
    parser.add_argument("--out", type=Path, required=True, help="directory of results.jsonl")
    parser.add_argument("--limit-s", type=float, required=True, metavar="S", help="when this process is killed")
    parser.add_argument("--small", action="store_true", help="the reduced form")
    arguments = parser.parse_args(argv)
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(0.5, arguments.limit_s - _TRACEBACK_BEFORE_S))
    with tempfile.TemporaryDirectory() as folder:
        limits = {"small": arguments.small, "limit_s": arguments.limit_s}
        job = Job(arguments.name, out=arguments.out, folder=Path(folder), **limits)
        job.describe_machine()
        before_torch(os.environ)  # as every entry point does; the block's own environment wins
        importlib.import_module(arguments.module).run(job)
    return 1 if job.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
