"""Where every rank is, so that one that dies or hangs is named by the others: rank, host, step and phase.

    positions = Positions(rank, world_size, store, timeout_s, keeps_store=rank == 0)
    positions.start()                          # two daemon threads
    positions.at(120, "waiting for data")      # all that a change of phase costs is to assign a tuple
    positions.meet("reducing")                 # from here on this rank waits for the others
    positions.lose("Connection closed")        # a collective has failed: the sentence that names who is to blame
    positions.farewell("it fell over")         # this rank ends by itself: tells the others why

    this rank --a post a second--> store --everybody's, every two seconds--> the last known post of each rank
    watch: in one place for longer than distributed.timeout_s, waiting -> sentence, status.json, exit

The store is the rendezvous' own, through a client that no other thread uses. It lives in rank 0's process or beside it
and dies with that host; the last known posts stay here. A call to a store whose host is gone may never return, which is
why the watch is a thread of its own that asks it nothing.

Who is to blame, in this order: a rank that has said why it ended; one whose posts have stopped, so that it died, froze
or lost its network; rank 0, when the store is gone; whom those blame that gave up before; one that is behind: at an
earlier step, or not waiting where this rank waits for it. No two clocks are compared: a post is old by its reader's own
clock, and only up to the store's last answer, because a dead store silences everybody.

Exactly one thread speaks for a rank (`_claim`): the main thread, whose collective has failed, or the watch. gloo ends a
collective after distributed.timeout_s by itself, and the watch leaves it the time to (`grace_s`). NCCL does not come
back at all, and there the watch speaks first. A rank that waits for nobody may take as long as it likes, to copy shards
for instance: those that wait for it have their own limit. Once they have ended, so does it.

Tried with gloo, with links that were cut, and with a gloo that does not come back in NCCL's place. Not tried, for want
of several GPUs, are NCCL's own flight record, and a connection that NCCL itself finds broken: it may then end the
process before us, with a trace of its own, and what names the rank is the note of a long wait in the rank's log.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import NamedTuple, Protocol

POST_EVERY_S = 1.0
READ_EVERY_S = 2.0
SILENT_AFTER_S = 4.0  # a rank whose posts stand still for so long has died, or is frozen
NOTE_AFTER_S = 10.0  # a wait that the rank's log is told of
ENDED_PATIENCE_S = 30.0  # for a collective that one has left for good; gloo ends it at once, NCCL never
LAST_WORDS_S = 45.0  # for the sentence, status.json and NCCL's flight record, of which any may hang, too
ADVICE = "look at the log and the host there; started again, the run resumes from its newest checkpoint"


class Store(Protocol):
    """What is needed of a torch.distributed.Store."""

    def set(self, key: str, value: str) -> None: ...
    def check(self, keys: list[str]) -> bool: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...


class Here(NamedTuple):
    """Where this rank is."""

    step: int
    phase: str
    waiting: bool  # for the others
    since_s: float


class End(NamedTuple):
    """How a rank ended, in its own words; empty while it runs."""

    words: str = ""
    lost: bool = False  # for want of another rank, not by itself: the words are about that one
    blames: int | None = None


@dataclass(frozen=True)
class Post:
    """What a rank tells of itself."""

    rank: int
    host: str
    step: int
    phase: str
    waiting: bool
    for_s: float  # in this phase
    number: int  # of posts so far: one that stands still is a sign of death
    ended: End = field(default_factory=End)

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, data: bytes) -> Post:
        fields = json.loads(data)
        return cls(**{**fields, "ended": End(*fields["ended"])})

    @property
    def place(self) -> str:
        return f"at step {self.step}, {self.phase}"

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


@dataclass(frozen=True)
class Seen:
    """The last known post of a rank."""

    post: Post
    silent_s: float  # for how long it had not changed when the store last answered
    ago_s: float  # since it changed


@dataclass(frozen=True)
class Suspect:
    """Who is to blame."""

    rank: int | None
    words: str
    certain: bool  # waiting for more news would not change it


def find_suspect(
    seen: Mapping[int, Seen], me: Post, world_size: int, *, store_gone: bool, silent_after_s: float = SILENT_AFTER_S
) -> Suspect:
    """Who is to blame for a collective that failed on the rank that posts `me`; the rules are the module's."""
    others = [seen[rank] for rank in sorted(seen) if rank != me.rank]
    own = [each for each in others if each.post.ended.words and not each.post.ended.lost]
    if own:
        post = min(own, key=lambda each: each.post.step).post
        return Suspect(post.rank, f"{post} ended {post.place} ({post.ended.words})", certain=True)
    silent = [each for each in others if not each.post.ended.words and each.silent_s >= silent_after_s]
    if silent:
        return _name_silent(silent)
    gave_up = [each.post for each in others if each.post.ended.lost]
    if store_gone and me.rank != 0 and not any(post.rank == 0 for post in gave_up):
        return _name_keeper(seen.get(0))
    for post in gave_up:
        if post.ended.blames == me.rank:
            return Suspect(me.rank, f"{post} gave this rank up {post.place}", certain=True)
        if post.ended.blames is not None:
            return Suspect(post.ended.blames, post.ended.words, certain=True)
    unheard = sorted(set(range(world_size)) - set(seen) - {me.rank})
    if unheard:
        return Suspect(unheard[0], f"rank {unheard[0]} has never told where it is", certain=False)
    late = [each for each in others if (each.post.step, each.post.waiting) < (me.step, me.waiting)]
    if late:
        # Of those at the earliest place the one that has been there longest: others may just have come.
        return _name_late(min(late, key=lambda each: (each.post.step, each.post.waiting, -each.post.for_s)))
    return Suspect(None, f"all ranks still answer, this one {me.place}: the network may be to blame", certain=False)


