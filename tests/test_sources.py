"""Sources: what every format must do, and then the formats one by one; downloads come from a real HTTP server."""

import csv
import gzip
import hashlib
import io
import itertools
import json
import os
import tarfile
import tempfile
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ddp_asr.data.audio import pack
from ddp_asr.data.index import read_index
from ddp_asr.data.sources import (
    BAD_AUDIO,
    BAD_LINE,
    DUPLICATE,
    FORMATS,
    IMPLAUSIBLE,
    MISSING_AUDIO,
    MISSING_TRANSCRIPT,
    SourceOptions,
    make_key,
    open_source,
    openslr,
)
from ddp_asr.data.sources.librispeech import read_transcripts
from ddp_asr.data.sources.openslr import fetch
from ddp_asr.data.writer import write_shards
from ddp_asr.errors import UserError
from tests import tiny_speech
from tests.http_server import serving


def listed(source):
    return list(open_source(str(source), SourceOptions(cache=Path("/unused"))).open()[1])


# ---- every registered format ----------------------------------------------------------------------------------------

SPEECH = {  # key -> (text, int16 waveform at 16 kHz); None: missing
    "7-1-0000": ("ONE", tiny_speech.noise(0.2, seed=0)),
    "7-1-0001": ("TWO  TWO", tiny_speech.noise(0.3, seed=1)),
    "7-2-0000": ("GONE", None),
    "8-1-0000": (None, tiny_speech.noise(0.3, seed=2)),
    "8-1-0001": ("LE NA\u00cfF", tiny_speech.noise(0.1, seed=3)),
    "9-1-0000": ("LAST", tiny_speech.noise(0.2, seed=4)),
}


def lay_out_librispeech(root, speech, monkeypatch):
    for key, (text, waveform) in speech.items():
        chapter = root / "split" / key[0] / key[2]
        chapter.mkdir(parents=True, exist_ok=True)
        if waveform is not None:
            (chapter / f"{key}.flac").write_bytes(tiny_speech.encode(waveform))
        with (chapter / f"{key[:3]}.trans.txt").open("a", encoding="utf-8") as transcripts:
            transcripts.write("" if text is None else f"{key} {text}\n")
    return root / "split"


def lay_out_archive(root, speech, monkeypatch):
    directory = lay_out_librispeech(root, speech, monkeypatch)
    return tiny_speech.archive(root / "split.tar.gz", directory)


def lay_out_manifest(root, speech, monkeypatch):
    entries = []
    for key, (text, waveform) in speech.items():
        (root / "wav").mkdir(parents=True, exist_ok=True)
        if waveform is not None:
            (root / "wav" / f"{key}.wav").write_bytes(tiny_speech.encode(waveform, format="WAV"))
        entry = {"audio_filepath": f"wav/{key}.wav", "id": key, "speaker": int(key[0])}
        entries.append(entry if text is None else entry | {"text": text})
    return tiny_speech.manifest(root / "split.jsonl", entries)


def lay_out_openslr(root, speech, monkeypatch):
    archive = lay_out_archive(root, speech, monkeypatch).rename(root / "dev-clean.tar.gz")
    monkeypatch.setitem(openslr.LIBRISPEECH_MD5, "dev-clean", hashlib.md5(archive.read_bytes()).hexdigest())
    return "dev-clean"


def lay_out_recordings(root, speech, monkeypatch):
    for key, (_, waveform) in speech.items():
        if waveform is not None:
            (root / "noises").mkdir(parents=True, exist_ok=True)
            (root / "noises" / f"{key}.wav").write_bytes(tiny_speech.encode(waveform, format="WAV"))
    return root / "noises"


def lay_out_folder(root, speech, monkeypatch):
    (root / "mine").mkdir(parents=True, exist_ok=True)
    for key, (text, waveform) in speech.items():
        if waveform is not None:
            (root / "mine" / f"{key}.wav").write_bytes(tiny_speech.encode(waveform, format="WAV"))
        if text is not None:
            (root / "mine" / f"{key}.{'lab' if key[0] == '9' else 'txt'}").write_text(text + "\n", encoding="utf-8")
    return root / "mine"


