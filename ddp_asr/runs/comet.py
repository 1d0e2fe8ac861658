"""A run's records, sent to Comet or written into an archive for `comet upload`, by public methods of `comet_ml` only.

    RunReader --records--> Upload (online) --> Comet        both call `log`, which says what a record is for Comet
                       --> write_archive   --> comet/KEY.zip

One experiment: its key is made once and kept in `comet.json`, so every attempt of a run continues the same experiment.

Each step once: metrics are logged in batches, each of which becomes one request. `tracking.json` notes the last step of
a batch only after `flush` has returned and `comet_ml` has reported no error since; otherwise the batch is sent again.
A resumed run trains the steps after its checkpoint again, to the same values, and those that Comet has are left out.
Two exceptions send a value twice, with the same step and value: an answer that was lost after Comet took the batch,
and an error in one of the two requests that the first line of a connection takes.

The archive is always made from the whole run, at the end, on resume or on demand. `comet_ml` itself writes its archive
when the process ends, so a killed run would have none.

Time: by public methods `comet_ml` stamps a value with the moment at which it is logged. That is right within seconds
for a run that is followed online and wrong in an archive, so the time since the start is a metric of its own,
`minutes`, and the time of the start is a summary value, `started`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddp_asr.errors import UserError
from ddp_asr.files import read_json, replace_file, sync_directory
from ddp_asr.runs.records import Item, Metrics, Record, RunReader, Sent, Table, read_settings

MODES = ("auto", "online", "offline", "off")
NO_KEY = "online tracking needs COMET_API_KEY in the environment; set it, or track offline"

BACK_OFF_S = (1.0, 60.0)  # first and longest pause after a failure; it doubles
ARCHIVE_S = 900.0  # limit for making an archive, which waits for no network (0.4 ms a step measured)
FLUSH_S = 10  # how long one call waits for comet_ml to send what was logged
BATCH = {Metrics: 200, Table: 20}  # records of a kind that are logged before a flush; one of any other kind
TRIES = 3  # for anything but metrics, which are sent until Comet takes them
MOST_POINTS = 15_000  # of one metric: `comet upload` drops more than these at random, and Comet keeps no more

# comet_ml's own settings, which it reads from the environment when it is imported; what the user has set wins. Its
# retries of HTTP requests are off so that each failure is counted, and retried, here.
COMET_SETTINGS = {
    "COMET_DISABLE_AUTO_LOGGING": "1",
    "COMET_LOGGING_CONSOLE": "CRITICAL",
    "COMET_LOGGING_PARAMETERS_IGNORE": "comet:curr_step,comet:curr_epoch",  # else a request beside each metrics batch
    "COMET_DISPLAY_SUMMARY_LEVEL": "0",
    "COMET_DISABLE_ANNOUNCEMENT": "1",
    "COMET_ERROR_TRACKING_ENABLE": "0",
    "COMET_INTERNAL_REPORTING": "0",
    "COMET_TIMEOUT_HTTP": "60",  # a batch whose answer came too late is sent twice
    "COMET_TIMEOUT_CLEANING": "20",  # at the end comet_ml's default waits an hour for messages, three for files
    "COMET_TIMEOUT_UPLOAD": "20",
    "COMET_TIMEOUT_FILE_UPLOAD": "20",
    "COMET_HTTP_SESSION_RETRY_TOTAL": "0",
    "COMET_GET_OR_ADD_EXPERIMENT_RETRY_TOTAL": "0",
    # These depend on how comet_ml 3.58.8 works inside, see setup.cfg. Without the first two, a part of a batch is sent
    # before the flush and may fail alone. Without the third, comet_ml sends what failed again when the connection is
    # back, and so do we. Without the fourth, a lost connection leaves an incomplete archive in the working directory.
    "COMET_MESSAGE_BATCH_METRIC_INTERVAL": "3600",
    "COMET_MESSAGE_BATCH_METRIC_MAX_SIZE": "10000",
    "COMET_FALLBACK_STREAMER_CONNECTION_CHECK_INTERVAL": "1000000000",
    "COMET_FALLBACK_STREAMER_FALLBACK_TO_OFFLINE_MIN_BACKEND_VERSION": "9999.0.0",
}

# What comet_ml would find out by itself describes this process and not the run.
NOTHING_AUTOMATIC = dict.fromkeys(
    (
        *("log_code", "log_graph", "auto_param_logging", "auto_metric_logging", "parse_args", "auto_output_logging"),
        *("log_env_details", "log_git_metadata", "log_git_patch", "auto_log_co2"),
    ),
    False,
)


def resolve_mode(mode: str) -> str:
    """Returns online, offline or off; auto is online where an API key is set."""
    if mode not in MODES:
        raise UserError(f"tracking.mode is {mode!r}; it must be one of {', '.join(MODES)}")
    if mode == "auto":
        return "online" if os.environ.get("COMET_API_KEY") else "offline"
    return mode


def experiment_key(run_directory: Path, known: str | None = None) -> str:
    """Returns the run's experiment key from comet.json; where there is none, `known` (a checkpoint's) or a new one."""
    path = run_directory / "comet.json"
    if isinstance(key := (read_json(path) or {}).get("experiment_key"), str):
        return key
    key = known or uuid.uuid4().hex  # Comet wants 32 to 50 letters and digits
    replace_file(path, json.dumps({"experiment_key": key}, indent=1) + "\n")
    return key


# ---- what Comet has, and what went wrong ---------------------------------------------------------------------------


@dataclass
class TrackingStatus:
    """tracking.json: what Comet has of the run, and what went wrong."""

    mode: str = "offline"
    experiment_key: str = ""
    created: bool = False  # the experiment exists at Comet
    sent: Sent = field(default_factory=Sent)
    lost: list[str] = field(default_factory=list)  # what Comet refused each time
    failures: int = 0  # over all attempts of the run
    last_error: str = ""
    finished: bool = False  # everything that the run's files hold is at Comet, or in the archive
    archive: str = ""
    url: str = ""

    @classmethod
    def load(cls, run_directory: Path) -> TrackingStatus:
        record = read_json(run_directory / "tracking.json") or {}
        known = {name: value for name, value in record.items() if name in cls.__dataclass_fields__}
        return cls(**{**known, "sent": Sent(**known.get("sent", {}))})

    def save(self, run_directory: Path) -> None:
        with contextlib.suppress(OSError):  # the run itself reports a full disk; tracking goes on
            replace_file(run_directory / "tracking.json", json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    def failed(self, error: object) -> None:
        self.failures += 1
        self.last_error = str(error)[:500]

    def summary(self, run_directory: Path) -> str:
        """Says in one line what became of the tracking, for the end of a run."""
        command = f"python -m ddp_asr.tracking {run_directory}"
        if self.mode == "off":
            text = "not tracked"
        elif self.mode == "offline" and self.finished:
            text = f"the Comet archive is made; upload it with: comet upload {run_directory / self.archive}"
        elif self.mode == "offline":
            text = f"the Comet archive is not finished yet; if it stays unfinished, make it with: {command}"
        else:
            steps = self.sent.steps
            text = f"Comet has train steps to {steps['train']} and tests to {steps['test']} {self.url}".rstrip()
            text += f"; it refused {', '.join(self.lost)}" if self.lost else ""
            text += "" if self.finished else f"; send the rest with: {command} --mode online"
        return text + (f" ({self.failures} failures, the last: {self.last_error})" if self.failures else "")


class _CountFailures(logging.Handler):
    """Counts what comet_ml logs of failures, because it raises few of them.

    It logs a refused request as an error, and a lost connection only as a debug message that carries the exception.
    """

    def __init__(self, status: TrackingStatus) -> None:
        super().__init__(logging.DEBUG)
        self.status = status

    def emit(self, record: logging.LogRecord) -> None:
        arguments = record.args if isinstance(record.args, tuple) else ()
        errors = [each for each in (*(record.exc_info or ()), *arguments) if isinstance(each, Exception)]
        # requests' exceptions are OSErrors. A missing file is one as well, and says nothing about the connection.
        lost = any(isinstance(error, OSError) and not isinstance(error, FileNotFoundError) for error in errors)
        if record.levelno >= logging.ERROR or lost or (errors and record.levelno >= logging.WARNING):
            self.status.failed(record.getMessage())


def _import_comet(run_directory: Path, status: TrackingStatus) -> Any:
    """Imports comet_ml after its settings are made: its log goes to comet/comet.log, its failures are counted."""
    folder = run_directory / "comet"
    folder.mkdir(exist_ok=True)
    for name, value in {**COMET_SETTINGS, "COMET_LOGGING_FILE": str(folder / "comet.log")}.items():
        os.environ.setdefault(name, value)
    import comet_ml

    logger = logging.getLogger("comet_ml")
    if not any(isinstance(handler, _CountFailures) for handler in logger.handlers):
        logger.addHandler(_CountFailures(status))
        if status.mode == "online":
            logger.setLevel(logging.DEBUG)
    return comet_ml


def _experiment_arguments(run_directory: Path) -> dict[str, Any]:
    tracking = read_settings(run_directory).get("tracking") or {}
    project = {"project_name": tracking.get("project") or None, "workspace": tracking.get("workspace") or None}
    return {"experiment_key": experiment_key(run_directory), **project, **NOTHING_AUTOMATIC}


# ---- what a record is for Comet --------------------------------------------------------------------------------------


def log(experiment: Any, record: Record) -> None:
    """Hands one record to an online or an offline experiment."""
    match record:
        case Metrics(kind, step, epoch, values):
            with experiment.context_manager(kind):
                experiment.log_metrics(values, step=step, epoch=epoch)
        case Table(step, columns, rows):
            with experiment.context_manager("test"):
                experiment.set_step(step)
                experiment.log_table(f"samples-{step:08d}.csv", rows, headers=columns)
        case Item("name", _, name):
            experiment.set_name(name)
        case Item("parameters", _, values):
            experiment.log_parameters(values)
        case Item("environment", _, values):
            for name, value in values.items():
                experiment.log_system_info(name, value)
        case Item("summary", _, values):
            for name, value in values.items():
                experiment.log_other(name, value)
        case Item("tags", _, tags):
            experiment.add_tags(tags)
        case Item("image", name, path):
            experiment.log_image(str(path), name=name, overwrite=True)
        case Item("asset", name, path):
            experiment.log_asset(str(path), file_name=name, overwrite=True)
        case Item("code", _, folder):
            experiment.log_code(folder=str(folder))


# ---- offline -------------------------------------------------------------------------------------------------------


def write_archive(run_directory: Path, status: TrackingStatus) -> None:
    """Makes comet/KEY.zip from the run's files; it replaces the one before only when it is complete."""
    comet_ml = _import_comet(run_directory, status)
    arguments = _experiment_arguments(run_directory)
    archive = run_directory / "comet" / f"{arguments['experiment_key']}.zip"
    for left in archive.parent.glob(".making-*"):  # of a process that was killed: only one at a time works here
        shutil.rmtree(left, ignore_errors=True)
    aside = archive.with_name(f".making-{os.getpid()}")
    failures = status.failures
    try:
        experiment = comet_ml.OfflineExperiment(offline_directory=str(aside), **arguments)
        for record in _thinned(RunReader(run_directory).unsent(Sent())):
            log(experiment, record)
        experiment.end()
        if status.failures > failures:
            raise OSError(f"comet_ml could not write the archive: {status.last_error}")
        with (aside / archive.name).open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside / archive.name, archive)
        sync_directory(archive.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    status.archive = str(archive.relative_to(run_directory))


def _thinned(records: list[Record]) -> Iterator[Record]:
    """Leaves out train steps, evenly, where there are more than Comet keeps: comet_ml holds them all in memory."""
    steps = [record for record in records if isinstance(record, Metrics) and record.kind == "train"]
    every = -(-len(steps) // MOST_POINTS) or 1
    kept = {record.step for record in steps[::-1][::every]}  # from the last one backwards
    return (each for each in records if not (isinstance(each, Metrics) and each.kind == "train") or each.step in kept)


# ---- online --------------------------------------------------------------------------------------------------------


class Upload:
    """Sends a run to Comet as its files grow. After a failure it ends the connection and makes a new one."""

    def __init__(self, run_directory: Path, status: TrackingStatus) -> None:
        self.run_directory = run_directory
        self.status = status
        self.failures_in_a_row = 0
        self._reader = RunReader(run_directory)
        self._experiment: Any = None
        self._in_flight: list[Record] = []  # logged, and not yet acknowledged
        self._warm = False  # comet_ml sends the first value of a connection alone, so the first batch is one line
        self._failures_before = 0  # failures when these were logged
        self._tries: Counter[str] = Counter()
        self._not_before = 0.0  # monotonic: no attempt until then, after a failure
        self._pause_s = BACK_OFF_S[0]

    def advance(self) -> bool:
        """Sends what is new; returns True when Comet has everything. Never raises: failures are counted and retried."""
        if time.monotonic() < self._not_before:
            return False
        try:
            if self._experiment is None:
                self._experiment = self._connect()
            return self._send_all()
        except Exception as error:  # whatever comet_ml raises: it must not end the process
            self.status.failed(f"{type(error).__name__}: {error}")
            self.failures_in_a_row += 1
            self._count_try()
            self._disconnect()
            self._not_before = time.monotonic() + self._pause_s
            self._pause_s = min(2 * self._pause_s, BACK_OFF_S[1])
            self.status.save(self.run_directory)
            return False

    def hurry(self) -> None:
        """The run has ended: try again soon, whatever the pause was."""
        self._not_before, self._pause_s = 0.0, BACK_OFF_S[0]

    def close(self) -> None:
        """Ends the experiment. Everything was acknowledged before; an error now is only logged to comet/comet.log."""
        self._disconnect()

    def _connect(self) -> Any:
        comet_ml = _import_comet(self.run_directory, self.status)
        makers = [comet_ml.Experiment, comet_ml.ExistingExperiment]
        # A killed process may not have noted that it made the experiment: if one of the two fails, try the other.
        for make in reversed(makers) if self.status.created else makers:
            experiment = make(**_experiment_arguments(self.run_directory))
            if experiment.alive:
                break
        else:
            raise ConnectionError("Comet did not accept the experiment (see comet/comet.log)")
        self.status.created, self.status.url = True, str(experiment.url or "")
        self.status.save(self.run_directory)
        return experiment

    def _disconnect(self) -> None:
        experiment, self._experiment, self._in_flight, self._warm = self._experiment, None, [], False
        failures, last_error = self.status.failures, self.status.last_error
        if experiment is not None:
            with contextlib.suppress(Exception):
                experiment.end()
        self.status.failures, self.status.last_error = failures, last_error  # the cause, not what followed from it

    def _send_all(self) -> bool:
        if self._in_flight and not self._acknowledged():
            return False
        for _, records in itertools.groupby(self._reader.unsent(self.status.sent), type):
            waiting = list(records)
            while waiting:
                size = BATCH.get(type(waiting[0]), 1) if self._warm else 1
                self._in_flight, waiting = waiting[:size], waiting[size:]
                self._failures_before = self.status.failures
                for record in self._in_flight:
                    log(self._experiment, record)
                if not self._acknowledged():
                    return False
        return True

    def _acknowledged(self) -> bool:
        """Returns True when Comet has taken what was logged, and False while comet_ml is still sending it.

        Raises:
            ConnectionError: something of it failed.
        """
        # Twice: comet_ml 3.58.8 passes records through two queues in two threads, and a flush does not see a record
        # that is on its way from one to the other. The second flush starts after each thread has made a full turn.
        sent = self._experiment.flush(timeout=FLUSH_S) and self._experiment.flush(timeout=FLUSH_S)
        if self.status.failures > self._failures_before:
            raise ConnectionError(f"Comet did not take everything: {self.status.last_error}")
        if not sent:
            return False
        for record in self._in_flight:
            self.status.sent.add(record)
        self._warm = self._warm or isinstance(self._in_flight[0], Metrics)
        self._in_flight, self.failures_in_a_row, self._pause_s = [], 0, BACK_OFF_S[0]
        self.status.save(self.run_directory)
        return True

    def _count_try(self) -> None:
        """Gives up, with a note in the status, what has failed TRIES times; metrics are never given up."""
        if not self._in_flight or isinstance(first := self._in_flight[0], Metrics):
            return
        name = f"samples from step {first.step}" if isinstance(first, Table) else first.name
        self._tries[name] += 1
        if self._tries[name] >= TRIES:
            self.status.lost.append(name)
            for record in self._in_flight:
                self.status.sent.add(record)
