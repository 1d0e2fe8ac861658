"""The scheduler: what a job asks it for, how it is handed over, and what it says of jobs and nodes.

    request = request_from(options)                       # configs/clusters/NAME.yaml, then the command line
    submission = submit([function], folder, request, name="train", code=frozen_copy, after=[shell line, ...])
    job_states(submission.job_ids)                        # {"12": JobState("PENDING", "Priority")}

submitit writes the sbatch file, starts one task a rank and loads the function there. What it does with signals is not
used: plain submitit ignores the SIGTERM of a pre-emption, and starts from the beginning after it. Here the trainer
takes the signals over, and the batch script, when srun has ended, runs the lines in `after`: it outlives ranks that
were killed, and so can say what becomes of the job (job.py). A trap keeps it alive where Slurm signals it, too.
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
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddp_asr.errors import UserError
from ddp_asr.settings import check_bounds, convert, nearest, read_yaml, setting

if TYPE_CHECKING:
    from submitit import Executor

EXECUTORS = ("slurm", "local", "debug")
PROFILES = Path("configs/clusters")

# The ranks' own stop takes its time; one that ends early, or badly, must not have the others killed meanwhile. Nor may
# one that hangs keep the job: rank 0 is the last, and waits for Comet half a minute at most.
_SRUN_OPTIONS = ("--kill-on-bad-exit=0", "--wait=60")
_OUTLIVE_SIGNALS = "trap : TERM USR1 USR2"
_TEXTS = ("partition", "account", "qos", "constraint", "exclude", "nodelist", "mem", "time")


@dataclass(frozen=True)
class Request:
    """What a job asks for: keys of a profile, options of every launcher; empty or 0 is left to the cluster."""

    executor: str = setting(
        "slurm", "Slurm, local processes of this machine, or debug: this very process", choices=EXECUTORS
    )
    nodes: str = setting("1", "nodes, or a range such as 1-4: the run goes on with what there is")
    gpus_per_node: int = setting(0, "GPUs a node, each with a rank of its own", at_least=0)
    tasks_per_node: int = setting(0, "ranks a node; 0: one for each GPU, or one where there are none", at_least=0)
    cpus_per_task: int = setting(0, "CPU cores a rank, its loader threads included", at_least=0)
    mem: str = setting("", "memory a node, such as 200G")
    time: str = setting("", "time limit, such as 8:00:00; the run checkpoints and requeues itself before it")
    partition: str = setting("", "partition")
    account: str = setting("", "account")
    qos: str = setting("", "quality of service")
    constraint: str = setting("", "node features, such as a100")
    exclude: str = setting("", "nodes to stay away from")
    nodelist: str = setting("", "nodes to run on")
    signal_s: int = setting(120, "so many seconds before the time limit the ranks are told to stop", at_least=0)
    setup: list[str] = setting([], "shell lines before the ranks start, such as 'module load cuda'")

    @property
    def max_nodes(self) -> int:
        return int(self.nodes.rpartition("-")[2])

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def max_ranks(self) -> int:
        """The most ranks that the job may start with."""
        return self.max_nodes * self.ranks_per_node


_FIELDS = {field.name: field for field in dataclasses.fields(Request)}


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
            metavar = "LINE" if repeated else name.rpartition("_")[2].upper()
            action = "append" if repeated else "store"
            group.add_argument(option, metavar=metavar, action=action, help=field.metadata["setting"].meaning)


def request_from(options: argparse.Namespace, **defaults: Any) -> Request:
    """The request of the profile `options.cluster`, with the other options on top; `defaults` lie below both.

    Raises:
        UserError: an unknown profile or key, a value of the wrong type or out of range.
    """
    values = defaults | _read_profile(options.cluster)
    values |= {name: given for name in _FIELDS if (given := getattr(options, name, None)) is not None}
    types = typing.get_type_hints(Request)
    values = {name: convert(value, types[name], name) for name, value in values.items()}
    for name, value in values.items():
        check_bounds(value, _FIELDS[name].metadata["setting"], name)
    request = Request(**values)
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
    """The file that `--cluster NAME|FILE` means; None: an executor without one."""
    installed = Path(__file__).parent.parent / PROFILES
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


# ---- handing over --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Submission:
    """A job, or the jobs of an array, that the scheduler has accepted."""

    folder: Path  # its sbatch file, pickles and logs
    job_ids: list[str]  # "12", or "12_0", "12_1" ... of an array

    def log(self, number: int = 0, rank: int = 0) -> Path:
        """What rank `rank` of the job prints."""
        return self.folder / f"{self.job_ids[number]}_{rank}_log.out"


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
    """Hands one job over that calls the function on every rank; several functions become an array.

    Args:
        functions: picklable, and importable by name from `launch`.
        code: the directory that the job runs in and imports from, a frozen copy (`job.freeze_code`).
        parallel: how many jobs of an array may run at a time; 0: all.
        after: shell lines of the batch script when srun has ended, its exit status in `$status`; Slurm only.

    Raises:
        UserError: with Slurm's own reason, in one sentence.
    """
    executor = _executor(folder, request, name=name, code=code, parallel=parallel, after=after)
    # Only one process is left to inherit these where there is no batch script to write them into.
    with _refusals(request), _inside(code) if request.executor == "local" else contextlib.nullcontext():
        if request.executor == "slurm":
            # submitit repeats on stderr what sbatch complains of, which `_refusals` says in a sentence.
            with contextlib.redirect_stderr(io.StringIO()), executor.batch():
                jobs = [executor.submit(function) for function in functions]
        else:
            jobs = [executor.submit(function) for function in functions]
        job_ids = [job.job_id for job in jobs]
        if request.executor == "debug":
            for job in jobs:
                job.results()
    return Submission(folder, job_ids)


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
    """The batch script that `submit` would hand to sbatch."""
    from submitit.slurm.slurm import _make_sbatch_string

    if request.executor != "slurm":
        raise UserError(f"there is no sbatch file for the cluster {request.executor!r}: only Slurm has one")
    parameters = _slurm_parameters(request, name, code, parallel, after) | ({"map_count": jobs} if jobs > 1 else {})
    # Not asked of an executor, which exists only where Slurm's commands are.
    command = f"{shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    return _make_sbatch_string(command=command, folder=folder, **parameters)


def _executor(
    folder: Path, request: Request, *, name: str, code: Path, parallel: int, after: Sequence[str]
) -> Executor:
    import submitit

    if request.executor == "debug":
        return submitit.DebugExecutor(folder)
    if request.executor == "local":
        local = submitit.LocalExecutor(folder)
        local.update_parameters(
            tasks_per_node=request.ranks_per_node,
            gpus_per_node=request.gpus_per_node,
            timeout_min=60 * 24 * 365,  # one's own machine has no limit; submitit would take two minutes
            stderr_to_stdout=True,
        )
        return local
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch here: submit from a login node of the cluster, or with --cluster local")
    slurm = submitit.SlurmExecutor(folder)
    slurm.update_parameters(**_slurm_parameters(request, name, code, parallel, after))
    return slurm


def _slurm_parameters(request: Request, name: str, code: Path, parallel: int, after: Sequence[str]) -> dict[str, Any]:
    """Keyword arguments of submitit's Slurm executor; None takes its own default out, which is the cluster's then."""
    texts = {field: getattr(request, field) for field in _TEXTS if getattr(request, field)}
    tasks, srun_arguments = {"ntasks_per_node": request.ranks_per_node}, list(_SRUN_OPTIONS)
    if "-" in request.nodes:
        # Of a range and tasks a node sbatch makes a number of tasks, and gives no more nodes than those take, which are
        # the fewest. So it is asked for the nodes' cores, and srun for the tasks.
        tasks = {}
        texts["mincpus"] = str(request.ranks_per_node * max(1, request.cpus_per_task))
        srun_arguments.append(f"--ntasks-per-node={request.ranks_per_node}")
    return {
        "job_name": name,
        "nodes": request.max_nodes,
        **tasks,
        "gpus_per_node": request.gpus_per_node or None,
        "cpus_per_task": request.cpus_per_task or None,
        "time": None,
        "wckey": None,
        "signal_delay_s": request.signal_s,
        "stderr_to_stdout": True,
        "array_parallelism": parallel or sys.maxsize,
        "srun_args": srun_arguments,
        "setup": [*request.setup, _OUTLIVE_SIGNALS, f"cd {shlex.quote(str(code))}", _import_from(code)],
        "teardown": ["status=$?", *after] if after else None,
        # submitit computes with `nodes` and `time`, and knows neither ranges nor Slurm's own words for a time.
        "additional_parameters": {**texts, "nodes": request.nodes, "requeue": True},
    }


def _import_from(code: Path) -> str:
    return f'export PYTHONPATH={shlex.quote(str(code))}"${{PYTHONPATH:+:$PYTHONPATH}}"'


@contextlib.contextmanager
def _inside(code: Path) -> Iterator[None]:
    """Processes that start in here run in `code` and import from it."""
    directory, search_path = os.getcwd(), os.environ.get("PYTHONPATH")
    os.chdir(code)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(code), *([search_path] if search_path else [])])
    try:
        yield
    finally:
        os.chdir(directory)
        if search_path is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = search_path


@contextlib.contextmanager
def _refusals(request: Request) -> Iterator[None]:
    """Turns sbatch's refusal into one sentence."""
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
    """What a Slurm command complains of, on one line and without its prefixes."""
    complaints = re.findall(r"^(?:\w+: )(?:error: )?(.*\S)", text, flags=re.MULTILINE) or [text.strip()]
    reasons = [complaint.removeprefix("Batch job submission failed: ").rstrip(".") for complaint in complaints]
    return "; ".join(dict.fromkeys(reasons))


