"""Bad input for every reader of the program: `python -m tests.fuzz`, also as `make fuzz`."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MPLBACKEND"] = "agg"
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU's address space is far beyond the limit of memory

from ddp_asr.errors import UserError, run_entry_point

DEFAULT_CASES = 4_000

EXAMPLES = """\
examples:
  python -m tests.fuzz                                     4,000 cases, under a minute on one core
  python -m tests.fuzz --cases 200000 --processes 2        the long form
  python -m tests.fuzz --target arpa --cases 5000 --seed 7
  python -m tests.fuzz --only arpa:0:1234                  one case, with its traceback
  python -m tests.fuzz --list

A case may end in two ways: the input is accepted, or refused with a UserError of one sentence, within 5 s and 2 GB.
Anything else is a finding: the exit status is then 1, and OUT/findings has the inputs. An input that is
accepted although a checksum covers what was changed in it is a finding, too.
"""


def main(argv: Sequence[str] | None = None) -> int:
    options = _arguments(argv)
    from tests.fuzz import runner
    from tests.fuzz.targets import TARGETS
    from tests.fuzz.worker import Chunk

    if options.list:
        for name, target in TARGETS.items():
            print(f"{name:14}{(target.__doc__ or '').splitlines()[0]}")
        return 0
    names = options.target or list(TARGETS)
    if options.only:
        name, _, rest = options.only.partition(":")
        seed, _, number = rest.partition(":")
        if name not in TARGETS or not (seed.isdecimal() and number.isdecimal()):
            raise UserError(f"--only is {options.only!r}; it must be TARGET:SEED:NUMBER, such as arpa:0:1234")
        names, chunks = [name], [Chunk(name, int(seed), int(number), int(number) + 1)]
    elif unknown := set(names) - set(TARGETS):
        raise UserError(f"--target {min(unknown)} is unknown; known are: {', '.join(TARGETS)}")
    else:
        chunks = runner.chunks_of({name: TARGETS[name] for name in names}, options.cases, options.seed)
    targets = {name: TARGETS[name] for name in names}
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell starts what it puts into the background deaf to the first
        signal.signal(number, signal.default_int_handler)
    began_s = time.monotonic()
    results = runner.run(targets, chunks, options.processes, _progress(sum(c.stop - c.start for c in chunks)))
    print(results.table())
    print(f"\nseed {options.seed}, {options.processes} process(es), {time.monotonic() - began_s:.0f} s")
    if not results.found:
        return 0
    found = options.out.resolve() / "findings"
    shutil.rmtree(found, ignore_errors=True)  # of the run before
    runner.store(results, found)
    print(f"\n{sum(results.found.values()):,} findings in {len(results.found)} groups; inputs in {found}:")
    print(results.listed())
    if options.only:
        print(next(iter(results.groups.values()))[0].detail)
    return 1


def _progress(cases: int):
    def report(results) -> None:
        if sys.stderr.isatty():
            done = sum(row.accepted + row.refused + row.findings for row in results.rows.values())
            print(f"\r{done:,} of {cases:,} cases, {len(results.found)} groups of findings", end="\r", file=sys.stderr)

    return report


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description="Gives mutated and made-up input to every reader of the program, and lists what ends wrongly.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--cases", type=int, default=DEFAULT_CASES, metavar="N", help="of all targets together (default: %(default)s)")
    add("--target", action="append", metavar="NAME", help="only this reader; may be given several times")
    add("--seed", type=int, default=0, metavar="N", help="of the random changes (default: %(default)s)")
    add("--only", default="", metavar="CASE", help="repeat one case, TARGET:SEED:NUMBER as the list of findings says")
    add("--processes", type=int, default=1, metavar="N", help="at a time (default: %(default)s)")
    add("--out", type=Path, default=Path("build/fuzz"), metavar="DIR", help="for findings (default: %(default)s)")
    add("--list", action="store_true", help="list the readers, and run nothing")
    options = parser.parse_args(argv)
    if min(options.cases, options.processes) < 1 or options.seed < 0:
        parser.error("--cases and --processes must be at least 1, and --seed at least 0")
    return options


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
