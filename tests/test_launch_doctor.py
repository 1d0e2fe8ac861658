"""The doctor: what nodes find out by themselves, what their reports mean, and a whole examination of this machine."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from ddp_asr import bandwidth
from ddp_asr.errors import UserError
from launch import doctor, examination, findings, probes
from launch.cluster import JobState, Node, Request, Submission
from launch.examination import Desk, Examination
from launch.findings import AllReduce, Evidence, Report, judge
from launch.job import Place
from launch.probes import Directory, Gpus, Link, Listener, Name, Target
from tests.conftest import REPOSITORY

PORT, OTHER_PORT = 23456, 40001
NODES = ["node1", "node2", "node3", "node4"]
RUN = Target("/runs", "the run directory", "token", "d1", write=True, needed_bytes=2 * 10**9)
SHARDS = Target("/shards", "the shards", "dataset.json", "d2", read=True)
MEASURED = {
    "world_size": 4,
    "ranks": [{"host": node, "device": "cpu"} for node in NODES],
    "sizes": [{"bytes": 1 << 20, "seconds": 0.001, "bus_gb_per_s": 1.5}],
}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ---- reports to sentences ------------------------------------------------------------------------------------------


def healthy(node, nodes=NODES, **changes):
    """A node's report with nothing wrong in it."""
    others = [other for other in nodes if other != node]
    return dataclasses.replace(
        Report(
            node,
            "done",
            [PORT, OTHER_PORT],
            hostname=node,
            own=Name([f"10.0.0.{node[-1]}"], node),
            names={other: Name([f"10.0.0.{other[-1]}"], f"{other}.cluster") for other in others},
            links=[Link(other, port, answered=other) for other in others for port in (PORT, OTHER_PORT)],
            routes=[f"10.0.0.{node[-1]} (eth0)"],
            interfaces={"lo": "127.0.0.1", "eth0": f"10.0.0.{node[-1]}"},
            gpus=Gpus(error="there is no nvidia-smi"),
            directories=[
                Directory("/runs", "the run directory", "", "d1", 10**12, None, 200.0),
                Directory("/shards", "the shards", "", "d2", 10**12, 500.0),
            ],
        ),
        **changes,
    )


def evidence(reports=(), hosts=NODES, missing=(), **changes):
    """Healthy reports but for those given, and for the nodes that did not report."""
    given = {
        "request": Request(nodes=str(len(hosts))),
        "targets": [RUN, SHARDS],
        "folder": "/runs/.doctor/1",
        "job_id": "7",
        "port": PORT,
        "all_reduce": AllReduce(MEASURED),
    }
    everyones = {host: healthy(host, hosts) for host in hosts if host not in missing}
    if missing:
        given |= {"all_reduce": AllReduce(), "expect_all_reduce": False}
    return Evidence(hosts=hosts, reports=everyones | {report.node: report for report in reports}, **(given | changes))


def sentences(given, wrong=True):
    found = judge(given)
    assert [finding.wrong for finding in found] == sorted((finding.wrong for finding in found), reverse=True)
    return [finding.sentence for finding in found if finding.wrong == wrong]


def broken_links(node, *others, ports=(PORT, OTHER_PORT), error="timed out"):
    """A report in which links to `others` are broken."""
    links = [
        Link(link.to, link.port, error) if link.to in others and link.port in ports else link
        for link in healthy(node).links
    ]
    return healthy(node, links=links)


def test_nothing_is_wrong_with_healthy_nodes():
    assert judge(evidence()) == []


def test_a_report_survives_its_file():
    report = broken_links("node2", "node3")
    assert Report.from_json(report.to_json()) == report


def test_a_cut_node_is_one_sentence():
    reports = [broken_links(node, "node3") for node in NODES if node != "node3"]
    reports.append(broken_links("node3", "node1", "node2", "node4", error="no route to host"))
    assert sentences(evidence(reports)) == [
        "node3 cannot be reached from node1, node2, node4 (port 23456: timed out), and reaches none of them: check its "
        "link and its firewall"
    ]


def test_two_cut_nodes_are_two_sentences():
    cut = ["node2", "node3"]
    reports = [broken_links(node, *(other for other in cut if other != node)) for node in ("node1", "node4")]
    reports += [broken_links(node, *(other for other in NODES if other != node)) for node in cut]
    assert [sentence.partition(" (")[0] for sentence in sentences(evidence(reports))] == [
        "node2 cannot be reached from node1, node3, node4",
        "node3 cannot be reached from node1, node4",
    ]


def test_of_two_nodes_neither_is_to_blame():
    hosts = ["node1", "node2"]
    reports = [
        healthy("node1", hosts, links=[Link("node2", PORT, "timed out")]),
        healthy("node2", hosts, links=[Link("node1", PORT, "timed out")]),
    ]
    assert sentences(evidence(reports, hosts)) == [
        "node2 and node1 cannot reach each other (port 23456: timed out): check their links and firewalls"
    ]


