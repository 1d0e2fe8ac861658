"""Comet, as a mirror of a run's own files: a reader of them, in a process of its own, that training never waits for.

    run directory --metrics.jsonl, samples.jsonl, config.yaml ...--> follower --online--> Comet
                                                                              --offline--> comet/KEY.zip

Rank 0 starts the follower (`start`) and tells it when the run ends (`Follower.close`); it also ends by itself, after
sending what is left, once its parent is gone. Whatever Comet does, late answers, errors or none at all, happens there
and is counted in `tracking.json`; the run's files stand on disk first and lack nothing.

*One experiment.* The key is made once and kept in `comet.json`, so every attempt of a run continues the same one.

*Each step once.* Metrics go out in batches that Comet has to acknowledge; `tracking.json` then remembers the last step
of each kind. A resumed run trains the steps after its checkpoint again, to the same values, so those that Comet has
already are passed over. Only an answer lost after Comet took the batch can send a batch again, with the same values.

*The archive is made anew.* `comet_ml` writes its offline archive when the experiment ends, so a killed run has none.
Here it is always made from the run's files, the moments of the steps included: at the end, on resume, or on demand.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import fcntl
import functools
import json
import logging
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddp_asr.errors import UserError, run_entry_point

MODES = ("auto", "online", "offline", "off")
TRAIN_METRICS = ("loss", "learning_rate", "gradient_norm", "audio_s_per_s", "data_wait", "padding", "skipped")
TEST_METRICS = ("loss", "wer", "cer")

NO_KEY = "online tracking needs COMET_API_KEY in the environment; set it, or track offline"

POLL_S = 1.0  # between two looks at the files
BACK_OFF_S = (1.0, 60.0)  # first and longest pause after a failure; it doubles
CLOSE_S = 20.0  # from the end of the run to the end of an online follower, whatever Comet does
ARCHIVE_S = 900.0  # the longest that an archive may take: nothing in it waits for a network (0.4 ms a step measured)
BATCH_LINES = 200  # of metrics.jsonl in one request, seven values each
FLUSH_S = 10  # the longest that metrics wait while comet_ml sends tables, images and code
MOST_FAILURES = 4  # in a row, until an online mirror on demand gives up
TRIES = 3  # for a table, an image or the code, each handed to comet_ml's own sender, which repeats as well

# comet_ml reads these when it is imported; what the user has set himself wins. Its retries are off, so that a failure
# is seen, counted and repeated here. A minute for an answer, since a batch whose answer is lost has to go out again.
# Its own patience at the end is an hour for messages and three for files.
COMET_SETTINGS = {
    "COMET_DISABLE_AUTO_LOGGING": "1",
    "COMET_LOGGING_CONSOLE": "CRITICAL",
    "COMET_DISPLAY_SUMMARY_LEVEL": "0",
    "COMET_DISABLE_ANNOUNCEMENT": "1",
    "COMET_ERROR_TRACKING_ENABLE": "0",
    "COMET_INTERNAL_REPORTING": "0",
    "COMET_TIMEOUT_HTTP": "60",
    "COMET_TIMEOUT_CLEANING": "20",
    "COMET_TIMEOUT_UPLOAD": "20",
    "COMET_TIMEOUT_FILE_UPLOAD": "20",
    "COMET_HTTP_SESSION_RETRY_TOTAL": "0",
    "COMET_GET_OR_ADD_EXPERIMENT_RETRY_TOTAL": "0",
    # Without a connection comet_ml would leave an archive of its own, of this attempt's last messages only.
    "COMET_FALLBACK_STREAMER_FALLBACK_TO_OFFLINE_MIN_BACKEND_VERSION": "9999.0.0",
}


# ---- the run's files -----------------------------------------------------------------------------------------------


def resolve_mode(mode: str) -> str:
    """Returns online, offline or off; auto is online where an API key is set."""
    if mode not in MODES:
        raise UserError(f"tracking.mode is {mode!r}; it must be one of {', '.join(MODES)}")
    if mode == "auto":
        return "online" if os.environ.get("COMET_API_KEY") else "offline"
    return mode


def experiment_key(run_directory: Path, known: str | None = None) -> str:
    """Returns the run's one experiment key, made on first use (or `known`, a checkpoint's) and kept in comet.json."""
    path = run_directory / "comet.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(path.read_text())["experiment_key"])
    key = known or uuid.uuid4().hex  # Comet wants 32 to 50 letters and digits
    _write_json(path, {"experiment_key": key})
    return key


class LineReader:
    """The complete lines of a growing JSONL file; begins again when the file was cut back or replaced.

    A cut is seen by the length, and one that has grown over since by the bytes before the position.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._tail = b""

    def new(self) -> list[dict[str, Any]]:
        """Returns the objects of all lines that were completed since the last call."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset - len(self._tail))
                if file.read(len(self._tail)) != self._tail:
                    self._offset, self._tail = 0, b""
                    file.seek(0)
                data = file.read()
        except FileNotFoundError:
            return []
        data = data[: data.rfind(b"\n") + 1]  # a line still being written stays for the next call
        self._offset += len(data)
        self._tail = (self._tail + data)[-256:]
        return [line for line in map(_parse, data.splitlines()) if line is not None]


def _parse(line: bytes) -> dict[str, Any] | None:
    """Returns the object of one line, None for a line that a crash left torn."""
    with contextlib.suppress(ValueError):
        value = json.loads(line)
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            return value
    return None


def _read_json(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(path.read_text())
        if isinstance(value, dict):
            return value
    return {}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(aside, path)


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns `{"section.key": value}`; lists become text, which is what Comet would make of them."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + str(key)] = json.dumps(value) if isinstance(value, list) else value
    return flat


def _settings(run_directory: Path) -> dict[str, Any]:
    import yaml

    with contextlib.suppress(OSError, yaml.YAMLError):
        value = yaml.safe_load((run_directory / "config.yaml").read_text())
        if isinstance(value, dict):
            return value
    return {}


# ---- what Comet has, and what went wrong ---------------------------------------------------------------------------


@dataclass
class Report:
    """tracking.json: what Comet has of the run, and what went wrong on the way."""

    mode: str = "offline"
    experiment_key: str = ""
    created: bool = False  # the experiment exists at Comet
    sent: dict[str, int] = field(default_factory=lambda: {"train": 0, "test": 0, "samples": 0})  # last step of each
    sent_once: list[str] = field(default_factory=list)  # environment, code, spectrogram
    lost: list[str] = field(default_factory=list)  # what Comet refused each time it was offered
    failures: int = 0  # over all attempts of the run
    last_error: str = ""
    finished: bool = False  # everything that the run's files hold is at Comet, or in the archive
    archive: str = ""
    url: str = ""

    @classmethod
    def load(cls, run_directory: Path) -> Report:
        known = {each.name for each in dataclasses.fields(cls)}
        return cls(
            **{name: value for name, value in _read_json(run_directory / "tracking.json").items() if name in known}
        )

    def save(self, run_directory: Path) -> None:
        with contextlib.suppress(OSError):  # a full disk is the run's business; tracking goes on
            _write_json(run_directory / "tracking.json", dataclasses.asdict(self))

    def failed(self, error: object) -> None:
        self.failures += 1
        self.last_error = str(error)[:500]


class _CountErrors(logging.Handler):
    """comet_ml logs what it could not deliver instead of raising it: here it is counted."""

    def __init__(self, report: Report) -> None:
        super().__init__(logging.ERROR)
        self.report = report

    def emit(self, record: logging.LogRecord) -> None:
        self.report.failed(record.getMessage())


def _import_comet(run_directory: Path, report: Report) -> Any:
    """Returns comet_ml, imported only now that its settings stand, its talk in comet/comet.log, its errors counted."""
    folder = run_directory / "comet"
    folder.mkdir(exist_ok=True)
    for name, value in {**COMET_SETTINGS, "COMET_LOGGING_FILE": str(folder / "comet.log")}.items():
        os.environ.setdefault(name, value)
    import comet_ml

    logger = logging.getLogger("comet_ml")
    if not any(isinstance(handler, _CountErrors) for handler in logger.handlers):
        logger.addHandler(_CountErrors(report))
    return comet_ml


# What comet_ml would find out by itself is this process's surroundings, not the run's: all of it is off.
NOTHING_OF_ITS_OWN = dict.fromkeys(
    (
        *("log_code", "log_graph", "auto_param_logging", "auto_metric_logging", "parse_args", "auto_output_logging"),
        *("log_env_details", "log_git_metadata", "log_git_patch", "auto_log_co2"),
    ),
    False,
)


def _comet_project(run_directory: Path) -> dict[str, Any]:
    tracking = _settings(run_directory).get("tracking") or {}
    return {"project_name": tracking.get("project") or None, "workspace": tracking.get("workspace") or None}


# ---- what an experiment holds, online and offline alike ------------------------------------------------------------


def metric_messages(lines: Sequence[dict[str, Any]]) -> Iterator[Any]:
    """Yields one comet_ml message a value, each with its context and the moment at which it was measured."""
    from comet_ml.messages import MetricMessage

    for line in lines:
        kind = line["kind"]
        for name in TRAIN_METRICS if kind == "train" else TEST_METRICS:
            if isinstance(line.get(name), (int, float)):
                message = MetricMessage(context=kind, timestamp=int(float(line.get("time_s", 0)) * 1000) or None)
                message.set_metric(name, line[name], step=line["step"], epoch=line.get("epoch"))
                yield message


def log_settings(experiment: Any, run_directory: Path) -> None:
    experiment.log_parameters(flatten(_settings(run_directory)))
    experiment.set_name(run_directory.resolve().name)


def log_environment(experiment: Any, run_directory: Path) -> None:
    for key, value in flatten(_read_json(run_directory / "environment.json")).items():
        experiment.log_system_info(key, value)
    for name in ("environment.json", "config.yaml"):
        if (run_directory / name).exists():
            experiment.log_asset(str(run_directory / name), file_name=name)


def log_code(experiment: Any, run_directory: Path) -> None:
    experiment.log_code(folder=str(Path(__file__).parent))


def log_spectrogram(experiment: Any, run_directory: Path) -> None:
    experiment.log_image(str(run_directory / "spectrogram.png"), name="spectrogram before and after SpecAugment")


def log_samples(experiment: Any, *lines: dict[str, Any]) -> None:
    columns = ["key", "reference", "hypothesis"]
    with experiment.context_manager("test"):
        for line in lines:
            rows = [[each.get(name, "") for name in columns] for each in line.get("samples", [])]
            experiment.set_step(line["step"])
            experiment.log_table(f"samples-{line['step']:08d}.csv", rows, headers=columns)


ONCE: dict[str, Callable[[Any, Path], None]] = {
    "environment": log_environment,
    "code": log_code,
    "spectrogram": log_spectrogram,
}


def _ready(name: str, run_directory: Path) -> bool:
    """True when the file that this part is made from has been written."""
    needs = {"environment": "environment.json", "spectrogram": "spectrogram.png"}.get(name)
    return needs is None or (run_directory / needs).exists()


# ---- offline -------------------------------------------------------------------------------------------------------


def each_step_once(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the lines in order, the last one of each (kind, step): a run that was cut back may repeat some."""
    return list({(line.get("kind"), line["step"]): line for line in lines}.values())


