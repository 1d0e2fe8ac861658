"""The commands of docs/an4.md, as they stand and in their order, on a few seconds of noise and with a tiny network."""

import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from ddp_asr import cli
from tests.conftest import REPOSITORY
from tests.tiny_speech import encode, manifest, noise

# Settings that make the training of configs/an4.yaml take seconds.
TINY = [
    *("--train.epochs=1", "--batch.max_seconds=8", "--encoder.rnn_layers=2", "--encoder.rnn_size=16"),
    *("--encoder.residual_blocks=1", "--encoder.conv_channels=4"),
]
SENTENCES = ("GO FORWARD", "ERASE A B C", "HELP", "ENTER SIX FIVE", "GO A", "C SIX", "STOP", "GO")


def blocks_of(page: str) -> list[str]:
    """The commands in the page's blocks of shell."""
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    return [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("flashlight") is None, reason="flashlight-text, for the lexicon, has no wheel here")
def test_the_commands_of_the_page_work_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split in ("train", "dev"):
        (tmp_path / "an4").mkdir(exist_ok=True)
        entries = []
        for n, text in enumerate(SENTENCES):
            (tmp_path / "an4" / f"{split}{n}.flac").write_bytes(encode(noise(1.5, seed=n)))
            entries.append({"audio_filepath": f"{split}{n}.flac", "text": text, "speaker": f"{split}{n % 3}"})
        manifest(tmp_path / "an4" / f"{split}.jsonl", entries)
    (tmp_path / "hello.wav").write_bytes(encode(noise(1.5), format="WAV"))
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    commands = blocks_of("docs/an4.md")
    assert [line.split()[1] for line in commands if line.split()[1] not in ("shard", "evaluate")] == [
        *("train", "lm", "tune", "lm", "tune", "transcribe", "align")
    ]
    for line in commands:
        program, *arguments = line.split()
        assert program == "ddp-asr"
        if arguments[0] == "train":  # it starts two ranks, and takes the signals of its process
            command = [Path(sys.executable).with_name(program), *arguments, *TINY]
            subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
        else:
            assert cli.main(arguments) == 0, line
    for name in ("decoder.yaml", "words.yaml"):
        assert "kind: " in (tmp_path / "runs" / "an4" / name).read_text(encoding="utf-8")
