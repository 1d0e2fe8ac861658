"""Which rank is to blame for a collective that failed or hangs: a pure function of the last known post of each rank.

    find_suspect(last posts, own post, store_gone=...) -> rank, a sentence, whether later posts could change it

The rules, first match first:
1. a rank that ended and said why;
2. a rank whose posts have stopped: it died, is frozen, or lost its network;
3. rank 0, if the store is gone: the store lives in rank 0's process or on its host;
4. the rank that is blamed by ranks which have given up before;
5. a rank that is behind: at an earlier step, or not waiting while this rank waits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple


class End(NamedTuple):
    """How a rank ended; the reason is empty while the rank runs."""

    reason: str = ""
    lost: bool = False  # it ended because of another rank, which the reason describes
    blames: int | None = None  # that rank


class Post(NamedTuple):
    """What a rank writes about itself into the store."""

    rank: int
    host: str
    step: int
    phase: str
    waiting: bool  # for the other ranks
    for_s: float  # time spent in this phase
    number: int  # of posts so far; a rank whose number stands still has died or is frozen
    ended: End = End()

    @classmethod
    def decode(cls, data: bytes) -> Post:
        """The inverse of `json.dumps`."""
        *fields, ended = json.loads(data)
        return cls(*fields)._replace(ended=End(*ended))

    @property
    def where(self) -> str:
        return f"at step {self.step}, {self.phase}"

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


class LastPost(NamedTuple):
    """The last known post of a rank. Times are by the reader's clock: the clocks of two hosts are never compared."""

    post: Post
    silent_s: float  # from its last change to the store's last answer: a dead store must not make every rank silent
    ago_s: float  # from its last change to now


class Suspect(NamedTuple):
    """The rank to blame, if any, and the words that say so."""

    rank: int | None
    words: str
    certain: bool  # later posts would not change it


def find_suspect(last: Mapping[int, LastPost], own: Post, *, store_gone: bool, silent_after_s: float) -> Suspect:
    """The rank to blame for a collective that failed on the rank that posts `own`; `last` has a post of every rank."""
    others = [last[rank] for rank in sorted(last) if rank != own.rank]
    failed = [each.post for each in others if each.post.ended.reason and not each.post.ended.lost]
    if failed:
        post = min(failed, key=lambda post: post.step)
        return Suspect(post.rank, f"{post} ended {post.where} ({post.ended.reason})", certain=True)
    silent = [each for each in others if not each.post.ended.reason and each.silent_s >= silent_after_s]
    if silent:
        return _name_silent(silent)
    gave_up = [each.post for each in others if each.post.ended.lost]
    if store_gone and own.rank != 0 and not any(post.rank == 0 for post in gave_up):
        words = f"{last[0].post}, or its host, no longer answers and was {_last_seen(last[0])}"
        return Suspect(0, words, certain=True)
    for post in gave_up:
        if post.ended.blames == own.rank:
            return Suspect(own.rank, f"{post} gave this rank up {post.where}", certain=True)
        if post.ended.blames is not None:
            return Suspect(post.ended.blames, post.ended.reason, certain=True)
    late = [each for each in others if (each.post.step, each.post.waiting) < (own.step, own.waiting)]
    if late:
        # Of the ranks that are furthest behind, the one that has been there longest: others may have just arrived.
        first = min(late, key=lambda each: (each.post.step, each.post.waiting, -each.post.for_s))
        words = f"{first.post} has been {first.post.where}, for {first.post.for_s + first.ago_s:.0f} s"
        return Suspect(first.post.rank, f"{words} while others wait for it", certain=False)
    words = f"all ranks still answer, this one is {own.where}: the network may be the cause"
    return Suspect(None, words, certain=False)


def _name_silent(silent: list[LastPost]) -> Suspect:
    """The rank that fell silent first, with the other silent ranks of its host, because hosts fail as a whole."""
    first = max(silent, key=lambda each: each.silent_s)
    ranks = [each.post.rank for each in silent if each.post.host == first.post.host]
    several = f"ranks {', '.join(map(str, ranks))} on {first.post.host} were"
    who = f"{first.post} was" if len(ranks) == 1 else several
    return Suspect(first.post.rank, f"{who} {_last_seen(first)}", certain=True)


def _last_seen(seen: LastPost) -> str:
    return f"last seen {seen.ago_s:.0f} s ago {seen.post.where}"
