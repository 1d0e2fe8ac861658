"""Losses of five steps of three small trainings, which no change of the code may move unless it says so.

    python -m tests.golden          # records tests/golden_losses.json anew: in a commit of its own, with the reason

The corpus is arithmetic (tests/tiny_training.py), so the same numbers come out everywhere, to the rounding of a CPU.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

from tests import tiny_training as tiny

RECORDED = Path(__file__).with_name("golden_losses.json")
STEPS = 5
WORLD_SIZES = (1, 2, 4)
TWO_VIEWS = [
    "--objective.consistency_weight=0.3",
    "--objective.short_context_s=0.1,0.4",
    "--objective.intermediate_weight=0.3",
]
CASES = {
    "one view": [],
    "two views": TWO_VIEWS,
    "two views in bf16": [*TWO_VIEWS, "--train.precision=bf16"],
}


def steps_of(corpus: tiny.TinyCorpus, directory: Path, case: str, world_size: int) -> list[list[float]]:
    """(loss, gradient norm) of each of the first steps."""
    name = f"{case}-{world_size}".replace(" ", "-")
    stop = f"--train.stop_at_step={STEPS}"
    tiny.train(corpus.arguments(directory, name, stop, *CASES[case]), world_size)
    lines = [line for line in tiny.metrics(directory / name) if line["kind"] == "train"]
    return [[line["loss"], line["gradient_norm"]] for line in lines]


def record(path: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        os.environ["TINY_TRAINING_LOGS"] = scratch
        (directory / "corpus").mkdir()
        corpus = tiny.make_corpus(directory / "corpus")
        found = {case: {str(w): steps_of(corpus, directory, case, w) for w in WORLD_SIZES} for case in CASES}
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    record(Path(sys.argv[1]) if len(sys.argv) > 1 else RECORDED)