def write_archive(run_directory: Path, report: Report) -> Path:
    """Makes comet/KEY.zip from the run's files, for `comet upload`; replaces the one before only when it is whole."""
    comet_ml = _import_comet(run_directory, report)
    key = experiment_key(run_directory)
    lines = each_step_once(LineReader(run_directory / "metrics.jsonl").new())
    lines = [line for line in lines if line.get("kind") in ("train", "test")]
    archive = run_directory / "comet" / f"{key}.zip"
    aside = archive.with_name(f".making-{os.getpid()}")
    for left in archive.parent.glob(".making-*"):  # by a process that was killed: only one at a time works here
        shutil.rmtree(left, ignore_errors=True)
    try:
        experiment = comet_ml.OfflineExperiment(
            experiment_key=key, offline_directory=str(aside), **_comet_project(run_directory), **NOTHING_OF_ITS_OWN
        )
        log_settings(experiment, run_directory)
        for name, log in ONCE.items():
            if _ready(name, run_directory):
                log(experiment, run_directory)
        values = 0
        for values, message in enumerate(metric_messages(lines), start=1):
            experiment._enqueue_message(message)  # log_metric would stamp every step with this moment
            while values % 10_000 == 0 and experiment.streamer.messages.qsize() > 10_000:
                time.sleep(0.01)  # its end gives what still waits in memory a minute, and drops the rest
        log_samples(experiment, *each_step_once(LineReader(run_directory / "samples.jsonl").new()))
        experiment.end()
        times = [int(line["time_s"] * 1000) for line in (lines[:1] + lines[-1:]) if "time_s" in line]
        os.replace(_finish_archive(aside / archive.name, values, times), archive)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    report.archive = str(archive.relative_to(run_directory))
    return archive


