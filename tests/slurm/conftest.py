"""Tests on a real Slurm: `make test-slurm`, on any Debian machine, as root, in namespaces of its own (cluster.sh).

The cluster comes up once, with four nodes, and goes down at the end, also after Ctrl-C. Where it cannot be, the tests
are skipped with the reason. `SLURM_CLUSTER_KEEP=1` leaves it up for the next time, and for a look with
`eval "$(tests/slurm/cluster.sh env)"`. A plain `pytest` does not come here (`norecursedirs` in pyproject.toml).

A test that fails shows the jobs' logs and the daemons' last lines.
"""

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests import tiny_training as tiny
from tests.slurm import harness


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and harness.STATE.exists():
        report.sections.extend(harness.evidence(item.funcargs.get("tmp_path")))
    return report


@pytest.fixture(scope="session", autouse=True)
def the_cluster():
    """Up with four nodes as long as the session lasts."""
    keep = os.environ.get("SLURM_CLUSTER_KEEP") == "1"
    _skip_where_impossible(harness.run_script("check"))
    # kill, as Ctrl-C does, with what is below still to come.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    with socket.socket(socket.AF_UNIX) as alone:
        try:
            alone.bind(f"\0{harness.STATE}")  # no file: free again however this process ends
        except OSError:
            pytest.exit(f"another run of these tests has the cluster in {harness.STATE}: wait for it", returncode=1)
        try:
            if not keep:
                harness.cluster("down")  # what an earlier run has left that was killed
            _skip_where_impossible(harness.run_script("up", "4"))
            os.environ["SLURM_CONF"] = str(harness.STATE / "etc" / "slurm.conf")
            yield
        finally:
            os.environ.pop("SLURM_CONF", None)
            signal.signal(signal.SIGTERM, before)
            if not keep:
                harness.cluster("down")


def _skip_where_impossible(answer: subprocess.CompletedProcess) -> None:
    if answer.returncode == 3:
        pytest.skip(answer.stderr.strip())
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.fixture(autouse=True)
def calm(the_cluster):
    """After each test: no jobs, and all nodes idle."""
    yield
    harness.clear_queue()
    harness.cluster("heal")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, tiny_corpus):
    """Gives the run directory of an undisturbed training on so many ranks of this machine, without Slurm."""
    runs, done = tmp_path_factory.mktemp("undisturbed"), set()

    def of(processes: int) -> Path:
        if processes not in done:
            tiny.train(tiny_corpus.arguments(runs, f"w{processes}"), processes)
            done.add(processes)
        return runs / f"w{processes}"

    return of
