"""Alignment against all paths and against torchaudio, and the command on recordings whose true times are known.

The recordings speak in tones, one for each symbol, and a recogniser that knows the tones hears them without training.
"""

import json
import re
from dataclasses import replace
from itertools import groupby, product

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchaudio.functional import forced_align, merge_tokens

from ddp_asr import align as command
from ddp_asr.config import Config
from ddp_asr.decoding import align as alignment
from ddp_asr.decoding import make_decoder
from ddp_asr.decoding.align import Misfit, align, align_text, misfits
from ddp_asr.decoding.formats import Aligned, Unaligned, render_ctm, render_jsonl, render_srt, render_textgrid
from ddp_asr.decoding.path import words_on
from ddp_asr.decoding.protocol import Word
from ddp_asr.errors import UserError, run_entry_point
from ddp_asr.recognition import recogniser as recognisers
from ddp_asr.recognition.recogniser import Recogniser, load_recogniser
from ddp_asr.text.characters import Characters
from tests import tiny_speech
from tests.tiny_recogniser import tiny_state, write_checkpoint

SYMBOLS = " ab'"
BLANK = len(SYMBOLS)
TOKENISER = Characters(SYMBOLS)


def log_probabilities(frames: int, seed: int, classes: int = BLANK + 1) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(frames, classes, generator=random, dtype=torch.float64)).log_softmax(-1)


def times(frames: int, frame_s: float = 0.5) -> tuple[np.ndarray, np.ndarray]:
    return frame_s * np.arange(frames), frame_s * np.arange(1, frames + 1)


# ---- one utterance -------------------------------------------------------------------------------------------------


def runs(path):
    """(symbol, first frame, frame after the last) of each symbol, by definition."""
    found, at = [], 0
    for symbol, group in groupby(path):
        length = len(list(group))
        if symbol != BLANK:
            found.append((symbol, at, at + length))
        at += length
    return found


@given(st.integers(1, 5), st.lists(st.integers(0, BLANK - 1), min_size=1, max_size=3), st.integers(0, 10_000))
def test_the_path_is_the_most_probable_of_all_that_spell_the_text(frames, classes, seed):
    log_p = log_probabilities(frames, seed)
    spelling = [p for p in product(range(BLANK + 1), repeat=frames) if [r[0] for r in runs(p)] == classes]
    if not spelling:
        with pytest.raises(Misfit, match="frames"):
            align(log_p, np.array(classes))
        return
    sums = [float(log_p[range(frames), path].sum()) for path in spelling]
    best = runs(spelling[int(np.argmax(sums))])
    found = align(log_p, np.array(classes))
    assert list(zip(classes, found.start, found.end, strict=True)) == best
    assert found.log_p == pytest.approx([float(log_p[a:b, symbol].mean()) for symbol, a, b in best], rel=1e-5)
    excess = max(sums) - float(log_p.amax(-1).sum())
    assert found.score == pytest.approx(np.exp(excess / len(classes)), rel=1e-5)


def test_spans_and_scores_are_torchaudios():
    log_p = log_probabilities(200, 1, classes=29).float()
    classes = np.random.default_rng(2).integers(0, 28, 60)
    path, scores = forced_align(log_p[None], torch.from_numpy(classes)[None], blank=28)
    expected = merge_tokens(path[0], scores[0], blank=28)
    found = align(log_p.double().T.contiguous().T, classes)  # neither float32 nor contiguous
    assert [(span.token, span.start, span.end) for span in expected] == list(
        zip(classes, found.start, found.end, strict=True)
    )
    assert found.log_p == pytest.approx([span.score for span in expected], rel=1e-5)


