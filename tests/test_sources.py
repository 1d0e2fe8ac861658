"""Sources: keys, order and texts of directories, manifests and archives; fetching from a real HTTP server."""

import hashlib
import io
import tarfile
import tempfile
import threading
import unicodedata
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddp_asr.data import sources
from ddp_asr.data.sources import (
    BAD_LINE,
    DUPLICATE,
    MISSING_AUDIO,
    fetch,
    make_key,
    open_source,
    sanitise_key,
    stream_archive,
)
from ddp_asr.errors import UserError
from tests import tiny_speech


def listed(source):
    return list(open_source(str(source), source.parent, "http://unused").open()[1])


@given(st.text(alphabet=st.characters(), max_size=40))
def test_a_key_holds_nothing_that_webdataset_would_cut(name):
    key = sanitise_key(name)
    assert not set(key) & set("./ ")
    assert not any(unicodedata.category(c) in ("Cc", "Cs") for c in key)
    key.encode("utf-8")
    assert sanitise_key(key) == key
    assert len(key) == len(name)
    assert all(after in (before, "_") for before, after in zip(name, key, strict=True))


@given(st.text(alphabet=st.characters(categories=["L", "N"], include_characters="-_'"), min_size=1))
def test_a_harmless_id_is_its_own_key(name):
    assert make_key(name) == name


@given(st.floats(min_value=0, max_value=1e6))
def test_a_segment_is_told_apart_by_its_offset_in_milliseconds(offset_s):
    assert make_key("talk", offset_s) == f"talk-{round(offset_s * 1000)}"


@pytest.mark.parametrize(
    ("entry", "key"),
    [
        ({"id": "a.b/c d\te"}, "a_b_c_d_e"),
        ({"id": 17}, "17"),
        ({"id": ""}, "clips_one_two"),
        ({}, "clips_one_two"),
        ({"audio_filepath": "./clips/../x.wav"}, "x"),
        ({"audio_filepath": "/elsewhere/x.wav"}, "elsewhere_x"),
        ({"offset": 1.5}, "clips_one_two-1500"),
        ({"offset": 0}, "clips_one_two-0"),
        ({"id": "talk", "offset": 2.0004}, "talk-2000"),
        ({"duration": 3.0}, "clips_one_two"),
        ({"offset": None, "duration": None}, "clips_one_two"),
    ],
)
def test_the_key_of_a_manifest_line(tmp_path, entry, key):
    source = tiny_speech.manifest(tmp_path / "m.jsonl", [{"audio_filepath": "clips/one.two.wav", "text": "A"} | entry])
    assert [u.key for u in listed(source)] == [key]


def test_an_absolute_path_below_the_manifest_gives_the_same_key_as_a_relative_one(tmp_path):
    entry = {"audio_filepath": str(tmp_path / "clips" / "a.wav"), "text": "A"}
    assert listed(tiny_speech.manifest(tmp_path / "m.jsonl", [entry]))[0].key == "clips_a"


def test_a_directory_is_read_in_order_with_its_texts_and_speakers(tmp_path):
    root = tiny_speech.librispeech(tmp_path / "split", speakers=2, utterances=2)
    utterances = listed(root)
    assert [(u.key, u.speaker) for u in utterances] == [
        ("100-7-0000", "100"),
        ("100-7-0001", "100"),
        ("101-7-0000", "101"),
        ("101-7-0001", "101"),
    ]
    assert utterances[1].text == "SPEAKER 100 SAYS NO MORE"
    assert utterances[1].source == "100/7/100-7-0001.flac"


def test_a_directory_tells_what_is_missing(tmp_path):
    root = tiny_speech.librispeech(tmp_path / "split", speakers=1, utterances=3)
    chapter = root / "100" / "7"
    (chapter / "100-7-0001.flac").unlink()
    (chapter / "._100-7-0001.flac").write_bytes(b"left by macOS")
    (chapter / "100-7-0009.flac").write_bytes(b"")
    assert [(u.key, u.text is None, u.reason) for u in listed(root)] == [
        ("100-7-0000", False, ""),
        ("100-7-0002", False, ""),
        ("100-7-0009", True, ""),
        ("100-7-0001", False, MISSING_AUDIO),
    ]


def test_a_transcript_is_cut_at_newlines_only():
    assert sources.read_transcripts("a ONE\u2028TWO\x0bTHREE\r\n\nb\n".encode()) == {
        "a": "ONE\u2028TWO\x0bTHREE",
        "b": "",
    }


