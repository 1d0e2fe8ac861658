"""Error rates of a checkpoint: `python -m ddp_asr.evaluate CHECKPOINT SHARDS...`, alone or under torchrun.

checkpoint --> Recogniser        shards --> recognition.evaluation, over all ranks --> Summary on rank 0 --> what is
printed, JSON lines (--out), one HTML file (--report)
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddp_asr import SAMPLE_RATE_HZ
from ddp_asr.errors import UserError, run_entry_point
from ddp_asr.files import check_writable, finite, json_lines, replace_file
from ddp_asr.ranks.environment import before_torch

if TYPE_CHECKING:
    from ddp_asr.config import Config
    from ddp_asr.data.index import Index
    from ddp_asr.ranks.world import World
    from ddp_asr.recognition.evaluation import Beside, Summary
    from ddp_asr.recognition.recogniser import Trained
    from ddp_asr.text.score import Counts

EXAMPLES = """
examples:
  python -m ddp_asr.evaluate runs/librispeech_100 shards/test-clean
  python -m ddp_asr.evaluate runs/an4/best.pt shards/an4-dev --out hyps.jsonl --json
  python -m ddp_asr.evaluate runs/an4 shards/an4-dev --report report     then open report/index.html
  python -m ddp_asr.evaluate runs/an4 shards/an4-dev --decoder runs/an4/decoder.yaml
  ddp-asr evaluate --processes 8 runs/librispeech_960 shards/test-clean shards/test-other
"""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ddp_asr.evaluate",
        description="Word and character error rates of a checkpoint, with confidence intervals.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="a checkpoint, or a run directory: its best.pt, else its newest")
    parser.add_argument("shards", nargs="+", help="shard directories, scored as one corpus")
    parser.add_argument(
        "--decoder",
        type=Path,
        help="YAML file with a section 'decoder' to use in place of the run's",
    )
    parser.add_argument("--out", type=Path, help="write key, texts and error counts of every utterance (JSON lines)")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    add_report_options(parser)
    parser.add_argument(
        "--precision",
        default="fp32",
        choices=("auto", "bf16", "fp16", "tf32", "fp32"),
        help="fp32, the default, gives the same result for any batch size; bf16 and fp16 are faster on a GPU",
    )
    parser.add_argument(
        "--max-seconds",
        type=float,
        help="maximum seconds of a batch, utterances x longest (default: the training's data.test_max_seconds)",
    )
    parser.add_argument("--threads", type=int, help="threads a rank that decode (default: the training's data.threads)")
    parser.add_argument("--worst", type=int, default=5, help="worst utterances to show (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.max_seconds is not None and not 0 < arguments.max_seconds < math.inf:
        raise UserError(f"--max-seconds must be above 0, not {arguments.max_seconds}")
    for name in ("threads", "worst"):
        if (getattr(arguments, name) or 0) < 0:
            raise UserError(f"--{name} must be 0 or more, not {getattr(arguments, name)}")
    return arguments


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """The options of a report, those of `ddp_asr.compare`, too."""
    parser.add_argument("--report", type=Path, metavar="DIR", help="write a page to look at: DIR/index.html, DIR/audio")
    parser.add_argument(
        "--report-audio",
        choices=("none", "worst", "all"),
        default="worst",
        help="recordings beside the report; worst, the default: up to 100 MB, those with the most errors first",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the corpus was scored; only rank 0 prints."""
    arguments = parse_arguments(argv)
    before_torch(os.environ)
    from ddp_asr.config import Distributed
    from ddp_asr.ranks.rendezvous import join
    from ddp_asr.ranks.signals import ignore_stop_signals
    from ddp_asr.ranks.world import RaisedElsewhere, describe

    world = join(Distributed())
    try:
        evaluate(arguments, world)
    except BaseException as error:  # any error ends this rank, and the others name the reason
        if world.world_size > 1:
            ignore_stop_signals()
        world.watchdog.announce_exit(describe(error))
        if isinstance(error, RaisedElsewhere):
            return 2  # the rank that raised it says so
        raise
    world.leave()
    return 0


