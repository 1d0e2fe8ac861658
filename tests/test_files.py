"""Files that are whole or absent, and JSON lines that survive a torn end."""

import hashlib
import json

import pytest

from ddp_asr import files


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "status.json"
    files.replace_file(path, "old")
    with files.writing_aside(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]


def test_an_error_leaves_the_old_file_and_nothing_aside(tmp_path):
    path = tmp_path / "status.json"
    files.replace_file(path, "old")

    def refuse():
        raise PermissionError("the lock is another's")

    with pytest.raises(PermissionError):
        files.replace_file(path, "new", before_rename=refuse)
    with pytest.raises(ZeroDivisionError), files.writing_aside(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]


def test_the_temporary_file_may_lie_in_another_directory(tmp_path):
    (tmp_path / "aside").mkdir()
    with files.writing_aside(tmp_path / "shard.tar", aside_in=tmp_path / "aside") as file:
        file.write(b"content")
        assert [entry.suffix for entry in (tmp_path / "aside").iterdir()] == [".tmp"]
        assert [entry.name for entry in tmp_path.iterdir()] == ["aside"]
    assert (tmp_path / "shard.tar").read_bytes() == b"content"
    assert not list((tmp_path / "aside").iterdir())


def test_torn_and_damaged_lines_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = [{"step": 1, "text": "für"}, {"step": 2, "text": "line\u2028separator"}]
    path.write_bytes(files.json_lines(whole).encode() + b"\0\0\0\n[1]\n{broken}\n" + json.dumps({"step": 3}).encode())
    assert list(files.read_json_lines(path)) == whole
    assert list(files.read_json_lines(tmp_path / "missing.jsonl")) == []


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b"\xff"])
def test_what_is_no_json_object_is_none(tmp_path, content):
    path = tmp_path / "status.json"
    if content is not None:
        path.write_bytes(content)
    assert files.read_json(path) is None


def test_a_checksum_is_of_the_content(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 7)
    path = tmp_path / "shard.tar"
    path.write_bytes(b"0123456789" * 10)
    assert files.sha256_of(path) == hashlib.sha256(b"0123456789" * 10).hexdigest()


def test_json_gets_no_nan():
    assert [files.finite(number) for number in (1.5, float("nan"), float("inf"))] == [1.5, None, None]
