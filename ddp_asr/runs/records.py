"""A run as plain records for a tracker, read from the run's own files.

    config.yaml, environment.json, metrics.jsonl, samples.jsonl, *.png --RunReader.unsent(sent)--> records
    records --one module for each tracker (comet.py, tensorboard.py)--> the tracker's own calls

A tracker sends the records in the order given and notes in `Sent` what it has taken. A record of a step (`Metrics`,
`Table`) is sent once. Any other record is sent again when its content has changed: a resumed run has a new
environment, an evaluation draws `curves.png` again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from ddp_asr.errors import UserError
from ddp_asr.files import is_number, only, open_input, parse_json_line, read_json, sha256_of
from ddp_asr.runs.directory import LINE
from ddp_asr.settings import BAD_YAML

PLACE = ("kind", "step", "epoch", "time_s")  # fields of a line in metrics.jsonl that say where a value belongs


# ---- records ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metrics:
    """Every number of one line of metrics.jsonl, and `minutes` of wall clock since the run's first line."""

    kind: str  # "train" or "test"
    step: int
    epoch: int | None
    values: dict[str, float]
    time_s: float | None = None


@dataclass(frozen=True)
class Table:
    """The samples of one evaluation."""

    step: int
    columns: list[str]
    rows: list[list[str]]
    kind: str = "samples"


@dataclass(frozen=True)
class Item:
    """Anything that belongs to the run and to no step; a tracker shows the newest version of each name.

    The value is a text for "name", a dict for "parameters" (settings), "environment" and "summary" (results, git
    commit), a list of words for "tags", the path of a file for "asset" and "image", that of a folder for "code".
    """

    role: str
    name: str
    value: Any
    version: str


Record: TypeAlias = Metrics | Table | Item
_MOST_VALUES = 10_000  # of config.yaml
CODE = Item("code", "code", Path(__file__).resolve().parent.parent, "sent once a run")


@dataclass
class Sent:
    """What a tracker has of a run: the last step of each kind, and the version of everything else."""

    steps: dict[str, int] = field(default_factory=lambda: {"train": 0, "test": 0, "samples": 0})
    versions: dict[str, str] = field(default_factory=dict)

    def has(self, record: Record) -> bool:
        if isinstance(record, Item):
            return self.versions.get(record.name) == record.version
        return record.step <= self.steps[record.kind]

    def add(self, record: Record) -> None:
        if isinstance(record, Item):
            self.versions[record.name] = record.version
        else:
            self.steps[record.kind] = max(self.steps[record.kind], record.step)


# ---- from the files to the records -----------------------------------------------------------------------------------


