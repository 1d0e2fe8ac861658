"""The process that tracks a run. Rank 0 starts it and never waits for it, so a tracker can neither stop nor slow a run.

    rank 0: start --> python -m ddp_asr.tracking RUN --parent PID --> track --> Upload, or write_archive (a thread)
                                                                            --> TensorBoard (while it waits)
            TrackingProcess.close --"end"--> the last records, and the end of the process

It reads the run's files only. It ends when rank 0 says so, or when rank 0 has died, after it has sent what is left,
and online in any case `CLOSE_S` after the run. A lock keeps two processes, such as those of two attempts, from tracking
a run at the same time.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ddp_asr.errors import UserError
from ddp_asr.runs.comet import NO_KEY, TrackingStatus, Upload, resolve_mode, write_archive
from ddp_asr.runs.tensorboard import TensorBoard

POLL_S = 1.0  # between two looks at the files
PAUSE_S = 30.0  # the same after a failure
CLOSE_S = 20.0  # from the end of the run to the end of a process that tracks online, whatever Comet does
TRIES = 3  # to send what is left, when the run has ended


def require(to: Sequence[str]) -> None:
    """Raises UserError where a tracker's package is missing."""
    if "tensorboard" in to and importlib.util.find_spec("tensorboard") is None:
        raise UserError(
            "tracking.to names tensorboard, and the package tensorboard is not installed: install it with "
            "pip install tensorboard, or take it out of tracking.to"
        )


# ---- in rank 0 -------------------------------------------------------------------------------------------------------


@dataclass
class TrackingProcess:
    """The process that tracks a run, for its parent."""

    run_directory: Path
    mode: str  # of Comet
    to: list[str] = field(default_factory=list)  # empty: nothing is tracked
    process: subprocess.Popen[bytes] | None = None
    error: str = ""

    def close(self, timeout_s: float = CLOSE_S + 10) -> TrackingStatus:
        """Says that the run has ended, waits up to `timeout_s`, and returns what became of the tracking.

        It never raises. A process that needs longer continues by itself.
        """
        status = TrackingStatus()
        if self.process is not None:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self.process.communicate(b"end\n", timeout_s)
            with contextlib.suppress(OSError):  # the process itself says on its log that it cannot read the file
                status = TrackingStatus.load(self.run_directory)
        status.mode, status.to = self.mode, self.to
        if self.error:
            status.failed(self.error)
        return status


def start(
    run_directory: Path, mode: str, to: Sequence[str] = ("comet",), *, close_s: float = CLOSE_S
) -> TrackingProcess:
    """Starts the tracking of a run and returns at once; `close` reports what kept it from starting."""
    mode, error = resolve_mode(mode), ""
    if mode == "off" or not to:
        return TrackingProcess(run_directory, mode)
    if mode == "online" and "comet" in to and not os.environ.get("COMET_API_KEY"):
        mode, error = "offline", NO_KEY
    command = [sys.executable, "-m", "ddp_asr.tracking", str(run_directory), "--mode", mode, "--to", ",".join(to)]
    try:
        with (run_directory / "tracking.log").open("ab") as log:
            process = subprocess.Popen(
                [*command, "--parent", str(os.getpid()), "--close-s", str(close_s)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # out of reach of the signals that stop the ranks
            )
    except OSError as reason:
        return TrackingProcess(
            run_directory, mode, list(to), error=f"the tracking process could not be started: {reason}"
        )
    return TrackingProcess(run_directory, mode, list(to), process, error)


# ---- in the process itself -------------------------------------------------------------------------------------------


def track(
    run_directory: Path,
    mode: str,
    to: Sequence[str] = ("comet",),
    *,
    parent: int | None = None,
    close_s: float = CLOSE_S,
) -> TrackingStatus:
    """Tracks the run until the process `parent` ends it or dies; without one, as it stands."""
    if parent is not None:
        # A scheduler signals every process of a job; this one ends with its parent instead, and yields the CPU to it.
        for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(each, signal.SIG_IGN)
        os.nice(10)
    with _alone(run_directory, wait=parent is not None):
        status = TrackingStatus.load(run_directory)
        status.mode, status.to, status.finished = mode, list(to), False
        status.save(run_directory)
        ended = threading.Event()
        # In a thread of its own, because comet_ml may block for longer than this process may live.
        send = _no_comet if "comet" not in to else _upload if mode == "online" else _archive
        sender = threading.Thread(target=send, args=(run_directory, status, ended), daemon=True)
        board = TensorBoard(run_directory) if "tensorboard" in to else None
        if parent is None:
            _end_board(board, status)
            ended.set()
            sender.start()
            sender.join()  # a person waits and can stop it
        else:
            sender.start()
            _wait_for_end_of_run(parent, board.advance if board else lambda: None)
            _end_board(board, status)
            ended.set()
            sender.join(close_s if mode == "online" else None)  # an archive waits for no network
            if sender.is_alive():
                late = f"not everything was taken within {close_s:g} s of the run's end"
                status.failed("; ".join(filter(None, (late, status.last_error))))
            if not status.finished:
                _end_unfinished(run_directory, status)
        return status


def _upload(run_directory: Path, status: TrackingStatus, ended: threading.Event) -> None:
    upload = Upload(run_directory, status)
    pause_s = POLL_S
    while not ended.wait(pause_s):
        pause_s = POLL_S if upload.advance() else PAUSE_S
    upload.put_off.clear()
    done = any(upload.advance() for _ in range(TRIES))
    status.finished = done and not upload.put_off and not status.tensorboard_error
    status.save(run_directory)
    upload.close()


def _archive(run_directory: Path, status: TrackingStatus, ended: threading.Event) -> None:
    """Makes the archive at the end, and at once where there are steps: these are of an attempt that was killed."""
    if not ended.is_set() and (run_directory / "metrics.jsonl").exists():
        write_archive(run_directory, status)
    ended.wait()
    status.finished = write_archive(run_directory, status) and not status.tensorboard_error
    status.save(run_directory)


def _no_comet(run_directory: Path, status: TrackingStatus, ended: threading.Event) -> None:
    ended.wait()
    status.finished = not status.tensorboard_error
    status.save(run_directory)


def _end_board(board: TensorBoard | None, status: TrackingStatus) -> None:
    status.tensorboard_error = ""
    if board is not None:
        board.close()
        status.tensorboard_error = board.error


def _wait_for_end_of_run(parent: int, meanwhile: Callable[[], None]) -> None:
    # The parent writes a line, or its death closes the pipe. Processes that it has forked may hold the pipe open
    # longer, hence the second question.
    while not select.select([sys.stdin], [], [], POLL_S)[0] and os.getppid() == parent:
        meanwhile()


@contextlib.contextmanager
def _alone(run_directory: Path, *, wait: bool) -> Iterator[None]:
    """Lets one process at a time track a run: that of the attempt before may still be sending its last steps."""
    with (run_directory / ".tracking.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{run_directory} is tracked by another process, because it runs or has just ended; wait for its end"
            ) from None
        except OSError:
            pass  # a file system without locks: two processes are better than none
        yield


def _end_unfinished(run_directory: Path, status: TrackingStatus) -> None:
    """Ends this process without waiting for comet_ml's threads.

    If Comet was never reached, this process becomes one that makes the archive.
    """
    status.save(run_directory)
    print(status.summary(run_directory), flush=True)
    if status.mode == "online" and "comet" in status.to and not status.url:
        command = [sys.executable, "-m", "ddp_asr.tracking", str(run_directory), "--mode", "offline"]
        os.execv(sys.executable, [*command, "--to", ",".join(status.to)])
    os._exit(1)
