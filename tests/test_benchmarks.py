"""Every benchmark runs, in a reduced form, and prints what it has measured. How fast that was is not looked at."""

import json
import subprocess
import sys

import pytest

from tests import tiny_speech
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """24 utterances of noise, 1 to 2 s."""
    directory = tmp_path_factory.mktemp("benchmarks")
    entries = []
    for number in range(24):
        file = directory / f"{number}.flac"
        file.write_bytes(tiny_speech.encode(tiny_speech.noise(1 + number / 24, seed=number)))
        entries.append(
            {"audio_filepath": file.name, "text": "noise " + "no " * (number % 3) + "more", "id": f"n-{number}"}
        )
    manifest = tiny_speech.manifest(directory / "manifest.jsonl", entries)
    return tiny_speech.shard(manifest, directory / "shards", "--shard-mb", "0.2")


def run(module, *arguments):
    command = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments), "--json"]
    answer = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


@pytest.mark.slow
def test_step(shards):
    result = run("step", shards, "--small", "--rounds", "1", "--precisions", "fp32")
    assert list(result["speeds"]) == ["tutorial fp32", "ddp_asr fp32"]
    assert all(value > 0 for speed in result["speeds"].values() for value in speed.values())
    parts = result["breakdown"]["parts"]
    assert sum(parts.values()) == pytest.approx(1.0)
    assert {"convolutions", "recurrent products", "input products", "dropout", "features", "optimiser"} <= parts.keys()


def test_both_networks_have_as_many_parameters():
    from benchmarks.step import Sizes, tutorial_model
    from ddp_asr.config import Config
    from ddp_asr.model import count_parameters, make_model

    assert count_parameters(tutorial_model(Sizes(), 29)) == count_parameters(make_model(Config(), 29)) == 23_705_373


@pytest.mark.slow
def test_loader(shards):
    result = run(
        "loader", shards, "--small", "--threads", "0", "2", "--augment.speeds=0.9,1", "--augment.noise.share=1"
    )
    assert {"floor", "threads 0", "threads 2", "webdataset"} <= result["speeds"].keys()
    assert all(value > 0 for speed in result["speeds"].values() for value in speed.values())


@pytest.mark.slow
def test_scaling(shards, tmp_path):
    result = run("scaling", shards, "--small", "--steps", "1", "--measure", "2", "--plot", tmp_path / "scaling.png")
    assert list(result["measured"]["weak"]) == list(result["measured"]["strong"]) == ["2"]
    for kind, longest in (("strong", 4), ("weak", 64)):
        rows = result[kind]
        assert rows[0]["efficiency"] == 1.0 and rows[-1]["world_size"] == longest
        assert all(0 < row["balance"] <= 1 and row["efficiency"] <= 1.01 for row in rows)
        assert all(row["step_s"] >= row["compute_s"] + row["all_reduce_s"] for row in rows)
    assert (tmp_path / "scaling.png").stat().st_size > 10_000


@pytest.mark.slow
def test_encoders(shards):
    small = "--encoder.conv_channels=4 --batch.micro_batches=1 --augment.speeds=1"
    bigru = f"configs/librispeech_100.yaml {small} --encoder.rnn_size=16"
    conformer = f"configs/librispeech_100_conformer.yaml {small} --encoder.size=32 --encoder.blocks=1"
    result = run("encoders", shards, "--rounds", "2", "--way", bigru, "--way", conformer)
    assert result["batch"]["utterances"] > 1 and list(result["ways"]) == [bigru, conformer]
    for way, frames in ((bigru, 40), (conformer, 25)):
        found = result["ways"][way]
        assert found["frames_per_s"] == pytest.approx(frames) and found["parameters"] > 0
        assert len(found["cpu_s"]) == 2 and min(found["cpu_s"]) > 0


def test_a_ring_of_all_reduce():
    from benchmarks.scaling import pieces

    alone = {"per_audio_s": 0.01, "update_s": 0.1, "gradient_bytes": 90 << 20}
    of = pieces(alone, {"all_reduce_s": {str(4 << 10): 0.002, str(64 << 20): 0.066}}, world_size=2)
    assert of.latency_s == pytest.approx(0.001) and of.bytes_per_s == pytest.approx(2**20 / 0.001)
    assert of.all_reduce_s(1) == 0.0 and of.all_reduce_s(2) == pytest.approx(0.002 + 0.09)
    assert of.all_reduce_s(1024) == pytest.approx(2046 * 0.001 + 2 * 1023 / 1024 * 0.09)


def test_plan():
    result = run("plan", "--utterances", "2000", "--micro-batches", "4")
    assert result["utterances"] == 2000 and 0 < result["balance"]["4"] <= 1
