"""The files of a run that rank 0 writes beside its checkpoints, and the only way it writes them: under the lease.

    runs/NAME/
        config.yaml        every setting, of the newest attempt
        metrics.jsonl      a train line a step, a test line an evaluation (fields below)
        samples.jsonl      references and hypotheses of each evaluation
        left_out.jsonl     utterances that the plan leaves out, with the reason
        environment.json   versions, hardware and git commit of the newest attempt
        status.json        how the run stands, for launchers
        spectrogram.png, curves.png, checkpoints/, best.pt, lease.json, comet.json ...

Lines are flushed one by one, so a killed run has lost at most the line it was writing; `cut_after` removes a torn
line and everything beyond the step that a resumed run continues from.

Fields of metrics.jsonl. Both kinds: `kind` ("train" or "test"), `step` and `epoch` (counted from 1 since the start of
the run), `loss`, `time_s` (Unix time). A train line: `learning_rate`, `gradient_norm`, `audio_s_per_s` (all ranks),
`data_wait` and `padding` (shares), `skipped` (steps so far), `gpu_memory_gb` (null without a GPU) and `host_memory_gb`,
the most that rank 0 has held since the attempt began (10^9 bytes). A test line: `wer` and `cer` (shares).
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from ddp_asr.errors import UserError
from ddp_asr.runs.lease import Lease

_GROWING = ("metrics.jsonl", "samples.jsonl")


class RunDirectory:
    """Writes a run's files; every write asks the lease first and raises its LeaseLost."""

    def __init__(self, path: Path, lease: Lease, job_id: str | None, attempt: int) -> None:
        self.path = path
        self._lease = lease
        self._job_id, self._attempt = job_id, attempt
        self._files: dict[str, IO[str]] = {}

    def cut_after(self, step: int, evaluated_step: int) -> None:
        """Keeps of the metrics and samples only what a checkpoint at `step` knows of."""

        def known(line: dict[str, Any]) -> bool:
            return line["step"] <= (step if line.get("kind") == "train" else evaluated_step)

        for name in _GROWING:
            path = self.path / name
            kept = [json.dumps(line) + "\n" for line in read_lines(path) if known(line)]
            if path.exists():
                self.write(name, "".join(kept))

    def append(self, name: str, line: dict[str, Any]) -> None:
        """Adds a line to a growing file."""
        self._lease.check()
        with _naming_the_file(self.path / name):
            file = self._files.get(name)
            if file is None:
                file = self._files[name] = (self.path / name).open("a", encoding="utf8")
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()

    def sync(self) -> None:
        """Returns when the growing files are on the disk; called before a checkpoint that counts on their lines."""
        for name, file in self._files.items():
            with _naming_the_file(self.path / name):
                os.fsync(file.fileno())

    def write(self, name: str, text: str) -> None:
        """Replaces a whole file, at once."""
        self._lease.check()
        aside = self.path / f".{name}.tmp"
        with _naming_the_file(self.path / name):
            aside.write_text(text, encoding="utf8")
            self._lease.check()
            aside.replace(self.path / name)

    def produce(self, name: str, make: Callable[[], object]) -> None:
        """Runs `make`, which writes and replaces the file `name` itself."""
        self._lease.check()
        with _naming_the_file(self.path / name):
            make()

    def status(
        self,
        state: str,
        reason: str,
        *,
        retry: bool,
        step: int,
        epoch: int,
        total_steps: int | None = None,
        best_wer: float | None = None,
        checkpoint_saved: bool | None = None,
    ) -> None:
        """Says in status.json how the run stands: running, stopped, done or failed.

        `checkpoint_saved` is whether the run ever had a complete file in checkpoints/; None means unknown.
        """
        record = {
            "state": state,
            "reason": reason,
            "retry": retry,
            "step": step,
            "epoch": epoch,
            "total_steps": total_steps,
            "best_wer": best_wer,
            "checkpoint_saved": checkpoint_saved,
            "attempt": self._attempt,
            "job_id": self._job_id,
            "host": socket.gethostname(),
            "time_s": time.time(),
        }
        self.write("status.json", json.dumps(record, indent=1) + "\n")

    def refuse(self, former: dict[str, Any], reason: str) -> None:
        """Adds to `former`, the status of the attempt before, that this attempt was refused and changed nothing."""
        record = former | {"refused": reason, "attempt": self._attempt, "job_id": self._job_id}
        self.write("status.json", json.dumps(record, indent=1) + "\n")

    def close(self) -> None:
        """Closes the growing files."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # a line that is still unwritten was reported when it was added
                file.close()


class _naming_the_file:
    """Turns a failed write into one sentence."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise UserError(
                f"cannot write {self.path} ({error.strerror or error}): free space or mend the directory, then start "
                "again; the run goes on from its newest checkpoint"
            ) from error


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file; torn lines are passed over, and a missing file has none."""
    if not path.exists():
        return
    with path.open(encoding="utf8", errors="replace") as file:
        for text in file:
            # A machine that loses power leaves blocks of zeros, too, so a line's end does not prove it whole.
            with contextlib.suppress(ValueError):
                if text.endswith("\n") and text.startswith("{"):
                    yield json.loads(text)


def read_status(path: Path) -> dict[str, Any] | None:
    """status.json of a run directory; None where there is none."""
    try:
        record = json.loads((path / "status.json").read_text(encoding="utf8"))
        return record if isinstance(record, dict) else None
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None  # whether the run can be written is the lease's to find out
    except ValueError:
        return None  # only ever renamed into place, so this is somebody's own file: treated as none


def json_lines(objects: Iterable[dict[str, Any]]) -> str:
    """The objects as JSONL text."""
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in objects)
