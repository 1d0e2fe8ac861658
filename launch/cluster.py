"""Talks to the scheduler: what a job asks for, how it is submitted, and what Slurm says of jobs and nodes.

    request = request_from(options)                       # configs/clusters/NAME.yaml, then the command line
    submission = submit([function], folder, request, name="train", code=frozen_copy, after=[shell line, ...])
    job_states(submission.job_ids)                        # {"12": JobState("PENDING", "Priority")}

submitit writes the batch script and submits it; srun starts one task on each node, which loads the function and calls
it. A function that trains becomes the torchrun of its node (node.py). submitit's own handling of signals is not used:
it ignores the SIGTERM of a pre-emption. The batch script outlives the ranks, because a trap keeps it alive when Slurm
signals it too; when srun has ended it runs the lines in `after`, which decide what happens to the job (job.py).
slurm/train.sbatch is the same script for those who prefer to write it themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ddp_asr
from ddp_asr.errors import UserError
from ddp_asr.settings import declared, nearest, read_yaml, setting

EXECUTORS = ("slurm", "local", "debug")
PROFILES = Path("configs/clusters")

# One task, torchrun, on each node. It ends with an error after any signal, and must not take other nodes with it, whose
# ranks may still be writing; one that hangs must not keep the job. Under sbatch --export=NONE srun passes on no PATH.
# The ranks of a node share its cores.
SRUN_OPTIONS = ("--ntasks-per-node=1", "--cpu-bind=none", "--export=ALL", "--kill-on-bad-exit=0", "--wait=60")
_OUTLIVE_SIGNALS = "trap : TERM USR1 USR2"
_IGNORE_SIGNALS = "trap '' TERM USR1 USR2"
_TEXTS = ("partition", "account", "qos", "constraint", "exclude", "nodelist", "mem", "time")


@dataclass(frozen=True)
class Request:
    """What a job asks for: keys of a profile and options of every launcher; empty or 0 is left to the cluster."""

    executor: str = setting("slurm", "Slurm, processes of this machine, or one rank in this process", choices=EXECUTORS)
    nodes: str = setting("1", "number of nodes, or a range such as 1-4: the run takes what there is")
    gpus_per_node: int = setting(0, "GPUs of each node; a rank uses one GPU", at_least=0)
    tasks_per_node: int = setting(0, "ranks of each node; 0: one for each GPU, or one where there are none", at_least=0)
    cpus_per_task: int = setting(0, "CPU cores of each rank, for its loader too", at_least=0)
    mem: str = setting("", "memory of each node, such as 200G")
    time: str = setting("", "time limit, such as 8:00:00; before it the run writes a checkpoint and is requeued")
    partition: str = setting("", "partition")
    account: str = setting("", "account")
    qos: str = setting("", "quality of service")
    constraint: str = setting("", "node features, such as a100")
    exclude: str = setting("", "nodes not to run on")
    nodelist: str = setting("", "nodes to run on")
    signal_s: int = setting(120, "seconds before the time limit at which the ranks are told to stop", at_least=0)
    setup: list[str] = setting([], "shell lines that run before the ranks start, such as 'module load cuda'")

    @property
    def max_nodes(self) -> int:
        return int(self.nodes.rpartition("-")[2])

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def max_ranks(self) -> int:
        """The largest number of ranks that the job may start with."""
        return self.max_nodes * self.ranks_per_node


_FIELDS = {each.name: each for each in declared(Request)}


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--cluster NAME|FILE` and an option for every field of a Request."""
    group = parser.add_argument_group("what the job asks for")
    group.add_argument(
        "--cluster",
        default="slurm",
        metavar="NAME|FILE",
        help=f"slurm, local, debug, or a profile: a file, or NAME for {PROFILES}/NAME.yaml (default: slurm)",
    )
    for name, field in _FIELDS.items():
        if name != "executor":
            option, repeated = f"--{name.replace('_', '-')}", name == "setup"
            metavar = "LINE" if repeated else "N" if field.type is int else name.upper()
            action = "append" if repeated else "store"
            group.add_argument(option, metavar=metavar, action=action, help=field.meaning)


