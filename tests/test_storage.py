"""Stores read byte ranges by URL, from many threads; node-local copies are made once and checked."""

import dataclasses
import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ddp_asr.data import storage
from ddp_asr.data.index import read_index
from ddp_asr.errors import UserError
from ddp_asr.files import scheme_of
from tests import tiny_speech
from tests.conftest import REPOSITORY


class LocalFiles:
    """Puts content where the local store reads it."""

    def __init__(self, directory):
        self.directory = directory

    def put(self, name, content):
        (self.directory / name).write_bytes(content)
        return str(self.directory / name)


# What the tests of the protocol need of each scheme: a place to put content under a URL of it.
PLACES = {"": LocalFiles}
# Tested on a server of their own, in test_object_storage.py, or, for want of a server, by their client's word.
ON_SERVERS, UNTESTED = {"s3", "http"}, {"gs", "az", "https"}


def test_every_scheme_is_known_here():
    assert PLACES.keys() | ON_SERVERS | UNTESTED == storage.STORES.keys()


@pytest.fixture(params=PLACES)
def place(request, tmp_path):
    return PLACES[request.param](tmp_path)


def test_a_store_reads_exactly_the_range_asked_for(place):
    url = place.put("shard-000000.tar", bytes(range(256)))
    store = storage.open_store(url)
    assert store.size(url) == 256
    assert store.read(url, 0, 256) == bytes(range(256))
    assert store.read(url, 10, 3) == b"\x0a\x0b\x0c" and store.read(url, 256, 0) == b""


def test_a_range_beyond_the_end_is_an_error_that_names_it(place):
    url = place.put("shard-000000.tar", b"0123456789")
    store = storage.open_store(url)
    with pytest.raises(OSError, match=r"shard-000000.tar ends at byte 10, before byte 12"):
        store.read(url, 5, 7)


def test_a_missing_name_is_told(place):
    url = place.put("shard-000000.tar", b"x")
    for call in (lambda store: store.read(url + "x", 0, 1), lambda store: store.size(url + "x")):
        with pytest.raises(FileNotFoundError):
            call(storage.open_store(url))


def test_many_threads_read_many_shards(place, monkeypatch):
    """More shards than descriptors, so that some are closed while other threads read."""
    monkeypatch.setattr(storage, "_OPEN_FILES", 2)
    contents = [np.random.default_rng(number).bytes(5_000) for number in range(7)]
    urls = tuple(place.put(f"shard-{number:06d}.tar", content) for number, content in enumerate(contents))
    shards = storage.Shards(urls)

    def read(draw):
        number, offset = divmod(int(draw), 4_000)
        return shards.read(number, offset, 1_000) == contents[number][offset : offset + 1_000]

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, np.random.default_rng(0).integers(0, 28_000, 4_000)))


