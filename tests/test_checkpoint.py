"""Checkpoints: what exists is complete, what is read is undamaged; with real damage, real kills and full disks."""

import os
import signal
import subprocess
import sys
import threading
import zipfile
from collections import OrderedDict
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ddp_asr.errors import UserError
from ddp_asr.runs import checkpoint
from ddp_asr.runs.checkpoint import (
    BackgroundWriter,
    DamagedCheckpoint,
    newest_good,
    prune,
    read,
    set_aside_beyond,
    snapshot,
    step_path,
    write,
)
from ddp_asr.runs.lease import LeaseLost

REPOSITORY = Path(__file__).resolve().parent.parent
HANG_S = 60.0


def may_write():
    pass


def must_not_be_told(path, reason):
    raise AssertionError(f"{path}: {reason}")


def state(step: int) -> dict:
    return {"weights": {"w": torch.arange(512.0) + step}, "step": step, "text": "é", "list": [1.5, None, (True, 2)]}


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return type(one) is type(other) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def save(run_directory: Path, *steps: int) -> list[Path]:
    for step in steps:
        write(step_path(run_directory, step), state(step), may_write)
    return [step_path(run_directory, step) for step in steps]


def flip_a_bit(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def members(path: Path) -> dict[str, int]:
    """Where the data of every member begins in the file."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        begins = {}
        for member in archive.infolist():
            file.seek(member.header_offset + 26)
            name_bytes, extra_bytes = np.frombuffer(file.read(4), "<u2")
            if member.file_size:
                begins[member.filename] = member.header_offset + 30 + int(name_bytes) + int(extra_bytes)
        return begins


def data_begin(path: Path) -> int:
    """Where the first tensor's numbers begin."""
    return next(begin for name, begin in members(path).items() if name.endswith("data/0"))


# --- a state goes out and comes back -------------------------------------------------------------------------------

plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats(allow_nan=False) | st.text()
    | st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool]).map(
        lambda kind: torch.arange(6).reshape(2, 3).to(kind)
    ),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=plain)
def test_every_plain_state_comes_back_as_it_was(tmp_path, value):
    path = tmp_path / "a.pt"
    write(path, {"value": value}, may_write)
    assert same(read(path), {"value": value})


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (np.float64(1), r"state\['a'\]\[1\] is a numpy.float64"),
        ({1, 2}, "builtins.set"),
        (OrderedDict(a=1), "collections.OrderedDict"),
        (np.zeros(2), "numpy.ndarray"),
        ({1.5: 0}, r"key 1.5 of type float"),
        (Path("x"), "Path"),
    ],
)
def test_what_could_not_be_read_back_is_refused_before_writing(tmp_path, value, what):
    with pytest.raises(TypeError, match=what):
        write(tmp_path / "a.pt", {"a": [0, value]}, may_write)
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_no_longer_changes_with_the_model():
    model, big = torch.nn.Linear(4, 4), torch.zeros(1000)
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimiser.step()
    frozen = snapshot({"model": model.state_dict(), "optimiser": optimiser.state_dict(), "view": big[:2]})
    checkpoint.check_plain(frozen)
    before = snapshot(frozen)
    optimiser.step()
    big += 1
    assert same(frozen, before)
    assert not same(frozen["model"]["weight"], model.weight.detach())
    assert frozen["view"].untyped_storage().nbytes() == 8  # not the thousand that it was cut from


# --- damage --------------------------------------------------------------------------------------------------------


def test_a_flipped_bit_in_any_member_is_found(tmp_path):
    (path,) = save(tmp_path, 1)
    good = path.read_bytes()
    begins = members(path)
    assert any(name.endswith("data/0") for name in begins) and any(name.endswith("data.pkl") for name in begins)
    for name, begin in begins.items():
        path.write_bytes(good)
        flip_a_bit(path, begin)
        with pytest.raises(DamagedCheckpoint) as error:
            read(path)
        assert name in error.value.reason and str(path) in str(error.value)


def test_a_weight_that_is_marked_as_a_folder_is_found(tmp_path):
    """torch would read nothing of it and leave what the memory held before; no checksum covers the mark."""
    (path,) = save(tmp_path, 1)
    content = bytearray(path.read_bytes())
    entry = content.rindex(b"PK\x01\x02", 0, content.rindex(b"/data/0"))  # in the zip's directory, at its end
    content[entry + 38] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpoint, match="data/0 is marked as a folder"):
        read(path)


