"""One thread per rank that posts where the rank is, reads where the others are, and ends a process that is stuck.

    watchdog.set_phase(120, "waiting for data")         # at each change of phase; costs one assignment
    watchdog.begin_waiting("reducing the gradients")    # from here to the next phase this rank waits for the others
    watchdog.name_lost_rank("Connection closed")        # a collective has failed: a sentence with the rank to blame
    watchdog.announce_exit("the disk is full")          # this rank ends by itself and tells the others why

    this rank --a post every second--> store --the posts of all--> find_suspect (suspects.py)

The thread ends the process, with one sentence on stderr and in status.json, if
- this rank has waited for the others for longer than distributed.timeout_s, or 30 s after one of them has ended;
- this rank does anything else for longer than distributed.timeout_s, and another rank has ended;
- a stop was asked for and no step boundary came within distributed.stop_grace_s.
It stops the run as on SIGTERM if torchrun is gone: killed with -9, torchrun leaves its ranks running.

The store is the one of the rendezvous, in rank 0's process or in torchrun's. A call to a store whose host is gone may
never return, whatever its timeout (seen with torch 2.11.0), so each exchange with it runs in a thread that lives only
as long, and the last known posts stay here.

gloo makes a collective fail after distributed.timeout_s, and the watchdog gives it `backend_grace_s` to do so; then the
main thread reports. NCCL does not return at all, and there the watchdog acts first. Tried with gloo, with network links
that were cut, and with a gloo that never returns in place of NCCL. Not tried, for want of several GPUs: a broken
connection that NCCL itself notices. It may end the process first with a trace of its own, and the note of a long wait
in the rank's log is then what names the rank.
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
from ddp_asr.ranks.suspects import End, LastPost, Post, Suspect, find_suspect

POST_EVERY_S = 1.0
SILENT_AFTER_S = 4.0  # a rank whose posts stand still for so long has died or is frozen
NOTE_AFTER_S = 10.0  # a longer wait is noted in the rank's log
ENDED_PATIENCE_S = 30.0  # for a collective that another rank has left for good: gloo fails at once, NCCL never
ENDING_S = 45.0  # for the sentence, status.json and NCCL's flight record, each of which may hang
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
        *,
        hosts_store: bool = False,
        backend_grace_s: float = 0.0,
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
        self._store, self._hosts_store, self._clock = store, hosts_store, clock
        self._backend_grace_s, self._stop_grace_s = backend_grace_s, math.inf
        self._torchrun: int | None = None  # its process id
        self._host = socket.gethostname()
        self._here = Position(0, "joining the others", False, clock())
        self._noted: Position | None = None  # the long wait that was noted last
        self._number = 0
        self._end = End()
        self._blame: Suspect | None = None
        self._known: dict[int, tuple[Post, float]] = {}  # each rank's last post, and when it changed
        self._answered_s = clock()
        self._asked_s: float | None = None  # during an exchange with the store
        self._hurried = self._closed = False
        self._posted_end = threading.Event()
        # Held by the thread that reports how this rank ends, until the process is gone.
        self._reporting = threading.RLock()
        self._thread: threading.Thread | None = None
        self._exchange: threading.Thread | None = None
        self._wakeup: tuple[socket.socket, socket.socket] | None = None  # the thread reads from the first

    def start(self) -> None:
        """Starts the thread."""
        if self._wakeup is None:
            self._wakeup = socket.socketpair()
            self._wakeup[1].setblocking(False)
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()
            # A thread that returns from the store's C++ while the interpreter is being torn down would abort it.
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
        """Ends the thread."""
        self._closed = True
        self._wake()
        for thread in (self._thread, self._exchange):
            if thread is not None and thread is not threading.current_thread():
                thread.join(1.0)
        if self._stop_grace_s < math.inf:
            signal.set_wakeup_fd(-1)
        for end in self._wakeup or ():
            end.close()
        atexit.unregister(self.close)

    # ---- where this rank is --------------------------------------------------------------------------------------

    def set_phase(self, step: int, phase: str) -> None:
        """This rank is now in this phase of this step, and waits for nobody."""
        self._here = Position(step, phase, False, self._clock())

    def begin_waiting(self, phase: str = "") -> None:
        """This rank now waits for the others, in a phase of the same name if none is given."""
        here = self._here
        self._here = Position(here.step, phase or here.phase, self.world_size > 1, self._clock())

    def end_waiting(self) -> None:
        """The others have come."""
        self.set_phase(self._here.step, self._here.phase)

    def _own_post(self) -> Post:
        here = self._here
        for_s = round(self._clock() - here.since_s, 1)
        return Post(self.rank, self._host, here.step, here.phase, here.waiting, for_s, self._number, self._end)

    # ---- the store -----------------------------------------------------------------------------------------------

    def exchange(self) -> None:
        """Writes this rank's post into the store and reads those of all ranks; waits for a rank that has none yet."""
        assert self._store is not None
        self._number += 1
        own = self._own_post()
        self._store.set(_key(self.rank), json.dumps(own))
        if own.ended.reason:
            self._posted_end.set()
        posts = [Post.decode(data) for data in self._store.multi_get([_key(each) for each in range(self.world_size)])]
        now_s, known = self._clock(), {}
        for post in posts:
            before, changed_s = self._known.get(post.rank, (None, now_s))
            known[post.rank] = (post, changed_s if before and before.number == post.number else now_s)
        self._known, self._answered_s = known, now_s

    def _try_exchange(self) -> None:
        try:
            self.exchange()
            self._asked_s = None
        except (RuntimeError, OSError):
            self._asked_s = -math.inf  # the store's host is gone: it is not asked again

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

    def name_lost_rank(self, reason: str, timed_out: bool = False) -> str:
        """The sentence for a collective that failed with `reason`; waits some seconds for posts that make it sure."""
        self._reporting.acquire()
        self._hurry()
        found, deadline_s = self.suspect(), self._clock() + self.silent_after_s + 2 * self.post_every_s
        while not found.certain and self._clock() < deadline_s:
            time.sleep(0.05)
            # A connection breaks before its rank is silent for long enough, so a later suspect is the better one. After
            # a time-out the first one is: a rank that was late may arrive in the meantime.
            later = self.suspect()
            found = later if later.certain or not timed_out else found
        self._blame = found
        return self._sentence(self._no_answer(self.timeout_s) if timed_out else reason, found)

    def announce_exit(self, reason: str) -> None:
        """Tells the others why this rank ends; where they are the reason, it names the rank to blame instead."""
        self._reporting.acquire()
        self._set_end(reason)
        if self._store is not None and not self.store_gone():
            self._posted_end.wait(1.0)

    def wait_for_readers(self) -> None:
        """After `announce_exit`: keeps the store up for a moment, until the others have read why this rank ended."""
        deadline_s = self._clock() + 3 * self.post_every_s
        while self._hosts_store and self._has_readers() and self._clock() < deadline_s:
            time.sleep(0.02)

    def _has_readers(self) -> bool:
        """Whether a rank may still want to read why this one ended."""
        others = [each for rank, each in self.last_posts().items() if rank != self.rank]
        left = all(each.post.ended.reason or each.silent_s >= self.silent_after_s for each in others)
        return bool(self._end.reason) and not left and not self.store_gone()

    def _set_end(self, reason: str) -> None:
        blame = self._blame
        first_line = (reason.strip().splitlines() or ["no reason given"])[0][:200]
        self._end = End(blame.words, True, blame.rank) if blame else End(first_line)
        self._hurry()

    def _no_answer(self, stuck_s: float) -> str:
        limit = f"within distributed.timeout_s = {self.timeout_s:g} s"
        return f"no answer {limit if stuck_s >= self.timeout_s else f'for {stuck_s:.0f} s'}"

    def _sentence(self, reason: str, suspect: Suspect) -> str:
        return f"rank {self.rank} of {self.world_size} lost the others ({reason}): {suspect.words}; {ADVICE}"

    # ---- the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closed:
            if self._store is not None and self._asked_s is None:
                self._asked_s = self._clock()
                self._exchange = threading.Thread(target=self._try_exchange, name="watchdog exchange", daemon=True)
                self._exchange.start()
            for check in (self._check_wait, self._check_stop):
                if not self._end.reason:
                    check()
            self._sleep()

    def _hurry(self) -> None:
        """Makes several exchanges per second from now on."""
        self._hurried = True
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: the thread will wake up; closed: it has ended
            if self._wakeup is not None:
                self._wakeup[1].send(b"\0")

    def _sleep(self) -> None:
        """Waits for the next period, a signal or `_wake`."""
        assert self._wakeup is not None
        period_s = self.post_every_s / (4 if self._hurried or self.stop.pending_s else 1)
        if select.select([self._wakeup[0]], [], [], period_s)[0]:
            for number in self._wakeup[0].recv(256):
                if number in STOP_SIGNALS:
                    self.stop.request(signal.Signals(number).name)

    def _check_wait(self) -> None:
        """Notes a long wait, and ends the process after too long a one."""
        here = self._here
        stuck_s = self._clock() - here.since_s
        if here.waiting and here is not self._noted and stuck_s > min(NOTE_AFTER_S, self.timeout_s / 2):
            self._noted = here
            note = f"has waited for {stuck_s:.0f} s {self._own_post().where}: {self.suspect().words}"
            # In a thread: a log on a file system that hangs must not block the watchdog.
            threading.Thread(target=self.on_long_wait, args=(note,), name="watchdog note", daemon=True).start()
        if stuck_s > self._patience_s(here.waiting) and self._reporting.acquire(blocking=False):
            self._blame = self.suspect()
            reason = self._no_answer(stuck_s) if here.waiting else f"stuck {self._own_post().where}"
            self._end_process("failed", self._sentence(reason, self._blame))

    def _patience_s(self, waiting: bool) -> float:
        """How long this rank may stay in one phase: for ever if it does not wait and no other rank has ended."""
        ended = any(each.post.ended.reason for rank, each in self.last_posts().items() if rank != self.rank)
        if waiting:
            return self._backend_grace_s + (min(self.timeout_s, ENDED_PATIENCE_S) if ended else self.timeout_s)
        return self._backend_grace_s + self.timeout_s if ended else math.inf

    def _check_stop(self) -> None:
        """Asks for a stop if torchrun is gone; ends the process if a stop has been pending for too long."""
        if self._torchrun not in (None, os.getppid()) and self.stop.reason is None:
            self.stop.request("torchrun is gone")
            os.kill(os.getpid(), signal.SIGTERM)  # so that the handler runs, too
        if self.stop.pending_s > self._stop_grace_s:
            self._reporting.acquire(blocking=False)  # in vain if the main thread is ending the process, but too slowly
            self._blame = self.suspect() if self._here.waiting else self._blame
            overdue = f"no step boundary within distributed.stop_grace_s = {self._stop_grace_s:g} s"
            self._end_process("stopped", f"{self.stop.reason}, and {overdue}; {self.explain_delay()}; {RESUME}")

    def explain_delay(self) -> str:
        """Where this rank is, or which rank it waits for."""
        own = self._own_post()
        return self.suspect().words if own.waiting else f"this rank has been {own.where}, for {own.for_s:.0f} s"

    def _end_process(self, state: str, sentence: str) -> None:
        """Starts the end of this process, whose main thread may be in a call that does not return."""
        self._set_end(sentence)  # for the next post: this thread goes on
        threading.Thread(target=self._report_and_exit, args=(state, sentence), name="watchdog end", daemon=True).start()

    def _report_and_exit(self, state: str, sentence: str) -> None:
        with open(os.devnull, "w") as nowhere:
            # A thread in C, which ends the process even if a thread that hangs holds the interpreter's lock.
            faulthandler.dump_traceback_later(ENDING_S, exit=True, file=nowhere)
            try:
                print(f"error: {sentence}", file=sys.stderr, flush=True)
                for action in (lambda: self.on_end(state, sentence), self.dump, self.wait_for_readers):
                    with contextlib.suppress(Exception):  # the sentence is out: no error may keep the process alive
                        action()
            finally:
                os._exit(1)


def _key(rank: int) -> str:
    return f"position/{rank}"
