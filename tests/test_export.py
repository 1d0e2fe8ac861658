"""`ddp-asr export`: the ONNX model beside torch's, the script beside `ddp-asr transcribe`, on real speech."""

import dataclasses
import json
import os
import re
import runpy
import subprocess
import sys
import wave
from importlib.util import find_spec

import numpy as np
import pytest
import soundfile
import torch
import yaml

from ddp_asr import config, export
from ddp_asr import transcribe as transcribe_command
from ddp_asr.encoders import ENCODERS
from ddp_asr.errors import UserError
from ddp_asr.features.log_mel import LogMel
from ddp_asr.model import make_model
from ddp_asr.recognition import exporting, standalone
from ddp_asr.recognition.recogniser import build_recogniser, read_trained
from ddp_asr.recognition.transcription import cut_in_pauses
from tests import tiny_encoders
from tests.conftest import REPOSITORY
from tests.tiny_recogniser import noises, tiny_state, write_checkpoint

pytestmark = pytest.mark.skipif(find_spec("onnxruntime") is None, reason="onnxruntime has no wheel here")

CPU = torch.device("cpu")
LETTERS = "' abcdefghijklmnopqrstuvwxyz"
PIECES = {"kind": "pieces", "size": 60, "symbols": LETTERS}


@pytest.fixture(scope="module")
def speech(dev_speech):
    """int16 (S,) of six utterances, of 0.3 to 4 s."""
    paths = sorted(dev_speech.rglob("*.flac"))[:6]
    seconds = (0.3, 4, 1.1, 2.7, 0.6, 3.3)
    return [
        soundfile.read(path, dtype="int16")[0][: round(length * 16_000)]
        for path, length in zip(paths, seconds, strict=True)
    ]


def write_wav(path, samples, rate_hz=16_000, width=2):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate_hz)
        file.writeframes(samples.tobytes())
    return str(path)


def state_of(kind="rescnn_bigru", number=0, averaged=True, **sections):
    """Of a tiny model of any kind, with an average beside its weights."""
    encoder = {"kind": kind, "dropout": 0.0, **tiny_encoders.SETTINGS[kind][number]}
    state = tiny_state(encoder=encoder, vocabulary={"symbols": LETTERS}, **sections)
    return {**state, "averages": {name: 0.9 * weight for name, weight in state["model"].items()} if averaged else None}


