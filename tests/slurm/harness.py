"""What the tests on the real cluster are written with: the cluster, jobs, gates in their training, and evidence.

    gate = Gate(directory).hold(5)                                   # rank 0 will wait before step 5
    job = submit(corpus, runs, Shape(nodes="2", ranks=2), gate=gate)
    job.held(5)                                                      # returns when it does
    preempt()                                                        # a job in partition `main` takes all nodes
    job.succeed()

Tests wait for what happens and never for a time. The limits are far above what anything takes, and a job that ends
while a test waits for something else fails the test at once. Both launchers start the same torchrun from node.py, so
only what their batch scripts do (start, stop, conclude, cancel) is tested with both.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ddp_asr.runs import checkpoint
from launch import cluster as slurm
from tests.conftest import REPOSITORY
from tests.tiny_training import TinyCorpus

SCRIPT = Path(__file__).with_name("cluster.sh")
STATE = Path(os.environ.get("SLURM_CLUSTER_DIR", "/var/tmp/ddp-asr-slurm"))
GATE_CODE = Path(__file__).with_name("gate")
# Short, so that pre-emptions and lost nodes take seconds.
SWITCHES = {"SLURM_CLUSTER_REQUEUE_WAIT": "5", "SLURM_CLUSTER_GRACE": "10", "SLURM_CLUSTER_NODE_TIMEOUT": "6"}
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL")
LIMIT_S = 150.0


# ---- the cluster ---------------------------------------------------------------------------------------------------


def run_script(*command: str) -> subprocess.CompletedProcess:
    """Runs cluster.sh."""
    switches = {**os.environ, **SWITCHES}
    return subprocess.run([SCRIPT, *command], env=switches, capture_output=True, text=True, check=False)


def cluster(*command: str) -> None:
    """Runs cluster.sh; fails with what it said."""
    answer = run_script(*command)
    assert answer.returncode == 0, f"cluster.sh {' '.join(command)}: {answer.stdout}{answer.stderr}"


def ask(*command: str) -> str:
    """What a Slurm command prints."""
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, f"{' '.join(command)}: {answer.stdout}{answer.stderr}"
    return answer.stdout.strip()


def node_state(node: str) -> str:
    """idle, mixed, allocated, down*, ..."""
    return ask("sinfo", "-h", "-N", "-n", node, "-p", "main", "-o", "%T")


def warn_with_user_signal(on: bool) -> None:
    """Whether a pre-emption is announced by the signal of `--signal` instead of SIGTERM, from now on."""
    conf = STATE / "etc" / "slurm.conf"
    lines = [line for line in conf.read_text().splitlines() if not line.startswith("SlurmctldParameters=")]
    conf.write_text("\n".join([*lines, *(["SlurmctldParameters=preempt_send_user_signal"] if on else [])]) + "\n")
    ask("scontrol", "reconfigure")


def clear_queue() -> None:
    """Cancels every job and returns when none is left."""
    deadline_s = time.monotonic() + 60
    while queue := ask("squeue", "-h", "-o", "%A").split():
        force = ["-f", "-s", "KILL"] if time.monotonic() > deadline_s - 40 else []
        subprocess.run(["scancel", *force, *dict.fromkeys(queue)], capture_output=True, check=False)
        assert time.monotonic() < deadline_s, f"jobs that cannot be cancelled: {queue}"
        time.sleep(0.3)


@contextlib.contextmanager
def occupied(nodes: int = 4) -> Iterator[None]:
    """So many nodes belong to a job in `main`, which pre-empts what is on them."""
    blocker = _in_main(nodes, "sleep 3600")
    blocker.wait_for("RUNNING")
    try:
        yield
    finally:
        ask("scancel", blocker.id)


def preempt() -> None:
    """A job in `main` takes all four nodes, for a moment; returns when it has ended."""
    _in_main(4, "true").wait()


def _in_main(nodes: int, command: str) -> "Job":
    output = ("--output=/dev/null", "--chdir=/", f"--wrap={command}")
    return Job(ask("sbatch", "--parsable", "--partition=main", f"--nodes={nodes}", "--exclusive", *output))


# ---- jobs ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A job on the cluster and the run that it trains."""

    id: str
    run: Path = Path("/nowhere")
    gate: "Gate | None" = None

    def info(self) -> dict[str, str]:
        return slurm.scontrol_job(self.id) or {}

    @property
    def state(self) -> str:
        return self.info().get("JobState", "UNKNOWN")

    @property
    def restarts(self) -> int:
        return int(self.info()["Restarts"])

    def accounted(self) -> list[str]:
        """The state of each attempt of an ended job, in order, once accounting has heard of the last one's end."""

        def ended() -> list[str]:
            lines = ask("sacct", "-D", "-X", "-n", "-P", "-o", "State", "-j", self.id).splitlines()
            states = [line.split()[0] for line in lines]
            return [] if "RUNNING" in states else states

        return wait_until(ended, f"accounting to close job {self.id}")

    def wait_for(self, *states: str) -> str:
        return wait_until(lambda: (state := self.state) in states and state, f"job {self.id} to be {states}")

    def wait(self, limit_s: float = LIMIT_S) -> str:
        """Returns the state in which it ended."""
        return wait_until(lambda: (state := self.state) in ENDED and state, f"job {self.id} to end", limit_s=limit_s)

    def succeed(self, limit_s: float = LIMIT_S) -> None:
        state = self.wait(limit_s)
        assert state == "COMPLETED", f"job {self.id} is {state}"

    def held(self, step: int, attempt: int | None = None) -> dict:
        """Returns when rank 0 is held before `step`: where that is."""
        assert self.gate is not None
        files, pattern = self.gate.directory, f"held-{step}.{attempt or '*'}"
        found = wait_until(lambda: next(files.glob(pattern), None), f"step {step} of attempt {attempt or 'any'}", self)
        return json.loads(found.read_text())

    def let_time_run_out(self) -> None:
        """Sets the time limit to the next full minute of the running attempt."""
        hours, minutes, _ = self.info()["RunTime"].split(":")
        self.limit_time(60 * int(hours) + int(minutes) + 1)

    def limit_time(self, minutes: int) -> None:
        """Sets the time limit of the running attempt and those that follow."""
        ask("scontrol", "update", f"jobid={self.id}", f"timelimit={minutes}")

    def output(self) -> str:
        """What all its nodes and its batch script have printed."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.run.rglob(f"*{self.id}*.out")))


def wait_until(condition: Callable[[], object], what: str, job: Job | None = None, limit_s: float = LIMIT_S):
    """Looks until the condition holds, and returns it; fails at once where `job` ends before."""
    deadline_s, look_at_job_s = time.monotonic() + limit_s, time.monotonic() + 2.0
    while not (found := condition()):
        now_s = time.monotonic()
        assert now_s < deadline_s, f"waited in vain for {what}"
        if job is not None and now_s > look_at_job_s:
            state, look_at_job_s = job.state, now_s + 2.0
            assert state not in ENDED or condition(), f"job {job.id} is {state}, waiting for {what}"
        time.sleep(0.1)
    return found


def environment(gate: "Gate | None" = None, **more: str) -> dict[str, str]:
    """What a job inherits from the shell that submits it: one thread and no GPU a rank, because bits are compared."""
    ours = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more}
    ours["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    if gate is not None:
        ours["DDP_ASR_GATE"] = str(gate.directory)
        ours["PYTHONPATH"] = os.pathsep.join([str(GATE_CODE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return ours


def launch(module: str, *arguments: str, gate: "Gate | None" = None, checkout: Path = REPOSITORY):
    """Runs `python -m launch.MODULE` as a user would."""
    return _run([sys.executable, "-m", f"launch.{module}", *arguments], checkout, environment(gate))


def _run(command: Sequence[str], directory: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, check=False, timeout=LIMIT_S
    )


@dataclass(frozen=True)
class Shape:
    """What a job asks for, however it is started."""

    nodes: str = "2"
    ranks: int = 1  # a node
    partition: str = "main"
    signal_s: int = 10
    nodelist: str = ""

    def options(self) -> list[str]:
        """As `launch.submit` and sbatch both take them."""
        chosen = [f"--nodelist={self.nodelist}"] if self.nodelist else []
        return [f"--nodes={self.nodes}", f"--partition={self.partition}", "--time=10", *chosen]


def submit(
    corpus: TinyCorpus,
    runs: Path,
    shape: Shape,
    *settings: str,
    name: str = "run",
    gate: "Gate | None" = None,
    checkout: Path = REPOSITORY,
) -> Job:
    """`python -m launch.submit`."""
    options = [*shape.options(), f"--tasks-per-node={shape.ranks}", f"--signal-s={shape.signal_s}"]
    answer = launch("submit", *corpus.arguments(runs, name, *settings), *options, gate=gate, checkout=checkout)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return Job(json.loads((runs / name / "job.json").read_text())["job_id"], runs / name, gate)


def sbatch(
    corpus: TinyCorpus, runs: Path, shape: Shape, *settings: str, name: str = "run", gate: "Gate | None" = None
) -> Job:
    """`sbatch slurm/train.sbatch`."""
    (runs / name).mkdir(parents=True, exist_ok=True)
    options = [*shape.options(), f"--signal=USR2@{shape.signal_s}", f"--output={runs / name}/%j.out"]
    _, *arguments = corpus.arguments(runs, name, *settings)  # without the word --config
    ours = environment(gate, RANKS_PER_NODE=str(shape.ranks))
    answer = _run(["sbatch", "--parsable", *options, "slurm/train.sbatch", *arguments], REPOSITORY, ours)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return Job(answer.stdout.strip(), runs / name, gate)


LAUNCHERS = {"submit": submit, "sbatch": sbatch}


def by_both(corpus: TinyCorpus, runs: Path, shape: Shape, hold: Sequence[int]) -> list[Job]:
    """Two runs side by side, `submit` and `sbatch`, each with a gate of its own: most of a test is waiting."""
    gates = {name: Gate(runs / f"gate-{name}").hold(*hold) for name in LAUNCHERS}
    return [launcher(corpus, runs, shape, name=name, gate=gates[name]) for name, launcher in LAUNCHERS.items()]


# ---- gates ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gate:
    """Where rank 0 of a job waits; see gate/sitecustomize.py for the files."""

    directory: Path

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)

    def hold(self, *steps: int, attempt: int | None = None) -> "Gate":
        for step in steps:
            self._path("hold", step, attempt).touch()
        return self

    def open(self, *steps: int, attempt: int | None = None) -> None:
        for step in steps:
            self._path("hold", step, attempt).unlink()

    def crash(self, *steps: int) -> "Gate":
        for step in steps:
            self._path("crash", step, None).touch()
        return self

    def _path(self, word: str, step: int, attempt: int | None) -> Path:
        return self.directory / (f"{word}-{step}" if attempt is None else f"{word}-{step}.{attempt}")


# ---- what a run left behind ----------------------------------------------------------------------------------------


def rank_log(run: Path, rank: int = 0) -> str:
    """The rank's own log, of all attempts."""
    return (run / f"rank-{rank:04d}.log").read_text()