def _finish_archive(made: Path, values: int, times_ms: Sequence[int]) -> Path:
    """Returns a copy of comet_ml's archive: checked for all values, compressed, dated as the run and not as today."""
    finished = made.with_suffix(".finished")
    with zipfile.ZipFile(made) as source, zipfile.ZipFile(finished, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            data = source.read(name)
            if name == "experiment.json" and times_ms:
                dates = {"start_time": times_ms[0], "stop_time": times_ms[-1]}
                data = json.dumps({**json.loads(data), **dates}).encode()
            if name == "messages.json":
                # Beside the steps' values there is one of comet_ml's own, how long this process took.
                found = sum(b'"metric_msg"' in line and b'"process duration"' not in line for line in data.splitlines())
                if found != values:
                    raise OSError(f"comet_ml wrote {found} of {values} values into its archive")
            target.writestr(name, data)
    with finished.open("rb") as file:
        os.fsync(file.fileno())
    return finished


# ---- online --------------------------------------------------------------------------------------------------------


class Mirror:
    """Keeps Comet at what the run's files hold. `advance` sends what is new and answers whether anything is left."""

    def __init__(self, run_directory: Path, report: Report) -> None:
        self.run_directory = run_directory
        self.report = report
        self.metrics = LineReader(run_directory / "metrics.jsonl")
        self.samples = LineReader(run_directory / "samples.jsonl")
        self.unsent: list[dict[str, Any]] = []
        self.unsent_samples: list[dict[str, Any]] = []
        self.tries: Counter[str] = Counter()
        self.experiment: Any = None
        self.failures_in_a_row = 0
        self._tables_to = 0  # the step of the last table that comet_ml is sending
        self._handed_over: dict[str, int] = {}  # what comet_ml is sending, and the failures until then
        self._not_before = 0.0  # monotonic: no attempt until then, after a failure
        self._pause_s = BACK_OFF_S[0]

    def advance(self) -> bool:
        """Returns True when Comet has everything. Never raises: what goes wrong is counted and tried again later."""
        self._read()
        if time.monotonic() < self._not_before:
            return False
        before, done = copy.deepcopy(self.report), False
        try:
            if self.experiment is None:
                self._connect()
            self._send_metrics()
            done = self._send_the_rest()
            self._pause_s, self.failures_in_a_row = BACK_OFF_S[0], 0
        except Exception as error:  # whatever comet_ml raises: counted, told at the end, and tried again later
            self.failures_in_a_row += 1
            self.report.failed(f"{type(error).__name__}: {error}")
            self._not_before = time.monotonic() + self._pause_s
            self._pause_s = min(2 * self._pause_s, BACK_OFF_S[1])
        if self.report != before:
            self.report.save(self.run_directory)
        return done

    def hurry(self) -> None:
        """The run has ended: from now on try again soon."""
        self._not_before, self._pause_s = 0.0, BACK_OFF_S[0]

    def _read(self) -> None:
        sent = self.report.sent
        lines = [line for line in self.metrics.new() if line.get("kind") in ("train", "test")]
        self.unsent = [line for line in each_step_once(self.unsent + lines) if line["step"] > sent[line["kind"]]]
        samples = each_step_once(self.unsent_samples + self.samples.new())
        self.unsent_samples = [line for line in samples if line["step"] > sent["samples"]]

    def _connect(self) -> None:
        comet_ml = _import_comet(self.run_directory, self.report)
        arguments = {"experiment_key": experiment_key(self.run_directory), **NOTHING_OF_ITS_OWN}
        makers = [comet_ml.Experiment, comet_ml.ExistingExperiment]
        # The record that it was created can be lost with a killed follower: whichever of the two fails, try the other.
        for make in reversed(makers) if self.report.created else makers:
            experiment = make(**arguments, **_comet_project(self.run_directory))
            if experiment.alive:
                break
        else:
            raise ConnectionError("Comet did not take up the experiment (see comet/comet.log)")
        self.experiment = experiment
        self.report.created, self.report.url = True, str(experiment.url or "")
        self.report.save(self.run_directory)
        log_settings(experiment, self.run_directory)

    def _send_metrics(self) -> None:
        """Sends in the order of the file, a batch at a time; a batch counts once Comet has acknowledged it."""
        from comet_ml.batch_utils import MessageBatchItem

        while self.unsent:
            batch = self.unsent[:BATCH_LINES]
            items = [MessageBatchItem(message) for message in metric_messages(batch)]
            if items:
                self.experiment.connection.log_metrics_batch(items)
            self.unsent = self.unsent[len(batch) :]
            for line in batch:
                self.report.sent[line["kind"]] = max(self.report.sent[line["kind"]], line["step"])
            self.report.save(self.run_directory)

    def _send_the_rest(self) -> bool:
        """Returns True when nothing of it is left."""
        for name, log in ONCE.items():
            if name not in self.report.sent_once and _ready(name, self.run_directory):
                if not self._hand_over(name, functools.partial(log, self.experiment, self.run_directory)):
                    return False
                self.report.sent_once.append(name)
        if self.unsent_samples:
            self._tables_to = self._tables_to or self.unsent_samples[-1]["step"]
            tables = [line for line in self.unsent_samples if line["step"] <= self._tables_to]
            log_tables = functools.partial(log_samples, self.experiment, *tables)
            if not self._hand_over(f"samples to step {self._tables_to}", log_tables):
                return False
            self.report.sent["samples"], self._tables_to = self._tables_to, 0
            self.unsent_samples = self.unsent_samples[len(tables) :]
        return not self.unsent_samples

    def _hand_over(self, name: str, log: Callable[[], object]) -> bool:
        """Gives something to comet_ml's own sender; True once that is through with it. Raises when it was refused."""
        if name not in self._handed_over:
            self._handed_over[name] = self.report.failures
            log()
        if not self.experiment.flush(timeout=FLUSH_S):
            return False
        if self.report.failures > self._handed_over.pop(name):
            self.tries[name] += 1
            if self.tries[name] < TRIES:
                raise ConnectionError(f"Comet did not take {name}: {self.report.last_error}")
            self.report.lost.append(name)
        return True

    def close(self) -> None:
        """Ends the experiment; what goes wrong then stands in comet/comet.log, and errors are counted as any."""
        if self.experiment is not None:
            with contextlib.suppress(Exception):
                self.experiment.end()


def summary(run_directory: Path, report: Report) -> str:
    """Says in one line what became of the tracking, for the end of a run."""
    command = f"python -m ddp_asr.tracking {run_directory}"
    if report.mode == "off":
        text = "not tracked"
    elif report.mode == "offline" and report.finished:
        text = f"the Comet archive is made; upload it with: comet upload {run_directory / report.archive}"
    elif report.mode == "offline":
        text = f"the Comet archive is not finished yet; should it never be, make it with: {command}"
    else:
        text = (
            f"Comet has train steps to {report.sent['train']} and tests to {report.sent['test']} {report.url}".rstrip()
        )
        text += f"; it refused {', '.join(report.lost)}" if report.lost else ""
        text += "" if report.finished else f"; send the rest with: {command} --mode online"
    return text + (f" ({report.failures} failures, the last: {report.last_error})" if report.failures else "")


# ---- the follower --------------------------------------------------------------------------------------------------


def _has_ended(run_directory: Path, parent: int | None, timeout_s: float) -> bool:
    """Waits up to `timeout_s` for the run's end: its parent's word or death, or else what status.json says."""
    if parent is None:
        time.sleep(timeout_s)
        return _read_json(run_directory / "status.json").get("state") not in (None, "running")
    # The parent writes a word or, dying, closes the pipe. Its own forked children may hold the pipe open for a while
    # longer, hence the second question.
    readable, _, _ = select.select([sys.stdin], [], [], timeout_s)
    return bool(readable) or os.getppid() != parent


def _watch(run_directory: Path, parent: int | None, at_end: Callable[[], None]) -> threading.Event:
    """Returns an event that is set when the run ends, and calls `at_end` then, be the main thread stuck or not."""
    ended = threading.Event()

    def watch() -> None:
        while not _has_ended(run_directory, parent, POLL_S):
            pass
        ended.set()
        at_end()

    threading.Thread(target=watch, daemon=True).start()
    return ended


@contextlib.contextmanager
def _alone(run_directory: Path, wait_s: float) -> Iterator[None]:
    """Lets one follower at a time work on a run: the one of the attempt before may still be sending its last steps."""
    with (run_directory / ".tracking.lock").open("w") as file:
        deadline = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{run_directory} is being tracked by another process for {wait_s:.0f} s; wait for its end"
                    ) from None
                time.sleep(0.1)
            except OSError:
                break  # a file system without locks: better two followers than none
        yield


