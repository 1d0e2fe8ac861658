"""Makes an n-gram language model of text: `python -m ddp_asr.lm TEXT --order 6 --out lm.arpa.gz`

text files, shards --sentences, as the recogniser writes them--> numbers --kneser_ney.estimate--> ngram.write_arpa

A language model helps only where its symbols are the recogniser's. So the tokeniser of a run or of settings normalises
the text, and a sentence that it cannot write is left out, as training leaves out an utterance with such a transcript.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from ddp_asr.config import Config, Pieces, load_config
from ddp_asr.errors import UserError, run_entry_point
from ddp_asr.files import check_writable, open_lines

if TYPE_CHECKING:
    from ddp_asr.text import Tokeniser

DEFAULT_ORDER = {"char": 6, "piece": 5, "word": 3}
MAX_ORDER = 20
RESERVED = ("<s>", "</s>", "<unk>", "<UNK>", "<space>")  # what an ARPA file writes for something else
BLOCK = 1 << 14  # sentences encoded at once

EXAMPLES = """\
examples:
  python -m ddp_asr.lm --run runs/an4 --out lm.arpa.gz              characters of the run's training transcripts
  python -m ddp_asr.lm book.txt notes.txt.gz --run runs/an4 --order 8 --out lm.arpa.gz   of text, a sentence a line
  python -m ddp_asr.lm shards/mine --config configs/mine.yaml --out lm.arpa    of the transcripts in shards
  python -m ddp_asr.lm book.txt --run runs/an4 --vocabulary.drop='.,;:!?"' --out lm.arpa    without punctuation
  python -m ddp_asr.lm book.txt --run runs/an4 --unit word --order 3 --out words.arpa.gz
  python -m ddp_asr.lm book.txt --run runs/pieces --unit piece --out pieces.arpa.gz     for a run of word pieces

--vocabulary.NAME=VALUE changes a setting of the recogniser's vocabulary: drop (characters that the text is freed of),
lowercase, symbols. A run of word pieces has them in its directory.

The text is held in memory, about 100 bytes a symbol. For billions of symbols use KenLM's lmplz, whose files are
read, too."""


def main(argv: Sequence[str] | None = None) -> int:
    options, settings = parse(argv)
    config = load_config(_config_path(options), settings)
    sources = options.text or (config.data.train if options.run or options.config else [])
    if not sources:
        raise UserError("there is no text: name text files or shard directories, or --run with a run's directory")
    check_writable(options.out)
    tokeniser = _tokeniser(config, options.run)
    options.unit = options.unit or tokeniser.unit
    if options.unit not in (tokeniser.unit, "word"):
        from ddp_asr.text import UNITS

        raise UserError(
            f"--unit {options.unit} does not suit a recogniser that writes {UNITS[tokeniser.unit]}: leave it out, or "
            "name another --run"
        )
    options.order = options.order or DEFAULT_ORDER[options.unit]
    text = read_text(sources, tokeniser, options.unit)
    make(text, tokeniser, options)
    return 0


def _tokeniser(config: Config, run: Path | None) -> Tokeniser:
    """That of the settings; word pieces are those in the run directory, or are learnt as the run would learn them."""
    from ddp_asr.data.corpus import new_tokeniser
    from ddp_asr.text.pieces import FILE

    vocabulary = config.vocabulary
    if isinstance(vocabulary, Pieces) and run is not None:
        config = replace(config, vocabulary=replace(vocabulary, model=str(run / FILE)))
    return new_tokeniser(config)


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the settings (`--vocabulary.NAME=VALUE`)."""
    parser = argparse.ArgumentParser(
        prog="python -m ddp_asr.lm",
        usage="%(prog)s [TEXT|SHARDS ...] --out FILE [--unit char|piece|word] [--order N] [--run RUN | --config FILE] "
        "[--vocabulary.NAME=VALUE ...]",
        description="Makes an n-gram language model (modified Kneser-Ney) of text, with the symbols of a recogniser.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
        allow_abbrev=False,
    )
    add = parser.add_argument
    text = "text files (UTF-8, a sentence a line, .gz or not) and shard directories; none: the run's training shards"
    add("text", nargs="*", metavar="TEXT|SHARDS", help=text)
    add("--out", type=Path, required=True, metavar="FILE", help="the ARPA file to write; a name in .gz compresses it")
    unit = "a symbol of the model: a word, or what the recogniser writes, a character or a word piece (the default)"
    add("--unit", choices=tuple(DEFAULT_ORDER), help=unit)
    orders = ", ".join(f"{order} with {unit}" for unit, order in DEFAULT_ORDER.items())
    add("--order", type=int, metavar="N", help=f"longest n-grams, 1 to {MAX_ORDER} (default: {orders})")
    like = parser.add_mutually_exclusive_group()
    like.add_argument("--run", type=Path, metavar="RUN", help="run directory whose vocabulary settings are taken")
    like.add_argument("--config", type=Path, metavar="FILE", help="settings in YAML, where there is no run yet")
    arguments = sys.argv[1:] if argv is None else argv
    # Taken out first, because argparse takes what has a space in it for a TEXT.
    settings = [argument for argument in arguments if argument.startswith("--vocabulary.")]
    options = parser.parse_intermixed_args([argument for argument in arguments if argument not in settings])
    for setting in settings:
        if "=" not in setting:
            parser.error(f"{setting} has no value: write {setting}=VALUE")
    if options.order is not None and not 1 <= options.order <= MAX_ORDER:
        parser.error(f"--order is {options.order}; it must be 1 to {MAX_ORDER}")
    return options, settings


