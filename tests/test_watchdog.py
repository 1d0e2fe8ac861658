"""The watchdog of a rank: on a store of our own, with its threads, and in real ranks of which one dies or hangs."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from ddp_asr.ranks import watchdog
from ddp_asr.ranks.watchdog import Watchdog
from tests import tiny_training as tiny
from tests.conftest import REPOSITORY

HOST = re.escape(socket.gethostname())


# ---- posts on a store ----------------------------------------------------------------------------------------------


class DictStore:
    """A store that waits for missing keys, as torch's does; it can be told to fail, and to return no more."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.fails = False
        self.returns = threading.Event()
        self.returns.set()
        self._changed = threading.Condition()

    def set(self, key: str, value: str) -> None:
        if self.fails:
            raise RuntimeError("Broken pipe")
        with self._changed:
            self.values[key] = value.encode()
            self._changed.notify_all()

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.returns.wait()
        with self._changed:
            if not self._changed.wait_for(lambda: all(key in self.values for key in keys), tiny.LIMIT_S):
                raise RuntimeError("wait timeout")
            return [self.values[key] for key in keys]


def after_meeting(ranks: list[Watchdog]) -> list[Watchdog]:
    """The ranks, once each has posted and read the posts of the others."""
    threads = [threading.Thread(target=each.exchange) for each in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(tiny.LIMIT_S)
        assert not thread.is_alive()
    return ranks


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def ranks(clock):
    """Three ranks that have met; no threads."""
    store = DictStore()
    return after_meeting([Watchdog(rank, 3, store, 600.0, clock) for rank in range(3)])


def test_a_rank_waits_for_the_first_posts_of_all():
    store = DictStore()
    both = [Watchdog(rank, 2, store, 600.0) for rank in range(2)]
    first = threading.Thread(target=both[0].exchange)
    first.start()
    tiny.wait_until(lambda: store.values, "the first post")
    first.join(0.1)
    assert first.is_alive() and both[0].last_posts() == {}
    both[1].exchange()
    first.join(tiny.LIMIT_S)
    assert list(both[0].last_posts()) == list(both[1].last_posts()) == [0, 1]


def test_silence_is_measured_by_the_readers_clock_alone(ranks, clock):
    for each in [*ranks[1:], ranks[0]]:
        each.set_phase(7, "updating")
        each.exchange()
    for _ in range(20):
        clock.now_s += 2.0
        ranks[1].exchange()
        ranks[0].exchange()
    assert [round(ranks[0].last_posts()[rank].silent_s) for rank in (1, 2)] == [0, 40]
    clock.now_s += 5.0  # the store is not asked meanwhile: no rank becomes silent by that
    assert [round(ranks[0].last_posts()[rank].silent_s) for rank in (1, 2)] == [0, 40]
    assert ranks[0].suspect().words.endswith("was last seen 45 s ago at step 7, updating")


def test_a_collective_that_failed_names_the_rank_that_it_waited_for(ranks, clock, monkeypatch):
    def a_moment_passes(seconds):
        clock.now_s += seconds
        for each in ranks[::-1]:
            each.exchange()

    monkeypatch.setattr(watchdog.time, "sleep", a_moment_passes)
    for each in ranks:
        each.set_phase(8, "forward and backward of micro-batch 2")
    for each in ranks[:2]:
        each.begin_waiting("reducing the gradients")
    a_moment_passes(60.0)
    place = "at step 8, forward and backward of micro-batch 2"
    late = rf"rank 2 on {HOST} has been {place}, for 6\d s while others wait for it"
    advice = "look at the log and the host there; started again, the run resumes from its newest checkpoint"
    sentence = ranks[0].name_lost_rank("Connection closed")
    assert re.fullmatch(rf"rank 0 of 3 lost the others \(Connection closed\): {late}; {advice}", sentence)
    # The others read which rank it blames.
    ranks[0]._set_end("")
    for each in ranks:
        each.exchange()
    for each in ranks[1:]:
        assert re.fullmatch(late, each.suspect().words) and each.suspect().certain


def test_a_single_process_waits_for_nobody_and_has_no_thread(clock):
    before = threading.active_count()
    alone = Watchdog(clock=clock)
    alone.begin_waiting()
    assert not alone._here.waiting
    alone.announce_exit("it fell over")
    alone.close()
    assert threading.active_count() == before


# ---- threads -------------------------------------------------------------------------------------------------------


@pytest.fixture
def started():
    """Two ranks on a store, with their threads and a limit of a second; `ended` holds what would end a process."""
    store, ended = DictStore(), []

    class Watched(Watchdog):
        def _report_and_exit(self, state: str, sentence: str) -> None:
            ended.append((self.rank, state, sentence))

    both = after_meeting([Watched(rank, 2, store, 1.0) for rank in range(2)])
    for each in both:
        each.start()
    yield both, store, ended
    store.returns.set()
    for each in both:
        each.close()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("watchdog")]


