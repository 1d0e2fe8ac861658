"""The mean of the weights of several checkpoints, as one: `python -m ddp_asr.average RUN --last 5 --out FILE`

checkpoints, read one by one --sums in float64, divided--> weights --> FILE for evaluate, transcribe, train.init_from

Checkpoints of the end of a training lie around a better place than each of them. `optim.ema_decay` averages along the
way, over more steps; this command needs nothing but the checkpoints that are there.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddp_asr.errors import UserError, counted, run_entry_point
from ddp_asr.files import check_writable, is_number

if TYPE_CHECKING:
    from torch import Tensor

    from ddp_asr.recognition.recogniser import Trained

EXAMPLES = """
examples:
  python -m ddp_asr.average runs/an4 --last 5 --out runs/an4/last-5.pt
  python -m ddp_asr.average runs/an4 --best 3 --weights plain --out runs/an4/best-3.pt
  python -m ddp_asr.average a.pt b.pt --out both.pt
  python -m ddp_asr.evaluate runs/an4/last-5.pt shards/an4-test

A run keeps the newest train.keep_last checkpoints and its best one. --best takes those of which the error rate is in
metrics.jsonl: save where you evaluate, as with --train.save_every_steps=500 --train.eval_every_steps=500.
"""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ddp_asr.average",
        description="Averages the weights of several checkpoints of a run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoints", nargs="+", type=Path, help="a run directory, with --last or --best; or .pt files")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--last", type=int, metavar="N", help="the newest N checkpoints of the run")
    which.add_argument("--best", type=int, metavar="N", help="the N checkpoints with the lowest word error rates")
    add("--out", type=Path, required=True, metavar="FILE", help="the checkpoint to write")
    add(
        "--weights",
        choices=("ema", "plain"),
        help="ema: the moving averages of the training, plain: its weights (default: ema where the run kept one)",
    )
    arguments = parser.parse_args(argv)
    for name in ("last", "best"):
        if (number := getattr(arguments, name)) is not None and number < 1:
            raise UserError(f"--{name} must be 1 or more, not {number}")
    number = arguments.last or arguments.best
    if number and (len(arguments.checkpoints) > 1 or not arguments.checkpoints[0].is_dir()):
        raise UserError("--last and --best take one run directory, such as runs/an4: name it, or files without them")
    if not number and any(path.is_dir() for path in arguments.checkpoints):
        raise UserError("which checkpoints of the run? name the newest with --last N or the best with --best N")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """0 when the mean is written."""
    arguments = parse_arguments(argv)
    out: Path = arguments.out
    if out.name == "best.pt" or out.resolve().parent.name == "checkpoints":
        raise UserError(
            f"--out {out} is a name under which a run looks for its own checkpoints, and it would resume from it: "
            "choose another, such as runs/NAME/average.pt"
        )
    check_writable(out)
    paths = arguments.checkpoints
    if arguments.last:
        paths = last(paths[0], arguments.last)
    elif arguments.best:
        paths = best(paths[0], arguments.best)
    state = average(paths, arguments.weights)
    from ddp_asr.runs import checkpoint

    try:
        checkpoint.write_alone(out, state)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}; free space or name another place") from None
    steps = ", ".join(map(str, state["averaged"]["steps"]))
    print(
        f"{out}: mean of {counted(len(paths), 'checkpoint')}, {state['averaged']['weights']} weights of steps {steps}"
    )
    return 0


# ---- which checkpoints -----------------------------------------------------------------------------------------------


def last(run: Path, number: int) -> list[Path]:
    """The newest checkpoints of a run, the oldest of them first."""
    from ddp_asr.runs.checkpoint import numbered

    paths = [path for _, path in numbered(run)]
    if len(paths) < number:
        raise UserError(
            f"{run} holds {counted(len(paths), 'checkpoint')} and --last asks for {number}: lower it, or train with a "
            "larger train.keep_last"
        )
    return paths[-number:]


def best(run: Path, number: int) -> list[Path]:
    """Those of a run's checkpoints with the lowest error rates, in the order of their steps."""
    from ddp_asr.recognition.recogniser import read_trained
    from ddp_asr.runs.checkpoint import numbered
    from ddp_asr.runs.directory import read_lines

    scores: dict[int, tuple[float, float]] = {}  # of equal error rates the lower loss is the better one
    for line in read_lines(run / "metrics.jsonl"):
        if line.get("kind") == "test" and is_number(line.get("wer")):
            scores[line["step"]] = line["wer"], line["loss"] if is_number(line.get("loss")) else math.inf
    paths = dict(numbered(run))
    if (run / "best.pt").is_file():
        paths.setdefault(read_trained(run / "best.pt").step, run / "best.pt")
    ranked = sorted(paths.keys() & scores.keys(), key=lambda step: (scores[step], step))
    if len(ranked) < number:
        raise UserError(
            f"{run} holds {counted(len(paths), 'checkpoint')}, of which {len(ranked)} were evaluated, and --best "
            f"asks for {number}: lower it, or train with train.save_every_steps equal to train.eval_every_steps and a "
            "larger train.keep_last"
        )
    return [paths[step] for step in sorted(ranked[:number])]


# ---- their mean ------------------------------------------------------------------------------------------------------


def average(paths: Sequence[Path], which: str | None = None) -> dict[str, Any]:
    """The state of a checkpoint with the mean of their weights, and the settings of the last one.

    Args:
        which: "ema" or "plain"; None: "ema" where the first one has moving averages.

    Raises:
        UserError: one of them is missing, damaged, or not of the same model.
    """
    import torch

    from ddp_asr.recognition.recogniser import read_trained

    total: dict[str, Tensor] = {}
    first: dict[str, Any] = {}
    steps: list[int] = []
    for path in paths:
        trained = read_trained(path)
        which = which or ("plain" if trained.weights is trained.plain_weights else "ema")
        if which == "ema" and trained.weights is trained.plain_weights:
            raise UserError(
                f"{path} has no moving average of its weights (optim.ema_decay was 0): average the plain ones with "
                "--weights plain"
            )
        weights = trained.weights if which == "ema" else trained.plain_weights
        model = _model_of(trained, weights)
        first = first or model
        if other := [name for name in first if model[name] != first[name]]:
            raise UserError(f"{path} has other {other[0]} than {paths[0]}: average checkpoints of one run only")
        for name, weight in weights.items():
            total[name] = total.get(name, torch.zeros((), dtype=torch.float64)) + weight.double()
        steps.append(trained.step)
    return {
        # A whole number is no weight: the last one's counts.
        "model": {
            name: (total[name] / len(paths)).to(weight.dtype) if weight.is_floating_point() else weight
            for name, weight in weights.items()
        },
        "averages": None,
        **{"step": trained.step, "epoch": trained.epoch, "config": trained.config, "tokeniser": trained.tokeniser},
        "longest_s": trained.longest_s,
        "averaged": {"weights": which, "files": list(map(str, paths)), "steps": steps},
    }


def _model_of(trained: Trained, weights: dict[str, Tensor]) -> dict[str, Any]:
    """What two checkpoints must have in common, or the mean of their weights means nothing."""
    from ddp_asr.config import config_from_dict
    from ddp_asr.text import tokeniser_from_state

    config = config_from_dict(trained.config, f"the checkpoint {trained.path}")
    return {
        "settings of features": config.features,
        "settings of encoder": config.encoder,
        "symbols": list(tokeniser_from_state(trained.tokeniser).symbols),
        "weights": {name: (weight.shape, weight.dtype) for name, weight in weights.items()},
    }


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