def _end_after(close_s: float, run_directory: Path, report: Report) -> None:
    """Ends this process after `close_s`, whatever comet_ml's threads wait for, with the failure on record.

    Where Comet was never reached, what remains is the archive: made by a fresh process image, free of those threads.
    """

    def end() -> None:
        if report.finished:
            os._exit(0)
        late = f"not everything was taken within {close_s:g} s of the run's end"
        report.failed("; ".join(filter(None, (late, report.last_error))))
        report.save(run_directory)
        print(summary(run_directory, report), flush=True)
        if report.mode == "online" and not report.created:
            os.execv(
                sys.executable, [sys.executable, "-m", "ddp_asr.tracking", str(run_directory), "--mode", "offline"]
            )
        os._exit(1)

    timer = threading.Timer(close_s, end)
    timer.daemon = True
    timer.start()


def track(
    run_directory: Path, mode: str, *, follow: bool = False, parent: int | None = None, close_s: float = CLOSE_S
) -> Report:
    """Mirrors the run to Comet or into its archive; with `follow` until the run ends, otherwise as it stands."""
    with _alone(run_directory, wait_s=CLOSE_S + 10 if parent is None else ARCHIVE_S):
        report = Report.load(run_directory)
        report.mode, report.experiment_key, report.finished = mode, experiment_key(run_directory), False
        report.save(run_directory)
        ended = None
        if not follow or mode == "offline":
            close_s = ARCHIVE_S  # nobody waits for the one, nothing in the other waits for a network
        end_after = functools.partial(_end_after, close_s, run_directory, report)
        if follow:
            ended = _watch(run_directory, parent, end_after)
        else:
            end_after()
        if mode == "online":  # the follower has its deadline, on demand somebody waits
            advance = _online(run_directory, report, math.inf if follow else MOST_FAILURES)
        else:
            advance = _offline(run_directory, report)
        try:
            while ended is not None and not ended.wait(POLL_S):
                advance(False)
        except KeyboardInterrupt:
            end_after()
        advance(True)
        return report


