"""docs/data.md: its commands, as they stand and in their order, on noise and with a tiny network; its examples."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ddp_asr import cli
from ddp_asr.data.index import read_index
from ddp_asr.data.sources import SourceOptions, huggingface, open_source
from ddp_asr.data.sources.table import COLUMNS
from tests.repository import text_of
from tests.test_an4_page import SENTENCES, blocks_of
from tests.test_readme import sections
from tests.tiny_speech import encode, noise

PAGE = "docs/data.md"
# Settings that make the training of the page take seconds.
TINY = [
    *("--train.epochs=1", "--encoder.rnn_layers=2", "--encoder.rnn_size=16", "--encoder.residual_blocks=1"),
    *("--encoder.conv_channels=4", "--features.mel_bands=40", "--features.n_fft=512"),
]


def blocks(language, heading=""):
    """The blocks of this language on the page, or below one heading of it."""
    text = sections(text_of(PAGE))[heading] if heading else text_of(PAGE)
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def audio(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(noise(1.5, seed=len(path.name)), format="WAV"))


@pytest.mark.slow
def test_the_commands_of_the_page_work_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split, speakers in (("train", ("anna", "emil")), ("test", ("otto",))):
        for speaker in speakers:
            for n, text in enumerate(SENTENCES):
                audio(tmp_path / "recordings" / split / speaker / f"{n}.wav")
                (tmp_path / "recordings" / split / speaker / f"{n}.txt").write_text(f"{text.capitalize()}.\n")
    for name in ("hello.wav", "a.wav", "b.wav", "noises/street/tram.wav"):
        audio(tmp_path / name)
    (tmp_path / "mine.csv").write_text(blocks("csv", "Tables")[0])
    (settings,) = blocks("yaml")
    (tmp_path / "mine.yaml").write_text(settings)
    for line in blocks_of(PAGE):
        program, *arguments = shlex.split(line)
        assert program == "ddp-asr"
        if arguments[0] == "train":  # it starts the ranks, and takes the signals of its process
            command = [Path(sys.executable).with_name(program), *arguments, *TINY]
            subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
        else:
            assert cli.main(arguments) == 0, line
    assert (tmp_path / "runs" / "mine" / "best.pt").is_file()
    rows = {name: len(read_index([Path("shards", name)])) for name in ("mine-train", "mine-test", "table", "noises")}
    assert rows == {"mine-train": 16, "mine-test": 8, "table": 2, "noises": 1}
    assert not (tmp_path / "runs" / "mine" / "left_out.jsonl").read_text()


@pytest.mark.parametrize(
    ("language", "heading", "place", "columns", "name"),
    [
        ("csv", "Tables", 0, "audio=clip,text=words,speaker=who", "t.csv"),
        ("csv", "Tables", 1, "", "t.csv"),
        ("tsv", "Tables", 0, "", "validated.tsv"),
        ("json", "JSONL manifest", 0, "", "m.jsonl"),
    ],
)
def test_the_examples_of_the_page_are_in_their_formats(tmp_path, language, heading, place, columns, name):
    example = blocks(language, heading)[place]
    assert example.count("\n") == 3
    (tmp_path / name).write_text(example)
    total, utterances = open_source(str(tmp_path / name), SourceOptions(columns=columns)).open()
    assert total == 3 - (language != "json")
    assert all(u.text and not u.reason and u.source in example for u in utterances)


def test_the_columns_of_the_page_are_those_that_are_known():
    rows = re.findall(r"^\| (\w+) \| (`[^|]+) \|$", sections(text_of(PAGE))["Tables"], re.MULTILINE)
    assert {field: tuple(re.findall(r"`(\w+)`", names)) for field, names in rows} == COLUMNS


def test_the_columns_of_a_hugging_face_dataset_are_those_that_are_known():
    known = {"text": huggingface.TEXTS, "id": huggingface.KEYS}
    known |= {"speaker": huggingface.SPEAKERS, "language": huggingface.LANGUAGES}
    section = sections(text_of(PAGE))["Hugging Face dataset"]
    rows = re.findall(r"^\| (\w+) \| (`[^|;]+)[^|]*\|$", section, re.MULTILINE)
    assert {field: tuple(re.findall(r"`(\w+)`", names)) for field, names in rows if field != "audio"} == known