def open_files():
    return {os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd") if _is_open(name)}


def _is_open(name):
    return os.path.lexists(f"/proc/self/fd/{name}")


def test_the_local_store_keeps_a_bounded_number_of_files_open(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_OPEN_FILES", 2)
    place = LocalFiles(tmp_path)
    urls = [place.put(str(number), b"x") for number in range(5)]
    store = storage.LocalStore()
    for url in urls:
        store.read(url, 0, 1)
    assert {url for url in urls if url in open_files()} == set(urls[-2:])
    del store
    assert not {url for url in urls if url in open_files()}


def test_a_named_pipe_without_a_writer_is_an_error_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "shard-000000.tar")
    with pytest.raises(OSError, match="seek"):
        storage.LocalStore().read(str(tmp_path / "shard-000000.tar"), 0, 512)


def test_a_file_closed_by_the_bound_stays_open_for_the_thread_that_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_OPEN_FILES", 1)
    place = LocalFiles(tmp_path)
    first, second = place.put("first", b"one"), place.put("second", b"two")
    store, reading, go_on, pread = storage.LocalStore(), threading.Event(), threading.Event(), os.pread

    def held(descriptor, size, offset):
        if threading.current_thread() is not threading.main_thread():
            reading.set()
            assert go_on.wait(60)
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", held)
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(store.read, first, 0, 3)
        assert reading.wait(60)
        assert store.read(second, 0, 3) == b"two"
        go_on.set()
        assert found.result() == b"one"


@pytest.mark.parametrize(
    "url, scheme", [("s3://bucket/a", "s3"), ("https://host/a", "https"), ("/a/b", ""), ("a:b/c", ""), ("a", "")]
)
def test_the_scheme_of_a_url(url, scheme):
    assert scheme_of(url) == scheme


def test_an_unknown_scheme_is_refused_with_those_there_are():
    with pytest.raises(UserError, match=r"ftp://host/mine: shards cannot be read from ftp://; known are: a local path"):
        read_index(["ftp://host/mine"])


def test_a_new_store_is_a_class_and_a_registration(tmp_path, monkeypatch):
    """Shards behind another scheme are indexed, read and copied like local ones, mixed with those."""
    first = tiny_speech.shard(tiny_speech.librispeech(tmp_path / "a"), tmp_path / "shards-a")
    entries = [{"audio_filepath": "1.flac", "text": "one", "id": "one"}]
    (tmp_path / "1.flac").write_bytes(tiny_speech.encode(tiny_speech.noise()))
    second = tiny_speech.shard(tiny_speech.manifest(tmp_path / "m.jsonl", entries), tmp_path / "shards-b")

    class Elsewhere(storage.LocalStore):
        def read(self, name, offset, size):
            return super().read(str(tmp_path / name.removeprefix("toy://")), offset, size)

        def size(self, name):
            return super().size(str(tmp_path / name.removeprefix("toy://")))

    monkeypatch.setitem(storage.STORES, "toy", Elsewhere)
    local, mixed = read_index([first, second]), read_index([first, "toy://shards-b"])
    assert mixed.shards == (*local.shards[:-1], "toy://shards-b/shard-000000.tar")
    assert mixed.fingerprint() == local.fingerprint()
    cached = storage.cache_shards(mixed, tmp_path / "cache")
    for index in (mixed, cached):
        for row in range(len(index)):
            address = (int(index.shard[row]), int(index.offset[row]), int(index.bytes[row]))
            assert storage.Shards(index.shards).read(*address) == storage.Shards(local.shards).read(*address)
    with pytest.raises(UserError, match=r"^toy://nothing: no dataset.json in it"):
        read_index(["toy://nothing"])


# node-local copies


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    root = tmp_path_factory.mktemp("storage")
    return tiny_speech.shard(tiny_speech.librispeech(root / "source"), root / "shards", "--shard-mb", "0.04")


@pytest.fixture
def whole(shards):
    return read_index([shards])


def test_shards_are_copied_once(whole, tmp_path):
    cached = storage.cache_shards(whole, tmp_path / "cache")
    assert len(cached.shards) == len(whole.shards) > 1
    for copy, shard in zip(cached.shards, whole.shards, strict=True):
        assert Path(copy).parent == tmp_path / "cache" and Path(copy).read_bytes() == Path(shard).read_bytes()
    stamps = [os.stat(path).st_mtime_ns for path in cached.shards]
    again = storage.cache_shards(whole, tmp_path / "cache")
    assert again.shards == cached.shards and stamps == [os.stat(path).st_mtime_ns for path in again.shards]
    assert not list((tmp_path / "cache").glob("*.tmp"))


@pytest.mark.slow
def test_ranks_that_copy_at_the_same_time_copy_each_shard_once(shards, tmp_path):
    program = textwrap.dedent("""
        import sys
        from pathlib import Path
        from ddp_asr.data import storage
        from ddp_asr.data.index import read_index
        copies = []
        copy = storage._copy
        storage._copy = lambda url, *rest: copies.append(Path(url).name) or copy(url, *rest)
        sys.stdin.readline()
        cached = storage.cache_shards(read_index([sys.argv[1]]), sys.argv[2])
        assert all(Path(path).exists() for path in cached.shards)
        print(*copies)
    """)
    command = [sys.executable, "-c", program, str(shards), str(tmp_path / "cache")]
    pipe = subprocess.PIPE
    ranks = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=REPOSITORY) for _ in range(3)]
    for rank in ranks:
        rank.stdin.write("go\n")
        rank.stdin.flush()
    copied = [name for rank in ranks for name in rank.communicate(timeout=120)[0].split()]
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    assert sorted(copied) == sorted(path.name for path in shards.glob("shard-*.tar")) and len(copied) > 1


def test_a_copy_broken_off_is_made_again(whole, tmp_path):
    first = Path(storage.cache_shards(whole, tmp_path).shards[0])
    expected = first.read_bytes()
    os.truncate(first, 100)
    left_behind = first.with_name(f".{first.name}.0123-abcd.tmp")
    left_behind.write_bytes(b"by a process that was killed")
    storage.cache_shards(whole, tmp_path)
    assert first.read_bytes() == expected and not left_behind.exists()


def test_a_shard_that_does_not_match_its_checksum_is_named(whole, tmp_path):
    copy = tmp_path / "shard-000000.tar"
    damaged = bytearray(Path(whole.shards[0]).read_bytes())
    damaged[500] ^= 1
    copy.write_bytes(damaged)
    changed = dataclasses.replace(whole, shards=(str(copy), *whole.shards[1:]))
    with pytest.raises(
        UserError, match=rf"shard-000000.tar does not match its checksum.*delete {tmp_path} and shard it again"
    ):
        storage.cache_shards(changed, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.tar")) and not list((tmp_path / "cache").glob(".*.tmp"))


def test_a_cache_that_cannot_be_written_says_what_it_needs(whole, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data.cache_dir .*file: .*MB.*or leave data.cache_dir empty"):
        storage.cache_shards(whole, tmp_path / "file")
