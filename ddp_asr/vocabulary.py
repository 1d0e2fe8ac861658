"""Learns word pieces: `python -m ddp_asr.vocabulary TEXT|SHARDS ... --size 256 --out pieces.model`

text files, shards --sentences--> transcripts --text.pieces.learn--> a model of sentencepiece, and what it does to them

A run learns its own pieces where `vocabulary.model` is empty. This command is for pieces of more text than the
transcripts, for several runs with the same pieces, and for a look at what a size means.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ddp_asr.config import Pieces, load_config
from ddp_asr.errors import UserError, run_entry_point
from ddp_asr.files import check_writable, replace_file
from ddp_asr.lm import BLOCK, sentences

if TYPE_CHECKING:
    from ddp_asr.text import Tokeniser

PIECES_SHOWN = 24
SENTENCES_SHOWN = 3

EXAMPLES = """
examples:
  python -m ddp_asr.vocabulary shards/train-clean-100 --size 256 --out pieces.model    of the transcripts in shards
  python -m ddp_asr.vocabulary book.txt notes.txt.gz --size 512 --out pieces.model     of text, a sentence a line
  python -m ddp_asr.vocabulary mine.txt --vocabulary.drop='.,;:!?' --out pieces.model  without punctuation
  python -m ddp_asr.vocabulary mine.txt --vocabulary.symbols="abc 'äöüß" --out pieces.model

A run takes them with --vocabulary.kind=pieces --vocabulary.size=256 --vocabulary.model=pieces.model, and with the same
symbols, lowercase and drop. A sentence with a character outside vocabulary.symbols is left out, as training does it."""


def main(argv: Sequence[str] | None = None) -> int:
    options, settings = parse(argv)
    vocabulary = load_config(
        None, [*settings, "--vocabulary.kind=pieces", f"--vocabulary.size={options.size}", "--vocabulary.model="]
    ).vocabulary
    check_writable(options.out)
    from ddp_asr.text import make_tokeniser
    from ddp_asr.text.pieces import FILE

    texts = [text for source in options.text for text in sentences(source)]
    tokeniser = make_tokeniser(vocabulary, texts)
    try:
        replace_file(options.out, tokeniser.files()[FILE])
    except OSError as error:
        raise UserError(f"--out {options.out} cannot be written: {error.strerror}; name another place") from None
    print("\n".join(report(tokeniser, texts)))
    kind = f"--vocabulary.kind=pieces --vocabulary.size={options.size} --vocabulary.model={options.out}"
    print(f"{options.out}: a run takes it with {kind}")
    return 0


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the settings (`--vocabulary.NAME=VALUE`)."""
    parser = argparse.ArgumentParser(
        prog="python -m ddp_asr.vocabulary",
        usage="%(prog)s TEXT|SHARDS ... --out FILE [--size N] [--vocabulary.NAME=VALUE ...]",
        description="Learns word pieces of text or transcripts with sentencepiece, and shows what they look like.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
        allow_abbrev=False,
    )
    add = parser.add_argument
    text = "text files (UTF-8, a sentence a line, .gz or not) and shard directories"
    add("text", nargs="+", metavar="TEXT|SHARDS", help=text)
    add("--out", type=Path, required=True, metavar="FILE", help="the file to write")
    add("--size", type=int, default=Pieces().size, metavar="N", help="number of pieces (default: %(default)s)")
    arguments = sys.argv[1:] if argv is None else argv
    # Taken out first, because argparse takes what has a space in it for a TEXT.
    settings = [argument for argument in arguments if argument.startswith("--vocabulary.")]
    return parser.parse_intermixed_args([argument for argument in arguments if argument not in settings]), settings


def report(tokeniser: Tokeniser, texts: Sequence[str]) -> list[str]:
    """Lines for a user: what was read, some pieces, pieces a word, how sentences are divided."""
    usable = words = characters = pieces = left_out = 0
    foreign: set[str] = set()
    shown: dict[str, None] = {}
    for start in range(0, len(texts), BLOCK):
        block = texts[start : start + BLOCK]
        counts = tokeniser.count(block)
        for text, length, outside in zip(map(tokeniser.normalise, block), counts.length, counts.foreign, strict=True):
            left_out += bool(outside)
            foreign.update(outside)
            if text and not outside:
                usable, words, characters = usable + 1, words + len(text.split()), characters + len(text)
                pieces += int(length)
                if len(shown) < SENTENCES_SHOWN:
                    shown[text] = None
    lines = [f"{usable:,} sentences, {words:,} words"]
    if left_out:
        named = "".join(sorted(foreign))[:40]
        lines.append(f"left out: {left_out:,} sentences with characters that no piece has: {named!r}")
    first = " ".join(_shown(symbol) for symbol in tokeniser.symbols[:PIECES_SHOWN])
    lines += [
        f"{len(tokeniser.symbols)} pieces, the first: {first}",
        f"pieces a word: {pieces / words:.2f}; characters a piece: {characters / pieces:.2f}",
    ]
    for text in shown:
        lines.append("  " + " ".join(_shown(tokeniser.symbols[number]) for number in tokeniser.encode(text))[:110])
    return lines


def _shown(symbol: str) -> str:
    return symbol.replace(" ", "_")


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