def test_a_firewall_in_one_direction():
    reports = [broken_links(node, "node2", error="connection refused") for node in ("node1", "node3")]
    assert sentences(evidence(reports)) == [
        "node2 cannot be reached from node1, node3 (port 23456: connection refused): check its link and its firewall"
    ]


def test_a_node_that_reaches_nobody():
    assert sentences(evidence([broken_links("node2", "node1", "node4", error="no route to host")])) == [
        "node2 cannot reach node1, node4 (port 23456: no route to host): check its link and its firewall"
    ]


def test_links_that_are_broken_here_and_there():
    reports = [broken_links("node2", "node3"), broken_links("node4", "node3"), broken_links("node3", "node2", "node1")]
    assert sentences(evidence(reports)) == [
        "node3 cannot be reached from node2, node4 (port 23456: timed out), and does not reach node1, node2: check its "
        "link and its firewall"
    ]


def test_a_firewall_that_lets_only_the_rendezvous_pass():
    reports = [broken_links(node, "node2", ports=[OTHER_PORT]) for node in ("node1", "node3", "node4")]
    assert sentences(evidence(reports)) == [
        "node2 cannot be reached from node1, node3, node4 (port 40001: timed out): a firewall lets port 23456 pass "
        "and not this one, but gloo and NCCL listen on ports that the system chooses: open all of them between the "
        "nodes"
    ]


def test_another_host_that_answers():
    links = [Link("node2", PORT, answered="node4"), Link("node3", PORT, answered="another program")]
    assert sentences(evidence([healthy("node1", links=links)])) == [
        "node1 calls node2 on port 23456 and node4 answers: see what the name means there ('getent hosts node2'); two "
        "hosts may share a name or an address",
        "node1 calls node3 on port 23456 and another program answers: see what the name means there ('getent hosts "
        "node3'); two hosts may share a name or an address",
    ]


def test_a_missing_report_with_a_dead_link():
    hosts = NODES[:3]
    reports = [broken_links(node, "node3") for node in hosts[:2]]
    assert sentences(evidence(reports, hosts, missing=["node3"])) == [
        "node3 did not report, cannot be reached from node1, node2 (port 23456: timed out): check its link and its "
        "firewall, or do without it: --exclude node3"
    ]


def test_a_missing_report_that_slurm_explains():
    nodes = [Node("node1", "idle"), Node("node2", "down*", "Not responding")]
    assert sentences(evidence(hosts=NODES[:2], missing=["node2"], nodes=nodes)) == [
        "node2 did not report and is down* for Slurm (Not responding): check its link and its slurmd, or do without "
        "it: --exclude node2"
    ]


def test_a_missing_report_without_an_explanation():
    reports = [broken_links("node1", "node2", error="connection refused")]
    assert sentences(evidence(reports, NODES[:2], missing=["node2"])) == [
        "node2 did not report: see that it can read /runs/.doctor/1 (is that on a file system that all nodes share?) "
        "and the interpreter there; its log, if any, lies in the same place"
    ]


def test_a_node_that_hangs_is_known_by_its_last_stage():
    given = evidence([healthy("node2", stage="connected")], expect_all_reduce=False, all_reduce=AllReduce())
    assert sentences(given) == [
        "node2 hung while its GPUs and directories were looked at: log in there and look at its file systems (df) and "
        "name server; logs: /runs/.doctor/1"
    ]


def test_what_slurm_complained_of():
    given = evidence(
        hosts=[],
        ended="the job ended (FAILED) before its nodes had said all",
        complaints=["Task launch for StepId=7.0 failed on node node3: Communication connection failure"],
        nodes=[Node("node2", "idle"), Node("node3", "idle*"), Node("node4", "drained", "bad memory")],
    )
    assert sentences(given) == [
        "the job ended (FAILED) before its nodes had said all; Slurm says: Task launch for StepId=7.0 failed on node "
        "node3: Communication connection failure",
        "node3 is idle* for Slurm: check its link and its slurmd, or do without it: --exclude node3",
        "node4 is drained for Slurm (bad memory): 'scontrol update nodename=node4 state=resume' once it is mended, or "
        "do without: --exclude node4",
    ]


def test_of_a_job_that_was_torn_down_only_the_lost_node_is_blamed():
    ended = "Slurm has taken the job back and would start it anew (BeginTime)"
    nodes = [Node("node1", "idle"), Node("node2", "idle"), Node("node3", "down*", "Not responding")]
    assert sentences(evidence(hosts=NODES[:3], missing=NODES[:3], ended=ended, nodes=nodes)) == [
        "Slurm has taken the job back and would start it anew (BeginTime); it waited for node1, node2, node3",
        "node3 did not report and is down* for Slurm (Not responding): check its link and its slurmd, or do without "
        "it: --exclude node3",
    ]
    complaints = ["Task launch for StepId=7.0 failed on node node2: Communication connection failure"]
    given = evidence(hosts=NODES[:2], missing=NODES[:2], ended=ended, complaints=complaints)
    assert sentences(given)[1:] == [
        "node2 did not report, and Slurm could not start a task there: check its link and its slurmd, or do without "
        "it: --exclude node2"
    ]


