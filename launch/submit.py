"""Submits a training: `ddp-asr submit --config FILE --nodes 4 --gpus-per-node 8`, one rank for each GPU.

    settings, checked  ->  runs/NAME/jobs/STAMP/  (frozen code, resolved settings)  ->  cluster.submit  ->  job.json

A queued job depends on nothing that may change before it runs: it has its own copy of the code, and its settings are
written out with absolute paths. Whatever is wrong is said now and not after a night in the queue, as far as it can be
known here: settings, shards, the plan, more ranks than micro-batches, a run that another job is already training.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import re
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddp_asr.config import Config, Pieces, load_config, require_shards
from ddp_asr.errors import UserError, counted, run_entry_point
from ddp_asr.files import Fields, is_text, is_time, read_json, replace_file, scheme_of
from ddp_asr.runs.directory import read_status
from ddp_asr.settings import describe, help_text

from . import cluster, job, node
from .cluster import Request, Submission

EXAMPLES = """\
examples:
  ddp-asr submit --config configs/librispeech_960.yaml --nodes 4 --gpus-per-node 8 --time 8:00:00
  ddp-asr submit --config configs/an4.yaml --gpus-per-node 2 --partition short --train.epochs=3 --dry-run
  ddp-asr submit --config configs/librispeech_100.yaml --cluster infiniband8 --nodes 1-4
  ddp-asr submit --config configs/an4.yaml --cluster local --tasks-per-node 2

When it is pre-empted or its time limit is near, the run writes a checkpoint and the job requeues itself; the run then
goes on. The same command continues a run that was cancelled or has failed.
"""


def main(argv: Sequence[str] | None = None) -> int:
    options, settings = _parse(sys.argv[1:] if argv is None else argv)
    config = load_config(options.config, settings)
    request = cluster.request_from(options)
    run = run_directory(config)
    folder = submission_folder(run)
    if options.dry_run:
        check(config, request)
        print(_dry_run(folder, request, config.run.name, options.resume), end="")
        return 0
    if (read_status(run) or {}).get("state") == "done":
        print(f"{run} is done: nothing to submit; to train again, choose another --run.name")
        return 0
    submission = submit_training([config], request, folder, name=config.run.name, resume=options.resume)
    if request.executor != "debug":
        print(_told(submission, request, run))
    return 0


def submit_training(
    configs: Sequence[Config],
    request: Request,
    folder: Path,
    *,
    name: str,
    parallel: int = 0,
    resume: str = "auto",
) -> Submission:
    """Submits a job for each of the runs, as one array if there are several; `folder` must not exist yet.

    Raises:
        UserError: anything wrong with settings, shards or the request, before anything is queued.
    """
    check_all(configs, request)
    runs = [run_directory(config) for config in configs]
    _refuse_living(runs)
    folder.mkdir(parents=True)
    code = job.freeze_code(folder)
    resume = resume if resume in ("auto", "never") else str(Path(resume).absolute())
    functions = []
    for number, config in enumerate(configs):
        settings = folder / ("config.yaml" if len(configs) == 1 else f"config-{number:03d}.yaml")
        settings.write_text(describe(resolved(config)), encoding="utf8")
        functions.append(job.Training(settings, resume, in_process=request.executor == "debug"))
    record: dict[str, Any] = {"name": name, "executor": request.executor, "runs": [str(run) for run in runs]}
    _write(folder / "submission.json", record)  # the jobs read it, and may start before `cluster.submit` returns
    after = [job.conclude_command(folder)]
    try:
        submission = cluster.submit(functions, folder, request, name=name, code=code, parallel=parallel, after=after)
    except UserError:
        shutil.rmtree(folder)
        raise
    now_s = time.time()
    _write(folder / "submission.json", record | {"job_ids": submission.job_ids, "time_s": now_s})
    for run, job_id in zip(runs, submission.job_ids, strict=True):
        run.mkdir(parents=True, exist_ok=True)
        newest = {"job_id": job_id, "executor": request.executor, "folder": str(folder), "time_s": now_s}
        _write(run / "job.json", newest)
    return submission


def check(config: Config, request: Request) -> None:
    """Raises a UserError for whatever would end the run before its first step, as far as a login node can know."""
    from ddp_asr.data.corpus import read_corpus

    require_shards(config)
    if request.max_ranks > config.batch.micro_batches:
        raise UserError(
            f"{counted(request.max_nodes, 'node')} x {request.ranks_per_node} are {request.max_ranks} ranks, and a "
            f"step has only batch.micro_batches = {config.batch.micro_batches}: ask for fewer, or raise it, which "
            "changes the result"
        )
    read_corpus(config)


def check_all(configs: Sequence[Config], request: Request) -> None:
    """`check` for each different plan: the trials of a sweep are many, and most share one."""
    checked: list[tuple[Any, ...]] = []
    for config in configs:
        # Of the encoder the plan knows only how many frames it leaves; a sweep over its sizes needs one check.
        shapes = ([config.encoder.output_frames(frames) for frames in range(100)], config.augment.speeds)
        plan = (config.data, config.vocabulary, config.batch, config.features, *shapes)
        if plan not in checked:
            check(config, request)
            checked.append(plan)


def run_directory(config: Config) -> Path:
    """Where the run lies, as an absolute path."""
    return (Path(config.run.dir) / config.run.name).absolute()


def submission_folder(run: Path) -> Path:
    """A folder under the run that no submission has used yet."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    names = itertools.chain([stamp], (f"{stamp}-{number}" for number in itertools.count(2)))
    return next(folder for name in names if not (folder := run / "jobs" / name).exists())


