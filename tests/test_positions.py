"""Who is to blame when a collective fails: by the rules alone, by threads on a store of our own, and by real ranks."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddp_asr.ranks import positions
from ddp_asr.ranks.positions import Alone, End, Positions, Post, Seen, find_suspect
from tests import tiny_training as tiny
from tests.conftest import REPOSITORY

HOST = re.escape(socket.gethostname())


# ---- the rules -----------------------------------------------------------------------------------------------------


def post(rank: int, step: int = 120, phase: str = "reducing", waiting: bool = True, **more) -> Post:
    return Post(rank, f"node{rank // 2}", step, phase, waiting, **{"for_s": 30.0, "number": 99, **more})


def seen(*posts: Post, silent_s: dict[int, float] | None = None) -> dict[int, Seen]:
    """All of them heard a second ago, but for those that have been silent."""
    silent = silent_s or {}
    return {each.rank: Seen(each, silent.get(each.rank, 0.0), 1.0 + silent.get(each.rank, 0.0)) for each in posts}


def blamed(known: dict[int, Seen], me: int = 0, store_gone: bool = False, world_size: int = 4) -> str:
    return find_suspect(known, known[me].post, world_size, store_gone=store_gone).words


def everyone(*different: Post) -> list[Post]:
    """Four ranks on two hosts, waiting in the same place, but for those given."""
    return sorted(
        [*different, *(post(rank) for rank in set(range(4)) - {each.rank for each in different})], key=rank_of
    )


def rank_of(each: Post) -> int:
    return each.rank


def test_a_rank_that_fell_silent_is_named_with_host_step_and_phase():
    known = seen(*everyone(post(3, phase="waiting for data", waiting=False)), silent_s={3: 33.0})
    assert blamed(known) == "rank 3 on node1 was last seen 34 s ago at step 120, waiting for data"


def test_a_host_that_fell_silent_is_named_once():
    known = seen(*everyone(), silent_s={2: 33.0, 3: 33.0})
    assert blamed(known) == "ranks 2, 3 on node1 were last seen 34 s ago at step 120, reducing"


def test_of_two_that_fell_silent_the_first_is_to_blame():
    """The other one died of it, for instance."""
    known = seen(*everyone(), silent_s={1: 20.0, 3: 33.0})
    assert blamed(known).startswith("rank 3 on node1 was last seen 34 s ago")


def test_a_rank_that_others_wait_for_is_named():
    known = seen(*everyone(post(1, phase="waiting for data", waiting=False)))
    assert blamed(known) == (
        "rank 1 on node0 has been at step 120, waiting for data, for 31 s while others wait for it"
    )
    behind = seen(*everyone(post(1, step=119), post(2, phase="updating", waiting=False)))
    assert blamed(behind).startswith("rank 1 on node0 has been at step 119, reducing")


def test_a_rank_that_said_why_it_ended_comes_before_all_else():
    ended = post(2, step=119, phase="waiting for data", waiting=False, ended=End("the disk is full"))
    known = seen(*everyone(ended), silent_s={1: 60.0})
    assert blamed(known) == "rank 2 on node1 ended at step 119, waiting for data (the disk is full)"


def test_when_the_store_is_gone_so_is_rank_0():
    words = "rank 0 on node0, or its host, no longer answers and was last seen 1 s ago at step 120, reducing"
    assert blamed(seen(*everyone()), me=3, store_gone=True) == words
    assert blamed(seen(post(3)), me=3, store_gone=True) == "rank 0, or its host, no longer answers"
    # A dead store silences everybody, and one that was silent before is still the cause.
    known = seen(*everyone(), silent_s={2: 33.0})
    assert blamed(known, me=3, store_gone=True).startswith("rank 2 on node1 was last seen")


def test_those_that_gave_up_before_say_whom_they_blame():
    gave_up = post(0, ended=End("rank 1 on node0 was last seen 3 s ago", lost=True, blames=1))
    known = seen(*everyone(gave_up, post(1, phase="updating", waiting=False)))
    # Rank 0 has ended, and the store with it.
    for rank in (2, 3):
        assert blamed(known, me=rank, store_gone=True) == "rank 1 on node0 was last seen 3 s ago"
    assert blamed(known, me=1, store_gone=True) == "rank 0 on node0 gave this rank up at step 120, reducing"


def test_where_all_are_well_nobody_is_named():
    found = find_suspect(seen(*everyone()), post(0), 4, store_gone=False)
    assert found.rank is None and not found.certain
    assert found.words == "all ranks still answer, this one at step 120, reducing: the network may be to blame"


def test_a_rank_that_never_posted_is_named():
    assert blamed(seen(post(0), post(1), post(2))) == "rank 3 has never told where it is"


PHASES = st.sampled_from(["waiting for data", "forward and backward of micro-batch 3", "updating"])


@given(st.data())
def test_one_rank_that_misbehaves_is_named_by_all_others(data):
    """Whatever else the others, who wait for it, have been doing and whenever they last posted."""
    world_size = data.draw(st.integers(2, 8), "W")
    bad = data.draw(st.integers(0, world_size - 1), "the bad rank")
    kind = data.draw(st.sampled_from(["silent", "ended", "late", "behind"]), "what it does")
    step = data.draw(st.integers(1, 10**6), "step")
    stands = data.draw(st.floats(0, 1e5), "for so long")
    posts = [post(rank, step, for_s=data.draw(st.floats(0, 1e5))) for rank in range(world_size)]
    silence_s = {rank: data.draw(st.floats(0, 3.9)) for rank in range(world_size)}
    waiting = kind in ("silent", "behind") and data.draw(st.booleans())
    posts[bad] = post(
        bad,
        step - (kind == "behind"),
        data.draw(PHASES),
        waiting,
        for_s=stands,
        ended=End("it fell over") if kind == "ended" else End(),
    )
    if kind == "silent":
        silence_s[bad] = data.draw(st.floats(4.0, 1e5))
    for me in set(range(world_size)) - {bad}:
        known = seen(*posts, silent_s=silence_s)
        found = find_suspect(known, posts[me], world_size, store_gone=False)
        assert found.rank == bad and f"rank {bad} on node{bad // 2} " in found.words
        assert f"at step {posts[bad].step}, {posts[bad].phase}" in found.words
        assert found.certain == (kind in ("silent", "ended"))


@given(st.text(), st.text(), st.integers(0, 10**9), st.booleans(), st.none() | st.integers(0, 99))
def test_a_post_comes_back_as_it_went(phase, words, step, flag, blames):
    sent = post(1, step, phase, flag, ended=End(words, flag, blames))
    assert Post.decode(sent.encode().encode()) == sent


# ---- posts on a store ----------------------------------------------------------------------------------------------


class DictStore:
    """A store that holds what it is given; one that is told to fail does."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.fails = False

    def set(self, key: str, value: str) -> None:
        if self.fails:
            raise RuntimeError("Broken pipe")
        self.values[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.values[key] for key in keys]  # the real one would wait for a key that is missing


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
    """Three ranks that have posted nothing yet; no threads."""
    store = DictStore()
    return [Positions(rank, 3, store, 600.0, keeps_store=rank == 0, clock=clock) for rank in range(3)]


