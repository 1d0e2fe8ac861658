"""The doctor: what a node finds out, with real sockets and files; what the reports mean; the command on this machine.

Slurm is replaced by what its commands would say; tests/slurm/test_tools.py has the doctor on a real cluster.
"""

import dataclasses
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from ddp_asr import bandwidth
from ddp_asr.errors import UserError
from ddp_asr.files import sha256_of
from launch import cluster, doctor, probe
from launch.cluster import JobState, Node, Request
from launch.doctor import Evidence, wrong
from launch.probe import Directory, Probe
from tests.conftest import REPOSITORY

NODES = ["node1", "node2", "node3", "node4"]
SHARDS = Directory("/shards", "the shards", shards=True)
MEASURED = {
    "world_size": 4,
    "ranks": [{"host": node, "device": "cpu"} for node in NODES],
    "sizes": [{"bytes": 1 << 20, "seconds": 0.001, "bus_gb_per_s": 1.5}],
}


def free_port():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


def executable(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


# ---- links ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def network(monkeypatch):
    """Nodes are threads of this process, each at an address 127.0.1.N; a pair in `cut` cannot connect."""
    addresses = {node: f"127.0.1.{number}" for number, node in enumerate(NODES, 1)}
    cut, create_connection = set(), socket.create_connection
    calling = threading.local()

    def connect_where_not_cut(address, timeout):
        node, port = address
        if (calling.node, node) in cut:
            raise TimeoutError
        return create_connection((addresses[node], port), timeout)

    def call(node, *arguments):
        calling.node = node
        return real_call(node, *arguments)

    real_call = probe.call
    monkeypatch.setattr(probe, "call", call)
    monkeypatch.setattr(socket, "create_connection", connect_where_not_cut)
    monkeypatch.setattr(
        probe, "listen", lambda port: socket.create_server((addresses[calling.node], port), backlog=512)
    )
    monkeypatch.setattr(probe, "wrong_name", lambda *_, **__: "")

    def examine(limit_s, silent=()):
        """The reports of all nodes but the silent ones."""
        port = free_port()

        def one(number):
            calling.node = NODES[number]
            return Probe((), 0, limit_s / probe.LINKS).examine(NODES, number, port)

        numbers = [number for number, node in enumerate(NODES) if node not in silent]
        with ThreadPoolExecutor(len(NODES)) as pool:
            return {report["node"]: report for report in pool.map(one, numbers)}

    examine.cut = cut
    return examine


def found_wrong(reports, **changes):
    given = {"hosts": NODES, "request": Request(nodes="4"), "directories": [], "logs": "/runs/.doctor-1"}
    return wrong(Evidence(**{**given, "reports": reports, **changes}))


def test_healthy_nodes_reach_each_other_and_stop_before_the_limit(network):
    reports = network(limit_s=300)
    for node, report in reports.items():
        others = [other for other in NODES if other != node]
        assert report["links"] == dict.fromkeys(others, "") and report["called_by"] == others
        assert report["wrong"] == [] and report["listening"] and report["address"].startswith("127.0.")
    assert found_wrong(reports, all_reduce={"node1": {"error": "", "measured": MEASURED}}) == []


def both_ways(*nodes):
    return {pair for node in nodes for other in NODES for pair in ((node, other), (other, node))}


CHECK = "check its link, and the firewalls between the nodes"


@pytest.mark.parametrize(
    "cut, sentences",
    [
        (
            both_ways("node3"),
            [
                "node3 cannot be reached from node1, node2, node4 and cannot reach node1, node2, node4 (timed out): "
                + CHECK
            ],
        ),
        (
            both_ways("node2", "node3"),
            [
                "node2 cannot be reached from node1, node3, node4 and cannot reach node1, node3, node4 (timed out): "
                + CHECK,
                "node3 cannot be reached from node1, node4 and cannot reach node1, node4 (timed out): " + CHECK,
            ],
        ),
        (
            {("node1", "node2"), ("node3", "node2")},
            ["node2 cannot be reached from node1, node3 (timed out): " + CHECK],
        ),
        (
            {("node1", "node2"), ("node2", "node1")},
            [
                "node1 cannot be reached from node2 and cannot reach node2 (timed out): "
                + CHECK.replace("its link", "the links of both")
            ],
        ),
    ],
    ids=["a cut node", "two cut nodes", "one direction", "neither is to blame"],
)
def test_links_that_are_cut(network, cut, sentences):
    network.cut |= cut
    assert found_wrong(network(limit_s=3)) == sentences


LATE = "the job did not end within 180 s (--timeout)"


@pytest.mark.parametrize(
    "cut, sentence",
    [
        (
            both_ways("node3"),
            "node3 did not answer (timed out from node1, node2, node4): check its link and its slurmd, or leave it out "
            "with --exclude node3",
        ),
        (
            set(),  # connections are refused, so the link is good
            f"node3 did not answer ({LATE}): see the logs in /runs/.doctor-1, and whether all nodes share that "
            f"directory and can start {sys.executable}",
        ),
    ],
)
def test_a_node_that_does_not_answer_is_named(network, cut, sentence):
    network.cut |= cut
    assert found_wrong(network(limit_s=3, silent=["node3"]), ended=LATE) == [sentence]


def test_the_rendezvous_port_in_use():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        sentence, called_by, calls = probe.connect("node1", [], port, 60)
    assert sentence == (
        f"the rendezvous port {port} cannot be used (address already in use): run the doctor again, on another port"
    )
    assert (called_by, calls) == (set(), {})
    with socket.create_server(("", port)):
        pass
    assert probe.connect("node1", [], port, 60) == ("", set(), {})
    with socket.create_server(("", port)):
        pass  # a listener that has ended leaves its port to torchrun


def test_another_program_or_nobody_at_the_port():
    def answer(listening, text):
        connection, _ = listening.accept()
        with connection, connection.makefile("rb") as stream:
            stream.readline()
            connection.sendall(text)

    def call(limit_s):
        return probe.call("here", "localhost", port, time.monotonic() + limit_s)

    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        threading.Thread(target=answer, args=[other, b"HTTP/1.1 400 Bad Request\r\n"]).start()
        assert call(0.1) == ("'HTTP/1.1 400 Bad Request' answers", "127.0.0.1")
        assert call(0.1) == ("timed out", "127.0.0.1")
    assert call(0.1) == ("connection refused", "")
    assert probe.call("here", "no-such-host.invalid", port, time.monotonic()) == (probe.UNKNOWN_NAME, "")


# ---- names ---------------------------------------------------------------------------------------------------------

REMEDY = "correct the name server, or /etc/hosts"


def test_names_of_this_machine():
    assert probe.wrong_name("no-such-host.invalid", NODES, own=False).startswith(
        "the name no-such-host.invalid is unknown ("
    )
    assert probe.wrong_name("127.0.0.1", NODES, own=False) == (
        f"the name 127.0.0.1 means 127.0.0.1, which no other node can reach: {REMEDY}"
    )


def test_the_own_name_matters_where_gloo_takes_its_address(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert probe.wrong_name("127.0.1.1", NODES, own=True) == (
        f"the name 127.0.1.1 means 127.0.1.1, which no other node can reach: {REMEDY}, or set GLOO_SOCKET_IFNAME to "
        "the interface that all nodes share"
    )
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert probe.wrong_name("127.0.1.1", NODES, own=True) == ""


@pytest.mark.parametrize(
    "back, sentence",
    [
        ("node2.cluster", ""),
        ("gateway", ""),
        ("node3.cluster", f"the name node2 means 10.0.0.3, and that address means node3.cluster: {REMEDY}"),
    ],
)
def test_an_address_that_belongs_to_another_node(back, sentence, monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(0, 0, 0, "", ("10.0.0.3", 0))])
    monkeypatch.setattr(socket, "gethostbyaddr", lambda _: (back, [], []))
    assert probe.wrong_name("node2", NODES, own=False) == sentence


# ---- GPUs and directories ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "script, gpus, sentences",
    [
        ("echo 'NVIDIA H100, 550.54'; echo 'NVIDIA H100, 550.54'", ["NVIDIA H100, driver 550.54"] * 2, []),
        ("echo 'NVIDIA H100, 550.54'", ["NVIDIA H100, driver 550.54"], ["nvidia-smi shows 1 GPU"]),
        ("echo 'NVIDIA-SMI has failed'; exit 9", [], ["NVIDIA-SMI has failed"]),
        (None, [], ["there is no nvidia-smi"]),
    ],
)
def test_gpus_by_nvidia_smi(script, gpus, sentences, tmp_path, monkeypatch):
    if script:
        executable(tmp_path / "nvidia-smi", script)
    monkeypatch.setenv("PATH", str(tmp_path))
    report = Probe((), 2, 60).examine(["here"], 0, free_port())
    assert report["gpus"] == gpus
    assert report["wrong"] == [
        f"{text}, and the job asked for 2 GPUs: see 'nvidia-smi' and 'dmesg'" for text in sentences
    ]


