"""`ddp_asr.load` as programs and notebooks use it; docs/api.md, block by block, on a run that was trained here."""

import json
import re
import subprocess
import sys
import warnings

import numpy as np
import pytest
import soundfile
import torch

import ddp_asr
from ddp_asr.data import audio
from ddp_asr.data.index import read_index
from ddp_asr.errors import UserError
from ddp_asr.runs import checkpoint as checkpoints
from tests import tiny_training as tiny
from tests.conftest import REPOSITORY
from tests.repository import text_of
from tests.tiny_recogniser import noises, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("run") / "best.pt")


@pytest.fixture(scope="module")
def recogniser(checkpoint):
    return ddp_asr.load(checkpoint)


@pytest.mark.slow
def test_the_blocks_of_the_page_run_as_they_stand(tiny_corpus, tmp_path, monkeypatch, capsys):
    tiny.train(tiny_corpus.arguments(tmp_path / "runs", "mine", "--train.epochs=1"))
    soundfile.write(tmp_path / "hello.wav", noises(1.5), 16_000)
    monkeypatch.chdir(tmp_path)
    variables: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text_of("docs/api.md"), re.DOTALL):
        exec(compile(block, "docs/api.md", "exec"), variables)
    assert "missing.wav: No such file or directory" in capsys.readouterr().out
    # The run knows how long what it was trained on was.
    longest_s = read_index([tiny_corpus.train]).samples.max() / 16_000
    assert checkpoints.read(tmp_path / "runs" / "mine" / "best.pt")["longest_s"] == longest_s


PROGRAM = """
import json, signal, sys
import ddp_asr
heavy = sorted({"torch", "numpy", "pyarrow", "soundfile", "rich", "yaml"} & set(sys.modules))
numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
handlers = [signal.getsignal(number) for number in numbers]
said = ddp_asr.load(sys.argv[1], cut="pauses", piece_seconds=4).transcribe(sys.argv[2])
import torch
same = handlers == [signal.getsignal(number) for number in numbers]
print(json.dumps([heavy, same, torch.distributed.is_initialized(), said.text]))
"""


def test_an_import_loads_nothing_and_a_program_prints_only_what_it_prints(checkpoint, recogniser, tmp_path):
    soundfile.write(tmp_path / "a.wav", noises(2.0), 16_000)
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(checkpoint), str(tmp_path / "a.wav")]
    done = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    text = recogniser.transcribe(tmp_path / "a.wav").text
    assert text and json.loads(done.stdout) == [[], True, False, text]
    assert done.stderr == ""


@pytest.mark.parametrize("rate_hz", [16_000, 8_000, 44_100])
def test_an_array_a_tensor_and_a_file_are_heard_alike(recogniser, tmp_path, rate_hz):
    samples = noises(2.0)
    soundfile.write(tmp_path / "a.wav", samples, rate_hz)
    said = recogniser.transcribe(str(tmp_path / "a.wav"))
    assert said.text and said.seconds == pytest.approx(2.0 * 16_000 / rate_hz, abs=0.001)
    scaled = samples / 32_768
    arrays = [samples, scaled, scaled.astype(np.float32), scaled[::-1][::-1], torch.from_numpy(samples)]
    arrays += [torch.from_numpy(scaled), torch.from_numpy(scaled).requires_grad_()]
    for heard in [*recogniser.transcribe(arrays, rate_hz), recogniser.transcribe(samples, np.float64(rate_hz))]:
        assert [(word.text, word.start_s) for word in heard.words] == [(word.text, word.start_s) for word in said.words]
    assert samples.dtype == np.int16 and np.array_equal(samples, noises(2.0))


def test_a_list_comes_in_its_order_and_as_each_alone(recogniser, tmp_path):
    soundfile.write(tmp_path / "a.wav", noises(1.0), 16_000)
    arrays = [noises(seconds, seed=n) for n, seconds in enumerate((3.0, 0.5, 2.0))]
    mixed = [arrays[0], tmp_path / "a.wav", *arrays[1:]]
    found = recogniser.transcribe(mixed, 16_000)
    assert [each.text for each in found] == [recogniser.transcribe(each, 16_000).text for each in mixed]
    assert [each.key for each in found] == ["array 0", str(tmp_path / "a.wav"), "array 2", "array 3"]
    assert recogniser.transcribe([]) == [] and len(recogniser.transcribe((arrays[0],), 16_000)) == 1


