"""Shards: the same bytes however they are made, what is converted, what is dropped, and interruptions of every kind."""

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from ddp_asr import shard
from ddp_asr.data import sources, writer
from ddp_asr.data.audio import Packed, pack
from ddp_asr.data.index import read_index
from ddp_asr.data.sources import openslr
from ddp_asr.errors import UserError
from ddp_asr.files import sealed_json
from tests import tiny_speech
from tests.http_server import serving
from tests.tiny_speech import content, encode, noise

SMALL = ("--shard-mb", "0.04")  # a shard holds three or four of the tiny utterances


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    return tiny_speech.librispeech(tmp_path_factory.mktemp("speech") / "split")


@pytest.fixture(scope="module")
def whole(split, tmp_path_factory):
    """What an undisturbed run makes of `split`."""
    return tiny_speech.shard(split, tmp_path_factory.mktemp("shards") / "whole", *SMALL)


def waveform(directory, row=0):
    """The decoded audio of a row: (samples int16, rate)."""
    index = read_index([directory])
    shard_bytes = Path(index.shards[index.shard[row]]).read_bytes()
    flac = shard_bytes[index.offset[row] : index.offset[row] + index.bytes[row]]
    return soundfile.read(io.BytesIO(flac), dtype="int16")


def dropped(directory):
    return [json.loads(line) for line in (directory / "dropped.jsonl").read_text().splitlines()]


# ---- the same bytes -------------------------------------------------------------------------------------------------


def test_shards_are_cut_at_their_size_and_nothing_else_lies_beside_them(whole):
    names = sorted(content(whole))
    shards = [name for name in names if name.startswith("shard-")]
    assert names == ["dataset.json", "dropped.jsonl", "index.parquet", *shards]
    assert len(shards) > 3
    assert all((whole / name).stat().st_size <= 40_000 + tarfile.RECORDSIZE for name in shards)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["directory", "archive", "manifest"])
def test_the_number_of_workers_changes_no_byte(split, tmp_path, kind):
    source = split
    if kind == "archive":
        source = tiny_speech.archive(tmp_path / "split.tar.gz", split, "last")
    if kind == "manifest":
        for n in range(12):
            (tmp_path / f"{n}.wav").write_bytes(encode(noise(0.2, seed=n), 44_100, "WAV"))
        (tmp_path / "5.wav").write_bytes(b"broken")
        entries = [{"audio_filepath": f"{n}.wav", "text": f"CLIP {n}"} for n in range(12)]
        source = tiny_speech.manifest(tmp_path / "m.jsonl", entries)
    outputs = []
    for workers in (1, 2, 3):
        out = tmp_path / f"workers-{workers}"
        assert shard.main([str(source), "--out", str(out), "--workers", str(workers), *SMALL]) == 0
        outputs.append(content(out))
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.parametrize("transcripts", ["first", "last", "end"])
def test_an_archive_gives_the_utterances_of_its_directory_and_unpacks_nothing(split, whole, tmp_path, transcripts):
    path = tiny_speech.archive(tmp_path / "split.tar.gz", split, transcripts)
    out = tiny_speech.shard(path, tmp_path / "out", *SMALL)
    assert read_index([out]).fingerprint() == read_index([whole]).fingerprint()
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".gz", ".tar", ".json", ".jsonl", ".parquet"}


def test_a_split_is_fetched_by_name_and_then_sharded_like_its_archive(split, whole, tmp_path, monkeypatch):
    archive = tiny_speech.archive(tmp_path / "dev-clean.tar.gz", split).read_bytes()
    md5 = hashlib.md5(archive).hexdigest()
    monkeypatch.setitem(openslr.LIBRISPEECH_MD5, "dev-clean", md5)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(archive) as server:
        options = ("--cache", str(tmp_path / "cache"), "--openslr-url", server.url, *SMALL)
        out = tiny_speech.shard("dev-clean", tmp_path / "out", *options)
        (tmp_path / "cache" / "dev-clean.tar.gz").unlink()
        tiny_speech.shard("dev-clean", out, *options)  # complete: nothing is fetched again
        assert len(server.asked) == 1
    assert read_index([out]).fingerprint() == read_index([whole]).fingerprint()


