"""Which rank is to blame for a collective that failed or hangs: a pure function of the last known post of each rank.

    find_suspect(last posts, own post, store_gone=...) -> a sentence, and whether later posts could change it

The rules, first match first:
1. the rank that a rank which has ended names: itself, or the one that it has lost;
2. a rank whose posts have stopped: it died, is frozen, or lost its network;
3. rank 0, if the store is gone: the store lives in rank 0's process or on its host;
4. a rank that is behind: at an earlier step, or not waiting while this rank waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Post(NamedTuple):
    """What a rank writes about itself into the store."""

    rank: int
    host: str
    step: int
    phase: str
    waiting: bool  # for the other ranks
    for_s: float  # time spent in this phase
    number: int  # of posts so far; a rank whose number stands still has died or is frozen
    ended: str = ""  # which rank is to blame for its end, and why; empty while the rank runs

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

    @property
    def last_seen(self) -> str:
        return f"last seen {self.ago_s:.0f} s ago {self.post.where}"


class Suspect(NamedTuple):
    """The words that say which rank is to blame, if any."""

    words: str
    certain: bool  # later posts would not change it


def find_suspect(last: Mapping[int, LastPost], own: Post, *, store_gone: bool, silent_after_s: float) -> Suspect:
    """The rank to blame for a collective that failed on the rank that posts `own`; `last` has a post of every rank."""
    others = [last[rank] for rank in sorted(last) if rank != own.rank]
    ended = [each.post.ended for each in others if each.post.ended]
    if ended:
        return Suspect(ended[0], certain=True)
    silent = [each for each in others if each.silent_s >= silent_after_s]
    if silent:
        first = max(silent, key=lambda each: each.silent_s)
        return Suspect(f"{first.post} was {first.last_seen}", certain=True)
    if store_gone and own.rank != 0:
        words = f"{last[0].post}, or its host, no longer answers and was {last[0].last_seen}"
        return Suspect(words, certain=True)
    late = [each for each in others if (each.post.step, each.post.waiting) < (own.step, own.waiting)]
    if late:
        # Of the ranks that are furthest behind, the one that has been there longest: others may have just arrived.
        first = min(late, key=lambda each: (each.post.step, each.post.waiting, -each.post.for_s))
        words = f"{first.post} has been {first.post.where}, for {first.post.for_s + first.ago_s:.0f} s"
        return Suspect(f"{words} while others wait for it", certain=False)
    return Suspect(f"all ranks still answer, {own} is {own.where}: the network may be the cause", certain=False)
