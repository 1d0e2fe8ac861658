"""Nodes that die, vanish and come back, and ranks that hang."""

import contextlib
import re
from pathlib import Path

from ddp_asr.runs import checkpoint
from tests import tiny_training as tiny
from tests.slurm import harness
from tests.slurm.harness import Gate, Shape


def test_a_node_dies_and_is_booted(undisturbed, tiny_corpus, tmp_path):
    """The job asks for this very node, so that it has to wait for it."""
    gate = Gate(tmp_path / "gate").hold(5)
    job = harness.submit(tiny_corpus, tmp_path, Shape(nodelist="node1,node2"), gate=gate)
    assert job.held(5)["host"] == "node1"
    harness.cluster("crash", "node1")
    harness.wait_until(lambda: harness.node_state("node1").startswith("down"), "Slurm to miss node1")
    gate.open(5)
    harness.cluster("boot", "node1")
    job.succeed()
    assert job.accounted() == ["NODE_FAIL", "COMPLETED"] and job.restarts == 1
    assert "going on from step 3" in job.output()
    tiny.assert_same_run(job.run, undisturbed(2))


def test_an_attempt_on_a_lost_node_writes_nothing_any_more(undisturbed, tiny_corpus, tmp_path):
    """Its node cut off, the first attempt trains on, while Slurm has started the second elsewhere."""
    gate = Gate(tmp_path / "gate").hold(5, attempt=1).hold(8, attempt=2)
    job = harness.submit(tiny_corpus, tmp_path, Shape(nodes="1", ranks=2), gate=gate)
    stale = job.held(5)
    harness.cluster("cut", stale["host"])
    # Slurm would find out in a minute; a health check does sooner.
    harness.ask("scontrol", "update", f"nodename={stale['host']}", "state=down", "reason=unreachable")
    assert job.held(8)["host"] != stale["host"]
    harness.wait_until(checkpoint.step_path(job.run, 6).is_file, "the checkpoint of step 6")
    before = harness.written(job.run)
    gate.open(5, attempt=1)
    harness.wait_until(lambda: not is_running(stale), "the stale attempt to end")
    assert "was taken over by another run" in harness.rank_log(job.run)
    # Its batch script, too, reaches Slurm again, gives up or is killed by its node, and must leave the job alone.
    harness.cluster("join", stale["host"])
    script = f"/{stale['host']}/job{int(job.id):05d}/slurm_script"
    harness.wait_until(lambda: not runs_somewhere(script), "the stale batch script to end")
    assert harness.written(job.run) == before
    assert (job.state, job.restarts) == ("RUNNING", 1)
    gate.open(8, attempt=2)
    job.succeed()
    assert job.restarts == 1 and tiny.status(job.run)["attempt"] == 2
    tiny.assert_same_run(job.run, undisturbed(2))


def runs_somewhere(program: str) -> bool:
    """Whether a process of this machine, on which all nodes are, has the program among its arguments."""
    for arguments in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if program.encode() in arguments.read_bytes():
                return True
    return False


def is_running(held: dict) -> bool:
    return harness.run_script("on", held["host"], "test", "-d", f"/proc/{held['pid']}").returncode == 0


def test_a_rank_that_hangs_is_named(undisturbed, tiny_corpus, tmp_path):
    """The other ends in time and names it. What is left of the job ends without anyone's help."""
    gate = Gate(tmp_path / "gate").hold(5)
    job = harness.submit(tiny_corpus, tmp_path, Shape(), "--distributed.timeout_s=15", gate=gate)
    job.held(5)
    host, pid = re.search(r"rank 1 of 2, (\w+), pid (\d+)", harness.rank_log(job.run, 1)).groups()
    harness.cluster("on", host, "kill", "-STOP", pid)
    gate.open(5)
    harness.wait_until(lambda: is_named(job.run, host), "rank 0 to name rank 1", job)
    job.succeed()
    assert re.search(rf"failed: rank 0 .*rank 1 on {host} .*; requeued \(failure 1", job.output())
    assert job.restarts == 1
    tiny.assert_same_run(job.run, undisturbed(2))


def is_named(run, host) -> bool:
    named = rf"rank 1 on {host} was last seen \d+ s ago at step \d"
    return re.search(f"failed at step 4: rank 0 of 2 lost the others .*: {named}", harness.rank_log(run)) is not None