def lay_out_table(root, speech, monkeypatch):
    """Common Voice's layout, without the columns that nothing reads."""
    (root / "clips").mkdir(parents=True, exist_ok=True)
    lines = ["client_id\tpath\tsentence\tup_votes\tlocale"]
    for key, (text, waveform) in speech.items():
        if waveform is not None:
            (root / "clips" / f"{key}.wav").write_bytes(tiny_speech.encode(waveform, format="WAV"))
        lines.append(f"{key[0]}\t{key}.wav\t{text or ''}\t2\tfr")
    (root / "split.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root / "split.tsv"


def lay_out_kaldi(root, speech, monkeypatch):
    for key, (_, waveform) in speech.items():
        (root / "data" / "wav").mkdir(parents=True, exist_ok=True)
        if waveform is not None:
            (root / "data" / "wav" / f"{key}.wav").write_bytes(tiny_speech.encode(waveform, format="WAV"))
    return kaldi(
        root / "data",
        **{"wav.scp": [f"{key} wav/{key}.wav" for key, (_, waveform) in speech.items() if waveform is not None]},
        text=[f"{key} {text}" for key, (text, _) in speech.items() if text is not None],
        utt2spk=[f"{key} {key[0]}" for key in speech],
    )


def kaldi(root, **files):
    root.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (root / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return root


def lay_out_lhotse(root, speech, monkeypatch):
    """Recordings and supervisions, written by lhotse."""
    from lhotse import Recording, RecordingSet, SupervisionSegment, SupervisionSet

    (root / "set").mkdir(parents=True)
    recordings, supervisions = [], []
    for key, (text, waveform) in speech.items():
        path = root / "set" / f"{key}.wav"
        path.write_bytes(tiny_speech.encode(tiny_speech.noise() if waveform is None else waveform, format="WAV"))
        recordings.append(Recording.from_file(path, recording_id=f"r-{key}"))
        whole = {"id": key, "recording_id": f"r-{key}", "start": 0, "duration": recordings[-1].duration}
        supervisions.append(SupervisionSegment(**whole, text=text, speaker=key[0]))
        if waveform is None:
            path.unlink()
    RecordingSet.from_recordings(recordings).to_file(root / "set" / "mine_recordings_dev.jsonl.gz")
    SupervisionSet.from_segments(supervisions).to_file(root / "set" / "mine_supervisions_dev.jsonl.gz")
    return root / "set"


def lay_out_huggingface(root, speech, monkeypatch):
    """Written by `datasets`, in two files."""
    rows = []
    for key, (text, waveform) in speech.items():
        audio = None if waveform is None else {"bytes": tiny_speech.encode(waveform), "path": f"{key}.flac"}
        rows.append({"audio": audio, "text": text, "id": key, "speaker_id": int(key[0])})
    tiny_speech.huggingface(rows).save_to_disk(root / "saved", num_shards=2)
    return root / "saved"


def lay_out_webdataset(root, speech, monkeypatch):
    """Two tars, and samples in the order in which other programs write their members."""
    samples = []
    for key, (text, waveform) in speech.items():
        samples.append({"__key__": key, "json": {"speaker": key[0], "samples": 5}})
        samples[-1] |= {} if text is None else {"txt": text}
        samples[-1] |= {} if waveform is None else {"wav": tiny_speech.encode(waveform, format="WAV")}
    tiny_speech.webdataset(root / "tars" / "a-0.tar", samples[:3])
    tiny_speech.webdataset(root / "tars" / "a-1.tar", samples[3:])
    return root / "tars"


LAY_OUT = {
    "librispeech": lay_out_librispeech,
    "archive": lay_out_archive,
    "kaldi": lay_out_kaldi,
    "folder": lay_out_folder,
    "lhotse": lay_out_lhotse,
    "manifest": lay_out_manifest,
    "table": lay_out_table,
    "webdataset": lay_out_webdataset,
    "huggingface": lay_out_huggingface,
    "openslr": lay_out_openslr,
    "recordings": lay_out_recordings,
}
WITHOUT_TEXT = {"recordings"}
WITHOUT_SPEAKERS = {"recordings", "folder"}


@pytest.fixture(params=FORMATS)
def lay_out(request, tmp_path, monkeypatch):
    """Lays the speech out in a format, in a directory of this name; returns the opened source."""

    def make(speech=SPEECH, directory="here"):
        name = LAY_OUT[request.param](tmp_path / directory, speech, monkeypatch)
        options = SourceOptions(cache=tmp_path / directory, no_text=request.param in WITHOUT_TEXT)
        return open_source(str(name), options)

    make.has_text = request.param not in WITHOUT_TEXT
    make.has_speakers = request.param not in WITHOUT_SPEAKERS
    return make


def test_every_format_has_its_test():
    assert set(LAY_OUT) == set(FORMATS)


def test_a_source_gives_the_same_speech_in_every_format(lay_out):
    speech = SPEECH
    if not lay_out.has_text:
        speech = {key: (None, waveform) for key, (_, waveform) in SPEECH.items() if waveform is not None}
    source = lay_out()
    total, utterances = source.open()
    found = {u.key: (u, pack(u)) for u in utterances}
    assert set(found) == set(speech)
    assert total == len(speech)
    for key, (text, waveform) in speech.items():
        utterance, packed = found[key]
        assert utterance.source and utterance.speaker == (key[0] if lay_out.has_speakers else "")
        if not lay_out.has_text:
            assert not utterance.has_text
        elif waveform is None or text is None:
            assert packed.reason == (MISSING_AUDIO if waveform is None else MISSING_TRANSCRIPT)
            continue
        assert (utterance.text, packed.reason) == (text, "")
        assert np.array_equal(soundfile.read(io.BytesIO(packed.flac), dtype="int16")[0], waveform)


@pytest.mark.slow
def test_40_real_utterances_have_the_same_shards_in_every_format(lay_out, dev_speech, tmp_path):
    speech = {u.key: (u.text, soundfile.read(u.path, dtype="int16")[0]) for u in listed(dev_speech)[:40]}
    settings = {"shard_mb": 256, "max_seconds": None, "workers": 1, "report": lambda *_: None}
    assert not write_shards(lay_out(speech), tmp_path / "shards", **settings)["dropped"]
    index = read_index([tmp_path / "shards"])
    packed = Path(index.shards[0]).read_bytes()
    assert set(index.keys.to_pylist()) == set(speech)
    for row in range(len(index)):
        text, waveform = speech[index.key(row)]
        assert index.text(row) == (text if lay_out.has_text else "")
        start = int(index.offset[row])
        flac = io.BytesIO(packed[start : start + int(index.bytes[row])])
        assert np.array_equal(soundfile.read(flac, dtype="int16")[0], waveform)


def test_a_source_has_the_same_order_whenever_it_is_opened_and_can_be_continued_anywhere(lay_out):
    source = lay_out()
    whole = list(source.open()[1])
    for consumed in range(len(whole) + 1):
        assert list(itertools.islice(source.open()[1], consumed, None)) == whole[consumed:]


def test_the_identity_of_a_source_is_its_content(lay_out):
    identity = lay_out().identity
    assert set(identity) == {"kind", "name", "digest"}
    key = next(iter(SPEECH))
    text, waveform = SPEECH[key]
    changes = {
        **({"text": SPEECH | {key: ("ANOTHER", waveform)}} if lay_out.has_text else {}),
        "audio": SPEECH | {key: (text, waveform[:-160])},
        "utterance": SPEECH | {"9-9-0000": ("NEW", waveform)},
    }
    digests = [lay_out(speech, directory).identity["digest"] for directory, speech in changes.items()]
    assert len({identity["digest"], *digests}) == 1 + len(changes)


# ---- keys -----------------------------------------------------------------------------------------------------------


@given(st.text(alphabet=st.characters(), max_size=40))
def test_a_key_holds_nothing_that_webdataset_would_cut(name):
    key = make_key(name)
    assert not set(key) & set("./ ")
    assert not any(unicodedata.category(c) in ("Cc", "Cs") for c in key)
    key.encode("utf-8")
    assert make_key(key) == key
    assert len(key) == len(name)
    assert all(after in (before, "_") for before, after in zip(name, key, strict=True))


@given(st.text(alphabet=st.characters(categories=["L", "N"], include_characters="-_'"), min_size=1))
def test_a_harmless_id_is_its_own_key(name):
    assert make_key(name) == name


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


def test_a_path_that_no_file_system_has_is_dropped_by_name(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"audio_filepath": "b\\ud800.wav", "text": "A"}\n')
    (utterance,) = listed(tmp_path / "m.jsonl")
    assert utterance.key == "b_" and pack(utterance).reason in (MISSING_AUDIO, BAD_AUDIO)


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
    assert read_transcripts("a ONE\u2028TWO\x0bTHREE\r\n\nb\n".encode()) == {
        "a": "ONE\u2028TWO\x0bTHREE",
        "b": "",
    }


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path, mark, end):
    lines = [b'{"audio_filepath": "7-1-%d.flac", "text": "N %d"}' % (n, n) for n in range(2)]
    (tmp_path / "m.jsonl").write_bytes(mark + end.join(lines))
    root = unpack(tmp_path / "a", members := [("7-1.trans.txt", mark + b"7-1-0 N 0" + end + b"7-1-1 N 1")])
    for source in (tmp_path / "m.jsonl", root, tar_gz(tmp_path / "a.tar.gz", members)):
        assert [(u.key, u.text) for u in listed(source)] == [("7-1-0", "N 0"), ("7-1-1", "N 1")]


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


def test_a_language_is_part_of_the_identity_and_none_leaves_it_as_it_was(tmp_path):
    entries = [{"audio_filepath": "a.wav", "text": "A"} | more for more in ({}, {"lang": "en"}, {"language": "de"})]
    sources = [open_source(str(tiny_speech.manifest(tmp_path / "m.jsonl", [e])), SourceOptions()) for e in entries]
    assert [u.language for source in sources for u in source.open()[1]] == ["", "en", "de"]
    row = ["a", "a.wav", "A", "", None, None, -1]
    digest = hashlib.sha256(json.dumps(row).encode()).hexdigest()
    assert [source.identity["digest"] == digest for source in sources] == [True, False, False]


@pytest.mark.parametrize("content", [b"", b"a,b\nc,d\n", b"RIFF\xff\xfe\x00"])
def test_a_file_that_is_no_manifest_is_refused(tmp_path, content):
    (tmp_path / "m.jsonl").write_bytes(content)
    with pytest.raises(UserError, match="manifest"):
        listed(tmp_path / "m.jsonl")


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        (
            ".",
            r"is in no known format, a directory with 5 files \(2 .zip, 1 without suffix, 1 .xml, 1 .wav\), "
            r"such as .hidden and a.zip; a source is",
        ),
        ("b", r"b is in no known format, a directory with 1 file \(1 .wav\), such as c/d.wav; a source is"),
        ("empty", "empty is in no known format, a directory with 0 files; a source is"),
        ("a.zip", "a.zip is in no known format, a file that begins with the bytes 50 4b 03 04; a source is"),
        ("mine.xml", "mine.xml is in no known format, a file that begins with the text '<a>.*\u00dc'; a source is"),
        ("none.zip", "none.zip is in no known format, a file that is empty; a source is"),
        ("train-clean-101", "is neither a file nor a directory"),
    ],
)
def test_an_unknown_source_is_told_what_is_known(tmp_path, name, seen):
    members = [("a.zip", b"PK\3\4"), ("none.zip", b""), (".hidden", b""), ("b/c/d.wav", b"RIFF")]
    unpack(tmp_path, [*members, ("mine.xml", "<a>\n\u00dc".encode())])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=f"no such source: .*{seen}") as refused:
        listed(tmp_path / name)
    assert all(format.split(" (")[0] in str(refused.value) for format in FORMATS.values())


