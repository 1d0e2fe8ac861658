"""What is in audio with transcripts, before it is trained: `python -m ddp_asr.inspect SOURCE|SHARDS...`

sources, shards --data.inspection.read--> Corpus --data.inspection.report--> Report --> text, JSON, a picture
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ddp_asr.config import load_config
from ddp_asr.data.sources import FORMATS, SourceOptions
from ddp_asr.errors import printable, run_entry_point
from ddp_asr.files import check_writable

if TYPE_CHECKING:
    from ddp_asr.data.inspection import Coverage, Report

CHARACTERS_SHOWN = 60
BAR_WIDTH = 40

EXAMPLES = """examples:
  python -m ddp_asr.inspect mine.jsonl                            numbers, and a vocabulary to paste into a config
  python -m ddp_asr.inspect shards/mine shards/more --all         shards, with every utterance decoded
  python -m ddp_asr.inspect mine.jsonl --config configs/an4.yaml  what the vocabulary of these settings leaves out
  python -m ddp_asr.inspect mine.jsonl --vocabulary.symbols="' abcdefghijklmnopqrstuvwxyzäöüß"
  python -m ddp_asr.inspect mine.jsonl --json > mine.json         the same for a program
  python -m ddp_asr.inspect mine.jsonl --plot lengths.png         a picture of the lengths

