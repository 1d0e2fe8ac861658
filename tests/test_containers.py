"""Both images are made of the same; the TrainJob's command resumes when it is started as Kubeflow Trainer starts it."""

import configparser
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ddp_asr.runs.directory import read_status
from tests import tiny_training as tiny
from tests.conftest import REPOSITORY
from tests.test_wheel import SOURCES

DOCKERFILE = (REPOSITORY / "containers/Dockerfile").read_text(encoding="utf-8")
APPTAINER = (REPOSITORY / "containers/ddp_asr.def").read_text(encoding="utf-8")
RUNTIME, JOB = yaml.safe_load_all((REPOSITORY / "kubernetes/trainjob.yaml").read_text(encoding="utf-8"))


def test_both_images_install_the_same():
    pip = [re.search(r"pip install .*", text).group() for text in (DOCKERFILE, APPTAINER)]
    assert pip[0] == pip[1]
    apt = [re.search(r"apt-get install --yes [^\\\n]*", text).group().strip() for text in (DOCKERFILE, APPTAINER)]
    assert apt[0] == apt[1]
    base = re.search(r"^FROM (\S+)", DOCKERFILE, re.M).group(1)
    assert re.search(r"^From: (\S+)", APPTAINER, re.M).group(1) == base
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    assert set(re.search(r"\[(.*)\]", pip[0]).group(1).split(",")) <= set(setup["options.extras_require"])


def test_both_images_get_all_that_the_wheel_is_built_of():
    copied = re.findall(r"^COPY (.*) /src/\S*$", DOCKERFILE, re.M)
    wanted = {*SOURCES, "constraints.txt"}
    assert {name for line in copied for name in line.split()} == wanted
    files = APPTAINER.split("%files\n")[1].split("\n\n")[0]
    assert {line.split()[0] for line in files.splitlines()} == wanted
    ignored = (REPOSITORY / ".dockerignore").read_text(encoding="utf-8").split()
    assert {line[1:] for line in ignored if line.startswith("!")} == wanted


def test_the_job_is_one_of_its_runtime():
    assert JOB["spec"]["runtimeRef"] == {"kind": RUNTIME["kind"], "name": RUNTIME["metadata"]["name"]}
    (job,) = RUNTIME["spec"]["template"]["spec"]["replicatedJobs"]
    assert job["template"]["spec"]["backoffLimit"] == 0
    config = JOB["spec"]["trainer"]["command"][-1]
    assert (REPOSITORY / config).is_file()


def start_nodes(runs: Path, arguments: list[str]) -> list[subprocess.Popen]:
    """Two nodes of one rank each, with the variables that Kubeflow Trainer sets for torchrun."""
    program, *command = JOB["spec"]["trainer"]["command"][:-2]
    nodes = []
    trainer = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(tiny.free_port())}
    for rank in ("0", "1"):
        environment = os.environ | {f"PET_{name}": value for name, value in (trainer | {"NODE_RANK": rank}).items()}
        with (runs.parent / f"node-{rank}.log").open("a") as log:
            words = [Path(sys.executable).parent / program, *command, *arguments]
            nodes.append(subprocess.Popen(words, env=environment, stdout=log, stderr=log, cwd=REPOSITORY))
    return nodes


def children(process: subprocess.Popen) -> list[int]:
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [pid for pid in map(int, listed) if tiny.is_alive(pid)]


@pytest.mark.slow
def test_an_eviction_of_one_node_stops_all_and_the_restart_goes_on(tiny_corpus, tmp_path):
    straight = start_nodes(tmp_path / "runs", tiny_corpus.arguments(tmp_path / "runs", "straight"))
    assert [node.wait() for node in straight] == [0, 0]
    arguments = tiny_corpus.arguments(tmp_path / "runs", "evicted")
    nodes = start_nodes(tmp_path / "runs", arguments)
    tiny.wait_until(lambda: tiny.lines_of(tmp_path / "runs/evicted") > 2, "the first steps")
    nodes[1].send_signal(signal.SIGTERM)
    assert nodes[1].wait() != 0, "the evicted pod must fail, or its job would count as complete"
    # The controller then deletes the other pods of the failed job. Their torchrun waits 300 s for the one that has gone
    # and answers no signal meanwhile, so it is killed when the grace period is over, long after its rank has ended.
    tiny.wait_until(lambda: not children(nodes[0]), "the end of the other node's rank")
    nodes[0].kill()
    nodes[0].wait()
    assert read_status(tmp_path / "runs/evicted")["state"] == "stopped"
    again = start_nodes(tmp_path / "runs", arguments)
    assert [node.wait() for node in again] == [0, 0]
    straight, evicted = (tiny.final_state(tmp_path / "runs" / name) for name in ("straight", "evicted"))
    assert tiny.differences(evicted, straight) == []