def test_the_message_names_every_split():
    assert all(split in FORMATS["openslr"] for split in (*openslr.LIBRISPEECH_MD5, *openslr.RECORDINGS))


# ---- folders of audio and texts -------------------------------------------------------------------------------------

FOLDER = [
    ("a/one.flac", b"1"),
    ("a/one.txt", b"\xef\xbb\xbfONE\r\n  AND \r\n\r\nONE\n"),
    ("a/one.lab", b"not this one"),
    ("b/two.three.WAV", b"2"),
    ("b/two.three.LAB", "ZWEI\u2028DREI".encode()),
    ("b/empty.wav", b"3"),
    ("b/empty.txt", b" \n"),
    ("b/mute.wav", b"4"),
    ("b/wide.wav", b"5"),
    ("b/wide.txt", "WIDE".encode("utf-16")),
    ("b/nul.wav", b"6"),
    ("b/nul.txt", "NUL".encode("utf-16-le")),
    ("b/._mute.txt", b"left by macOS"),
    ("b/gone.txt", b"GONE"),
    ("b/README.txt", b"who may use it"),
    ("b/License-2.0.TXT", b"who may use it"),
    ("documents/about.txt", b"a folder without audio"),
    ("c/hum.wav", b"7"),
    ("c/about.txt", b"a folder without transcripts"),
]


def test_a_folder_takes_the_text_beside_each_audio_file(tmp_path):
    found = [(u.source, u.key, u.text, u.reason, u.detail) for u in listed(unpack(tmp_path / "mine", FOLDER))]
    assert found == [
        ("a/one.flac", "a_one", "ONE AND ONE", "", ""),
        ("b/empty.wav", "b_empty", "", "", ""),
        ("b/mute.wav", "b_mute", None, "", ""),
        ("b/nul.wav", "b_nul", None, MISSING_TRANSCRIPT, "nul.txt is not UTF-8 text, since it has NUL bytes"),
        ("b/two.three.WAV", "b_two_three", "ZWEI\u2028DREI", "", ""),
        ("b/wide.wav", "b_wide", None, MISSING_TRANSCRIPT, "wide.txt is not UTF-8"),
        ("c/hum.wav", "c_hum", None, "", ""),
        ("b/gone.txt", "b_gone", "GONE", MISSING_AUDIO, ""),
    ]