def test_posts_go_round_until_the_store_fails(started):
    (first, second), store, _ = started
    second.set_phase(5, "updating")
    tiny.wait_until(lambda: first.last_posts()[1].post.step == 5, "the post")
    assert not first.store_gone() and "the network may be the cause" in first.suspect().words
    store.fails = True
    tiny.wait_until(lambda: first.store_gone() and second.store_gone(), "the loss")
    assert first.last_posts()[1].post.phase == "updating"
    assert second.suspect().words.startswith(f"rank 0 on {socket.gethostname()}, or its host, no longer answers")


def test_a_store_that_never_returns_does_not_block_the_watchdog(started):
    (_, second), store, ended = started
    store.returns.clear()
    second.begin_waiting("reducing")
    tiny.wait_until(lambda: ended, "the end")
    (rank, state, sentence) = ended[0]
    assert (rank, state) == (1, "failed") and second.store_gone()
    assert f"rank 0 on {socket.gethostname()}, or its host, no longer answers" in sentence


@pytest.mark.parametrize("gone", [False, True])
def test_closing_waits_for_a_store_that_is_slow_and_not_for_one_that_is_gone(gone):
    """A thread that returns from the store while Python ends aborts the process, although its training is done."""
    now_s, store = 0.0, DictStore()
    alone = Watchdog(0, 1, store, clock=lambda: now_s)
    alone.start()
    tiny.wait_until(alone.last_posts, "a post")
    store.returns.clear()
    alone._post_now.set()
    tiny.wait_until(lambda: alone._asked_s is not None, "a question to the store")
    closing = threading.Thread(target=alone.close)
    closing.start()
    closing.join(1.5)
    assert closing.is_alive()
    if gone:
        now_s = 2 * alone.silent_after_s
    else:
        store.returns.set()
    closing.join(tiny.LIMIT_S)
    assert not closing.is_alive() and alone._threads[1].is_alive() == gone
    store.returns.set()
    alone._threads[1].join(tiny.LIMIT_S)


def test_a_rank_that_waits_too_long_is_ended_once_and_one_that_works_is_not(started):
    (first, second), _, ended = started
    notes: list[str] = []
    first.on_long_wait = notes.append
    second.set_phase(5, "copying shards")
    first.set_phase(5, "copying shards")
    first.begin_waiting()
    tiny.wait_until(lambda: first._ended and second.last_posts()[0].post.ended, "the end")
    # The other one may follow: it does not move either, and now a rank has ended.
    assert ended[0][:2] == (0, "failed") and [rank for rank, _, _ in ended].count(0) == 1
    assert "lost the others (no answer for 1 s, distributed.timeout_s = 1 s): rank 1 on" in ended[0][2]
    assert len(notes) == 1 and re.search(r"^has waited for \d s at step 5, copying shards: rank 1 on", notes[0])


def test_a_rank_that_moves_is_never_ended(started):
    (first, _), _, ended = started
    until_s = time.monotonic() + 2.5
    while time.monotonic() < until_s:
        first.begin_waiting("reducing")
        time.sleep(0.05)
    assert ended == []


def test_once_another_rank_has_ended_a_rank_that_is_stuck_ends_too(started):
    (first, second), _, ended = started
    second.set_phase(5, "forward and backward of micro-batch 1")
    first.announce_exit("it fell over")
    tiny.wait_until(lambda: ended, "the end")
    ((rank, state, sentence),) = ended
    assert (rank, state) == (1, "failed") and "(it fell over); look at the log" in sentence
    assert "(stuck at step 5, forward and backward of micro-batch 1): rank 0 on" in sentence