def test_torch_alone_loads_a_flipped_bit_as_another_weight(tmp_path):
    (path,) = save(tmp_path, 1)
    flip_a_bit(path, data_begin(path) + 2)
    loaded = torch.load(path, weights_only=True)  # no complaint: this is why `read` checks
    assert not same(loaded, state(1))


def test_a_flipped_bit_anywhere_is_found_or_harmless(tmp_path):
    (path,) = save(tmp_path, 1)
    good, found = path.read_bytes(), 0
    for position in range(0, len(good), 11):
        path.write_bytes(good)
        flip_a_bit(path, position)
        try:
            assert same(read(path), state(1)), position
        except DamagedCheckpoint:
            found += 1
    assert found > len(good) / 11 / 2


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_found(tmp_path, share):
    (path,) = save(tmp_path, 1)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(DamagedCheckpoint, match=r"truncated.*--resume PATH"):
        read(path)


@pytest.mark.parametrize("foreign", [{"a": Path("x")}, [1, 2]], ids=["objects", "no dict"])
def test_a_foreign_file_runs_no_code_and_is_refused(tmp_path, foreign):
    path = tmp_path / "foreign.pt"
    torch.save(foreign, path)
    with pytest.raises(DamagedCheckpoint, match="not ours"):
        read(path)


def test_a_missing_checkpoint_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"a\.pt cannot be read: No such file.*give the path") as error:
        read(tmp_path / "a.pt")
    assert not isinstance(error.value, DamagedCheckpoint)
    with pytest.raises(UserError, match="Is a directory"):
        read(tmp_path)


# --- the newest good one -------------------------------------------------------------------------------------------


def test_the_newest_is_found_by_its_step(tmp_path):
    save(tmp_path, 200, 1000, 99_999_999, 100_000_000, 300)
    (tmp_path / "checkpoints" / "step-00000900.pt.aside").write_bytes(b"")
    found = newest_good(tmp_path, must_not_be_told)
    assert found.step == 100_000_000 and found.path == step_path(tmp_path, 100_000_000)
    assert same(found.state, state(100_000_000))


def test_a_damaged_one_falls_back_to_the_one_before_and_says_so(tmp_path):
    paths = save(tmp_path, 1, 2, 3)
    os.truncate(paths[2], 1000)
    flip_a_bit(paths[1], data_begin(paths[1]))
    told = []
    found = newest_good(tmp_path, lambda path, reason: told.append((path, reason)))
    assert found.step == 1 and same(found.state, state(1))
    assert [path for path, _ in told] == [paths[2], paths[1]]
    assert "truncated" in told[0][1] and "checksum" in told[1][1]


def test_nothing_there_is_a_new_run_but_nothing_good_is_an_error(tmp_path):
    assert newest_good(tmp_path, must_not_be_told) is None
    for path in save(tmp_path, 1, 2):
        os.truncate(path, 1000)
    with pytest.raises(
        UserError, match=r"every checkpoint in .* is damaged .*best\.pt with --resume PATH, or remove /"
    ):
        newest_good(tmp_path, lambda path, reason: None)


def test_prune_keeps_the_newest(tmp_path):
    save(tmp_path, 1, 2, 3, 10)
    (tmp_path / "best.pt").write_bytes(b"")
    prune(tmp_path, keep_last=2)
    assert [step for step, _ in checkpoint.numbered(tmp_path)] == [3, 10]
    prune(tmp_path, keep_last=0)  # never all
    assert [step for step, _ in checkpoint.numbered(tmp_path)] == [10]
    assert (tmp_path / "best.pt").exists()


def test_checkpoints_beyond_the_resumed_step_no_longer_count(tmp_path):
    paths = save(tmp_path, 1, 2, 3)
    assert set_aside_beyond(tmp_path, 1, may_write) == paths[1:]
    assert newest_good(tmp_path, must_not_be_told).step == 1
    prune(tmp_path, keep_last=1)
    assert paths[0].exists()

    def lost():
        raise LeaseLost("lost")

    with pytest.raises(LeaseLost):
        set_aside_beyond(tmp_path, 0, lost)
    assert paths[0].exists()


# --- writing -------------------------------------------------------------------------------------------------------


def test_written_aside_synced_allowed_renamed_synced(tmp_path, monkeypatch):
    path, events = step_path(tmp_path, 1), []

    def recorded(name, call):
        def wrapper(*arguments):
            events.append(name + (" before" if not path.exists() else " after"))
            return call(*arguments)

        return wrapper

    monkeypatch.setattr(os, "fsync", recorded("sync", os.fsync))
    monkeypatch.setattr(os, "replace", recorded("rename", os.replace))
    write(path, state(1), recorded("may_write", may_write))
    assert events == ["may_write before", "sync before", "may_write before", "rename before", "sync after"]


