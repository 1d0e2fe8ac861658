"""Recordings of every kind through a tiny model with random weights, as a user would run it."""

import io
import json
import re
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddp_asr import cli, evaluate, transcribe
from ddp_asr.config import Beam
from ddp_asr.data import audio
from ddp_asr.errors import UserError, run_entry_point
from ddp_asr.recognition import transcription, voice
from ddp_asr.recognition.recogniser import load_recogniser
from ddp_asr.recognition.transcription import Failure, Recording
from tests import tiny_speech
from tests.test_an4_page import blocks_of
from tests.tiny_recogniser import noises, tiny_state, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "best.pt")


@pytest.fixture(scope="module")
def recogniser(checkpoint):
    return load_recogniser(checkpoint)


def expected(recogniser, waveform):
    logits, frames = recogniser.logits(torch.from_numpy(waveform)[None], torch.tensor([len(waveform)]))
    return recogniser.decoder(logits, frames)[0].text


def read(path):
    return transcription.read_audio(path)


def test_text_of_one_file_and_of_several(checkpoint, recogniser, tmp_path, capsys):
    texts = []
    for number in range(2):
        waveform = noises(2.0, seed=number)
        soundfile.write(tmp_path / f"{number}.wav", waveform, 16_000)
        texts.append(expected(recogniser, waveform))
    assert texts[0] != texts[1]
    assert len(texts[0].split()) > 1, "the random model should say several words, or the tests below show little"
    first, second = str(tmp_path / "0.wav"), str(tmp_path / "1.wav")
    assert transcribe.main([str(checkpoint), first]) == 0
    assert capsys.readouterr().out == f"{texts[0]}\n"
    assert transcribe.main([str(checkpoint.parent), first, second]) == 0  # a run directory
    assert capsys.readouterr().out == f"{first}\t{texts[0]}\n{second}\t{texts[1]}\n"