def state_with_pieces():
    """The same for word pieces, learnt of a few sentences."""
    from ddp_asr.text.pieces import Pieces

    sentences = (REPOSITORY / "README.md").read_text().lower().splitlines()
    settings = config.config_from_dict({**state_of()["config"], "vocabulary": PIECES}, "the test")
    tokeniser = Pieces.from_settings(settings.vocabulary, ["".join(c for c in s if c in LETTERS) for s in sentences])
    torch.manual_seed(3)
    model = make_model(settings, tokeniser.size)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return {
        **state_of(averaged=False),
        **{"config": dataclasses.asdict(settings), "tokeniser": tokeniser.state(), "model": dict(model.state_dict())},
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A run and what is exported of it, by the command."""
    directory = tmp_path_factory.mktemp("export")
    write_checkpoint(directory / "run" / "best.pt", state_of())
    lines = [{"kind": "test", "step": 5, "wer": 0.9}, {"kind": "test", "step": 7, "wer": 0.125}]
    (directory / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    facts = {
        **{"checkpoint": str(directory / "run" / "best.pt"), "step": 7, "epoch": 2, "utterances": 1234, "hours": 1.5},
        **{"wer": 0.1234, "wer_interval": [0.1, 0.15], "cer": 0.05, "cer_interval": [0.04, 0.06]},
        "decoder": {"kind": "greedy"},
    }
    (directory / "an4-test.json").write_text(json.dumps(facts))
    arguments = [str(directory / "run"), "--out", str(directory / "model")]
    assert export.main([*arguments, "--evaluation", str(directory / "an4-test.json")]) == 0
    return directory


# ---- the model -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 4])
@pytest.mark.parametrize("kind", ENCODERS)
def test_the_model_gives_what_torch_gives_for_any_batch_and_length(tmp_path, speech, kind, number):
    recogniser = build_recogniser(read_trained(write_checkpoint(tmp_path / "a.pt", state_of(kind, number))), CPU)
    exporting.write_model(recogniser, tmp_path)
    assert exporting.largest_difference(recogniser, tmp_path) < exporting.TOLERANCE
    assert exporting.largest_difference(recogniser, tmp_path, speech) < exporting.TOLERANCE
    assert exporting.largest_difference(recogniser, tmp_path, speech[::-1]) < exporting.TOLERANCE


@pytest.mark.slow
def test_a_model_that_differs_is_not_left_behind(tmp_path, monkeypatch):
    write, other = (
        exporting._write_onnx,
        build_recogniser(read_trained(write_checkpoint(tmp_path / "b.pt", state_of(seed=11))), CPU),
    )
    monkeypatch.setattr(exporting, "_write_onnx", lambda recogniser, path: write(other, path))
    path = write_checkpoint(tmp_path / "run" / "best.pt", state_of())
    with pytest.raises(UserError, match=r"differ by \d.* from the run's, and at most 0.001 is allowed, so nothing was"):
        export.main([str(path), "--out", str(tmp_path / "model")])
    assert sorted(each.name for each in tmp_path.iterdir()) == ["b.pt", "run"]


@pytest.mark.slow
def test_a_killed_export_leaves_nothing_under_the_name_and_the_next_one_works(tmp_path):
    write_checkpoint(tmp_path / "run" / "best.pt", state_of())
    killed = (
        "import os, sys; from ddp_asr import export; from ddp_asr.recognition import exporting\n"
        "exporting.largest_difference = lambda *_: os.kill(os.getpid(), 9)\n"
        "export.main(sys.argv[1:])"
    )
    arguments = [str(tmp_path / "run"), "--out", str(tmp_path / "model")]
    assert subprocess.run([sys.executable, "-c", killed, *arguments], cwd=REPOSITORY).returncode == -9
    assert not (tmp_path / "model").exists()
    assert export.main(arguments) == 0
    assert (tmp_path / "model" / "README.md").is_file()


# ---- the script ------------------------------------------------------------------------------------------------------

ALONE = """
import runpy, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in sys.stdlib_module_names | {"numpy", "onnxruntime"}:
            raise ImportError(f"{name} is not here")
sys.meta_path.insert(0, Blocked())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", ["characters", "pieces"])
def test_the_script_alone_writes_what_transcribe_writes(tmp_path, speech, vocabulary, capfd):
    if vocabulary == "pieces":
        pytest.importorskip("sentencepiece")
    state = state_of() if vocabulary == "characters" else state_with_pieces()
    write_checkpoint(tmp_path / "run" / "best.pt", state)
    assert export.main([str(tmp_path / "run"), "--out", str(tmp_path / "model")]) == 0
    waves = [write_wav(tmp_path / f"{number}.wav", samples) for number, samples in enumerate(speech)]
    waves.append(write_wav(tmp_path / "long.wav", noises(47.0)))
    capfd.readouterr()
    assert transcribe_command.main([str(tmp_path / "run"), *waves, "--cut", "pauses"]) == 0
    expected = capfd.readouterr().out
    command = [sys.executable, "-I", "-W", "error", "-c", ALONE, str(tmp_path / "model" / "transcribe.py"), *waves]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(done.stdout.splitlines()) == sorted(expected.splitlines())
    assert len(set(re.findall(r"\t(.+)", expected))) >= 3, "texts to compare"


def test_features_in_numpy_are_those_of_the_recogniser(speech):
    for tree in ({"mel_bands": 40, "n_fft": 512}, {"mel_bands": 16, "n_fft": 401, "hop_ms": 10.0}, {}):
        settings = config.config_from_dict({"features": tree}, "the test").features
        model = object.__new__(standalone.Model)
        model.settings = exporting.script_settings(settings, [], 20.0)
        model.filters = standalone.mel_filters(model.settings)
        log_mel = LogMel(settings)
        np.testing.assert_allclose(model.filters, log_mel.filters, atol=5e-5)  # torchaudio computes in float32
        for samples in (*speech, np.concatenate([np.zeros(20_000, np.int16), speech[1]]), speech[0][:399]):
            features, frames = log_mel(torch.from_numpy(samples)[None], torch.tensor([len(samples)]))
            found = model.features(samples)
            assert len(found) == frames.item() and found.dtype == np.float32
            np.testing.assert_allclose(found, features[0, : len(found)], atol=2e-4)


def test_the_script_cuts_as_transcribe_does():
    for seconds, longest in ((1.0, 16_000), (9.0, 16_000), (31.0, 80_000), (0.004, 160)):
        samples = noises(seconds, seed=int(longest))
        pieces = [samples[each] for each in cut_in_pauses(samples, longest)]
        for ours, theirs in zip(pieces, standalone.cut_in_pauses(samples, longest), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_the_mean_of_channels_is_read_and_what_does_not_suit_is_one_sentence(tmp_path):
    stereo = np.stack([noises(0.2), noises(0.2, seed=1)], axis=1)
    samples = standalone.read_wav(write_wav(tmp_path / "stereo.wav", stereo), 16_000)
    np.testing.assert_array_equal(samples, (stereo.astype(np.float32) / 32768).mean(1).__mul__(32768).round())
    (tmp_path / "text.wav").write_text("this is no recording")
    (tmp_path / "empty.wav").write_text("")
    write_wav(tmp_path / "fast.wav", noises(0.1), rate_hz=44_100)
    write_wav(tmp_path / "coarse.wav", noises(0.1).astype(np.uint8), width=1)
    for name, reason in {
        "fast": "has 44100 Hz and 16 bits, the model needs 16000 Hz and 16: convert it, as with: ffmpeg -i ",
        "coarse": "has 16000 Hz and 8 bits",
        "text": r"cannot be read as WAV \(file does not start with RIFF id\): convert it",
        "empty": r"cannot be read as WAV \(it is cut off\)",
        "none": r"cannot be read as WAV \(.*No such file",
    }.items():
        with pytest.raises(ValueError, match=reason):
            standalone.read_wav(str(tmp_path / f"{name}.wav"), 16_000)


@pytest.mark.slow
def test_a_file_that_cannot_be_read_does_not_keep_others_back(exported, tmp_path, capsys, speech):
    main = runpy.run_path(str(exported / "model" / "transcribe.py"))["main"]
    good = write_wav(tmp_path / "good.wav", speech[1])
    short = write_wav(tmp_path / "short.wav", speech[0][:100])  # less than a window
    assert main([str(tmp_path / "none.wav"), good, short]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert re.fullmatch(f"{re.escape(good)}\t.+\n{re.escape(short)}\t\n", said.out)
    assert main([]) == 2 and capsys.readouterr().err.startswith("usage: ")


# ---- weights and model card ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_model_card_is_valid_and_its_code_loads_the_averaged_weights(exported, monkeypatch):
    monkeypatch.chdir(exported / "model")
    text = (exported / "model" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields["license"] is None and fields["pipeline_tag"] == "automatic-speech-recognition"
    (result,) = fields["model-index"][0]["results"]
    assert result["dataset"]["name"] == "an4-test" and result["metrics"][0] == {"type": "wer", "value": 12.34}
    assert "| an4-test, 1.50 h, 1,234 utterances | 12.34 % | 10.00 to 15.00 % | 5.00 % | 4.00 to 6.00 % |" in body
    assert "Along the training, on the data named test above: WER 12.50 %, no interval." in body
    assert "their moving average, at step 7 in epoch 2" in body
    (code,) = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    names = {}
    exec(code, names)
    found, trained = names["model"].state_dict(), read_trained(exported / "run")
    assert trained.weights is not trained.plain_weights and found.keys() == trained.weights.keys()
    assert all(torch.equal(found[name], trained.weights[name]) for name in found)


@pytest.mark.slow
def test_the_hours_of_the_data_are_in_the_model_card(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "dataset.json").write_text(json.dumps({"hours": 2.25, "utterances": 4321}))
    data = {"train": [str(shards), "shards/gone"], "test": ["s3://bucket/test"]}
    write_checkpoint(tmp_path / "run" / "best.pt", state_of(data=data))
    assert export.main([str(tmp_path / "run"), "--out", str(tmp_path / "model")]) == 0
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"- train: `{shards}` (2.25 h, 4,321 utterances)\n- train: `shards/gone` (hours unknown" in card
    assert "- test: `s3://bucket/test` (hours unknown" in card
    assert "No evaluation was given" in card and "model-index" not in card


def test_an_evaluation_of_another_checkpoint_is_refused(tmp_path):
    path, facts = write_checkpoint(tmp_path / "run" / "best.pt", state_of()), tmp_path / "facts.json"
    arguments = [str(tmp_path / "run"), "--out", str(tmp_path / "model"), "--evaluation", str(facts)]
    with pytest.raises(UserError, match=r"facts.json is missing, or not one JSON object: make it with"):
        export.main(arguments)
    whole = {"checkpoint": str(path), "step": 7, "utterances": 1, "hours": 1.0, "wer": 0.1, "wer_interval": [0, 1]}
    whole |= {"cer": 0.1, "cer_interval": [0, 1], "decoder": {"kind": "greedy"}}
    facts.write_text(json.dumps({**whole, "wer_interval": 3}))
    with pytest.raises(UserError, match="has no valid 'wer_interval'"):
        export.main(arguments)
    for other in ({"step": 8}, {"checkpoint": "elsewhere/best.pt"}):
        facts.write_text(json.dumps({**whole, **other}))
        with pytest.raises(UserError, match="at step 7 is exported: evaluate that one"):
            export.main(arguments)


# ---- the command -----------------------------------------------------------------------------------------------------


def test_a_directory_with_files_in_it_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("mine")
    with pytest.raises(UserError, match="exists: name another directory, or remove it"):
        export.main(["runs/none", "--out", str(tmp_path / "mine")])
    assert (tmp_path / "mine" / "notes").read_text() == "mine"


def test_missing_packages_are_one_sentence_with_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name != "onnx" else True)
    with pytest.raises(UserError, match="needs onnxruntime and safetensors: install with pip install onnxruntime safe"):
        export.main(["runs/none", "--out", str(tmp_path / "model")])


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    path = write_checkpoint(tmp_path / "run" / "best.pt", state_of())
    with pytest.raises(UserError, match="nowhere is no directory; make it first"):
        export.main([str(path), "--out", str(tmp_path / "nowhere" / "model")])


@pytest.mark.slow
def test_the_commands_of_the_page_work_as_they_stand(tiny_corpus, tmp_path, speech):
    """docs/export.md, without what it installs."""
    write_checkpoint(tmp_path / "runs" / "an4" / "best.pt", state_of())
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "an4-test").symlink_to(tiny_corpus.test)
    write_wav(tmp_path / "hello.wav", speech[1])
    page = (REPOSITORY / "docs" / "export.md").read_text()
    (block,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    commands = "\n".join(line for line in block.splitlines() if not line.startswith("pip "))
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(["bash", "-ec", commands], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| an4-test, " in (tmp_path / "an4-model" / "README.md").read_text()
