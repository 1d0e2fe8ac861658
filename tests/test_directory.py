"""A run's files: written under the lease, whole or not at all, and cut back to what a checkpoint knows of."""

import errno
import json
import os

import pytest

from ddp_asr.errors import UserError
from ddp_asr.files import json_lines, read_json_lines
from ddp_asr.runs.directory import RunDirectory, read_status
from ddp_asr.runs.lease import LeaseLost


class FakeLease:
    """Says how often it was asked, and after how many times it is lost."""

    def __init__(self, lost_after=10**9):
        self.asked, self.lost_after = 0, lost_after

    def check(self):
        self.asked += 1
        if self.asked > self.lost_after:
            raise LeaseLost("another run holds the directory")

    def release(self):
        pass


def train(step):
    return {"kind": "train", "step": step, "loss": 1 / step}


def epoch(step):
    return {"kind": "epoch", "step": step, "fired": {}}


def evaluation(step):
    return {"kind": "test", "step": step, "wer": 1 / step}


def samples(step):
    return {"step": step, "samples": [{"key": "é", "reference": "a", "hypothesis": ""}]}


@pytest.fixture
def files(tmp_path):
    opened = RunDirectory(tmp_path, FakeLease(), job_id="4711", attempt=3)
    yield opened
    opened.close()


def lines(path):
    return list(read_json_lines(path))


def test_lines_are_on_the_disk_as_soon_as_they_are_added(files, tmp_path):
    for step in (1, 2):
        files.append("metrics.jsonl", train(step))
        assert lines(tmp_path / "metrics.jsonl")[-1] == train(step)
    files.append("samples.jsonl", samples(2))
    assert "é" in (tmp_path / "samples.jsonl").read_text(encoding="utf8")
    files.sync()


def test_a_resumed_run_keeps_what_its_checkpoint_knows_of(files, tmp_path):
    """A checkpoint of step 4 that was written before the evaluation of step 4 knows that of step 2 only."""
    metrics = [train(1), train(2), evaluation(2), train(3), train(4), epoch(4), evaluation(4), train(5), epoch(5)]
    for line in metrics:
        files.append("metrics.jsonl", line)
    for line in (samples(2), samples(4)):
        files.append("samples.jsonl", line)
    files.close()
    RunDirectory(tmp_path, FakeLease(), None, 1).cut_after(step=4, evaluated_step=2)
    assert lines(tmp_path / "metrics.jsonl") == [train(1), train(2), evaluation(2), train(3), train(4), epoch(4)]
    assert lines(tmp_path / "samples.jsonl") == [samples(2)]


