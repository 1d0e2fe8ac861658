"""`ddp-asr`: starts the ranks of a machine, stops them once, and says how it went in one sentence and its status."""

import os
import signal
import subprocess
import sys

import pytest

from ddp_asr import cli
from ddp_asr.errors import UserError
from ddp_asr.runs import checkpoint
from tests import tiny_training as tiny
from tests.conftest import REPOSITORY


def start(arguments, processes=2, command="train"):
    return tiny.Torchrun(arguments, processes, command=command)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_stop_is_one_sentence_and_the_same_command_goes_on(tiny_corpus, tmp_path, number):
    """Ctrl-C goes to the whole process group, as from a terminal."""
    arguments = tiny_corpus.arguments(tmp_path, "run", "--train.epochs=100")
    command = start(arguments)
    ranks = command.ranks()
    tiny.wait_until(lambda: tiny.lines_of(tmp_path / "run") > 2, "the first steps")
    (os.killpg if number == signal.SIGINT else os.kill)(command.popen.pid, number)
    assert command.wait() == 0, command.output
    assert not any(map(tiny.is_alive, ranks))
    found = tiny.status(tmp_path / "run")
    assert (found["state"], found["retry"], found["reason"]) == ("stopped", True, number.name)
    said = f"stopped at step {found['step']}: {number.name}; the same command goes on; "
    assert command.output.splitlines()[-1].startswith(said), command.output
    assert "Traceback" not in command.output and "torch" not in command.output
    assert checkpoint.step_path(tmp_path / "run", found["step"]).is_file()

    again = start([*arguments, f"--train.stop_at_step={found['step'] + 2}"])
    assert again.wait() == 0, again.output
    assert f"going on from step {found['step']}" in again.output


@pytest.mark.slow
def test_ranks_whose_command_was_killed_stop(tiny_corpus, tmp_path):
    command = start(tiny_corpus.arguments(tmp_path, "run", "--train.epochs=200"))
    ranks = command.ranks()
    tiny.wait_until(lambda: tiny.lines_of(tmp_path / "run") > 2, "the first steps")
    os.kill(command.popen.pid, signal.SIGKILL)
    tiny.wait_until(lambda: not any(map(tiny.is_alive, ranks)), "the ranks to end", limit_s=30)
    command.wait()
    found = tiny.status(tmp_path / "run")
    assert (found["state"], found["retry"]) == ("stopped", True), command.output


@pytest.mark.slow
def test_two_runs_at_the_same_time_do_not_meet(tiny_corpus, tmp_path):
    commands = [start(tiny_corpus.arguments(tmp_path, name, "--train.epochs=1")) for name in ("one", "other")]
    assert [command.wait() for command in commands] == [0, 0], [command.output for command in commands]
    assert tiny.status(tmp_path / "one")["state"] == tiny.status(tmp_path / "other")["state"] == "done"


@pytest.mark.slow
def test_a_mistake_that_the_ranks_find_is_one_sentence_and_status_2(tiny_corpus, tmp_path):
    command = start([*tiny_corpus.arguments(tmp_path), "--resume", "nowhere.pt"])
    assert command.wait() == 2, command.output
    assert command.output.startswith("error: checkpoint nowhere.pt cannot be read") and command.output.count("\n") == 1


@pytest.mark.slow
def test_evaluation_takes_processes_too(tiny_corpus, tmp_path):
    tiny.train(tiny_corpus.arguments(tmp_path, "run", "--train.epochs=1"))
    command = start([str(tmp_path / "run"), str(tiny_corpus.test)], command="evaluate")
    assert command.wait() == 0, command.output
    assert command.output.count("WER") == 1


def run(*arguments):
    command = [sys.executable, "-X", "importtime", "-m", "ddp_asr", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--train.epoch=3"], "did you mean 'train.epochs'?"),
        (["--processes=5"], "5 processes cannot share out 4 micro-batches a step"),
        (["--processes=0"], "--processes must be 1 or more, not 0"),
    ],
)
def test_a_mistake_in_the_command_line_is_found_before_any_rank_starts(tiny_corpus, tmp_path, options, expected):
    done = run("train", "--processes=2", *tiny_corpus.arguments(tmp_path), *options)
    assert done.returncode == 2 and done.stdout == ""
    (sentence,) = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert sentence.startswith("error: ") and expected in sentence
    assert "| torch\n" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_is_one_for_so_many_processes(tiny_corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_torchrun", None)
    assert cli.main(["train", "--processes", "3", *tiny_corpus.arguments(tmp_path), "--dry-run"]) == 0
    assert " on 3, " in capsys.readouterr().out
    assert "WORLD_SIZE" not in os.environ


def test_without_a_number_there_is_a_process_for_each_gpu(tiny_corpus, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(cli, "_torchrun", lambda *arguments: started.append(arguments) or (0, ""))
    monkeypatch.setattr("ddp_asr.train.main", lambda arguments: started.append(arguments) or 0)
    arguments = tiny_corpus.arguments(tmp_path)
    for gpus in (0, 1, 4):
        monkeypatch.setattr(cli, "_gpus", lambda gpus=gpus: gpus)
        assert cli.main(["train", *arguments]) == 0
    assert started == [arguments, arguments, (4, "ddp_asr.train", arguments)]


@pytest.mark.parametrize("ended", [{"state": "stopped"}, {"state": "done"}, {"state": "failed"}, None], ids=str)
def test_the_status_of_this_attempt_decides(tiny_corpus, tmp_path, monkeypatch, capsys, ended):
    """torchrun's own status is 130 after Ctrl-C, whatever the ranks did."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "status.json").write_text('{"state": "stopped", "time_s": 1.0}')  # of an attempt before

    def torchrun(*arguments):
        if ended is not None:
            (run / "status.json").write_text(f'{{"state": "{ended["state"]}", "time_s": 1e11}}')
        return 130, "torchrun was stopped by SIGINT"

    monkeypatch.setattr(cli, "_torchrun", torchrun)
    ended_well = ended is not None and ended["state"] != "failed"
    assert cli.main(["train", "--processes=2", *tiny_corpus.arguments(tmp_path)]) == (0 if ended_well else 130)
    assert ("stopped by SIGINT" in capsys.readouterr().err) == (not ended_well)


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_its_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    help_text = capsys.readouterr().out
    assert end.value.code == 0 and (f"ddp_asr.{command}" in help_text or f"ddp-asr {command}" in help_text)


def test_too_few_processes_are_refused_for_evaluation_too():
    with pytest.raises(UserError, match="--processes must be 1 or more, not -1"):
        cli.main(["evaluate", "--processes=-1", "runs/an4", "shards/an4-test"])