def test_nvidia_smi_that_hangs(tmp_path, monkeypatch):
    executable(tmp_path / "nvidia-smi", "exec sleep 60")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert probe.nvidia_smi(limit_s=0.2) == ([], "nvidia-smi did not answer within 0.2 s")


def test_a_directory_of_shards_that_is_also_written(tmp_path):
    (tmp_path / "dataset.json").write_text("{}")
    (tmp_path / "shard-000000.tar").write_bytes(b"x")
    (tmp_path / "shard-000001.tar").write_bytes(os.urandom(1 << 20))
    directory, found = Directory(str(tmp_path), "the shards", shards=True, write=True), {}
    assert probe.look_at(directory, "node1", found) == ""
    assert found["dataset"] == sha256_of(tmp_path / "dataset.json")
    assert found["read_mb_per_s"] > 0 and found["write_mb_per_s"] > 0 and found["free_bytes"] > 0
    assert sorted(os.listdir(tmp_path)) == ["dataset.json", "shard-000000.tar", "shard-000001.tar"]


@pytest.mark.parametrize(
    "directory, why",
    [
        (Directory("missing", "the shards", shards=True), "no such file or directory"),
        (Directory("empty", "the shards", shards=True), "it contains no *.tar"),
        (Directory("new/cache", "the cache", write=True), ""),
        (Directory("empty", "the cache", needed_bytes=10**18), "GB are free, and a run needs 1e+09 GB"),
    ],
)
def test_directories(directory, why, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "dataset.json").write_text("{}")
    directory = dataclasses.replace(directory, path=str(tmp_path / directory.path))
    sentence = probe.look_at(directory, "node1", {})
    assert why in sentence and bool(why) == bool(sentence)
    assert not why or sentence.startswith(f"{directory.what} ({directory.path}) cannot be used (")
    assert not (tmp_path / "new").exists()


