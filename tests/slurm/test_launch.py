"""Handed to Slurm, a training is the same; what cannot be is refused in a sentence; what is queued stays as it was."""

import shutil

import pytest

from tests import tiny_training as tiny
from tests.conftest import REPOSITORY
from tests.slurm import harness
from tests.slurm.harness import Shape

TOLERANCE = 1e-4  # of property 2, in float32


@pytest.mark.parametrize("by", harness.LAUNCHERS)
def test_two_nodes_train_what_one_process_does(undisturbed, tiny_corpus, tmp_path, by):
    job = harness.LAUNCHERS[by](tiny_corpus, tmp_path, Shape(ranks=2))
    job.succeed()
    assert "4 processes on cpu" in job.output() and job.restarts == 0
    hosts = {harness.rank_log(job.run, rank).split(", ")[1] for rank in range(4)}
    assert len(hosts) == 2
    tiny.assert_same_run(job.run, undisturbed(4))
    tiny.assert_close_runs(job.run, undisturbed(1), TOLERANCE)


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--gpus-per-node=99", "--tasks-per-node=1"], "Requested node configuration is not available"),
        (["--partition=nope"], "invalid partition specified: nope"),
    ],
)
def test_what_slurm_refuses_is_said_in_one_sentence(tiny_corpus, tmp_path, options, reason):
    answer = harness.launch("submit", *tiny_corpus.arguments(tmp_path), *options)
    assert answer.returncode != 0 and answer.stdout == ""
    assert answer.stderr.count("\n") == 1 and answer.stderr.startswith("error: ") and reason in answer.stderr
    assert harness.ask("squeue", "-h") == "" and not any(path.is_file() for path in tmp_path.rglob("*"))


def test_editing_the_checkout_changes_no_queued_job(undisturbed, tiny_corpus, tmp_path):
    checkout, corpus = tmp_path / "checkout", tiny.copy_of(tiny_corpus, tmp_path / "corpus")
    for package in ("ddp_asr", "launch"):
        shutil.copytree(REPOSITORY / package, checkout / package)
    with harness.occupied():
        job = harness.submit(corpus, tmp_path, Shape(nodes="1"), checkout=checkout)
        job.wait_for("PENDING")
        for path in checkout.rglob("*.py"):
            path.write_text("raise SystemExit('edited after it was queued')\n")
        (corpus.directory / "tiny.yaml").write_text("train: {epochs: 1}\n")
    job.succeed()
    tiny.assert_same_run(job.run, undisturbed(1))
