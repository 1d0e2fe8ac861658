"""Which rank is to blame when a collective fails: the rules, on posts made by hand."""

from hypothesis import given
from hypothesis import strategies as st

from ddp_asr.ranks.suspects import LastPost, Post, find_suspect


def post(rank: int, step: int = 120, phase: str = "reducing", waiting: bool = True, **more) -> Post:
    return Post(rank, f"node{rank // 2}", step, phase, waiting, **{"for_s": 30.0, "number": 99, **more})


def seen(*posts: Post, silent_s: dict[int, float] | None = None) -> dict[int, LastPost]:
    """All of them heard a second ago, but for those that have been silent."""
    silent = silent_s or {}
    return {each.rank: LastPost(each, silent.get(each.rank, 0.0), 1.0 + silent.get(each.rank, 0.0)) for each in posts}


def blamed(known: dict[int, LastPost], me: int = 0, store_gone: bool = False) -> str:
    return find_suspect(known, known[me].post, store_gone=store_gone, silent_after_s=4.0).words


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
    ended = post(2, step=119, phase="waiting for data", waiting=False, ended="rank 2 on node1 ended (the disk is full)")
    known = seen(*everyone(ended), silent_s={1: 60.0})
    assert blamed(known) == "rank 2 on node1 ended (the disk is full)"


def test_when_the_store_is_gone_so_is_rank_0():
    words = "rank 0 on node0, or its host, no longer answers and was last seen 1 s ago at step 120, reducing"
    assert blamed(seen(*everyone()), me=3, store_gone=True) == words
    # A dead store silences everybody, and one that was silent before is still the cause.
    known = seen(*everyone(), silent_s={2: 33.0})
    assert blamed(known, me=3, store_gone=True).startswith("rank 2 on node1 was last seen")


def test_those_that_gave_up_before_say_which_rank_is_to_blame():
    gave_up = post(0, ended="rank 1 on node0 was last seen 3 s ago")
    known = seen(*everyone(gave_up, post(1, phase="updating", waiting=False)))
    for rank in (1, 2, 3):  # rank 0 has ended, and the store with it
        assert blamed(known, me=rank, store_gone=True) == "rank 1 on node0 was last seen 3 s ago"


def test_where_all_are_well_nobody_is_named():
    found = find_suspect(seen(*everyone()), post(0), store_gone=False, silent_after_s=4.0)
    assert not found.certain
    assert found.words == (
        "all ranks still answer, rank 0 on node0 is at step 120, reducing: the network may be the cause"
    )


PHASES = st.sampled_from(["waiting for data", "forward and backward of micro-batch 3", "updating"])


@given(st.data())
def test_one_rank_that_misbehaves_is_named_by_all_others(data):
    """Whatever else the others, who wait for it, have been doing and whenever they last posted."""
    world_size = data.draw(st.integers(2, 8), "W")
    bad = data.draw(st.integers(0, world_size - 1), "the bad rank")
    kind = data.draw(st.sampled_from(["silent", "late", "behind"]), "what it does")
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
    )
    if kind == "silent":
        silence_s[bad] = data.draw(st.floats(4.0, 1e5))
    for me in set(range(world_size)) - {bad}:
        known = seen(*posts, silent_s=silence_s)
        found = find_suspect(known, posts[me], store_gone=False, silent_after_s=4.0)
        assert found.words.startswith(f"rank {bad} on node{bad // 2} ")
        assert f"at step {posts[bad].step}, {posts[bad].phase}" in found.words
        assert found.certain == (kind == "silent")
