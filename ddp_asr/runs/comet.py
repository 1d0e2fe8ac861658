"""A run's records, sent to Comet or written into an archive for `comet upload`, by public methods of `comet_ml` only.

    RunReader --records--> Upload (online) --> Comet        both call `log`, which says what a record is for Comet
                       --> write_archive   --> comet/KEY.zip

One experiment: its key is made once and kept in `comet.json`, so every attempt of a run continues the same experiment.

Each step once: metrics are logged in batches, each of which becomes one request. `tracking.json` notes the last step of
a batch after `flush` has returned and `comet_ml` has reported no error. A resumed run trains the steps after its
checkpoint again, to the same values, and those that Comet has are left out. `comet_ml` repeats a request that fails for
about 12 s. A batch that fails longer is sent again over a new connection. Two exceptions send a value twice, with the
same step and value: an answer that was lost after Comet took the batch, and a failure in the first batch of a
connection, which takes two requests.

The archive is always made from the whole run, at the end, on resume or on demand. `comet_ml` itself writes its archive
when the process ends, so a killed run would have none.

Time: by public methods `comet_ml` stamps a value with the moment at which it is logged. That is right within seconds
for a run that is followed online and wrong in an archive, so the time since the start is a metric of its own,
`minutes`, and the time of the start is a summary value, `started`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddp_asr.files import Fields, is_count, is_flag, is_text, only, read_json, replace_file, sync_directory
from ddp_asr.runs.records import Item, Metrics, Record, RunReader, Sent, Table, read_settings

NO_KEY = "online tracking needs COMET_API_KEY in the environment; set it, or track offline"

BATCH = 100  # lines of metrics between two notes in tracking.json
FLUSH_S = 600  # how long comet_ml may take to send a batch
MOST_POINTS = 15_000  # of one metric: `comet upload` drops more than these at random, and Comet keeps no more

# comet_ml's own settings, which it reads from the environment when it is imported; what the user has set wins.
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
    # These depend on how comet_ml 3.58.8 works inside, see setup.cfg. Without the first two, a part of a batch is sent
    # before the flush and may fail alone. Without the third, comet_ml sends what failed again when the connection is
    # back, and so do we. Without the fourth, a lost connection leaves an incomplete archive in the working directory.
    "COMET_MESSAGE_BATCH_METRIC_INTERVAL": "3600",
    "COMET_MESSAGE_BATCH_METRIC_MAX_SIZE": "10000",
    "COMET_FALLBACK_STREAMER_CONNECTION_CHECK_INTERVAL": "1000000000",
    "COMET_FALLBACK_STREAMER_FALLBACK_TO_OFFLINE_MIN_BACKEND_VERSION": "9999.0.0",
}


def resolve_mode(mode: str) -> str:
    """Returns online, offline or off; auto is online where an API key is set."""
    if mode == "auto":
        return "online" if os.environ.get("COMET_API_KEY") else "offline"
    return mode


def experiment_key(run_directory: Path, known: str | None = None) -> str:
    """Returns the run's experiment key from comet.json; where there is none, `known` (a checkpoint's) or a new one."""
    path = run_directory / "comet.json"
    if key := (read_json(path, {"experiment_key": _is_key}) or {}).get("experiment_key"):
        return str(key)
    key = known if known and _is_key(known) else uuid.uuid4().hex
    replace_file(path, json.dumps({"experiment_key": key}, indent=1) + "\n")
    return key


def _is_key(value: Any) -> bool:
    """Whether Comet takes it; it also names a file."""
    return is_text(value) and re.fullmatch("[0-9A-Za-z]{32,50}", value) is not None


# ---- what Comet has, and what went wrong ---------------------------------------------------------------------------


_TRACKING: Fields = {
    **dict.fromkeys(("mode", "url", "last_error", "tensorboard_error"), is_text),
    "to": lambda value: isinstance(value, list) and all(map(is_text, value)),
    "failures": is_count,
    "finished": is_flag,
    "sent": lambda value: isinstance(value, dict),
}


@dataclass
class TrackingStatus:
    """tracking.json: what Comet has of the run, and what went wrong."""

    mode: str = "offline"  # of Comet
    to: list[str] = field(default_factory=lambda: ["comet"])  # empty: not tracked
    tensorboard_error: str = ""  # what keeps the events from being complete
    url: str = ""  # of the experiment at Comet; empty until Comet was reached
    sent: Sent = field(default_factory=Sent)
    failures: int = 0  # over all attempts of the run
    last_error: str = ""
    finished: bool = False  # everything that the run's files hold is at Comet, or in the archive, and in the events

    @classmethod
    def load(cls, run_directory: Path) -> TrackingStatus:
        record = read_json(run_directory / "tracking.json", _TRACKING) or {}
        sent = Sent()
        for name, kind in (("steps", is_count), ("versions", is_text)):
            noted = record.get("sent", {}).get(name)
            if isinstance(noted, dict):
                getattr(sent, name).update(only(noted, dict.fromkeys(noted, kind)))
        known = {name: value for name, value in record.items() if name in cls.__dataclass_fields__}
        return cls(**{**known, "sent": sent})

    def save(self, run_directory: Path) -> None:
        with contextlib.suppress(OSError):  # the run itself reports a full disk; tracking goes on
            replace_file(run_directory / "tracking.json", json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    def failed(self, error: object) -> None:
        self.failures += 1
        self.last_error = str(error)[:500]

    def summary(self, run_directory: Path) -> str:
        """Says in one line what became of the tracking, for the end of a run."""
        command = f"python -m ddp_asr.tracking {run_directory}"
        parts = [self._of_comet(run_directory, command)] if "comet" in self.to else []
        if "tensorboard" in self.to and self.tensorboard_error:
            parts += [f"TensorBoard lacks a part ({self.tensorboard_error}); write it with: {command} --to tensorboard"]
        elif "tensorboard" in self.to:
            parts += [f"look at the curves with: tensorboard --logdir {run_directory}"]
        return "; ".join(parts) or "not tracked"

    def _of_comet(self, run_directory: Path, command: str) -> str:
        if self.mode == "offline" and self.finished:
            text = f"the Comet archive is made; upload it with: comet upload {archive_path(run_directory)}"
        elif self.mode == "offline":
            text = f"the Comet archive is not finished yet; if it stays unfinished, make it with: {command}"
        else:
            steps = self.sent.steps
            text = f"Comet has train steps to {steps['train']} and tests to {steps['test']} {self.url}".rstrip()
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
        values = (*(record.exc_info or ()), *(record.args if isinstance(record.args, tuple) else ()))
        # requests' exceptions are OSErrors. A missing file is one as well, and says nothing about the connection.
        lost = any(isinstance(each, OSError) and not isinstance(each, FileNotFoundError) for each in values)
        if lost or record.levelno >= logging.ERROR:
            self.status.failed(record.getMessage())


def _start_experiment(run_directory: Path, status: TrackingStatus, archive_in: Path | None = None) -> Any:
    """Returns the run's experiment: online, created or continued, or offline where `archive_in` is given.

    comet_ml's log goes to comet/comet.log, and its failures are counted in `status`.
    """
    folder = run_directory / "comet"
    folder.mkdir(exist_ok=True)
    for name, value in {**COMET_SETTINGS, "COMET_LOGGING_FILE": str(folder / "comet.log")}.items():
        os.environ.setdefault(name, value)
    import comet_ml  # after its settings are made

    logger = logging.getLogger("comet_ml")
    if not any(isinstance(handler, _CountFailures) for handler in logger.handlers):
        logger.addHandler(_CountFailures(status))
        if archive_in is None:
            logger.setLevel(logging.DEBUG)
    tracking = read_settings(run_directory).get("tracking") or {}
    return comet_ml.start(
        experiment_key=experiment_key(run_directory),
        project_name=tracking.get("project") or None,
        workspace=tracking.get("workspace") or None,
        online=archive_in is None,
        mode="get_or_create" if archive_in is None else "create",
        # What comet_ml would find out by itself describes this process and not the run.
        experiment_config=comet_ml.ExperimentConfig(
            log_code=False,
            parse_args=False,
            auto_output_logging=False,  # type: ignore[arg-type]  # its type says str, its documentation False
            log_env_details=False,
            log_git_metadata=False,
            log_git_patch=False,
            offline_directory=None if archive_in is None else str(archive_in),
        ),
    )


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


def archive_path(run_directory: Path) -> Path:
    return run_directory / "comet" / f"{experiment_key(run_directory)}.zip"


def write_archive(run_directory: Path, status: TrackingStatus) -> bool:
    """Makes comet/KEY.zip from the run's files; returns False after a failure, which leaves the one before as it is."""
    aside = run_directory / "comet" / ".making"
    shutil.rmtree(aside, ignore_errors=True)  # of a process that was killed: only one at a time works here
    failures = status.failures
    try:
        archive = archive_path(run_directory)
        experiment = _start_experiment(run_directory, status, archive_in=aside)
        for record in _thinned(RunReader(run_directory).unsent(Sent())):
            log(experiment, record)
        experiment.end()
        if status.failures == failures:
            with (aside / archive.name).open("rb") as file:
                os.fsync(file.fileno())
            os.replace(aside / archive.name, archive)
            sync_directory(archive.parent)
    except Exception as error:  # a full disk, or whatever comet_ml raises: the run's own files are complete
        status.failed(f"{type(error).__name__}: {error}")
    shutil.rmtree(aside, ignore_errors=True)
    status.save(run_directory)
    return status.failures == failures