def _offline(run_directory: Path, report: Report) -> Callable[[bool], None]:
    """Returns what is to be done each moment, and with True at the end."""
    killed = (run_directory / "metrics.jsonl").exists()  # and resumed: what was killed gets its archive now

    def advance(at_end: bool) -> None:
        nonlocal killed
        if killed or at_end:
            killed = False
            try:
                write_archive(run_directory, report)
                report.finished = at_end
            except Exception as error:  # a full disk, or whatever comet_ml raises: the run's files lack nothing
                report.failed(f"{type(error).__name__}: {error}")
            report.save(run_directory)

    return advance


def _online(run_directory: Path, report: Report, most_failures: float) -> Callable[[bool], None]:
    """Returns what is to be done each moment, and with True at the end."""
    mirror = Mirror(run_directory, report)

    def advance(at_end: bool) -> None:
        if not at_end:
            mirror.advance()
            return
        mirror.hurry()
        while not report.finished and mirror.failures_in_a_row < most_failures:
            report.finished = mirror.advance()
            time.sleep(0 if report.finished else 0.1)
        report.save(run_directory)
        mirror.close()

    return advance


# ---- the trainer's side --------------------------------------------------------------------------------------------


class Follower:
    """The follower as its parent sees it. Nothing here raises or waits, except `close` for as long as it is told to."""

    def __init__(
        self, run_directory: Path, mode: str, process: subprocess.Popen[bytes] | None = None, error: str = ""
    ) -> None:
        self.run_directory = run_directory
        self.mode = mode
        self.process = process
        self.error = error

    def close(self, timeout_s: float = CLOSE_S + 10) -> Report:
        """Says that the run has ended, waits up to `timeout_s`, and returns what became of it (see `summary`).

        A follower that needs longer goes on by itself until its own deadline.
        """
        report = Report(mode=self.mode)
        if self.process is not None:
            with contextlib.suppress(OSError, ValueError):
                assert self.process.stdin is not None
                self.process.stdin.write(b"end\n")
                self.process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout_s)
            report = Report.load(self.run_directory)
            if self.process.returncode and not report.finished and not report.failures:
                report.failed(f"the follower ended with {self.process.returncode}: see tracking.log in the run")
        if self.error:
            report.failed(self.error)
        return report