def test_silence_is_reckoned_by_the_readers_clock_alone(ranks, clock):
    for each in ranks:
        each.at(7, "updating")
        each.post()
    ranks[0].read()
    for _ in range(20):
        clock.now_s += 2.0
        ranks[1].post()
        ranks[0].read()
    assert [round(ranks[0].seen()[rank].silent_s) for rank in (1, 2)] == [0, 40]
    clock.now_s += 5.0  # in which the store was not asked: nobody falls silent by that
    assert [round(ranks[0].seen()[rank].silent_s) for rank in (1, 2)] == [0, 40]
    assert ranks[0].suspect().words.endswith("was last seen 45 s ago at step 7, updating")


def test_ranks_that_have_not_posted_yet_are_not_waited_for(ranks):
    ranks[1].post()
    ranks[0].read()
    assert list(ranks[0].seen()) == [1]


def test_a_collective_that_failed_names_whom_it_waited_for(ranks, clock, monkeypatch):
    def a_moment_passes(seconds):
        clock.now_s += seconds
        for each in ranks:
            each.post()
        ranks[0].read()

    monkeypatch.setattr(positions.time, "sleep", a_moment_passes)
    for each in ranks:
        each.at(8, "forward and backward of micro-batch 2")
    for each in ranks[:2]:
        each.meet("reducing the gradients")
    clock.now_s += 60.0
    for each in ranks:
        each.post()
    ranks[0].read()
    sentence = ranks[0].lose("Timed out waiting 60000ms", timed_out=True)
    assert re.fullmatch(
        rf"rank 0 of 3 lost the others \(no answer within distributed\.timeout_s = 600 s\): rank 2 on {HOST} has been "
        r"at step 8, forward and backward of micro-batch 2, for 60 s while others wait for it; look at the log and the "
        r"host there; started again, the run resumes from its newest checkpoint",
        sentence,
    )
    # The others read whom it blamed; the one that is blamed reads who gave it up.
    ranks[0].say_end(sentence)
    ranks[0].post()
    for each in ranks[1:]:
        each.read()
    assert ranks[1].suspect().rank == 2 and ranks[1].suspect().certain
    assert (
        ranks[2].suspect().words
        == f"rank 0 on {socket.gethostname()} gave this rank up at step 8, reducing the gradients"
    )


