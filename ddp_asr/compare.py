"""Two evaluations of the same utterances: `python -m ddp_asr.compare A.jsonl B.jsonl`, which is better and how sure.

A, B: files of `evaluate --out` --read--> utterances and two hypotheses each --text.score--> error rates, difference, p
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddp_asr.errors import UserError, run_entry_point
from ddp_asr.evaluate import add_report_options
from ddp_asr.files import is_number, is_text, open_lines, parse_json_line

if TYPE_CHECKING:
    from ddp_asr.recognition.report import System
    from ddp_asr.text.score import Units

EXAMPLES = """
examples:
  ddp-asr evaluate runs/an4 shards/an4-dev --out a.jsonl
  ddp-asr evaluate runs/an4 shards/an4-dev --decoder runs/an4/decoder.yaml --out b.jsonl
  python -m ddp_asr.compare a.jsonl b.jsonl
  python -m ddp_asr.compare a.jsonl b.jsonl --report report --shards shards/an4-dev     then open report/index.html
"""
LIKELY_CHANCE = 0.05  # p from which on a difference is not significant


@dataclass(frozen=True)
class Line:
    """What is read of a line of `evaluate --out`."""

    reference: str
    hypothesis: str
    speaker: str
    seconds: float
    snr_db: float


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ddp_asr.compare",
        description="Which of two evaluations of the same utterances has fewer word errors, and how sure that is.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("a", type=Path, metavar="A", help="what `ddp-asr evaluate --out` wrote")
    parser.add_argument("b", type=Path, metavar="B", help="the same of another checkpoint or decoder")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--shards", nargs="+", default=[], metavar="DIR", help="where the report takes recordings from")
    add_report_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the result is printed, whichever is better."""
    arguments = parse_arguments(argv)
    if arguments.shards and not arguments.report:
        raise UserError("--shards gives the report its recordings, and there is no --report DIR: add it")
    a, b = read(arguments.a), read(arguments.b)
    require_same(arguments.a, a, arguments.b, b)
    if arguments.report:
        from ddp_asr.recognition.report import check_directory

        check_directory(arguments.report)
    from ddp_asr.text.score import units_of

    units = units_of([line.speaker for line in a.values()])
    systems = [score(path, a, lines, units) for path, lines in ((arguments.a, a), (arguments.b, b))]
    result = compare(systems[0], systems[1], units)
    page = _write_report(arguments, a, systems, units, result) if arguments.report else None
    print(json.dumps(_facts(systems) | result) if arguments.json else _table(systems, result))
    if page and not arguments.json:
        print(f"\nreport  {page}")
    return 0


def read(path: Path) -> dict[str, Line]:
    """The lines of `evaluate --out` by their keys.

    Raises:
        UserError: a line is something else, or a key is there twice.
    """
    remedy = "name a file that `ddp-asr evaluate --out` wrote"
    found: dict[str, Line] = {}
    with open_lines(path, remedy) as lines:
        for number, text in enumerate(lines, 1):
            line = parse_json_line(text if text.endswith(b"\n") else text + b"\n") or {}
            key, speaker = line.get("key"), line.get("speaker", "")
            reference, hypothesis = line.get("reference"), line.get("hypothesis")
            if not all(map(is_text, (key, speaker, reference, hypothesis))):
                raise UserError(f"{path}, line {number}, has no key, reference and hypothesis: {remedy}")
            if key in found:
                raise UserError(f"{path}, line {number}, repeats the key {key}: {remedy}")
            seconds, snr_db = (float(n) if is_number(n) else math.nan for n in map(line.get, ("seconds", "snr_db")))
            found[str(key)] = Line(str(reference), str(hypothesis), speaker, seconds, snr_db)
    if not any(line.reference.split() for line in found.values()):
        raise UserError(f"{path} has no line with a word in its reference, so it has no error rate: {remedy}")
    return found


