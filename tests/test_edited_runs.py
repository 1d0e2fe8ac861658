"""A run's files may have been edited by hand or torn: readers leave out what is not ours, and never fail."""

import contextlib
import dataclasses
import json
import operator
from typing import Any

import pytest

from ddp_asr.errors import UserError
from ddp_asr.files import is_count, is_number, is_time, read_json
from ddp_asr.runs import plots
from ddp_asr.runs.comet import TrackingStatus, experiment_key
from ddp_asr.runs.directory import RunDirectory, read_status
from ddp_asr.runs.lease import Lease, Watch
from ddp_asr.runs.records import RunReader, Sent, read_settings
from ddp_asr.training.attempt import Reached
from ddp_asr.training.resume import checkpoint_was_saved, find_checkpoint
from launch import cluster, job, status, submit, sweep
from tests.run_files import evaluation_line, train_line, write_run

JUNK: list[Any] = [
    *(None, True, -1, 0, 1.5, 10**400, float("nan"), float("inf"), 1e300),
    *("", "x", "../../x", "/x", "7" * 500, [], ["x"], [{"key": []}], {}, {"x": []}, {"steps": 3}),
]


@pytest.fixture
def run(tmp_path):
    """A run with every file that some reader reads back."""
    path = tmp_path / "runs" / "mine"
    lines = [train_line(1), evaluation_line(1, wer=0.4), train_line(2)]
    write_run(path, "running", lines=lines, job={"job_id": "17"}, job_id="17", total_steps=9, best_wer=0.4)
    (path / "samples.jsonl").write_text(
        json.dumps({"step": 1, "epoch": 1, "samples": [{"key": "a", "reference": "b", "hypothesis": "c"}]}) + "\n"
    )
    (path / "config.yaml").write_text("train: {precision: fp32}\ntracking: {tags: [a], project: speech}\n")
    (path / "environment.json").write_text(json.dumps({"processes": 2, "command": "train --config a.yaml"}))
    (path / "requeues.json").write_text(json.dumps(dataclasses.asdict(job.History("17", 1, 3))))
    (path / "tracking.json").write_text(json.dumps(dataclasses.asdict(TrackingStatus())))
    experiment_key(path)
    lease = Lease.acquire(path, job_id="17", attempt=1)
    content = (path / "lease.json").read_text()
    lease.release()
    (path / "lease.json").write_text(content)
    return path


def read_all(run, monkeypatch):
    """Everything that reads a run's files; a UserError is an answer, too."""
    monkeypatch.setattr(cluster, "job_states", lambda ids: {each: cluster.JobState("RUNNING") for each in ids})
    monkeypatch.setattr(cluster, "scontrol_job", lambda job_id: {"JobState": "RUNNING"})
    monkeypatch.setattr(cluster, "run", lambda command: "")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    former = read_status(run) or {}
    found = status.find_runs(run.parent)
    summaries = status.in_order(status.RunReader().read(found, run.parent))
    status.show(status.run_table(summaries, now_s=1.9e9))
    json.dumps([dataclasses.asdict(each) for each in summaries], default=str)
    sweep.score(sweep.best_evaluation(run))
    submit.read_job(run)
    Watch(run).verdict()
    train, test = plots.read_metrics(run)
    for name in ("loss", "wer"):
        plots.column(train, name), plots.column(test, name)
    TrackingStatus.load(run).summary(run)
    experiment_key(run)
    with contextlib.suppress(UserError):
        RunReader(run).unsent(Sent())
    with contextlib.suppress(UserError):
        find_checkpoint(run, "auto", checkpoint_was_saved(run, former), print)
    Reached.by_status(former, None).describe()
    job.conclude(run, 1)


@pytest.mark.parametrize(
    "name",
    [
        *("status.json", "metrics.jsonl", "samples.jsonl", "job.json", "requeues.json", "tracking.json"),
        *("comet.json", "environment.json", "lease.json"),
    ],
)
def test_any_field_may_hold_anything(run, monkeypatch, name):
    whole = (run / name).read_text()
    lines = whole.splitlines() if name.endswith(".jsonl") else [whole]
    for number, line in enumerate(lines):
        for field in json.loads(line):
            for junk in [*JUNK, operator.delitem]:
                record = json.loads(line)
                if junk is operator.delitem:
                    del record[field]
                else:
                    record[field] = junk
                (run / name).write_text("\n".join([*lines[:number], json.dumps(record), *lines[number + 1 :]]) + "\n")
                read_all(run, monkeypatch)
                for each in run.glob("*.json"):  # `conclude` writes some of them
                    assert read_json(each) is not None


@pytest.mark.parametrize("junk", [b"", b"{", b"\0" * 50, b"\xff\xfe", b"[" * 5000, b'{"a":' * 5000, b"3", b"[[1]]\n"])
def test_a_file_may_be_torn_or_of_something_else(run, monkeypatch, junk):
    files = [path for path in run.iterdir() if path.suffix in (".json", ".jsonl", ".yaml")]
    assert len(files) == 10
    for path in files:
        whole = path.read_bytes()
        for content in (junk, whole[: len(whole) // 2], whole[: len(whole) // 2] + junk, whole + junk):
            path.write_bytes(content)
            read_all(run, monkeypatch)
        path.write_bytes(whole)


def test_a_resume_keeps_the_lines_that_it_knows_as_they_were(run):
    whole = (run / "metrics.jsonl").read_text()
    odd = {"kind": "train", "step": 1, "loss": None, "fired": {"speed": 3}, "mine": "a note, half of a pair: \ud800"}
    without = [{"kind": "train"}, {"kind": "test", "step": "1"}, {"kind": "train", "step": None}, {"step": True}]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in (odd, *without))

    class AnyLease:
        def check(self):
            pass

    RunDirectory(run, AnyLease(), None, 1).cut_after(2, 1)
    assert (run / "metrics.jsonl").read_text() == whole + json.dumps(odd) + "\n"


@pytest.mark.parametrize("deep", ["{x: *%s, y: *%s}", "[*%s, *%s]"], ids=["mappings", "lists"])
def test_aliases_do_not_multiply_without_end(run, deep):
    lines = ["a0: &a0 {x: 1}", *(f"a{n}: &a{n} {deep % (f'a{n - 1}', f'a{n - 1}')}" for n in range(1, 60))]
    (run / "config.yaml").write_text("\n".join(lines).replace("[", "{x: [").replace("]", "]}"))
    with pytest.raises(UserError, match=r"config.yaml has more than 10,000 values, by its aliases perhaps"):
        read_settings(run)
    (run / "config.yaml").write_text("run: &a {x: *a}")
    with pytest.raises(UserError, match=r"config.yaml is no valid YAML"):
        read_settings(run)


@pytest.mark.parametrize("value", JUNK)
def test_what_counts_as_a_number_can_be_computed_with(value):
    if is_number(value):
        assert float(value) - 1 < float("inf")
    if is_count(value):
        assert int(value) == value >= 0
    if is_time(value):
        status.duration(1.9e9 - value)
