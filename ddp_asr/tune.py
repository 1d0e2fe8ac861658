"""Finds the weights of a beam search on a development set: `python -m ddp_asr.tune RUN SHARDS... --lm FILE --out FILE`.

checkpoint, shards --> logits, computed once --> a beam search for each point of a grid --> decoder.yaml of the best
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ddp_asr.errors import UserError, run_entry_point
from ddp_asr.files import replace_file
from ddp_asr.ranks.environment import before_torch

if TYPE_CHECKING:
    from ddp_asr.config import Beam
    from ddp_asr.recognition.recogniser import Recogniser
    from ddp_asr.recognition.tuning import CorpusLogits, Trial

EXAMPLES = """
examples:
  python -m ddp_asr.tune runs/an4 shards/an4-dev --lm lm.arpa --out runs/an4/decoder.yaml
  python -m ddp_asr.tune runs/an4 shards/an4-dev --lm lm.arpa --out runs/an4/decoder.yaml \\
      --size 32 --lm-weights 0.4,0.5,0.6 --symbol-bonuses 0.8,1,1.2
  python -m ddp_asr.evaluate runs/an4 shards/an4-test --decoder runs/an4/decoder.yaml
"""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ddp_asr.tune",
        description="Finds the language model's weight and the symbol bonus with the fewest word errors, and writes "
        "them as a settings file that evaluate and transcribe take as --decoder. Shards to tune on must be neither "
        "those of the training nor those whose error rate will be reported.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="a checkpoint, or a run directory: its best.pt, else its newest")
    parser.add_argument("shards", nargs="+", help="shard directories to tune on, scored as one corpus")
    parser.add_argument("--lm", required=True, help="language model over the run's symbols: .arpa or .arpa.gz")
    parser.add_argument(
        "--out", required=True, type=Path, help="settings file to write, such as runs/NAME/decoder.yaml"
    )
    parser.add_argument("--size", type=int, default=16, help="texts in the beam (default: %(default)s)")
    parser.add_argument(
        "--symbols-per-frame", type=int, default=0, help="see decoder.symbols_per_frame (default: %(default)s, all)"
    )
    parser.add_argument(
        "--lm-weights",
        default="0.25,0.5,0.75,1,1.25",
        help="weights of the language model to try (default: %(default)s)",
    )
    parser.add_argument(
        "--symbol-bonuses", default="0,0.5,1,1.5", help="bonuses for a symbol to try (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    for name in ("lm_weights", "symbol_bonuses"):
        setattr(arguments, name, _numbers(name, getattr(arguments, name)))
    if min(arguments.lm_weights) < 0:
        raise UserError(f"--lm-weights must be 0 or more, not {min(arguments.lm_weights):g}")
    if arguments.size < 1 or arguments.symbols_per_frame < 0:
        raise UserError(
            f"--size must be 1 or more and --symbols-per-frame 0 or more, not {arguments.size} and "
            f"{arguments.symbols_per_frame}"
        )
    return arguments


def _numbers(name: str, text: str) -> list[float]:
    """The numbers in a text such as "0.5,1", in rising order."""
    try:
        numbers = sorted({float(part) for part in text.split(",")})
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise UserError(f"--{name.replace('_', '-')} must be finite numbers with commas between, not {text!r}")
    return numbers


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the settings file is written."""
    arguments = parse_arguments(argv)
    if arguments.out.is_dir() or not arguments.out.parent.is_dir():
        raise UserError(f"--out {arguments.out} cannot be written: name a file in a directory that exists")
    before_torch(os.environ)
    from ddp_asr.config import Beam, DecoderFile
    from ddp_asr.decoding.beam import read_table
    from ddp_asr.recognition.recogniser import load_recogniser
    from ddp_asr.recognition.tuning import best, try_each
    from ddp_asr.settings import describe

    recogniser = load_recogniser(arguments.checkpoint, decoder=Beam())  # the run's own may name a file that has gone
    table = read_table(arguments.lm, recogniser.tokeniser)
    corpus = _compute_logits(recogniser, arguments.shards)
    fixed = Beam(size=arguments.size, lm=arguments.lm, symbols_per_frame=arguments.symbols_per_frame)
    grid = itertools.product(arguments.lm_weights, arguments.symbol_bonuses)
    points = [replace(fixed, lm_weight=weight, symbol_bonus=bonus) for weight, bonus in grid]
    print(f"{len(corpus.references)} utterances, {len(points)} points\nlm_weight  symbol_bonus     WER      CER")
    trials = []
    for trial in try_each(recogniser, corpus, points, table):
        trials.append(trial)
        print(_line(trial), flush=True)
    found = best(trials)
    try:
        replace_file(arguments.out, describe(DecoderFile(found.settings)))
    except OSError as error:
        raise UserError(f"--out {arguments.out} cannot be written: {error.strerror}; name another place") from None
    print(f"best: {_line(found).strip()}, written to {arguments.out}")
    _warn_of_edges(found.settings, arguments)
    return 0


def _compute_logits(recogniser: Recogniser, shards: Sequence[str]) -> CorpusLogits:
    """The logits of the shards; names utterances that could not be read, and refuses a corpus without any."""
    from ddp_asr.data.index import read_index
    from ddp_asr.data.loader import eval_loader
    from ddp_asr.recognition.tuning import compute_logits

    index = read_index(shards)
    corpus = compute_logits(recogniser, index, eval_loader(index, recogniser.tokeniser, recogniser.config))
    if corpus.bad:
        named = ", ".join(f"{key} ({reason})" for key, reason in corpus.bad[:10])
        print(
            f"warning: {len(corpus.bad)} utterances could not be read and are left out: {named}",
            file=sys.stderr,
            flush=True,
        )
    if not corpus.references:
        raise UserError(f"no utterance of {', '.join(shards)} could be read: name other shards")
    return corpus


def _line(trial: Trial) -> str:
    settings, counts = trial.settings, trial.counts
    return f"{settings.lm_weight:9g}  {settings.symbol_bonus:12g}  {100 * counts.wer:6.2f} %  {100 * counts.cer:5.2f} %"


def _warn_of_edges(settings: Beam, arguments: argparse.Namespace) -> None:
    """Says where the best point lies at an end of the grid, beyond which there may be a better one."""
    for option, tried, value in (
        ("--lm-weights", arguments.lm_weights, settings.lm_weight),
        ("--symbol-bonuses", arguments.symbol_bonuses, settings.symbol_bonus),
    ):
        if len(tried) > 1 and value in (tried[0], tried[-1]) and not (option == "--lm-weights" and value == 0):
            print(
                f"warning: the best of {option} is {value:g}, an end of the grid: try values beyond it",
                file=sys.stderr,
                flush=True,
            )


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