def test_malformed_manifest_lines_are_kept_with_their_reason(tmp_path):
    bad = [
        "{",
        "[1]",
        '{"text": "A"}',
        '{"audio_filepath": "a.wav", "offset": -1}',
        '{"audio_filepath": "a", "offset": true}',
        '{"audio_filepath": "a.wav", "text": "A", "duration": 0}',
    ]
    good = {"audio_filepath": "a.wav", "text": "A\ud800"}
    *malformed, utterance = listed(tiny_speech.manifest(tmp_path / "m.jsonl", [*bad, good]))
    assert [u.reason for u in malformed] == [BAD_LINE] * 6
    assert malformed[0].source == "m.jsonl:1"
    assert (utterance.reason, utterance.text) == ("", "A?")


@pytest.mark.parametrize("content", [b"", b"a,b\nc,d\n", b"RIFF\xff\xfe\x00"])
def test_a_file_that_is_no_manifest_is_refused(tmp_path, content):
    (tmp_path / "m.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="manifest"):
        listed(tmp_path / "m.jsonl")


def test_an_empty_directory_and_an_unknown_name_are_refused(tmp_path):
    with pytest.raises(UserError, match="LibriSpeech split's directory"):
        open_source(str(tmp_path), tmp_path, "")
    with pytest.raises(UserError, match=r"no such source.*train-clean-100"):
        open_source("train-clean-101", tmp_path, "")


@pytest.mark.parametrize("transcripts", ["first", "last", "end"])
def test_an_archive_gives_what_its_directory_gives_wherever_the_transcripts_lie(tmp_path, transcripts):
    root = tiny_speech.librispeech(tmp_path / "split")
    path = tiny_speech.archive(tmp_path / "split.tar.gz", root, transcripts)
    streamed = list(stream_archive(path))
    assert [(u.key, u.text, u.speaker) for u in streamed] == [(u.key, u.text, u.speaker) for u in listed(root)]
    assert [u.data for u in streamed] == [u.path.read_bytes() for u in listed(root)]
    assert streamed[-1].position <= path.stat().st_size


@pytest.mark.parametrize("transcripts", ["first", "last", "end"])
def test_no_audio_waits_in_memory_for_its_transcript(tmp_path, transcripts):
    """Told by how far the archive is read when the first utterance comes out."""
    root = tiny_speech.librispeech(tmp_path / "split", speakers=8, seconds=3)
    path = tiny_speech.archive(tmp_path / "split.tar.gz", root, transcripts)
    assert next(stream_archive(path)).position < path.stat().st_size / 2


def tar_gz(path, members):
    """A .tar.gz of (name, content), in this order; a name may occur more than once."""
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def unpack(root, members):
    for name, content in members:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def told(utterances):
    """All that decides what is made of the utterances, whatever their order: texts, audio, and why some are dropped."""
    return sorted(
        (u.key, u.source, u.text or "", u.text is None, u.speaker, u.reason, u.detail, audio_bytes(u))
        for u in utterances
    )


def audio_bytes(utterance):
    if utterance.reason:
        return b""
    return utterance.path.read_bytes() if utterance.path else utterance.data


def test_chapters_in_one_folder_of_an_archive_keep_all_their_transcripts(tmp_path):
    chapters = [[(f"7-{c}-{n}.flac", b"%d-%d" % (c, n)) for n in range(3)] for c in range(2)]
    texts = [(f"7-{c}.trans.txt", b"".join(b"7-%d-%d TEXT\n" % (c, n) for n in range(3))) for c in range(2)]
    path = tar_gz(tmp_path / "a.tar.gz", [texts[0], *chapters[0], *chapters[1], texts[1]])
    assert [(u.key, u.text) for u in stream_archive(path)] == [
        (f"7-{c}-{n}", "TEXT") for c in range(2) for n in range(3)
    ]


def test_what_the_tar_of_a_mac_adds_is_no_transcript_and_no_audio(tmp_path):
    double = b"\0\5\x16\7\0\2\0\0Mac OS X        "
    files = [("7/7-1.trans.txt", b"7-1-0 TEXT\n"), ("7/7-1-0.flac", b"audio")]
    members = [member for name, content in files for member in ((name.replace("/", "/._"), double), (name, content))]
    for source in (tar_gz(tmp_path / "a.tar.gz", members), unpack(tmp_path / "a", members)):
        assert [(u.key, u.text, u.reason) for u in listed(source)] == [("7-1-0", "TEXT", "")]


STEMS = st.sampled_from(["7-1-0", "7-1-1", "7-2-0", "a b", "a_b"])
FOLDERS = st.sampled_from(["", "7/", "7/1/", "7/1/x/", "7/2/", "70/", "._7/"])
AUDIO_NAMES = st.builds("{}{}".format, STEMS, st.sampled_from([".flac", ".wav", ".FLAC"]))
TRANSCRIPT_NAMES = st.sampled_from(["7-1.trans.txt", "7-2.trans.txt", "7.trans.txt"])
STRAY_NAMES = st.sampled_from([".DS_Store", "LICENSE.TXT", "7-1.trans.txt.bak", "7-1.trans"])
NAMES = st.one_of(AUDIO_NAMES, TRANSCRIPT_NAMES, STRAY_NAMES)
DOUBLES = st.one_of(AUDIO_NAMES, TRANSCRIPT_NAMES).map("._{}".format)
PATHS = st.builds("{}{}".format, FOLDERS, st.one_of(NAMES, DOUBLES))
TEXTS = st.dictionaries(STEMS, st.sampled_from(["ONE", "TWO THREE", "", " "]))


@st.composite
def layouts(draw):
    """Members of an archive, [(path, content)], in any order; a path that occurs twice replaces its first content."""
    paths = draw(st.lists(PATHS, min_size=1, max_size=16))
    members = []
    for number, path in enumerate(paths):
        texts = draw(TEXTS) if path.endswith("trans.txt") else {}
        content = "".join(f"{stem} {text}\n" for stem, text in texts.items()) or f"7-1-0 {number}"
        members.append((path, content.encode()))
    return members


@settings(max_examples=300)
@given(layouts(), st.randoms(use_true_random=False), st.sampled_from(["", "./"]))
def test_an_archive_gives_the_utterances_of_its_directory_in_any_layout_and_order(members, random, prefix):
    with tempfile.TemporaryDirectory() as folder:
        root = unpack(Path(folder) / "split", members)
        path = tar_gz(Path(folder) / "split.tar.gz", [(prefix + name, content) for name, content in members])
        streamed = list(stream_archive(path))
        try:
            assert told(streamed) == told(listed(root))
        except UserError:  # neither transcripts nor audio
            assert not streamed
        usable = [u.key for u in streamed if not u.reason and u.text and u.text.strip()]
        assert len(usable) == len(set(usable))  # else the order would decide which of them is dropped
        assert list(stream_archive(path)) == streamed
        shuffled = list(dict(members).items())
        random.shuffle(shuffled)
        assert told(stream_archive(tar_gz(path, shuffled))) == told(streamed)


@pytest.mark.parametrize("backwards", [False, True])
def test_the_first_path_of_a_key_is_the_utterance_and_the_others_are_duplicates(tmp_path, backwards):
    names = ["7/1/a.flac", "7/1/a.wav", "7/2/a.flac", "7/a.flac"]
    members = [(name, name.encode()) for name in names] + [("7/1/7.trans.txt", b"a ONE"), ("7/2/7.trans.txt", b"a TWO")]
    members = members[::-1] if backwards else members
    for source in (tar_gz(tmp_path / "a.tar.gz", members), unpack(tmp_path / "a", members)):
        assert {u.source: (u.text, u.reason) for u in listed(source)} == {
            "7/a.flac": (None, ""),
            "7/1/a.flac": ("ONE", ""),
            "7/1/a.wav": ("ONE", DUPLICATE),
            "7/2/a.flac": ("TWO", DUPLICATE),
        }


def test_an_archive_tells_what_is_missing(tmp_path):
    root = tiny_speech.librispeech(tmp_path / "split", speakers=1, utterances=2)
    (root / "100" / "7" / "100-7-0001.flac").rename(root / "100" / "7" / "100-7-0005.flac")
    utterances = list(stream_archive(tiny_speech.archive(tmp_path / "split.tar.gz", root)))
    assert [(u.key, u.text is None, u.reason) for u in utterances] == [
        ("100-7-0000", False, ""),
        ("100-7-0005", True, ""),
        ("100-7-0001", False, MISSING_AUDIO),
    ]


@pytest.mark.parametrize("damage", ["cut", "cut at a member", "flipped", "not gzip"])
def test_a_damaged_archive_is_never_taken_for_a_short_one(tmp_path, damage):
    path = tiny_speech.archive(tmp_path / "a.tar.gz", tiny_speech.librispeech(tmp_path / "split"))
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-6] ^= 1  # in the checksum
    path.write_bytes({"cut": content[: len(content) // 2], "cut at a member": content[:-20]}.get(damage, content))
    if damage == "not gzip":
        path.write_bytes(b"<html>" * 1000)
    with pytest.raises(UserError, match="damaged or cut short"):
        list(stream_archive(path))


class Server(ThreadingHTTPServer):
    """Serves one file at /set/file.bin; `lives` connections each break after `cut_bytes`."""

    def __init__(self, content, ranges=True, lives=0, cut_bytes=0, status=0):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.content, self.ranges, self.lives, self.cut_bytes, self.status = content, ranges, lives, cut_bytes, status
        self.asked: list[str | None] = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/set"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.asked.append(asked)
        if server.status:
            return self.send_error(server.status)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.ranges else 0
        if start and start >= len(server.content):
            return self.send_error(416)
        body = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if server.lives:
            server.lives -= 1
            body = body[: server.cut_bytes]
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@contextmanager
def serving(content, **how):
    server = Server(content, **how)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


CONTENT = bytes(range(256)) * 4000
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(sources, "RETRY_PAUSES_S", (0.0, 0.0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_a_fetched_file_is_checked_kept_and_not_fetched_again(tmp_path):
    with serving(CONTENT) as server:
        for _ in range(2):
            assert fetch(f"{server.url}/file.bin", tmp_path / "cache", MD5).read_bytes() == CONTENT
        assert server.asked == [None]


def test_fetching_goes_on_where_an_earlier_run_was_killed(tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1000])
    with serving(CONTENT) as server:
        assert fetch(f"{server.url}/file.bin", tmp_path, MD5).read_bytes() == CONTENT
        assert server.asked == ["bytes=1000-"]


def test_fetching_goes_on_after_broken_connections(tmp_path):
    with serving(CONTENT, lives=5, cut_bytes=100_000) as server:
        assert fetch(f"{server.url}/file.bin", tmp_path, MD5).read_bytes() == CONTENT
        assert server.asked == [None, *(f"bytes={n}00000-" for n in range(1, 6))]


def test_a_part_that_is_whole_already_is_taken(tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    with serving(CONTENT) as server:
        assert fetch(f"{server.url}/file.bin", tmp_path, MD5).read_bytes() == CONTENT


def test_a_server_that_cannot_resume_is_asked_for_all_of_it(tmp_path):
    (tmp_path / "file.bin.part").write_bytes(b"x" * 1000)
    with serving(CONTENT, ranges=False) as server:
        assert fetch(f"{server.url}/file.bin", tmp_path, MD5).read_bytes() == CONTENT


def test_what_has_another_checksum_is_thrown_away(tmp_path):
    with serving(CONTENT) as server, pytest.raises(UserError, match="not what OpenSLR publishes"):
        fetch(f"{server.url}/file.bin", tmp_path, "0" * 32)
    assert not list(tmp_path.glob("file.bin")) and not list(tmp_path.glob("*.part"))


def test_a_damaged_file_in_the_cache_is_named(tmp_path):
    (tmp_path / "file.bin").write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match=r"file.bin is damaged .* delete it"):
        fetch("http://unused/file.bin", tmp_path, MD5)


@pytest.mark.parametrize(("status", "asked"), [(404, 1), (503, 3)])
def test_a_server_that_refuses_is_named_and_asked_again_only_where_that_helps(tmp_path, status, asked):
    with serving(CONTENT, status=status) as server, pytest.raises(UserError, match=f"cannot be fetched: .*{status}"):
        fetch(f"{server.url}/file.bin", tmp_path, MD5)
    assert len(server.asked) == asked


def test_an_unreachable_server_keeps_what_is_there(tmp_path):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1000])
    with serving(CONTENT) as server:
        url = server.url
    with pytest.raises(UserError, match="1,000 bytes so far are kept"):
        fetch(f"{url}/file.bin", tmp_path, MD5)


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--cache"):
        fetch("http://unused/file.bin", tmp_path / "file" / "cache", MD5)