def test_a_directory_that_never_answers_is_given_up(tmp_path):
    os.mkfifo(tmp_path / "dataset.json")  # opening it waits for a writer, as an NFS server that is away is waited for
    directory = Directory(str(tmp_path), "the shards", shards=True)
    report = Probe((directory,), 0, timeout_s=1.0).examine(["here"], 0, free_port())
    assert report["wrong"] == [
        f"the shards ({tmp_path}) cannot be used (no answer within 0.2 s): repair that, or choose another place"
    ]
    assert list(report["directories"][str(tmp_path)]) == ["free_bytes"]
    with (tmp_path / "dataset.json").open("w"):
        pass  # lets the thread go


# ---- reports to sentences ------------------------------------------------------------------------------------------


def healthy(nodes=NODES, **changes):
    """Reports with nothing wrong, but for `node1={...}`."""
    return {
        node: {
            "node": node,
            "address": "10.0.0.1",
            "listening": True,
            "links": {other: "" for other in nodes if other != node},
            "called_by": [other for other in nodes if other != node],
            "gpus": [],
            "directories": {"/shards": {"dataset": "a", "free_bytes": 10**12, "read_mb_per_s": 500.0}},
            "wrong": [],
            **changes.get(node, {}),
        }
        for node in nodes
    }


ALL_REDUCED = {node: {"error": "", "measured": MEASURED if node == "node1" else None} for node in NODES}


