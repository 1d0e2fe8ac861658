"""Recordings of every kind through a tiny model with random weights, as a user would run it."""

import io
import json
import re
import sys
from itertools import pairwise

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddp_asr import transcribe
from ddp_asr.config import Beam
from ddp_asr.data import audio
from ddp_asr.errors import UserError
from ddp_asr.recognition import transcription
from ddp_asr.recognition.recogniser import load_recogniser
from tests.tiny_recogniser import noises, write_checkpoint


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
    return transcription.read_audio(str(path))


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
    assert transcribe.main([str(checkpoint), "--json", str(tmp_path / "a.flac")]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["file"].endswith("a.flac")
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
    assert transcribe.main([str(checkpoint), "--json", *decoder, str(tmp_path / "a.wav")]) == 0
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
    assert transcribe.main([str(checkpoint), "--json", "--piece-seconds", "4", str(tmp_path / "a.wav")]) == 0
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
    pieces = [slice(start, start + 20 * 16_000) for start in range(0, 300 * 16_000, 20 * 16_000)]
    batches = list(transcription.batches_of(pieces))
    assert [piece for batch in batches for piece in batch] == pieces
    assert [len(batch) for batch in batches] == [6, 6, 3]
    assert [len(batch) for batch in transcription.batches_of([slice(0, 500 * 16_000)] * 2)] == [1, 1]


def test_nonsense_is_refused_in_one_sentence(checkpoint, tmp_path):
    with pytest.raises(UserError, match="--piece-seconds must be between"):
        transcribe.main([str(checkpoint), "--piece-seconds", "0", "a.wav"])
    with pytest.raises(UserError, match="holds no good checkpoint"):
        transcribe.main([str(tmp_path), "a.wav"])
