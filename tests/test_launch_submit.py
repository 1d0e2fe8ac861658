"""Queueing a training: what is refused before, what is written down, and real trainings on this machine."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ddp_asr.config import load_config
from ddp_asr.errors import UserError
from launch import submit
from launch.cluster import Request
from tests import tiny_training
from tests.conftest import REPOSITORY
from tests.tiny_training import LIMIT_S, STEPS, wait_until


@pytest.fixture
def corpus(tiny_corpus):
    return tiny_corpus


@pytest.fixture
def config(corpus, tmp_path):
    path, *settings = corpus.arguments(tmp_path / "runs")[1:]
    return load_config(Path(path), settings)


def submitted(*arguments: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "launch.submit", *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=LIMIT_S)


def test_more_ranks_than_micro_batches_are_refused(config):
    said = r"2 nodes x 3 are 6 ranks, and a step has only batch.micro_batches = 4"
    with pytest.raises(UserError, match=said):
        submit.check(config, Request(nodes="1-2", tasks_per_node=3))
    submit.check(config, Request(nodes="2", tasks_per_node=2))


def test_a_plan_that_cannot_be_is_refused(corpus, tmp_path):
    path, *settings = corpus.arguments(tmp_path / "runs")[1:]
    config = load_config(Path(path), [*settings, "--batch.micro_batches=4000"])
    with pytest.raises(UserError, match="micro_batches"):
        submit.check(config, Request())


def test_many_runs_of_one_plan_are_checked_once_and_another_plan_by_itself(config, monkeypatch):
    checked = []
    monkeypatch.setattr(submit, "check", lambda config, request: checked.append(config))
    rates = [
        dataclasses.replace(config, optim=dataclasses.replace(config.optim, learning_rate=x)) for x in (1e-3, 2e-3)
    ]
    other = dataclasses.replace(config, batch=dataclasses.replace(config.batch, micro_batches=3))
    submit.check_all([*rates, other, *rates], Request())
    assert checked == [rates[0], other]


def test_missing_shards_are_named_before_anything_is_queued(tmp_path):
    answer = submitted("--config", "configs/an4.yaml", f"--run.dir={tmp_path}", "--data.train=nowhere")
    assert answer.returncode == 2
    assert "there are no shards at nowhere" in answer.stderr and "Traceback" not in answer.stderr
    assert not list(tmp_path.iterdir())


def test_paths_no_longer_depend_on_where_the_job_runs(monkeypatch, tmp_path):
    config = load_config(None, ["--data.train=a,/b", "--data.test=", "--data.cache_dir=c", "--train.init_from=d.pt"])
    monkeypatch.chdir(tmp_path)
    found = submit.resolved(config)
    assert found.data.train == [str(tmp_path / "a"), "/b"] and found.data.test == []
    assert (found.data.cache_dir, found.train.init_from) == (str(tmp_path / "c"), str(tmp_path / "d.pt"))
    assert found.run.dir == str(tmp_path / "runs") and found.run.name == "default"
    assert submit.resolved(load_config(None)).data.cache_dir == ""
    given = "--data.train=s3://bucket/a,a --data.noise=n --data.rooms=/r --decoder.kind=beam --decoder.lm=l.arpa"
    found = submit.resolved(load_config(None, given.split()))
    assert found.data.train == ["s3://bucket/a", str(tmp_path / "a")]
    assert (found.data.noise, found.data.rooms) == ([str(tmp_path / "n")], ["/r"])
    assert found.decoder.lm == str(tmp_path / "l.arpa") and found.decoder.hot_words == ""
    pieces = submit.resolved(load_config(None, ["--vocabulary.kind=pieces", "--vocabulary.model=bpe.model"]))
    assert pieces.vocabulary.model == str(tmp_path / "bpe.model")


def test_no_two_submissions_share_a_folder(tmp_path):
    folders = []
    for _ in range(3):
        folders.append(submit.submission_folder(tmp_path))
        folders[-1].mkdir(parents=True)
    assert len(set(folders)) == 3


def test_a_dry_run_prints_the_batch_script_and_leaves_nothing(corpus, tmp_path):
    answer = submitted(*corpus.arguments(tmp_path / "runs"), "--nodes=2", "--tasks-per-node=2", "--dry-run")
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("#!/bin/bash\n") and "#SBATCH --nodes=2\n" in answer.stdout
    assert f"-m ddp_asr.launch.job conclude --submission {tmp_path}/runs/run/jobs/" in answer.stdout
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_on_this_machine_prints_the_command_and_leaves_nothing(corpus, tmp_path):
    arguments = [*corpus.arguments(tmp_path / "runs"), "--dry-run"]
    answer = submitted(*arguments, "--cluster=local", "--tasks-per-node=2")
    assert answer.returncode == 0, answer.stderr
    remark, copies, directory, command = answer.stdout.splitlines()
    assert remark.startswith("# on this machine, in the background, with its log in ")
    assert copies.startswith("# ") and directory.startswith(f"cd {tmp_path}/runs/run/jobs/")
    assert "-m ddp_asr.ranks.torchrun --standalone --nproc-per-node=2" in command and "-m ddp_asr.train" in command
    answer = submitted(*arguments, "--cluster=debug")
    assert "in this process" in answer.stdout and "-m ddp_asr.train --config" in answer.stdout.splitlines()[-1]
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_run_on_this_machine_is_the_same_run(corpus, tmp_path):
    """Two processes of a frozen copy, started from a copy of the checkout that is gone before they have read it."""
    checkout = tmp_path / "checkout"
    for package in ("ddp_asr", "launch"):
        shutil.copytree(REPOSITORY / package, checkout / package)
    command = [sys.executable, "-m", "launch.submit", *corpus.arguments(tmp_path / "runs", "ours")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)}
    answer = subprocess.run(
        [*command, "--cluster=local", "--tasks-per-node=2"],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert answer.returncode == 0, answer.stderr
    (checkout / "ddp_asr" / "trainer.py").write_text("raise SystemExit('edited')")
    run = tmp_path / "runs" / "ours"
    record = json.loads((run / "job.json").read_text())
    assert record["executor"] == "local" and answer.stdout.startswith(f"job {record['job_id']}: ")
    wait_until(lambda: (run / "status.json").exists() and tiny_training.status(run)["state"] == "done", "the run")
    wait_until(lambda: not tiny_training.is_alive(int(record["job_id"])), "the job's end")
    tiny_training.train(corpus.arguments(tmp_path / "runs", "theirs"), processes=2)
    tiny_training.assert_same_run(run, tmp_path / "runs" / "theirs")
    again = submitted(*corpus.arguments(tmp_path / "runs", "ours"), "--cluster=local")
    assert again.returncode == 0 and "is done: nothing to submit" in again.stdout


@pytest.mark.slow
def test_debug_trains_in_this_very_process(corpus, tmp_path):
    answer = submitted(*corpus.arguments(tmp_path / "runs"), "--cluster=debug", "--train.epochs=1")
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert tiny_training.status(tmp_path / "runs" / "run")["state"] == "done"
    assert tiny_training.status(tmp_path / "runs" / "run")["step"] == STEPS // 3


def test_submitting_loads_no_torch_and_takes_no_time(corpus, tmp_path):
    """All of it but sbatch itself, in CPU seconds of its process, which others do not lengthen."""
    ask = (
        "import sys, time; from launch import submit; submit.main(sys.argv[1:]); "
        "assert not {'torch', 'torchaudio', 'webdataset', 'comet_ml'} & set(sys.modules); "
        "print(time.process_time(), file=sys.stderr)"
    )
    command = [sys.executable, "-c", ask, *corpus.arguments(tmp_path), "--dry-run"]
    answer = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert float(answer.stderr) < 2.0
