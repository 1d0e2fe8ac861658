"""The signals that ask a run to stop, and the request that they make.

    stop.install(wakeup)          # from here on a signal raises StoppedBeforeTraining in the main thread
    stop.defer_to_boundary()      # from here on a signal only sets `stop.reason`
    stop.mark_handled()           # at a step boundary: all ranks know of the stop, which may now take its time

The watchdog (watchdog.py) ends the process if that boundary does not come in time.
"""

import signal
import socket
import time
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def ignore_stop_signals() -> None:
    """For a rank that is about to report its error: torchrun signals the ranks that are left once one has ended."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StoppedBeforeTraining(BaseException):
    """A signal came before the first step; nothing is lost if the process ends at once."""


class StopRequest:
    """Whether, why and since when this rank has been asked to stop."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self._requested_s = 0.0
        self._handled = False
        self.interrupts = False  # whether a signal raises StoppedBeforeTraining

    def install(self, wakeup: socket.socket) -> None:
        """Installs the signal handlers, in the main thread.

        Python runs a handler only between two instructions of the main thread, so never inside a collective. Python
        therefore also writes the signal's number to `wakeup`, from which the watchdog's thread reads it.
        """
        self.interrupts = True
        signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            # Under nohup SIGHUP is ignored, so that the run outlives its terminal.
            if not (number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN):
                signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.request(signal.Signals(number).name)
        if self.interrupts:
            self.mark_handled()  # a second signal must not interrupt the clean-up
            raise StoppedBeforeTraining(self.reason)

    def request(self, reason: str) -> None:
        """Asks for a stop; the first reason is kept."""
        if self.reason is None:
            self._requested_s = time.monotonic()
            self.reason = reason

    @property
    def pending_s(self) -> float:
        """Seconds since a stop was asked for; 0 if none was, or if it takes place."""
        return 0.0 if self.reason is None or self._handled else time.monotonic() - self._requested_s

    def defer_to_boundary(self) -> None:
        """Training begins: from now on a stop takes place at the next step boundary."""
        self.interrupts = False

    def mark_handled(self) -> None:
        """The stop takes place, or the run has ended: time no longer counts, and a signal has no further effect."""
        self.interrupts, self._handled = False, True