@given(st.integers(1, 30), st.integers(0, 10_000))
def test_greedy_words_have_the_times_of_the_alignment(frames, seed):
    """The most probable path of all is the most probable one of its own text."""
    logits = log_probabilities(frames, seed).float()
    (heard,) = make_decoder(Config().decoder, TOKENISER, 0.5)(logits[None], torch.tensor([frames]))
    classes = np.array([symbol for symbol, _, _ in runs(logits.argmax(-1).tolist())], np.int64)
    if not len(classes):
        return
    found = align(logits, classes)
    assert found.score == pytest.approx(1.0)
    words = words_on(found.path, found.path_log_p, TOKENISER, 0.5)
    assert [(w.text, w.start_s, w.end_s) for w in words] == [(w.text, w.start_s, w.end_s) for w in heard.words]
    assert [w.confidence for w in words] == pytest.approx([w.confidence for w in heard.words], rel=1e-5)


def test_words_have_times_and_the_geometric_mean_of_their_symbols():
    log_p = log_probabilities(20, 3)
    words, score = align_text(log_p, "Ab  ba'", TOKENISER, *times(20))
    found = align(log_p, TOKENISER.encode("ab ba'"))
    assert [word.text for word in words] == ["ab", "ba'"]
    for word, letters in zip(words, (slice(0, 2), slice(3, 6)), strict=True):
        assert (word.start_s, word.end_s) == (0.5 * found.start[letters][0], 0.5 * found.end[letters][-1])
        assert word.confidence == pytest.approx(float(np.exp(found.log_p[letters].mean())))
        assert 0 < word.confidence < 1
    assert score == found.score


def test_what_does_not_fit_has_its_reason(monkeypatch):
    assert misfits(["ab", "", "a1b?", "abba", "aab", "aab"], [2, 9, 9, 4, 4, 3], TOKENISER) == [
        "",
        "the text is empty after normalisation",
        "the model cannot write '1?'",
        "the text needs 5 frames (symbols + adjacent equal ones), the recording has 4",
        "",
        "the text needs 4 frames (symbols + adjacent equal ones), the recording has 3",
    ]
    for text, reason in (("", "is empty"), ("x", "cannot write 'x'"), ("ab" * 9, "needs 18 frames")):
        with pytest.raises(Misfit, match=reason):
            align_text(log_probabilities(5, 0), text, TOKENISER, *times(5))
    monkeypatch.setattr(alignment, "MOST_CELLS", 9)
    with pytest.raises(Misfit, match=r"5 frames x 2 symbols are more than 9, .*: cut the recording and its text"):
        align(log_probabilities(5, 0), np.array([1, 2]))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_output_without_a_path_is_no_alignment(value):
    log_p = log_probabilities(4, 0)
    log_p[:, 1] = value
    with pytest.raises(Misfit, match="no path of this text a probability"):
        align(log_p, np.array([2, 1]))


# ---- formats -------------------------------------------------------------------------------------------------------

WORDS = [
    Word("she", 0.25, 0.5, 0.9),
    Word('said"', 0.5, 1.0, 0.12345),
    Word("so", 3599.9996, 3600.5, 1.0),
]
UTTERANCE = Aligned("talk", 3601.0, 'she said" so', "she sad", 0.0123456, WORDS)


def test_jsonl_has_times_scores_and_reasons():
    said = json.loads(render_jsonl(UTTERANCE))
    assert (said["key"], said["seconds"], said["text"], said["score"]) == ("talk", 3601.0, 'she said" so', 0.0123)
    assert said["words"][1] == {"word": 'said"', "start_s": 0.5, "end_s": 1.0, "confidence": 0.1235}
    assert json.loads(render_jsonl(Unaligned("k", "ñ", "why"))) == {"key": "k", "text": "ñ", "reason": "why"}


def test_ctm_has_its_six_columns():
    rows = [line.split(" ") for line in render_ctm(UTTERANCE).splitlines()]
    assert rows[:2] == [
        ["talk", "1", "0.250", "0.250", "she", "0.900"],
        ["talk", "1", "0.500", "0.500", 'said"', "0.123"],
    ]
    assert render_ctm(Unaligned("k", "x", "it is short")) == ";; k is not aligned: it is short\n"
    assert {len(line.split()) for line in render_ctm(replace(UTTERANCE, key="my talk")).splitlines()} == {6}