def test_a_node_that_the_job_did_without_is_a_note():
    given = evidence(hosts=NODES[:2], nodes=[Node("node3", "down*", "Not responding")])
    assert sentences(given) == []
    assert sentences(given, wrong=False) == [
        "node3 is down* for Slurm (Not responding): check its link and its slurmd, or do without it: --exclude node3"
    ]


@pytest.mark.parametrize(
    "states, request_of, wanted, excluded, expected",
    [
        (["idle"] * 4, Request(nodes="4"), [], [], ""),
        (["idle", "idle", "idle", "down*"], Request(nodes="3"), [], [], ""),
        (["idle", "idle", "idle", "down*"], Request(nodes="2-4"), [], [], ""),
        (["allocated", "mixed", "idle~", "completing"], Request(nodes="4"), [], [], ""),
        (
            ["idle", "idle", "idle", "down*"],
            Request(nodes="4"),
            *([], []),
            "the job cannot start: it asks for 4 node(s), and of 4 only 3 can be used (not node4)",
        ),
        (
            ["idle", "idle", "drained", "idle*"],
            Request(nodes="2"),
            *([], ["node1"]),
            "the job cannot start: it asks for 2 node(s), and of 4 only 1 can be used (not node1, node3, node4)",
        ),
        (
            ["idle", "idle", "idle", "down"],
            Request(nodes="1"),
            *(["node4"], []),
            "the job cannot start: it asks for node4 by name (--nodelist), and Slurm starts nothing there",
        ),
    ],
)
def test_whether_a_job_would_wait_for_ever(states, request_of, wanted, excluded, expected):
    nodes = [Node(name, state) for name, state in zip(NODES, states, strict=True)]
    assert findings.blocked(nodes, request_of, wanted, excluded) == expected


def test_names_that_are_not_known():
    names = healthy("node1").names | {"node3": Name(error="name or service not known")}
    again = healthy("node2").names | {"node3": Name(error="name or service not known")}
    assert sentences(evidence([healthy("node1", names=names), healthy("node2", names=again)])) == [
        "node1, node2 cannot resolve the name node3 (name or service not known): add it to the name server or to "
        "/etc/hosts there"
    ]


def test_names_that_mean_the_machine_itself():
    names = healthy("node1").names | {"node2": Name(["127.0.1.1"], "node2")}
    own = Name(["127.0.1.1"], "node2")
    assert sentences(evidence([healthy("node1", names=names), healthy("node2", own=own)])) == [
        "on node1 the name node2 means 127.0.1.1, the machine itself: mend /etc/hosts there",
        "node2 takes its own name node2 for 127.0.1.1, a loopback address, where no other node finds it: mend its "
        "/etc/hosts, or set GLOO_SOCKET_IFNAME to one of its interfaces (eth0 10.0.0.2)",
    ]


def test_a_loopback_name_is_harmless_on_one_node_and_where_the_interface_is_set():
    alone = evidence([healthy("node1", ["node1"], own=Name(["127.0.1.1"]))], ["node1"])
    assert sentences(alone) == []
    assert sentences(alone, wrong=False) == [
        "node1 takes its own name node1 for 127.0.1.1, a loopback address, harmless on one node: mend its /etc/hosts, "
        "or set GLOO_SOCKET_IFNAME to one of its interfaces (eth0 10.0.0.1)"
    ]
    variables = {"GLOO_SOCKET_IFNAME": "eth0"}
    assert judge(evidence([healthy("node2", own=Name(["127.0.1.1"]), variables=variables)])) == []


def test_addresses_that_belong_to_another_node_or_to_nobody():
    names = healthy("node1").names | {"node2": Name(["10.0.0.3"], "node3.cluster"), "node4": Name(["10.0.0.4"])}
    given = evidence([healthy("node1", names=names)])
    assert sentences(given) == [
        "on node1 the name node2 means 10.0.0.3, but that address means node3.cluster: two nodes share an address, or "
        "the name server is out of date"
    ]
    assert sentences(given, wrong=False) == [
        "the addresses of node4 have no name on node1: harmless, but messages will show addresses alone"
    ]