def test_json_has_the_words_with_their_times(checkpoint, recogniser, tmp_path, capsys):
    soundfile.write(tmp_path / "a.flac", noises(3.0), 16_000)
    assert transcribe.main([str(checkpoint), "--format", "json", str(tmp_path / "a.flac")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["key"] == str(tmp_path / "a.flac")
    assert said["seconds"] == 3.0
    assert said["text"] == expected(recogniser, noises(3.0))
    assert [word["word"] for word in said["words"]] == said["text"].split()
    times = [time for word in said["words"] for time in (word["start_s"], word["end_s"])]
    assert times == sorted(times)
    assert min(times) >= 0 and max(times) <= 3.0


def test_another_decoder_than_the_runs(checkpoint, tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", noises(3.0), 16_000)
    (tmp_path / "decoder.yaml").write_text("decoder: {kind: beam, size: 4, symbol_bonus: 5}")
    decoder = ["--decoder", str(tmp_path / "decoder.yaml")]
    assert transcribe.main([str(checkpoint), "--format", "json", *decoder, str(tmp_path / "a.wav")]) == 0
    said = json.loads(capsys.readouterr().out)
    beam = load_recogniser(checkpoint, decoder=Beam(size=4, symbol_bonus=5.0))
    assert said["text"] == expected(beam, noises(3.0)) != expected(load_recogniser(checkpoint), noises(3.0))
    assert all(0 < word["confidence"] <= 1 for word in said["words"])
    with pytest.raises(UserError, match=r"cannot read the settings .*none\.yaml"):
        transcribe.main([str(checkpoint), "--decoder", str(tmp_path / "none.yaml"), "a.wav"])


@pytest.mark.parametrize(
    ("name", "rate", "channels"),
    [("a.wav", 8_000, 1), ("a.flac", 44_100, 2), ("a.ogg", 48_000, 2), ("a.mp3", 22_050, 1), ("a.aiff", 16_000, 3)],
)
def test_every_rate_format_and_number_of_channels_is_heard_alike(tmp_path, capsys, name, rate, channels):
    seconds = 30.0 if channels == 2 else 1.5  # more than one block of the reader, too
    tone = 0.5 * np.sin(2 * np.pi * 440 / rate * np.arange(round(rate * seconds)))
    soundfile.write(tmp_path / name, np.repeat(tone[:, None], channels, axis=1), rate)
    heard = read(tmp_path / name)
    assert capsys.readouterr().err == ""
    assert heard.dtype == np.int16
    assert len(heard) == pytest.approx(16_000 * seconds, abs=2_500 if name == "a.mp3" else 2)
    spectrum = np.abs(np.fft.rfft(heard[8_000:16_000]))
    assert spectrum.argmax() == 220  # bins of 2 Hz
    assert np.abs(heard[8_000:16_000]).max() == pytest.approx(16_384, rel=0.05)


def test_sixteen_bits_at_sixteen_kilohertz_pass_untouched(tmp_path):
    waveform = noises(1.0)
    waveform[:2] = 32_767, -32_768
    soundfile.write(tmp_path / "a.wav", waveform, 16_000)
    assert np.array_equal(read(tmp_path / "a.wav"), waveform)


def test_channels_are_averaged_and_overflow_is_clipped(tmp_path):
    sound = np.zeros((200, 2))
    sound[:2] = [[1.0, 0.0], [3.0, 1.0]]
    soundfile.write(tmp_path / "a.wav", sound, 16_000, subtype="FLOAT")
    assert read(tmp_path / "a.wav").tolist() == [16_384, 32_767] + [0] * 198


def test_what_no_recording_of_speech_has_is_one_sentence(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "slow.wav", noises(1.0), 1)
    soundfile.write(tmp_path / "many.wav", np.zeros((10, 65), np.int16), 16_000)
    soundfile.write(tmp_path / "loud.wav", noises(1.0).astype(np.float32), 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "nan.wav", np.array([np.nan, 0.0]), 16_000, subtype="FLOAT")
    soundfile.write(tmp_path / "long.flac", noises(2.0), 16_000)
    monkeypatch.setattr(audio, "MAX_RECORDING_S", 1.5)
    for name, reason in {
        "slow": "implausible audio (its header states 1 Hz, speech has 4,000 to 384,000 Hz)",
        "many": "implausible audio (its header states 65 channels, at most 64 are read)",
        "loud": "of the samples are beyond full scale",
        "nan": "samples that are not finite",
        "long": "too long (2.000 s, at most 1.5 s are taken)",
    }.items():
        path = str(next(tmp_path.glob(f"{name}.*")))
        with pytest.raises(UserError, match=f"cannot use {re.escape(path)}: .*{re.escape(reason)}"):
            read(path)


@pytest.mark.parametrize("from_a_pipe", [False, True])
def test_standard_input(checkpoint, recogniser, monkeypatch, capsys, from_a_pipe):
    file = io.BytesIO()
    soundfile.write(file, noises(2.0), 16_000, format="WAV")
    wav = bytearray(file.getvalue())
    if from_a_pipe:  # ffmpeg cannot go back to write the lengths, and leaves them at their highest
        data = wav.index(b"data") + 4
        wav[4:8] = wav[data : data + 4] = b"\xff" * 4
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(bytes(wav))))
    assert transcribe.main([str(checkpoint), "-"]) == 0
    assert capsys.readouterr() == (expected(recogniser, noises(2.0)) + "\n", "")


def test_bad_files_are_named_and_the_others_transcribed(checkpoint, recogniser, tmp_path, capsys):
    soundfile.write(tmp_path / "good.wav", noises(2.0), 16_000)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, np.int16), 16_000)
    soundfile.write(tmp_path / "nan.wav", np.array([np.nan, 0.0]), 16_000, subtype="FLOAT")
    (tmp_path / "text.wav").write_text("no audio at all")
    names = [str(tmp_path / name) for name in ("missing.wav", "text.wav", "empty.wav", "nan.wav", "good.wav")]
    assert transcribe.main([str(checkpoint), *names]) == 2
    out, err = capsys.readouterr()
    assert out == f"{names[-1]}\t{expected(recogniser, noises(2.0))}\n"
    errors = err.splitlines()
    assert len(errors) == 4
    assert "missing.wav: No such file or directory" in errors[0]
    assert all(line.startswith("error: ") and name in line for line, name in zip(errors, names[:4], strict=True))


