"""What a disturbed run must have in common with the undisturbed one: `losses(run, ledger, reference, ...)`.

    run directory, ledger --> what differs from the undisturbed run, a sentence each; none: nothing was lost

Compared are metrics (each step once, the same values), samples, what was left out, checkpoints (bits where every
attempt had as many processes as the undisturbed run, 1e-4 otherwise), the Comet archive (each step once) and the ledger
of the utterances that were trained in each epoch (each once). `complete`: the run is done. Otherwise only what the
newest good checkpoint vouches for is compared: the next attempt goes on from there.
"""

import contextlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ddp_asr.errors import UserError
from ddp_asr.files import read_json_lines
from ddp_asr.runs import checkpoint
from tests import tiny_training as tiny
from tests.comet_archive import in_archive

TOLERANCE = 1e-4  # of losses, gradient norms and weights, where the number of processes was another


@dataclass(frozen=True)
class Shape:
    """What follows from settings and corpus."""

    steps_per_epoch: int
    steps: int
    evaluate_every_steps: int
    micro_batches: int
    keys: frozenset[str]  # of all utterances that are trained

    @property
    def evaluated(self) -> list[int]:
        return [
            step for step in range(1, self.steps + 1) if step % self.evaluate_every_steps == 0 or step == self.steps
        ]


def newest(run: Path) -> checkpoint.Found | None:
    """The newest good checkpoint, passing over damaged ones; None where there is none."""
    with contextlib.suppress(UserError):
        return checkpoint.newest_good(run, on_damage=lambda path, reason: None)
    return None


def losses(
    run: Path, ledger: Path, reference: Path, shape: Shape, *, complete: bool, same_bits: bool, archive: bool = True
) -> list[str]:
    """Everything in which the run differs from the undisturbed one, a sentence each."""
    found = newest(run)
    if found is None:
        return ["there is no good checkpoint at the end"] if complete else []
    if complete:
        step, evaluated = shape.steps, shape.steps
    else:
        step, evaluated = found.step, found.state["progress"]["evaluated_step"]
    return [
        *_of_end(run, found, shape, complete),
        *_of_metrics(run, reference, shape, step, evaluated, same_bits),
        *_of_samples(run, reference, evaluated, same_bits),
        *_of_weights(found, reference, complete, same_bits),
        *(_of_best(run, reference, same_bits) if complete else []),
        *_of_ledger(ledger, shape, step),
        *(_of_archive(run, shape) if complete and archive else []),
    ]


def _of_end(run: Path, found: checkpoint.Found, shape: Shape, complete: bool) -> list[str]:
    if not complete:
        return []
    status = tiny.status(run)
    ends = [] if status["state"] == "done" else [f"status.json says {status['state']}: {status['reason']}"]
    return ends + ([] if found.step == shape.steps else [f"the newest checkpoint is of step {found.step}"])


# ---- files of lines ------------------------------------------------------------------------------------------------


def _of_metrics(run: Path, reference: Path, shape: Shape, step: int, evaluated: int, same_bits: bool) -> list[str]:
    ours = _known(whole_lines(run / "metrics.jsonl"), step, evaluated)
    theirs = _known(whole_lines(reference / "metrics.jsonl"), step, evaluated)
    expected = {
        "train": list(range(1, step + 1)),
        "test": [each for each in shape.evaluated if each <= evaluated],
        "epoch": list(range(shape.steps_per_epoch, step + 1, shape.steps_per_epoch)),
    }
    wrong = []
    for kind, steps in expected.items():
        had = [line["step"] for line in ours if line["kind"] == kind]
        if had != steps:
            wrong.append(f"metrics.jsonl has {kind} lines of the steps {had}, not {steps}")
    if wrong:
        return wrong
    for one, other in zip(sorted(ours, key=_place), sorted(theirs, key=_place), strict=True):
        wrong += [f"metrics.jsonl: {text}" for text in _of_line(one, other, same_bits)]
    return wrong


def whole_lines(path: Path) -> list[dict]:
    """The whole lines of a file, without what depends on the clock."""
    return [{name: value for name, value in line.items() if name not in tiny.TIMES} for line in read_json_lines(path)]


def _known(lines: list[dict], step: int, evaluated: int) -> list[dict]:
    return [line for line in lines if line["step"] <= (evaluated if line.get("kind") == "test" else step)]


def _place(line: dict) -> tuple[int, str]:
    return line["step"], line["kind"]


def _of_line(one: dict, other: dict, same_bits: bool) -> list[str]:
    where = f"{other['kind']} line of step {other['step']}"
    if one.keys() != other.keys():
        return [f"{where} has the fields {sorted(one)}"]
    wrong = []
    for name, value in one.items():
        if same_bits or name not in ("loss", "gradient_norm", "wer", "cer"):
            same = value == other[name]
        else:  # an error rate may jump where two classes are almost equally probable
            same = name in ("wer", "cer") or abs(value - other[name]) <= TOLERANCE * abs(other[name])
        wrong += [] if same else [f"{where}: {name} is {value!r}, not {other[name]!r}"]
    return wrong


