"""Pack speech and its transcripts into shards, once: `python -m ddp_asr.shard SOURCE --out DIR`

SOURCE --open_source (data/sources)--> utterances --write_shards (data/writer)--> tars, index.parquet, dataset.json
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ddp_asr.data.sources import FORMATS, SourceOptions, open_source
from ddp_asr.errors import UserError, counted, run_entry_point
from ddp_asr.files import scheme_of

UPLOADS = ("s3", "gs", "az")

EXAMPLES = """examples:
  python -m ddp_asr.shard train-clean-100 --out shards/train-clean-100     download from OpenSLR, then shard
  python -m ddp_asr.shard dev-clean.tar.gz --out shards/dev-clean          read as a stream, never unpacked
  python -m ddp_asr.shard LibriSpeech/dev-clean --out shards/dev-clean     a split on disk
  python -m ddp_asr.shard mine.jsonl --out shards/mine --max-seconds 35    a manifest as NeMo's
  python -m ddp_asr.shard recordings --out shards/mine                     a.wav beside a.txt, in any folder of it
  python -m ddp_asr.shard mine.csv --columns text=words --out shards/mine  a table with columns for audio and text
  python -m ddp_asr.shard musan-noise --out shards/musan-noise             noises, for augment.background
  python -m ddp_asr.shard mine.jsonl --out s3://bucket/mine                pack under --cache, then upload
  python -m ddp_asr.shard street --no-text --out shards/street             a directory of audio without transcripts
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
    out = "directory for the shards, or a URL (s3://, gs://, az://) to upload them to"
    add("--out", required=True, metavar="DIR", help=out)
    add("--shard-mb", type=float, default=256.0, help="maximum size of a shard in 10^6 bytes (256)")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="number of threads (one per core)")
    add("--max-seconds", type=float, help="drop longer utterances (3600, and never more)")
    no_text = "the source is audio without transcripts, such as noises; else what has none is dropped"
    add("--no-text", action="store_true", help=no_text)
    columns = "columns of a table (.csv, .tsv) whose names are not known: audio, text, id, speaker, language, offset, "
    columns += "duration, end"
    add("--columns", default="", metavar="audio=NAME,text=NAME", help=columns)
    add("--strict", action="store_true", help="exit with an error if any utterance cannot be used")
    verify = "compare checksums and decode every utterance, after sharding or, without SOURCE, alone"
    add("--verify", action="store_true", help=verify)
    add(
        "--cache",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="directory for OpenSLR's archives, and for shards to upload (data)",
    )
    mirror = "directory to download archives from, in place of OpenSLR's, such as a mirror's .../resources/12"
    add("--openslr-url", default="", metavar="URL", help=mirror)
    options = parser.parse_args(argv)
    if not options.source and not options.verify:
        parser.error("SOURCE is missing; only --verify works without it, on the shards in --out")
    for name in ("shard_mb", "workers", "max_seconds"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be a number greater than 0")
    options.url = options.out.rstrip("/") if scheme_of(options.out) else ""
    if options.url:
        if scheme_of(options.url) not in UPLOADS:
            parser.error(f"--out is {options.url}; shards can be uploaded to {', '.join(f'{s}://' for s in UPLOADS)}")
        options.out = str(options.cache / f"shards-{re.sub(r'[^0-9A-Za-z]+', '-', options.url)}")
    options.out = Path(options.out)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Shards, verifies, or both."""
    options = parse(argv)
    if options.source:
        make(options)
    if options.verify:
        verify(options)
    if options.url:
        send(options)
    return 0


def make(options: argparse.Namespace) -> None:
    """Writes the shards and prints what is in them."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from ddp_asr.data.writer import Output, write_shards

    source = open_source(
        options.source, SourceOptions(options.cache, options.openslr_url, options.no_text, options.columns)
    )
    complete = (options.out / "dataset.json").exists()
    console = Console(stderr=True)
    columns = (TextColumn("sharding"), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
    task, printed = bar.add_task(""), 0

    def report(output: Output, total: int) -> None:
        """A bar on a terminal; elsewhere a line for each finished shard."""
        nonlocal printed
        bar.start()  # not before: a download shows its own bar, and rich before 14.1 allows only one
        figures = f"{counted(len(output.keys), 'utterance')}, {output.hours:.2f} h"
        bar.update(task, completed=output.consumed, total=total, description=figures)
        if len(output.finished) > printed and not console.is_terminal:
            print(f"{output.finished[-1]['name']}: {figures}", flush=True)
        printed = len(output.finished)

    settings = {name: getattr(options, name) for name in ("shard_mb", "max_seconds", "workers")}
    try:
        dataset = write_shards(source, options.out, **settings, report=report)
    except KeyboardInterrupt:
        print(f"{options.out}: finished shards are kept; the same command continues from there", file=sys.stderr)
        raise
    finally:
        bar.stop()
    print(
        f"{options.out}{' was complete already' * complete}: {counted(dataset['utterances'], 'utterance')}, "
        f"{dataset['hours']:.2f} h in {counted(len(dataset['shards']), 'shard')}"
    )
    for reason, count in dataset["dropped"].items():
        print(f"dropped: {count:,} x {reason}")
    if dataset["dropped"]:
        print(f"{options.out}/dropped.jsonl lists every dropped utterance")
    if options.strict and dataset["dropped"]:
        raise UserError(
            f"--strict: {sum(dataset['dropped'].values()):,} utterances cannot be used, as {options.out}/dropped.jsonl "
            "says; mend the source and name a new --out, or use these shards without them"
        )


def verify(options: argparse.Namespace) -> None:
    """Checks the shards and prints that they are good."""
    from rich.console import Console
    from rich.progress import track

    from ddp_asr.data import writer
    from ddp_asr.data.index import read_dataset_json

    dataset = read_dataset_json(options.out)
    shards, utterances = len(dataset["shards"]), dataset["utterances"]
    console = Console(stderr=True)
    good = writer.verify(options.out, options.workers)
    for _ in track(good, "verifying", shards, console=console, disable=not console.is_terminal, transient=True):
        pass
    print(f"{options.out}: {counted(shards, 'shard')} as written, all {utterances:,} utterances decode")


def send(options: argparse.Namespace) -> None:
    """Uploads the finished shards."""
    from rich.console import Console
    from rich.progress import Progress

    from ddp_asr.data.index import read_dataset_json
    from ddp_asr.data.object_storage import upload

    files = len(read_dataset_json(options.out)["shards"]) + 3
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("uploading", total=files)
        upload(options.out, options.url, lambda name: bar.update(task, advance=1))
    print(f"{options.url}: uploaded; the copy in {options.out} can be deleted")


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
