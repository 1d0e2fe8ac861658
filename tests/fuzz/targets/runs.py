"""The files of a run directory, for all that read them: a resume, launchers, the tracker, curves."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

from ddp_asr.runs import plots
from ddp_asr.runs.comet import TrackingStatus, experiment_key
from ddp_asr.runs.directory import RunDirectory
from ddp_asr.runs.lease import Watch
from ddp_asr.runs.records import RunReader, Sent
from ddp_asr.training.attempt import Reached
from ddp_asr.training.resume import checkpoint_was_saved, find_checkpoint
from launch import job, status, sweep
from launch.submit import read_job
from tests.fuzz.mutate import Tree, mutate_file
from tests.fuzz.target import Target
from tests.run_files import evaluation_line, train_line


def _run() -> Tree:
    """A run that was stopped after an evaluation; the same bytes each time."""
    lines = [train_line(step, time_s=1.7e9 + step, learning_rate=1e-3, gradient_norm=0.5) for step in range(1, 6)]
    lines += [evaluation_line(5, wer=0.25, time_s=1.7e9 + 9), evaluation_line(4, wer=None, time_s=1.7e9 + 8)]
    lines += [{"kind": "epoch", "step": 5, "epoch": 1, "utterances": 26, "fired": {"noise": 3}, "time_s": 1.7e9 + 10}]
    samples = {"step": 5, "samples": [{"key": "a", "reference": "A B", "hypothesis": "A"}]}
    documents = {
        "status.json": {
            **{"state": "stopped", "reason": "SIGTERM", "retry": True, "step": 5, "epoch": 1, "total_steps": 40},
            **{"best_wer": 0.25, "checkpoint_saved": False, "attempt": 2, "job_id": None, "host": "a", "time_s": 1.7e9},
        },
        "lease.json": {
            **{"host": "a", "pid": 4, "start_time": 77, "pid_space": "b c", "job_id": None, "attempt": 2},
            **{"nonce": "0123456789abcdef", "renewals": 4},
        },
        "job.json": {"job_id": "12345", "executor": "local", "folder": "/nowhere/jobs/x", "time_s": 1.7e9},
        "requeues.json": {"job_id": "12345", "failures": 1, "failed_step": 5},
        "tracking.json": {
            **{"mode": "offline", "url": "", "failures": 0, "last_error": "", "finished": False},
            **{"sent": {"steps": {"train": 3, "test": 0, "samples": 0}, "versions": {"name": "x"}}},
        },
        "comet.json": {"experiment_key": "0123456789abcdef0123456789abcdef"},
        "environment.json": {
            "command": "train --config configs/an4.yaml",
            "processes": 2,
            "git_commit": "abc",
            "torch": "2",
        },
    }
    tree: Tree = {name: json.dumps(document, indent=1).encode() + b"\n" for name, document in documents.items()}
    tree["metrics.jsonl"] = "".join(json.dumps(line) + "\n" for line in lines).encode()
    tree["samples.jsonl"] = json.dumps(samples).encode() + b"\n"
    tree["config.yaml"] = (
        b"run: {name: x}\ntrain: {precision: fp32, epochs: 3}\ntracking: {tags: [a, b], mode: 'off'}\n"
    )
    return {f"runs/x/{name}": content for name, content in tree.items()}


class _AnyLease:
    def check(self) -> None:
        pass

    def release(self) -> None:
        pass


class Resume(Target):
    """Run directories, as an attempt that goes on reads them"""

    name = "resume"
    share = 80
    mutated = tuple(f"runs/x/{name}" for name in ("status.json", "metrics.jsonl", "samples.jsonl", "lease.json"))

    def seeds(self) -> list[Tree]:
        return [_run()]

    def read(self, directory: Path) -> None:
        run = directory / "runs" / "x"
        watch = Watch(run)
        watch.verdict()
        str(watch.owner)
        files = RunDirectory(run, _AnyLease(), None, 2)  # type: ignore[arg-type]
        saved = checkpoint_was_saved(run, files.former)
        reached = Reached.by_status(dict(files.former), saved)
        f"{reached.epoch} {reached.best_wer} {reached.describe()}"
        files.refuse("the test")
        find_checkpoint(run, "auto", saved, lambda _: None)
        files.cut_after(3, 3)
        files.close()


class Launchers(Target):
    """Run directories, as launch.status, sweep, job and submit read them"""

    name = "launchers"
    share = 60
    mutated = tuple(
        f"runs/x/{name}" for name in ("status.json", "metrics.jsonl", "job.json", "lease.json", "requeues.json")
    )

    def seeds(self) -> list[Tree]:
        return [_run()]

    def read(self, directory: Path) -> None:
        run, runs = directory / "runs" / "x", directory / "runs"
        listed = status.RunReader().read(status.find_runs(runs), runs)
        shown = status.run_table(status.in_order(listed), now_s=1.7e9 + 60)
        status.show(shown)
        json.dumps([str(vars(each)) for each in listed])
        sweep.score(sweep.best_evaluation(run))
        read_job(run)
        ended = job.Ended("12345", 2, "RUNNING", status.read_status(run), exit_code=1)
        job.judge(ended, job.read_history(run))


class Tracker(Target):
    """Run directories, as the tracking process and the curves read them"""

    name = "tracker"
    share = 60
    mutated = tuple(
        f"runs/x/{name}"
        for name in ("metrics.jsonl", "samples.jsonl", "tracking.json", "comet.json", "environment.json", "config.yaml")
    )

    def seeds(self) -> list[Tree]:
        return [_run()]

    def read(self, directory: Path) -> None:
        run = directory / "runs" / "x"
        known = TrackingStatus.load(run)
        known.summary(run)
        experiment_key(run)
        reader = RunReader(run)
        for record in (*reader.unsent(known.sent), *reader.unsent(Sent())):
            known.sent.add(record)
        known.save(run)
        train, test = plots.read_metrics(run)
        for name in ("loss", "wer", "learning_rate"):
            plots.smooth(plots.column([*train, *test], name)[1], 3)


class Curves(Target):
    """curves.png of damaged metrics"""

    name = "curves"
    share = 2
    mutated = ("runs/x/metrics.jsonl",)

    def seeds(self) -> list[Tree]:
        return [_run()]

    def mutate(self, tree: Tree, random: Random) -> Tree:
        return mutate_file(tree, self.mutated[0], random)

    def read(self, directory: Path) -> None:
        plots.draw_curves(directory / "runs" / "x")