def test_mono_16_khz_flac_passes_through_untouched(split, whole):
    index = read_index([whole])
    for row in range(len(index)):
        path = split / index.key(row)[:3] / "7" / f"{index.key(row)}.flac"
        tar = Path(index.shards[index.shard[row]]).read_bytes()
        assert tar[index.offset[row] : index.offset[row] + index.bytes[row]] == path.read_bytes()
        assert index.samples[row] == 4800


def test_flac_of_24_bits_passes_through_untouched_too(tmp_path):
    flac = encode(noise().astype(np.int32) << 16, subtype="PCM_24")
    packed = pack(sources.Utterance("a", "a", "A", data=flac), None)
    assert packed == Packed(flac, 4800)


# ---- conversion -----------------------------------------------------------------------------------------------------


def tone(seconds, rate_hz):
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate_hz)) / rate_hz)


@pytest.mark.parametrize(
    ("suffix", "rate_hz", "subtype", "tolerance"),
    [
        ("wav", 16_000, "PCM_16", 1e-4),
        ("wav", 8_000, "PCM_16", 1e-2),
        ("wav", 44_100, "FLOAT", 1e-2),
        ("wav", 48_000, "PCM_24", 1e-2),
        ("flac", 22_050, "PCM_16", 1e-2),
        ("aiff", 16_000, "PCM_16", 1e-4),
        ("ogg", 16_000, "VORBIS", 5e-2),
        ("mp3", 44_100, "MPEG_LAYER_III", 5e-2),
    ],
)
@pytest.mark.parametrize("channels", [1, 2])
def test_everything_else_becomes_mono_16_khz_flac(tmp_path, suffix, rate_hz, subtype, tolerance, channels):
    sound = np.stack([tone(1, rate_hz)] * channels, axis=1)
    (tmp_path / f"a.{suffix}").write_bytes(encode(sound, rate_hz, suffix, subtype))
    source = tiny_speech.manifest(tmp_path / "m.jsonl", [{"audio_filepath": f"a.{suffix}", "text": "A"}])
    samples, found_hz = waveform(tiny_speech.shard(source, tmp_path / "out"))
    assert (found_hz, samples.shape) == (16_000, (16_000,))
    middle = slice(2000, 14_000)  # filters ring at both ends
    assert np.abs(samples[middle] / 32768 - tone(1, 16_000)[middle]).max() < tolerance


def test_16_bit_audio_loses_nothing_and_channels_are_averaged(tmp_path):
    left, right = noise(seed=1), noise(seed=2)
    (tmp_path / "mono.wav").write_bytes(encode(left, format="WAV"))
    (tmp_path / "stereo.wav").write_bytes(encode(np.stack([left, right], axis=1), format="WAV"))
    entries = [{"audio_filepath": f"{name}.wav", "text": "A"} for name in ("mono", "stereo")]
    out = tiny_speech.shard(tiny_speech.manifest(tmp_path / "m.jsonl", entries), tmp_path / "out")
    assert np.array_equal(waveform(out, 0)[0], left)
    assert np.abs(waveform(out, 1)[0] - (left / 2 + right / 2)).max() <= 0.5


def test_segments_are_cut_to_the_sample(tmp_path):
    long = noise(2)
    (tmp_path / "long.flac").write_bytes(encode(long))
    line = {"audio_filepath": "long.flac", "text": "A"}
    entries = [line | {"offset": 0, "duration": 0.5}, line | {"offset": 0.5, "duration": 0.25}, line | {"offset": 1.5}]
    out = tiny_speech.shard(tiny_speech.manifest(tmp_path / "m.jsonl", entries), tmp_path / "out")
    index = read_index([out])
    assert index.keys.to_pylist() == ["long-0", "long-500", "long-1500"]
    for row, (start, stop) in enumerate([(0, 8000), (8000, 12_000), (24_000, 32_000)]):
        assert np.array_equal(waveform(out, row)[0], long[start:stop])