def _name_silent(silent: list[Seen]) -> Suspect:
    """The rank that fell silent first, with those of its host that did as well: hosts die as a whole."""
    first = max(silent, key=lambda each: each.silent_s)
    post = first.post
    ranks = [each.post.rank for each in silent if each.post.host == post.host]
    who = f"{post} was" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} on {post.host} were"
    return Suspect(post.rank, f"{who} last seen {first.ago_s:.0f} s ago {post.place}", certain=True)


def _name_keeper(seen: Seen | None) -> Suspect:
    """Rank 0, with whom the store has gone."""
    if seen is None:
        return Suspect(0, "rank 0, or its host, no longer answers", certain=True)
    last = f"was last seen {seen.ago_s:.0f} s ago {seen.post.place}"
    return Suspect(0, f"{seen.post}, or its host, no longer answers and {last}", certain=True)


def _name_late(seen: Seen) -> Suspect:
    post = seen.post
    words = f"{post} has been {post.place}, for {post.for_s + seen.ago_s:.0f} s while others wait for it"
    return Suspect(post.rank, words, certain=False)


class Alone:
    """A run of one process: nobody to tell, nobody to name, no store and no thread."""

    def at(self, step: int, phase: str) -> None:
        """This rank is now in this phase of this step."""

    def meet(self, phase: str = "") -> None:
        """This rank now waits for the others, in a phase of the same name if none is given."""

    def met(self) -> None:
        """The others have come."""

    def lose(self, reason: str, timed_out: bool = False) -> str:
        """The sentence for a collective that failed; waits a moment for news that make it certain."""
        return reason

    def explain(self) -> str:
        """Where this rank is, or for whom it waits; empty when alone."""
        return ""

    def farewell(self, words: str) -> None:
        """Tells the others why this rank ends, unless they know."""

    def linger(self) -> None:
        """After a farewell, keeps the store up until the others have read it, where it ends with this process."""

    def report_to(self, on_lost: Callable[[str], None], on_wait: Callable[[str], None]) -> None:
        """What the watch calls: before it ends this process, with the sentence; and once in each long wait."""

    def close(self) -> None:
        """Ends the threads."""