@pytest.mark.parametrize("calls_allowed", [0, 1])
def test_a_lost_lease_leaves_everything_as_it_was(tmp_path, calls_allowed):
    path = tmp_path / "best.pt"
    write(path, state(1), may_write)
    winners = tmp_path / ".best.pt.0123456789abcdef-0.tmp"  # of whoever has the lease by now
    calls = iter([None] * calls_allowed)

    def lost():
        if next(calls, "lost") == "lost":
            raise LeaseLost("taken over")
        winners.write_bytes(b"half")

    if calls_allowed == 0:
        winners.write_bytes(b"half")
    with pytest.raises(LeaseLost):
        write(path, state(2), lost)
    assert same(read(path), state(1))
    assert sorted(tmp_path.iterdir()) == sorted([path, winners])


def test_temporary_files_of_dead_writers_are_removed(tmp_path):
    save(tmp_path, 1)
    stale = tmp_path / "checkpoints" / ".step-00000002.pt.0123456789abcdef-1234.tmp"
    stale.write_bytes(b"half")
    save(tmp_path, 3)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        "step-00000001.pt",
        "step-00000003.pt",
    ]


def test_temporary_files_of_other_things_are_left_alone(tmp_path):
    """best.pt lies beside status.json and metrics.jsonl, which are written at the same time."""
    others = [tmp_path / ".status.json.tmp", tmp_path / ".metrics.jsonl.tmp"]
    for other in others:
        other.write_text("half")
    write(tmp_path / "best.pt", state(1), may_write)
    assert all(other.exists() for other in others)


WRITER = """
import io, sys, time
from pathlib import Path
import torch
from ddp_asr.runs import checkpoint

run_directory, when = Path(sys.argv[1]), sys.argv[2]
written_bytes = 0

def stop():
    print("now", flush=True)
    time.sleep(1000)

class Stopping(checkpoint._Watched):
    def write(self, data):
        global written_bytes
        written = super().write(data)
        self.flush()
        written_bytes += written
        if written_bytes > 100_000:
            stop()
        return written

checkpoint.write(checkpoint.step_path(run_directory, 1), {"w": torch.full((100_000,), 1.0)}, lambda: None)
if when == "in the data":
    checkpoint._Watched = Stopping
calls = iter([lambda: None, stop])
checkpoint.write(checkpoint.step_path(run_directory, 2), {"w": torch.full((100_000,), 2.0)}, lambda: next(calls)())
"""


def run(code: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["in the data", "before the rename"])
def test_kill_9_in_mid_write_leaves_the_newest_good_one(tmp_path, when):
    process = run(WRITER, tmp_path, when)
    assert process.stdout.readline() == "now\n"
    (half,) = (tmp_path / "checkpoints").glob(".*.tmp")
    assert half.stat().st_size > 0
    process.send_signal(signal.SIGKILL)
    process.communicate()
    found = newest_good(tmp_path, must_not_be_told)
    assert found.step == 1 and same(found.state, {"w": torch.full((100_000,), 1.0)})
    save(tmp_path, 2)  # the next attempt clears up
    assert not half.exists() and newest_good(tmp_path, must_not_be_told).step == 2


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from ddp_asr.runs import checkpoint
from ddp_asr.errors import UserError

run_directory, limit_bytes = Path(sys.argv[1]), int(sys.argv[2])
checkpoint.write(checkpoint.step_path(run_directory, 1), {"w": torch.zeros(1000)}, lambda: None)
if limit_bytes:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
try:
    checkpoint.write(checkpoint.step_path(run_directory, 2), {"w": torch.zeros(1_000_000)}, lambda: None)
except UserError as error:
    print(error)