@pytest.mark.parametrize("rate_hz", [16_000, 8_000])
@pytest.mark.parametrize(
    ("stated_s", "taken_s"), [(0.5, 0.5), (1.74, 1.74), (1.76, 2), (1.9, 2), (2, 2), (2.2, 2), (2.26, 2), (2.4, None)]
)
def test_a_duration_without_an_offset_cuts_the_file_where_it_is_shorter(tmp_path, rate_hz, stated_s, taken_s):
    """Within 0.25 s it is the rounded length of the file; by more than that (and 1 %) too long, it is not believed."""
    (tmp_path / "long.flac").write_bytes(flac := encode(sound := noise(2, rate_hz=rate_hz), rate_hz))
    line = {"audio_filepath": "long.flac", "text": "A"}
    entries = [line | {"duration": stated_s}, line | {"id": "other"}]
    out = tiny_speech.shard(tiny_speech.manifest(tmp_path / "m.jsonl", entries), tmp_path / "out")
    if taken_s is None:
        assert read_index([out]).keys.to_pylist() == ["other"]
        [case] = dropped(out)
        assert (case["key"], case["reason"]) == ("long", sources.BAD_AUDIO)
        assert case["detail"] == "2.000 s of audio, where the source states a duration of 2.4 s"
        return
    assert read_index([out]).keys.to_pylist() == ["long", "other"]
    assert read_index([out]).samples[0] == round(taken_s * 16_000)
    if rate_hz == 16_000:
        assert np.array_equal(waveform(out)[0], sound[: round(taken_s * 16_000)])
        assert (flac in (out / "shard-000000.tar").read_bytes().partition(b"other")[0]) == (taken_s == 2)


def test_the_last_page_of_an_ogg_may_be_missing_where_it_is_not_used(tmp_path):
    ogg = encode(noise(4), format="OGG", subtype="VORBIS")
    packed = [
        pack(sources.Utterance("a", "a", "A", data=ogg[:-5000], duration_s=duration_s), None)
        for duration_s in (1.0, None)
    ]
    assert [(each.reason, each.samples) for each in packed] == [("", 16_000), (sources.BAD_AUDIO, 0)]


def test_keys_may_be_long_and_in_any_script(tmp_path):
    (tmp_path / "a.wav").write_bytes(encode(noise(), format="WAV"))
    ids = ["k" * 300, "слово-один", "ключ" * 50]
    entries = [{"audio_filepath": "a.wav", "text": "naïve café", "id": i} for i in ids]
    out = tiny_speech.shard(tiny_speech.manifest(tmp_path / "m.jsonl", entries), tmp_path / "out", "--verify")
    assert read_index([out]).keys.to_pylist() == ids
    assert read_index([out]).text(0) == "naïve café"


# ---- what is dropped ------------------------------------------------------------------------------------------------


def flipped(flac):
    """One sample's bit differs from what the FLAC's MD5 promises: decoders do not look."""
    return flac[:26] + bytes([flac[26] ^ 1]) + flac[27:]


