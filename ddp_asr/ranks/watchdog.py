"""Two threads per rank: one posts where the rank is and reads where the others are, one ends a process that is stuck.

    watchdog.set_phase(120, "waiting for data")         # at each change of phase; costs one assignment
    watchdog.begin_waiting("reducing the gradients")    # from here to the next phase this rank waits for the others
    watchdog.name_lost_rank("Connection closed")        # a collective has failed: a sentence with the rank to blame
    watchdog.announce_exit("the disk is full")          # this rank ends by itself and tells the others why

    this rank --a post every second--> store --the posts of all--> find_suspect (suspects.py)

The process ends, with one sentence on stderr and in status.json, if
- this rank has waited for the others for longer than distributed.timeout_s, or 30 s after one of them has ended;
- this rank does anything else for longer than distributed.timeout_s, and another rank has ended;
- a stop was asked for and no step boundary came within distributed.stop_grace_s.
It stops the run as on SIGTERM if torchrun is gone: killed with -9, torchrun leaves its ranks running.

The store is the one of the rendezvous, in rank 0's process or in torchrun's. A call to a store whose host is gone may
never return, whatever its timeout (seen with torch 2.11.0), so only the posting thread calls it.

gloo and NCCL get a longer timeout than distributed.timeout_s, so that the watchdog always acts first. A connection that
breaks makes gloo fail at once, and then the main thread reports. NCCL is told to abort its communicator and to let the
process live (environment.py), so that the main thread reports there, too (world.py). Not tried, for want of several
GPUs: NCCL noticing a broken connection.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import json
import math
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

from ddp_asr.ranks.signals import STOP_SIGNALS, StopRequest
from ddp_asr.ranks.suspects import LastPost, Post, Suspect, find_suspect

POST_EVERY_S = 1.0
CHECK_EVERY_S = 0.25
SILENT_AFTER_S = 4.0  # a rank whose posts stand still for so long has died or is frozen
NOTE_AFTER_S = 10.0  # a longer wait is noted in the rank's log
ENDED_PATIENCE_S = 30.0  # for a collective that another rank has left for good: gloo fails at once, NCCL never
ENDING_S = 20.0  # for status.json and NCCL's flight record, whose file system may hang
RESUME = "started again, the run resumes from its newest checkpoint"
ADVICE = f"look at the log and the host there; {RESUME}"


class Store(Protocol):
    """What is needed of a torch.distributed.Store."""

    def set(self, key: str, value: str) -> None: ...
    def multi_get(self, keys: list[str]) -> list[bytes]: ...


class Position(NamedTuple):
    """Where this rank is."""

    step: int
    phase: str
    waiting: bool  # for the other ranks
    since_s: float


class Watchdog:
    """The watchdog of this rank. A single process has no store, and no thread before `watch_signals`."""

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        store: Store | None = None,
        timeout_s: float = math.inf,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self.stop = StopRequest()
        self.on_end: Callable[[str, str], None] = lambda state, sentence: None  # before this thread ends the process
        self.on_long_wait: Callable[[str], None] = lambda note: None
        self.dump: Callable[[], None] = lambda: None  # writes what the backend knows about its collectives
        # Shorter where the limit is short: a rank that is alive posts often within half of it.
        self.post_every_s = min(POST_EVERY_S, timeout_s / 10)
        self.silent_after_s = min(SILENT_AFTER_S, timeout_s / 2)
        self._store, self._clock = store, clock
        self._stop_grace_s = math.inf
        self._torchrun: int | None = None  # its process id
        self._host = socket.gethostname()
        self.waited_s = 0.0  # for the other ranks, in all phases that have ended
        self._here = Position(0, "joining the others", False, clock())
        self._noted: Position | None = None  # the long wait that was noted last
        self._number = 0
        self._blame = ""  # the words of the suspect because of which this rank ends
        self._ended = ""  # see Post
        self._known: dict[int, tuple[Post, float]] = {}  # each rank's last post, and when it changed
        self._answered_s = clock()
        self._asked_s: float | None = None  # during an exchange with the store
        self._closed = False
        self._post_now = threading.Event()
        # Held by the thread that reports how this rank ends, until the process is gone.
        self._reporting = threading.RLock()
        self._threads: list[threading.Thread] = []
        self._wakeup: tuple[socket.socket, socket.socket] | None = None  # the checking thread reads from the first

    def start(self) -> None:
        """Starts the threads."""
        if self._wakeup is None:
            self._wakeup = socket.socketpair()
            self._wakeup[1].setblocking(False)
            targets = [self._check_until_closed] if self._store is None else [self._check_until_closed, self._post]
            self._threads = [threading.Thread(target=each, name="watchdog", daemon=True) for each in targets]
            for thread in self._threads:
                thread.start()
            # A thread that returns from the store's C++ while the interpreter is being torn down would abort it:
            # "terminate called without an active exception".
            atexit.register(self.close)

    def watch_signals(self, grace_s: float) -> None:
        """Handles the stop signals and watches torchrun from now on; call it in the main thread."""
        self._stop_grace_s = grace_s
        # Only torchrun: a shell may well end before the run that it has started in the background.
        self._torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.start()
        assert self._wakeup is not None
        self.stop.install(self._wakeup[1])

    def close(self) -> None:
        """Ends the threads."""
        if self._wakeup is None:
            return
        self._closed = True
        self._post_now.set()
        with contextlib.suppress(OSError):  # full: the thread will wake up; closed: it has ended
            self._wakeup[1].send(b"\0")
        checking, *posting = self._threads
        checking.join()
        # The store of a loaded host may take seconds to answer; one that is gone may never do.
        while any(thread.is_alive() for thread in posting) and not self.store_gone():
            posting[0].join(CHECK_EVERY_S)
        if self._stop_grace_s < math.inf:
            signal.set_wakeup_fd(-1)
        for end in self._wakeup:
            end.close()
        atexit.unregister(self.close)

    # ---- where this rank is --------------------------------------------------------------------------------------

    def set_phase(self, step: int, phase: str) -> None:
        """This rank is now in this phase of this step, and waits for nobody."""
        self._move(step, phase, waiting=False)

    def begin_waiting(self, phase: str = "") -> None:
        """This rank now waits for the others, in a phase of the same name if none is given."""
        self._move(self._here.step, phase or self._here.phase, waiting=self.world_size > 1)

    def end_waiting(self) -> None:
        """The others have come."""
        self.set_phase(self._here.step, self._here.phase)

    def _move(self, step: int, phase: str, *, waiting: bool) -> None:
        now_s = self._clock()
        if self._here.waiting:
            self.waited_s += now_s - self._here.since_s
        self._here = Position(step, phase, waiting, now_s)

    def _own_post(self) -> Post:
        here = self._here
        for_s = round(self._clock() - here.since_s, 1)
        return Post(self.rank, self._host, here.step, here.phase, here.waiting, for_s, self._number, self._ended)

    # ---- the posting thread --------------------------------------------------------------------------------------

    def _post(self) -> None:
        while not self._closed:
            self._asked_s = self._clock()
            try:
                self.exchange()
            except (RuntimeError, OSError):
                self._asked_s = -math.inf  # the store's host is gone: it is not asked again
                return
            self._asked_s = None
            self._post_now.wait(self.post_every_s)
            self._post_now.clear()

    def exchange(self) -> None:
        """Writes this rank's post into the store and reads those of all ranks; waits for a rank that has none yet."""
        assert self._store is not None
        self._number += 1
        self._store.set(f"position/{self.rank}", json.dumps(self._own_post()))
        posts = self._store.multi_get([f"position/{rank}" for rank in range(self.world_size)])
        now_s, known = self._clock(), {}
        for post in (Post(*json.loads(data)) for data in posts):
            before, changed_s = self._known.get(post.rank, (None, now_s))
            known[post.rank] = (post, changed_s if before and before.number == post.number else now_s)
        self._known, self._answered_s = known, now_s

    def store_gone(self) -> bool:
        """Whether the store has failed, or has not answered for long."""
        asked_s = self._asked_s
        return asked_s is not None and self._clock() - asked_s >= self.silent_after_s

    def last_posts(self) -> dict[int, LastPost]:
        """The last known post of each rank."""
        now_s, answered_s = self._clock(), self._answered_s
        return {
            rank: LastPost(post, max(0.0, answered_s - changed_s), now_s - changed_s)
            for rank, (post, changed_s) in self._known.items()
        }

    def suspect(self) -> Suspect:
        """The rank to blame, by what is known now."""
        own, gone = self._own_post(), self.store_gone()
        return find_suspect(self.last_posts(), own, store_gone=gone, silent_after_s=self.silent_after_s)

    # ---- called by the main thread when this rank ends -----------------------------------------------------------

    def name_lost_rank(self, reason: str) -> str:
        """The sentence for a collective that failed with `reason`; waits some seconds for posts that make it sure."""
        self._reporting.acquire()
        found, deadline_s = self.suspect(), self._clock() + self.silent_after_s + 2 * self.post_every_s
        # A connection breaks before its rank is silent for long enough. Before training, a signal that has ended the
        # others may still be on its way to this rank: it interrupts the wait.
        while self._clock() < deadline_s and (self.stop.interrupts or not found.certain):
            time.sleep(0.05)
            found = self.suspect()
        self._blame = found.words
        return self._lost_others(reason)

    def announce_exit(self, reason: str) -> None:
        """Tells the others why this rank ends; where they are the reason, it names the rank to blame instead."""
        self._reporting.acquire()
        self._set_end(reason)
        self._wait_until_told()

    def _set_end(self, reason: str) -> None:
        own, first_line = self._own_post(), (reason.strip().splitlines() or ["no reason given"])[0][:200]
        self._ended = self._blame or f"{own} ended {own.where} ({first_line})"
        self._post_now.set()

    def _wait_until_told(self) -> None:
        """Waits until the others can read why this rank ends; rank 0, which may keep the store, until they end, too."""
        awaited = [self.rank] if self.rank else range(self.world_size)
        deadline_s = self._clock() + 3 * self.post_every_s
        while self._store is not None and not self.store_gone() and self._clock() < deadline_s:
            last = self.last_posts()
            if all(last[rank].post.ended or last[rank].silent_s >= self.silent_after_s for rank in awaited):
                return
            time.sleep(0.02)

    def _lost_others(self, reason: str) -> str:
        return f"rank {self.rank} of {self.world_size} lost the others ({reason}): {self._blame}; {ADVICE}"

    # ---- the checking thread -------------------------------------------------------------------------------------

    def _check_until_closed(self) -> None:
        assert self._wakeup is not None
        while not self._closed:
            if not self._ended:
                self._note_long_wait()
                self._stop_if_orphaned()
                self._end_if_stuck()
            if select.select([self._wakeup[0]], [], [], CHECK_EVERY_S)[0]:
                for number in self._wakeup[0].recv(256):
                    if number in STOP_SIGNALS:
                        self.stop.request(signal.Signals(number).name)

    def _note_long_wait(self) -> None:
        here, own = self._here, self._own_post()
        if here.waiting and here is not self._noted and own.for_s > min(NOTE_AFTER_S, self.timeout_s / 2):
            self._noted = here
            note = f"has waited for {own.for_s:.0f} s {own.where}: {self.suspect().words}"
            # In a thread: a log on a file system that hangs must not block the watchdog.
            threading.Thread(target=self.on_long_wait, args=(note,), name="watchdog note", daemon=True).start()

    def _stop_if_orphaned(self) -> None:
        if self._torchrun not in (None, os.getppid()) and self.stop.reason is None:
            self.stop.request("torchrun is gone")
            os.kill(os.getpid(), signal.SIGTERM)  # so that the handler runs, too

    def _end_if_stuck(self) -> None:
        own, overdue = self._own_post(), self.stop.pending_s > self._stop_grace_s
        stuck = own.for_s > self._patience_s(own.waiting)
        if not (overdue or stuck) or not self._reporting.acquire(blocking=False):
            return
        words = self.suspect().words
        self._blame = words if own.waiting or not overdue else ""
        if overdue:
            limit = f"no step boundary within distributed.stop_grace_s = {self._stop_grace_s:g} s"
            delay = self._blame or f"this rank has been {own.where}, for {own.for_s:.0f} s"
            state, sentence = "stopped", f"{self.stop.reason}, and {limit}; {delay}; {RESUME}"
        else:
            silence = f"no answer for {own.for_s:.0f} s, distributed.timeout_s = {self.timeout_s:g} s"
            state, sentence = "failed", self._lost_others(silence if own.waiting else f"stuck {own.where}")
        self._set_end(sentence)
        self._report_and_exit(state, sentence)

    def _patience_s(self, waiting: bool) -> float:
        """How long this rank may stay in one phase: for ever if it does not wait and no other rank has ended."""
        ended = any(each.post.ended for rank, each in self.last_posts().items() if rank != self.rank)
        if waiting:
            return min(self.timeout_s, ENDED_PATIENCE_S) if ended else self.timeout_s
        return self.timeout_s if ended else math.inf

    def _report_and_exit(self, state: str, sentence: str) -> None:
        """Ends this process, whose main thread may be in a call that does not return."""
        with open(os.devnull, "w") as nowhere:
            # A thread in C, which ends the process even if a thread that hangs holds the interpreter's lock.
            faulthandler.dump_traceback_later(ENDING_S, exit=True, file=nowhere)
            try:
                print(f"error: {sentence}", file=sys.stderr, flush=True)
                for action in (self._wait_until_told, lambda: self.on_end(state, sentence), self.dump):
                    with contextlib.suppress(Exception):  # the sentence is out: no error may keep the process alive
                        action()
            finally:
                os._exit(2)