def test_the_same_sentence_of_several_nodes_is_said_once():
    same = {"wrong": ["the name node2 is unknown (x)"]}
    assert found_wrong(healthy(node1=same, node4=same), all_reduce=ALL_REDUCED) == [
        "on node1, node4, the name node2 is unknown (x)"
    ]


def test_links_that_fail_for_a_name_or_a_port_are_not_said_twice():
    reports = healthy(
        node1={"links": {"node2": probe.UNKNOWN_NAME, "node3": "connection refused", "node4": ""}},
        node3={"listening": False, "wrong": ["the rendezvous port 1 cannot be used (x)"]},
    )
    assert found_wrong(reports) == ["on node3, the rendezvous port 1 cannot be used (x)"]


def test_other_shards_under_the_same_path():
    reports = healthy(node3={"directories": {"/shards": {"dataset": "b"}}}, node4={"directories": {"/shards": {}}})
    assert found_wrong(reports, directories=[SHARDS], all_reduce=ALL_REDUCED) == [
        "/shards on node1, node2 differs from that on node3: all nodes need the same shards"
    ]


def test_an_all_reduce_that_fails_or_gives_nothing():
    lost = {"error": "rank 3 is gone", "measured": None}
    failed = {"node3": {"error": "a peer is gone", "measured": None}, "node2": lost}
    assert found_wrong(healthy(), all_reduce=failed) == [
        "the all-reduce failed on node2 and 1 other node (rank 3 is gone): see the logs in /runs/.doctor-1"
    ]
    assert found_wrong(healthy(), ended="the job ended as FAILED") == [
        "the all-reduce gave no result (the job ended as FAILED): see the logs in /runs/.doctor-1"
    ]


def test_no_all_reduce_is_never_healthy():
    """A name that was unknown for a moment has no sentence of its own."""
    reports = healthy(node1={"links": {"node2": probe.UNKNOWN_NAME, "node3": "", "node4": ""}})
    assert found_wrong(reports) == ["the all-reduce gave no result (the job ended): see the logs in /runs/.doctor-1"]


def test_ranks_without_a_gpu():
    request = Request(nodes="4", gpus_per_node=1)
    assert found_wrong(healthy(), request=request, all_reduce=ALL_REDUCED) == [
        "torch finds no GPU on node1, node2, node3, node4: it needs a build for CUDA that fits the driver"
    ]


COMPLAINT = "Task launch for StepId=7.0 failed on node node3: Communication connection failure"


def test_of_a_job_that_was_torn_down_only_the_lost_node_is_blamed():
    torn = {"ended": "the job ended as FAILED", "slurm_nodes": [Node("node1", "idle"), Node("node3", "idle")]}
    end = "check its link and its slurmd, or leave it out with --exclude node3"
    assert found_wrong({}, **torn, complaints=[COMPLAINT, "Application launch failed"]) == [
        f"node3 did not answer ({COMPLAINT}): {end}"
    ]
    torn["slurm_nodes"][1] = Node("node3", "down*", "Not responding")
    assert found_wrong({}, **torn) == [f"node3 did not answer (it is down* for Slurm (Not responding)): {end}"]


