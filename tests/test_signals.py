"""A request to stop, by a signal or because torchrun is gone: before training, at a step boundary, and without one."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests import tiny_training as tiny
from tests.conftest import REPOSITORY


def script(body: str, **options) -> subprocess.Popen:
    """A process with a stop request `stop`, of half a second's grace, which writes lines."""
    head = """
        import os, signal, sys, threading, time
        from ddp_asr.ranks.signals import StoppedBeforeTraining
        from ddp_asr.ranks.watchdog import Watchdog
        def say(text): print(text, flush=True)
        watchdog = Watchdog()
        watchdog.set_phase(7, "updating")
        watchdog.on_end = lambda state, reason: say(f"{state}: {reason}")
        stop = watchdog.stop
        watchdog.watch_signals(grace_s=0.5)
    """
    code = textwrap.dedent(head) + textwrap.dedent(body)
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def first_line(process: subprocess.Popen) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGQUIT])
def test_before_training_a_signal_ends_the_setting_up_at_once(number):
    process = script("""
        try:
            say("ready")
            sys.stdin.read()
        except StoppedBeforeTraining as early:
            say(f"stopped by {early}")
    """)
    assert first_line(process) == "ready\n"
    process.send_signal(number)
    assert ended(process) == (0, f"stopped by {number.name}\n", "")


def test_a_rank_that_has_lost_its_peers_in_the_setting_up_waits_for_the_signal_that_ended_them():
    process = script("""
        from ddp_asr.ranks.suspects import Suspect
        watchdog.suspect = lambda: Suspect("rank 1 has ended", certain=True)
        watchdog.silent_after_s = 60.0
        try:
            say("ready")
            watchdog.name_lost_rank("Connection closed")
        except StoppedBeforeTraining as early:
            say(f"stopped by {early}")
        stop.defer_to_boundary()
        say(watchdog.name_lost_rank("Connection closed")[:24])
        stop.mark_handled()
    """)
    assert first_line(process) == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (0, "stopped by SIGTERM\nrank 0 of 1 lost the oth\n", "")


def test_in_training_a_signal_waits_for_the_boundary():
    """The first reason is kept; once the boundary is reached, the grace time no longer counts."""
    process = script("""
        watchdog._stop_grace_s = 60.0  # more than this test takes on a slow machine
        stop.defer_to_boundary()
        say("ready")
        sys.stdin.readline()
        say(stop.reason)
        stop.mark_handled()
        stop._requested_s -= 120.0
        time.sleep(0.6)  # the watchdog looks four times a second
        say("ended")
    """)
    assert first_line(process) == "ready\n"
    process.send_signal(signal.SIGUSR2)
    process.send_signal(signal.SIGTERM)
    tiny.wait_until(lambda: pending_signals(process.pid) == 0, "both signals")
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    code, out, err = ended(process)
    assert (code, err) == (0, "") and out.splitlines()[0] in ("SIGUSR2", "SIGTERM") and out.endswith("ended\n")


def rests(pid: int) -> bool:
    """Whether the main thread did nothing for a moment."""
    looks = []
    for _ in range(2):
        looks.append(Path(f"/proc/{pid}/task/{pid}/status").read_text())
        time.sleep(0.05)
    return looks[0] == looks[1] and "(sleeping)" in looks[0]


def pending_signals(pid: int) -> int:
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return int(lines["ShdPnd"], 16) | int(lines["SigPnd"], 16)


@pytest.mark.parametrize("where", ["stop.defer_to_boundary()", ""], ids=["in training", "before it"])
def test_a_rank_that_reaches_no_boundary_ends_itself(where):
    """Its main thread is inside C code, where no Python handler runs: as in a collective whose peers are gone."""
    process = script(f"""
        import ctypes
        mutex = ctypes.create_string_buffer(64)  # a normal one, free; locked twice it blocks for good
        {where}
        say("ready")
        for _ in range(2):
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
    """)
    assert first_line(process) == "ready\n"
    tiny.wait_until(lambda: rests(process.pid), "the main thread to block")
    process.send_signal(signal.SIGTERM)
    code, out, err = ended(process)
    expected = (
        r"error: SIGTERM, and no step boundary within distributed.stop_grace_s = 0.5 s; this rank has been at step 7, "
        r"updating, for \d+ s; started again, the run resumes from its newest checkpoint\n"
    )
    assert code == 2 and re.fullmatch(expected, err)
    assert out == err.replace("error: ", "stopped: ")


def test_ranks_that_wait_for_a_stuck_one_end_within_the_grace(tiny_corpus, tmp_path):
    gate = tiny.Gate(tmp_path, step=3, rank=1)
    arguments = tiny_corpus.arguments(tmp_path, "run", "--distributed.stop_grace_s=1")
    ranks = tiny.start(arguments, 3, [gate])
    gate.wait()
    for process in ranks.processes:
        os.kill(process.pid, signal.SIGTERM)
    codes = ranks.wait(limit_s=30)
    assert all(codes) and "Traceback" not in ranks.output
    assert "SIGTERM, and no step boundary within distributed.stop_grace_s = 1 s" in ranks.output
    found = tiny.status(tmp_path / "run")
    assert found["retry"] and found["state"] in ("stopped", "failed")


def test_a_signal_before_the_first_step_ends_all_ranks(tiny_corpus, tmp_path):
    ranks = tiny.start(tiny_corpus.arguments(tmp_path), 3, [slow_setting_up])
    ready = [tiny.wait_until(lambda log=log: "setting up" in log.read_text(), "setting up") for log in ranks.logs]
    assert all(ready)
    for process in ranks.processes:
        os.kill(process.pid, signal.SIGTERM)
    ranks.succeed()
    found = tiny.status(tmp_path / "run")
    assert (found["state"], found["retry"], found["step"]) == ("stopped", True, 0)
    assert found["reason"] == "SIGTERM before the first step"


def slow_setting_up() -> None:
    """Reading the corpus never ends on rank 1, and the others wait for it in a collective."""
    import threading

    from ddp_asr.training import session

    before = session.read_corpus

    def read_corpus(*arguments):
        print("setting up", flush=True)
        if os.environ["RANK"] == "1":
            threading.Event().wait()
        return before(*arguments)

    session.read_corpus = read_corpus
