"""The process that tracks a run. Rank 0 starts it and never waits for it, so Comet can neither stop nor slow a run.

    rank 0: start --> python -m ddp_asr.tracking RUN --follow --> track --> Upload, or write_archive
            TrackingProcess.close --"end"--> the last records, and the end of the process

It reads the run's files only. It ends when rank 0 says so, or when rank 0 has died, after it has sent what is left. It
ends in any case some time after the run (`CLOSE_S` online, `ARCHIVE_S` for an archive). A lock keeps two processes,
such as those of two attempts, from tracking a run at the same time.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ddp_asr.errors import UserError
from ddp_asr.files import read_json
from ddp_asr.runs.comet import ARCHIVE_S, NO_KEY, TrackingStatus, Upload, experiment_key, resolve_mode, write_archive

POLL_S = 1.0  # between two looks at the files
CLOSE_S = 20.0  # from the end of the run to the end of a process that tracks online, whatever Comet does
MOST_FAILURES = 4  # in a row, before an upload on demand gives up


# ---- in rank 0 -------------------------------------------------------------------------------------------------------


class TrackingProcess:
    """The process that tracks a run, for its parent. No method raises; only `close` waits, up to its time limit."""

    def __init__(
        self, run_directory: Path, mode: str, process: subprocess.Popen[bytes] | None = None, error: str = ""
    ) -> None:
        self.run_directory = run_directory
        self.mode = mode
        self.process = process
        self.error = error

    def close(self, timeout_s: float = CLOSE_S + 10) -> TrackingStatus:
        """Says that the run has ended, waits up to `timeout_s`, and returns what became of the tracking.

        A process that needs longer continues by itself until its own deadline.
        """
        status = TrackingStatus(mode=self.mode)
        if self.process is not None:
            with contextlib.suppress(OSError, ValueError):
                assert self.process.stdin is not None
                self.process.stdin.write(b"end\n")
                self.process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout_s)
            status = TrackingStatus.load(self.run_directory)
            if self.process.returncode and not status.finished and not status.failures:
                status.failed(f"the tracking process ended with {self.process.returncode}: see tracking.log in the run")
        if self.error:
            status.failed(self.error)
        return status


def start(run_directory: Path, mode: str, *, close_s: float = CLOSE_S) -> TrackingProcess:
    """Starts the tracking of a run and returns at once; `close` reports what kept it from starting.

    Raises:
        UserError: the mode is unknown.
    """
    mode, error = resolve_mode(mode), ""
    if mode == "off":
        return TrackingProcess(run_directory, mode)
    if mode == "online" and not os.environ.get("COMET_API_KEY"):
        mode, error = "offline", NO_KEY
    command = [sys.executable, "-m", "ddp_asr.tracking", str(run_directory.resolve()), "--follow", "--mode", mode]
    root = str(Path(__file__).resolve().parent.parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    try:
        experiment_key(run_directory)
        with (run_directory / "tracking.log").open("ab") as log:
            process = subprocess.Popen(
                [*command, "--parent", str(os.getpid()), "--close-s", str(close_s)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # out of reach of the signals that stop the ranks
            )
    except OSError as reason:
        return TrackingProcess(run_directory, mode, error=f"the tracking process could not be started: {reason}")
    return TrackingProcess(run_directory, mode, process, error)


# ---- in the process itself -------------------------------------------------------------------------------------------


def track(
    run_directory: Path, mode: str, *, follow: bool = False, parent: int | None = None, close_s: float = CLOSE_S
) -> TrackingStatus:
    """Tracks the run, with `follow` until it ends, otherwise as it stands."""
    if parent is not None:
        _ignore_signals()
    with _alone(run_directory, wait_s=CLOSE_S + 10 if parent is None else ARCHIVE_S):
        status = TrackingStatus.load(run_directory)
        status.mode, status.experiment_key, status.finished = mode, experiment_key(run_directory), False
        status.save(run_directory)
        # On demand a person waits and can stop it, and an archive waits for no network: both may take longer.
        deadline_s = close_s if follow and mode == "online" else ARCHIVE_S
        start_deadline = functools.partial(_end_after, deadline_s, run_directory, status)
        ended = threading.Event()
        if follow:
            threading.Thread(target=_watch, args=(run_directory, parent, ended, start_deadline), daemon=True).start()
        else:
            ended.set()
            start_deadline()
        if mode == "online":
            _upload(run_directory, status, ended, math.inf if follow else MOST_FAILURES)
        else:
            _archive(run_directory, status, ended)
        return status


def _upload(run_directory: Path, status: TrackingStatus, ended: threading.Event, most_failures: float) -> None:
    upload = Upload(run_directory, status)
    while not ended.wait(POLL_S):
        upload.advance()
    upload.hurry()
    while not status.finished and upload.failures_in_a_row < most_failures:
        status.finished = upload.advance()
        time.sleep(0 if status.finished else 0.1)
    status.save(run_directory)
    upload.close()


def _archive(run_directory: Path, status: TrackingStatus, ended: threading.Event) -> None:
    """Makes the archive at the end, and at once where there are steps: these are of an attempt that was killed."""
    if not ended.is_set() and (run_directory / "metrics.jsonl").exists():
        _try_archive(run_directory, status)
    ended.wait()
    status.finished = _try_archive(run_directory, status)
    status.save(run_directory)


def _try_archive(run_directory: Path, status: TrackingStatus) -> bool:
    try:
        write_archive(run_directory, status)
        return True
    except Exception as error:  # a full disk, or whatever comet_ml raises: the run's own files are complete
        status.failed(f"{type(error).__name__}: {error}")
        return False
    finally:
        status.save(run_directory)


def _watch(run_directory: Path, parent: int | None, ended: threading.Event, start_deadline: Callable[[], None]) -> None:
    """Sets `ended` when the run ends. A thread of its own, because the main one may be stuck in comet_ml."""
    while not _has_ended(run_directory, parent, POLL_S):
        pass
    start_deadline()
    ended.set()


def _has_ended(run_directory: Path, parent: int | None, timeout_s: float) -> bool:
    """Waits up to `timeout_s` for the end of the run, by its parent or, without one, by status.json."""
    if parent is None:
        time.sleep(timeout_s)
        return (read_json(run_directory / "status.json") or {}).get("state") not in (None, "running")
    # The parent writes a line, or its death closes the pipe. Processes that it has forked may hold the pipe open
    # longer, hence the second question.
    readable, _, _ = select.select([sys.stdin], [], [], timeout_s)
    return bool(readable) or os.getppid() != parent


@contextlib.contextmanager
def _alone(run_directory: Path, wait_s: float) -> Iterator[None]:
    """Lets one process at a time track a run: that of the attempt before may still be sending its last steps."""
    with (run_directory / ".tracking.lock").open("w") as file:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{run_directory} has been tracked by another process for {wait_s:.0f} s; wait for its end"
                    ) from None
                time.sleep(0.1)
            except OSError:
                break  # a file system without locks: two processes are better than none
        yield


def _end_after(deadline_s: float, run_directory: Path, status: TrackingStatus) -> None:
    """Ends this process after `deadline_s`, whatever comet_ml's threads wait for, and records the failure.

    If Comet was never reached, this process becomes one that makes the archive, without those threads.
    """

    def end() -> None:
        if status.finished:
            os._exit(0)
        late = f"not everything was taken within {deadline_s:g} s of the run's end"
        status.failed("; ".join(filter(None, (late, status.last_error))))
        status.save(run_directory)
        print(status.summary(run_directory), flush=True)
        if status.mode == "online" and not status.created:
            command = [sys.executable, "-m", "ddp_asr.tracking", str(run_directory), "--mode", "offline"]
            os.execv(sys.executable, command)
        os._exit(1)

    timer = threading.Timer(deadline_s, end)
    timer.daemon = True
    timer.start()


def _ignore_signals() -> None:
    """A scheduler signals every process of a job; this one ends with its parent instead, and yields the CPU to it."""
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(each, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(10)