def test_a_job_that_never_started():
    why = "the job cannot start: it asks for 4 nodes, and 3 can be used: node3 is drained for Slurm"
    assert found_wrong({}, hosts=[], ended=why) == [why]
    assert found_wrong({}, hosts=[], complaints=["Unable to create step"]) == [
        "the job ended without a report; Unable to create step"
    ]


def test_what_srun_complains_of():
    log = f"submitit INFO\nsrun: error: {COMPLAINT}\nsrun: error: Application launch failed\nsrun: Job step aborted\n"
    log += "srun: error: node2: task 1: Killed\nsrun: error: node[1,4]: tasks 0,3: Exited with exit code 1\n"
    assert doctor.complaints(log) == [COMPLAINT, "Application launch failed"]


def test_the_table_shows_every_node(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    reports = {node: report for node, report in healthy().items() if node != "node4"}
    evidence = Evidence(Request(nodes="4"), [SHARDS], NODES, reports, ALL_REDUCED)
    doctor._show(evidence, ["something"])
    shown = capsys.readouterr().out
    assert all(node in shown for node in NODES) and "3 of 3" in shown and "no answer" in shown
    assert "1000 GB free" in shown and "reads 500 MB/s" in shown
    assert "all-reduce of 1 MiB over 4 ranks: 1.0 ms, 1.50 GB/s bus bandwidth" in shown
    assert shown.endswith("wrong: something\n")


# ---- the job -------------------------------------------------------------------------------------------------------

PENDING, RUNNING, COMPLETED = JobState("PENDING", "Priority"), JobState("RUNNING"), JobState("COMPLETED")
DOWN = [Node("node1", "idle"), Node("node2", "down*", "Not responding")]


@pytest.fixture
def slurm(monkeypatch):
    """Slurm with a job that goes through the states of a list; returns what its commands were asked."""

    def start(states, nodes=()):
        left, asked = list(states), []
        monkeypatch.setattr(cluster, "job_states", lambda _: {"7": left.pop(0) if len(left) > 1 else left[0]})
        monkeypatch.setattr(cluster, "scontrol_job", lambda _: {"NodeList": "node[1-2]", "Partition": "main"})
        monkeypatch.setattr(cluster, "nodes", lambda *_: list(nodes))
        monkeypatch.setattr(cluster, "run", lambda command: asked.append(command) or "node1\nnode2\n")
        return asked

    monkeypatch.setattr(doctor, "ASK_SLURM_EVERY_S", 0.01)
    monkeypatch.setattr(doctor, "BLOCKED_FOR_S", 0.1)
    monkeypatch.setattr(doctor, "LOGS_WITHIN_S", 0.1)
    return start


def wait(timeout_s=60.0):
    evidence = Evidence(Request(nodes="2"), ())
    return doctor._wait("7", evidence, timeout_s), evidence.hosts


def test_a_job_is_waited_for(slurm, capsys):
    slurm([PENDING, PENDING, RUNNING, RUNNING, COMPLETED])
    assert wait() == ("", ["node1", "node2"])
    assert capsys.readouterr().err == "job 7 is waiting (Priority); Ctrl-C cancels it\njob 7 runs on node1, node2\n"


@pytest.mark.parametrize(
    "states, why",
    [
        ([RUNNING], "the job did not end within 0.1 s (--timeout)"),
        ([RUNNING, JobState("PENDING", "BeginTime")], "Slurm has requeued the job (BeginTime)"),
        ([RUNNING, JobState("NODE_FAIL")], "the job ended as NODE_FAIL"),
        (
            [PENDING],
            "the job cannot start: it asks for 2 nodes, and 1 can be used (node2 is down* for Slurm (Not "
            "responding)): repair these, or ask for fewer nodes",
        ),
    ],
)
def test_a_job_that_is_not_waited_for_any_longer(slurm, states, why):
    slurm(states, DOWN)
    assert wait(timeout_s=0.1)[0] == why


@pytest.mark.parametrize(
    "states, nodes, blocked",
    [
        (["idle"] * 4, "4", False),
        (["idle", "idle", "idle", "down*"], "3", False),
        (["idle", "idle", "idle", "down*"], "2-4", False),
        (["allocated", "mixed", "idle~", "completing"], "4", False),
        (["idle", "idle", "drained", "idle*"], "3", True),
        (["idle"] * 4, "5", False),  # Slurm itself refuses it, or says why it waits
    ],
)
def test_whether_a_job_waits_for_a_broken_node(states, nodes, blocked):
    known = [Node(name, state) for name, state in zip(NODES, states, strict=True)]
    assert bool(doctor.too_few_nodes(Request(nodes=nodes), known)) == blocked


def test_nodes_are_read_from_the_logs_and_a_living_job_is_cancelled(slurm, tmp_path, monkeypatch):
    asked = slurm([RUNNING], DOWN)

    def submit(functions, folder, request, **_):
        assert pickle.loads(pickle.dumps(functions)) == functions
        for node, report in healthy(NODES[:2]).items():
            lines = [{"report": report}, {"all_reduce": {"node": node, **ALL_REDUCED[node]}}]
            (folder / f"7_{node}_log.out").write_text("noise\n" + "".join(json.dumps(line) + "\n" for line in lines))
        return cluster.Submission(folder, ["7"])

    monkeypatch.setattr(cluster, "submit", submit)
    request = Request(nodes="2")
    evidence = doctor.on_slurm(Probe((), 0, timeout_s=0.1), request, tmp_path)
    assert ["scancel", "7"] in asked
    assert list(evidence.reports) == list(evidence.all_reduce) == evidence.hosts == ["node1", "node2"]
    assert evidence.slurm_nodes == DOWN and wrong(evidence) == []


def test_a_refused_job_leaves_nothing_behind(tmp_path, monkeypatch):
    executable(tmp_path / "sbatch", "echo 'sbatch: error: Batch job submission failed: Invalid partition' >&2; exit 1")
    executable(tmp_path / "srun", "exit 0")  # submitit looks for it
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError, match="Slurm refused the job"):
        doctor.main([f"--run.dir={tmp_path}/runs", "--partition", "nope"])
    assert os.listdir(tmp_path / "runs") == []


