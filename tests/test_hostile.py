"""Sources and shards that somebody else made: what they make the program read, write and start.

A hook sees every file that Python opens, every program and every connection, while a source is sharded, or shards are
read and copied. libsndfile and pyarrow get bytes and open files from us, and no names that a source chooses.
"""

import contextlib
import csv
import json
import os
import sys
import tarfile
from pathlib import Path

import pytest

from ddp_asr import shard, transcribe
from ddp_asr.data.index import read_index
from ddp_asr.data.storage import Shards, cache_shards
from ddp_asr.errors import UserError
from ddp_asr.files import sealed_json
from tests import tiny_speech
from tests.test_sources import HardLink, SymLink, tar_gz, unpack
from tests.tiny_recogniser import write_checkpoint

SECRET = b"a secret of the user's"
STARTS = ("subprocess.", "os.exec", "os.system", "os.posix_spawn", "os.fork", "socket.connect", "urllib.", "pickle.")
_seen: list[tuple[str, tuple]] | None = None


def _hook(event, arguments):
    if _seen is not None:
        _seen.append((event, arguments))


sys.addaudithook(_hook)  # it cannot be removed


@contextlib.contextmanager
def watched(root, may_read, may_write):
    """Asserts that below `root` only these places are read and written, nothing else is written, nothing started."""
    global _seen

    def outside():
        every = tiny_speech.content(root).items()
        return {name: data for name, data in every if not any((root / name).is_relative_to(p) for p in may_write)}

    before = outside()
    _seen = []
    try:
        yield
    finally:
        seen, _seen = _seen, None
    assert [event for event, _ in seen if event.startswith(STARTS)] == []
    for path, _, flags in (arguments for event, arguments in seen if event == "open"):
        if not isinstance(path, str | bytes | Path):
            continue  # a descriptor that is open already
        real = Path(os.path.realpath(os.fsdecode(path)))
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            assert any(real.is_relative_to(place) for place in may_write) or real == Path(os.devnull), real
        elif real.is_relative_to(root):
            assert any(real.is_relative_to(place) for place in (*may_read, *may_write)), real
    assert outside() == before


COMMANDS = ["touch started |", "| touch started", "$(touch started)", "`touch started`", "http://127.0.0.1:9/a.wav"]
COMMANDS += ["file:///etc/passwd", "/dev/zero", "-"]
NAMES = [
    "../../7-1-1",
    "/7-1-2",
    "a/../../7-1-3",
    "..",
    ".",
    "7-1-4\n",
    "~/7-1-5",
    "C:\\7-1-6",
    "$(touch 7-1-7)",
    "\u202e",
]


def hostile_manifest(root):
    good = root / "good.flac"
    good.write_bytes(tiny_speech.encode(tiny_speech.noise()))
    lines = [{"audio_filepath": "good.flac", "text": "A", "id": name} for name in NAMES]
    lines += [{"audio_filepath": command, "text": "A"} for command in COMMANDS]
    lines += [{"audio_filepath": "__import__('os').system('touch started')", "text": "A", "id": {"a": ["b"]}}]
    return tiny_speech.manifest(root / "m.jsonl", lines)


def hostile_archive(root):
    flac = tiny_speech.encode(tiny_speech.noise())
    stems = [name.replace("/", "_") for name in NAMES] + [f"7-1-{n}" for n in range(8)]
    members = [(f"{folder}{stem}.flac", flac) for folder in ("", "../../", "/tmp/x/") for stem in stems]
    members += [("link", SymLink("/")), ("up", SymLink("..")), ("link/secret.flac", flac), ("up/secret.flac", flac)]
    members += [("7-9-0.flac", SymLink(str(root.parent / "secret.flac"))), ("7-9-1.flac", HardLink("../secret.flac"))]
    members += [("7-9-2.flac", SymLink("up/secret.flac")), ("7-9.trans.txt", SymLink("../secret.flac"))]
    text = b"".join(b"%s TEXT\n" % stem.encode() for stem in [*stems, "7-9-0", "7-9-1", "7-9-2"] if "\n" not in stem)
    return tar_gz(root / "a.tar.gz", [("7-1.trans.txt", text), ("../../7-1.trans.txt", text), *members])


def hostile_directory(root):
    flac = tiny_speech.encode(tiny_speech.noise())
    names = [name.replace("/", "_") for name in NAMES if "\n" not in name]
    text = b"".join(b"%s TEXT\n" % name.encode() for name in names)
    return unpack(root / "split", [("7-1.trans.txt", text), *((f"{name}.flac", flac) for name in names)])


def hostile_folder(root):
    flac = tiny_speech.encode(tiny_speech.noise())
    stems = [name.replace("/", "_") for name in NAMES]
    members = [(f"{stem}{suffix}", data) for stem in stems for suffix, data in ((".flac", flac), (".txt", b"TEXT"))]
    return unpack(root / "mine", members)


def hostile_table(root):
    (root / "good.flac").write_bytes(tiny_speech.encode(tiny_speech.noise()))
    with (root / "t.csv").open("w", newline="") as file:
        rows = [("path", "text", "id"), *(("good.flac", '=cmd|"/c calc"!A1', name) for name in NAMES)]
        csv.writer(file).writerows([*rows, *((command, "A", "") for command in COMMANDS)])
    return root / "t.csv"