def resolved(config: Config) -> Config:
    """The settings with absolute paths, because the job runs in another directory."""
    data = _absolute(config.data, "train", "test", "noise", "rooms", "cache_dir")
    decoder = _absolute(config.decoder, *({"lm", "lexicon", "hot_words"} & vars(config.decoder).keys()))
    vocabulary = _absolute(config.vocabulary, "model") if isinstance(config.vocabulary, Pieces) else config.vocabulary
    run, train = _absolute(config.run, "dir"), _absolute(config.train, "init_from")
    return dataclasses.replace(config, run=run, data=data, vocabulary=vocabulary, decoder=decoder, train=train)


def _absolute(section: Any, *names: str) -> Any:
    """A section of the settings with these paths, or lists of paths, absolute; URLs and "" stay."""

    def absolute(path: str) -> str:
        return str(Path(path).absolute()) if path and not scheme_of(path) else path

    found = {name: getattr(section, name) for name in names}
    changed = {name: absolute(v) if isinstance(v, str) else list(map(absolute, v)) for name, v in found.items()}
    return dataclasses.replace(section, **changed)


_JOB: Fields = {
    "job_id": lambda value: is_text(value) and re.fullmatch(r"\w+", value) is not None,
    "executor": is_text,
    "folder": is_text,
    "time_s": is_time,
}


def read_job(run: Path) -> dict[str, Any] | None:
    """job.json of a run directory, about its newest job; None if no launcher has submitted it."""
    with contextlib.suppress(OSError):
        record = read_json(run / "job.json", _JOB)
        if record is not None and _JOB.keys() <= record.keys():
            return record
    return None


def _refuse_living(runs: Sequence[Path]) -> None:
    """Refuses runs that a Slurm job still trains, with one question to Slurm for all. Local runs hold the lease."""
    records = {run: record for run in runs if (record := read_job(run)) and record["executor"] == "slurm"}
    states = cluster.job_states(record["job_id"] for record in records.values())
    for run, record in records.items():
        state = states[record["job_id"]]
        if state.living:
            raise UserError(
                f"{run} is still trained by job {record['job_id']} ({state.state}): wait for it, cancel it with "
                f"'scancel {record['job_id']}', or choose another --run.name"
            )


def _write(path: Path, record: dict[str, Any]) -> None:
    replace_file(path, json.dumps(record, indent=1) + "\n")


def _dry_run(folder: Path, request: Request, name: str, resume: str) -> str:
    """The batch script; without Slurm, the command that would start the ranks on this machine."""
    code, settings = folder / "code", folder / "config.yaml"
    if request.executor == "slurm":
        return cluster.sbatch_text(folder, request, name=name, code=code, after=[job.conclude_command(folder)])
    arguments = ["--config", str(settings), "--resume", resume]
    command = [sys.executable, "-m", "ddp_asr.train", *arguments]
    if request.executor == "local":
        ranks = {"RANKS_PER_NODE": str(request.ranks_per_node)}
        command = node.torchrun_command(ranks, "ddp_asr.train", arguments)
    where = "in this process" if request.executor == "debug" else f"in the background, with its log in {folder}"
    lines = [
        f"# on this machine, {where}",
        f"# {code}: a copy of the program, {settings}: the settings",
        f"cd {shlex.quote(str(code))}",
        f"PYTHONPATH={shlex.quote(str(code))} {shlex.join(command)}",
    ]
    return "\n".join(lines) + "\n"


def _told(submission: Submission, request: Request, run: Path) -> str:
    """What a user wants to know about a job that has just been submitted."""
    job_id = submission.job_ids[0]
    cancel = f"scancel {job_id}" if request.executor == "slurm" else f"kill {job_id}"
    lines = [
        f"job {job_id}: nodes {request.nodes} x {counted(request.ranks_per_node, 'rank')}, run {run}",
        f"logs    {submission.log()} (and one for each other node beside it)",
        f"watch   ddp-asr status {run} --watch",
        f"cancel  {cancel}",
        "resume  the same command, once the job has ended",
    ]
    return "\n".join(lines)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="ddp-asr submit",
        description="Trains on Slurm, on this machine, or in this process; the run is the same everywhere.",
        epilog=EXAMPLES + "\nsettings, with their defaults:\n" + help_text(Config),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s --config FILE [job options] [--dry-run] [--section.key=value ...]",
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="settings in YAML")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto: from the newest good checkpoint of the run, if any; never: refuse a directory with results; "
        "PATH: from that checkpoint (default: auto)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the batch script, without Slurm the command, and submit nothing"
    )
    cluster.add_options(parser)
    options, rest = parser.parse_known_args(argv)
    return options, rest


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