@pytest.mark.parametrize(
    "variable, value, known",
    [
        ("GLOO_SOCKET_IFNAME", "eth0", True),
        ("GLOO_SOCKET_IFNAME", "eth", False),
        ("NCCL_SOCKET_IFNAME", "eth", True),
        ("NCCL_SOCKET_IFNAME", "=eth", False),
        ("NCCL_SOCKET_IFNAME", "ib,eth0", True),
        ("NCCL_SOCKET_IFNAME", "^docker", True),
        ("NCCL_SOCKET_IFNAME", "ib", False),
    ],
)
def test_an_interface_that_is_not_there(variable, value, known):
    expected = [
        f"{variable}={value} names no interface of node2, which has eth0 10.0.0.2: correct it in the profile's setup "
        "or your shell"
    ]
    given = evidence([healthy("node2", variables={variable: value})])
    assert sentences(given) == ([] if known else expected)


def test_the_loopback_interface_keeps_ranks_apart():
    reports = [healthy(node, variables={"GLOO_SOCKET_IFNAME": "lo"}) for node in NODES]
    assert sentences(evidence(reports)) == [
        "GLOO_SOCKET_IFNAME=lo on node1, node2, node3, node4 keeps the ranks on their own node: name another interface"
    ]


def test_the_rendezvous_port_in_use():
    given = evidence([healthy("node1", port_error="address already in use")])
    assert sentences(given) == [
        "node1 cannot listen on the rendezvous port 23456 (address already in use): see who does with 'ss -ltnp', or "
        "submit again: each job has another port"
    ]
    assert sentences(evidence([healthy("node2", port_error="address already in use")])) == []


def test_directories_that_cannot_be_used():
    gone = [Directory("/runs", "the run directory", "permission denied", "d1", 10**12), healthy("node2").directories[1]]
    also = [healthy("node3").directories[0], Directory("/shards", "the shards", "no such file or directory")]
    assert sentences(evidence([healthy("node2", directories=gone), healthy("node3", directories=also)])) == [
        "the run directory at /runs cannot be used on node2 (permission denied): see that it is on a file system which "
        "every node mounts, and may be read and written",
        "the shards at /shards cannot be used on node3 (no such file or directory): see that it is on a file system "
        "which every node mounts, and may be read",
    ]


def directories(**changes):
    run, shards = healthy("node1").directories
    return [run, dataclasses.replace(shards, **changes)]


def test_other_bytes_under_the_same_path():
    given = evidence([healthy("node2", directories=directories(digest="other"))])
    assert sentences(given) == [
        "/shards on node2 is not what it is on the host that submitted (dataset.json differs): the nodes must share "
        "its file system, or hold the same copy"
    ]
    not_visible_here = dataclasses.replace(SHARDS, digest="")
    given = evidence([healthy("node2", directories=directories(digest="other"))], targets=[RUN, not_visible_here])
    assert sentences(given)[0].startswith("/shards on node2 is not what it is on node1 (")


def test_a_full_disk():
    run, shards = healthy("node2").directories
    given = evidence([healthy("node2", directories=[dataclasses.replace(run, free_bytes=310_000_000), shards])])
    assert sentences(given) == [
        "node2 has 0.31 GB free for the run directory at /runs, and a run wants 2 GB: make room, or choose another "
        "place"
    ]


def test_slow_shards_are_a_note():
    reports = [healthy("node2", directories=directories(read_mb_per_s=8.0))]
    reports.append(healthy("node4", directories=directories(read_mb_per_s=10.0)))
    assert sentences(evidence(reports)) == []
    assert sentences(evidence(reports), wrong=False) == [
        "/shards is read with 8 MB/s on node2, node4, enough for 460 s of audio a second: for more, set data.cache_dir "
        "to a disk of the node"
    ]


def test_gpus():
    two = Request(nodes="4", gpus_per_node=2)
    seen = Gpus(["NVIDIA H100"] * 2, "550.54", "0,1")
    reports = [
        healthy("node1", gpus=seen),
        healthy("node2", gpus=Gpus(["NVIDIA H100"], "550.54", "0,1")),
        healthy("node3", gpus=Gpus(["NVIDIA A100"] * 2, "535.10", "0")),
        healthy("node4"),
    ]
    measured = MEASURED | {"ranks": [{"host": n, "device": "cpu" if n == "node4" else "cuda:0"} for n in NODES]}
    given = evidence(reports, request=two, all_reduce=AllReduce(measured))
    assert sentences(given) == [
        "node2 shows 1 GPU(s) to the job, which asked for 2: see 'nvidia-smi' and 'dmesg' there for one that fell off "
        "the bus",
        "node3 gives the job the GPUs CUDA_VISIBLE_DEVICES=0, which asked for 2: see that your shell or the profile's "
        "setup does not set it",
        "no working GPU on node4 (there is no nvidia-smi): install or mend the NVIDIA driver there",
        "torch sees no GPU on node4: see that its build is one for CUDA (python -c 'import torch; "
        "print(torch.version.cuda)') and fits the driver",
    ]
    assert sentences(given, wrong=False) == [
        "the nodes have different drivers: 535.10, 550.54",
        "the nodes have different GPUs: NVIDIA A100, NVIDIA H100",
    ]
    assert judge(evidence(reports)) == []  # a job that asks for none