def test_a_pending_stop_ends_a_rank_that_waits_and_names_the_one_it_waits_for(started):
    (first, second), _, ended = started
    first._stop_grace_s = 0.3
    second.set_phase(5, "copying shards")
    first.set_phase(5, "copying shards")
    first.begin_waiting()
    tiny.wait_until(lambda: first.last_posts()[1].post.step == 5, "the post")
    first.stop.request("SIGTERM")
    tiny.wait_until(lambda: ended, "the end")
    ((rank, state, sentence),) = ended
    assert (rank, state) == (0, "stopped")
    assert sentence.startswith("SIGTERM, and no step boundary within distributed.stop_grace_s = 0.3 s; rank 1 on")
    assert "rank 1 on" in second.suspect().words  # nobody blames rank 0 for it


def test_only_one_thread_reports_how_a_rank_ends(started):
    (first, _), _, _ = started
    held = threading.Thread(target=first.announce_exit, args=("second",), daemon=True)
    first.announce_exit("first")
    held.start()
    held.join(0.3)
    assert held.is_alive() and "(first)" in first._ended


def test_the_rank_that_keeps_the_store_stays_until_the_others_have_read_why(started):
    (first, second), _, _ = started
    first.post_every_s = 60.0  # the limit of its patience
    ending = threading.Thread(target=first.announce_exit, args=("it fell over",))
    ending.start()
    tiny.wait_until(lambda: "(it fell over)" in second.last_posts()[0].post.ended, "the reason")
    assert ending.is_alive()
    second.announce_exit("it, too")
    first._post_now.set()
    ending.join(tiny.LIMIT_S)
    assert not ending.is_alive()


# ---- real ranks ----------------------------------------------------------------------------------------------------

TIMEOUT_S = 12.0  # a rank that freezes once the others have noted a wait falls silent before
LIMITED = f"--distributed.timeout_s={TIMEOUT_S}"
SLACK_S = 25.0  # what a slow machine may add


def sentences(log) -> list[str]:
    return re.findall(r"^error: (.*)$", log.read_text(), flags=re.MULTILINE)


def assert_named(ranks: tiny.Ranks, survivors: list[int], pattern: str) -> str:
    """Each survivor has ended in time, with 2 and one sentence that holds the pattern; returns the first one's."""
    held_s = time.monotonic()
    for rank in survivors:
        ranks.processes[rank].join(TIMEOUT_S + SLACK_S)
    assert [ranks.processes[rank].exitcode for rank in survivors] == [2] * len(survivors), ranks.output
    assert time.monotonic() - held_s < TIMEOUT_S + SLACK_S
    for rank in survivors:
        said = sentences(ranks.logs[rank])
        assert len(said) == 1 and "Traceback" not in ranks.logs[rank].read_text(), ranks.output
        assert re.fullmatch(rf"rank {rank} of 3 lost the others \(.*\): {pattern}; {watchdog.ADVICE}", said[0]), said
    return sentences(ranks.logs[survivors[0]])[0]


def assert_failed(run, sentence: str) -> None:
    found = tiny.status(run)
    assert (found["state"], found["retry"], found["reason"]) == ("failed", True, sentence)


@pytest.fixture
def held(tiny_corpus, tmp_path):
    """Starts three ranks of which one stands in the middle of step 5 until the others know; ends what is left."""
    started: list[tiny.Ranks] = []

    def start(rank: int) -> tiny.Ranks:
        gate = tiny.Gate(tmp_path, step=5, rank=rank)
        started.append(tiny.start(tiny_corpus.arguments(tmp_path, "run", LIMITED), 3, [noting_soon, gate]))
        gate.wait()
        logs = [tmp_path / "run" / f"rank-{other:04d}.log" for other in range(3) if other != rank]
        tiny.wait_until(lambda: all("has waited for" in log.read_text() for log in logs), "notes of the wait")
        return started[-1]

    yield start
    for ranks in started:
        ranks.kill()


def noting_soon() -> None:
    watchdog.NOTE_AFTER_S = 3.0  # by then all have read where the others are