@pytest.fixture
def poor(tmp_path):
    """A manifest with one good utterance and every fault there is; (manifest, {key: reason})."""
    good, wav = encode(noise()), encode(noise(), format="WAV")
    files = {
        "good": good,
        "cut": good[: len(good) // 2],
        "flipped": flipped(good),
        "junk": b"not audio",
        "nothing": b"",
        "silent": encode(noise(0), format="WAV"),
        "cut-wav": wav[: len(wav) // 2],
        "cut-ogg": encode(noise(2), format="OGG", subtype="VORBIS")[:-5000],
        "cut-mp3": encode(noise(2), format="MP3", subtype="MPEG_LAYER_III")[:-9000],
        "nan": encode(np.full(800, np.nan), format="WAV", subtype="FLOAT"),
        "loud": encode(noise().astype(np.float32), format="WAV", subtype="FLOAT"),
        "hertz": encode(noise(), 1, format="WAV"),
        "short": good,
        "beyond": good,
        "over": good,
        "long": encode(noise(3)),
        "long-wav": encode(noise(3), format="WAV"),
        "mute": good,
        "blank": good,
        "number": good,
    }
    lines = {name: {"audio_filepath": f"audio/{name}", "id": name, "text": "A"} for name in files}
    for name, data in files.items():
        (tmp_path / "audio").mkdir(exist_ok=True)
        (tmp_path / "audio" / name).write_bytes(data)
    lines["short"]["duration"] = 2.0
    lines["beyond"]["offset"] = 5.0
    lines["over"] |= {"offset": 0.1, "duration": 1.0}
    del lines["mute"]["text"]
    lines["blank"]["text"] = " \t\n"
    lines["number"]["text"] = 7
    gone = {"audio_filepath": "audio/gone", "id": "gone", "text": "A"}
    folder = {"audio_filepath": "audio", "id": "folder", "text": "A"}
    os.mkfifo(tmp_path / "audio" / "pipe")
    lines["pipe"] = {"audio_filepath": "audio/pipe", "id": "pipe", "text": "A"}
    lines["device"] = {"audio_filepath": "/dev/zero", "id": "device", "text": "A"}
    again = lines["good"] | {"text": "AGAIN"}
    manifest = tiny_speech.manifest(tmp_path / "m.jsonl", [*lines.values(), gone, folder, again, "no json"])
    reasons = dict.fromkeys(list(files)[1:], sources.BAD_AUDIO)
    reasons |= {"beyond-5000": reasons.pop("beyond"), "over-100": reasons.pop("over")}
    reasons |= {"loud": sources.IMPLAUSIBLE, "hertz": sources.IMPLAUSIBLE}
    reasons |= {"long": sources.TOO_LONG, "long-wav": sources.TOO_LONG, "blank": sources.EMPTY_TRANSCRIPT}
    reasons |= {"mute": sources.MISSING_TRANSCRIPT, "number": sources.MISSING_TRANSCRIPT}
    reasons |= {
        "gone": sources.MISSING_AUDIO,
        "folder": sources.MISSING_AUDIO,
        "pipe": sources.MISSING_AUDIO,
        "device": sources.MISSING_AUDIO,
        "good": sources.DUPLICATE,
    }
    return manifest, reasons | {"line-26": sources.BAD_LINE}


def test_every_drop_is_counted_listed_and_summed_up(poor, tmp_path, capsys):
    manifest, reasons = poor
    out = tiny_speech.shard(manifest, tmp_path / "out", "--max-seconds", "2.9")
    assert {case["key"]: case["reason"] for case in dropped(out)} == reasons
    assert all(case["source"] and set(case) == {"key", "reason", "source", "detail"} for case in dropped(out))
    index = read_index([out])
    assert (index.keys.to_pylist(), index.text(0)) == (["good"], "A")
    dataset = json.loads((out / "dataset.json").read_text())
    assert sum(dataset["dropped"].values()) == len(reasons)
    assert set(dataset["dropped"]) == set(sources.REASONS)
    printed = capsys.readouterr().out
    for reason, count in dataset["dropped"].items():
        assert any(reason in line and str(count) in line for line in printed.splitlines())


def test_a_duplicate_key_says_of_what_also_after_a_kill(tmp_path, monkeypatch):
    (tmp_path / "a.wav").write_bytes(encode(noise(1), format="WAV"))
    line = {"audio_filepath": "a.wav", "text": "A", "duration": 0.5}
    entries = [line, {"audio_filepath": "gone.wav", "text": "A", "id": "b"}, line | {"id": "b"}, line | {"id": "c"}]
    source = tiny_speech.manifest(tmp_path / "m.jsonl", [*entries, line, line | {"id": "b"}])
    once = tiny_speech.shard(source, tmp_path / "once", "--shard-mb", "0.02")
    assert [(case["key"], case["reason"], case["detail"]) for case in dropped(once)] == [
        ("b", sources.MISSING_AUDIO, "No such file or directory"),
        ("a", sources.DUPLICATE, "same key as a.wav (utterance 1 of the source)"),
        ("b", sources.DUPLICATE, "same key as a.wav (utterance 3 of the source)"),
    ]
    calls = iter([pack] * 4 + [lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)])
    monkeypatch.setattr(writer, "pack", lambda *arguments: next(calls)(*arguments))
    with pytest.raises(KeyboardInterrupt):
        tiny_speech.shard(source, tmp_path / "twice", "--shard-mb", "0.02")
    assert list((tmp_path / "twice").glob("shard-*.tar"))
    monkeypatch.setattr(writer, "pack", pack)
    assert content(tiny_speech.shard(source, tmp_path / "twice", "--shard-mb", "0.02")) == content(once)


def test_strict_makes_any_drop_an_error_and_keeps_the_work(split, tmp_path):
    source = tiny_speech.librispeech(tmp_path / "split")
    bad = source / "101" / "7" / "101-7-0002.flac"
    bad.write_bytes(bad.read_bytes()[:3000])
    for _ in range(2):  # the second time the shards are complete already
        with pytest.raises(UserError, match=r"--strict: 1 utterances cannot be used, as .*/out/dropped.jsonl says"):
            tiny_speech.shard(source, tmp_path / "out", "--strict", *SMALL)
    assert [case["key"] for case in dropped(tmp_path / "out")] == ["101-7-0002"]
    assert content(tmp_path / "out") == content(tiny_speech.shard(source, tmp_path / "other", *SMALL))
    tiny_speech.shard(split, tmp_path / "good", "--strict")


def test_a_source_with_nothing_usable_leaves_nothing(tmp_path):
    source = tiny_speech.manifest(tmp_path / "m.jsonl", [{"audio_filepath": "gone.wav", "text": "A"}])
    with pytest.raises(UserError, match=r"has no usable utterance.*1 x missing audio.*gone.wav \(No such file"):
        tiny_speech.shard(source, tmp_path / "out")
    assert content(tmp_path / "out") == {}


SHARD_DEV_CLEAN = """
import sys
from ddp_asr import errors, shard
from ddp_asr.data.sources import openslr
openslr.LIBRISPEECH_MD5["dev-clean"] = sys.argv.pop()
raise SystemExit(errors.run_entry_point(shard.main))
"""


@pytest.mark.slow
def test_a_terminal_shows_a_bar_of_the_download_and_one_with_the_hours(split, tmp_path):
    archive = tiny_speech.archive(tmp_path / "dev-clean.tar.gz", split).read_bytes()
    terminal, its_end = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120", "no_proxy": "127.0.0.1"}
    with serving(archive) as server:
        arguments = ["dev-clean", "--out", tmp_path / "out", "--cache", tmp_path / "cache", "--workers", "1"]
        arguments += ["--openslr-url", server.url, hashlib.md5(archive).hexdigest()]
        command = [sys.executable, "-c", SHARD_DEV_CLEAN, *map(str, arguments)]
        with subprocess.Popen(command, stdout=its_end, stderr=its_end, env=environment) as process:
            os.close(its_end)
            shown = b""
            with contextlib.suppress(OSError):  # what Linux raises when the other end is closed
                while block := os.read(terminal, 1 << 16):
                    shown += block
    os.close(terminal)
    assert process.returncode == 0, shown
    assert re.search(rb"downloading .*sharding .* utterances, \d+\.\d\d h", shown, re.DOTALL)


# ---- directories that are complete, foreign, full or taken ----------------------------------------------------------


def test_a_complete_output_is_left_alone(split, whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in whole.iterdir()}
    tiny_speech.shard(split, whole, *SMALL)
    assert "was complete already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in whole.iterdir()} == before


def test_an_output_of_another_source_or_other_settings_is_refused(split, whole, tmp_path):
    with pytest.raises(UserError, match=r"--shard-mb: 0.04 there, 256.0 now"):
        tiny_speech.shard(split, whole)
    with pytest.raises(UserError, match=r"--max-seconds: None there, 20.0 now"):
        tiny_speech.shard(split, whole, "--max-seconds", "20", *SMALL)
    other = tiny_speech.librispeech(tmp_path / "split")
    (other / "100" / "7" / "100-7.trans.txt").write_text("100-7-0000 ANOTHER TEXT\n")
    with pytest.raises(UserError, match="another source, or from this one before it changed"):
        tiny_speech.shard(other, whole, *SMALL)


def test_the_same_source_elsewhere_is_the_same_source(whole, tmp_path, capsys):
    tiny_speech.shard(tiny_speech.librispeech(tmp_path / "moved"), whole, *SMALL)
    assert "was complete already" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["foreign", "file", "below a file"])
