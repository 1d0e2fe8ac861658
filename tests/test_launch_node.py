"""The torchrun of a node: its command on one node and on many, and a real one that ends on a signal."""

import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddp_asr.ranks.signals import STOP_SIGNALS
from launch import node
from tests.conftest import REPOSITORY
from tests.tiny_training import LIMIT_S

TWO_NODES = {
    "SLURM_JOB_ID": "12",
    "SLURM_RESTART_COUNT": "2",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_NODEID": "1",
    "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CPUS_ON_NODE": "96",
}


def command(environment, *ignored):
    return node.torchrun_command(environment, "ddp_asr.train", ["--config", "a b.yaml"], ignored=ignored)


def test_the_second_of_two_nodes():
    names = ",".join(number.name for number in STOP_SIGNALS)
    assert command(TWO_NODES) == [
        *(sys.executable, "-m", "ddp_asr.ranks.torchrun"),
        "--nnodes=2",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=node07:{node.rendezvous_port('12', 3)}",
        "--rdzv-id=12.3",
        "--rdzv-conf=is_host=0,join_timeout=600,read_timeout=120",
        "--local-addr=node08",
        "--nproc-per-node=8",
        "--max-restarts=0",
        f"--signals-to-handle={names}",
        *("-m", "ddp_asr.train", "--config", "a b.yaml"),
    ]


def test_the_first_of_two_nodes_serves_the_rendezvous():
    first = command({**TWO_NODES, "SLURM_NODEID": "0"})
    assert "--rdzv-conf=is_host=1,join_timeout=600,read_timeout=120" in first
    assert [a for a in first if a.startswith("--rdzv-e")] == [a for a in command(TWO_NODES) if a.startswith("--rdzv-e")]


