"""Pack speech and its transcripts into shards, once: `python -m ddp_asr.shard SOURCE --out DIR`

SOURCE --open_source (data/sources)--> utterances --write_shards (data/writer)--> tars, index.parquet, dataset.json
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddp_asr.data.sources import FORMATS, OPENSLR_URL, SourceOptions, open_source
from ddp_asr.errors import run_entry_point

if TYPE_CHECKING:
    from ddp_asr.data.writer import Output

EXAMPLES = """examples:
  python -m ddp_asr.shard train-clean-100 --out shards/train-clean-100     download from OpenSLR, then shard
  python -m ddp_asr.shard dev-clean.tar.gz --out shards/dev-clean          read as a stream, never unpacked
  python -m ddp_asr.shard LibriSpeech/dev-clean --out shards/dev-clean     a split on disk
  python -m ddp_asr.shard mine.jsonl --out shards/mine --max-seconds 35    a manifest as NeMo's
  python -m ddp_asr.shard --verify --out shards/mine                       check every byte

After an interruption or a kill, run the same command again: it continues where it ended."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m ddp_asr.shard",
        description="Pack speech and its transcripts into WebDataset shards with an index, once.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add("source", nargs="?", default="", metavar="SOURCE", help=", or ".join(FORMATS.values()))
    add("--out", type=Path, required=True, metavar="DIR", help="directory for the shards")
    add("--shard-mb", type=float, default=256.0, help="maximum size of a shard in 10^6 bytes (256)")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="number of processes (one per core)")
    add("--max-seconds", type=float, help="drop longer utterances (no limit)")
    add("--strict", action="store_true", help="exit with an error if any utterance cannot be used")
    verify = "compare checksums and decode every utterance, after sharding or, without SOURCE, alone"
    add("--verify", action="store_true", help=verify)
    add("--cache", type=Path, default=Path("data"), metavar="DIR", help="directory for OpenSLR's archives (data)")
    add("--openslr-url", default=OPENSLR_URL, metavar="URL", help=f"mirror to download from ({OPENSLR_URL})")
    options = parser.parse_args(argv)
    if not options.source and not options.verify:
        parser.error("SOURCE is missing; only --verify works without it, on the shards in --out")
    for name in ("shard_mb", "workers", "max_seconds"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be a number greater than 0")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Shards, verifies, or both."""
    options = parse(argv)
    if options.source:
        make(options)
    if options.verify:
        verify(options)
    return 0


def make(options: argparse.Namespace) -> None:
    """Writes the shards and prints what is in them."""
    from ddp_asr.data.writer import write_shards

    source = open_source(options.source, SourceOptions(options.cache, options.openslr_url))
    complete = (options.out / "dataset.json").exists()
    settings = {name: getattr(options, name) for name in ("shard_mb", "max_seconds", "workers", "strict")}
    progress = Progress()
    try:
        dataset = write_shards(source, options.out, **settings, report=progress)
    except KeyboardInterrupt:
        print(f"{options.out}: finished shards are kept; the same command continues from there", file=sys.stderr)
        raise
    finally:
        progress.bar.stop()
    if complete:
        print(f"{options.out} was complete already")
    print_table(options.out, dataset)


class Progress:
    """A bar with utterances/s and hours on a terminal; elsewhere a line for each finished shard."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        self.on_terminal = console.is_terminal
        columns = (TextColumn("sharding"), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self.bar = Bar(*columns, console=console, disable=not self.on_terminal, transient=True)
        self.start_s: float | None = None

    def __call__(self, output: Output, position: int, size: int) -> None:
        """Called by `write_shards` before the first utterance and after each."""
        if self.start_s is None:
            self.start_s, self.consumed, self.shards = time.monotonic(), output.consumed, len(output.finished)
            self.bar.start()  # not before: a download shows its own bar, and rich before 14.1 allows only one
            self.task = self.bar.add_task("", total=size)
            if output.consumed and not self.on_terminal:
                print(f"continuing after {self.shards:,} finished shards, {output.consumed:,} utterances", flush=True)
        rate = (output.consumed - self.consumed) / max(time.monotonic() - self.start_s, 1e-3)
        figures = f"{len(output.keys):,} utterances, {rate:.0f}/s, {output.hours:.2f} h"
        self.bar.update(self.task, completed=position, description=figures)
        if len(output.finished) > self.shards:
            self.shards = len(output.finished)
            if not self.on_terminal:
                print(f"{output.finished[-1]['name']}: {figures}", flush=True)


def print_table(out: Path, dataset: dict[str, Any]) -> None:
    """What was written, and what was dropped for which reason."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column(str(out), overflow="fold")
    table.add_column("utterances", justify="right")
    written = f"written: {dataset['hours']:.2f} h in {len(dataset['shards']):,} shard(s)"
    table.add_row(written, f"{dataset['utterances']:,}")
    for reason, count in dataset["dropped"].items():
        table.add_row(f"dropped: {reason}", f"{count:,}")
    Console().print(table)
    if dataset["dropped"]:
        print(f"{out}/dropped.jsonl lists every dropped utterance")


def verify(options: argparse.Namespace) -> None:
    """Checks the shards and prints that they are good."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    from ddp_asr.data import writer

    console = Console(stderr=True)
    with Bar(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("verifying", total=None)

        def report(done: int, shards: int) -> None:
            bar.update(task, completed=done, total=shards)

        dataset = writer.verify(options.out, options.workers, report)
    shards, utterances = len(dataset["shards"]), dataset["utterances"]
    print(f"{options.out}: {shards:,} shard(s) as written, all {utterances:,} utterances decode")


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
