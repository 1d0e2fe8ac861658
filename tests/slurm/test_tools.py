"""The doctor, a sweep and its ranking, the list of runs, and shard, train and evaluate one after the other."""

import json
import os
import re
import subprocess

from ddp_asr.files import read_json_lines
from tests import tiny_speech, tiny_training
from tests.conftest import REPOSITORY
from tests.slurm import harness
from tests.slurm.harness import Gate, Job

NODES = ("node1", "node2", "node3", "node4")


# ---- the doctor ----------------------------------------------------------------------------------------------------


def test_the_doctor_finds_nothing_wrong_with_four_nodes(tmp_path):
    answer = harness.launch("doctor", "--nodes=4", "--tasks-per-node=1", f"--run.dir={tmp_path}")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert all(node in answer.stdout for node in NODES) and answer.stdout.count("3 of 3") == 4
    assert "all-reduce of 1 MiB over 4 ranks" in answer.stdout


def test_the_doctor_names_a_node_whose_link_is_cut(tmp_path):
    harness.cluster("cut", "node3")
    answer = harness.launch("doctor", "--nodes=4", "--tasks-per-node=1", f"--run.dir={tmp_path}", "--json")
    assert answer.returncode == 1, answer.stdout + answer.stderr
    wrong = json.loads(answer.stdout)["wrong"]
    assert wrong and all(re.match(r"node3 |the job cannot start: .* \(node3 is [^;]*\)", text) for text in wrong), wrong


def test_the_doctor_names_a_node_that_slurm_reaches_and_other_nodes_do_not(tmp_path):
    """The job starts, and what node2 and node4 send to node3 goes to a machine that does not exist."""
    neighbour = "ip neigh {} $(getent hosts node3 | cut -d' ' -f1) lladdr 02:00:00:00:00:01 dev eth0 nud permanent"
    cut_off = ("node2", "node4")
    try:
        for node in cut_off:
            harness.cluster("on", node, "sh", "-c", neighbour.format("replace"))
        answer = harness.launch("doctor", "--nodes=4", "--tasks-per-node=1", "--timeout=100", f"--run.dir={tmp_path}")
    finally:
        for node in cut_off:
            harness.cluster("on", node, "sh", "-c", neighbour.format("del"))
    assert answer.returncode == 1, answer.stdout + answer.stderr
    wrong = [line for line in answer.stdout.splitlines() if line.startswith("wrong: ")]
    assert len(wrong) == 1 and wrong[0].startswith("wrong: node3 cannot be reached from node2, node4"), answer.stdout


# ---- a sweep -------------------------------------------------------------------------------------------------------

SWEEP = """
config: {config}
name: trials
parallel: 2
settings:
  optim.learning_rate: [1e-3, 3e-3, 1e-2]
  encoder.dropout: [0, 0.2]
fixed: {{run.dir: {runs}, data.train: {train}, data.test: {test}, train.epochs: 1}}
"""


def test_a_sweep_of_six_runs_two_at_a_time_and_ranks(tiny_corpus, tmp_path):
    gate = Gate(tmp_path / "gate").hold(2)
    place = {"config": tiny_corpus.directory / "tiny.yaml", "runs": tmp_path / "runs"}
    (tmp_path / "sweep.yaml").write_text(SWEEP.format(**place, train=tiny_corpus.train, test=tiny_corpus.test))
    command = [str(tmp_path / "sweep.yaml"), "--tasks-per-node=1"]
    submitted = harness.launch("sweep", *command, gate=gate)
    assert submitted.returncode == 0 and "0 of 6 trials finished" in submitted.stdout, submitted.stderr
    harness.wait_until(lambda: list(gate.directory.glob("held-2.*")), "the first trial to train")
    queue = harness.ask("squeue", "-h", "-r", "-o", "%T %r").splitlines()
    assert sorted(queue) == ["PENDING JobArrayTaskLimit"] * 4 + ["RUNNING None"] * 2
    again = harness.launch("sweep", *command, gate=gate)
    assert again.returncode == 0 and "submitted" not in again.stdout, again.stderr
    gate.open(2)

    def states():
        listed = harness.launch("status", str(tmp_path / "runs"), "--json")
        assert listed.returncode == 0, listed.stderr
        return [run["state"] for run in json.loads(listed.stdout)]

    harness.wait_until(lambda: states() == ["done"] * 6, "all trials to be done")
    ranked = harness.launch("sweep", *command)
    assert ranked.returncode == 0 and "6 of 6 trials finished (6 done)" in ranked.stdout, ranked.stderr
    rows = [line.split() for line in ranked.stdout.splitlines() if re.match(r" +\d ", line)]
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert [row[-1] for row in rows] == by_score(tmp_path / "runs" / "trials")


def by_score(directory):
    """The names of the trials, the lowest word error rate first, then the lowest loss."""
    scores = {}
    for metrics in directory.glob("*/metrics.jsonl"):
        tests = [line for line in read_json_lines(metrics) if line["kind"] == "test"]
        scores[metrics.parent.name] = min((line["wer"], line["loss"]) for line in tests)
    return sorted(scores, key=scores.__getitem__)


# ---- by sbatch, one after the other --------------------------------------------------------------------------------


def test_shard_train_and_evaluate_wait_for_each_other(tiny_corpus, tmp_path):
    for split, speakers in (("train", 6), ("test", 2)):
        tiny_speech.librispeech(tmp_path / "source" / split, speakers=speakers, seconds=1.6)
    settings = [f"--data.{split}={tmp_path / 'shards' / split}" for split in ("train", "test")]
    letters = "--vocabulary.symbols= abcdefghijklmnopqrstuvwxyz0123456789"
    settings += [f"--run.dir={tmp_path}", "--run.name=run", "--train.epochs=1", letters]
    config, trained = str(tiny_corpus.directory / "tiny.yaml"), str(tmp_path / "run")
    sources = [str(tmp_path / "source" / split) for split in ("train", "test")]
    shards = queue(tmp_path, "shard.sbatch", *sources, options=["--array=0-1"])
    train = queue(tmp_path, "train.sbatch", config, *settings, after=shards)
    score = queue(tmp_path, "evaluate.sbatch", trained, str(tmp_path / "shards" / "test"), after=train)
    score.succeed()
    assert tiny_training.status(tmp_path / "run")["state"] == "done"
    assert "WER" in (tmp_path / f"{score.id}.out").read_text()


def queue(directory, script, *arguments, options=(), after=None) -> Job:
    waiting = [f"--dependency=afterok:{after.id}", "--kill-on-invalid-dep=yes"] if after else []
    chosen = ["--parsable", "--nodes=1", "--cpus-per-task=1", f"--output={directory}/%j.out", *options, *waiting]
    answer = subprocess.run(
        ["sbatch", *chosen, f"slurm/{script}", *arguments],
        cwd=REPOSITORY,
        env=harness.environment(SHARDS=str(directory / "shards"), DATA=os.devnull, RANKS_PER_NODE="2"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    return Job(answer.stdout.strip())
