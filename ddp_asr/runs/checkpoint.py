"""Checkpoints: a file that exists is complete, and a state that is read is undamaged.

    state on the device --snapshot--> CPU copy --BackgroundWriter--> temp file --fsync, may_write, rename--> step-*.pt
    step-*.pt --newest_good--> every CRC checked --> state on the CPU

    runs/NAME/checkpoints/step-00001234.pt
    runs/NAME/best.pt

A state consists of dicts, lists and tuples of tensors, numbers, strings and None only, so that it can be read with
`weights_only=True`, which runs no code. `write` refuses anything else: it would be noticed hours later, at reading.

A file is written beside its place, synced and renamed. `may_write` (the lease's `check`) is called before anything is
touched and once more just before the rename. `read` checks the zip's CRCs. `torch.load` does not, and would load a
flipped bit silently as another weight.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from ddp_asr.errors import UserError, printable
from ddp_asr.files import left_behind, open_input, writing_aside

_IS_FOLDER = 0x10  # MS-DOS's attribute, in a member's entry in the zip's directory
_STEP_FILE = re.compile(r"step-(\d{8,})\.pt")


class DamagedCheckpoint(UserError):
    """A checkpoint that cannot be trusted; `reason` says what is wrong with it."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"checkpoint {path} is damaged: {reason}; take an earlier one with --resume PATH")
        self.path = path
        self.reason = reason


@dataclass(frozen=True)
class Found:
    """A checkpoint that was read whole."""

    path: Path
    step: int
    state: dict[str, Any]


def step_path(run_directory: Path, step: int) -> Path:
    return run_directory / "checkpoints" / f"step-{step:08d}.pt"


def snapshot(state: Any) -> Any:
    """A deep copy on the CPU, in plain containers, that training no longer changes."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):  # a module's state is an OrderedDict
        return {key: snapshot(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(snapshot(value) for value in state)
    return state


def check_plain(state: Any, where: str = "state") -> None:
    """Raises TypeError naming the first value that `weights_only=True` would not read back as it is."""
    if isinstance(state, torch.Tensor) or type(state) in (int, float, bool, str, type(None)):
        return
    if type(state) is dict:
        for key, value in state.items():
            if type(key) not in (int, str):
                raise TypeError(f"{where} has the key {key!r} of type {type(key).__name__}: keys are str or int")
            check_plain(value, f"{where}[{key!r}]")
    elif type(state) in (list, tuple):
        for number, value in enumerate(state):
            check_plain(value, f"{where}[{number}]")
    else:
        # exactly these types: numpy.float64 is a float, yet its pickle is refused when read
        raise TypeError(
            f"{where} is a {type(state).__module__}.{type(state).__qualname__}: a checkpoint holds dict, list, tuple, "
            "int, float, bool, str, None and tensors; convert it first"
        )


def write(path: Path, state: dict[str, Any], may_write: Callable[[], None]) -> None:
    """Writes a checkpoint; a file of that name is complete at any time.

    Raises what `may_write` raises, and UserError if the disk is full or the directory unwritable; leaves nothing then.
    """
    check_plain(state)
    # Listed before may_write: if another process takes the run over in between, none of its files is in the list.
    # Only checkpoints': best.pt lies beside files that rank 0 itself is writing meanwhile.
    abandoned = left_behind(path.parent, "*.pt")
    may_write()
    for file in abandoned:
        with contextlib.suppress(OSError):  # if the disk fails, the write below says so
            file.unlink()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing_aside(path, before_rename=may_write) as file_aside:
            _save(state, _Watched(file_aside))
    except OSError as error:
        raise _unwritable(path, error) from error


def write_alone(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint that belongs to no running training; touches no temporary file of one.

    Raises:
        OSError: the disk is full or the directory unwritable.
    """
    check_plain(state)
    with writing_aside(path) as file:
        _save(state, _Watched(file))


def _save(state: dict[str, Any], file: _Watched) -> None:
    try:
        torch.save(state, file)  # type: ignore[arg-type]  # torch needs `write` and `flush` only
    except RuntimeError as error:
        # torch's zip writer answers a failed write with its own complaint about positions.
        raise file.error or error from error


class _Watched:
    """A file that remembers why writing failed."""

    def __init__(self, file: IO[bytes]) -> None:
        self.error: OSError | None = None
        self._file = file
        self.flush = file.flush

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise


def read(path: Path) -> dict[str, Any]:
    """The state, on the CPU, after a check of every byte. Raises DamagedCheckpoint; UserError if there is no file."""
    try:
        file = open_input(path)  # opened once, so that the file that was checked is the one that is loaded
    except OSError as error:
        if error.errno in (errno.EISDIR, errno.EINVAL):  # a directory, a pipe: whatever it is, it is no checkpoint
            raise DamagedCheckpoint(path, str(error.strerror)) from error
        raise UserError(f"checkpoint {path} cannot be read: {error.strerror}; give the path of a .pt file") from error
    with file:
        return _read_checked(path, file)