def _config_path(options: argparse.Namespace) -> Path | None:
    if options.run is None:
        path: Path | None = options.config
        return path
    path = options.run / "config.yaml"
    if not path.exists():
        raise UserError(f"{options.run} is not a run: it has no config.yaml; give a directory such as runs/an4")
    return path


@dataclass
class Text:
    """Sentences as numbers."""

    symbols: list[str]
    numbers: array[int]  # of all sentences one after the other: places in `symbols`
    lengths: array[int]  # how many each sentence has
    left_out: int = 0  # sentences with a character that the recogniser cannot write
    foreign: Counter[str] = field(default_factory=Counter)  # each of these characters, by the sentences that have it

    def describe_foreign(self) -> str:
        ranked = sorted(self.foreign.items(), key=lambda item: (-item[1], item[0]))
        named = ", ".join(f"{character!r} in {count:,}" for character, count in ranked[:8])
        more = len(self.foreign) - 8
        return named + (f" and {more:,} more" if more > 0 else "")


def read_text(sources: Sequence[str], tokeniser: Tokeniser, unit: str) -> Text:
    """The sentences of all sources, normalised; empty ones are passed over.

    Raises:
        UserError: a source cannot be read, or no sentence is left.
    """
    from rich.console import Console

    words: defaultdict[str, int] = defaultdict()
    words.default_factory = words.__len__  # each new word gets the next number
    text = Text([], array("q"), array("q"))
    console = Console(stderr=True)
    bar = console.status("reading") if console.is_terminal else None
    with bar or contextlib.nullcontext():
        for source in sources:
            from_source = sentences(source)
            while block := list(islice(from_source, BLOCK)):
                for sentence, foreign in zip(block, tokeniser.count(block).foreign, strict=True):
                    if foreign:
                        text.left_out += 1
                        text.foreign.update(foreign)
                        continue
                    if unit == "word":
                        numbers = [words[word] for word in tokeniser.normalise(sentence).split()]
                    else:
                        numbers = tokeniser.encode(sentence).tolist()
                    if numbers:
                        text.numbers.extend(numbers)
                        text.lengths.append(len(numbers))
                if bar:
                    bar.update(f"reading {source}: {len(text.lengths):,} sentences")
    text.symbols += words if unit == "word" else tokeniser.symbols
    _require_usable(text, sources)
    return text


def _require_usable(text: Text, sources: Sequence[str]) -> None:
    if reserved := [symbol for symbol in text.symbols if symbol in RESERVED]:
        raise UserError(
            f"the text has the word {reserved[0]!r}, which has a meaning of its own in an ARPA file: take it out"
        )
    if text.lengths:
        return
    if text.left_out:
        raise UserError(
            f"each of the {text.left_out:,} sentences has a character that the recogniser cannot write "
            f"({text.describe_foreign()}): take the run's settings with --run, or drop these with --vocabulary.drop"
        )
    raise UserError(f"there is no sentence in {', '.join(sources)}: name a text that is not empty")


def sentences(source: str) -> Iterator[str]:
    """The transcripts of a shard directory or URL, or the lines of a text file."""
    from ddp_asr.data.index import read_index
    from ddp_asr.data.storage import scheme_of

    if scheme_of(source) or Path(source).is_dir():
        yield from read_index([source]).texts.to_pylist()
        return
    with open_lines(source, "name a text file or a shard directory") as lines:
        for line in lines:
            yield line.decode("utf-8-sig")  # Windows writes a byte order mark


def make(text: Text, tokeniser: Tokeniser, options: argparse.Namespace) -> None:
    """Estimates and writes the model, and prints what is in it."""
    import numpy as np

    from ddp_asr.decoding.kneser_ney import estimate
    from ddp_asr.decoding.ngram import write_arpa

    print(f"{len(text.lengths):,} sentences, {len(text.numbers):,} symbols (--unit {options.unit})", flush=True)
    if text.left_out:
        print(
            f"left out for characters that the recogniser cannot write: {text.left_out:,} sentences "
            f"({text.describe_foreign()})",
            flush=True,
        )
    model, discounts = estimate(
        np.asarray(text.numbers),
        np.asarray(text.lengths),
        text.symbols,
        options.order,
        report=lambda length, ngrams: print(f"{ngrams:12,} {length}-grams", flush=True),
    )
    fallback = [f"{length}-grams" for length, discount in enumerate(discounts, 1) if discount.are_fallback]
    if fallback:
        why = "the text is too small, or its symbols are too few, to compute them"
        print(f"discounts of {', '.join(fallback)}: 0.5, 1 and 1.5, because {why}")
    try:
        write_arpa(model, options.out)
    except OSError as error:
        raise UserError(f"--out {options.out} cannot be written: {error.strerror}; name another place") from None
    print(f"{options.out}: {options.out.stat().st_size / 1e6:,.1f} MB")
    if options.unit != "word":
        print(f"in a search: {model.arcs(tokeniser.symbols).summary}")


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