def test_a_directory_that_is_not_ours_is_not_touched(split, tmp_path, place):
    (tmp_path / "thesis.txt").write_text("years of work")
    out = {"foreign": tmp_path, "file": tmp_path / "thesis.txt", "below a file": tmp_path / "thesis.txt" / "out"}[place]
    before = content(tmp_path)
    with pytest.raises(UserError, match="--out"):
        tiny_speech.shard(split, out)
    assert content(tmp_path) == before


def test_a_second_process_is_refused(split, tmp_path):
    (tmp_path / "out" / ".partial").mkdir(parents=True)
    with (tmp_path / "out" / ".partial" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing"):
            tiny_speech.shard(split, tmp_path / "out")
    tiny_speech.shard(split, tmp_path / "out")


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(split, whole, tmp_path, monkeypatch):
    really, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 7:  # of the second shard
            raise OSError(errno.ENOSPC, "No space left on device")
        really(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device; free some space"):
        tiny_speech.shard(split, tmp_path / "out", *SMALL)
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert not list((tmp_path / "out" / ".partial").glob("*.tmp"))
    monkeypatch.setattr(os, "fsync", really)
    assert content(tiny_speech.shard(split, tmp_path / "out", *SMALL)) == content(whole)


@pytest.mark.slow
def test_a_real_limit_on_writing_is_one_sentence(split, tmp_path):
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000));"
        "from ddp_asr import errors, shard; raise SystemExit(errors.run_entry_point(shard.main))"
    )
    run = run_python(script, split, "--out", tmp_path / "out", "--workers", "2")
    assert run.returncode == 2
    assert run.stderr.startswith("error: ") and run.stderr.count("\n") == 1
    assert "free some" in run.stderr