def test_a_file_that_is_cut_off_is_transcribed_as_far_as_it_goes(tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", noises(2.0), 16_000)
    soundfile.write(tmp_path / "whole.flac", noises(20.0), 16_000)
    whole = (tmp_path / "whole.flac").read_bytes()
    (tmp_path / "half.flac").write_bytes(whole[: len(whole) // 2])
    read(tmp_path / "whole.flac")
    assert capsys.readouterr().err == ""
    try:
        heard = read(tmp_path / "half.flac")
    except UserError as error:  # libsndfile versions differ: some refuse
        assert "half.flac" in str(error)
    else:
        assert len(heard) < 20 * 16_000
        assert "half.flac promises 20.0 s" in capsys.readouterr().err


def test_audio_shorter_than_a_window_says_nothing(checkpoint, tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", noises(0.01), 16_000)
    assert transcribe.main([str(checkpoint), str(tmp_path / "a.wav")]) == 0
    assert capsys.readouterr().out == "\n"


def test_a_long_recording_is_heard_in_pieces_and_timed_as_a_whole(checkpoint, recogniser, tmp_path, capsys):
    waveform = noises(25.0)
    soundfile.write(tmp_path / "a.wav", waveform, 16_000)
    cuts = ["--piece-seconds", "4", "--cut", "pauses"]
    assert transcribe.main([str(checkpoint), "--format", "json", *cuts, str(tmp_path / "a.wav")]) == 0
    said = json.loads(capsys.readouterr().out)
    pieces = transcription.cut_in_pauses(waveform, 4 * 16_000)
    assert len(pieces) >= 7
    texts = [expected(recogniser, waveform[piece]) for piece in pieces]
    assert said["text"] == " ".join(text for text in texts if text)
    words = iter(said["words"])
    for piece, text in zip(pieces, texts, strict=True):
        for _ in text.split():
            word = next(words)
            # rounded to milliseconds
            assert piece.start / 16_000 - 0.001 <= word["start_s"] < word["end_s"] <= piece.stop / 16_000 + 0.001


@given(seconds=st.floats(0.01, 30), longest_s=st.floats(1, 9), silent=st.booleans())
def test_pieces_cover_the_recording_and_none_is_too_long_or_tiny(seconds, longest_s, silent):
    waveform = noises(seconds) * (not silent)
    longest = int(longest_s * 16_000)
    pieces = transcription.cut_in_pauses(waveform, longest)
    assert pieces[0].start == 0 and pieces[-1].stop == len(waveform)
    assert all(before.stop == after.start for before, after in pairwise(pieces))
    lengths = [piece.stop - piece.start for piece in pieces]
    assert max(lengths) <= longest
    assert len(pieces) == 1 or min(lengths) >= longest // 4


def test_cuts_fall_into_pauses():
    tone = (9_000 * np.sin(np.arange(16_000 * 3))).astype(np.int16)
    pause = np.zeros(8_000, np.int16)
    waveform = np.concatenate([tone, pause] * 6)  # pauses at 3.0 to 3.5 s, 6.5 to 7.0 s, ...
    pieces = transcription.cut_in_pauses(waveform, 5 * 16_000)
    for piece in pieces[:-1]:
        assert 3.0 <= piece.stop / 16_000 % 3.5 <= 3.5
        assert not waveform[piece.stop - 1_000 : piece.stop + 1_000].any()


def test_batches_hold_every_piece_in_order_within_the_limit():
    assert list(transcription.batches_of([20 * 16_000] * 15)) == [slice(0, 6), slice(6, 12), slice(12, 15)]
    assert list(transcription.batches_of([500 * 16_000] * 2)) == [slice(0, 1), slice(1, 2)]
    assert list(transcription.batches_of([])) == []


def test_nonsense_is_refused_in_one_sentence(checkpoint, tmp_path):
    with pytest.raises(UserError, match="--piece-seconds must be between"):
        transcribe.main([str(checkpoint), "--piece-seconds", "0", "a.wav"])
    with pytest.raises(UserError, match="holds no good checkpoint"):
        transcribe.main([str(tmp_path), "a.wav"])


# ---- many recordings -----------------------------------------------------------------------------------------------


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def sources(tmp_path):
    """Recordings in a folder with texts, in one without, in a manifest, in shards and in files; and their waveforms."""
    heard = {}

    def write(path, seconds=1.0):
        path.parent.mkdir(parents=True, exist_ok=True)
        heard[str(path)] = noises(seconds, seed=len(heard))
        soundfile.write(path, heard[str(path)], 16_000)

    for name in ("folder/x/one.wav", "folder/two.flac", "plain/three.wav", "four.wav"):
        write(tmp_path / name, 0.5 + 0.3 * len(heard))
    (tmp_path / "folder" / "x" / "one.txt").write_text("A b. ab\n")
    write(tmp_path / "five.flac", 3.0)
    entries = [
        {"audio_filepath": "five.flac", "id": "whole", "text": "ab"},
        {"audio_filepath": "five.flac", "id": "part", "offset": 0.5, "duration": 1.5},
    ]
    tiny_speech.manifest(tmp_path / "m.jsonl", entries)
    five = heard.pop(str(tmp_path / "five.flac"))
    heard |= {"whole": five, "part-500": five[8_000:32_000]}
    write(tmp_path / "in shards.wav")
    tiny_speech.manifest(tmp_path / "s.jsonl", [{"audio_filepath": "in shards.wav", "text": "ab ba", "id": "sharded"}])
    tiny_speech.shard(tmp_path / "s.jsonl", tmp_path / "shards")
    heard["sharded"] = heard.pop(str(tmp_path / "in shards.wav"))
    names = ["folder", "plain", "four.wav", "m.jsonl", "shards"]
    order = ["folder/two.flac", "folder/x/one.wav", "plain/three.wav", "four.wav"]
    keys = [*(str(tmp_path / name) for name in order), "whole", "part-500", "sharded"]
    return [str(tmp_path / name) for name in names], {key: heard[key] for key in keys}


def test_files_folders_manifests_and_shards_in_their_order_with_error_rates(
    checkpoint, recogniser, sources, tmp_path, capsys
):
    names, heard = sources
    out = tmp_path / "said.jsonl"
    assert transcribe.main([str(checkpoint), *names, "--out", str(out)]) == 0
    said, err = capsys.readouterr()
    lines = lines_of(out)
    assert {line["key"]: line["text"] for line in lines} == {key: expected(recogniser, w) for key, w in heard.items()}
    assert [line["key"] for line in lines] == list(heard)
    assert [line.get("reference") for line in lines] == [None, "a b ab", None, None, "ab", None, "ab ba"]
    assert "7 recordings transcribed, 0 failed, 0.00 h of audio, real-time factor " in said
    assert "over 3 recordings with a reference" in said
    assert err == ""  # no terminal, so no progress

    assert transcribe.main([str(checkpoint), names[-1], "--out", str(tmp_path / "shards.jsonl")]) == 0
    rate = re.search(r"WER (\S+) %", capsys.readouterr().out)[1]
    assert evaluate.main([str(checkpoint), names[-1], "--json"]) == 0
    assert rate == f"{100 * json.loads(capsys.readouterr().out)['wer']:.2f}"


def test_a_transcript_depends_neither_on_batches_nor_on_windows(checkpoint, sources, tmp_path, monkeypatch):
    names, _ = sources
    texts = []
    for batch_s, window_s in ((120.0, 600.0), (0.1, 600.0), (6.0, 0.1), (6.0, 4.0)):
        monkeypatch.setattr(transcription, "BATCH_SECONDS", batch_s)
        monkeypatch.setattr(transcription, "WINDOW_SECONDS", window_s)
        out = tmp_path / f"{batch_s}-{window_s}.jsonl"
        assert transcribe.main([str(checkpoint), *names, "--out", str(out)]) == 0
        texts.append([(line["key"], line["text"]) for line in lines_of(out)])
    assert len(texts[0]) == 7 and texts.count(texts[0]) == 4


def test_memory_holds_two_windows_of_any_number_of_recordings(recogniser, monkeypatch):
    monkeypatch.setattr(transcription, "WINDOW_SECONDS", 1.0)  # of five recordings
    read, returned = 0, 0

    def one():
        nonlocal read
        read += 1
        return noises(0.2)

    def refuse():
        raise UserError("no audio")

    recordings = (Recording(str(n), refuse if n % 7 == 3 else one) for n in range(200))
    for item in transcription.transcribe(
        recogniser, recordings, partial(transcription.cut_in_pauses, longest_samples=99_999)
    ):
        assert item.key == str(returned) and isinstance(item, Failure) == (returned % 7 == 3)
        returned += 1
        assert read <= returned + 2 * 6
    assert returned == 200


def test_the_commands_of_the_page_work_as_they_stand(checkpoint, sources, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for old, new in (("shards", "shards/mine-test"), ("plain", "recordings"), ("m.jsonl", "more.jsonl")):
        (tmp_path / old).rename(tmp_path / "moved")
        (tmp_path / new).parent.mkdir(exist_ok=True)
        (tmp_path / "moved").rename(tmp_path / new)
    for name in ("hello.wav", "talk.flac"):
        soundfile.write(tmp_path / name, noises(1.0), 16_000)
    write_checkpoint(tmp_path / "runs" / "mine" / "best.pt")
    commands = blocks_of("docs/transcribe.md")
    assert len(commands) == 4
    for line in commands:
        program, *arguments = line.split()
        assert program == "ddp-asr" and cli.main(arguments) == 0, line
    keys = [line["key"] for line in lines_of(tmp_path / "all.jsonl")]
    assert keys == ["sharded", "whole", "part-500", "hello.wav"]
    assert [line["key"] for line in lines_of(tmp_path / "said.jsonl")] == ["recordings/three.wav"]


# ---- a file that is continued --------------------------------------------------------------------------------------


def test_a_second_call_continues_after_a_kill_in_the_middle_of_a_line(checkpoint, sources, tmp_path, capsys):
    names, _ = sources
    out, whole = tmp_path / "said.jsonl", tmp_path / "whole.jsonl"
    assert transcribe.main([str(checkpoint), *names, "--out", str(whole)]) == 0
    assert transcribe.main([str(checkpoint), *names[:2], "--out", str(out)]) == 0
    first = out.read_bytes()
    out.write_bytes(first[:-20])
    capsys.readouterr()
    assert transcribe.main([str(checkpoint), *names, "--out", str(out)]) == 0
    assert out.read_bytes() == whole.read_bytes()
    said = capsys.readouterr().out
    assert said.startswith("5 recordings transcribed, 0 failed, ") and f"with the 2 that {out} held, 7\n" in said
    assert transcribe.main([str(checkpoint), *names, "--out", str(out)]) == 0  # nothing is left
    assert out.read_bytes() == whole.read_bytes()
    assert "over 3 recordings with a reference" in capsys.readouterr().out


def test_ctrl_c_leaves_whole_lines_and_the_next_call_the_rest(checkpoint, sources, tmp_path, monkeypatch, capsys):
    names, heard = sources
    out = tmp_path / "said.jsonl"
    monkeypatch.setattr(transcription, "WINDOW_SECONDS", 0.1)
    logits_of, calls = transcription.logits_of, []

    def stopped(recogniser, clips):
        calls.append(clips)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return logits_of(recogniser, clips)

    monkeypatch.setattr(transcription, "logits_of", stopped)
    assert run_entry_point(lambda: transcribe.main([str(checkpoint), *names, "--out", str(out)])) == 130
    assert [line["key"] for line in lines_of(out)] == list(heard)[:3]
    assert transcribe.main([str(checkpoint), *names, "--out", str(out)]) == 0
    assert [line["key"] for line in lines_of(out)] == list(heard)


def test_what_is_no_file_to_continue_is_refused_and_stays(checkpoint, sources, tmp_path):
    names, _ = sources
    out = tmp_path / "said.jsonl"
    command = [str(checkpoint), names[0], "--out", str(out)]
    assert transcribe.main(command) == 0
    other = write_checkpoint(tmp_path / "other.pt", tiny_state(seed=3))
    content = out.read_bytes()
    for arguments, reason in (
        ([*command, "--piece-seconds", "5"], r"begun with other settings \(piece_seconds 20.0, now 5.0\)"),
        ([*command, "--cut", "pauses"], r"begun with other settings \(cut voice, now pauses\)"),
        ([str(other), *command[1:]], r"begun with other settings \(weights "),
    ):
        with pytest.raises(UserError, match=reason):
            transcribe.main(arguments)
    with out.open("r+b") as file:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is being written by another process"):
            transcribe.main(command)
    assert out.read_bytes() == content
    for wrong, reason in (
        (b"mine\n" + content, "has no transcript in line 1"),
        (content.replace(b'"text"', b'"said"', 1), "has no transcript in line 1"),
        (content + b"mine\nmine\n", f"has no transcript in line {content.count(b'}]}') + 1}"),
    ):
        out.write_bytes(wrong)
        with pytest.raises(UserError, match=reason):
            transcribe.main(command)
        assert out.read_bytes() == wrong
    with pytest.raises(UserError, match="holds transcripts as JSON lines, which are continued: name another file"):
        transcribe.main([*command, "--format", "ctm"])
    assert out.read_bytes() == wrong
    out.with_name("said.jsonl.settings.json").unlink()
    with pytest.raises(UserError, match=r"said\.jsonl\.settings\.json is not: it is not a file to continue"):
        transcribe.main(command)


def test_a_changed_file_of_the_decoder_is_another_setting(checkpoint, sources, tmp_path):
    (tmp_path / "hot.txt").write_text("ab\n")
    (tmp_path / "hot.yaml").write_text(f"decoder: {{kind: beam, hot_words: {tmp_path}/hot.txt}}\n")
    command = [str(checkpoint), sources[0][2], "--out", str(tmp_path / "said.jsonl")]
    command += ["--decoder", str(tmp_path / "hot.yaml")]
    assert transcribe.main(command) == 0
    (tmp_path / "hot.txt").write_text("ba\n")
    with pytest.raises(UserError, match=r"begun with other settings \(decoder_files \{'hot_words'"):
        transcribe.main(command)


def test_an_output_that_would_replace_what_it_reads_is_refused(checkpoint, sources, tmp_path):
    recording = tmp_path / "y.wav"
    soundfile.write(recording, noises(1.0), 16_000)
    content = recording.read_bytes()
    for more in (["--format=text"], []):
        with pytest.raises(UserError, match=r"is one of the inputs, which it would replace: name another place"):
            transcribe.main([str(checkpoint), str(recording), "--out", str(tmp_path / "." / "y.wav"), *more])
    assert recording.read_bytes() == content
    with pytest.raises(UserError, match="cannot hold stdin, which has no name: use --format json > FILE"):
        transcribe.main([str(checkpoint), "-", "--out", str(tmp_path / "said.jsonl")])


def test_what_a_folder_leaves_out_is_said(checkpoint, tmp_path, capsys):
    (tmp_path / "both").mkdir()
    soundfile.write(tmp_path / "both" / "x.wav", noises(0.5), 16_000)
    (tmp_path / "both" / "y.M4A").write_bytes(b"\0\0\0 ftyp")
    assert transcribe.main([str(checkpoint), str(tmp_path / "both")]) == 0
    told = capsys.readouterr().err
    assert "1 file in " in told and "such as y.M4A: convert them, as with: ffmpeg -i y.M4A converted.wav" in told
    (tmp_path / "both" / "wav.scp").write_text("k x.wav\n")
    (tmp_path / "both" / "text").write_text("k ab\n")
    assert transcribe.main([str(checkpoint), str(tmp_path / "both")]) == 0
    assert "is read as a source of kind kaldi: other files in it are not transcribed" in capsys.readouterr().err


def test_a_wav_file_that_is_cut_off_is_said(checkpoint, tmp_path, capsys):
    soundfile.write(tmp_path / "a.wav", noises(1.0), 16_000)
    (tmp_path / "a.wav").write_bytes((tmp_path / "a.wav").read_bytes()[:-1000])
    assert transcribe.main([str(checkpoint), str(tmp_path / "a.wav")]) == 0
    assert "a.wav is cut off, 1,000 bytes before its end; what is there is transcribed" in capsys.readouterr().err


def test_subtitles_of_a_long_name_have_a_shorter_one(checkpoint, tmp_path):
    name = "\u00e9" * 120
    for stem in (name, "my talk"):
        soundfile.write(tmp_path / f"{stem}.wav", noises(0.5), 16_000)
    command = [str(checkpoint), *map(str, tmp_path.glob("*.wav")), "--format=srt"]
    assert transcribe.main([*command, "--out", str(tmp_path / "subtitles")]) == 0
    assert {path.name for path in (tmp_path / "subtitles").iterdir()} == {f"{name[:100]}.srt", "my talk.srt"}
    (tmp_path / "a-file").touch()
    with pytest.raises(UserError, match="a-file is a file: name a directory, which gets a file for each recording"):
        transcribe.main([*command, "--out", str(tmp_path / "a-file")])


# ---- formats -------------------------------------------------------------------------------------------------------


def test_every_format_of_one_file_and_of_several(checkpoint, recogniser, sources, tmp_path, capsys):
    names, heard = sources
    one, key = names[2], list(heard)[3]
    first = expected(recogniser, heard[key]).split()[0]
    beginnings = {
        "text": f"{first} ",
        "json": f'{{"key": "{key}", "seconds": 1.4, ',
        "ctm": f"{key} 1 ",
        "textgrid": 'File type = "ooTextFile"',
        "srt": "1\n00:00:0",
        "vtt": "WEBVTT\n\n00:00:0",
    }
    for kind, beginning in beginnings.items():
        assert transcribe.main([str(checkpoint), one, "--format", kind]) == 0
        printed = capsys.readouterr().out
        assert printed.startswith(beginning) and first in printed
        out = tmp_path / f"out.{kind}"
        assert transcribe.main([str(checkpoint), one, "--format", kind, "--out", str(out)]) == 0
        assert out.read_text() == printed
        several = tmp_path / f"several-{kind}"
        status = transcribe.main([str(checkpoint), *names, "--format", kind, "--out", str(several)])
        assert status == 0
        if kind in transcribe.ONE_FILE_EACH:
            assert sorted(path.stem for path in several.iterdir()) == sorted(Path(key).stem for key in heard)
        else:
            assert len([line for line in several.read_text().splitlines() if "three" in line]) >= 1
        capsys.readouterr()
    with pytest.raises(UserError, match="--format srt makes a file for each recording: name a directory with --out"):
        transcribe.main([str(checkpoint), *names, "--format", "srt"])


def test_of_two_recordings_with_one_name_the_second_is_left_out(checkpoint, sources, tmp_path, capsys):
    names, _ = sources
    assert transcribe.main([str(checkpoint), names[2], names[2]]) == 2
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and f"{names[2]}: another recording has the name {names[2]}" in err


# ---- cuts ----------------------------------------------------------------------------------------------------------


def test_pieces_are_as_long_as_what_was_trained_on(tmp_path):
    assert load_recogniser(write_checkpoint(tmp_path / "old.pt")).piece_s == 20.0
    for longest_s, piece_s in ((6.5, 6.5), (0.3, 1.0), (1e9, 3600.0), ("9", 20.0), (float("nan"), 20.0), (-1.0, 20.0)):
        path = write_checkpoint(tmp_path / "run" / "best.pt", tiny_state() | {"longest_s": longest_s})
        assert load_recogniser(path).piece_s == piece_s


@pytest.mark.slow
def test_cuts_by_voice_lie_in_silences_and_leave_out_what_is_no_speech(dev_speech):
    pytest.importorskip("silero_vad")
    spoken = [transcription.read_audio(path) for path in sorted(dev_speech.rglob("*.flac"))[:3]]
    hush = (np.random.default_rng(0).standard_normal(4 * 16_000) * 3).astype(np.int16)
    waveform = np.concatenate([part for each in spoken for part in (hush, each)])
    threads = torch.get_num_threads()
    kind, cut = voice.choose_cut(None, 10 * 16_000)
    assert kind == "voice"
    pieces = cut(waveform)
    assert torch.get_num_threads() == threads
    assert all(before.stop <= after.start for before, after in pairwise(pieces))
    assert max(piece.stop - piece.start for piece in pieces) <= 10 * 16_000
    loud = np.abs(waveform) > 2_000
    assert sum(loud[piece].sum() for piece in pieces) > 0.99 * loud.sum()
    assert sum(piece.stop - piece.start for piece in pieces) < len(waveform) - 3 * 2 * 16_000
    short = spoken[0][: 9 * 16_000]
    assert cut(short) == [slice(0, len(short))]


def test_without_silero_vad_cuts_are_in_pauses(checkpoint, monkeypatch):
    monkeypatch.setattr(voice, "is_installed", lambda: False)
    assert voice.choose_cut(None, 16_000)[0] == "pauses"
    with pytest.raises(UserError, match=r"pip install 'ddp-asr\[vad\]'"):
        transcribe.main([str(checkpoint), "a.wav", "--cut", "voice"])