PLACE = r"at step 5, forward and backward of micro-batch \d"


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_within_the_limit(held, tmp_path):
    """The one that hangs ends, too, once the others have."""
    ranks = held(1)
    late = rf"rank 1 on {HOST} has been {PLACE}, for \d+ s while others wait for it"
    sentence = assert_named(ranks, [0, 2], late)
    # The one that ends second may see the connection break before its own time is up.
    assert re.search(r"lost the others \(no answer for 1\d s, distributed.timeout_s = 12 s\)", ranks.output)
    assert_failed(tmp_path / "run", sentence)
    notes = (tmp_path / "run" / "rank-0000.log").read_text()
    assert re.search(rf"has waited for \d+ s at step 5, reducing the gradients: {late}", notes)
    assert f"failed at step 4: {sentence}" in notes
    assert_named(ranks, [1], late)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_that_is_frozen_or_dies_is_named(held, tmp_path, how):
    ranks = held(1)
    os.kill(ranks.processes[1].pid, how)
    sentence = assert_named(ranks, [0, 2], rf"rank 1 on {HOST} was last seen \d+ s ago {PLACE}")
    assert_failed(tmp_path / "run", sentence)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_rank_0_is_named_when_the_store_goes_with_it(held, tmp_path, how):
    ranks = held(0)
    os.kill(ranks.processes[0].pid, how)
    last = rf"was last seen \d+ s ago {PLACE}"
    assert_named(ranks, [1, 2], rf"rank 0 on {HOST}(, or its host, no longer answers and)? {last}")
    assert tiny.status(tmp_path / "run")["state"] == "running"


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_defect_on_one_rank_is_told_to_the_others(tiny_corpus, tmp_path, rank):
    ranks = tiny.start(tiny_corpus.arguments(tmp_path, "run", LIMITED), 3, [failing], BAD_RANK=str(rank))
    others = sorted({0, 1, 2} - {rank})
    assert_named(ranks, others, rf"rank {rank} on {HOST} ended at step 4, .* \(ZeroDivisionError: one by none\)")
    assert ranks.wait()[rank] == 1
    assert tiny.status(tmp_path / "run")["retry"]


def failing() -> None:
    from ddp_asr.training.learner import Learner

    def accumulate(self, batch, *, step, last, before=Learner.accumulate):
        if step == 4 and os.environ["RANK"] == os.environ["BAD_RANK"]:
            raise ZeroDivisionError("one by none")
        return before(self, batch, step=step, last=last)

    Learner.accumulate = accumulate  # type: ignore[method-assign]


@pytest.mark.slow
def test_the_real_command_says_one_sentence_and_nothing_else(tiny_corpus, tmp_path):
    """Where torch is loaded by the command itself, which keeps its traces of broken sockets to itself."""
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(tiny.free_port())}
    arguments = tiny_corpus.arguments(tmp_path, "run", "--train.epochs=5000", "--train.eval_every_steps=99999")
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "ddp_asr.train", *arguments],
            cwd=REPOSITORY,
            env={**os.environ, **place, "RANK": rank, "LOCAL_RANK": rank, "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        tiny.wait_until(lambda: tiny.lines_of(tmp_path / "run") > 3, "the first steps")
        both[0].kill()
        _, said = both[1].communicate(timeout=60)
    finally:
        for process in both:
            process.kill()
            process.communicate()
    assert both[1].returncode == 2
    assert re.fullmatch(
        rf"error: rank 1 of 2 lost the others \(.*\): rank 0 on {HOST}.* was last seen .*; {watchdog.ADVICE}\n", said
    )


@pytest.mark.slow
def test_ranks_of_two_attempts_of_a_job_never_meet(tiny_corpus, tmp_path):
    """The port is the same, as where it follows from the job's id; rank 1 is one that outlived its attempt."""
    arguments = tiny_corpus.arguments(tmp_path, "run", "--distributed.timeout_s=3")
    ranks = tiny.start(arguments, 2, [of_another_attempt], SLURM_JOB_ID="4711")
    assert ranks.wait(limit_s=60) == [2, 2], ranks.output
    for rank in (0, 1):
        (said,) = sentences(ranks.logs[rank])
        assert said.startswith(f"rank {rank} could not meet the other 1 rank at 127.0.0.1:")
    assert not (tmp_path / "run").exists()


def of_another_attempt() -> None:
    if os.environ["RANK"] == "0":
        os.environ["SLURM_RESTART_COUNT"] = "1"
