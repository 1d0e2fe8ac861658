"""What a job asks for, and what Slurm's answers mean; tests/slurm has the real scheduler."""

import argparse
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddp_asr.errors import UserError
from launch import cluster
from launch.cluster import JobState, Request, Submission
from tests.conftest import REPOSITORY


def requested(*argv: str, **defaults) -> Request:
    parser = argparse.ArgumentParser()
    cluster.add_options(parser)
    return cluster.request_from(parser.parse_args(argv), **defaults)


def test_options_lie_on_the_profile_and_the_profile_on_the_defaults(tmp_path):
    profile = tmp_path / "ours.yaml"
    profile.write_text(
        "executor: slurm\npartition: long\ngpus_per_node: 8\ntime: 08:00:00\nsetup: [module load cuda]\n"
    )
    request = requested(f"--cluster={profile}", "--nodes=1-4", "--partition=short", signal_s=60, partition="none")
    assert request == Request(
        nodes="1-4", gpus_per_node=8, partition="short", time="08:00:00", signal_s=60, setup=["module load cuda"]
    )
    assert (request.max_nodes, request.ranks_per_node, request.max_ranks) == (4, 8, 32)


def test_ranks_are_gpus_unless_tasks_are_asked_for():
    assert requested("--gpus-per-node=8").ranks_per_node == 8
    assert requested().ranks_per_node == 1
    assert requested("--tasks-per-node=3", "--nodes=2").max_ranks == 6


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes=0"], "nodes must be a number such as 4, or a range such as 1-4, not '0'"),
        (["--nodes=4-1"], "nodes must be a number .* not '4-1'"),
        (["--nodes=two"], "nodes must be a number .* not 'two'"),
        (["--gpus-per-node=-1"], "gpus_per_node must be at least 0, not -1"),
        (["--gpus-per-node=many"], "gpus_per_node must be a whole number, not 'many'"),
        (["--partition=a\nb"], "partition must be one line"),
        (["--cluster=local", "--nodes=2"], "nodes = 2, but 'local' is this machine alone"),
        (["--cluster=debug", "--tasks-per-node=2"], "'debug' is one process, not 2"),
        (["--cluster=slrum"], "--cluster is a profile's name or file, and 'slrum' is neither; did you mean 'slurm'"),
    ],
)
def test_a_request_that_cannot_be_is_one_sentence(arguments, said):
    with pytest.raises(UserError, match=said):
        requested(*arguments)


def test_an_unknown_key_of_a_profile_names_the_nearest(tmp_path):
    profile = tmp_path / "ours.yaml"
    profile.write_text("gpus_per_nodes: 8\n")
    with pytest.raises(UserError, match=r"unknown key 'gpus_per_nodes' in .*ours.yaml; did you mean 'gpus_per_node'"):
        requested(f"--cluster={profile}")


@pytest.mark.parametrize("profile", sorted((REPOSITORY / cluster.PROFILES).glob("*.yaml")), ids=lambda path: path.stem)
def test_every_profile_that_comes_along_is_good(profile):
    requested(f"--cluster={profile}")
    assert profile.read_text().startswith("#"), "it opens with what it is for"


def test_the_batch_script_says_what_was_asked_for_and_outlives_its_ranks():
    asked = ("--nodes=4", "--gpus-per-node=8", "--cpus-per-task=12", "--time=8:00:00", "--account=speech")
    request = requested(*asked, "--setup=module load x")
    text = cluster.sbatch_text(
        Path("/runs/a"), request, name="a", code=Path("/runs/a/co de"), after=["conclude $status"]
    )
    directives = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert directives == [
        "#SBATCH --account=speech",
        "#SBATCH --cpus-per-task=96",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --job-name=a",
        "#SBATCH --nodes=4",
        "#SBATCH --open-mode=append",
        "#SBATCH --output=/runs/a/%j_0_log.out",
        "#SBATCH --requeue",
        "#SBATCH --signal=USR2@120",
        "#SBATCH --time=8:00:00",
    ]
    commands = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert commands[:3] == ["trap : TERM USR1 USR2", "module load x", "cd '/runs/a/co de'"]
    assert commands[3].startswith("export PYTHONPATH='/runs/a/co de'")
    assert commands[4] == "export RANKS_PER_NODE=8"
    assert commands[6].startswith("srun --unbuffered ") and " --kill-on-bad-exit=0 --wait=60 " in commands[6]
    assert commands[7:] == ["status=$?", "trap '' TERM USR1 USR2", "conclude $status"]


@pytest.mark.parametrize("nodes", ["2", "2-4"])
def test_the_number_of_tasks_is_left_to_srun(nodes):
    """Of a range of nodes and a number of tasks, sbatch would always give the fewest nodes."""
    request = requested(f"--nodes={nodes}", "--tasks-per-node=2", "--cpus-per-task=3")
    text = cluster.sbatch_text(Path("/runs/a"), request, name="a", code=Path("/runs/a/code"))
    assert f"#SBATCH --nodes={nodes}\n" in text and "#SBATCH --cpus-per-task=6\n" in text
    assert "#SBATCH --ntasks" not in text and "#SBATCH --mincpus" not in text
    assert re.search("^srun .* --ntasks-per-node=1 .* --cpus-per-task=6 ", text, flags=re.MULTILINE)


