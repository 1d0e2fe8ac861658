"""lhotse manifests as a source, written by lhotse, and what of them cannot be read."""

import gzip
import io
import json
import os

import numpy as np
import pytest
import soundfile
from lhotse import CutSet, Recording, RecordingSet, SupervisionSegment, SupervisionSet

from ddp_asr.data.audio import pack
from ddp_asr.data.index import read_index
from ddp_asr.data.sources import BAD_LINE, MISSING_AUDIO, MISSING_TRANSCRIPT, SourceOptions, open_source
from ddp_asr.errors import UserError
from tests import tiny_speech


def listed(source):
    return list(open_source(str(source), SourceOptions()).open()[1])


@pytest.fixture
def recording(tmp_path):
    """One second of noise, as FLAC."""
    (tmp_path / "a.flac").write_bytes(tiny_speech.encode(tiny_speech.noise(1)))
    return Recording.from_file(tmp_path / "a.flac", recording_id="r")


def said(identity, start=0.0, duration=1.0, **fields):
    fields = {"text": identity.upper(), "speaker": "me", "language": "English"} | fields
    return SupervisionSegment(id=identity, recording_id="r", start=start, duration=duration, **fields)


def cuts_of(recording, *supervisions):
    return CutSet.from_manifests(
        RecordingSet.from_recordings([recording]), SupervisionSet.from_segments(supervisions)
    ).trim_to_supervisions(keep_overlapping=False)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_cuts_and_a_set_of_the_same_supervisions_are_the_same_utterances(tmp_path, recording, suffix):
    supervisions = [said("one"), said("two", 0.25, 0.5, language=None), said("three", 0, 0.5)]
    cuts_of(recording, *supervisions).to_file(tmp_path / f"cuts{suffix}")
    for folder, name in (("set", "recordings"), ("set", "supervisions")):
        (tmp_path / folder).mkdir(exist_ok=True)
        manifest = RecordingSet.from_recordings([recording]) if name == "recordings" else None
        (manifest or SupervisionSet.from_segments(supervisions)).to_file(tmp_path / folder / f"x_{name}_y{suffix}")
    for source in (
        tmp_path / f"cuts{suffix}",
        tmp_path,
        tmp_path / "set",
        tmp_path / "set" / f"x_recordings_y{suffix}",
        tmp_path / "set" / f"x_supervisions_y{suffix}",
    ):
        found = listed(source)
        assert [(u.key, u.text, u.speaker, u.language) for u in found] == [
            ("one", "ONE", "me", "English"),
            ("two", "TWO", "me", ""),
            ("three", "THREE", "me", "English"),
        ]
        one, two, three = map(pack, found)
        assert one.flac == (tmp_path / "a.flac").read_bytes()  # what covers its recording is not encoded again
        waveform = tiny_speech.noise(1)
        assert np.array_equal(soundfile.read(io.BytesIO(two.flac), dtype="int16")[0], waveform[4000:12000])
        assert np.array_equal(soundfile.read(io.BytesIO(three.flac), dtype="int16")[0], waveform[:8000])


def test_lhotse_decodes_the_same_from_every_cut(tmp_path, recording):
    cuts = cuts_of(recording, *(said(f"u{n}", start, 0.21) for n, start in enumerate((0, 0.1001, 0.33337, 0.79))))
    cuts.to_file(tmp_path / "cuts.jsonl.gz")
    for cut, utterance in zip(cuts, listed(tmp_path / "cuts.jsonl.gz"), strict=True):
        ours = soundfile.read(io.BytesIO(pack(utterance).flac), dtype="int16")[0]
        assert np.array_equal(ours, (cut.load_audio()[0] * 32768).astype(np.int16))