class Positions(Alone):
    """Posts where this rank is, reads where the others are, and ends this rank when they no longer come."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: Store,
        timeout_s: float,
        *,
        keeps_store: bool,
        grace_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self.dump: Callable[[], None] = lambda: None  # writes down what the backend knows of its collectives
        self.report_to(lambda sentence: None, lambda words: None)
        # Where the limit is short so is everything else; a rank that is alive is always heard within half of it.
        self.post_every_s = min(POST_EVERY_S, timeout_s / 10)
        self.read_every_s = min(READ_EVERY_S, timeout_s / 5)
        self.silent_after_s = min(SILENT_AFTER_S, timeout_s / 2)
        self.timeout_s, self._grace_s = timeout_s, grace_s
        self._store, self._keeps_store, self._clock = store, keeps_store, clock
        self._host = socket.gethostname()
        self._here = Here(0, "joining the others", False, clock())
        self._number = 0
        self._end = End()
        self._blame: Suspect | None = None
        self._known: dict[int, tuple[Post, float]] = {}  # the last post, and when it changed
        self._all_known = False
        self._answered_s = clock()
        self._asked_s: float | None = None  # while the store is being asked
        self._failed = False
        self._hurried = False
        self._wake, self._told, self._closed = threading.Event(), threading.Event(), threading.Event()
        self._speaker: int | None = None
        self._speaking = threading.Lock()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Starts posting and watching."""
        for name, target in (("positions", self._talk), ("positions watch", self._watch)):
            self._threads.append(threading.Thread(target=target, name=name, daemon=True))
            self._threads[-1].start()
        # A thread that comes back from the store's C++ into an interpreter that is being torn down would abort it.
        atexit.register(self.close)

    def report_to(self, on_lost: Callable[[str], None], on_wait: Callable[[str], None]) -> None:
        self._on_lost, self._on_wait = on_lost, on_wait

    # ---- where this rank is --------------------------------------------------------------------------------------

    def at(self, step: int, phase: str) -> None:
        self._here = Here(step, phase, False, self._clock())

    def meet(self, phase: str = "") -> None:
        here = self._here
        self._here = Here(here.step, phase or here.phase, True, self._clock())

    def met(self) -> None:
        here = self._here
        self._here = Here(here.step, here.phase, False, self._clock())

    # ---- posts ---------------------------------------------------------------------------------------------------

    def _own(self) -> Post:
        here = self._here
        for_s = self._clock() - here.since_s
        return Post(
            self.rank, self._host, here.step, here.phase, here.waiting, round(for_s, 1), self._number, self._end
        )

    def post(self) -> None:
        """Tells the store where this rank is."""
        self._number += 1
        own = self._own()
        self._store.set(_key(self.rank), own.encode())
        if own.ended.words:
            self._told.set()

    def read(self) -> None:
        """Asks the store where the others are."""
        keys = [_key(rank) for rank in range(self.world_size)]
        if not self._all_known:  # asked for a key that is not there, the store would wait for it
            keys = [key for key in keys if self._store.check([key])]
            self._all_known = len(keys) == self.world_size
        posts = [Post.decode(data) for data in self._store.multi_get(keys)]
        now_s, known = self._clock(), {}
        for post in posts:
            before, changed_s = self._known.get(post.rank, (None, now_s))
            known[post.rank] = (post, changed_s if before and before.number == post.number else now_s)
        self._known, self._answered_s = known, now_s

    def seen(self) -> dict[int, Seen]:
        """What is known of every rank that has ever posted."""
        now_s, answered_s = self._clock(), self._answered_s
        return {
            rank: Seen(post, max(0.0, answered_s - changed_s), now_s - changed_s)
            for rank, (post, changed_s) in self._known.items()
        }

    def store_gone(self) -> bool:
        """Whether the store has failed, or has not answered for long."""
        asked_s = self._asked_s
        return self._failed or (asked_s is not None and self._clock() - asked_s >= self.silent_after_s)

    def _talk(self) -> None:
        read_at_s = -math.inf
        while not self._closed.is_set():
            self._asked_s = self._clock()
            try:
                self.post()
                if self._hurried or self._clock() >= read_at_s:
                    self.read()
                    read_at_s = self._clock() + self.read_every_s
            except (RuntimeError, OSError):  # its host is gone: that is what `store_gone` says
                self._failed = True
                return
            self._asked_s = None
            self._wake.wait(self.post_every_s / 4 if self._hurried else self.post_every_s)
            self._wake.clear()

    # ---- naming --------------------------------------------------------------------------------------------------

    def suspect(self) -> Suspect:
        """Who is to blame, by what is known now."""
        return find_suspect(
            self.seen(),
            self._own(),
            self.world_size,
            store_gone=self.store_gone(),
            silent_after_s=self.silent_after_s,
        )

    def lose(self, reason: str, timed_out: bool = False) -> str:
        self._claim_or_hold()
        self._hurry()
        before, deadline_s = self.seen(), self._clock() + self.silent_after_s + self.read_every_s
        # A connection breaks before the silence that follows it. A time-out comes late: there one that still posts is
        # alive, and to blame for being late.
        while not (found := self.suspect()).certain and self._clock() < deadline_s:
            if timed_out and self._has_posted(found.rank, since=before):
                break
            time.sleep(0.05)
        self._blame = found
        return self._sentence(f"no answer within {self._limit}" if timed_out else reason, found)

    def _hurry(self) -> None:
        """Reads several times a second from here on."""
        self._hurried = True
        self._wake.set()

    def _has_posted(self, rank: int | None, since: Mapping[int, Seen]) -> bool:
        """Whether the rank, or any if it is None, has posted anew."""
        now = self.seen()
        ranks = set(now) - {self.rank} if rank is None else {rank} & set(now)
        return any(each not in since or now[each].post.number > since[each].post.number for each in ranks)

    def explain(self) -> str:
        own = self._own()
        return self.suspect().words if own.waiting else f"this rank has been {own.place}, for {own.for_s:.0f} s"

    @property
    def _limit(self) -> str:
        return f"distributed.timeout_s = {self.timeout_s:g} s"

    def _sentence(self, reason: str, suspect: Suspect) -> str:
        return f"rank {self.rank} of {self.world_size} lost the others ({reason}): {suspect.words}; {ADVICE}"

    def _claim(self) -> bool:
        """Whether this thread may say how this rank ends; the first that asks may."""
        with self._speaking:
            if self._speaker is None:
                self._speaker = threading.get_ident()
            return self._speaker == threading.get_ident()

    def _claim_or_hold(self) -> None:
        """Returns in the thread that may speak; any other waits here for the end of the process."""
        if not self._claim():
            threading.Event().wait()

    # ---- the end -------------------------------------------------------------------------------------------------

    def farewell(self, words: str) -> None:
        self._claim_or_hold()
        self.say_end(words)
        if not self.store_gone():
            self._told.wait(1.0)

    def say_end(self, words: str) -> None:
        """Has the next post say how this rank ended."""
        blame = self._blame
        first_line = (words.strip().splitlines() or ["without a word"])[0][:200]
        self._end = End(blame.words, True, blame.rank) if blame else End(first_line)
        self._wake.set()

    def linger(self) -> None:
        if not self._keeps_store or not self._end.words:
            return
        self._hurry()
        deadline_s = self._clock() + 1.5 * self.read_every_s
        while self._clock() < deadline_s and not self.store_gone() and self._is_awaited():
            time.sleep(0.02)

    def _is_awaited(self) -> bool:
        """Whether a rank may still want to read why this one ended."""
        seen = self.seen()
        others = [seen.get(rank) for rank in range(self.world_size) if rank != self.rank]
        return not all(each and (each.post.ended.words or each.silent_s >= self.silent_after_s) for each in others)

    def close(self) -> None:
        self._closed.set()
        self._wake.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(1.0)
        atexit.unregister(self.close)

    def _watch(self) -> None:
        tick_s = min(1.0, self.timeout_s / 10)
        here, stuck_s, noted, before_s = self._here, 0.0, False, self._clock()
        while not self._closed.wait(tick_s):
            now_s, before = self._clock(), here
            here = self._here
            # A process that was suspended has not waited.
            stuck_s = stuck_s + min(now_s - before_s, 2 * tick_s) if here is before else 0.0
            noted = noted and here is before
            before_s = now_s
            if not noted and here.waiting and stuck_s > min(NOTE_AFTER_S, self.timeout_s / 2):
                noted = True
                note = f"has waited for {stuck_s:.0f} s {self._own().place}: {self.suspect().words}"
                # In a thread: a log on a file system that hangs must not hang the watch.
                threading.Thread(target=self._on_wait, args=(note,), name="positions note", daemon=True).start()
            if stuck_s > self._patience_s(here.waiting):
                self._give_up(stuck_s)

    def _patience_s(self, waiting: bool) -> float:
        """How long this rank may stay in one place."""
        left = any(each.post.ended.words for rank, each in self.seen().items() if rank != self.rank)
        if waiting:
            return self._grace_s + (min(self.timeout_s, ENDED_PATIENCE_S) if left else self.timeout_s)
        return self._grace_s + self.timeout_s if left else math.inf

    def _give_up(self, stuck_s: float) -> None:
        """Ends this process: its main thread is in a call that does not return."""
        if not self._claim():
            return
        own, self._blame = self._own(), self.suspect()
        reason = f"no answer within {self._limit}" if stuck_s >= self.timeout_s else f"no answer for {stuck_s:.0f} s"
        sentence = self._sentence(reason if own.waiting else f"stuck {own.place}", self._blame)
        self.say_end(sentence)

        with open(os.devnull, "w") as nowhere:
            # A thread of C's, which ends the process even where one that hangs holds the interpreter's lock.
            faulthandler.dump_traceback_later(LAST_WORDS_S, exit=True, file=nowhere)
            try:
                print(f"error: {sentence}", file=sys.stderr, flush=True)
                for tell in (lambda: self._on_lost(sentence), self.dump, self.linger):
                    with contextlib.suppress(Exception):  # the sentence has been said: nothing may hold up the end
                        tell()
            finally:
                os._exit(1)


def _key(rank: int) -> str:
    return f"position/{rank}"