def evaluate(arguments: argparse.Namespace, world: World) -> None:
    """Scores the corpus over all ranks; every rank raises the UserError of any."""
    from ddp_asr.config import Greedy, load_decoder
    from ddp_asr.data.index import read_index
    from ddp_asr.data.loader import eval_loader
    from ddp_asr.decoding import make_decoder
    from ddp_asr.recognition.evaluation import gather, recognise
    from ddp_asr.recognition.recogniser import build_recogniser

    world.set_phase(0, "reading the checkpoint")
    # Rank 0 alone reads, because a training run may put a better best.pt in place between two ranks' looks.
    trained = world.run_on_rank_zero(lambda: _prepare(arguments))
    settings = world.run_on_all(lambda: load_decoder(arguments.decoder) if arguments.decoder else None)
    recogniser = world.run_on_all(lambda: build_recogniser(trained, world.device, arguments.precision, settings))
    index = world.run_on_all(lambda: read_index(arguments.shards))
    config = _with_overrides(recogniser.config, arguments)
    batches = eval_loader(index, recogniser.tokeniser, config, rank=world.rank, world_size=world.world_size)
    world.set_phase(trained.step, "scoring")
    started = time.monotonic()
    greedy = None
    if config.decoder.kind != "greedy":
        greedy = make_decoder(Greedy(), recogniser.tokeniser, config.frame_s)
    results = recognise(recogniser, index, batches, greedy=greedy, with_snr=True)
    assert results is not None, "nothing asked it to stop"
    summary = gather(world, results, beside_greedy=greedy is not None)
    wall_s = time.monotonic() - started  # of all ranks, since rank 0 has just waited for the last
    world.run_on_rank_zero(lambda: _report(arguments, trained, summary, index, wall_s, config))


def _prepare(arguments: argparse.Namespace) -> Trained:
    """The checkpoint, once it is sure that the result can be written."""
    if arguments.out is not None:
        check_writable(arguments.out)
    if arguments.report is not None:
        from ddp_asr.recognition.report import check_directory

        check_directory(arguments.report)
    from ddp_asr.recognition.recogniser import read_trained

    return read_trained(arguments.checkpoint)


def _with_overrides(config: Config, arguments: argparse.Namespace) -> Config:
    data = config.data
    if arguments.threads is not None:
        data = replace(data, threads=arguments.threads)
    if arguments.max_seconds is not None:
        data = replace(data, test_max_seconds=arguments.max_seconds)
    return replace(config, data=data)


def _report(
    arguments: argparse.Namespace,
    trained: Trained,
    summary: Summary | None,
    index: Index,
    wall_s: float,
    config: Config,
) -> None:
    """Rank 0's files and prints."""
    assert summary is not None
    if summary.bad:
        named = ", ".join(f"{key} ({reason})" for key, reason in summary.bad[:10])
        _warn(f"{len(summary.bad)} utterances no longer decode and are not scored: {named}")
    max_bad_samples = config.data.max_bad_samples
    if summary.is_unusable(max_bad_samples):
        raise UserError(
            f"only {len(summary.utterances)} of {len(index)} utterances could be scored (data.max_bad_samples = "
            f"{max_bad_samples}): look at the shards with python -m ddp_asr.shard SOURCE --out DIR --verify"
        )
    if arguments.out is not None:
        _write_utterances(arguments.out, summary)
    facts = {**_facts(trained, summary, index, wall_s), "decoder": asdict(config.decoder)}
    page = None if arguments.report is None else _write_report(arguments, facts, summary, index)
    print(json.dumps(facts) if arguments.json else _table(facts, summary, arguments.worst))
    if page and not arguments.json:
        print(f"\nreport  {page}")


def _facts(trained: Trained, summary: Summary, index: Index, wall_s: float) -> dict[str, Any]:
    """The summary as one JSON object; rates are fractions, what is not finite is null."""
    audio_s = float(index.samples[[u.row for u in summary.utterances]].sum()) / SAMPLE_RATE_HZ

    return {
        "checkpoint": trained.path,
        "step": trained.step,
        "epoch": trained.epoch,
        "utterances": len(summary.utterances),
        "hours": audio_s / 3600,
        "wer": finite(summary.wer),
        "wer_interval": [summary.wer_interval.low, summary.wer_interval.high],
        "cer": finite(summary.cer),
        "cer_interval": [summary.cer_interval.low, summary.cer_interval.high],
        "intervals_over": summary.units.kind,
        "speakers": len({u.speaker for u in summary.utterances} - {""}),
        **asdict(summary.counts),
        **({} if summary.greedy is None else _beside_greedy(summary.greedy)),
        "loss": finite(summary.loss),
        "without_loss": summary.without_loss,
        "bad_samples": len(summary.bad),
        "real_time_factor": wall_s / audio_s,
        "wall_s": wall_s,
    }


def _beside_greedy(greedy: Beside) -> dict[str, Any]:
    return {
        "greedy_wer": finite(greedy.counts.wer),
        "greedy_cer": finite(greedy.counts.cer),
        "wer_difference_interval": [greedy.difference.low, greedy.difference.high],
    }