def test_a_transcript_of_any_size_is_no_transcript(tmp_path, monkeypatch):
    monkeypatch.setattr("ddp_asr.data.sources.folder.MAX_TEXT_BYTES", 4)
    members = [("a.wav", b"1"), ("a.txt", b"FOUR"), ("b.wav", b"2"), ("b.txt", "FIV\u00c9".encode())]
    assert [(u.text, u.reason) for u in listed(unpack(tmp_path / "mine", members))] == [
        ("FOUR", ""),
        (None, MISSING_TRANSCRIPT),
    ]


def test_a_directory_of_audio_and_documents_is_no_folder_of_speech(tmp_path):
    members = [("a/hum.wav", b"1"), ("a/README.txt", b"x"), ("b/hum.txt", b"elsewhere"), ("b/street.txt", b"y")]
    with pytest.raises(UserError, match="is in no known format"):
        listed(unpack(tmp_path / "noises", members))


# ---- tables ---------------------------------------------------------------------------------------------------------


def table(path, content, columns=""):
    """(key, text, speaker, language, path, offset, duration) of the usable rows, (line, reason) of the others."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    utterances = list(open_source(str(path), SourceOptions(columns=columns)).open()[1])
    rows = []
    for u in utterances:
        audio = u.path and str(u.path.relative_to(path.parent))
        seen = (u.key, u.text, u.speaker, u.language, audio, u.offset_s, u.duration_s)
        rows.append((u.source, u.reason, u.detail) if u.reason else seen)
    return rows


CELLS = st.text(alphabet=st.sampled_from("aB 0,;|\t\"'\r\n\u00e9\u2028"), max_size=6)


@settings(max_examples=200)
@given(
    st.lists(st.tuples(CELLS, CELLS.filter(bool)), min_size=1, max_size=5),
    st.sampled_from([(",", ".csv"), (";", ".CSV"), ("|", ".csv"), ("\t", ".csv"), ("\t", ".tsv")]),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from(["", "\ufeff"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
)
def test_a_table_is_read_as_pythons_csv_writes_it(rows, kind, end, mark, quoting):
    # Python's writer leaves a carriage return unquoted that its own reader takes for the end of the line.
    assume(end != "\n" or quoting != csv.QUOTE_MINIMAL or not any("\r" in cell for row in rows for cell in row))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"t{kind[1]}"
        with path.open("w", newline="", encoding="utf-8") as file:
            file.write(mark)
            writer = csv.writer(file, delimiter=kind[0], lineterminator=end, quoting=quoting)
            writer.writerows([("audio", "Text", "id", "other"), *((*row, n, "x") for n, row in enumerate(rows))])
        found = [(u.source, u.text, u.key) for u in listed(path) if not u.reason]
        assert found == [(audio, text, str(n)) for n, (audio, text) in enumerate(rows) if audio]


def test_the_columns_of_known_tables_are_known(tmp_path):
    rows = [("a.mp3", 'Er sagte: "Nein', "s"), ("b.mp3", '"Ja"', "t")]
    common_voice = "client_id\tpath\tsentence_id\tsentence\tlocale\tsegment\n"
    common_voice += "".join(f"{who}\t{path}\t7\t{text}\tde\t\n" for path, text, who in rows)
    (tmp_path / "clips").mkdir()
    assert table(tmp_path / "validated.tsv", common_voice) == [
        (path[0], text, who, "de", f"clips/{path}", None, None) for path, text, who in rows
    ]
    deep_speech = 'wav_filename,wav_filesize,transcript\nclips/a.wav,32044,"one, two"\nb.wav,1,three\n'
    assert table(tmp_path / "train.csv", deep_speech) == [
        ("clips_a", "one, two", "", "", "clips/a.wav", None, None),
        ("b", "three", "", "", "b.wav", None, None),
    ]
    segments = "audio_filepath;start;end;text;speaker;language\na.wav;0.5;1.75;A;me;pl\na.wav;;1;B;;\na.wav;2;;C;;\n"
    assert table(tmp_path / "segments.csv", segments) == [
        ("a-500", "A", "me", "pl", "a.wav", 0.5, 1.25),
        ("a", "B", "", "", "a.wav", None, 1.0),
        ("a-2000", "C", "", "", "a.wav", 2.0, None),
    ]


def test_columns_choose_what_the_header_leaves_open(tmp_path):
    content = "id,take,text,words,from\nme,a.wav,raw,clean,1\nme,b.wav,raw,clean,2\n"
    chosen = "audio=take, text=words, speaker=id, offset=from"
    expected = [("a-1000", "clean", "me", "", "a.wav", 1.0, None), ("b-2000", "clean", "me", "", "b.wav", 2.0, None)]
    assert table(tmp_path / "t.csv", content, chosen) == expected
    assert table(tmp_path / "t.list", content, chosen) == expected  # a name of any kind
    assert [row[0] for row in table(tmp_path / "t.csv", content, "audio=take,text=words,id=")] == ["a", "b"]


def test_a_malformed_row_is_kept_with_its_reason(tmp_path):
    rows = ["audio,text,offset,duration", "a.wav,A,,", "b.wav,B,,,", "c.wav,C", ",D,,", "e.wav,E,x,", "f.wav,F,nan,"]
    rows += ["g.wav,G,,0", 'h.wav,"H"H,,', f"i.wav,{'I' * 200_000},,", "", "j.wav,,,", 'k.wav,"K,,', "l.wav,L,,"]
    assert table(tmp_path / "t.csv", "\n".join(rows)) == [
        ("a", "A", "", "", "a.wav", None, None),
        ("t.csv:3", BAD_LINE, "5 columns, where the header has 4"),
        ("t.csv:4", BAD_LINE, "2 columns, where the header has 4"),
        ("t.csv:5", BAD_LINE, "no audio"),
        ("t.csv:6", BAD_LINE, "offset is 'x', not a number of seconds"),
        ("t.csv:7", BAD_LINE, "offset is nan, not a number of seconds"),
        ("t.csv:8", BAD_LINE, "duration is 0; leave it out to take the audio to the end of the file"),
        ("t.csv:9", BAD_LINE, "',' expected after '\"'"),
        ("t.csv:10", BAD_LINE, "field larger than field limit (131072)"),
        ("j", None, "", "", "j.wav", None, None),
        ("t.csv:13", BAD_LINE, "lines 13 to 14: unexpected end of data"),
    ]
    (row,) = table(tmp_path / "t.tsv", 'audio\ttext\na.wav\t"A"A')
    assert row == ("t.tsv:2", BAD_LINE, "'tab' expected after '\"'")
    (row,) = table(tmp_path / "t.csv", "audio,text,start,end\na.wav,A,2,1")
    assert row == ("t.csv:2", BAD_LINE, "end is 1.0, which is not after the start")


@pytest.mark.parametrize(
    ("content", "columns", "said"),
    [
        (b"", "", "has no known column for audio and text"),
        (
            b"LJ001-0001|Printing, in|the only\n",
            "",
            "for audio and text; its columns are LJ001-0001, Printing, in, the",
        ),
        (b"path,words\na.wav,A\n", "", "for text; its columns are path, words; name them, as with --columns audio="),
        (b"path,file,text\n", "", "has several columns for audio: path and file; choose one, as with --columns"),
        (b"path,text,text\n", "text=text", "has several columns for text: text and text; choose one"),
        (b"path,text\n", "text=words", "has no column words; its columns are path, text"),
        (b"path,text\n", "txt=text", "--columns has 'txt=text'; it names each field once, as in --columns audio=path"),
        (b"path,text\n", "text", "--columns has 'text'; "),
        (b"path,text\n", "text=text,text=path", "--columns has 'text=path'; it names each field once"),
        ("path,text\na.wav,\u00fc\n".encode("latin-1"), "", "is not UTF-8 text; save it as UTF-8, or convert it"),
        ("path,text\na.wav,A\n".encode("utf-16"), "", "is not UTF-8 text"),
        (b"path,text\na.wav,\0\n", "", "is not UTF-8 text"),
        (b'path,"text\n' + b"A" * 200_000, "", "its first line is no header of a table: .* field larger than"),
    ],
)
def test_what_is_no_table_is_one_sentence(tmp_path, content, columns, said):
    with pytest.raises(UserError, match=said):
        table(tmp_path / "t.csv", content, columns)


def test_columns_of_what_is_no_table_are_refused(tmp_path):
    root = tiny_speech.librispeech(tmp_path / "split", speakers=1, utterances=1)
    with pytest.raises(UserError, match=r"--columns names columns of a table, and .*split is a LibriSpeech directory"):
        open_source(str(root), SourceOptions(columns="audio=path"))


# ---- Kaldi directories ----------------------------------------------------------------------------------------------

KALDI = {
    "wav.scp": [
        *("talk  data/talk.wav ", "b\t/elsewhere/b.wav", "command flac -c -d b.flac |", "start | cat b.wav"),
        *("ark raw.ark:1234", "none", "twice one.wav", "twice other.wav"),
    ],
    "segments": [
        *("u-3 talk 1.5 2.25", "u-1 talk 0 0.5", "u-2 talk 3 -1", "u-1 talk 5 6", "u-4 gone 0 1", "u-5 command 0 1"),
        *(
            "u-6 start 0 1",
            "u-7 ark 0 1",
            "u-8 none 0 1",
            "v-1 talk 0",
            "v-2 talk 1 1",
            "v-3 talk x 1",
            "v-4 talk 0 -2",
        ),
        *("v-5 talk 0 1 1", "v-6 talk", "w twice 0 1"),
    ],
    "text": ["u-3 THREE  WORDS ", "u-1 ONE", "x-9 NO AUDIO", "u-5 FIVE", "", "u-7"],
    "utt2spk": ["u-1 anna", "u-3 otto"],
    "utt2lang": ["u-1 de"],
}


def test_a_kaldi_directory_is_read_with_its_segments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "talk.wav").write_bytes(b"as Kaldi, from where it runs")
    utterances = listed(kaldi(tmp_path / "corpus", **KALDI))
    found = [
        (u.key, u.text, u.speaker, u.language, str(u.path), u.offset_s, u.duration_s) for u in utterances if u.path
    ]
    talk = "data/talk.wav"
    assert found == [
        ("u-1", "ONE", "anna", "de", talk, 0.0, 0.5),
        ("u-1", "ONE", "anna", "de", talk, 5.0, 1.0),
        ("u-2", None, "", "", talk, 3.0, None),
        ("u-3", "THREE  WORDS", "otto", "", talk, 1.5, 0.75),
        ("w", None, "", "", str(tmp_path / "corpus" / "one.wav"), 0.0, 1.0),
        ("w", None, "", "", str(tmp_path / "corpus" / "other.wav"), 0.0, 1.0),
    ]
    never, archive = "a command is never run; write its output", "a place in a Kaldi archive is not read; write the"
    dropped = [(u.key, u.source, u.reason, u.detail) for u in utterances if u.reason]
    expected = [
        ("u-4", "u-4", MISSING_AUDIO, "wav.scp has no gone"),
        ("u-5", "flac -c -d b.flac |", MISSING_AUDIO, never),
        ("u-6", "| cat b.wav", MISSING_AUDIO, never),
        ("u-7", "raw.ark:1234", MISSING_AUDIO, archive),
        ("u-8", "u-8", MISSING_AUDIO, "wav.scp has no path for it"),
        ("v-1", "v-1", BAD_LINE, "in segments: 3 columns, not 4"),
        ("v-2", "v-2", BAD_LINE, "in segments: end is 1, which is not after the start"),
        ("v-3", "v-3", BAD_LINE, "in segments: start is 'x', not a number of seconds"),
        ("v-4", "v-4", BAD_LINE, "in segments: end is -2.0, not a number of seconds"),
        ("v-5", "v-5", BAD_LINE, "in segments: 5 columns, not 4"),
        ("v-6", "v-6", BAD_LINE, "in segments: 2 columns, not 4"),
        ("x-9", "x-9", MISSING_AUDIO, ""),
    ]
    assert [entry[:3] for entry in dropped] == [entry[:3] for entry in expected]
    assert all(entry[3].startswith(wanted[3]) for entry, wanted in zip(dropped, expected, strict=True))


def test_the_order_of_a_kaldi_directory_is_that_of_its_ids(tmp_path):
    files = {"wav.scp": ["b b.wav", "a a.wav", "c c.wav"], "text": ["c C", "a A", "b B"]}
    backwards = {name: lines[::-1] for name, lines in files.items()}
    one, other = (listed(kaldi(tmp_path / str(n) / "d", **each)) for n, each in enumerate((files, backwards)))
    assert [(u.key, u.text, u.path.name) for u in one] == [
        ("a", "A", "a.wav"),
        ("b", "B", "b.wav"),
        ("c", "C", "c.wav"),
    ]
    assert [(u.key, u.text, u.source) for u in one] == [(u.key, u.text, u.source) for u in other]


def test_commands_alone_are_refused_by_name_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = kaldi(tmp_path / "data", **{"wav.scp": ["a touch started |", "b touch started |"], "text": ["a A", "b B"]})
    with pytest.raises(
        UserError, match=r"data has no usable .* the first is touch started \| \(a command is never run"
    ):
        tiny_speech.shard(root, tmp_path / "out")
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("name", ["wav.scp", "text", "segments", "utt2spk", "utt2lang"])
@pytest.mark.parametrize("content", ["a \u00fc".encode("latin-1"), "a b".encode("utf-16")])
def test_a_file_of_a_kaldi_directory_in_another_encoding_is_named(tmp_path, name, content):
    root = kaldi(tmp_path / "data", **{"wav.scp": ["a a.wav"], "text": ["a A"]})
    (root / name).write_bytes(content)
    with pytest.raises(UserError, match=f"data/{name} is not UTF-8 text"):
        listed(root)


def test_a_kaldi_directory_without_text_is_told(tmp_path):
    with pytest.raises(UserError, match=r"has a wav.scp, .* but no file `text`"):
        listed(kaldi(tmp_path / "data", **{"wav.scp": ["a a.wav"]}))


# ---- audio without transcripts --------------------------------------------------------------------------------------


def audio_of(source):
    """(key, path shown) -> content, of a source without transcripts; none of its recordings is dropped."""
    total, utterances = source.open()
    found = {(u.key, u.source): audio_bytes(u) for u in utterances}
    assert len(found) == total
    return found


NOISES = [
    ("a/hum.wav", b"1"),
    ("a/b/street.flac", b"22"),
    ("read me.txt", b"x"),
    ("a/._hum.wav", b"y"),
    ("z.WAV", b"3"),
]


def zipped(path, members, method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members:
            file.writestr(name, content)
    return path


def test_recordings_are_the_same_in_a_directory_a_tar_and_a_zip(tmp_path):
    without_text = SourceOptions(no_text=True)
    places = [unpack(tmp_path / "noises", NOISES), tar_gz(tmp_path / "noises.tar.gz", NOISES)]
    places += [zipped(tmp_path / "noises.zip", NOISES)]
    found = [audio_of(open_source(str(place), without_text)) for place in places]
    assert found[0] == {("a_hum", "a/hum.wav"): b"1", ("a_b_street", "a/b/street.flac"): b"22", ("z", "z.WAV"): b"3"}
    assert found[0] == found[1] == found[2]


def test_audio_without_transcripts_is_not_taken_unasked(tmp_path):
    for place in (unpack(tmp_path / "noises", NOISES), zipped(tmp_path / "noises.zip", NOISES)):
        with pytest.raises(UserError, match=r"is in no known format, .*; a source is .* with --no-text, a directory"):
            listed(place)
    assert all(u.has_text and u.text is None for u in listed(tar_gz(tmp_path / "noises.tar.gz", NOISES)))


@pytest.mark.parametrize("name", ["dev-clean", "mine.jsonl", "nothing"])
def test_what_has_transcripts_or_no_audio_is_refused_with_no_text(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    tiny_speech.manifest(tmp_path / "mine.jsonl", [{"audio_filepath": "a.wav", "text": "A"}])
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match=f"no such source: {name} is "):
        open_source(name, SourceOptions(no_text=True))


def test_noises_and_rooms_come_by_name_from_their_folder_of_the_archive(tmp_path, monkeypatch):
    """Fetched once: the second folder is of the archive in the cache."""
    folders = {name: recordings.folder for name, recordings in openslr.RECORDINGS.items()}
    members = [(f"{folder}x/{name}.wav", name.encode()) for name, folder in folders.items()]
    members += [("RIRS_NOISES/real_rirs_isotropic_noises/other.wav", b"other"), ("musan/README", b"read me")]
    for archive, pack_it in (("musan.tar.gz", tar_gz), ("rirs_noises.zip", zipped)):
        content = pack_it(tmp_path / archive, members).read_bytes()
        mine = [name for name, recordings in openslr.RECORDINGS.items() if recordings.archive == archive]
        md5 = hashlib.md5(content).hexdigest()
        for name in mine:
            monkeypatch.setitem(openslr.RECORDINGS, name, openslr.RECORDINGS[name]._replace(md5=md5))
        with serving(content) as server:
            options = SourceOptions(tmp_path / "cache", server.url)
            for name in mine:
                source = open_source(name, options)
                assert list(audio_of(source).values()) == [name.encode()]
                assert source.identity["kind"] == "recordings"
            assert server.asked == [None]
    digests = {open_source(name, SourceOptions()).identity["digest"] for name in folders}
    assert len(digests) == len(folders)


@pytest.mark.parametrize("damage", ["cut", "flipped", "encrypted", "no zip"])
def test_a_damaged_zip_is_refused_in_one_sentence(tmp_path, damage):
    path = zipped(tmp_path / "noises.zip", [("a.wav", tiny_speech.noise(1).tobytes())], zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    content[100] ^= damage == "flipped"
    content[content.index(b"PK\1\2") + 8] |= damage == "encrypted"
    path.write_bytes({"cut": content[:-30], "no zip": b"<html>"}.get(damage, content))
    with pytest.raises(UserError, match=r"noises\.zip is damaged or cut short"):
        list(open_source(str(path), SourceOptions(no_text=True)).open()[1])


def test_a_member_of_a_zip_that_memory_may_not_hold_is_dropped_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("ddp_asr.data.sources.recordings.MAX_ARCHIVED_BYTES", 800)
    path = zipped(tmp_path / "noises.zip", [("a.wav", b"a" * 800), ("b.wav", b"b" * 801)])
    found = {u.key: (u.reason, u.data) for u in open_source(str(path), SourceOptions(no_text=True)).open()[1]}
    assert found == {"a": ("", b"a" * 800), "b": (IMPLAUSIBLE, None)}


def test_a_file_or_directory_comes_before_a_split_of_the_same_name(tmp_path, monkeypatch):
    tiny_speech.librispeech(tmp_path / "dev-clean", speakers=1, utterances=1)
    monkeypatch.chdir(tmp_path)
    assert open_source("dev-clean", SourceOptions()).identity["kind"] == "directory"
    assert open_source("dev-other", SourceOptions()).identity["kind"] == "split"


@pytest.mark.parametrize("transcripts", ["first", "last", "end"])
def test_no_audio_waits_in_memory_for_its_transcript(tmp_path, transcripts):
    """When the first utterance comes out, the second half of the archive has not been read."""
    root = tiny_speech.librispeech(tmp_path / "split", speakers=8, seconds=3)
    path = tiny_speech.archive(tmp_path / "split.tar.gz", root, transcripts)
    _, utterances = open_source(str(path), SourceOptions()).open()
    next(utterances)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match="damaged or cut short"):
        list(utterances)


class SymLink(str):
    """In place of a content: where a symbolic link leads."""


class HardLink(str):
    """In place of a content: which member the name is another name of."""


LINKS = {SymLink: tarfile.SYMTYPE, HardLink: tarfile.LNKTYPE}


def tar_gz(path, members):
    """A .tar.gz or .tar of (name, content), in this order; a name may occur more than once."""
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if type(content) in LINKS:
                member.type, member.linkname = LINKS[type(content)], str(content)
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def unpack(root, members):
    for name, content in members:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if isinstance(content, SymLink):
            path.symlink_to(content)
        elif isinstance(content, HardLink):
            path.hardlink_to(root / content)
        else:
            path.write_bytes(content)
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
    assert [(u.key, u.text) for u in listed(path)] == [(f"7-{c}-{n}", "TEXT") for c in range(2) for n in range(3)]


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
    """Members of an archive, [(path, content)], in any order; a path that occurs twice replaces its first content.

    Links lead to files, to other links, to directories, to nothing and to themselves.
    """
    paths = draw(st.lists(PATHS, min_size=1, max_size=16))
    members = []
    for number, path in enumerate(paths):
        kind = draw(st.sampled_from(["file"] * 4 + ["symbolic link", "hard link"]))
        if kind == "symbolic link":
            target = draw(st.sampled_from([*paths, *map(os.path.dirname, paths), "gone.flac"]))
            members.append((path, SymLink(os.path.relpath(target or ".", os.path.dirname(path) or "."))))
            continue
        # Not to a path that a later member replaces: the link would keep the first content, which no stream can know.
        once = [name for name, content in members if isinstance(content, bytes) and paths.count(name) == 1]
        if kind == "hard link" and once:
            members.append((path, HardLink(draw(st.sampled_from(once)))))
            continue
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
        streamed = listed(path)
        try:
            assert told(streamed) == told(listed(root))
        except UserError:  # a directory without any transcript is in no known format
            assert all(u.text is None for u in streamed)
        usable = [u.key for u in streamed if not u.reason and u.text and u.text.strip()]
        assert len(usable) == len(set(usable))  # else the order would decide which of them is dropped
        assert listed(path) == streamed
        shuffled = list(dict(members).items())
        random.shuffle(shuffled)
        assert told(listed(tar_gz(path, shuffled))) == told(streamed)


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


def test_a_file_of_an_archive_that_memory_may_not_hold_is_dropped_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("ddp_asr.data.sources.archive.MAX_ARCHIVED_BYTES", 800)
    members = [("7-1.trans.txt", b"7-1-0 A\n7-1-1 B"), ("7-1-0.flac", b"a" * 800), ("7-1-1.flac", b"b" * 801)]
    found = {u.key: (u.reason, u.data) for u in listed(tar_gz(tmp_path / "a.tar.gz", members))}
    assert found == {"7-1-0": ("", b"a" * 800), "7-1-1": (IMPLAUSIBLE, None)}
    monkeypatch.setattr("ddp_asr.data.sources.archive.MAX_TEXT_BYTES", 14)
    with pytest.raises(UserError, match=r"7-1.trans.txt has more than"):
        listed(tmp_path / "a.tar.gz")


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
        listed(path)


TWO = [("7/7-1.trans.txt", b"7-1-0 ONE\n7-1-1 TWO\n"), ("7/7-1-0.flac", b"a" * 700), ("7/7-1-1.flac", b"b" * 700)]


def compress(path, tar):
    path.write_bytes(gzip.compress(tar, 1))
    return path


def test_no_flipped_bit_of_a_header_ends_an_archive_early(tmp_path):
    """Behind a checksum of gzip that is right. tarfile takes a damaged header for the end."""
    path = tar_gz(tmp_path / "a.tar.gz", TWO)
    tar, whole = gzip.decompress(path.read_bytes()), listed(path)
    headers = [0, 1024, 2560]
    assert [tar[start : start + 3] for start in headers] == [b"7/7"] * 3
    refused = 0
    for position in [start + offset for start in headers for offset in range(0, 512, 7)]:
        flipped = bytearray(tar)
        flipped[position] ^= 1 << position % 8
        try:
            assert listed(compress(path, flipped)) == whole  # a bit that no number needs
        except UserError as error:
            assert "damaged or cut short" in str(error)
            refused += 1
    assert refused > 200


@pytest.mark.parametrize("end", ["none", "another archive", "cut"])
def test_a_tar_without_its_end_is_never_taken_for_a_short_one(tmp_path, end):
    tar = gzip.decompress(tar_gz(tmp_path / "a.tar.gz", TWO).read_bytes())
    ends = {"none": [tar[:4096]], "another archive": [tar + tar], "cut": [tar[:n] for n in range(1, 4096, 101)]}
    for damaged in ends[end]:
        with pytest.raises(UserError, match=r"damaged or cut short .* unpack it and shard the directory"):
            listed(compress(tmp_path / "a.tar.gz", damaged))


ATTRIBUTES = [
    "size",
    "path",
    "linkpath",
    "hdrcharset",
    "mtime",
    *(
        f"GNU.sparse.{name}"
        for name in ("map", "size", "numblocks", "offset", "numbytes", "major", "minor", "realsize", "name")
    ),
]
VALUES = ["-1024", "-1", "0", "1", "512", "9" * 23, "", "\0", "a,b", "1,2,3", "0,10,20,5", "../x.flac", "BINARY", "nan"]
KINDS = [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.GNUTYPE_SPARSE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE]


@settings(max_examples=300)
@given(
    attributes=st.dictionaries(st.sampled_from(ATTRIBUTES), st.sampled_from(VALUES), max_size=4),
    kind=st.sampled_from(KINDS),
    overwritten=st.lists(st.tuples(st.integers(0, 511), st.integers(0, 255)), max_size=3),
)
def test_a_crafted_header_is_read_or_refused_in_one_sentence(attributes, kind, overwritten):
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.PAX_FORMAT) as file:
        for name, content in TWO:
            member = tarfile.TarInfo(name)
            member.size, member.type, member.pax_headers = len(content), kind, attributes
            file.addfile(member, io.BytesIO(content))
    content = bytearray(tar.getvalue())
    for position, value in overwritten:
        content[position] = value
    content[148:156] = b"%06o\0 " % sum(content[:148] + b" " * 8 + content[156:512])
    with tempfile.TemporaryDirectory() as folder:
        path = compress(Path(folder) / "a.tar.gz", content)
        try:
            total, utterances = open_source(str(path), SourceOptions()).open()
            assert len(list(utterances)) == total
        except UserError as refused:
            assert "damaged or cut short" in str(refused)


def test_a_link_of_an_archive_never_leads_out_of_it(tmp_path):
    for name in ("secret.flac", "secret.trans.txt"):
        (tmp_path / name).write_bytes(b"7-1-3 SECRET")
    targets = [str(tmp_path / "secret.flac"), "../secret.flac", "../../../../../../../../etc/passwd", "7-1-3.flac"]
    members = [(f"7/7-1-{n}.flac", SymLink(target)) for n, target in enumerate(targets)]
    members += [("7/7-1-4.flac", HardLink("../secret.flac")), ("7/out", SymLink(str(tmp_path)))]
    members += [("7/7-1-5.flac", SymLink("out/secret.flac")), ("7/7-2.trans.txt", SymLink("../secret.trans.txt"))]
    members += [("7/7-1.trans.txt", b"".join(b"7-1-%d TEXT\n" % n for n in range(7)))]
    members += [("../7-1-8.flac", b"8"), (str(tmp_path / "7-1-9.flac"), b"9"), ("7/7-1-6.flac", b"inside")]
    before = tiny_speech.content(tmp_path)
    utterances = listed(tar_gz(tmp_path / "a.tar.gz", members))
    assert {u.key: u.reason or u.data for u in utterances if u.text} == {
        f"7-1-{n}": MISSING_AUDIO for n in range(6)
    } | {"7-1-6": b"inside"}
    assert tiny_speech.content(tmp_path).keys() - {"a.tar.gz"} == before.keys()


def test_links_that_go_round_end(tmp_path):
    root = tiny_speech.librispeech(tmp_path / "split", speakers=2, utterances=2)
    expected = told(listed(root))
    (root / "100" / "up").symlink_to("..")
    (root / "100" / "self").symlink_to("self")
    for n in range(6):  # every path through them: as many as 6! and more
        (root / f"d{n}").mkdir()
        for other in range(6):
            (root / f"d{n}" / f"to{other}").symlink_to(root / f"d{other}")
    (root / "7-0-0.flac").symlink_to("7-0-0.flac")
    os.mkfifo(root / "100" / "7" / "7-0-1.flac")
    os.mkfifo(root / "100" / "7" / "7-0.trans.txt")
    assert told(listed(root)) == expected


CONTENT = bytes(range(256)) * 4000
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(openslr, "RETRY_PAUSES_S", (0.0, 0.0))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_a_fetched_file_is_checked_kept_and_not_fetched_again(tmp_path):
    with serving(CONTENT) as server:
        for _ in range(2):
            assert fetch(f"{server.url}/file.bin", tmp_path / "cache", MD5).read_bytes() == CONTENT
        assert server.asked == [None]


@pytest.mark.parametrize(
    ("part", "ranges", "asked"),
    [
        (CONTENT[:1000], True, "bytes=1000-"),
        (b"x" * 1000, False, "bytes=1000-"),  # the server cannot resume, and sends all of it
        (CONTENT, True, f"bytes={len(CONTENT)}-"),  # killed between the last byte and the checksum
    ],
)
def test_fetching_goes_on_where_an_earlier_run_was_killed(tmp_path, part, ranges, asked):
    (tmp_path / "file.bin.part").write_bytes(part)
    with serving(CONTENT, ranges=ranges) as server:
        assert fetch(f"{server.url}/file.bin", tmp_path, MD5).read_bytes() == CONTENT
        assert server.asked == [asked]


def test_fetching_goes_on_after_broken_connections(tmp_path):
    with serving(CONTENT, broken=5, cut_bytes=100_000) as server:
        assert fetch(f"{server.url}/file.bin", tmp_path, MD5).read_bytes() == CONTENT
        assert server.asked == [None, *(f"bytes={n}00000-" for n in range(1, 6))]


def test_what_has_another_checksum_is_named_whenever_it_came(tmp_path):
    with serving(CONTENT) as server:
        for _ in range(2):
            with pytest.raises(UserError, match=r"file.bin is damaged, or not what OpenSLR publishes .* delete it"):
                fetch(f"{server.url}/file.bin", tmp_path, "0" * 32)
        assert server.asked == [None]


@pytest.mark.parametrize(("status", "asked"), [(404, 1), (503, 3)])
def test_a_server_that_refuses_is_named_and_asked_again_only_where_that_helps(tmp_path, status, asked):
    with serving(CONTENT, status=status) as server, pytest.raises(UserError, match=f"cannot be downloaded: .*{status}"):
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
