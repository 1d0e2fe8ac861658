"""Finds the weights of a decoder on a development set: `python -m ddp_asr.tune RUN SHARDS... --lm FILE --out FILE`.

checkpoint, shards --> logits, computed once --> a search for each point of a grid --> decoder.yaml of the best
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddp_asr.errors import UserError, run_entry_point
from ddp_asr.files import replace_file
from ddp_asr.ranks.environment import before_torch

if TYPE_CHECKING:
    from ddp_asr.recognition.recogniser import Recogniser
    from ddp_asr.recognition.tuning import CorpusLogits, Trial

EXAMPLES = """
examples:
  python -m ddp_asr.tune runs/an4 shards/an4-dev --lm lm.arpa --out runs/an4/decoder.yaml
  python -m ddp_asr.tune runs/an4 shards/an4-dev --lm lm.arpa --out runs/an4/decoder.yaml \\
      --size 32 --lm-weights 0.4,0.5,0.6 --symbol-bonuses 0.8,1,1.2
  python -m ddp_asr.tune runs/an4 shards/an4-dev --kind lexicon --lm words.arpa --out runs/an4/words.yaml \\
      --word-bonuses=-2,-1,0
  python -m ddp_asr.evaluate runs/an4 shards/an4-test --decoder runs/an4/decoder.yaml
"""

# kind of decoder -> the settings that are tuned, and the values that are tried without an option
GRIDS = {
    "beam": {"lm_weight": "0.25,0.5,0.75,1,1.25", "symbol_bonus": "0,0.5,1,1.5", "word_bonus": "0"},
    "lexicon": {"lm_weight": "0.25,0.5,0.75,1,1.25", "word_bonus": "-1,0,1,2"},
}
OPTIONS = {"lm_weight": "--lm-weights", "symbol_bonus": "--symbol-bonuses", "word_bonus": "--word-bonuses"}
FIXED = ("size", "symbols_per_frame", "lexicon", "threshold")  # settings that are the same for all points


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; `grid` is the values to try of each setting that is tuned."""
    parser = argparse.ArgumentParser(
        prog="python -m ddp_asr.tune",
        description="Finds the language model's weight and the bonuses with the fewest word errors, and writes them as "
        "a settings file that evaluate and transcribe take as --decoder. Shards to tune on must be neither those of "
        "the training nor those whose error rate will be reported.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", help="a checkpoint, or a run directory: its best.pt, else its newest")
    add("shards", nargs="+", help="shard directories to tune on, scored as one corpus")
    add(
        "--lm",
        required=True,
        help="language model (.arpa, .arpa.gz): of the run's symbols for beam, of words for lexicon",
    )
    add("--out", required=True, type=Path, help="settings file to write, such as runs/NAME/decoder.yaml")
    add("--kind", choices=tuple(GRIDS), default="beam", help="kind of decoder (default: %(default)s)")
    add("--size", help="hypotheses in the beam (default: 16 with beam, 50 with lexicon)")
    add("--symbols-per-frame", help="see decoder.symbols_per_frame (default: 0, all)")
    add("--lexicon", help="with --kind lexicon: see decoder.lexicon (default: the words of the language model)")
    add("--threshold", help="with --kind lexicon: see decoder.threshold (default: 50)")
    for setting, option in OPTIONS.items():
        defaults = [f"{grid[setting]} with {kind}" for kind, grid in GRIDS.items() if setting in grid]
        add(option, help=f"values of decoder.{setting} to try (default: {'; '.join(defaults)})")
    arguments = parser.parse_args(argv)
    arguments.grid = {}
    for setting, option in OPTIONS.items():
        given = getattr(arguments, option[2:].replace("-", "_"))
        if default := GRIDS[arguments.kind].get(setting):
            arguments.grid[setting] = _numbers(option, default if given is None else given)
        elif given is not None:
            raise UserError(f"{option} cannot be given with --kind {arguments.kind}, which has no decoder.{setting}")
    if min(arguments.grid["lm_weight"]) < 0:
        raise UserError(f"--lm-weights must be 0 or more, not {min(arguments.grid['lm_weight']):g}")
    return arguments


def _numbers(option: str, text: str) -> list[float]:
    """The numbers in a text such as "0.5,1", in rising order."""
    try:
        numbers = sorted({float(part) for part in text.split(",")})
    except ValueError:
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise UserError(f"{option} must be finite numbers with commas between, not {text!r}")
    return numbers


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the settings file is written."""
    arguments = parse_arguments(argv)
    if arguments.out.is_dir() or not arguments.out.parent.is_dir():
        raise UserError(f"--out {arguments.out} cannot be written: name a file in a directory that exists")
    before_torch(os.environ)
    from ddp_asr.config import DecoderFile, Greedy, config_from_dict
    from ddp_asr.recognition.recogniser import load_recogniser
    from ddp_asr.recognition.tuning import best, try_each
    from ddp_asr.settings import describe

    given = {name: value for name in FIXED if (value := getattr(arguments, name)) is not None}
    decoder = {"kind": arguments.kind, "lm": arguments.lm, **given}
    fixed: Any = config_from_dict({"decoder": decoder}, "the command line").decoder
    # Not with the run's own decoder, which may name a file that has gone.
    recogniser = load_recogniser(arguments.checkpoint, decoder=Greedy())
    language = _read_language(fixed, recogniser)
    corpus = _compute_logits(recogniser, arguments.shards)
    grid: dict[str, list[float]] = arguments.grid
    points = [replace(fixed, **dict(zip(grid, values, strict=True))) for values in itertools.product(*grid.values())]
    print(f"{len(corpus.references)} utterances, {len(points)} points\n{'  '.join(grid)}     WER      CER")
    trials = []
    for trial in try_each(recogniser, corpus, points, language):
        trials.append(trial)
        print(_line(trial, grid), flush=True)
    found = best(trials)
    try:
        replace_file(arguments.out, describe(DecoderFile(found.settings)))
    except OSError as error:
        raise UserError(f"--out {arguments.out} cannot be written: {error.strerror}; name another place") from None
    print(f"best: {_line(found, grid).strip()}, written to {arguments.out}")
    for setting, tried in grid.items():
        value = getattr(found.settings, setting)
        if len(tried) > 1 and value in (tried[0], tried[-1]) and not (setting == "lm_weight" and value == 0):
            print(
                f"warning: the best of {OPTIONS[setting]} is {value:g}, an end of the grid: try values beyond it",
                file=sys.stderr,
                flush=True,
            )
    return 0


def _read_language(settings: Any, recogniser: Recogniser) -> Any:
    """The language model as the decoder of this kind holds it, read once for all points."""
    if settings.kind == "beam":
        from ddp_asr.decoding.beam import read_table

        return read_table(settings.lm, recogniser.tokeniser)
    from ddp_asr.decoding.lexicon import read_word_model

    return read_word_model(settings, recogniser.tokeniser)


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


def _line(trial: Trial, grid: Iterable[str]) -> str:
    values = "  ".join(f"{getattr(trial.settings, setting):{len(setting)}g}" for setting in grid)
    return f"{values}  {100 * trial.counts.wer:6.2f} %  {100 * trial.counts.cer:5.2f} %"


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