def test_what_cannot_be_read_is_dropped_by_name_and_no_command_is_run(tmp_path, recording, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (cut,) = cuts_of(recording, said("good"))
    whole, part = cut.to_dict(), said("part", 0.5, 0.25)
    mixed = [cut.pad(duration=2), cut.mix(cut, offset_other_by=0.5), cut.append(cut)]
    plain = [cut.resample(8_000), cut.perturb_speed(0.9), cut.truncate(offset=0.5), cut.drop_supervisions()]
    entries = [each.to_dict() for each in (*mixed, *plain)]
    sources = [("command", "touch started"), ("url", "http://127.0.0.1:9/a.wav"), ("memory", "UklGRg=="), ("shar", "")]
    for kind, value in sources:
        entries.append(json.loads(json.dumps(whole)))
        entries[-1]["recording"]["sources"][0] |= {"type": kind, "source": value}
    entries.append(whole | {"supervisions": [whole["supervisions"][0], part.to_dict()]})
    entries.append(whole | {"channel": 1})
    entries.append({name: value for name, value in whole.items() if name != "recording"})
    tiny_speech.manifest(tmp_path / "cuts.jsonl", [*entries, "{", "[]", '{"id": 3}'])
    found = listed(tmp_path / "cuts.jsonl")
    told = [(pack(u).reason, pack(u).detail) for u in found]
    assert [reason for reason, _ in told] == [
        *[BAD_LINE] * 3,
        *["", BAD_LINE, BAD_LINE, MISSING_TRANSCRIPT],
        *[MISSING_AUDIO] * 4,
        *[BAD_LINE, BAD_LINE, MISSING_AUDIO],
        *[BAD_LINE] * 3,
    ]
    words = ["MixedCut"] * 3 + ["", "Speed", "longer than the cut", "", "command", "url", "memory", "shar"]
    words += ["trim_to_supervisions", "channel 1", "no recording", "not JSON", "not an object", "start is None"]
    assert all(word in detail for word, (_, detail) in zip(words, told, strict=True))
    assert not os.path.exists("started")


@pytest.mark.parametrize("order", [1, -1])
def test_cuts_and_lines_of_nemo_are_told_apart_by_what_they_hold(tmp_path, recording, order):
    cuts_of(recording, said("a")).to_file(tmp_path / "cuts.jsonl")
    cut = (tmp_path / "cuts.jsonl").read_text().strip()
    nemo = json.dumps({"audio_filepath": "a.flac", "text": "A", "start": 0, "duration": 1, "id": "n"})
    for name, line, kind in (("m.jsonl", cut, "lhotse"), ("cuts.jsonl", nemo, "manifest")):
        tiny_speech.manifest(tmp_path / name, ["", "no JSON", *[line, "[1]"][::order]])
        source = open_source(str(tmp_path / name), SourceOptions())
        assert source.identity["kind"] == kind
        assert [u.reason for u in source.open()[1]].count("") == 1


def test_relative_paths_start_at_the_manifest_else_at_the_current_directory(tmp_path, monkeypatch):
    for folder in ("here", "manifests"):
        (tmp_path / folder).mkdir()
    for name in ("here/both.flac", "here/a.flac", "manifests/both.flac"):
        (tmp_path / name).write_bytes(tiny_speech.encode(tiny_speech.noise(0.2)))
    monkeypatch.chdir(tmp_path / "here")
    recordings = [Recording.from_file(path, recording_id=path) for path in ("both.flac", "a.flac")]
    CutSet.from_manifests(RecordingSet.from_recordings(recordings)).to_file(tmp_path / "manifests" / "c.jsonl")
    both, a = (os.path.realpath(u.path) for u in listed(tmp_path / "manifests" / "c.jsonl"))
    assert (both, a) == (str(tmp_path / "manifests" / "both.flac"), str(tmp_path / "here" / "a.flac"))


def test_several_sets_and_half_a_set_are_refused_by_name(tmp_path, recording):
    RecordingSet.from_recordings([recording]).to_file(tmp_path / "recordings_a.jsonl.gz")
    with pytest.raises(UserError, match=r"half a set .*supervisions_a.jsonl.gz is no file of supervisions"):
        listed(tmp_path)
    SupervisionSet.from_segments([said("a")]).to_file(tmp_path / "supervisions_a.jsonl.gz")
    assert [u.key for u in listed(tmp_path)] == ["a"]
    cuts_of(recording, said("b")).to_file(tmp_path / "cuts.jsonl")
    with pytest.raises(UserError, match=r"several sets of lhotse manifests: cuts.jsonl, recordings_a.jsonl.gz; name"):
        listed(tmp_path)
    assert [u.key for u in listed(tmp_path / "cuts.jsonl")] == ["b"]


def test_a_recording_without_supervision_and_a_supervision_without_recording_are_listed(tmp_path, recording):
    RecordingSet.from_recordings([recording]).to_file(tmp_path / "recordings.jsonl")
    astray = SupervisionSegment(id="astray", recording_id="gone", start=0, duration=1, text="A")
    SupervisionSet.from_segments([astray]).to_file(tmp_path / "supervisions.jsonl")
    told = [(u.key, pack(u).reason, pack(u).detail) for u in listed(tmp_path)]
    assert told == [("astray", MISSING_AUDIO, "no recording gone"), ("r", MISSING_TRANSCRIPT, "")]


def test_damaged_manifests_are_refused_in_one_sentence(tmp_path, recording, monkeypatch):
    path = tmp_path / "cuts.jsonl.gz"
    cuts_of(recording, *(said(f"{n}", n / 300, 0.002) for n in range(300))).to_file(path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    for content in (whole[: len(whole) // 2], whole[:-4], bytes(flipped), whole[:3], b"no gzip", whole + b"more"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"cuts.jsonl.gz is damaged or cut short \("):
            listed(path)
    monkeypatch.setattr("ddp_asr.data.sources.lhotse.MAX_LINE_BYTES", 1 << 16)
    path.write_bytes(gzip.compress(b" " * (1 << 20)))
    with pytest.raises(UserError, match=r"line 1 has over"):
        listed(path)


def test_shards_of_cuts_keep_language_and_speaker(tmp_path, recording):
    cuts_of(recording, said("a")).to_file(tmp_path / "cuts.jsonl.gz")
    shards = tiny_speech.shard(tmp_path / "cuts.jsonl.gz", tmp_path / "shards", "--verify", "--strict")
    assert read_index([shards]).keys.to_pylist() == ["a"]