def newest_good(run_directory: Path, on_damage: Callable[[Path, str], None]) -> Found | None:
    """The newest undamaged checkpoint of a run; None where there are none at all.

    `on_damage` is called with each damaged one that is passed over. Raises UserError if all are damaged: a run must
    not begin anew over weeks of training because of one bad disk.
    """
    damage: DamagedCheckpoint | None = None
    for step, path in reversed(numbered(run_directory)):
        try:
            return Found(path, step, read(path))
        except DamagedCheckpoint as error:
            on_damage(path, error.reason)
            damage = damage or error
    if damage is not None:
        raise UserError(
            f"every checkpoint in {run_directory / 'checkpoints'} is damaged (the newest: {damage.reason}): go on from "
            f"{run_directory / 'best.pt'} with --resume PATH, or remove {run_directory} to begin anew"
        ) from damage
    return None


def set_aside_beyond(run_directory: Path, step: int, may_write: Callable[[], None]) -> list[Path]:
    """Renames the checkpoints beyond `step` to `.aside`; returns them.

    Called when a run goes on at `step`. Otherwise the next resume would choose a damaged or abandoned later one, and
    `prune` would keep it in place of the good ones.
    """
    beyond = [path for number, path in numbered(run_directory) if number > step]
    for path in beyond:
        may_write()
        os.replace(path, path.with_name(path.name + ".aside"))
    return beyond


def prune(run_directory: Path, keep_last: int) -> None:
    """Removes all but the newest `keep_last` (at least one) checkpoints."""
    for _, path in numbered(run_directory)[: -max(1, keep_last)]:
        with contextlib.suppress(IsADirectoryError):  # which is not ours
            path.unlink(missing_ok=True)


class BackgroundWriter:
    """Writes one checkpoint at a time in a thread, while training goes on."""

    def __init__(self, may_write: Callable[[], None]) -> None:
        self._may_write = may_write
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def submit(self, path: Path, state: dict[str, Any], then: Callable[[], None] | None = None) -> None:
        """Begins to write a snapshot, then calls `then` (to prune, say) in the same thread.

        Waits for the previous one first and raises its error.
        """
        self.wait()
        self._pending = self._thread.submit(self._write, path, state, then)

    def _write(self, path: Path, state: dict[str, Any], then: Callable[[], None] | None) -> None:
        write(path, state, self._may_write)
        if then is not None:
            then()

    def raise_if_failed(self) -> None:
        """Raises the error of a write that has already failed; waits for none."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Returns when everything submitted is on the disk; raises its error, once."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()


def numbered(run_directory: Path) -> list[tuple[int, Path]]:
    """(step, path) of every checkpoint, the newest last."""
    matches = ((_STEP_FILE.fullmatch(path.name), path) for path in (run_directory / "checkpoints").glob("step-*.pt"))
    return sorted((int(match[1]), path) for match, path in matches if match)


def _read_checked(path: Path, file: IO[bytes]) -> dict[str, Any]:
    try:
        damage = _damage_of_members(file)
        file.seek(0)
        state = None if damage else torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DamagedCheckpoint(path, "it holds more than tensors and plain containers, so it is not ours") from error
    except Exception as error:  # torch's unpickler raises what the damaged bytes make it do, an IndexError for instance
        what = printable((str(error).strip().splitlines() or [type(error).__name__])[0])
        raise DamagedCheckpoint(path, f"{what} (truncated or overwritten)") from error
    if damage:
        raise DamagedCheckpoint(path, damage)
    if not isinstance(state, dict):
        raise DamagedCheckpoint(path, f"it holds a {type(state).__name__} and not a dict, so it is not ours")
    return state


def _damage_of_members(file: IO[bytes]) -> str:
    """What is wrong with the members of the zip; "" where nothing is."""
    with zipfile.ZipFile(file) as members:
        # No checksum covers this bit. torch takes the member for a folder then, reads nothing of it, and leaves in the
        # weight what the memory held before. Seen with torch 2.11.
        folders = [member.filename for member in members.infolist() if member.external_attr & _IS_FOLDER]
        if folders:
            return f"its member {folders[0]} is marked as a folder"
        damaged = members.testzip()
    return "" if damaged is None else f"the checksum of its member {damaged} does not match"


def _unwritable(path: Path, error: OSError) -> UserError:
    try:
        room = f", {shutil.disk_usage(path.parent).free // 2**20} MB free"
    except OSError:
        room = ""
    return UserError(
        f"checkpoint {path} cannot be written ({error.strerror or error}{room}): free space or mend the directory, "
        "then start again; the run goes on from the newest checkpoint"
    )