def _of_samples(run: Path, reference: Path, evaluated: int, same_bits: bool) -> list[str]:
    def read(path: Path) -> list[dict]:
        lines = [line for line in whole_lines(path / "samples.jsonl") if line["step"] <= evaluated]
        hidden = () if same_bits else ("hypothesis",)
        return [
            {**line, "samples": [{k: v for k, v in each.items() if k not in hidden} for each in line["samples"]]}
            for line in lines
        ]

    ours, theirs = read(run), read(reference)
    return [] if ours == theirs else [f"samples.jsonl is {_shortly(ours)}, not {_shortly(theirs)}"]


def _shortly(lines: list[dict]) -> str:
    return json.dumps(lines)[:300]


# ---- weights -------------------------------------------------------------------------------------------------------


def _of_weights(found: checkpoint.Found, reference: Path, complete: bool, same_bits: bool) -> list[str]:
    # A checkpoint of a step with an evaluation may be written before it or, where the run was stopped, after it.
    ignored = () if complete else ("evaluated_step", "best", "best_step")
    return _of_states(found.path, checkpoint.step_path(reference, found.step), same_bits, ignored)


def _of_best(run: Path, reference: Path, same_bits: bool) -> list[str]:
    if not (run / "best.pt").is_file():
        return ["there is no best.pt"]
    ours, theirs = (checkpoint.read(path / "best.pt")["progress"]["best_step"] for path in (run, reference))
    if ours != theirs and not same_bits:
        return []  # an error rate may differ by a word, see _of_line
    return _of_states(run / "best.pt", reference / "best.pt", same_bits)


def _of_states(ours: Path, theirs: Path, same_bits: bool, ignored: Sequence[str] = ()) -> list[str]:
    first, second = tiny.state_of(ours), tiny.state_of(theirs)
    if same_bits:
        for state in (first, second):
            state["progress"] = {name: value for name, value in state["progress"].items() if name not in ignored}
        differences = tiny.differences(first, second)
        return [f"{ours.name} differs in {', '.join(differences[:3])}"] if differences else []
    apart = tiny.distance(first["model"], second["model"])
    return [] if apart <= TOLERANCE else [f"the weights of {ours.name} are {apart:.1e} apart"]


# ---- the ledger ----------------------------------------------------------------------------------------------------


def _of_ledger(ledger: Path, shape: Shape, step: int) -> list[str]:
    """Whether the steps that are in the weights are made of each utterance once an epoch.

    A step that was trained by several attempts counts as that of the newest: an attempt goes on from a checkpoint, and
    what was trained beyond that checkpoint before is in no weights that are left.
    """
    lines = [line for path in sorted(ledger.glob("*.jsonl")) for line in read_json_lines(path)]
    kept: dict[int, int] = {}  # step -> the attempt whose step is in the weights
    for line in lines:
        if line.get("updated"):
            kept[line["step"]] = max(kept.get(line["step"], 0), line["attempt"])
    missing = [each for each in range(1, step + 1) if each not in kept]
    if missing:
        return [f"no attempt has completed the steps {missing}"]
    keys: dict[int, Counter] = defaultdict(Counter)
    micro_batches: dict[int, Counter] = defaultdict(Counter)
    for line in lines:
        if "keys" in line and line["step"] <= step and kept[line["step"]] == line["attempt"]:
            keys[(line["step"] - 1) // shape.steps_per_epoch].update(line["keys"])
            micro_batches[line["step"]].update(line["micro_batches"])
    wrong = []
    for each in range(1, step + 1):
        if micro_batches[each] != Counter(range(shape.micro_batches)):
            wrong.append(f"step {each} is made of the micro-batches {sorted(micro_batches[each].elements())}")
    for epoch, counts in sorted(keys.items()):
        wrong += [f"{key} was trained {n} times in epoch {epoch + 1}" for key, n in sorted(counts.items()) if n != 1]
        lost = shape.keys - counts.keys()
        if lost and (epoch + 1) * shape.steps_per_epoch <= step:
            wrong.append(f"epoch {epoch + 1} was trained without {', '.join(sorted(lost))}")
        if strangers := counts.keys() - shape.keys:
            wrong.append(
                f"epoch {epoch + 1} was trained with {', '.join(sorted(strangers))}, which the plan leaves out"
            )
    return wrong


# ---- Comet ---------------------------------------------------------------------------------------------------------


def _of_archive(run: Path, shape: Shape) -> list[str]:
    counts, _, _ = in_archive(run)
    return of_values(counts, shape, shape.steps, once=True)


def of_values(counts: Counter, shape: Shape, step: int, *, once: bool) -> list[str]:
    """What of the values (context, metric, step) that Comet got is missing, twice or strange."""
    wrong = [f"Comet has {name} of step {at} {n} times" for (_, name, at), n in counts.items() if once and n != 1]
    for context, name, expected in (
        ("train", "loss", range(1, step + 1)),
        ("test", "wer", [each for each in shape.evaluated if each <= step]),
    ):
        had = {at for kind, metric, at in counts if (kind, metric) == (context, name)}
        if had != set(expected):
            wrong.append(f"Comet has {context} {name} of the steps {sorted(had)}, not {list(expected)}")
    return wrong
