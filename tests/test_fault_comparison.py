"""The comparison of `python -m tests.faults` refuses each loss that is planted in an undisturbed run."""

import itertools
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ddp_asr.data.index import read_index
from ddp_asr.runs import checkpoint
from ddp_asr.runs.comet import archive_path
from tests import tiny_training as tiny
from tests.conftest import REPOSITORY
from tests.faults import campaign, comparison
from tests.faults.hooks import Hooks
from tests.faults.kinds import KINDS
from tests.faults.scene import WORLD_SIZES


@pytest.fixture(scope="module")
def undisturbed(tiny_corpus, tmp_path_factory):
    """A run with its ledger and its Comet archive, and what it must be made of."""
    home = tmp_path_factory.mktemp("undisturbed")
    ledger = home / "ledger"
    ledger.mkdir()
    options = ("--train.save_every_steps=1", "--train.keep_last=99")
    tiny.train(tiny_corpus.arguments(home, "run", *options), 1, [Hooks(ledger, 1)])
    # Not by the run itself, which does not wait for it on a slow machine.
    subprocess.run([sys.executable, "-m", "ddp_asr.tracking", str(home / "run")], cwd=REPOSITORY, check=True)
    index = read_index([str(tiny_corpus.train)])
    keys = frozenset(index.key(row) for row in range(len(index)))
    return home, comparison.Shape(tiny.STEPS_PER_EPOCH, tiny.STEPS, 5, 4, keys)


@pytest.fixture
def losses(undisturbed, tmp_path):
    """Plants something in a copy of the run and its ledger, and returns what the comparison says."""
    home, shape = undisturbed
    shutil.copytree(home, tmp_path / "copy")
    run, ledger = tmp_path / "copy" / "run", tmp_path / "copy" / "ledger"

    def compare(plant=lambda run, ledger: None, *, complete=True, same_bits=True):
        plant(run, ledger)
        return comparison.losses(run, ledger, home / "run", shape, complete=complete, same_bits=same_bits)

    return compare


def changed_lines(path: Path, change) -> None:
    """`change` gets the objects of a JSONL file and returns those that it shall have."""
    path.write_text("".join(json.dumps(line) + "\n" for line in change(tiny.read_lines(path))))


def in_metrics(change):
    return lambda run, ledger: changed_lines(run / "metrics.jsonl", change)


def in_ledger(change):
    return lambda run, ledger: changed_lines(ledger / "001-0.jsonl", change)


def with_loss_times(factor: float, step: int = 7):
    def change(lines):
        return [
            {**line, "loss": line["loss"] * factor} if (line["kind"], line["step"]) == ("train", step) else line
            for line in lines
        ]

    return in_metrics(change)


def with_keys(change, step: int = 6):
    """Changes the keys of the first micro-batch of the step."""

    def changed(lines):
        first = next(line for line in lines if line["step"] == step and "keys" in line)
        first["keys"] = change(first["keys"])
        return lines

    return in_ledger(changed)


def flipped_weight(name: str):
    def plant(run, ledger):
        path = run / name
        state = checkpoint.read(path)
        weight = next(iter(state["model"].values()))
        weight.view(-1)[0] *= 1 + 2**-22
        checkpoint.write(path, checkpoint.snapshot(state), may_write=lambda: None)

    return plant


def in_archive(change):
    def plant(run, ledger):
        path = archive_path(run)
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        members["messages.json"] = b"".join(change(members["messages.json"].splitlines(keepends=True)))
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name, data)

    return plant


def is_loss_of_step_3(message: bytes) -> bool:
    metric = json.loads(message)["payload"].get("metric") or {}
    return (metric.get("metricName"), metric.get("step")) == ("loss", 3)


def without_last_sample(run, ledger):
    changed_lines(run / "samples.jsonl", lambda lines: lines[:-1])


def failed(run, ledger):
    (run / "status.json").write_text(json.dumps(tiny.status(run) | {"state": "failed"}))