def start(run_directory: Path, mode: str, *, close_s: float = CLOSE_S) -> Follower:
    """Starts the follower of a run and returns at once; what stops it from starting is told by `close`, not raised.

    Raises UserError for an unknown mode only.
    """
    run_directory = Path(run_directory)
    mode, error = resolve_mode(mode), ""
    if mode == "off":
        return Follower(run_directory, mode)
    if mode == "online" and not os.environ.get("COMET_API_KEY"):
        mode, error = "offline", NO_KEY
    command = [sys.executable, "-m", "ddp_asr.tracking", str(run_directory.resolve()), "--follow", "--mode", mode]
    root = str(Path(__file__).resolve().parent.parent)
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
        return Follower(run_directory, mode, error=f"the follower could not be started: {reason}")
    return Follower(run_directory, mode, process, error)


# ---- the command ---------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ddp_asr.tracking",
        description="Mirrors a run to Comet, or makes its offline archive anew, from the run's own files.",
        epilog="examples:\n"
        "  python -m ddp_asr.tracking runs/an4                 the archive of a run, a killed one too\n"
        "  comet upload runs/an4/comet/*.zip                   and its upload\n"
        "  python -m ddp_asr.tracking runs/an4 --mode online   send what Comet does not have yet",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="run directory")
    parser.add_argument("--follow", action="store_true", help="go on until the run ends")
    parser.add_argument(
        "--mode",
        choices=("auto", "online", "offline"),
        default="offline",
        help="auto: online when COMET_API_KEY is set",
    )
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)  # the trainer that started this process
    parser.add_argument("--close-s", type=float, default=CLOSE_S, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    run_directory: Path = arguments.run
    if not (run_directory / "config.yaml").exists():
        raise UserError(f"{run_directory} is not a run: it has no config.yaml; give a directory such as runs/an4")
    mode = resolve_mode(arguments.mode)
    if mode == "online" and not os.environ.get("COMET_API_KEY"):
        raise UserError(NO_KEY)
    if arguments.parent is not None:
        _stay_out_of_the_way()
    report = track(run_directory, mode, follow=arguments.follow, parent=arguments.parent, close_s=arguments.close_s)
    print(summary(run_directory, report), flush=True)
    return 0 if report.finished else 1


def _stay_out_of_the_way() -> None:
    """A scheduler signals every process of a job: this one ends with its parent and gives way to it until then."""
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(each, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.nice(10)


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
