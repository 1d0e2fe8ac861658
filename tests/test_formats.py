"""Any WebDataset reader reads the shards: `webdataset` and Hugging Face `datasets` read the rows of the index."""

import json
import tarfile
from pathlib import Path

import pyarrow.parquet
import pytest

from ddp_asr.data.index import read_index
from tests import tiny_speech


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """LibriSpeech-like utterances in several shards, among them a long key, another script and a converted file."""
    root = tmp_path_factory.mktemp("formats")
    source = tiny_speech.librispeech(root / "split", speakers=2)
    entries = [
        {"audio_filepath": str(path), "text": f"NAÏVE {n}", "id": f"{path.stem}.take 1"}
        for n, path in enumerate(sorted(source.rglob("*.flac")))
    ]
    entries[1]["id"] = "k" * 200
    entries[2]["id"] = "слово"
    (root / "stereo.wav").write_bytes(
        tiny_speech.encode(tiny_speech.noise(0.4).reshape(-1, 2), rate_hz=8000, format="WAV")
    )
    entries.append({"audio_filepath": "stereo.wav", "text": "STEREO", "speaker": "s"})
    return tiny_speech.shard(
        tiny_speech.manifest(root / "m.jsonl", entries), root / "shards", "--shard-mb", "0.04", "--verify"
    )


@pytest.fixture(scope="module")
def expected(shards):
    """(key, text, FLAC bytes) of every row, read through the index."""
    index = read_index([shards])
    tars = [Path(path).read_bytes() for path in index.shards]
    assert len(tars) > 2
    flacs = [tars[s][o : o + b] for s, o, b in zip(index.shard, index.offset, index.bytes, strict=True)]
    return list(zip(index.keys.to_pylist(), index.texts.to_pylist(), flacs, strict=True))


def shard_paths(shards):
    return sorted(map(str, shards.glob("shard-*.tar")))


def test_members_have_a_fixed_owner_and_no_date(shards, expected):
    names = []
    for path in shard_paths(shards):
        with tarfile.open(path) as tar:
            for member in tar:
                names.append(member.name)
                assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o444)
                assert (member.uname, member.gname) == ("bigdata", "bigdata")
                assert bool(member.pax_headers) == (not member.name.isascii() or len(member.name) > 100)
    assert names == [f"{key}.{suffix}" for key, _, _ in expected for suffix in ("flac", "json", "txt")]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves closing to the collector
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_stock_webdataset_reads_the_same(shards, expected):
    import webdataset

    dataset = webdataset.WebDataset(shard_paths(shards), shardshuffle=False)
    samples = list(dataset)
    assert [(s["__key__"], s["txt"].decode(), s["flac"]) for s in samples] == expected
    index = read_index([shards])
    metadata = [json.loads(sample["json"]) for sample in samples]
    assert [m["samples"] for m in metadata] == index.samples.tolist()
    speakers = pyarrow.parquet.read_table(shards / "index.parquet")["speaker"]
    assert [m["speaker"] for m in metadata] == speakers.to_pylist()


@pytest.mark.slow
def test_hugging_face_datasets_reads_the_same(shards, expected, tmp_path):
    import datasets

    # Without features, `datasets` takes "flac" for Audio and wants torchcodec, even undecoded.
    string, integer = datasets.Value("string"), datasets.Value("int64")
    features = datasets.Features(
        {"__key__": string, "__url__": string, "flac": datasets.Value("binary"), "txt": string}
        | {"json": {"samples": integer, "source": string, "speaker": string}}
    )
    stream = datasets.load_dataset(
        "webdataset",
        data_files={"train": shard_paths(shards)},
        split="train",
        streaming=True,
        features=features,
        cache_dir=str(tmp_path),
    )
    samples = list(stream)
    assert [(s["__key__"], s["txt"], s["flac"]) for s in samples] == expected
    assert [s["json"]["samples"] for s in samples] == read_index([shards]).samples.tolist()


@pytest.mark.slow
def test_real_speech_passes_through_untouched(dev_speech, tmp_path):
    shards = tiny_speech.shard(dev_speech, tmp_path / "shards", "--verify", "--strict")
    index = read_index([shards])
    packed = Path(index.shards[0]).read_bytes()
    recordings = {path.stem: path.read_bytes() for path in dev_speech.rglob("*.flac")}
    transcripts = dict(
        line.split(maxsplit=1) for path in dev_speech.rglob("*.trans.txt") for line in path.read_text().splitlines()
    )
    assert (
        len(index.shards) == 1
        and dict(zip(index.keys.to_pylist(), index.texts.to_pylist(), strict=True)) == transcripts
    )
    for row in range(len(index)):
        start = int(index.offset[row])
        assert packed[start : start + int(index.bytes[row])] == recordings[index.key(row)]