PLANTED = {
    "a metrics line removed": (in_metrics(lambda lines: lines[:4] + lines[5:]), "metrics.jsonl has"),
    "the last metrics line removed": (in_metrics(lambda lines: lines[:-1]), "metrics.jsonl has test lines"),
    "a step doubled": (in_metrics(lambda lines: lines[:3] + lines[2:]), "metrics.jsonl has train lines"),
    "two lines exchanged": (in_metrics(lambda lines: [lines[1], lines[0], *lines[2:]]), "metrics.jsonl has train"),
    "a loss in the 5th digit": (with_loss_times(1 + 1e-5), "train line of step 7: loss is"),
    "an evaluation's samples removed": (without_last_sample, "samples.jsonl is"),
    "a bit of a weight": (flipped_weight(f"checkpoints/step-{tiny.STEPS:08d}.pt"), f"step-{tiny.STEPS:08d}.pt differs"),
    "a bit of the best weights": (flipped_weight("best.pt"), "best.pt differs in"),
    "an utterance dropped": (with_keys(lambda keys: keys[1:]), "epoch 2 was trained without"),
    "an utterance twice": (with_keys(lambda keys: [*keys, keys[0]]), "was trained 2 times in epoch 2"),
    "a stranger": (with_keys(lambda keys: [*keys, "stranger"]), "epoch 2 was trained with stranger"),
    "a micro-batch dropped": (
        in_ledger(lambda lines: [line for line in lines if (line["step"], line.get("micro_batches")) != (9, [2])]),
        "step 9 is made of the micro-batches [0, 1, 3]",
    ),
    "a step that no attempt completed": (
        in_ledger(lambda lines: [line for line in lines if not (line["step"] == 4 and "updated" in line)]),
        "no attempt has completed the steps [4]",
    ),
    "a value that Comet lacks": (
        in_archive(lambda messages: [each for each in messages if not is_loss_of_step_3(each)]),
        "Comet has train loss of the steps",
    ),
    "a value that Comet has twice": (
        in_archive(lambda messages: [*messages, next(filter(is_loss_of_step_3, messages))]),
        "Comet has loss of step 3 2 times",
    ),
    "a run that failed": (failed, "status.json says failed"),
}


@pytest.mark.parametrize("same_bits", [True, False])
@pytest.mark.parametrize("complete", [True, False])
def test_an_undisturbed_run_has_lost_nothing(losses, same_bits, complete):
    assert losses(same_bits=same_bits, complete=complete) == []


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_loss_is_refused(losses, planted):
    plant, expected = PLANTED[planted]
    found = losses(plant)
    assert any(expected in text for text in found), found


def test_on_another_number_of_processes_the_fifth_digit_may_differ_and_the_third_not(losses):
    assert losses(with_loss_times(1 + 1e-5), same_bits=False) == []
    assert "train line of step 7: loss is" in losses(with_loss_times(1 + 1e-3), same_bits=False)[0]


def test_what_an_attempt_trained_beyond_the_checkpoint_it_left_does_not_count(losses, undisturbed):
    """A second attempt goes on from step 6; what the first one trained of the steps after it is in no weights."""

    def plant(run, ledger):
        lines = tiny.read_lines(ledger / "001-0.jsonl")
        again = [{**line, "attempt": 2} for line in lines if line["step"] > 6]
        (ledger / "002-0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in again))

    assert losses(plant) == []


def test_a_run_that_is_not_complete_is_judged_by_its_newest_good_checkpoint(losses):
    def plant(run, ledger):
        for step, path in checkpoint.numbered(run):
            if step > 6:
                path.write_bytes(path.read_bytes()[:100])
        changed_lines(run / "metrics.jsonl", lambda lines: [line for line in lines if line["step"] <= 7])

    assert losses(plant, complete=False) == []
    assert "metrics.jsonl has train lines" in losses(in_metrics(lambda lines: lines[1:]), complete=False)[0]


# ---- the plan ------------------------------------------------------------------------------------------------------


def test_the_short_form_has_every_kind_and_twenty_pairs():
    episodes = campaign.plan(60, seed=1, kinds=list(KINDS))
    planned = [fault for episode in episodes for fault in episode.faults]
    assert {fault.kind for fault in planned} == set(KINDS) and len(planned) == 60
    assert all(fault.processes in KINDS[fault.kind].world_sizes for fault in planned)
    assert {fault.processes for fault in planned} == set(WORLD_SIZES)
    assert len({fault.seed for fault in planned}) == 60
    pairs = set()
    for episode in episodes:
        sizes = [*(fault.processes for fault in episode.faults), episode.last_processes]
        pairs |= {pair for pair in itertools.pairwise(sizes) if pair[0] != pair[1]}
    assert len(pairs) >= 20
    assert campaign.plan(60, seed=1, kinds=list(KINDS)) == episodes != campaign.plan(60, seed=2, kinds=list(KINDS))