def test_a_rank_explains_where_it_is_or_whom_it_waits_for(ranks, clock):
    for each in ranks:
        each.at(8, "updating")
        each.post()
    ranks[0].read()
    clock.now_s += 3.0
    assert ranks[0].explain() == "this rank has been at step 8, updating, for 3 s"
    ranks[0].meet("reducing")
    assert "while others wait for it" in ranks[0].explain()
    ranks[0].met()
    assert ranks[0].explain() == "this rank has been at step 8, reducing, for 0 s"


def test_alone_nobody_is_told_and_nothing_runs():
    alone = Alone()
    before = threading.active_count()
    alone.at(1, "reducing")
    alone.meet()
    alone.met()
    alone.farewell("it fell over")
    alone.linger()
    alone.close()
    assert alone.explain() == "" and threading.active_count() == before and vars(alone) == {}


# ---- threads -------------------------------------------------------------------------------------------------------


@pytest.fixture
def started():
    """Two ranks on a store, with their threads and a limit of a second; `ended` holds the ranks that gave up."""
    store, ended = DictStore(), []

    class Watched(Positions):
        def _give_up(self, stuck_s: float) -> None:
            if self._claim():
                ended.append((self.rank, stuck_s))

    both = [Watched(rank, 2, store, 1.0, keeps_store=rank == 0, grace_s=0.5) for rank in range(2)]
    for each in both:
        each.start()
    yield both, store, ended
    for each in both:
        each.close()
    names = {thread.name for thread in threading.enumerate()}
    assert not {name for name in names if name.startswith("positions")}


def test_posts_go_round_until_the_store_is_gone(started):
    (first, second), store, _ = started
    second.at(5, "updating")
    tiny.wait_until(lambda: 1 in first.seen() and first.seen()[1].post.step == 5, "the post")
    assert not first.store_gone() and first.suspect().rank is None
    store.fails = True
    tiny.wait_until(lambda: first.store_gone() and second.store_gone(), "the loss")
    assert first.seen()[1].post.phase == "updating"
    assert second.suspect().words.startswith(f"rank 0 on {socket.gethostname()}, or its host, no longer answers")


def test_a_rank_that_waits_too_long_is_ended_and_one_that_works_is_not(started):
    (first, second), _, ended = started
    notes: list[str] = []
    first.report_to(lambda sentence: None, notes.append)
    second.at(5, "copying shards")
    first.at(5, "copying shards")
    first.meet()
    tiny.wait_until(lambda: ended, "the end")
    assert [(rank, 1.5 <= stuck_s < 60) for rank, stuck_s in ended] == [(0, True)]
    assert len(notes) == 1 and re.search(r"^has waited for \d s at step 5, copying shards: rank 1 on", notes[0])


def test_a_rank_that_moves_is_never_ended(started):
    (first, _), _, ended = started
    until_s = time.monotonic() + 2.5
    while time.monotonic() < until_s:
        first.meet("reducing")
        time.sleep(0.05)
    assert ended == []


def test_once_the_others_have_ended_a_rank_that_is_stuck_ends_too(started):
    (first, second), _, ended = started
    second.at(5, "forward and backward of micro-batch 1")
    first.farewell("it fell over")
    tiny.wait_until(lambda: ended, "the end")
    assert [rank for rank, _ in ended] == [1]
    assert second.suspect().words.endswith("(it fell over)")


