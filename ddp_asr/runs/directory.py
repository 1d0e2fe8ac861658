"""The files of a run that rank 0 writes beside its checkpoints, and the only way it writes them: under the lease.

    runs/NAME/
        config.yaml        every setting, of the newest attempt
        metrics.jsonl      a train line a step, a test line an evaluation, an epoch line an epoch (fields below)
        samples.jsonl      references and hypotheses of each evaluation
        left_out.jsonl     utterances that the plan leaves out, with the reason
        pieces.model       the vocabulary of word pieces, if the run has one, for other programs of sentencepiece
        environment.json   versions, hardware and git commit of the newest attempt; its fused micro-batches, by rank
        status.json        how the run stands, for launchers
        spectrogram.png, curves.png, checkpoints/, best.pt, lease.json, comet.json ...

Each line is flushed at once, so a killed run loses at most the line that it was writing. `cut_after` removes a torn
line and everything beyond the step from which a resumed run continues.

Fields of metrics.jsonl. All kinds: `kind` ("train", "test" or "epoch"), `step` and `epoch` (counted from 1 since the
start of the run), `time_s` (Unix time).
- A train line: `loss`, `learning_rate`, `gradient_norm`, `audio_s_per_s` (of all ranks together) and
  `process_audio_s_per_s` (of one, on average), `skipped` (steps so far), `padding` (share of what is computed). Shares
  of the step in which a rank waited, on average over the ranks: `data_wait` for data, `rank_wait` for the gradients of
  the others after its own were computed. The most that rank 0 has held, in 10^9 bytes: `gpu_memory_gb` since the line
  before (null without a GPU), `host_memory_gb` since the attempt began.
- A test line: `loss`, `wer` and `cer` (shares).
- An epoch line: `utterances` that were trained in the epoch, and `fired`: how many of them each augmentation that is
  turned on has changed. Counted over all ranks and attempts.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ddp_asr.errors import UserError
from ddp_asr.files import (
    Fields,
    is_count,
    is_flag,
    is_number,
    is_text,
    is_time,
    json_lines,
    left_behind,
    read_json,
    read_json_lines,
    replace_file,
    sync,
)
from ddp_asr.runs.lease import Lease

_GROWING = ("metrics.jsonl", "samples.jsonl")

# What readers of these files rely on; fields that are not here are read by people only.
STATUS: Fields = {
    **dict.fromkeys(("state", "reason", "refused", "job_id"), is_text),
    **dict.fromkeys(("retry", "checkpoint_saved"), is_flag),
    **dict.fromkeys(("step", "epoch", "total_steps", "attempt"), is_count),
    "best_wer": is_number,
    "time_s": is_time,
}
LINE: Fields = {
    "kind": is_text,
    **dict.fromkeys(("step", "epoch"), is_count),
    **dict.fromkeys(("loss", "wer", "cer", "audio_s_per_s"), is_number),
    "time_s": is_time,
}


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl or samples.jsonl; each has its step."""
    return (line for line in read_json_lines(path, LINE) if "step" in line)


class RunDirectory:
    """Writes a run's files; every write asks the lease first and raises its LeaseLost."""

    def __init__(self, path: Path, lease: Lease, job_id: str | None, attempt: int) -> None:
        self.path = path
        self.former = read_status(path) or {}  # status.json of the attempt before
        self._lease = lease
        self._job_id, self._attempt = job_id, attempt
        self._files: dict[str, IO[str]] = {}

    @classmethod
    def take(cls, path: Path, on_wait: Callable[[str], None]) -> "RunDirectory":
        """Takes the lease and keeps it; `on_wait` is told if it has to wait.

        Raises:
            UserError: another run holds it, or the directory cannot be written.
        """
        job_id = os.environ.get("SLURM_JOB_ID")
        if job_id is not None:
            attempt = int(os.environ.get("SLURM_RESTART_COUNT") or 0) + 1
        else:
            attempt = (read_status(path) or {}).get("attempt", 0) + 1
        lease = Lease.acquire(path, job_id=job_id, attempt=attempt, on_wait=on_wait)
        lease.start_renewing()
        return cls(path, lease, job_id, attempt)

    @property
    def requeued(self) -> bool:
        """Whether an earlier attempt of the same Slurm job has begun this run."""
        former = self.former
        own = self._job_id is not None and former.get("job_id") == self._job_id and "refused" not in former
        return own and former.get("attempt", self._attempt) < self._attempt

    def check(self) -> None:
        """Returns if this process may write now; raises LeaseLost otherwise."""
        self._lease.check()

    def cut_after(self, step: int, evaluated_step: int) -> None:
        """Keeps of the metrics and samples only what a checkpoint at `step` knows of."""

        def known(line: dict[str, Any]) -> bool:
            last = step if line.get("kind") in ("train", "epoch") else evaluated_step
            return is_count(line.get("step")) and bool(line["step"] <= last)

        for name in _GROWING:
            path = self.path / name
            if path.exists():
                self.write(name, json_lines(line for line in read_json_lines(path) if known(line)))

    def append(self, name: str, line: dict[str, Any]) -> None:
        """Adds a line to a growing file."""
        self._lease.check()
        with _naming_the_file(self.path / name):
            file = self._files.get(name)
            if file is None:
                file = self._files[name] = (self.path / name).open("a", encoding="utf8", errors="backslashreplace")
            file.write(json_lines([line]))
            file.flush()

    def sync(self) -> None:
        """Returns when the growing files are on the disk; called before a checkpoint that counts on their lines."""
        for name, file in self._files.items():
            with _naming_the_file(self.path / name):
                sync(file)

    def write(self, name: str, content: str | bytes) -> None:
        """Replaces a whole file at once; removes what a killed attempt has left of such a write."""
        abandoned = left_behind(self.path, name)
        self._lease.check()
        with _naming_the_file(self.path / name):
            for file in abandoned:
                file.unlink(missing_ok=True)
            replace_file(self.path / name, content, before_rename=self._lease.check)

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

    def refuse(self, reason: str) -> None:
        """Adds to the status of the attempt before that this attempt was refused and changed nothing."""
        record = self.former | {"refused": reason, "attempt": self._attempt, "job_id": self._job_id}
        self.write("status.json", json.dumps(record, indent=1) + "\n")

    def close(self) -> None:
        """Closes the growing files and gives up the lease."""
        for file in self._files.values():
            with contextlib.suppress(OSError):  # a line that is still unwritten was reported when it was added
                file.close()
        self._lease.release()


class NoDirectory:
    """In place of a RunDirectory on ranks other than 0, which write none of its files."""

    former: Mapping[str, Any] = {}
    requeued = False

    def status(self, state: str, reason: str, **facts: Any) -> None:
        """Nothing."""

    def refuse(self, reason: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


@contextlib.contextmanager
def _naming_the_file(path: Path) -> Iterator[None]:
    """Turns a failed write into one sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror or error}): free space or mend the directory, then start again; "
            "the run goes on from its newest checkpoint"
        ) from error


def read_status(path: Path) -> dict[str, Any] | None:
    """status.json of a run directory; None where there is none, or something else."""
    try:
        return read_json(path / "status.json", STATUS)
    except OSError:
        return None  # whether the run can be written is found out when the lease is taken