def stops(run: Path) -> list[tuple[int, str]]:
    """(step, reason) of each attempt that was stopped."""
    return [(int(step), reason) for step, reason in re.findall(r"stopped at step (\d+): (\w+)", rank_log(run))]


def comet_keys(run: Path) -> set[str]:
    """Every experiment key that the run's files name."""
    kept = json.loads((run / "comet.json").read_text())["experiment_key"]
    return {kept} | {checkpoint.read(path)["comet_key"] for path in run.rglob("step-*.pt")}


def written(run: Path) -> dict[str, bytes]:
    """All that only the holder of the lease may write; the lease itself changes as long as its holder lives."""
    files = [*run.glob("*.json*"), *run.glob("*.yaml"), *run.rglob("*.pt")]
    return {str(path.relative_to(run)): path.read_bytes() for path in files if path.name != "lease.json"}


def evidence(directory: Path | None) -> Iterator[tuple[str, str]]:
    """(title, text) of all that tells why a test failed: jobs, nodes, the logs below `directory`, the controller's."""
    for command in (["squeue", "-a"], ["sinfo", "-N", "-l"], ["sacct", "-D", "-X"]):
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        yield " ".join(command), answer.stdout[-3000:] + answer.stderr[-1000:]
    interesting = ("*.out", "*.err", "rank-*.log", "status.json", "requeues.json", "job.json")
    for pattern in interesting:
        for path in sorted(directory.rglob(pattern)) if directory is not None else ():
            yield str(path), path.read_text(errors="replace")[-4000:]
    for name in ("slurmctld.log", *(f"slurmd-node{number}.log" for number in range(1, 5))):
        path, length = STATE / "log" / name, 60 if name == "slurmctld.log" else 15
        if path.exists():
            yield name, "\n".join(path.read_text(errors="replace").splitlines()[-length:])