def request_from(options: argparse.Namespace, **defaults: Any) -> Request:
    """The request of the profile `options.cluster`; the other options override it, and it overrides `defaults`.

    Raises:
        UserError: an unknown profile or key, a value of the wrong type or out of range.
    """
    values = defaults | _read_profile(options.cluster)
    values |= {name: given for name in _FIELDS if (given := getattr(options, name, None)) is not None}
    request = Request(**{name: _FIELDS[name].read(value) for name, value in values.items()})
    _check(request)
    return request


def _read_profile(name: str) -> dict[str, Any]:
    profile = _find_profile(name)
    if profile is None:
        return {"executor": name}
    values = read_yaml(profile)
    for key in values:
        if key not in _FIELDS:
            raise UserError(f"unknown key {key!r} in {profile}; {nearest(key, _FIELDS)}")
    return values


def _find_profile(name: str) -> Path | None:
    """The file that `--cluster NAME|FILE` names; None for an executor without a profile."""
    installed = Path(ddp_asr.__file__).parent / "share" / PROFILES
    for path in (Path(name), PROFILES / f"{name}.yaml", installed / f"{name}.yaml"):
        if path.is_file():
            return path
    if name in EXECUTORS:
        return None
    known = sorted({*EXECUTORS, *(path.stem for folder in (PROFILES, installed) for path in folder.glob("*.yaml"))})
    raise UserError(f"--cluster is a profile's name or file, and {name!r} is neither; {nearest(name, known)}")


def _check(request: Request) -> None:
    nodes = re.fullmatch(r"([1-9]\d*)(?:-([1-9]\d*))?", request.nodes)
    if not nodes or (nodes[2] and int(nodes[2]) < int(nodes[1])):
        raise UserError(f"nodes must be a number such as 4, or a range such as 1-4, not {request.nodes!r}")
    for name in _TEXTS:  # each becomes a line of the batch script
        if "\n" in getattr(request, name):
            raise UserError(f"{name} must be one line, not {getattr(request, name)!r}")
    if request.executor == "local" and request.nodes != "1":
        raise UserError(f"nodes = {request.nodes}, but 'local' is this machine alone: leave --nodes out")
    if request.executor == "debug" and request.max_ranks != 1:
        raise UserError(f"'debug' is one process, not {request.max_ranks}: leave --nodes and --gpus-per-node out")


# ---- submitting ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Submission:
    """A job, or the jobs of an array, that the scheduler has accepted."""

    folder: Path  # its batch script, pickles and logs
    job_ids: list[str]  # "12", or "12_0", "12_1" ... of an array

    def log(self, number: int = 0, node: int = 0) -> Path:
        """What the ranks of a node of the job print; the first node's also has what the batch script prints."""
        return self.folder / f"{self.job_ids[number]}_{node}_log.out"


def submit(
    functions: Sequence[Callable[[], Any]],
    folder: Path,
    request: Request,
    *,
    name: str,
    code: Path,
    parallel: int = 0,
    after: Sequence[str] = (),
) -> Submission:
    """Submits one job that calls the function once on each node; several functions become an array.

    The function finds the number of ranks that it is to start in RANKS_PER_NODE.

    Args:
        functions: picklable, and importable by name from `launch`.
        code: the directory that the job runs in and imports from, a frozen copy (`job.freeze_code`).
        parallel: how many jobs of an array may run at a time; 0: all.
        after: shell lines for the batch script when srun has ended, its exit status in `$status`; Slurm only.

    Raises:
        UserError: with Slurm's own reason, in one sentence.
    """
    import submitit

    if request.executor == "slurm":
        if shutil.which("sbatch") is None:
            raise UserError("there is no sbatch here: submit from a login node of the cluster, or with --cluster local")
        executor = submitit.SlurmExecutor(folder)
        executor.update_parameters(**_slurm_parameters(request, name, code, parallel, after))
        # submitit repeats sbatch's complaint on stderr; `_refusals` says it in a sentence.
        with _refusals(request), contextlib.redirect_stderr(io.StringIO()), executor.batch():
            jobs = [executor.submit(function) for function in functions]
    elif request.executor == "local":
        local = submitit.LocalExecutor(folder)
        a_year = 60 * 24 * 365  # one's own machine has no time limit; submitit's default is two minutes
        local.update_parameters(gpus_per_node=request.gpus_per_node, timeout_min=a_year, stderr_to_stdout=True)
        with _inherited(code, request):
            jobs = [local.submit(function) for function in functions]
    else:
        debug = submitit.DebugExecutor(folder)
        jobs = [debug.submit(function) for function in functions]
        for job in jobs:
            job.results()
    return Submission(folder, [job.job_id for job in jobs])