Nothing is written but the picture; a LibriSpeech split that is named is downloaded."""


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the settings (`--vocabulary.NAME=VALUE`)."""
    parser = argparse.ArgumentParser(
        prog="python -m ddp_asr.inspect",
        usage="%(prog)s SOURCE|SHARDS ... [--all] [--json] [--plot FILE] [--config FILE] [--vocabulary.NAME=VALUE ...]",
        description="Shows what is in recordings with transcripts: lengths, speakers, words, characters, duplicates, "
        "doubtful audio, what a vocabulary leaves out, and a proposed vocabulary that leaves out nothing.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="SOURCE|SHARDS", help=f"shard directories, or {', or '.join(FORMATS.values())}")
    sample = "decode the audio of about N utterances, drawn by the hash of their keys (default: %(default)s)"
    add("--sample", type=int, default=300, metavar="N", help=sample)
    add("--all", action="store_true", help="decode the audio of every utterance")
    add("--max-utterances", type=int, metavar="N", help="look at the first N utterances only")
    add("--config", type=Path, metavar="FILE", help="settings whose vocabulary is tried (the defaults)")
    add("--pieces", action="store_true", help="propose word pieces, too, as is always done for over 200 symbols")
    add("--json", action="store_true", help="print one JSON object with everything")
    add("--plot", type=Path, metavar="FILE", help="write a picture of the lengths (.png)")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="number of threads (one per core)")
    add("--no-text", action="store_true", help="the sources are audio without transcripts, such as noises")
    columns = "columns of a table whose names are not known, as `ddp-asr shard` takes them"
    add("--columns", default="", metavar="audio=NAME,text=NAME", help=columns)
    add("--cache", type=Path, default=Path("data"), metavar="DIR", help="directory for OpenSLR's archives (data)")
    arguments = sys.argv[1:] if argv is None else argv
    # Taken out first, because argparse takes what has a space in it for a SOURCE.
    settings = [argument for argument in arguments if argument.startswith("--vocabulary.")]
    options = parser.parse_intermixed_args([argument for argument in arguments if argument not in settings])
    for name in ("sample", "max_utterances", "workers"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be 1 or more")
    return options, settings


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the report is printed, whatever it says."""
    options, settings = parse(argv)
    vocabulary = load_config(options.config, settings).vocabulary
    if options.plot:
        check_writable(options.plot)
    from rich.console import Console
    from rich.progress import track

    from ddp_asr.data import inspection

    console = Console(stderr=True)
    corpus = inspection.read(
        options.inputs,
        SourceOptions(cache=options.cache, no_text=options.no_text, columns=options.columns),
        sample=sys.maxsize if options.all else options.sample,
        workers=options.workers,
        most=options.max_utterances,
        track=lambda rows, total: track(
            rows, "reading", total, console=console, disable=not console.is_terminal, transient=True
        ),
    )
    with console.status("counting"):
        report = inspection.report(corpus, vocabulary, options.pieces)
    if options.json:
        print(json.dumps(dataclasses.asdict(report), ensure_ascii=False, allow_nan=False))
    else:
        print("\n".join(lines(report)))
    if options.plot:
        from ddp_asr.runs.plots import draw_lengths

        draw_lengths(options.plot, corpus.table["seconds"].drop_null().to_numpy(), ", ".join(options.inputs))
    return 0


# ---- for a person ---------------------------------------------------------------------------------------------------


def lines(report: Report) -> Iterator[str]:
    """The report as text."""
    yield from _size(report)
    yield from _audio(report)
    if report.words["running"]:
        yield from _text(report)
        yield "\nThe given vocabulary"
        yield from _left_out(report.left_out, report)
    for proposed in report.proposed:
        yield f"\nProposed vocabulary of {proposed.kind}, to paste into a config\n"
        yield from (f"# {reason}" for reason in proposed.reasons)
        yield f"{proposed.yaml}\nTried on these transcripts, it"
        yield from _left_out(proposed.left_out, report)


def _size(report: Report) -> Iterator[str]:
    estimated = f"estimated from {report.decoded:,} decoded utterances"
    how = {"measured": "measured", "stated": "as stated, not measured", "estimated": estimated}[report.seconds_are]
    yield f"{report.utterances:,} utterances, {report.usable:,} of them usable, {report.hours:.2f} h ({how})"
    for each in report.unusable:
        among = f" of {report.decoded:,} decoded" if each["only_in_sample"] else ""
        yield f"  unusable: {each['utterances']:,}{among} x {each['reason']}, such as {_cut(each['example'])}"
    yield "lengths: " + ", ".join(f"{name} {value:.2f} s" for name, value in report.lengths_s.items())
    most = max((count for _, count in report.histogram), default=1)
    for start, count in report.histogram:
        yield f"  from {start:7g} s {count:9,}  {'#' * -(-BAR_WIDTH * count // most)}".rstrip()
    ends = [(end, report.speakers[end]) for end in ("largest", "smallest") if report.speakers["number"]]
    shown = "".join(f", {end} {_cut(each['speaker'])} ({each['hours']:.2f} h)" for end, each in ends)
    yield f"speakers: {report.speakers['number']:,}{shown}"
    if without := report.speakers["utterances_without"]:
        yield f"  {without:,} utterances name none"


def _audio(report: Report) -> Iterator[str]:
    yield f"\nAudio ({report.decoded:,} utterances decoded)"
    if report.full_scale is not None:
        yield f"  {report.full_scale:.4%} of the samples are at full scale"
    limits = {
        "more than {:.1%} of the samples at full scale": (report.clipped, "{:.1%}"),
        "a level below {:g} dBFS": (report.quiet, "{:.0f} dBFS"),
        "over {:.1f} characters a second: the transcript is too long, or of other audio": (report.too_fast, "{:.1f}"),
        "under {:.1f} characters a second: the transcript is too short, or of other audio": (report.too_slow, "{:.1f}"),
    }
    for words, (found, unit) in limits.items():
        if found["utterances"]:
            yield f"  {found['utterances']:,} with {words.format(found['limit'])}"
        for each in found["examples"]:
            length = f"{each['seconds']:.2f} s, {unit.format(each['value'])}"
            yield f"    {_cut(each['key'])} ({length}): {_cut(each['text'])}"
    if report.equal_audio:
        yield f"  {len(report.equal_audio):,} recordings are there more than once:"
    yield from (f"    {_cut(', '.join(keys))}" for keys in report.equal_audio[:10])


def _text(report: Report) -> Iterator[str]:
    from ddp_asr.text.alphabet import describe

    words, equal, characters = report.words, report.equal_texts, report.characters
    yield f"\nText: {words['running']:,} words, {words['distinct']:,} different, {words['per_second']:.2f} a second"
    yield "  most frequent: " + ", ".join(f"{_cut(word)} {count:,}" for word, count in words["most_frequent"])
    yield f"  equal texts: {equal['utterances']:,} utterances have that of another one, {equal['texts']:,} texts in all"
    yield from (f"  {count:9,} x {_cut(text)}" for text, count in equal["most_frequent"][:5])
    if report.not_nfc:
        yield f"  {report.not_nfc:,} transcripts are not in Unicode's form NFC, which every vocabulary makes of them"
    yield f"\nCharacters: {len(characters):,}, the rarest first\n      count  utterances"
    for place, each in enumerate(characters):
        if place < CHARACTERS_SHOWN or each["note"]:
            counts = f"{each['count']:11,} {each['utterances']:11,}  {describe(each['character']):11}"
            note = f"  <-- {_cut(each['note'])}" if each["note"] else ""
            yield f"{counts} {_cut(each['key'])}: {_cut(each['example'])}{note}"
    if rest := [each["character"] for each in characters[CHARACTERS_SHOWN:] if not each["note"]]:
        yield f"  and {len(rest):,} more frequent ones: {''.join(rest[:200])}"


def _left_out(left_out: Coverage, report: Report) -> Iterator[str]:
    from ddp_asr.text.alphabet import describe

    if left_out.problem:
        yield f"  cannot be used: {left_out.problem}"
    elif not left_out.utterances:
        yield f"  leaves out nothing: all {report.usable:,} transcripts can be written"
    else:
        hours = f"{left_out.hours:.2f} of {report.hours:.2f} h"
        yield f"  leaves out {left_out.utterances:,} of {report.usable:,} utterances, {hours}"
    if left_out.empty:
        yield f"  {left_out.empty:10,} without any symbol after normalisation"
    for each in left_out.characters[:CHARACTERS_SHOWN]:
        where = f"({each['hours']:.2f} h) for {describe(each['character'])}, such as {_cut(each['key'])}"
        yield f"  {each['utterances']:10,} {where}"
    if (more := len(left_out.characters) - CHARACTERS_SHOWN) > 0:
        yield f"  and {more:,} more characters"


def _cut(text: str) -> str:
    """As it can stand in a line."""
    return printable(text, 80) + ("..." if len(text) > 80 else "")


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
