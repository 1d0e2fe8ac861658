"""A request to stop, wherever it comes from: a signal (`SIGNALS`), Ctrl-C among them, or a launcher that is gone.

    stop = StopRequest(grace_s=20, on_overdue=write_status)     # which may have more to say, for the last sentence
    stop.install()
    ...                      # until here a signal raises StoppedBeforeTraining in the main thread
    stop.wait_for_boundary()
    stop.agreed()            # at a step boundary: a rank had a `stop.reason`, and all ranks know it

A Python handler cannot run while the main thread is inside a collective, so signals are also read from the wake-up
descriptor by a thread. It ends a rank that reaches no step boundary within `grace_s` of a signal, which is how a rank
ends whose peers have died without closing their sockets. The same thread watches the parent: torchrun killed with -9
leaves its ranks alive, and they stop as on SIGTERM.
"""

import os
import select
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_PARENT_POLL_S = 1.0


class StoppedBeforeTraining(BaseException):
    """A signal came while the run was still being set up; nothing is lost by ending at once."""


class StopRequest:
    """Whether, and why, this rank has been asked to stop."""

    def __init__(self, grace_s: float, on_overdue: Callable[[str], str | None]) -> None:
        self.reason: str | None = None
        self._grace_s = grace_s
        self._on_overdue = on_overdue
        self._at_once = self._setting_up = True
        self._asked = threading.Event()
        self._answered = threading.Event()
        # Only torchrun is worth watching: a shell may well end before the run that it has started in the background.
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def install(self) -> None:
        """Takes the signals over and starts the thread. Call it once, in the main thread."""
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        self._wakeup = theirs  # kept alive: the descriptor closes with the object
        for number in SIGNALS:
            # `nohup` has a hang-up ignored, and means it.
            if not (number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN):
                signal.signal(number, self._handle)
        threading.Thread(target=self._watch, args=(ours,), name="stop request", daemon=True).start()

    def wait_for_boundary(self) -> None:
        """From now on a signal waits for the next step boundary."""
        self._at_once = self._setting_up = False

    def reaches_setting_up(self, within_s: float) -> bool:
        """Whether this rank, still being set up, is asked to stop now or within a moment.

        A signal ends one rank after the other: those that are still waiting for a peer see it gone first.
        """
        if not self._setting_up:
            return False
        try:
            return self.reason is not None or self._asked.wait(within_s)
        except StoppedBeforeTraining:
            return True

    def agreed(self) -> None:
        """All ranks know of the stop, at a step boundary: from here on it takes as long as it takes."""
        self._answered.set()

    def dismiss(self) -> None:
        """The run has ended: a signal that comes now finds nothing left to stop."""
        self._at_once = False
        self._answered.set()

    def request(self, reason: str) -> None:
        """Asks for a stop; the first reason stays."""
        if self.reason is None:
            self.reason = reason
            self._asked.set()
            threading.Thread(target=self._end_when_overdue, name="stop grace", daemon=True).start()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.request(signal.Signals(number).name)
        if self._at_once:
            self._at_once = False  # a second signal during the clean-up must not break it
            self._answered.set()
            raise StoppedBeforeTraining(self.reason)

    def _watch(self, wakeup: socket.socket) -> None:
        while True:
            if select.select([wakeup], [], [], _PARENT_POLL_S)[0]:
                for number in wakeup.recv(64):
                    if number in SIGNALS:
                        self.request(signal.Signals(number).name)
            if self._launcher not in (None, os.getppid()) and self.reason is None:
                self.request("torchrun is gone")
                os.kill(os.getpid(), signal.SIGTERM)  # as on SIGTERM, handler included

    def _end_when_overdue(self) -> None:
        if self._answered.wait(self._grace_s):
            return
        reason = f"{self.reason}, and no step boundary within distributed.stop_grace_s = {self._grace_s:g} s"
        try:
            reason = self._on_overdue(reason) or reason
        finally:
            print(f"error: {reason}; resumes from the newest checkpoint", file=sys.stderr, flush=True)
            os._exit(1)