def read_textgrid(text):
    """[(xmin, xmax, text)] of the only tier of Praat's long format."""
    header = (
        r'File type = "ooTextFile"\nObject class = "TextGrid"\n\nxmin = 0\nxmax = (\S+)\ntiers\? <exists>\nsize = 1'
    )
    assert re.match(header, text)
    size = int(re.search(r"intervals: size = (\d+)", text)[1])
    pattern = r'intervals \[(\d+)\]:\s+xmin = (\S+)\s+xmax = (\S+)\s+text = "((?:[^"]|"")*)"\s'
    found = re.findall(pattern, text)
    assert [int(number) for number, *_ in found] == list(range(1, size + 1))
    return [(float(a), float(b), text.replace('""', '"')) for _, a, b, text in found]


def test_a_textgrid_covers_the_recording_without_gaps():
    intervals = read_textgrid(render_textgrid(UTTERANCE))
    assert [i for i in intervals if i[2]] == [(w.start_s, w.end_s, w.text) for w in WORDS]
    assert [start for start, _, _ in intervals] == [0.0, *(end for _, end, _ in intervals[:-1])]
    assert intervals[-1][1] == 3601.0


def test_subtitles_have_their_times_and_are_cut_at_pauses_and_by_length():
    first, second = render_srt(UTTERANCE).split("\n\n")[:2]
    assert first == '1\n00:00:00,250 --> 00:00:01,000\nshe said"'
    assert second == "2\n01:00:00,000 --> 01:00:00,500\nso"
    many = [Word("word", 0.3 * n, 0.3 * n + 0.2, 1.0) for n in range(30)]
    cues = render_srt(replace(UTTERANCE, words=many)).strip().split("\n\n")
    lines = [cue.split("\n")[2] for cue in cues]
    assert " ".join(lines) == " ".join(["word"] * 30)
    assert max(map(len, lines)) <= 42 and min(map(len, lines[:-1])) > 42 - len(" word")


# ---- the command ---------------------------------------------------------------------------------------------------

FRAME = 400  # samples; tiny models have 25 ms, as others


class Tones(Recogniser):
    """Hears tones of 400, 800, ... Hz as the symbols, and silence as the blank."""

    def logits(self, waveforms, samples):
        frames = self.config.encoder.output_frames(self.config.features.frames(samples))
        rows = torch.nn.functional.pad(waveforms, (0, FRAME))[:, : int(frames.max()) * FRAME]
        blocks = rows.reshape(len(rows), -1, FRAME).float()
        power = torch.fft.rfft(blocks).abs()[..., 10:60:10]  # bins of 40 Hz
        loudest = power[..., :BLANK].argmax(-1)
        heard = torch.where(blocks.abs().amax(-1) < 100, BLANK, loudest)
        return 8.0 * torch.nn.functional.one_hot(heard, BLANK + 1).float(), frames