def test_an_all_reduce_that_fails_or_says_nothing():
    failed = AllReduce(None, {5: "later", 3: "it did not end within 54 s"})
    request = Request(nodes="4", tasks_per_node=2)
    assert sentences(evidence(all_reduce=failed, request=request)) == [
        "the all-reduce failed on rank 3 of node2: it did not end within 54 s"
    ]
    assert sentences(evidence(all_reduce=AllReduce())) == [
        "the all-reduce left no result: see the logs in /runs/.doctor/1"
    ]


# ---- what a node finds out -----------------------------------------------------------------------------------------


def test_a_function_that_hangs_is_left_behind():
    release = threading.Event()
    assert probes.bounded(release.wait, 0.05, otherwise="late") == "late"
    release.set()
    assert probes.bounded(lambda: "here", 10, otherwise="late") == "here"
    with pytest.raises(ZeroDivisionError):
        probes.bounded(lambda: 1 // 0, 10, otherwise=0)


def test_names_of_this_machine():
    found = probes.resolve_all(["localhost", "no-such-host.invalid"], limit_s=30)
    assert found["localhost"].loopback and found["localhost"].back and not found["localhost"].error
    assert found["no-such-host.invalid"].error and not found["no-such-host.invalid"].addresses
    assert probes.interfaces()["lo"] == "127.0.0.1"
    assert probes.route_to("127.0.0.1") == "127.0.0.1"


def test_a_listener_is_reached_by_name_on_both_ports():
    with Listener("localhost", free_port()) as listener:
        assert listener.error == "" and len(listener.ports) == 2
        wanted = [("localhost", port) for port in listener.ports]
        assert probes.reach_all(wanted, 20) == [
            Link("localhost", port, answered="localhost") for port in listener.ports
        ]


def answer_once(listening):
    caller, _ = listening.accept()
    with caller:
        caller.sendall(b"HTTP/1.1 400 Bad Request\r\n")


def test_a_port_that_is_taken_closed_or_another_programs():
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        with Listener("here", port) as listener:
            assert listener.error == "address already in use" and len(listener.ports) == 1
        answering = threading.Thread(target=answer_once, args=[taken])
        answering.start()
        assert probes.reach("localhost", port, 20).answered == "another program"
        answering.join()
    assert probes.reach("localhost", port, 0.5) == Link("localhost", port, "connection refused")
    with socket.create_server(("", port)):
        pass  # a listener that has ended leaves its port to the rendezvous


def test_a_port_that_never_answers_is_given_up():
    with socket.create_server(("", 0)) as silent:
        port = silent.getsockname()[1]
        assert probes.reach("localhost", port, 0.5) == Link("localhost", port, "timed out")


def executable(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    "script, expected",
    [
        ("echo 'NVIDIA H100, 550.54'; echo 'NVIDIA H100, 550.54'", Gpus(["NVIDIA H100"] * 2, "550.54", "0,1")),
        (
            "echo 'NVIDIA-SMI has failed'; exit 9",
            Gpus(given="0,1", error="nvidia-smi: NVIDIA-SMI has failed"),
        ),
        ("exec sleep 60", Gpus(given="0,1", error="nvidia-smi: no answer within 0.5 s")),
        (None, Gpus(given="0,1", error="there is no nvidia-smi")),
    ],
)
def test_gpus_by_nvidia_smi(script, expected, tmp_path, monkeypatch):
    if script:
        executable(tmp_path / "nvidia-smi", script)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin" if script else str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert probes.gpus(limit_s=0.5 if script and "sleep" in script else 30) == expected


def test_a_directory_is_looked_at(tmp_path):
    (tmp_path / "dataset.json").write_text("{}")
    (tmp_path / "shard-000000.tar").write_bytes(b"x")
    (tmp_path / "shard-000001.tar").write_bytes(os.urandom(1 << 20))
    target = Target(str(tmp_path), "the shards", "dataset.json", read=True, write=True)
    found = probes.look_at(target, "node1", 60)
    assert found.error == "" and found.digest == probes.digest_of(tmp_path / "dataset.json")
    assert found.read_mb_per_s > 0 and found.write_mb_per_s > 0 and found.free_bytes > 0
    assert sorted(os.listdir(tmp_path)) == ["dataset.json", "shard-000000.tar", "shard-000001.tar"]


def test_a_file_that_appears_late_is_waited_for(tmp_path):
    threading.Timer(0.3, lambda: (tmp_path / "token").write_text("late")).start()
    found = probes.look_at(Target(str(tmp_path), "the run directory", "token"), "node1", 60)
    assert found.error == "" and found.digest == probes.digest_of(tmp_path / "token")


@pytest.mark.parametrize(
    "target, error",
    [
        (Target("missing", "x", "dataset.json"), "no such file or directory"),
        (Target("empty", "x", read=True), "it holds no *.tar"),
        (Target("file/cache", "x", write=True), ""),
        (Target("new/cache", "x", write=True), ""),
    ],
)
def test_directories_with_something_amiss(target, error, tmp_path):
    (tmp_path / "empty").mkdir()
    found = probes.look_at(dataclasses.replace(target, path=str(tmp_path / target.path)), "node1", 60)
    assert found.error == error and found.free_bytes > 0


def test_a_directory_that_never_answers_is_given_up(tmp_path):
    os.mkfifo(tmp_path / "dataset.json")  # opening it waits for a writer, as an NFS server that is away is waited for
    target = Target(str(tmp_path), "the shards", "dataset.json", read=True)
    found = examination.look_at_all([target, Target(str(tmp_path), "x")], "node1", 2.0)
    assert found[0] == Directory(str(tmp_path), "the shards", "no answer within 1 s") and found[1].error == ""
    with (tmp_path / "dataset.json").open("w"):
        pass  # lets the thread go


def test_digests_tell_files_apart_by_both_ends_and_size(tmp_path):
    big = bytes(3 * probes.ENDS_BYTES)
    contents = [b"", b"a", big, big[:-1] + b"x", b"x" + big[1:], big + b"\0"]
    for number, content in enumerate(contents):
        (tmp_path / str(number)).write_bytes(content)
    assert len({probes.digest_of(tmp_path / str(number)) for number in range(len(contents))}) == len(contents)


# ---- nodes together ------------------------------------------------------------------------------------------------


def test_nodes_meet_at_the_desk_and_try_each_other(tmp_path):
    """Two names of this machine stand for two nodes."""
    desk, port = Desk(tmp_path), free_port()
    names = ["localhost", "127.0.0.1"]
    with Listener(names[1], port) as listener:
        desk.report(Report(names[1], "arrived", listener.ports))
        known = desk.wait_for(lambda reports: len(reports) == 1, 10)
        mine = Report(names[0], "arrived", [], hostname="localhost", interfaces={"lo": "127.0.0.1"})
        report = examination.connect(mine, [names[1]], known, port, limit_s=20)
    assert report.stage == "connected" and report.own.loopback
    assert report.links == [Link(names[1], number, answered=names[1]) for number in listener.ports]
    assert report.routes == ["127.0.0.1 (lo)"]
    assert sorted(os.listdir(tmp_path)) == ["127.0.0.1.node.json"]


def test_a_node_that_has_not_arrived_is_tried_on_the_rendezvous_port():
    port = free_port()
    report = examination.connect(Report("here", "arrived", []), ["localhost"], {}, port, limit_s=0.5)
    assert report.links == [Link("localhost", port, "connection refused")]


def test_the_desk_waits_no_longer_than_it_may(tmp_path):
    assert Desk(tmp_path).wait_for(lambda reports: len(reports) == 2, 0.3) == {}


def test_whether_an_all_reduce_is_worth_trying():
    reports = {node: healthy(node) for node in NODES}
    assert examination.why_not(NODES, reports) == ""
    assert examination.why_not([*NODES, "node5"], reports) == "node5 did not report"
    assert examination.why_not(NODES, reports | {"node2": healthy("node2", stage="arrived")}) == "node2 hangs"
    assert examination.why_not(NODES, reports | {"node2": broken_links("node2", "node4")}) == "node2 cannot reach node4"
    taken = reports | {"node1": healthy("node1", port_error="address already in use")}
    assert examination.why_not(NODES, taken) == "node1 cannot listen"


def test_why_an_all_reduce_failed():
    why = examination._why_failed
    assert why(0, "", 5) == ""
    assert why(-14, "", 5) == "it did not end within 5 s"
    assert why(2, "noise\nerror: rank 0 could not meet\n[W] more noise\n", 5) == "rank 0 could not meet"
    assert why(1, "Traceback\nImportError: no torch\n", 5) == "ImportError: no torch"
    assert why(1, "", 5) == "exit code 1"


# ---- bandwidth -----------------------------------------------------------------------------------------------------


def test_the_bus_bandwidth_is_that_of_nccl_tests():
    assert bandwidth.bandwidth(1_000_000_000, 0.5, 4) == {
        "bytes": 1_000_000_000,
        "seconds": 0.5,
        "bus_gb_per_s": pytest.approx(3.0),
    }
    assert bandwidth.bandwidth(1024, 0.0, 1)["bus_gb_per_s"] is None


def start_bandwidth(rank, world_size, port, *arguments):
    place = Place(rank, world_size, rank, ("localhost",), "1", 1).environment() | {"MASTER_PORT": str(port)}
    return subprocess.Popen(
        [sys.executable, "-m", "ddp_asr.bandwidth", *arguments],
        cwd=REPOSITORY,
        env=os.environ | place,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_two_ranks_time_their_all_reduces():
    port = free_port()
    ranks = [start_bandwidth(rank, 2, port, "--sizes-mib", "1,2", "--repeats", "2") for rank in (0, 1)]
    printed = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], printed
    lines = [line for line in printed[0].splitlines() if line.startswith("{")]
    measured = json.loads(lines[0])
    assert measured["world_size"] == 2 and len(measured["ranks"]) == 2 and len(lines) == 1
    assert [size["bytes"] for size in measured["sizes"]] == [1 << 20, 2 << 20]
    assert all(size["bus_gb_per_s"] > 0 for size in measured["sizes"])
    assert not [line for line in printed[1].splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_a_rank_that_never_comes_is_named_within_the_limit():
    rank = start_bandwidth(0, 2, free_port(), "--limit-s", "8")
    assert "error: rank 0 could not meet the other 1 rank(s)" in rank.communicate(timeout=60)[0]
    assert rank.returncode == 2


@pytest.mark.parametrize("arguments", [["--sizes-mib", "1,0"], ["--repeats", "-1"], ["--limit-s", "soon"]])
def test_sizes_and_limits_are_checked(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        bandwidth.main(arguments)
    assert "must be a whole number above 0, not" in capsys.readouterr().err


# ---- the doctor's job ----------------------------------------------------------------------------------------------


class ScriptedJob(doctor._Job):
    """A job whose states are given one by one; the last one stays."""

    def __init__(self, folder, states, nodes=(), request=None):
        (folder / "desk").mkdir()
        super().__init__(Submission(folder, ["7"]), request or Request(nodes="2"), Desk(folder / "desk"))
        self.states, self.given_nodes, self.cancelled = list(states), list(nodes), False

    def state(self):
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def nodes(self):
        return self.given_nodes

    def hosts(self):
        return ["node1", "node2"]

    def _cancel(self, number):
        self.cancelled = True
        self.states = [JobState("CANCELLED")]


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(doctor, "ASK_SLURM_EVERY_S", 0.05)
    monkeypatch.setattr(doctor, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(doctor, "BLOCKED_FOR_S", 0.2)
    monkeypatch.setattr(doctor, "LAST_WORDS_S", 0.2)


PENDING, RUNNING = JobState("PENDING", "Priority"), JobState("RUNNING")


def test_a_job_is_waited_for_until_its_nodes_have_said_all(tmp_path, impatient, capsys):
    job = ScriptedJob(tmp_path, [PENDING, PENDING, RUNNING])
    threading.Timer(0.5, lambda: job.desk.decide("node2 did not report")).start()
    assert job.wait(60) == ""
    assert capsys.readouterr().err == ("job 7 waits (Priority); Ctrl-C takes it back\njob 7 runs on node1, node2\n")
    job.states = [JobState("COMPLETED")]
    job.leave()
    assert not job.cancelled


def test_an_all_reduce_is_waited_for_where_it_was_decided_on(tmp_path, impatient):
    job = ScriptedJob(tmp_path, [RUNNING])
    job.desk.decide("")
    threading.Timer(
        0.5, lambda: job.desk.put("all-reduce-0.json", json.dumps({"rank": 0, "error": "", "measured": MEASURED}))
    ).start()
    assert job.wait(60) == "" and job.desk.all_reduce() == AllReduce(MEASURED)


@pytest.mark.parametrize(
    "states, expected",
    [
        ([RUNNING], "not every node had said all within 0.5 s (--timeout)"),
        (
            [RUNNING, JobState("PENDING", "BeginTime")],
            "Slurm has taken the job back and would start it anew (BeginTime)",
        ),
        ([RUNNING, JobState("NODE_FAIL")], "the job ended (NODE_FAIL) before its nodes had said all"),
        (
            [JobState("PENDING", "PartitionConfig")],
            "Slurm holds the job back for good (PartitionConfig): compare it with 'scontrol show partition'",
        ),
        (
            [JobState("PENDING", "Resources")],
            "the job cannot start: it asks for 2 node(s), and of 2 only 1 can be used (not node2)",
        ),
    ],
)
def test_a_job_that_is_waited_for_in_vain(tmp_path, impatient, states, expected):
    job = ScriptedJob(tmp_path, states, [Node("node1", "idle"), Node("node2", "down*", "Not responding")])
    assert job.wait(0.5) == expected
    if job.states[0].living:
        job.leave()
        assert job.cancelled


def test_what_slurm_writes_into_the_logs(tmp_path):
    (tmp_path / "7_0_log.out").write_text(
        "submitit INFO\n"
        "srun: error: Task launch for StepId=7.0 failed on node node3: Communication connection failure\n"
        "srun: error: Application launch failed: Communication connection failure\nsrun: Job step aborted\n"
        "srun: error: node2: task 1: Killed\nsrun: error: node[1,4]: tasks 0,3: Exited with exit code 1\n"
        "slurmstepd: error: *** JOB 7 ON node1 CANCELLED AT 2026-01-01T00:00:00 ***\n"
    )
    assert doctor.complaints(tmp_path) == [
        "Task launch for StepId=7.0 failed on node node3: Communication connection failure",
        "Application launch failed: Communication connection failure",
    ]


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", ["0", "soon", "nan", "1e9"])
def test_the_timeout_is_checked(seconds, capsys):
    with pytest.raises(SystemExit, match="2"):
        doctor.main(["--timeout", seconds])
    assert "must be a number of seconds from 1 to 86400" in capsys.readouterr().err


def test_a_place_for_the_job_that_cannot_be_written(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write .*runs.*choose a directory that you may write and all nodes"):
        doctor.main(["--cluster", "local", f"--run.dir={tmp_path}/runs"])


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(
        UserError, match=r"cannot write .*--path takes directories of shards, and such as you may write"
    ):
        doctor.main(["--cluster", "local", f"--run.dir={tmp_path}/runs", "--path", str(tmp_path / "gone")])
    assert os.listdir(tmp_path / "runs") == []


def test_a_refused_job_leaves_nothing_behind(tmp_path, monkeypatch):
    executable(tmp_path / "sbatch", "echo 'sbatch: error: Batch job submission failed: Invalid partition' >&2; exit 1")
    executable(tmp_path / "srun", "exit 0")  # submitit looks for it
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(UserError, match="Slurm refused the job"):
        doctor.main([f"--run.dir={tmp_path}/runs", "--partition", "nope"])
    assert os.listdir(tmp_path / "runs") == []


WIDE = os.environ | {"COLUMNS": "200"}


def call(*arguments):
    command = [sys.executable, "-m", "launch.doctor", "--cluster", "local", *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, check=False, env=WIDE)


@pytest.mark.slow
def test_this_machine_is_examined(tmp_path, tiny_corpus):
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"run: {{dir: {tmp_path}/runs}}\ndata: {{train: [{tiny_corpus.train}], test: []}}\n")
    (tmp_path / "mine").mkdir()
    answer = call("--config", settings, "--tasks-per-node", 2, "--path", tmp_path / "mine", "--json")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    found = json.loads(answer.stdout)
    assert found["ok"] and found["wrong"] == []
    assert found["all_reduce"]["measured"]["world_size"] == 2
    (report,) = found["nodes"].values()
    assert report["stage"] == "done" and report["node"] == socket.gethostname() == found["hosts"][0]
    by_what = {directory["what"]: directory for directory in report["directories"]}
    assert by_what["the shards"]["read_mb_per_s"] > 0 and by_what["the run directory"]["write_mb_per_s"] > 0
    assert by_what["the directory"]["write_mb_per_s"] > 0
    assert os.listdir(tmp_path / "mine") == os.listdir(tmp_path / "runs") == []


@pytest.mark.slow
def test_what_is_wrong_with_this_machine_is_said(tmp_path):
    answer = call(f"--run.dir={tmp_path}/runs", f"--data.train={tmp_path}/gone", "--data.test=")
    assert answer.returncode == 1, answer.stdout + answer.stderr
    lines = answer.stdout.splitlines()
    assert lines[-1].startswith("1 thing(s) wrong; logs: ")
    assert [line for line in lines if line.startswith("wrong: ")] == [
        f"wrong: the shards at {tmp_path}/gone cannot be used on {socket.gethostname()} (no such file or directory): "
        "see that it is on a file system which every node mounts, and may be read"
    ]
    assert lines[2].startswith(socket.gethostname())
    assert list((tmp_path / "runs" / ".doctor").glob("*/*_0_log.out"))


@pytest.mark.slow
def test_ctrl_c_takes_the_job_back(tmp_path):
    command = [sys.executable, "-m", "launch.doctor", "--cluster", "local", f"--run.dir={tmp_path}/runs"]
    with subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background shell ignores it
    ) as asked:
        first = asked.stderr.readline()
        controller = int(re.match(r"job (\d+);", first)[1])
        asked.send_signal(signal.SIGINT)
        assert asked.wait(timeout=60) == 130
        assert asked.stderr.read().endswith("interrupted\n")
    assert not Path(f"/proc/{controller}").exists()
    assert os.listdir(tmp_path / "runs") == []


def test_the_table_shows_every_node():
    shown = doctor._as_text(evidence(), judge(evidence()))
    assert all(node in shown for node in NODES) and "3 of 3" in shown
    assert "all-reduce  4 rank(s) on cpu: 1 MiB 1.0 ms, 1.50 GB/s (bus bandwidth)" in shown
    assert shown.endswith("nothing is wrong with 4 node(s), 4 rank(s)")


def test_an_examination_is_picklable_by_name():
    import pickle

    examination_of_run = Examination(Path("/desk"), (RUN,), 180.0)
    assert pickle.loads(pickle.dumps(examination_of_run)) == examination_of_run