# ---- what Slurm says -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JobState:
    """A job's state in Slurm's own words, such as PENDING, RUNNING, COMPLETED, CANCELLED; UNKNOWN: Slurm forgot it."""

    state: str
    reason: str = ""  # why it is pending

    @property
    def living(self) -> bool:
        """Whether it runs, or is still going to."""
        return self.state in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED", "STAGE_OUT")


@dataclass(frozen=True)
class Node:
    """A node as sinfo shows it; a state ending in `*` is not answering."""

    name: str
    state: str
    reason: str = ""  # why an administrator, or Slurm, took it out


def run(command: Sequence[str], timeout_s: float = 30.0) -> str:
    """What a Slurm command prints; a UserError with its complaint in one sentence."""
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
    """The state of each job: one squeue for all, and one sacct for those that have left the queue."""
    wanted = list(dict.fromkeys(job_ids))
    if not wanted:
        return {}
    states = _queued(wanted)
    gone = [job_id for job_id in wanted if job_id not in states]
    if gone:
        # Accounting may be off, or its daemon away: a state less, and no reason to show none.
        with contextlib.suppress(UserError):
            states |= _accounted(gone)
    return {job_id: states.get(job_id, JobState("UNKNOWN")) for job_id in wanted}


def _queued(wanted: Sequence[str]) -> dict[str, JobState]:
    # Of all of one's jobs: `squeue --jobs` fails as a whole over one id that is no longer known.
    lines = run(["squeue", "--me", "--noheader", "--array", "--states=all", "--format=%i|%T|%r"]).splitlines()
    rows = (line.strip().split("|", 2) for line in lines if line.strip())
    return {job_id: JobState(state, _why(reason)) for job_id, state, reason in rows if job_id in wanted}


def _accounted(wanted: Sequence[str]) -> dict[str, JobState]:
    jobs = ",".join(wanted)
    lines = run(["sacct", "-X", "--noheader", "--parsable2", f"--jobs={jobs}", "--format=JobID,State"]).splitlines()
    rows = (line.split("|") for line in lines)
    return {job_id: JobState(state.split()[0]) for job_id, state in rows if state}  # "CANCELLED by 0"


def _why(reason: str) -> str:
    return "" if reason == "None" else reason


def nodes(partition: str = "") -> list[Node]:
    """The nodes of a partition (the default: of all), each once."""
    chosen = [f"--partition={partition}"] if partition else []
    lines = run(["sinfo", "--Node", "--noheader", *chosen, "--format=%N|%T|%E"]).splitlines()
    rows = dict.fromkeys(tuple(line.strip().split("|", 2)) for line in lines if line.strip())
    return [Node(name, state, "" if reason == "none" else reason) for name, state, reason in rows]
