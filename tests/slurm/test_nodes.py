"""Nodes that die, vanish and come back, and ranks that hang."""

import re

import pytest

from ddp_asr import checkpoint
from tests import tiny_training as tiny
from tests.slurm import harness
from tests.slurm.harness import Gate, Shape


def test_a_node_dies_and_is_booted(undisturbed, tiny_corpus, tmp_path):
    """The job asks for this very node, so that it has to wait for it."""
    gate = Gate(tmp_path / "gate").hold(5)
    job = harness.submit(tiny_corpus, tmp_path, Shape(nodelist="node1,node2"), gate=gate)
    assert gate.wait(5, job)["host"] == "node1"
    harness.cluster("crash", "node1")
    job.wait_for("PENDING")
    gate.open(5)
    harness.cluster("boot", "node1")
    job.succeed()
    assert job.accounted() == ["NODE_FAIL", "COMPLETED"] and job.restarts == 1
    assert "going on from step 3" in job.output()
    tiny.assert_same_run(job.run, undisturbed(4))


def test_an_attempt_on_a_lost_node_writes_nothing_any_more(undisturbed, tiny_corpus, tmp_path):
    """Its node cut off, the first attempt trains on, while Slurm has started the second elsewhere."""
    gate = Gate(tmp_path / "gate").hold(5, attempt=1).hold(8, attempt=2)
    job = harness.submit(tiny_corpus, tmp_path, Shape(nodes="1", ranks=2), gate=gate)
    stale = gate.wait(5, job)
    harness.cluster("cut", stale["host"])
    assert gate.wait(8, job)["host"] != stale["host"]
    harness.wait_until(checkpoint.step_path(job.run, 6).is_file, "the checkpoint of step 6")
    before = harness.written(job.run)
    gate.open(5, attempt=1)
    harness.wait_until(lambda: not is_running(stale), "the stale attempt to end")
    assert "was taken over by another run" in harness.rank_log(job.run)
    # Its batch script, too, hears of Slurm again, and must leave the job alone.
    harness.cluster("join", stale["host"])
    harness.wait_until(lambda: harness.node_state(stale["host"]) == "idle", f"{stale['host']} to be back")
    assert harness.written(job.run) == before
    assert (job.state, job.restarts) == ("RUNNING", 1)
    gate.open(8, attempt=2)
    job.succeed()
    assert job.restarts == 1 and tiny.status(job.run)["attempt"] == 2
    tiny.assert_same_run(job.run, undisturbed(2))


def is_running(held: dict) -> bool:
    return harness.run_script("on", held["host"], "test", "-d", f"/proc/{held['pid']}").returncode == 0


@pytest.mark.parametrize("by", harness.LAUNCHERS)
def test_a_rank_that_hangs_is_named(undisturbed, tiny_corpus, tmp_path, by):
    gate = Gate(tmp_path / "gate").hold(5)
    job = harness.LAUNCHERS[by](tiny_corpus, tmp_path, Shape(), "--distributed.timeout_s=15", gate=gate)
    gate.wait(5, job)
    log = re.search(r"rank 3 of 4, (\w+), pid (\d+)", harness.rank_log(job.run, 3))
    assert log is not None
    host, pid = log.groups()
    harness.cluster("on", host, "kill", "-STOP", pid)
    gate.open(5)
    for rank in range(3):
        harness.wait_until(
            lambda rank=rank: re.search(rf"rank 3\b.*\b{host}\b.*\bstep 5\b", harness.rank_log(job.run, rank)),
            f"rank {rank} to name rank 3",
            limit_s=60,
        )
    job.succeed()
    assert job.restarts == 1
    tiny.assert_same_run(job.run, undisturbed(4))
