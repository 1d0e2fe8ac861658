"""WebDataset tars as a source: what is a sample, what a damaged tar says, and that no link is followed."""

import numpy as np
import pytest

from ddp_asr.data.index import read_index
from ddp_asr.data.sources import BAD_LINE, IMPLAUSIBLE, MISSING_AUDIO, SourceOptions, open_source
from ddp_asr.errors import UserError
from tests import tiny_speech
from tests.test_sources import HardLink, SymLink, tar_gz


def listed(source):
    total, utterances = open_source(str(source), SourceOptions()).open()
    found = list(utterances)
    assert len(found) == total
    return found


def test_a_sample_is_its_members_up_to_the_first_dot(tmp_path):
    members = [
        ("./b/x.flac", b"1"),
        ("./b/x.txt", b"\xef\xbb\xbfONE\n"),
        ("./b/x.cls", b"7"),
        ("y.JSON", b'{"text": "TWO", "speaker_id": 5, "lang": "de"}'),
        ("y.mic.WAV", b"2"),
        ("._y.wav", b"of a Mac"),
        ("README", b""),
        ("notes.md", b""),
        ("z.json", b'{"text": "LESS", "speaker": {"a": 1}, "language": null}'),
        ("z.txt", b"THREE"),
        ("z.mp3", b"3"),
    ]
    found = listed(tar_gz(tmp_path / "a.tar", members))
    assert [(u.key, u.source, u.text, u.speaker, u.language, u.data, u.reason) for u in found] == [
        ("b_x", "b/x.flac", "ONE", "", "", b"1", ""),
        ("y", "y.mic.wav", "TWO", "5", "de", b"2", ""),
        ("z", "z.mp3", "THREE", "", "", b"3", ""),
    ]


def test_what_is_no_single_utterance_has_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr("ddp_asr.data.sources.webdataset.MAX_ARCHIVED_BYTES", 4)
    members = [
        *[("two.flac", b"1"), ("two.wav", b"1"), ("two.txt", b"A")],
        *[("broken.flac", b"1"), ("broken.json", b"{" * 100_000)],
        *[("large.flac", b"12345"), ("large.txt", b"A")],
        *[("apart.flac", b"1"), ("between.flac", b"1"), ("apart.txt", b"A")],
        *[("list.flac", b"1"), ("list.json", b"[1]"), ("list.txt", b"A")],
    ]
    found = [(u.key, u.text, u.reason) for u in listed(tar_gz(tmp_path / "a.tar", members))]
    assert found == [
        ("two", "A", BAD_LINE),
        ("broken", None, BAD_LINE),
        ("large", "A", IMPLAUSIBLE),
        ("apart", None, ""),
        ("between", None, ""),
        ("apart", "A", MISSING_AUDIO),
        ("list", "A", ""),
    ]


def test_no_link_is_followed(tmp_path):
    (tmp_path / "secret.flac").write_bytes(b"secret")
    members = [("a.flac", b"1"), ("a.txt", b"A")]
    members += [("b.flac", SymLink(str(tmp_path / "secret.flac"))), ("b.txt", b"B")]
    members += [("c.flac", HardLink("a.flac")), ("c.txt", b"C")]
    found = listed(tar_gz(tmp_path / "a.tar", members))
    assert [(u.key, u.data, u.reason) for u in found] == [
        ("a", b"1", ""),
        ("b", None, MISSING_AUDIO),
        ("c", None, MISSING_AUDIO),
    ]


def test_a_tar_that_is_cut_anywhere_is_refused_in_one_sentence(tmp_path):
    samples = [{"__key__": f"{n}", "txt": "A", "flac": tiny_speech.encode(tiny_speech.noise(0.05))} for n in range(3)]
    whole = tiny_speech.webdataset(tmp_path / "whole.tar", samples).read_bytes()
    end = len(whole.rstrip(b"\0"))
    path = tmp_path / "a.tar"
    for size in [*range(0, end, 512), *range(100, end, 1000)]:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"a\.tar is damaged or cut short"):
            listed(path)
    path.write_bytes(whole + whole)
    with pytest.raises(UserError, match="more follows"):
        listed(path)


def test_shards_are_no_source_but_each_of_their_tars_is(tmp_path):
    shards = tiny_speech.shard(tiny_speech.librispeech(tmp_path / "split"), tmp_path / "shards")
    with pytest.raises(UserError, match=r"shards holds shards that this program has made: name it in data.train"):
        open_source(str(shards), SourceOptions())
    again = tiny_speech.shard(shards / "shard-000000.tar", tmp_path / "again")
    first, second = read_index([shards]), read_index([again])
    assert first.fingerprint() == second.fingerprint()
    assert np.array_equal(first.bytes, second.bytes)


def test_the_name_of_a_tar_is_no_part_of_its_identity_and_its_place_in_the_order_is(tmp_path):
    tiny_speech.webdataset(tmp_path / "x" / "a.tar", [{"__key__": "1", "txt": "ONE"}])
    tiny_speech.webdataset(tmp_path / "x" / "b.tar", [{"__key__": "2", "txt": "TWO"}])
    (tmp_path / "x" / "._a.tar").write_bytes(b"of a Mac")
    before = open_source(str(tmp_path / "x"), SourceOptions())
    assert [u.key for u in before.open()[1]] == ["1", "2"]
    (tmp_path / "x" / "a.tar").rename(tmp_path / "x" / "a2.tar")
    assert open_source(str(tmp_path / "x"), SourceOptions()).identity == before.identity
    (tmp_path / "x" / "a2.tar").rename(tmp_path / "x" / "c.tar")
    assert open_source(str(tmp_path / "x"), SourceOptions()).identity["digest"] != before.identity["digest"]