def test_a_single_node_need_not_resolve_its_own_name():
    alone = command({**TWO_NODES, "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "node08"})
    assert f"--rdzv-endpoint=127.0.0.1:{node.rendezvous_port('12', 3)}" in alone and "--local-addr=127.0.0.1" in alone


def test_this_machine_alone():
    found = command({"RANKS_PER_NODE": "3"})
    assert "--standalone" in found and "--nproc-per-node=3" in found and not any("rdzv" in word for word in found)


def test_ignored_signals_are_not_handed_on():
    found = next(word for word in command(TWO_NODES, "SIGTERM") if word.startswith("--signals-to-handle="))
    assert set(found.partition("=")[2].split(",")) == {number.name for number in STOP_SIGNALS} - {"SIGTERM"}


def test_torchrun_knows_every_option():
    from torch.distributed.run import get_args_parser

    for environment in (TWO_NODES, {}):
        parsed = get_args_parser().parse_args(command(environment)[3:])
        assert (parsed.training_script, parsed.training_script_args) == ("ddp_asr.train", ["--config", "a b.yaml"])


@pytest.mark.parametrize(
    ("variables", "ranks"),
    [
        ({}, 1),
        ({"SLURM_GPUS_ON_NODE": "4"}, 4),
        ({"SLURM_GPUS_PER_NODE": "h100:8"}, 8),
        ({"SLURM_GPUS_ON_NODE": "4", "RANKS_PER_NODE": "2"}, 2),
        ({"SLURM_GPUS_ON_NODE": "0"}, 1),
    ],
)
def test_a_rank_for_each_gpu_unless_told_otherwise(variables, ranks):
    assert node.ranks_of_node(variables) == ranks


def test_ranks_share_the_nodes_cores():
    assert node.rank_variables(TWO_NODES)["OMP_NUM_THREADS"] == "12"
    assert node.rank_variables({**TWO_NODES, "SLURM_CPUS_PER_TASK": "16"})["OMP_NUM_THREADS"] == "2"
    assert node.rank_variables({**TWO_NODES, "SLURM_CPUS_ON_NODE": "1"})["OMP_NUM_THREADS"] == "1"
    chosen = {"OMP_NUM_THREADS": "5", "TORCH_CPP_LOG_LEVEL": "INFO"}
    assert node.rank_variables({**TWO_NODES, **chosen}) == chosen


@pytest.mark.parametrize(
    ("nodes", "hosts"),
    [
        ("node1", "node1"),
        ("node[1-3]", "node1 node2 node3"),
        ("node[001,009-011],login", "node001 node009 node010 node011 login"),
        ("login,node[1-2]", "login node1 node2"),
        ("r[2-3]n[10-11]-ib,x", "r2n10-ib r2n11-ib r3n10-ib r3n11-ib x"),
        ("a-b[7].cluster", "a-b7.cluster"),
    ],
)
def test_the_hosts_of_a_node_list(nodes, hosts):
    assert node.expanded(nodes) == hosts.split()


@given(st.lists(st.from_regex(r"[a-z]{1,3}[0-9]{0,3}", fullmatch=True), min_size=1))
def test_plain_names_are_their_own_hosts(names):
    assert node.expanded(",".join(names)) == names


def test_a_step_knows_its_nodes():
    assert node.Step.of(TWO_NODES) == node.Step(["node07", "node08"], 1, "12", 3)
    assert node.Step.of({}) == node.Step([socket.gethostname()], 0, "", 1)


def test_every_attempt_has_a_port_of_its_own():
    ports = [node.rendezvous_port("4711", attempt) for attempt in range(1, 40)]
    assert len(set(ports)) == len(ports)
    assert all(20000 <= port < 32000 for port in ports)


@pytest.mark.parametrize("words", [["--ignore", "SIGTURM", "ddp_asr.train"], []])
def test_a_mistake_on_the_command_line(words, capsys):
    with pytest.raises(SystemExit) as ended:
        node.main(words)
    assert ended.value.code == 2
    assert re.search("invalid choice: 'SIGTURM'|required: MODULE", capsys.readouterr().err)


# ---- real ones ------------------------------------------------------------------------------------------------------


def started(directory, program: str, *options: str) -> subprocess.Popen:
    """launch.node with two ranks of `program`."""
    (directory / "program.py").write_text(program)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMP_"))}
    environment |= {"RANKS_PER_NODE": "2", "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(directory)])}
    return subprocess.Popen(
        [sys.executable, "-m", "launch.node", *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


SHOW = """
import os, signal, sys
words = [os.environ[name] for name in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")]
words += [str(signal.getsignal(signal.SIGTERM) is signal.SIG_IGN), *sys.argv[1:]]
sys.stdout.write(" ".join(words) + "\\n")
"""


@pytest.mark.slow
def test_two_ranks_get_the_modules_options_and_what_is_ignored_stays_ignored(tmp_path):
    node = started(tmp_path, SHOW, "--ignore=SIGTERM", "program", "--config", "a b", "--ignore=SIGHUP")
    printed, complaints = node.communicate(timeout=LIMIT_S)
    assert node.returncode == 0, complaints
    assert sorted(printed.splitlines()) == [f"{rank} 2 1 True --config a b --ignore=SIGHUP" for rank in (0, 1)]


FAIL = """
import os, signal, sys
if os.environ["RANK"] == "1":
    sys.stderr.write("error: what the user did wrong\\n")
    sys.exit(2)
signal.pause()
"""


@pytest.mark.slow
def test_a_rank_that_fails_has_the_word(tmp_path):
    node = started(tmp_path, FAIL, "program")
    _, complaints = node.communicate(timeout=LIMIT_S)
    assert node.returncode == 1
    assert "error: what the user did wrong\n" in complaints and "Traceback" not in complaints
    assert "torchrun: rank 1 ended with exit code 2, before all others\n" in complaints


STOP = """
import os, signal, sys
signal.signal(signal.SIGUSR2, lambda number, frame: sys.exit(0))
sys.stdout.write("ready\\n")
signal.pause()
"""


@pytest.mark.slow
def test_a_signal_reaches_the_ranks_and_the_exit_code(tmp_path):
    node = started(tmp_path, STOP, "program")
    assert [node.stdout.readline() for _ in range(2)] == ["ready\n", "ready\n"]
    node.send_signal(signal.SIGUSR2)
    _, complaints = node.communicate(timeout=LIMIT_S)
    assert node.returncode == 128 + signal.SIGUSR2, complaints
    assert "torchrun was stopped by SIGUSR2\n" in complaints and "Traceback" not in complaints
