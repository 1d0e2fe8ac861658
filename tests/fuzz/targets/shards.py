"""Shard directories: index.parquet, dataset.json, the tars, and what an interrupted sharding has left."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from ddp_asr.config import config_from_dict
from ddp_asr.data import writer
from ddp_asr.data.corpus import read_corpus
from ddp_asr.data.index import COLUMNS, Index, read_dataset_json, read_index
from ddp_asr.data.loader import eval_loader
from ddp_asr.data.sources import SourceOptions, open_source
from ddp_asr.text import make_tokeniser
from tests.fuzz.mutate import Tree, mutate_bytes, mutate_json
from tests.fuzz.target import Target, Wrong
from tests.tiny_speech import content, encode, noise

SETTINGS: dict[str, Any] = {
    "vocabulary": {"symbols": "abcdefghijklmnopqrstuvwxyz "},
    "features": {"mel_bands": 16, "n_fft": 512},
    "encoder": {"conv_channels": 2, "residual_blocks": 1, "rnn_layers": 1, "rnn_size": 12},
    "batch": {"micro_batches": 2, "max_seconds": 5},
    "augment": {"frequency_mask_bands": 4},
    "data": {"threads": 0},
}


def make_shards(directory: Path, utterances: int = 6) -> Path:
    """Shards of a small manifest; the same bytes each time."""
    source, out = directory / "source", directory / "shards"
    source.mkdir(parents=True)
    lines = []
    for number in range(utterances):
        (source / f"{number}.flac").write_bytes(encode(noise(0.4 + 0.02 * number, seed=number)))
        lines.append(json.dumps({"audio_filepath": f"{number}.flac", "text": f"text of {'abcdef'[number]}"}))
    (source / "mine.jsonl").write_text("\n".join(lines))
    opened = open_source(str(source / "mine.jsonl"), SourceOptions())
    writer.write_shards(opened, out, shard_mb=0.02, max_seconds=None, workers=1, report=lambda *_: None)
    return out


class IndexFile(Target):
    """index.parquet and dataset.json beside it, with the old checksum and with a right one"""

    name = "index"
    share = 120

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        self.valid: Tree = dict(content(make_shards(scratch)))
        self.index = _rows_of(read_index([scratch / "shards"]))
        self.config = config_from_dict(SETTINGS, "the test")
        self.tokeniser = make_tokeniser(self.config.vocabulary)

    def seeds(self) -> list[Tree]:
        return [self.valid]

    def mutate(self, tree: Tree, random: Random) -> Tree:
        table, dataset = tree["index.parquet"], tree["dataset.json"]
        assert isinstance(table, bytes) and isinstance(dataset, bytes)
        if random.random() < 0.3:
            return {**tree, "index.parquet": mutate_bytes(table, random)}
        if random.random() < 0.3:
            return {**tree, "dataset.json": _changed_json(dataset, random)}
        table = mutate_bytes(table, random) if random.random() < 0.4 else _other_table(table, random)
        described = {**json.loads(dataset), "index_sha256": hashlib.sha256(table).hexdigest()}
        return {**tree, "index.parquet": table, "dataset.json": resealed(json.dumps(described).encode())}

    def read(self, directory: Path) -> None:
        index = read_index([directory])
        same_checksum = (directory / "dataset.json").read_bytes() == self.valid["dataset.json"]
        if same_checksum and _rows_of(index) != self.index:
            raise Wrong("other utterances than those that the index's checksum covers")
        index.fingerprint()
        for batch in eval_loader(index, self.tokeniser, self.config, pin_memory=False):
            assert batch is None or batch.utterances + len(batch.bad) > 0
        settings = {**SETTINGS, "data": {"train": [str(directory)], "threads": 0}}
        read_corpus(config_from_dict(settings, "the test")).plan.epoch(0)


def resealed(data: bytes) -> bytes:
    """A JSON object with its own checksum made right again (ddp_asr/files.py), where it has one."""
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(data)
        if isinstance(value, dict) and "seal" in value:
            fields = {name: value[name] for name in value if name != "seal"}
            seal = hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
            return json.dumps({**fields, "seal": seal}).encode()
    return data


def _changed_json(data: bytes, random: Random) -> bytes:
    """Changed, and mostly with a right checksum in it."""
    changed = mutate_json(data, random)
    return resealed(changed) if random.random() < 0.7 else changed


def _rows_of(index: Index) -> list:
    return [index.keys.to_pylist(), index.texts.to_pylist(), index.samples.tolist(), index.offset.tolist()]


def _other_table(data: bytes, random: Random) -> bytes:
    """A whole Parquet file with other rows, types or columns."""
    columns = pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pydict()
    name = random.choice(COLUMNS.names)
    change = random.randrange(6)
    if change == 0:
        del columns[name]
    elif change == 1:
        columns = {each: values * 2 for each, values in columns.items()}
    elif change == 2:
        columns = {each: values[:0] for each, values in columns.items()}
    elif change == 3:
        columns[name] = [random.choice(("x", None, "\ue000", "1")) for _ in columns[name]]
    else:
        place = random.randrange(len(columns[name]))
        numbers = (-1, 0, 1, 2**31 - 1, -(2**31), None, 2**62, -(2**63), 2**63 - 1, 10**9)
        texts = ("", None, "a\nb", "ä", "\x00", "t" * 100_000, columns[name][0], "../../x")
        columns[name][place] = random.choice(texts if isinstance(columns[name][place], str) else numbers)
    file = io.BytesIO()
    try:
        types = [field for field in COLUMNS if field.name in columns]
        table = pyarrow.table(columns, schema=pyarrow.schema(types)) if change != 3 else pyarrow.table(columns)
    except (pyarrow.ArrowInvalid, OverflowError, pyarrow.ArrowTypeError):
        table = pyarrow.table({each: [str(value) for value in values] for each, values in columns.items()})
    pyarrow.parquet.write_table(table, file)
    return file.getvalue()


class Dataset(IndexFile):
    """dataset.json alone"""

    name = "dataset"
    share = 60

    def mutate(self, tree: Tree, random: Random) -> Tree:
        dataset = tree["dataset.json"]
        assert isinstance(dataset, bytes)
        return {**tree, "dataset.json": _changed_json(dataset, random)}

    def read(self, directory: Path) -> None:
        read_dataset_json(directory)
        index = read_index([directory])
        if _rows_of(index) != self.index and self.valid["index.parquet"] == (directory / "index.parquet").read_bytes():
            raise Wrong("other utterances than those of the index")
        for _ in writer.verify(directory, workers=1):
            pass


class Shard(IndexFile):
    """Damaged tars: what `--verify` and the loader make of them"""

    name = "shard"
    share = 50

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        self.waveforms = self._waveforms(scratch / "shards")

    def mutate(self, tree: Tree, random: Random) -> Tree:
        name = random.choice([name for name in tree if name.endswith(".tar")])
        data = tree[name]
        assert isinstance(data, bytes)
        changed = mutate_bytes(data, random)
        if random.random() < 0.8:  # of the same size, which every start compares
            changed = changed[: len(data)].ljust(len(data), b"\0")
        return {**tree, name: changed}

    def read(self, directory: Path) -> None:
        damaged = any((directory / name).read_bytes() != data for name, data in self.valid.items())
        read_index([directory])
        for key, samples in self._waveforms(directory).items():
            if not np.array_equal(samples, self.waveforms[key]):
                raise Wrong(f"{key} decodes to other samples, and its FLAC has an MD5")
        for _ in writer.verify(directory, workers=1):
            pass
        if damaged:
            raise Wrong("--verify accepts a shard that is not what was written")

    def _waveforms(self, directory: Path) -> dict[str, np.ndarray]:
        index = read_index([directory])
        found = {}
        for batch in eval_loader(index, self.tokeniser, self.config, pin_memory=False):
            if batch is not None and batch.utterances:
                for row, key in enumerate(batch.keys):
                    found[key] = batch.waveforms[row, : batch.samples[row]].numpy().copy()
        return found


class Stopped(Exception):
    """Ends a sharding in its middle."""


class Partial(Target):
    """What an interrupted sharding has left in .partial"""

    name = "partial"
    share = 20

    def __init__(self, scratch: Path) -> None:
        super().__init__(scratch)
        make_shards(scratch)
        self.source = open_source(str(scratch / "source" / "mine.jsonl"), SourceOptions())
        stopped = scratch / "stopped"

        def stop(output: writer.Output, total: int) -> None:
            if len(output.finished) >= 2:
                raise Stopped

        with contextlib.suppress(Stopped):
            writer.write_shards(self.source, stopped, shard_mb=0.02, max_seconds=None, workers=1, report=stop)
        self.left: Tree = {name: data for name, data in content(stopped).items() if not name.endswith("lock")}

    def seeds(self) -> list[Tree]:
        return [{f"out/{name}": data for name, data in self.left.items()}]

    def mutate(self, tree: Tree, random: Random) -> Tree:
        name = random.choice([name for name in tree if name.endswith(".json")])
        data = tree[name]
        assert isinstance(data, bytes)
        return {**tree, name: mutate_json(data, random)}  # its checksum is compared, and nobody but us writes these

    def read(self, directory: Path) -> None:
        out = directory / "out"
        writer.write_shards(self.source, out, shard_mb=0.02, max_seconds=None, workers=1, report=lambda *_: None)
        read_index([out])
