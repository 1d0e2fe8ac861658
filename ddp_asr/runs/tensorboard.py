"""A run's records as events for TensorBoard, in RUN/tensorboard.

    RunReader --records--> TensorBoard.advance --appended--> RUN/tensorboard/events.out.tfevents.*

Each step once: every attempt makes the file anew from the run's files, and appends to it while the run trains. A resume
has cut metrics.jsonl back to its checkpoint, so a step that is trained again replaces the one before.

The classes of events and the writer of records are the package's own, which its documentation does not list;
`torch.utils.tensorboard` uses the same ones, and would import torch. Tried with tensorboard 2.21.0; where a later
release moves them, `advance` reports an ImportError, and the run goes on.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from ddp_asr.files import sync, sync_directory
from ddp_asr.runs.records import Item, Metrics, Record, RunReader, Sent, Table

FOLDER = "tensorboard"  # in a run directory
PAUSE_S = 30.0  # after a failure
_NAME = "events.out.tfevents.{}.ddp_asr"  # TensorBoard reads what has tfevents in its name


class TensorBoard:
    """The events of one run; one process at a time writes them."""

    def __init__(self, run_directory: Path) -> None:
        self.run_directory = run_directory
        self.folder = run_directory / FOLDER
        self.error = ""  # of the newest try
        self._sent = Sent()
        self._wall_s = 0.0  # Unix time of the newest line of metrics
        self._file: Any = None
        self._again_s = 0.0

    def advance(self) -> None:
        """Writes what is new, at first everything. It never raises: an error is kept in `error` and tried again."""
        if time.monotonic() < self._again_s:
            return
        try:
            if self._file is None:
                self._begin()
            else:
                self._append()
            self.error = ""
        except Exception as error:  # a full disk, or whatever tensorboard raises: it must not end the process
            self.error = f"{type(error).__name__}: {error}"[:500]
            self._again_s = time.monotonic() + PAUSE_S
            self._let_go()

    def close(self) -> None:
        """Writes the rest; `error` is empty when the events hold the whole run."""
        self._again_s = 0.0
        self.advance()
        self._let_go()

    def _let_go(self) -> None:
        file, self._file = self._file, None
        try:
            if file is not None:
                sync(file)
                file.close()
        except OSError as error:
            self.error = self.error or f"{type(error).__name__}: {error}"[:500]

    def _begin(self) -> None:
        """Makes the file anew under another name, and removes the one before."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.folder.mkdir(exist_ok=True)
        aside, path = self.folder / ".making", self.folder / _NAME.format(time.time_ns())
        self._file = aside.open("wb")
        self._writer = RecordWriter(self._file)
        self._reader, self._sent, self._wall_s = RunReader(self.run_directory), Sent(), 0.0
        self._writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        self._append()
        os.replace(aside, path)
        for other in self.folder.glob(_NAME.format("*")):
            if other != path:
                other.unlink()
        sync_directory(self.folder)

    def _append(self) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        for record in self._reader.unsent(self._sent):
            if isinstance(record, Metrics) and record.time_s is not None:
                self._wall_s = record.time_s
            step = 0 if isinstance(record, Item) else record.step
            for summary in _summaries(record, self.run_directory.resolve().name):
                event = Event(wall_time=self._wall_s or time.time(), step=step, summary=summary)
                self._writer.write(event.SerializeToString())
            self._sent.add(record)
        self._file.flush()


def _summaries(record: Record, run: str) -> list[Any]:
    """What a record is for TensorBoard; environment, pictures and code are left to the run directory."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams.summary_v2 import hparams_pb

    match record:
        case Metrics(kind, _, _, values):
            shown = {name: value for name, value in values.items() if name != "minutes"}  # events have a time
            return [
                Summary(value=[Summary.Value(tag=f"{kind}/{name}", simple_value=shown[name]) for name in shown]),
            ]
        case Table(_, columns, rows):
            return [_text("samples", columns, rows)]
        case Item("parameters", _, values):
            plain = {
                name: value if isinstance(value, bool | int | float) else str(value) for name, value in values.items()
            }
            rows = [[name, str(value)] for name, value in values.items()]
            return [hparams_pb(plain, trial_id=run), _text("settings", ["setting", "value"], rows)]
    return []


def _text(tag: str, columns: list[str], rows: list[list[str]]) -> Any:
    """A table in Markdown, for TensorBoard's page of texts."""
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto

    cells = [columns, ["---"] * len(columns), *rows]
    lines = ["| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in row) + " |" for row in cells]
    text = "\n".join(lines).encode(errors="backslashreplace")
    tensor = TensorProto(
        dtype="DT_STRING", string_val=[text], tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)])
    )
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    return Summary(value=[Summary.Value(tag=tag, tensor=tensor, metadata=metadata)])