@pytest.mark.parametrize(
    "arguments", [[], ["--out", "x"], ["a", "--out", "x", "--workers", "0"], ["a", "--out", "x", "--shard-mb", "nan"]]
)
def test_a_wrong_command_line_is_told(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        shard.main(arguments)
    assert end.value.code == 2
    assert "error: " in capsys.readouterr().err


# ---- interruptions --------------------------------------------------------------------------------------------------

INTERRUPT_AT_RENAME = """
import os, signal
from ddp_asr import errors, shard

def run(number, before, interrupt, argv):
    "The command, interrupted before or after its rename of this number."
    renames, rename = iter(range(1, 1000)), os.replace
    def interrupted(aside, path):
        now = next(renames) == number
        if now and before:
            interrupt()
        rename(aside, path)
        if now:
            interrupt()
    os.replace = interrupted
    return errors.run_entry_point(lambda: shard.main(argv))
"""

KILL_UNTIL_DONE = (
    INTERRUPT_AT_RENAME
    + """
import json, sys, webdataset  # imported once, inherited by every attempt
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--out") + 1])
for attempt in range(100):
    child = os.fork()
    if not child:
        os._exit(run(1 + attempt // 2 % 4, attempt % 2, lambda: os.kill(os.getpid(), signal.SIGKILL), sys.argv[1:]))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print("attempt", json.dumps([code, sorted(str(f.relative_to(out)) for f in out.rglob("*"))]), flush=True)
    if code == 0:
        break
"""
)

CTRL_C = (
    INTERRUPT_AT_RENAME
    + """
import sys
raise SystemExit(run(4, False, lambda: os.killpg(0, signal.SIGINT), sys.argv[1:]))
"""
)


def run_python(script, *arguments, **how):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True, **how)


@pytest.mark.slow
def test_killed_at_every_step_it_still_ends_with_the_same_bytes(split, whole, tmp_path):
    """Each attempt is killed at its first to fourth rename, after and before it, until nothing is left to do."""
    out = tmp_path / "out"
    run = run_python(KILL_UNTIL_DONE, split, "--out", out, "--workers", "1", *SMALL)
    assert run.returncode == 0, run.stderr
    lines = [line.removeprefix("attempt ") for line in run.stdout.splitlines() if line.startswith("attempt ")]
    *killed, (last, _) = map(json.loads, lines)
    assert [code for code, _ in killed] == [-signal.SIGKILL] * len(killed)
    assert last == 0
    assert len(killed) >= 6
    for _, files in killed:
        assert "dataset.json" not in files or set(files) >= set(content(whole))
        assert sum(name.endswith(".tmp") for name in files) <= 1  # what the kill before left is deleted
    assert content(out) == content(whole)


@pytest.mark.slow
def test_ctrl_c_leaves_whole_shards_and_no_traceback(split, whole, tmp_path):
    arguments = (split, "--out", tmp_path / "out", "--workers", "2", *SMALL)
    run = run_python(CTRL_C, *arguments)
    assert run.returncode == 130
    assert "the same command continues from there" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert content(tiny_speech.shard(split, tmp_path / "out", *SMALL)) == content(whole)


def test_finished_shards_are_not_made_again(split, whole, tmp_path, monkeypatch):
    packed = []
    really = pack

    def counted(utterance, max_seconds):
        packed.append(utterance.key)
        if len(packed) == 8:
            raise KeyboardInterrupt
        return really(utterance, max_seconds)

    monkeypatch.setattr(writer, "pack", counted)
    with pytest.raises(KeyboardInterrupt):
        tiny_speech.shard(split, tmp_path / "out", *SMALL)
    finished = len(list((tmp_path / "out").glob("shard-*.tar")))
    assert finished >= 2
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*.tar")}
    packed[:] = [""] * 8
    assert content(tiny_speech.shard(split, tmp_path / "out", *SMALL)) == content(whole)
    assert len(packed) - 8 == 12 - 3 * finished
    assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in kept.items())