def test_a_place_for_the_job_that_cannot_be_written(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match=r"cannot create .*runs.*choose a directory that you may write and all nodes"):
        doctor.main([f"--run.dir={tmp_path}/runs"])


@pytest.mark.parametrize("seconds", ["0", "soon", "nan", "1e9"])
def test_the_timeout_is_checked(seconds, capsys):
    with pytest.raises(SystemExit, match="2"):
        doctor.main(["--timeout", seconds])
    assert "must be a number of seconds from 1 to 86400" in capsys.readouterr().err


# ---- the all-reduce ------------------------------------------------------------------------------------------------


def test_the_bus_bandwidth_is_that_of_nccl_tests():
    assert bandwidth.bandwidth(1_000_000_000, 0.5, 4)["bus_gb_per_s"] == pytest.approx(3.0)
    assert bandwidth.bandwidth(1024, 0.0, 1)["bus_gb_per_s"] is None


@pytest.mark.parametrize("limit", ["0", "-1", "soon"])
def test_the_limit_of_an_all_reduce_is_checked(limit, capsys):
    with pytest.raises(SystemExit, match="2"):
        bandwidth.main(["--limit-s", limit])
    assert "must be a whole number above 0, not" in capsys.readouterr().err


@pytest.mark.parametrize(
    "script, result",
    [
        ("echo noise; echo '{\"sizes\": []}'; echo more", {"error": "", "measured": {"sizes": []}}),
        ("echo noise", {"error": "", "measured": None}),
        ("echo 'error: rank 0 is lost'; echo 'x.ChildFailedError: y'; exit 1", {"error": "rank 0 is lost"}),
        ("echo 'Traceback'; echo 'ImportError: no torch' >&2; exit 1", {"error": "ImportError: no torch"}),
        ("exit 3", {"error": "torchrun ended with exit code 3"}),
        ("exec sleep 60", {"error": "it did not end within 0.5 s"}),
    ],
)
def test_why_an_all_reduce_failed(script, result):
    limit_s = 0.5 if "sleep" in script else 60
    assert probe.run_ranks(["sh", "-c", script], os.environ, limit_s) == {"measured": None, **result}