def sbatch_text(
    folder: Path,
    request: Request,
    *,
    name: str,
    code: Path,
    jobs: int = 1,
    parallel: int = 0,
    after: Sequence[str] = (),
) -> str:
    """The batch script that `submit` would give to sbatch."""
    # Private, because submitit shows a batch script only by submitting it. If the names change, --dry-run breaks and
    # nothing else. Tried with submitit 1.5.4; a test compares the text with what is submitted.
    from submitit.slurm.slurm import _make_sbatch_string

    if request.executor != "slurm":
        raise UserError(f"there is no sbatch file for the cluster {request.executor!r}: only Slurm has one")
    parameters = _slurm_parameters(request, name, code, parallel, after) | ({"map_count": jobs} if jobs > 1 else {})
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return _make_sbatch_string(command=command, folder=folder, **parameters)


def _slurm_parameters(request: Request, name: str, code: Path, parallel: int, after: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments of submitit's Slurm executor; None removes its own default, so that the cluster's holds.

    The number of tasks is left to srun: of a range of nodes and a number of tasks a node, sbatch makes a number of
    tasks, and then always gives the smallest number of nodes.
    """
    cores = request.ranks_per_node * request.cpus_per_task
    options = {field: getattr(request, field) for field in _TEXTS if getattr(request, field)}
    # submitit computes with `nodes` and `time`, and knows neither ranges nor Slurm's notation of times.
    options |= {"nodes": request.nodes, "requeue": True}
    if not cores:
        options["mincpus"] = request.ranks_per_node  # else Slurm gives the node's one task one core
    return {
        "job_name": name,
        "nodes": request.max_nodes,
        "gpus_per_node": request.gpus_per_node or None,
        "cpus_per_task": cores or None,
        "time": None,
        "wckey": None,
        "signal_delay_s": request.signal_s,
        "stderr_to_stdout": True,
        "array_parallelism": parallel or sys.maxsize,
        "srun_args": [*SRUN_OPTIONS, *([f"--cpus-per-task={cores}"] if cores else [])],
        "setup": [
            _OUTLIVE_SIGNALS,
            *request.setup,
            f"cd {shlex.quote(str(code))}",
            f'export PYTHONPATH={shlex.quote(str(code))}"${{PYTHONPATH:+:$PYTHONPATH}}"',
            f"export RANKS_PER_NODE={request.ranks_per_node}",
        ],
        "teardown": ["status=$?", _IGNORE_SIGNALS, *after] if after else None,
        "additional_parameters": options,
    }


@contextlib.contextmanager
def _inherited(code: Path, request: Request) -> Iterator[None]:
    """Gives the processes that start in here what a batch script would set; they can only inherit it."""
    directory, before = os.getcwd(), dict(os.environ)
    for name in before:
        if name.startswith("SLURM_"):  # an allocation in which this command runs is not the job's
            del os.environ[name]
    os.chdir(code)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(code), *filter(None, [before.get("PYTHONPATH")])])
    os.environ["RANKS_PER_NODE"] = str(request.ranks_per_node)
    try:
        yield
    finally:
        os.chdir(directory)
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _refusals(request: Request) -> Iterator[None]:
    """Turns a refusal by sbatch into one sentence."""
    from submitit.core.utils import FailedJobError

    try:
        yield
    except FailedJobError as error:
        asked = [f"{name} = {value}" for name, value in dataclasses.asdict(request).items() if value and name in _ASKED]
        raise UserError(
            f"Slurm refused the job: {slurm_reason(str(error))} (asked for: {', '.join(asked)}); see what there is "
            "with 'sinfo', or 'scontrol show partition'"
        ) from None


_ASKED = (*_TEXTS, "nodes", "gpus_per_node", "tasks_per_node", "cpus_per_task")


def slurm_reason(text: str) -> str:
    """The complaint of a Slurm command, on one line and without its prefixes."""
    complaints = re.findall(r"^(?:\w+: )(?:error: )?(.*\S)", text, flags=re.MULTILINE) or [text.strip()]
    reasons = [complaint.removeprefix("Batch job submission failed: ").rstrip(".") for complaint in complaints]
    return "; ".join(dict.fromkeys(reasons))


# ---- asking Slurm --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JobState:
    """A job's state in Slurm's words, such as PENDING, RUNNING, COMPLETED; UNKNOWN if Slurm has forgotten the job."""

    state: str
    reason: str = ""  # why it is pending

    @property
    def living(self) -> bool:
        """Whether it runs, or is going to run."""
        return self.state in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "STAGE_OUT")


@dataclass(frozen=True)
class Node:
    """A node as sinfo shows it; a state ending in `*` is not answering."""

    name: str
    state: str
    reason: str = ""  # why an administrator, or Slurm, took it out


def run(command: Sequence[str], timeout_s: float = 30.0) -> str:
    """What a Slurm command prints.

    Raises:
        UserError: it fails, with its complaint in one sentence; it is not there; it does not answer in time.
    """
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except FileNotFoundError:
        raise UserError(
            f"there is no {command[0]} here: run this where Slurm's commands are, on a login node"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"'{shlex.join(command)}' did not answer within {timeout_s:g} s: is slurmctld up?") from None
    if answer.returncode:
        raise UserError(f"'{shlex.join(command)}' failed: {slurm_reason(answer.stderr or answer.stdout)}")
    return answer.stdout


def scontrol_job(job_id: str) -> dict[str, str] | None:
    """`scontrol show job` as a mapping; None where slurmctld no longer knows the job."""
    try:
        text = run(["scontrol", "--oneliner", "show", "job", job_id])
    except UserError as error:
        if "Invalid job id" in str(error):
            return None
        raise
    return fields_of(text.splitlines()[0]) if text.strip() else None


def fields_of(line: str) -> dict[str, str]:
    """A line of `scontrol --oneliner` as a mapping; values may hold spaces and equals signs."""
    return dict(re.findall(r"(\w[\w:/]*)=(.*?)(?= \w[\w:/]*=|\s*$)", line))


def job_states(job_ids: Iterable[str]) -> dict[str, JobState]:
    """The state of each job, by one squeue for all, and one sacct for those that have left the queue."""
    wanted = list(dict.fromkeys(job_ids))
    if not wanted:
        return {}
    states = _queued(wanted)
    gone = [job_id for job_id in wanted if job_id not in states]
    if gone:
        # Accounting may be off or its daemon not running: then these states stay unknown.
        with contextlib.suppress(UserError):
            states |= _accounted(gone)
    return {job_id: states.get(job_id, JobState("UNKNOWN")) for job_id in wanted}


def _queued(wanted: Sequence[str]) -> dict[str, JobState]:
    # All jobs of this user: `squeue --jobs` fails as a whole if one id is no longer known.
    lines = run(["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i|%T|%r"]).splitlines()
    rows = (line.strip().split("|", 2) for line in lines if line.strip())
    found = {job_id: JobState(state, "" if why == "None" else why) for job_id, state, why in rows}
    return {job_id: found[job_id] for job_id in wanted if job_id in found}


def _accounted(wanted: Sequence[str]) -> dict[str, JobState]:
    jobs = ",".join(wanted)
    lines = run(["sacct", "-X", "--noheader", "--parsable2", f"--jobs={jobs}", "--format=JobID,State"]).splitlines()
    rows = (line.split("|") for line in lines)
    return {job_id: JobState(state.split()[0]) for job_id, state in rows if state}  # "CANCELLED by 0"


def nodes(partition: str = "") -> list[Node]:
    """The nodes of a partition, or of all, each once."""
    chosen = [f"--partition={partition}"] if partition else []
    lines = run(["sinfo", "--Node", "--noheader", *chosen, "--format=%N|%T|%E"]).splitlines()
    rows = dict.fromkeys(tuple(line.strip().split("|", 2)) for line in lines if line.strip())
    return [Node(name, state, "" if reason == "none" else reason) for name, state, reason in rows]