def test_each_rank_has_a_core_unless_the_cluster_says_more():
    text = cluster.sbatch_text(Path("/a"), requested("--gpus-per-node=8"), name="a", code=Path("/a"))
    assert "#SBATCH --mincpus=8\n" in text and "cpus-per-task" not in text


def test_an_array_runs_so_many_at_a_time():
    text = cluster.sbatch_text(Path("/a"), requested(), name="a", code=Path("/a"), jobs=6, parallel=2)
    assert "#SBATCH --array=0-5%2" in text and "#SBATCH --output=/a/%A_%a_0_log.out" in text
    assert "#SBATCH --array=0-5%6" in cluster.sbatch_text(Path("/a"), requested(), name="a", code=Path("/a"), jobs=6)


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_a_dry_run_prints_is_what_is_submitted(tmp_path, monkeypatch, jobs):
    for command in ("sbatch", "srun"):
        (tmp_path / command).write_text("#!/bin/sh\necho Submitted batch job 12\n")
        (tmp_path / command).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    place = {"name": "a", "code": tmp_path, "parallel": 2, "after": ["conclude"]}
    submission = cluster.submit([len] * jobs, tmp_path / "job", requested("--nodes=1-2"), **place)
    assert submission.job_ids == (["12"] if jobs == 1 else ["12_0", "12_1"])
    (script,) = {path.read_text() for path in (tmp_path / "job").glob("*.sh")}  # of which submitit keeps two copies
    assert script == cluster.sbatch_text(tmp_path / "job", requested("--nodes=1-2"), jobs=jobs, **place)


def test_only_slurm_has_a_batch_script():
    with pytest.raises(UserError, match="no sbatch file for the cluster 'local'"):
        cluster.sbatch_text(Path("/a"), requested("--cluster=local"), name="a", code=Path("/a"))


@pytest.mark.parametrize(
    ("complaint", "reason"),
    [
        (
            "sbatch: error: Batch job submission failed: Requested node configuration is not available\n",
            "Requested node configuration is not available",
        ),
        (
            "sbatch: error: invalid partition specified: nope\n"
            "sbatch: error: Batch job submission failed: Invalid partition name specified\n",
            "invalid partition specified: nope; Invalid partition name specified",
        ),
        ("scontrol: error: Job is pending execution for job 7\n", "Job is pending execution for job 7"),
        ("out of luck.\n", "out of luck"),
    ],
)
def test_slurms_reason_loses_its_prefixes(complaint, reason):
    assert cluster.slurm_reason(complaint) == reason


names = st.from_regex(r"[A-Z]\w{0,8}", fullmatch=True)
values = st.from_regex(r"[\w./@-]{0,8}( \(\w{1,5}\))?", fullmatch=True)


@given(st.dictionaries(names, values, min_size=1))
def test_a_line_of_scontrol_becomes_its_fields(fields):
    assert cluster.fields_of(" ".join(f"{name}={value}" for name, value in fields.items())) == fields


def test_a_real_line_of_scontrol():
    line = (
        "JobId=12 JobName=an4 UserId=root(0) JobState=PENDING Reason=BeginTime Dependency=(null) Requeue=1 Restarts=2 "
        "NumNodes=2-2 TRES=cpu=4,mem=4000M,node=2,gres/gpu=4 Command=/runs/an4/my job.sh StdOut=/runs/an4/12_0_log.out "
    )
    found = cluster.fields_of(line)
    assert (found["JobState"], found["Reason"], found["Restarts"]) == ("PENDING", "BeginTime", "2")
    assert found["Command"] == "/runs/an4/my job.sh"


def test_a_command_that_is_not_there_or_fails_is_one_sentence():
    with pytest.raises(UserError, match="there is no no-such-command here: run this"):
        cluster.run(["no-such-command"])
    with pytest.raises(UserError, match=r"^'sh -c .*' failed: wrong partition$"):
        cluster.run(["sh", "-c", "echo 'sinfo: error: wrong partition' >&2; exit 1"])
    with pytest.raises(UserError, match=r"did not answer within 0.1 s: is slurmctld up"):
        cluster.run(["sleep", "30"], timeout_s=0.1)


def test_no_job_is_asked_for_nothing():
    assert cluster.job_states([]) == {}


def test_what_lives():
    assert JobState("PENDING").living and JobState("RUNNING").living
    assert not JobState("COMPLETED").living and not JobState("UNKNOWN").living and not JobState("CANCELLED").living


def test_the_log_of_a_node():
    submission = Submission(Path("/a"), ["12_0", "12_1"])
    assert submission.log(1, node=3) == Path("/a/12_1_3_log.out")