def test_only_one_thread_speaks_for_a_rank(started):
    (first, _), _, _ = started
    held = threading.Thread(target=first.farewell, args=("second",), daemon=True)
    first.farewell("first")
    held.start()
    held.join(0.3)
    assert held.is_alive() and first._end.words == "first"


def test_the_keeper_of_the_store_stays_until_the_others_have_read_why(started):
    (first, second), _, _ = started
    first.linger()  # without a farewell there is nothing to read
    first.farewell("it fell over")
    first.linger()
    assert second.seen()[0].post.ended.words == "it fell over"
    second.farewell("it, too")
    tiny.wait_until(lambda: first.seen()[1].post.ended.words, "the answer")
    assert not first._is_awaited()


# ---- real ranks ----------------------------------------------------------------------------------------------------

TIMEOUT_S = 6.0
LIMITED = f"--distributed.timeout_s={TIMEOUT_S}"
SLACK_S = 25.0  # what a slow machine may add


def sentences(log) -> list[str]:
    return re.findall(r"^error: (.*)$", log.read_text(), flags=re.MULTILINE)


def assert_named(ranks: tiny.Ranks, survivors: list[int], codes: tuple[int, ...], pattern: str) -> str:
    """Each survivor has ended in time, non-zero, with one sentence that holds the pattern; returns rank 0's."""
    held_s = time.monotonic()
    for rank in survivors:
        ranks.processes[rank].join(TIMEOUT_S + SLACK_S)
    assert [ranks.processes[rank].exitcode in codes for rank in survivors] == [True] * len(survivors), ranks.output
    assert time.monotonic() - held_s < TIMEOUT_S + SLACK_S
    for rank in survivors:
        said = sentences(ranks.logs[rank])
        assert len(said) == 1 and "Traceback" not in ranks.logs[rank].read_text(), ranks.output
        assert re.fullmatch(rf"rank {rank} of 3 lost the others \(.*\): {pattern}; {positions.ADVICE}", said[0]), said
    return said[0] if survivors[-1] == 0 else sentences(ranks.logs[survivors[0]])[0]


def assert_failed(run, sentence: str) -> None:
    found = tiny.status(run)
    assert (found["state"], found["retry"], found["reason"]) == ("failed", True, sentence)


@pytest.fixture
def held(tiny_corpus, tmp_path):
    """Starts three ranks of which one stands in the middle of step 5 until the others know; ends what is left."""
    started: list[tiny.Ranks] = []

    def start(rank: int, *patches: tiny.Patch) -> tiny.Ranks:
        gate = tiny.Gate(tmp_path, step=5, rank=rank)
        started.append(tiny.start(tiny_corpus.arguments(tmp_path, "run", LIMITED), 3, [*patches, gate]))
        gate.wait()
        logs = [tmp_path / "run" / f"rank-{other:04d}.log" for other in range(3) if other != rank]
        tiny.wait_until(lambda: all("has waited for" in log.read_text() for log in logs), "notes of the wait")
        return started[-1]

    yield start
    for ranks in started:
        ranks.kill()


PLACE = r"at step 5, forward and backward of micro-batch \d"


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_within_the_limit(held, tmp_path):
    ranks = held(1)
    sentence = assert_named(
        ranks, [0, 2], (2,), rf"rank 1 on {HOST} has been {PLACE}, for \d+ s while others wait for it"
    )
    assert_failed(tmp_path / "run", sentence)
    notes = (tmp_path / "run" / "rank-0000.log").read_text()
    assert re.search(
        rf"has waited for \d+ s at step 5, reducing the gradients: rank 1 on {HOST} has been {PLACE}", notes
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_a_rank_that_is_frozen_or_dies_is_named(held, tmp_path, how):
    ranks = held(1)
    os.kill(ranks.processes[1].pid, how)
    sentence = assert_named(ranks, [0, 2], (2,), rf"rank 1 on {HOST} was last seen \d+ s ago {PLACE}")
    assert_failed(tmp_path / "run", sentence)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL])