"""


def assert_survives_a_full_disk(directory, limit_bytes, why):
    output, _ = run(FULL_DISK, directory, limit_bytes).communicate()
    assert f"cannot be written ({why}" in output and "free space" in output
    assert [path.name for path in (directory / "checkpoints").iterdir()] == ["step-00000001.pt"]
    assert newest_good(directory, must_not_be_told).step == 1


@pytest.mark.slow
@pytest.mark.parametrize("limit_bytes", [10_000, 1_000_000, 4_000_500])  # at the first byte, amid, in the zip's end
def test_a_write_that_fails_is_one_sentence_and_leaves_nothing(tmp_path, limit_bytes):
    assert_survives_a_full_disk(tmp_path, limit_bytes, "File too large")


@pytest.mark.slow
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a small disk")
    try:
        assert_survives_a_full_disk(tmp_path, 0, "No space left on device")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_an_unwritable_place_is_one_sentence(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(UserError, match=r"step-00000001\.pt cannot be written"):
        write(step_path(tmp_path, 1), state(1), may_write)


# --- in the background ---------------------------------------------------------------------------------------------


@pytest.fixture
def gate():
    """may_write that waits for the test."""

    class Gate:
        def __init__(self):
            self.reached, self.open = threading.Event(), threading.Event()

        def __call__(self):
            self.reached.set()
            assert self.open.wait(HANG_S)

    gate = Gate()
    yield gate
    gate.open.set()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, gate):
    writer = BackgroundWriter(gate)
    writer.submit(step_path(tmp_path, 1), state(1), then=lambda: (tmp_path / "then").touch())
    assert gate.reached.wait(HANG_S)
    writer.raise_if_failed()  # waits for nothing
    assert not step_path(tmp_path, 1).exists()
    gate.open.set()
    writer.wait()
    assert same(read(step_path(tmp_path, 1)), state(1)) and (tmp_path / "then").exists()
    writer.close()


def test_the_next_one_waits_for_the_one_before(tmp_path, gate):
    writer = BackgroundWriter(gate)
    writer.submit(step_path(tmp_path, 1), state(1))
    assert gate.reached.wait(HANG_S)
    submitted = threading.Event()

    def submit_second():
        writer.submit(step_path(tmp_path, 2), state(2))
        assert step_path(tmp_path, 1).exists()
        submitted.set()

    second = threading.Thread(target=submit_second)
    second.start()
    assert not submitted.wait(0.05)
    gate.open.set()
    assert submitted.wait(HANG_S)
    second.join()
    writer.close()
    assert newest_good(tmp_path, must_not_be_told).step == 2


@pytest.mark.parametrize("raised_by", ["wait", "submit", "close", "raise_if_failed"])
def test_an_error_of_the_background_reaches_the_training(tmp_path, raised_by):
    def lost():
        raise LeaseLost("taken over")

    writer = BackgroundWriter(lost)
    writer.submit(step_path(tmp_path, 1), state(1))
    arguments = (step_path(tmp_path, 2), state(2)) if raised_by == "submit" else ()
    if raised_by == "raise_if_failed":
        writer._pending.exception(HANG_S)
    with pytest.raises(LeaseLost, match="taken over"):
        getattr(writer, raised_by)(*arguments)
    writer.close()  # once is enough


@pytest.mark.parametrize("progress", [None, {"steps": 3}, {"step": "3"}, {"bad_keys": 1}, {"best": 0.5}])
def test_a_state_with_another_kind_of_progress_is_refused(tmp_path, progress):
    from ddp_asr.config import config_from_dict
    from ddp_asr.training.resume import read_state

    path = tmp_path / "step-00000003.pt"
    write(path, {"progress": progress, "config": {}, "fingerprint": "", "model": {}, "optimizer": {}}, may_write)
    with pytest.raises(UserError, match=r"is no checkpoint of ddp_asr\.train"):
        read_state(path, config_from_dict({}, "the test"))


def test_a_pickle_that_leads_the_unpickler_astray_is_damage(tmp_path):
    """With a right checksum, as a program that repairs zip files writes it: an opcode that finds no mark."""
    (path,) = save(tmp_path, 3)
    with zipfile.ZipFile(path) as members:
        content = {name: members.read(name) for name in members.namelist()}
    with zipfile.ZipFile(path, "w") as members:
        for name, data in content.items():
            members.writestr(name, b"\x80\x02u." if name.endswith("data.pkl") else data)
    with pytest.raises(DamagedCheckpoint, match="truncated or overwritten"):
        read(path)


def test_what_torch_says_in_many_lines_is_one(tmp_path, monkeypatch):
    (path,) = save(tmp_path, 3)
    error = TypeError("set_() received an invalid combination, but expected one of:\n * ()\n * (Tensor source)\n")
    monkeypatch.setattr(torch, "load", mock.Mock(side_effect=error))
    with pytest.raises(DamagedCheckpoint, match=r"but expected one of: \(truncated or overwritten\)") as damage:
        read(path)
    assert "\n" not in str(damage.value)