def hostile_webdataset(root):
    flac = tiny_speech.encode(tiny_speech.noise())
    folders = ("", "../../", "/tmp/x/")
    members = [
        (f"{folder}{name}{suffix}", content)
        for folder in folders
        for name in [*NAMES, *(f"7-1-{n}" for n in range(8))]
        for suffix, content in ((".flac", flac), (".json", b'{"text": "A", "__class__": "os.system"}'))
    ]
    members += [("link", SymLink("/")), ("up", SymLink("..")), ("up/secret.flac", flac), ("up/secret.txt", b"A")]
    members += [("7-9-0.flac", SymLink(str(root.parent / "secret.flac"))), ("7-9-0.txt", b"A")]
    members += [("7-9-1.flac", HardLink("../secret.flac")), ("7-9-1.txt", SymLink("../secret.flac"))]
    return tar_gz(root / "a.tar", members)


SOURCES = (hostile_manifest, hostile_archive, hostile_directory, hostile_folder, hostile_table, hostile_webdataset)


@pytest.mark.parametrize("make", SOURCES)
def test_a_source_writes_into_its_output_only_and_starts_nothing(tmp_path, make):
    tiny_speech.shard(tiny_speech.librispeech(tmp_path / "warm"), tmp_path / "imports")
    (tmp_path / "secret.flac").write_bytes(SECRET)
    (tmp_path / "source").mkdir()
    source, out = make(tmp_path / "source"), tmp_path / "out"
    with watched(tmp_path, may_read=[tmp_path / "source"], may_write=[out]):
        assert shard.main([str(source), "--out", str(out), "--workers", "1", "--verify"]) == 0
    assert not any(SECRET in content for content in tiny_speech.content(out).values())
    for path in out.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:  # whoever unpacks the shards gets plain files beside each other
                assert member.isfile() and member.name == os.path.basename(member.name)
                assert tarfile.data_filter(member, str(tmp_path)).name == member.name
    assert len(read_index([out])) >= 6


@pytest.mark.parametrize("make", SOURCES)
def test_a_source_that_is_transcribed_writes_into_its_output_only_and_starts_nothing(tmp_path, make, capfd):
    checkpoint = write_checkpoint(tmp_path / "run" / "best.pt")
    (tmp_path / "warm.flac").write_bytes(tiny_speech.encode(tiny_speech.noise()))
    assert transcribe.main([str(checkpoint), str(tmp_path / "warm.flac")]) == 0  # imports
    (tmp_path / "secret.flac").write_bytes(SECRET)
    (tmp_path / "source").mkdir()
    source, out = make(tmp_path / "source"), tmp_path / "out"
    may_read = [tmp_path / "source", tmp_path / "run"]
    for command in (["--out", str(out / "said.jsonl")], ["--format", "srt", "--out", str(out / "srt")]):
        out.mkdir(exist_ok=True)
        with watched(tmp_path, may_read=may_read, may_write=[out]):
            assert transcribe.main([str(checkpoint), str(source), *command]) in (0, 2)
    assert len((out / "said.jsonl").read_text().splitlines()) >= 6
    assert len(list((out / "srt").iterdir())) >= 6
    assert SECRET.decode() not in "".join(capfd.readouterr())


def test_a_manifest_may_name_any_audio_of_the_users_and_shows_no_other_file(tmp_path):
    """Its paths are the user's own: absolute ones are usual. What is no audio is named with a reason, not shown."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here").mkdir()
    (tmp_path / "elsewhere" / "a.flac").write_bytes(tiny_speech.encode(tiny_speech.noise()))
    (tmp_path / "secret").write_bytes(SECRET)
    paths = ["../elsewhere/a.flac", str(tmp_path / "elsewhere" / "a.flac"), "../secret", str(tmp_path / "secret")]
    lines = [{"audio_filepath": path, "text": "A", "id": str(n)} for n, path in enumerate(paths)]
    out = tiny_speech.shard(tiny_speech.manifest(tmp_path / "here" / "m.jsonl", lines), tmp_path / "out")
    assert read_index([out]).keys.to_pylist() == ["0", "1"]
    assert not any(SECRET in content for content in tiny_speech.content(out).values())


@pytest.mark.parametrize(
    "wrong",
    [{"name": "../secret.flac"}, {"name": "/etc/passwd"}, {"sha256": "../../x"}, {"sha256": "/" + "0" * 63}],
)
def test_shards_are_read_in_their_directory_and_copied_into_the_cache_only(tmp_path, wrong):
    (tmp_path / "secret.flac").write_bytes(SECRET)
    out = tiny_speech.shard(tiny_speech.librispeech(tmp_path / "split"), tmp_path / "out")
    with watched(tmp_path, may_read=[out], may_write=[tmp_path / "cache"]):
        index = cache_shards(read_index([out]), tmp_path / "cache")
        Shards(index.shards).read(int(index.shard[0]), int(index.offset[0]), int(index.bytes[0]))
    dataset = json.loads((out / "dataset.json").read_text())
    dataset["shards"][0] |= wrong
    (out / "dataset.json").write_text(sealed_json(dataset))
    with watched(tmp_path, may_read=[out], may_write=[]), pytest.raises(UserError, match=r"dataset.json says"):
        cache_shards(read_index([out]), tmp_path / "cache")