@pytest.mark.slow
def test_two_nodes_with_a_torchrun_each(monkeypatch):
    """Both on this machine, which 127.0.0.1 and localhost name."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    step = {"SLURM_STEP_NODELIST": "127.0.0.1,localhost", "SLURM_JOB_ID": str(os.getpid()), "RANKS_PER_NODE": "1"}
    environments = [{**os.environ, **step, "SLURM_NODEID": number} for number in ("0", "1")]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(partial(probe.all_reduce, limit_s=200), environments)
    assert first["error"] == second["error"] == "" and second["measured"] is None
    assert first["measured"]["world_size"] == 2
    assert all(size["bus_gb_per_s"] > 0 for size in first["measured"]["sizes"])


@pytest.mark.slow
def test_a_rank_that_never_comes_is_named_within_the_limit():
    alone = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    answer = subprocess.run(
        [sys.executable, "-m", "ddp_asr.bandwidth", "--limit-s", "20"],
        cwd=REPOSITORY,
        env=os.environ | {name: str(value) for name, value in alone.items()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "error: rank 0 could not meet the other 1 rank" in answer.stderr and answer.returncode == 2


# ---- the command ---------------------------------------------------------------------------------------------------


def start(*arguments):
    command = [sys.executable, "-m", "launch.doctor", "--cluster", "local", *map(str, arguments)]
    # A shell that starts the tests in the background has them ignore Ctrl-C.
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=os.environ | {"COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.slow
def test_this_machine_is_examined(tmp_path, tiny_corpus):
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"run: {{dir: {tmp_path}}}\ndata: {{train: [{tiny_corpus.train}], test: []}}\n")
    with start("--config", settings, "--tasks-per-node", 2, "--json") as asked:
        printed, complained = asked.communicate(timeout=300)
    assert asked.returncode == 0, printed + complained
    found = json.loads(printed)
    assert found["ok"] and found["wrong"] == [] and found["hosts"] == [socket.gethostname()]
    (report,), (all_reduce,) = found["reports"].values(), found["all_reduce"].values()
    assert all_reduce["measured"]["world_size"] == 2
    assert report["directories"][str(tiny_corpus.train)]["read_mb_per_s"] > 0
    assert report["directories"][str(tmp_path)]["write_mb_per_s"] > 0
    assert os.listdir(tmp_path) == ["settings.yaml"]


@pytest.mark.slow
def test_what_is_wrong_with_this_machine_is_said(tmp_path):
    with start(f"--run.dir={tmp_path}", f"--data.train={tmp_path}/gone", "--data.test=") as asked:
        printed, complained = asked.communicate(timeout=300)
    assert asked.returncode == 1, printed + complained
    host = socket.gethostname()
    assert printed.splitlines()[-1] == (
        f"wrong: on {host}, the shards ({tmp_path}/gone) cannot be used (no such file or directory): repair that, or "
        "choose another place"
    )
    assert any(line.startswith(host) for line in printed.splitlines())


@pytest.mark.slow
def test_ctrl_c_ends_it(tmp_path):
    os.mkfifo(tmp_path / "dataset.json")
    with start(f"--run.dir={tmp_path}", f"--data.train={tmp_path}", "--data.test=", "--timeout=3600") as asked:
        with Path(tmp_path / "dataset.json").open("w"):  # returns when it is opened for reading
            asked.send_signal(signal.SIGINT)
            assert asked.wait(timeout=60) == 130
        assert asked.stderr.read() == "interrupted\n"