@pytest.mark.parametrize(
    "torn",
    [
        b'{"kind": "train", "st',
        b'{"kind": "train", "step": 2}',  # whole, but who knows
        b"\x00\x00\x00\x00",
        b"\x00\x00\n",
        b'{"kind": "train", "step\x00\x00\n',
        b'{"kind": "tra\xff\n',
        b"",
    ],
)
def test_a_torn_line_goes_and_the_next_one_stands_on_its_own(files, tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(json_lines([train(1)]).encode() + torn)
    files.cut_after(step=9, evaluated_step=9)
    files.append("metrics.jsonl", train(2))
    assert path.read_text() == json_lines([train(1), train(2)])


def test_a_first_attempt_has_nothing_to_cut(files, tmp_path):
    files.cut_after(step=0, evaluated_step=0)
    assert list(tmp_path.iterdir()) == []


WRITES = {
    "append": lambda files: files.append("metrics.jsonl", train(1)),
    "write": lambda files: files.write("config.yaml", "new"),
    "produce": lambda files: files.produce("curves.png", lambda: (files.path / "curves.png").write_text("new")),
    "status": lambda files: files.status("running", "training", retry=True, step=1, epoch=0),
    "cut_after": lambda files: files.cut_after(step=0, evaluated_step=0),
}
NAMES = ("metrics.jsonl", "samples.jsonl", "config.yaml", "curves.png", "status.json")


def contents(directory):
    return {name: (directory / name).read_text() for name in NAMES}


@pytest.fixture
def written(tmp_path):
    """A run directory with a file of each name."""
    for name in NAMES:
        (tmp_path / name).write_text(json_lines([train(1)]))
    return tmp_path


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_the_lease_is_asked_before_every_write(written, write):
    before = contents(written)
    with pytest.raises(LeaseLost):
        write(RunDirectory(written, FakeLease(lost_after=0), None, 1))
    assert contents(written) == before


@pytest.mark.parametrize("name", ["write", "status", "cut_after"])
def test_the_lease_is_asked_again_before_a_file_is_renamed_into_place(written, name):
    before = contents(written)
    with pytest.raises(LeaseLost):
        WRITES[name](RunDirectory(written, FakeLease(lost_after=1), None, 1))
    assert contents(written) == before


def test_an_append_asks_the_lease_each_time(written):
    files = RunDirectory(written, FakeLease(lost_after=2), None, 1)
    files.append("metrics.jsonl", train(2))
    files.append("metrics.jsonl", train(3))
    with pytest.raises(LeaseLost):
        files.append("metrics.jsonl", train(4))
    files.close()
    assert lines(written / "metrics.jsonl") == [train(1), train(2), train(3)]


def test_a_file_is_replaced_at_once(files, tmp_path):
    """Whoever has it open reads the old one to its end."""
    files.write("config.yaml", "old " * 9)
    with (tmp_path / "config.yaml").open() as reader:
        files.write("config.yaml", "new")
        assert reader.read() == "old " * 9
    assert (tmp_path / "config.yaml").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def failing(*arguments, number=errno.EIO):
    raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("name", WRITES)
def test_a_failed_write_is_one_sentence_that_names_the_file_and_the_remedy(tmp_path, monkeypatch, name):
    gone = tmp_path / "gone"
    files = RunDirectory(gone, FakeLease(), None, 1)
    if name == "cut_after":
        gone.mkdir()
        (gone / "metrics.jsonl").write_text(json_lines([train(1)]))
        monkeypatch.setattr(os, "replace", failing)
    said = r"cannot write .*gone/[a-z]+\.[a-z]+ \(.*\): free space or mend the directory, then start again"
    with pytest.raises(UserError, match=said) as error:
        WRITES[name](files)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("write", ["append", "write"])
def test_a_full_disk_is_said_once_and_closing_does_not_hide_it(tmp_path, monkeypatch, write):
    if write == "append":
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    else:
        monkeypatch.setattr(os, "fsync", lambda file: failing(number=errno.ENOSPC))
    files = RunDirectory(tmp_path, FakeLease(), None, 1)
    with pytest.raises(UserError, match=r"No space left on device"):
        WRITES[write](files)
    files.close()


def test_what_a_killed_attempt_left_of_a_write_is_removed(files, tmp_path):
    for name in (".status.json.0123456789abcdef-00.tmp", ".tracking.json.0123456789abcdef-00.tmp"):
        (tmp_path / name).write_text("half")
    files.status("running", "training", retry=True, step=1, epoch=0)
    # tracking.json is written by another process, which may be about to rename it.
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".tracking.json.0123456789abcdef-00.tmp",
        "status.json",
    ]


def test_the_status_is_what_launchers_read(files, tmp_path):
    assert read_status(tmp_path) is None
    files.status(
        "stopped", "SIGTERM", retry=True, step=12, epoch=3, total_steps=40, best_wer=0.25, checkpoint_saved=True
    )
    status = read_status(tmp_path)
    assert status.pop("time_s") > 1.7e9 and status.pop("host")
    assert status == {
        "state": "stopped",
        "reason": "SIGTERM",
        "retry": True,
        "step": 12,
        "epoch": 3,
        "total_steps": 40,
        "best_wer": 0.25,
        "checkpoint_saved": True,
        "attempt": 3,
        "job_id": "4711",
    }


def test_a_refused_attempt_leaves_the_status_of_the_run(tmp_path):
    former = {"state": "done", "reason": "all 3 epochs", "retry": False, "step": 12, "attempt": 1, "job_id": None}
    (tmp_path / "status.json").write_text(json.dumps(former))
    files = RunDirectory(tmp_path, FakeLease(), job_id="4711", attempt=3)
    files.refuse("bad shards")
    assert read_status(tmp_path) == former | {"refused": "bad shards", "attempt": 3, "job_id": "4711"}
    files.status("running", "training", retry=True, step=1, epoch=0)
    assert "refused" not in read_status(tmp_path)


@pytest.mark.parametrize("text", ["all is well", '["all", "is", "well"]'])
def test_somebodys_own_status_file_is_none_of_ours(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    assert read_status(tmp_path) is None


def test_lines_and_objects_are_each_others_inverse(tmp_path):
    objects = [{"key": "ä\u2028\n"}, {}, {"nested": [1, None, {"a": 0.1}]}]
    (tmp_path / "any.jsonl").write_text(json_lines(objects), encoding="utf8")
    assert lines(tmp_path / "any.jsonl") == objects
    assert [json.loads(text) for text in json_lines(objects).split("\n")[:-1]] == objects