def _thinned(records: list[Record]) -> Iterator[Record]:
    """Leaves out train steps, evenly, where there are more than Comet keeps: comet_ml holds them all in memory."""
    steps = [record for record in records if isinstance(record, Metrics) and record.kind == "train"]
    every = -(-len(steps) // MOST_POINTS) or 1
    kept = {record.step for record in steps[::-1][::every]}  # from the last one backwards
    return (each for each in records if not (isinstance(each, Metrics) and each.kind == "train") or each.step in kept)


# ---- online --------------------------------------------------------------------------------------------------------


class Upload:
    """Sends a run to Comet as its files grow. A failure ends the connection, and the next call makes a new one."""

    def __init__(self, run_directory: Path, status: TrackingStatus) -> None:
        self.run_directory = run_directory
        self.status = status
        # What failed, other than metrics. It is left out until this is emptied, or what Comet refuses each time would
        # keep back the rest.
        self.put_off: list[Record] = []
        self._reader = RunReader(run_directory)
        self._experiment: Any = None

    def advance(self) -> bool:
        """Sends what is new; returns False after a failure, which is counted. It never raises."""
        try:
            if self._experiment is None:
                self._experiment = _start_experiment(self.run_directory, self.status)
                if not self._experiment.alive:
                    raise ConnectionError("Comet did not accept the experiment (see comet/comet.log)")
                self.status.url = str(self._experiment.url)
            unsent = self._reader.unsent(self.status.sent)
            lines = [record for record in unsent if isinstance(record, Metrics)]
            for first in range(0, len(lines), BATCH):
                self._send(lines[first : first + BATCH])
            for record in unsent:
                if not isinstance(record, Metrics) and record not in self.put_off:
                    self.put_off.append(record)
                    self._send([record])
                    self.put_off.remove(record)
            return True
        except Exception as error:  # whatever comet_ml raises: it must not end the process
            self.status.failed(f"{type(error).__name__}: {error}")
            self.close()
            self.status.save(self.run_directory)
            return False

    def _send(self, records: Sequence[Record]) -> None:
        failures = self.status.failures
        for record in records:
            log(self._experiment, record)
        # Twice: comet_ml 3.58.8 passes records through two queues in two threads, and a flush does not see a record
        # that is on its way from one to the other. The second flush starts after each thread has made a full turn.
        sent = self._experiment.flush(timeout=FLUSH_S) and self._experiment.flush(timeout=FLUSH_S)
        if self.status.failures > failures or not sent:
            raise ConnectionError(f"Comet did not take everything: {self.status.last_error}")
        for record in records:
            self.status.sent.add(record)
        self.status.save(self.run_directory)

    def close(self) -> None:
        """Ends the connection. What comet_ml reports meanwhile follows from an earlier failure and is not counted."""
        experiment, self._experiment = self._experiment, None
        failures, last_error = self.status.failures, self.status.last_error
        if experiment is not None:
            with contextlib.suppress(Exception):
                experiment.end()
        self.status.failures, self.status.last_error = failures, last_error