class LineReader:
    """The complete lines of a growing JSONL file; starts again when the file was cut back or replaced.

    A file that is shorter than before shows by its length. One that has grown again since shows by the bytes before
    the position, which are compared.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._tail = b""

    def new(self) -> list[dict[str, Any]]:
        """Returns the objects of the lines that were completed since the last call, without those that have no step."""
        try:
            with open_input(self.path) as file:
                file.seek(self._offset - len(self._tail))
                if file.read(len(self._tail)) != self._tail:
                    self._offset, self._tail = 0, b""
                    file.seek(0)
                data = file.read()
        except FileNotFoundError:
            return []
        data = data[: data.rfind(b"\n") + 1]  # a line that is still being written stays for the next call
        self._offset += len(data)
        self._tail = (self._tail + data)[-256:]
        lines = [only(parse_json_line(text) or {}, LINE) for text in data.splitlines(keepends=True)]
        return [line for line in lines if "step" in line]


class RunReader:
    """Reads a run's files as they grow."""

    def __init__(self, run_directory: Path) -> None:
        self.run_directory = run_directory
        self._metrics = LineReader(run_directory / "metrics.jsonl")
        self._samples = LineReader(run_directory / "samples.jsonl")
        self._waiting: dict[tuple[str, int], Metrics | Table] = {}  # the last reading of each step
        self._wers: dict[int, tuple[float, float]] = {}  # step -> (WER, loss), of every evaluation
        self._began_s: float | None = None
        self._of_file: dict[str, tuple[tuple[int, int], list[Record]]] = {}  # (mtime, size) and what was made of it

    def unsent(self, sent: Sent) -> list[Record]:
        """Returns what a tracker that has `sent` lacks, in the order in which to send it."""
        self._read_lines()
        self._waiting = {place: record for place, record in self._waiting.items() if not sent.has(record)}
        records = [
            _item("name", "name", self.run_directory.resolve().name),
            *self._when_changed("config.yaml", self._of_settings),
            *self._when_changed("environment.json", self._of_environment),
            *self._waiting.values(),
            *self._summary(),
            *self._when_changed("curves.png", lambda path: [_file("image", "curves", path)]),
            *self._when_changed("spectrogram.png", lambda path: [_file("image", "spectrogram", path)]),
            CODE,
        ]
        return [record for record in records if not sent.has(record)]

    def _read_lines(self) -> None:
        for line in self._metrics.new():
            if line.get("kind") in ("train", "test"):
                self._waiting[line["kind"], line["step"]] = self._of_metrics(line)
        for line in self._samples.new():
            columns = ["key", "reference", "hypothesis"]
            samples = line.get("samples")
            samples = [each for each in samples if isinstance(each, dict)] if isinstance(samples, list) else []
            rows = [[str(each.get(name, "")) for name in columns] for each in samples]
            self._waiting["samples", line["step"]] = Table(line["step"], columns, rows)

    def _of_metrics(self, line: dict[str, Any]) -> Metrics:
        values = {name: value for name, value in line.items() if name not in PLACE and is_number(value)}
        if (time_s := line.get("time_s")) is not None:
            self._began_s = time_s if self._began_s is None else self._began_s
            values["minutes"] = (time_s - self._began_s) / 60
        if line["kind"] == "test" and "wer" in values:
            self._wers[line["step"]] = values["wer"], values.get("loss", float("inf"))
        return Metrics(line["kind"], line["step"], line.get("epoch"), values, time_s)

    def _summary(self) -> list[Record]:
        records: list[Record] = []
        if self._wers:
            step = min(self._wers, key=lambda each: (*self._wers[each], each))
            records.append(_item("summary", "best WER", {"best_wer": self._wers[step][0], "best_wer_step": step}))
        if self._began_s is not None:
            began = datetime.fromtimestamp(self._began_s, timezone.utc).isoformat(timespec="seconds")
            records.append(_item("summary", "start", {"started": began}))
        return records

    def _of_settings(self, path: Path) -> list[Record]:
        settings = read_settings(self.run_directory)
        train, tracking = settings.get("train", {}), settings.get("tracking", {})
        of_run = tracking.get("tags")
        tags = [str(tag) for tag in [train.get("precision"), *(of_run if isinstance(of_run, list) else [])] if tag]
        return [
            _item("parameters", "settings", flatten(settings)),
            _item("tags", "tags of the settings", tags),
            _file("asset", path.name, path),
        ]

    def _of_environment(self, path: Path) -> list[Record]:
        environment = read_json(path) or {}
        git = {name: environment[name] for name in ("git_commit", "git_dirty") if environment.get(name) is not None}
        config = re.search(r"--config[ =](\S+)", str(environment.get("command", "")))
        tags = [f"{environment['processes']} processes"] if "processes" in environment else []
        tags += [Path(config[1]).stem] if config else []
        return [
            _item("environment", "environment", flatten(environment)),
            _item("summary", "git", git),
            _item("tags", "tags of the environment", tags),
            _file("asset", path.name, path),
        ]

    def _when_changed(self, name: str, make: Callable[[Path], list[Record]]) -> list[Record]:
        """Returns the records of a file, made anew only when the file has changed: this is asked every second."""
        path = self.run_directory / name
        try:
            stat = path.stat()
            if name not in self._of_file or self._of_file[name][0] != (stat.st_mtime_ns, stat.st_size):
                self._of_file[name] = (stat.st_mtime_ns, stat.st_size), make(path)
        except FileNotFoundError:
            return []
        return self._of_file[name][1]


def _item(role: str, name: str, value: Any) -> Item:
    return Item(role, name, value, hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest())


def _file(role: str, name: str, path: Path) -> Item:
    return Item(role, name, path, sha256_of(path))


def read_settings(run_directory: Path) -> dict[str, Any]:
    """The settings in config.yaml as plain values: they may be those of another version.

    Raises:
        UserError: it is no YAML, or its sections are none.
    """
    path = run_directory / "config.yaml"
    try:
        with open_input(path) as file:
            settings = yaml.safe_load(file.read().decode()) or {}
        values = len(list(itertools.islice(_values(settings), _MOST_VALUES + 1)))
    except BAD_YAML as error:
        raise UserError(f"{path} is no valid YAML: {' '.join(str(error).split())}; mend it by hand") from None
    if not (isinstance(settings, dict) and all(isinstance(section or {}, dict) for section in settings.values())):
        raise UserError(f"{path} must hold sections with settings, each as 'name: value': mend it by hand")
    if values > _MOST_VALUES:
        raise UserError(f"{path} has more than {_MOST_VALUES:,} values, by its aliases perhaps: mend it by hand")
    return {str(name): section or {} for name, section in settings.items()}


def _values(settings: Any) -> Iterator[Any]:
    """What is neither a list nor a mapping, one after the other: aliases make exponentially many of a short text."""
    if isinstance(settings, (dict, list)):
        for value in settings.values() if isinstance(settings, dict) else settings:
            yield from _values(value)
        yield None  # itself, so that empty ones count
    else:
        yield settings


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns `{"section.key": value}`; lists become JSON text."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + str(key)] = json.dumps(value) if isinstance(value, list) else value
    return flat