def test_a_shard_that_an_older_program_left_is_made_again(split, whole, tmp_path, monkeypatch):
    calls = iter([pack] * 6 + [lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)])
    monkeypatch.setattr(writer, "pack", lambda *arguments: next(calls)(*arguments))
    with pytest.raises(KeyboardInterrupt):
        tiny_speech.shard(split, tmp_path / "out", *SMALL)
    monkeypatch.setattr(writer, "pack", pack)
    path = tmp_path / "out" / ".partial" / "shard-000000.tar.json"
    sidecar = json.loads(path.read_text())
    sidecar["rows"] = [row[:-1] for row in sidecar["rows"]]  # without the language
    path.write_text(sealed_json(sidecar))
    assert content(tiny_speech.shard(split, tmp_path / "out", *SMALL)) == content(whole)


@pytest.mark.parametrize("damaged", ["shard-000000.tar.json", "settings.json"])
def test_no_flipped_bit_of_an_unfinished_output_changes_the_shards(split, whole, tmp_path, monkeypatch, damaged):
    calls = iter([pack] * 6 + [lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)] * 99)
    monkeypatch.setattr(writer, "pack", lambda *arguments: next(calls)(*arguments))
    with pytest.raises(KeyboardInterrupt):
        tiny_speech.shard(split, tmp_path / "killed", *SMALL)
    monkeypatch.setattr(writer, "pack", pack)
    good = (tmp_path / "killed" / ".partial" / damaged).read_bytes()
    for position in range(0, len(good), len(good) // 12):
        out = shutil.copytree(tmp_path / "killed", tmp_path / f"out-{position}")
        flipped = bytearray(good)
        flipped[position] ^= 1 << position % 8
        (out / ".partial" / damaged).write_bytes(flipped)
        try:
            assert content(tiny_speech.shard(split, out, *SMALL)) == content(whole)
        except UserError as refused:
            assert "settings.json is damaged" in str(refused)


def test_an_unfinished_output_of_another_source_is_refused(split, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "pack", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tiny_speech.shard(split, tmp_path / "out")
    with pytest.raises(UserError, match="unfinished shards made with other settings"):
        tiny_speech.shard(split, tmp_path / "out", *SMALL)


# ---- verification ---------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(split, tmp_path):
    return tiny_speech.shard(split, tmp_path / "copy", *SMALL)


def check(directory):
    return shard.main(["--verify", "--out", str(directory), "--workers", "1"])


def test_a_good_directory_is_verified(copy, capsys):
    assert check(copy) == 0
    assert "all 12 utterances decode" in capsys.readouterr().out


def test_a_changed_byte_is_found(copy):
    path = Path(read_index([copy]).shards[1])
    tar = bytearray(path.read_bytes())
    tar[3] ^= 1
    path.write_bytes(tar)
    with pytest.raises(UserError, match=r"shard-000001.tar: another checksum"):
        check(copy)


def test_what_does_not_decode_is_found_behind_a_right_checksum(copy):
    index = read_index([copy])
    dataset = json.loads((copy / "dataset.json").read_text())
    tar = bytearray(Path(index.shards[0]).read_bytes())
    tar[index.offset[0] + 3000] ^= 1
    Path(index.shards[0]).write_bytes(tar)
    dataset["shards"][0]["sha256"] = hashlib.sha256(tar).hexdigest()
    (copy / "dataset.json").write_text(sealed_json(dataset))
    with pytest.raises(UserError, match=r"shard-000000.tar, 100-7-0000: undecodable or truncated audio .*; delete"):
        check(copy)


def test_a_missing_or_shortened_shard_is_found(copy):
    path = copy / "shard-000002.tar"
    path.write_bytes(path.read_bytes()[:-512])
    with pytest.raises(UserError, match=r"shard-000002.tar has \d+ bytes instead of \d+"):
        check(copy)
    path.unlink()
    with pytest.raises(UserError, match=r"shard-000002.tar is missing"):
        check(copy)