def speak(text, frames_a_symbol=2):
    """Each symbol as a tone followed by as much silence; (int16 waveform, first frame of each symbol)."""
    tone, parts, starts = np.arange(FRAME * frames_a_symbol) / 16_000, [np.zeros(FRAME * 3)], []
    for symbol in text:
        starts.append(sum(map(len, parts)) // FRAME)
        parts += [9_000 * np.sin(2 * np.pi * 400 * (1 + SYMBOLS.index(symbol)) * tone), np.zeros(len(tone))]
    return np.concatenate([*parts, np.zeros(FRAME)]).round().astype(np.int16), starts


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    state = tiny_state(data={"threads": 0, "test_max_seconds": 10.0})
    return str(write_checkpoint(tmp_path_factory.mktemp("run") / "best.pt", state))


@pytest.fixture
def tones(checkpoint, monkeypatch):
    """The checkpoint's path; what is loaded from it hears tones."""

    def load(path):
        loaded = load_recogniser(path)
        return Tones(**{name: getattr(loaded, name) for name in loaded.__dataclass_fields__})

    monkeypatch.setattr(recognisers, "load_recogniser", load)
    return checkpoint


SPOKEN = ["ab ba", "bab", "a'b aa b", "bb a", "b'a'b aab", "aab b"]
FOREIGN, CRAMMED = "utt-6", "utt-7"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Utterances 1 and 4 have each other's text; two more have texts that cannot be aligned."""
    root = tmp_path_factory.mktemp("shards")
    texts = [*SPOKEN, "a b?", "ab " * 60]
    entries = []
    for number, text in enumerate(texts):
        waveform, _ = speak(text if number < len(SPOKEN) else "ab")
        (root / f"utt-{number}.flac").write_bytes(tiny_speech.encode(waveform))
        written = texts[{1: 4, 4: 1}.get(number, number)]
        entries.append({"audio_filepath": f"utt-{number}.flac", "text": written, "id": f"utt-{number}"})
    return tiny_speech.shard(tiny_speech.manifest(root / "m.jsonl", entries), root / "out")


def record(path, text):
    path.write_bytes(tiny_speech.encode(speak(text)[0]))
    return str(path)


def lines_of(text):
    return [json.loads(line) for line in text.splitlines()]


def test_words_lie_where_they_were_said(tones, tmp_path, capsys):
    audio = record(tmp_path / "a.flac", "ab ba'")
    _, starts = speak("ab ba'")
    assert command.main([tones, audio, "--text", "AB ba'"]) == 0
    (said,) = lines_of(capsys.readouterr().out)
    assert said["key"] == "a" and said["text"] == "ab ba'" and said["score"] == 1.0
    assert [(word["word"], word["start_s"], word["end_s"]) for word in said["words"]] == [
        ("ab", pytest.approx(0.025 * starts[0]), pytest.approx(0.025 * (starts[1] + 2))),
        ("ba'", pytest.approx(0.025 * starts[3]), pytest.approx(0.025 * (starts[5] + 2))),
    ]
    assert all(word["confidence"] > 0.99 for word in said["words"])


def test_a_long_recording_is_aligned_as_a_whole(tones, tmp_path, capsys):
    text = " ".join(["ab", "ba", "a'b", "bab"] * 8)
    audio = record(tmp_path / "a.flac", text)
    (tmp_path / "a.txt").write_text(text + "\n", encoding="utf-8-sig")
    waveform, starts = speak(text)
    assert len(waveform) > 6 * 16_000
    assert command.main([tones, audio, "--piece-seconds", "1.3"]) == 0
    (said,) = lines_of(capsys.readouterr().out)
    first = [starts[match.start()] for match in re.finditer(r"[^ ]+", text)]
    assert [word["word"] for word in said["words"]] == text.split()
    # Pieces are not cut at multiples of a frame.
    assert [word["start_s"] for word in said["words"]] == pytest.approx([0.025 * frame for frame in first], abs=0.026)
    assert said["seconds"] == round(len(waveform) / 16_000, 3)
    assert max(word["end_s"] for word in said["words"]) <= said["seconds"]


def test_transcripts_that_were_swapped_are_the_suspicious_ones(tones, shards, capsys):
    assert command.main([tones, str(shards), "--suspicious", "2"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "2 of 8 utterances are not aligned:"
    assert shown[1:3] == [f"  {FOREIGN}: the model cannot write '?'", shown[2]]
    assert re.fullmatch(rf"  {CRAMMED}: the text needs 179 frames .*, the recording has \d+", shown[2])
    assert shown[3].startswith("the 2 utterances with the lowest scores")
    assert {shown[4].split(":")[0], shown[7].split(":")[0]} == {"  utt-1", "  utt-4"}
    heard = {
        line.split()[0]: shown[place + 2].split(maxsplit=1)[1] for place, line in enumerate(shown) if place in (4, 7)
    }
    assert heard == {"utt-1:": "bab", "utt-4:": "b'a'b aab"}


@pytest.mark.parametrize("spoken, written", [("ab ba", "ab"), ("ab", "ab ba")], ids=["left out", "added"])
def test_a_word_too_few_or_too_many_lowers_the_score(tones, tmp_path, capsys, spoken, written):
    audio = record(tmp_path / "a.flac", spoken)
    assert command.main([tones, audio, "--text", written]) == 0
    assert lines_of(capsys.readouterr().out)[0]["score"] < 0.1


def test_files_of_many_utterances_name_first_what_is_not_aligned(tones, shards, tmp_path, capsys, monkeypatch):
    assert command.main([tones, str(shards), "--out", str(tmp_path / "a.jsonl")]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("2 of 8 utterances are not aligned:") and "a.jsonl: 6 utterances aligned" in shown
    written = lines_of((tmp_path / "a.jsonl").read_text())
    assert [line["key"] for line in written] == [FOREIGN, CRAMMED, *(f"utt-{n}" for n in range(6))]
    assert ["reason" in line for line in written] == [True] * 2 + [False] * 6
    monkeypatch.setattr(command, "LOG_EVERY", 3)
    assert command.main([tones, str(shards), "--format", "ctm"]) == 0
    out, err = capsys.readouterr()
    assert err.startswith("3 of 8 utterances done\n6 of 8 utterances done\n2 of 8 utterances are not aligned:")
    assert [line.startswith(";;") for line in out.splitlines()][:3] == [True, True, False]
    assert [line.split()[0] for line in out.splitlines()[2:5]] == ["utt-0", "utt-0", "utt-1"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("format, suffix", [("textgrid", ".TextGrid"), ("srt", ".srt")])
def test_a_file_for_each_utterance(tones, shards, tmp_path, capsys, format, suffix):
    assert command.main([tones, str(shards), "--format", format, "--out", str(tmp_path / "each")]) == 0
    assert sorted(path.name for path in (tmp_path / "each").iterdir()) == [f"utt-{n}{suffix}" for n in range(6)]
    audio = record(tmp_path / "one.flac", "ab ba")
    capsys.readouterr()
    assert command.main([tones, audio, "--text", "ab ba", "--format", format]) == 0
    on_stdout = capsys.readouterr().out
    assert command.main([tones, audio, "--text", "ab ba", "--format", format, "--out", str(tmp_path / "one")]) == 0
    assert (tmp_path / "one").read_text() == on_stdout and "ab" in on_stdout


def test_real_speech_through_a_model_is_what_torchaudio_aligns(tmp_path, dev_speech, capsys):
    state = tiny_state(vocabulary={"symbols": "' abcdefghijklmnopqrstuvwxyz"})
    checkpoint = write_checkpoint(tmp_path / "best.pt", state)
    recogniser = load_recogniser(checkpoint)
    transcripts = sorted(dev_speech.rglob("*.trans.txt"))[0]
    names = []
    for line in transcripts.read_text().splitlines()[:3]:
        name, text = line.split(maxsplit=1)
        (tmp_path / f"{name}.txt").write_text(text)
        (tmp_path / f"{name}.flac").write_bytes((transcripts.parent / f"{name}.flac").read_bytes())
        names.append(str(tmp_path / f"{name}.flac"))
    assert command.main([str(checkpoint), *names, "--piece-seconds", "60"]) == 0
    for name, said in zip(names, lines_of(capsys.readouterr().out), strict=True):
        waveform, _ = soundfile.read(name, dtype="int16")
        logits, _ = recogniser.logits(torch.from_numpy(waveform)[None], torch.tensor([len(waveform)]))
        classes = recogniser.tokeniser.encode(said["text"])
        path, scores = forced_align(logits.log_softmax(-1), torch.from_numpy(classes)[None], blank=28)
        spans = merge_tokens(path[0], scores[0], blank=28)
        at = 0
        for word in said["words"]:
            letters = spans[at : at + len(word["word"])]
            assert word["start_s"] == pytest.approx(0.025 * letters[0].start, abs=0.0006)
            assert word["end_s"] == pytest.approx(0.025 * letters[-1].end, abs=0.0006)
            assert word["confidence"] == pytest.approx(np.exp(np.mean([s.score for s in letters])), abs=6e-5)
            at += len(letters) + 1
        assert at == len(spans) + 1


def test_bad_files_are_named_and_the_others_aligned(tones, tmp_path, capsys):
    good = record(tmp_path / "good.flac", "ab")
    (tmp_path / "good.txt").write_text("ab")
    without = record(tmp_path / "without.flac", "ab")
    (tmp_path / "noise.wav").write_text("no audio")
    (tmp_path / "noise.txt").write_text("ab")
    latin = record(tmp_path / "latin.flac", "ab")
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\xe9")
    assert command.main([tones, without, str(tmp_path / "noise.wav"), latin, good]) == 2
    out, err = capsys.readouterr()
    assert [line["key"] for line in lines_of(out)] == ["good"]
    errors = err.splitlines()
    assert len(errors) == 3 and all(line.startswith("error: cannot read ") for line in errors)
    assert "without.txt: No such file" in errors[0] and "with --text for one" in errors[0]
    assert "noise.wav" in errors[1] and "latin.txt: it is not UTF-8" in errors[2]


@pytest.mark.parametrize("text", ["ab" * 500, "", "über"])
def test_a_text_that_does_not_fit_ends_with_its_reason(tones, tmp_path, capsys, text):
    audio = record(tmp_path / "a.flac", "ab")
    assert run_entry_point(lambda: command.main([tones, audio, "--text", text, "--format", "srt"])) == 2
    out, err = capsys.readouterr()
    assert (
        out == "" and "  a: the " in err and err.endswith("no utterance could be aligned: look at the reasons above\n")
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere"], "there is no nowhere: name shard directories or audio files"),
        (["a.flac", "."], "is a shard directory and others are audio files"),
        (["a.flac", "b.flac", "--text", "ab"], "--text is the text of one audio file"),
        (["a.flac", "sub/a.flac"], "two audio files are named 'a'"),
        (["a.flac", "b.flac", "--format", "srt"], "--format srt makes a file for each utterance: name a directory"),
        (["a.flac", "b.flac", "--format", "srt", "--out", "a.flac"], "a.flac cannot be made: File exists"),
        (["a.flac", "--out", "no/such/place"], "no/such/place cannot be written"),
        (["a.flac", "--out", "sub"], "sub is a directory"),
        (["a.flac", "--suspicious", "-1"], "--suspicious must be 0 or more"),
        (["a.flac", "--piece-seconds", "0"], "--piece-seconds must be between"),
    ],
)
def test_nonsense_is_refused_in_one_sentence(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    for name in ("a.flac", "b.flac", "sub/a.flac"):
        record(tmp_path / name, "ab")
    with pytest.raises(UserError, match=re.escape(message)):
        command.main(["best.pt", *arguments])


def test_an_interruption_leaves_whole_files(tones, shards, tmp_path, monkeypatch):
    from ddp_asr.recognition import alignment as corpus

    align_one, done = corpus.align_text, []

    def interrupted(*arguments):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(1)
        return align_one(*arguments)

    monkeypatch.setattr(corpus, "align_text", interrupted)
    out = tmp_path / "each"
    assert run_entry_point(lambda: command.main([tones, str(shards), "--format", "textgrid", "--out", str(out)])) == 130
    assert len(list(out.iterdir())) == 3
    assert all(read_textgrid(path.read_text()) for path in out.iterdir())
    done.clear()
    one = tmp_path / "all.ctm"
    assert run_entry_point(lambda: command.main([tones, str(shards), "--format", "ctm", "--out", str(one)])) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["each"]