def require_same(a_path: Path, a: dict[str, Line], b_path: Path, b: dict[str, Line]) -> None:
    """Raises UserError where both are not of the same utterances."""
    remedy = "evaluate both on the same shards"
    only = [
        (path, sorted(keys)) for path, keys in ((a_path, a.keys() - b.keys()), (b_path, b.keys() - a.keys())) if keys
    ]
    if only:
        named = " and ".join(f"{len(keys)} only in {path}, such as {keys[0]}" for path, keys in only)
        raise UserError(f"{a_path} and {b_path} are not of the same utterances, {named}: {remedy}")
    other = [key for key in a if a[key].reference.split() != b[key].reference.split()]
    if other:
        raise UserError(
            f"the references of {len(other)} utterances differ, such as {other[0]} with {a[other[0]].reference!r} in "
            f"{a_path} and {b[other[0]].reference!r} in {b_path}: {remedy}, with vocabularies that normalise alike"
        )


def score(path: Path, first: dict[str, Line], lines: dict[str, Line], units: Units) -> System:
    """The error rates of a file, its utterances in the order of the first file."""
    from ddp_asr.recognition.report import System
    from ddp_asr.text.score import count_each, intervals

    texts = [lines[key].hypothesis for key in first]
    each = count_each([line.reference for line in first.values()], texts)
    return System(str(path), texts, each, *intervals(each, units))


def compare(a: System, b: System, units: Units) -> dict[str, Any]:
    """WER of B minus WER of A, its interval, p, and which is better as a sentence."""
    from ddp_asr.text.score import paired_interval, paired_p

    difference, interval = b.counts.wer - a.counts.wer, paired_interval(b.each, a.each, units)
    p = paired_p(b.each, a.each, units)
    shown = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    if p < LIKELY_CHANCE and difference:
        sentence = f"{'B' if difference < 0 else 'A'} is better than {'A' if difference < 0 else 'B'}: {shown}"
    else:
        sentence = f"The difference is not significant: {shown}"
    return {
        "difference": difference,
        "interval": [interval.low, interval.high],
        "p": p,
        "over": units.kind,
        "units": units.number,
        "sentence": f"{sentence} (matched-pairs test over {units.number} {units.kind}).",
    }


def _write_report(
    arguments: argparse.Namespace, a: dict[str, Line], systems: list[System], units: Units, result: dict[str, Any]
) -> Path:
    from ddp_asr.data.index import read_index
    from ddp_asr.recognition import report

    keys, audio = list(a), {}
    if arguments.shards:
        index = read_index(arguments.shards)
        row_of = {index.key(row): row for row in range(len(index))}
        missing = [key for key in keys if key not in row_of]
        if missing:
            raise UserError(
                f"{len(missing)} utterances are not in {' '.join(arguments.shards)}, such as {missing[0]}: name the "
                "shards that were evaluated"
            )
        order = [row_of[keys[n]] for n in report.worst_first(systems)]
        audio = report.copy_audio(index, order, arguments.report, arguments.report_audio)
    utterances = [report.Utterance(k, u.reference, u.speaker, u.seconds, u.snr_db) for k, u in a.items()]
    known_s = sum(u.seconds for u in utterances)
    speakers = len({u.speaker for u in utterances} - {""})
    shown = [
        ("A", systems[0].name),
        ("B", systems[1].name),
        ("utterances", f"{len(keys):,}" + ("" if math.isnan(known_s) else f", {known_s / 3600:.2f} h")),
        ("speakers", f"{speakers:,}" if speakers else "unknown"),
    ]
    data = report.page_data("Comparison of two evaluations", shown, utterances, systems, units, audio, result)
    return report.write(arguments.report, data)


def _facts(systems: list[System]) -> dict[str, Any]:
    return {
        name: {"file": s.name, "wer": s.counts.wer, "wer_interval": [s.wer_interval.low, s.wer_interval.high]}
        for name, s in zip("ab", systems, strict=True)
    }


def _table(systems: list[System], result: dict[str, Any]) -> str:
    lines = [f"{len(systems[0].hypotheses)} utterances; intervals and test over {result['units']} {result['over']}", ""]
    for letter, system in zip("AB", systems, strict=True):
        low, high = 100 * system.wer_interval.low, 100 * system.wer_interval.high
        rate = f"WER {100 * system.counts.wer:6.2f} %   95 % interval {low:.2f} to {high:.2f} %"
        lines.append(f"{letter}      {rate}   {system.name}")
    difference, low, high = (100 * rate for rate in (result["difference"], *result["interval"]))
    lines.append(f"B - A      {difference:+6.2f} %   95 % interval {low:+.2f} to {high:+.2f} %")
    return "\n".join([*lines, "", result["sentence"]])


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