def test_rank_0_is_named_when_the_store_goes_with_it(held, tmp_path, how):
    ranks = held(0)
    os.kill(ranks.processes[0].pid, how)
    last = rf"was last seen \d+ s ago {PLACE}"
    assert_named(ranks, [1, 2], (2,), rf"rank 0 on {HOST}(, or its host, no longer answers and)? {last}")
    assert tiny.status(tmp_path / "run")["state"] == "running"


@pytest.mark.slow
def test_where_the_backend_never_comes_back_the_watch_ends_the_rank(held, tmp_path):
    """As with NCCL: the collective does not return. The one that hangs ends, too, once the others have."""
    ranks = held(1, patient_backend)
    sentence = assert_named(
        ranks, [0, 2], (1,), rf"rank 1 on {HOST} has been {PLACE}, for \d+ s while others wait for it"
    )
    assert sentence.startswith("rank 0 of 3 lost the others (no answer within distributed.timeout_s = 6 s): rank 1")
    assert_failed(tmp_path / "run", sentence)
    assert sentence in (tmp_path / "run" / "rank-0000.log").read_text()
    assert_named(ranks, [1], (1,), rf"rank [02] on {HOST} gave this rank up at step 5, reducing the gradients")


def patient_backend() -> None:
    """gloo waits for ten minutes, whatever distributed.timeout_s says, and is given no grace."""
    import datetime

    import torch.distributed as dist

    from ddp_asr.ranks import world as distributed

    def initialise(*arguments, before=dist.init_process_group, **named):
        return before(*arguments, **{**named, "timeout": datetime.timedelta(minutes=10)})

    dist.init_process_group = initialise
    distributed._GLOO_GRACE_S = 0.0


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_defect_on_one_rank_is_told_to_the_others(tiny_corpus, tmp_path, rank):
    ranks = tiny.start(tiny_corpus.arguments(tmp_path, "run", LIMITED), 3, [failing], BAD_RANK=str(rank))
    others = sorted({0, 1, 2} - {rank})
    assert_named(ranks, others, (2,), rf"rank {rank} on {HOST} ended at step 4, .* \(ZeroDivisionError: one by none\)")
    assert ranks.wait()[rank] == 1
    assert tiny.status(tmp_path / "run")["retry"]


def failing() -> None:
    from ddp_asr.training.learner import Learner

    def accumulate(self, batch, *, step, micro_batch, last, before=Learner.accumulate):
        if step == 4 and os.environ["RANK"] == os.environ["BAD_RANK"]:
            raise ZeroDivisionError("one by none")
        return before(self, batch, step=step, micro_batch=micro_batch, last=last)

    Learner.accumulate = accumulate  # type: ignore[method-assign]


@pytest.mark.slow
def test_a_loader_that_dies_is_told_to_the_others(tiny_corpus, tmp_path):
    from tests.test_train import dying_worker

    ranks = tiny.start(tiny_corpus.arguments(tmp_path, "run", "--data.workers=1"), 3, [dying_worker])
    assert_named(
        ranks, [1, 2], (2,), rf"rank 0 on {HOST} ended at step \d, waiting for data \(a loader process died.*\)"
    )
    assert ranks.wait() == [2, 2, 2]
    assert len(sentences(ranks.logs[0])) == 1


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
        rf"error: rank 1 of 2 lost the others \(.*\): rank 0 on {HOST}.* was last seen .*; {positions.ADVICE}\n", said
    )


@pytest.mark.slow
def test_ranks_of_two_attempts_of_a_job_never_meet(tiny_corpus, tmp_path):
    """The port is the same, as where it follows from the job's id; rank 1 is one that outlived its attempt."""
    arguments = tiny_corpus.arguments(tmp_path, "run", "--distributed.timeout_s=3")
    ranks = tiny.start(arguments, 2, [of_another_attempt], SLURM_JOB_ID="4711")
    assert ranks.wait(limit_s=60) == [2, 2], ranks.output
    for rank in (0, 1):
        (said,) = sentences(ranks.logs[rank])
        assert said.startswith(f"rank {rank} could not meet the other 1 rank(s) at 127.0.0.1:")
    assert not (tmp_path / "run").exists()


def of_another_attempt() -> None:
    if os.environ["RANK"] == "0":
        os.environ["SLURM_RESTART_COUNT"] = "1"