def _table(facts: dict[str, Any], summary: Summary, worst_shown: int) -> str:
    """The summary for people."""
    from ddp_asr.text.score import worst

    counts = summary.counts
    lines = [f"{facts['checkpoint']} (step {facts['step']}, epoch {facts['epoch']})"]
    lines += [f"{facts['utterances']} utterances, {facts['hours']:.2f} h", ""]
    kinds = [
        ("WER", "words", summary.wer, summary.wer_interval, counts.words),
        ("CER", "characters", summary.cer, summary.cer_interval, counts.chars),
    ]
    for (name, unit, value, interval, total), errors in zip(kinds, _errors(counts), strict=True):
        lines.append(
            f"{name}  {100 * value:6.2f} %   95 % interval {100 * interval.low:.2f} to {100 * interval.high:.2f} %   "
            f"{total} {unit}: {errors[0]} substituted, {errors[1]} deleted, {errors[2]} inserted"
        )
    lines.append(f"intervals: bootstrap over {summary.units.number} {summary.units.kind}")
    if summary.greedy is not None:
        greedy, difference = summary.greedy.counts, summary.greedy.difference
        lines.append(
            f"greedy decoding of the same logits: WER {100 * greedy.wer:.2f} %, CER {100 * greedy.cer:.2f} %; "
            f"{facts['decoder']['kind']} minus greedy: WER {100 * (summary.wer - greedy.wer):+.2f} %, "
            f"95 % interval {100 * difference.low:+.2f} to {100 * difference.high:+.2f} %"
        )
    without = f" ({summary.without_loss} utterances have none)" if summary.without_loss else ""
    lines.append(f"loss {summary.loss:7.4f}{without}")
    lines.append(f"real-time factor {facts['real_time_factor']:.4f} ({facts['wall_s']:.1f} s, loading included)")
    rows = worst(summary.each, worst_shown).tolist()
    lines += ["", "the utterances with the most wrong words:"] if rows else []
    for row in rows:
        utterance, wrong = summary.utterances[row], int(summary.each[row, 0:3].sum())
        lines.append(f"  {utterance.key}: {wrong} of {int(summary.each[row, 3])} words")
        lines += [f"    reference   {utterance.reference}", f"    hypothesis  {utterance.hypothesis}"]
    return "\n".join(lines)


def _errors(counts: Counts) -> list[tuple[int, int, int]]:
    """(substituted, deleted, inserted) words, and characters."""
    return [
        (counts.word_substitutions, counts.word_deletions, counts.word_insertions),
        (counts.char_substitutions, counts.char_deletions, counts.char_insertions),
    ]


def _write_utterances(path: Path, summary: Summary) -> None:
    """A JSON object an utterance, in the corpus's order; the file is there whole or not at all."""
    from ddp_asr.text.score import Counts

    lines = []
    for utterance, counts in zip(summary.utterances, summary.each, strict=True):
        texts = {"key": utterance.key, "reference": utterance.reference, "hypothesis": utterance.hypothesis}
        heard = {"speaker": utterance.speaker, "seconds": utterance.seconds, "snr_db": finite(utterance.snr_db)}
        if summary.greedy is not None:
            texts |= {"greedy": utterance.greedy}
        scored: dict[str, Any] = {"score": finite(utterance.score)}
        if utterance.others:
            scored["n_best"] = [[utterance.hypothesis, utterance.score], *map(list, utterance.others)]
        lines.append({**texts, **heard, **scored, **asdict(Counts.from_array(counts))})
    try:
        replace_file(path, json_lines(lines))
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror}; free space or name another place") from None


def _write_report(arguments: argparse.Namespace, facts: dict[str, Any], summary: Summary, index: Index) -> Path:
    from ddp_asr.recognition import report

    texts, found = [u.hypothesis for u in summary.utterances], summary.utterances
    system = report.System(facts["checkpoint"], texts, summary.each, summary.wer_interval, summary.cer_interval)
    utterances = [report.Utterance(u.key, u.reference, u.speaker, u.seconds, u.snr_db) for u in found]
    order = [found[n].row for n in report.worst_first([system])]
    audio = report.copy_audio(index, order, arguments.report, arguments.report_audio)
    decoder = ", ".join(str(v) if k == "kind" else f"{k} {v}" for k, v in facts["decoder"].items() if v not in ("", 0))
    shown = [
        ("checkpoint", facts["checkpoint"]),
        ("step", f"{facts['step']:,} (epoch {facts['epoch']})"),
        ("decoder", decoder),
        ("data", " ".join(arguments.shards)),
        ("utterances", f"{facts['utterances']:,}, {facts['hours']:.2f} h"),
        ("speakers", f"{facts['speakers']:,}" if facts["speakers"] else "unknown"),
        *([("not scored, no longer decode", str(facts["bad_samples"]))] if facts["bad_samples"] else []),
    ]
    title = f"Error rates of {facts['checkpoint']}"
    return report.write(arguments.report, report.page_data(title, shown, utterances, [system], summary.units, audio))


def _warn(sentence: str) -> None:
    print(f"warning: {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