def test_logits_are_those_that_the_text_is_decoded_from(recogniser):
    logits = recogniser.logits(noises(2.0), 16_000)
    assert logits.dtype == torch.float32 and logits.device.type == "cpu" and not logits.requires_grad
    best = [index for index in torch.unique_consecutive(logits.argmax(dim=-1)).tolist() if index < logits.shape[1] - 1]
    text = "".join(" ab'"[index] for index in best)
    assert " ".join(text.split()) == recogniser.transcribe(noises(2.0), 16_000).text


GOOD = np.zeros(1_600, np.int16)


@pytest.mark.parametrize(
    ("samples", "rate_hz", "sentence"),
    [
        (GOOD, None, r"sampling rate of array 0 is None: give it as the second argument"),
        (GOOD, 0, "sampling rate of array 0 is 0:"),
        (GOOD, 16, "from 4,000 to 384,000 Hz"),
        (GOOD, 16_000.5, "is 16000.5"),
        (GOOD, float("nan"), "is nan"),
        (GOOD, "16000", "is '16000'"),
        (GOOD, [16_000], r"is \[16000\]"),
        (GOOD[:0], 16_000, "array 0 is empty"),
        (np.stack([GOOD, GOOD]), 16_000, r"array 0 has the shape \(2, 1600\): give one channel"),
        (np.zeros(()), 16_000, r"has the shape \(\): give one channel"),
        (torch.zeros(1, 1_600), 16_000, r"shape \(1, 1600\)"),
        (np.full(1_600, np.nan), 16_000, r"cannot use array 0: .*not finite"),
        (np.full(1_600, np.inf, np.float32), 16_000, "not finite"),
        (1e300 * np.ones(1_600), 16_000, "not finite"),
        (GOOD + 9_000.0, 16_000, "beyond full scale"),
        (GOOD.astype(np.int32), 16_000, "of type int32: give int16, or floating point"),
        (GOOD.astype(np.uint8), 16_000, "of type uint8"),
        (GOOD.astype(complex), 16_000, "of type complex128"),
        (GOOD.astype(bool), 16_000, "of type bool"),
        (np.array(["a", "b"]), 16_000, "of type <U1"),
        (np.array([None, 1.0]), 16_000, "of type object"),
        (b"RIFF", 16_000, "is a bytes: it must be a path"),
        (None, None, "is a NoneType"),
        ([0.1, 0.2], 16_000, "is a float"),
        ("missing.wav", None, "missing.wav: No such file or directory"),
        ("", None, "cannot read"),
        ("nul\0.wav", None, "cannot read"),
        ([GOOD, np.full(9, np.nan)], 16_000, "cannot use array 1"),
        ([GOOD, "missing.wav"], 16_000, "cannot read missing.wav"),
        ([[GOOD]], 16_000, "is a list: it must be a path"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(recogniser, samples, rate_hz, sentence):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match=sentence) as caught:
            recogniser.transcribe(samples, rate_hz)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_file_that_is_cut_off_gives_a_warning_of_python(recogniser, tmp_path, monkeypatch, capsys):
    soundfile.write(tmp_path / "a.flac", noises(2.0), 16_000)
    monkeypatch.setattr(audio, "read_mono", lambda *_: (noises(1.5), 24_000))  # libsndfile's versions differ
    with pytest.warns(UserWarning, match=r"a\.flac promises 2\.0 s and holds 1\.5 s"):
        assert recogniser.transcribe(tmp_path / "a.flac").seconds == 1.5
    assert capsys.readouterr() == ("", "")


def test_wrong_arguments_of_load_are_one_sentence(checkpoint, tmp_path):
    for arguments, sentence in (
        ({"checkpoint": tmp_path / "none"}, "there is no .*none: name a run directory"),
        ({"decoder": tmp_path / "none.yaml"}, r"cannot read the settings .*none\.yaml"),
        ({"cut": "silence"}, "cut must be 'pauses' or 'voice', not 'silence'"),
        ({"piece_seconds": 0}, "piece_seconds must be between 1 and 3600, not 0"),
    ):
        with pytest.raises(UserError, match=sentence):
            ddp_asr.load(**{"checkpoint": checkpoint, **arguments})
