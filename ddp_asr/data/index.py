"""The table of a shard directory, one row an utterance: enough to plan without audio and to read without tar headers.

    index = read_index(["shards/train-clean-100", "shards/mine"])      # several corpora, mixed
    index.samples                                                      # int64 (N,): lengths at 16 kHz
    store.read(index.shards[index.shard[row]], index.offset[row], index.bytes[row])      # the FLAC of one row

On disk it is `index.parquet` beside `shard-000000.tar` ..., and `dataset.json`, written last, so that a directory with
it is complete: format version, counts, hours, checksums, what was dropped and why. In memory it is flat arrays, which
take a tenth of what a Python object an utterance would.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from ddp_asr import SAMPLE_RATE_HZ
from ddp_asr.data.storage import Store, open_store
from ddp_asr.errors import UserError
from ddp_asr.files import scheme_of, seal

FORMAT = "ddp_asr shards"
FORMAT_VERSION = 1
COLUMNS = pyarrow.schema(
    [
        ("key", pyarrow.string()),
        ("shard", pyarrow.int32()),
        ("offset", pyarrow.int64()),
        ("bytes", pyarrow.int64()),
        ("samples", pyarrow.int64()),
        ("text", pyarrow.string()),
        ("speaker", pyarrow.string()),
        ("language", pyarrow.string()),  # null where it is unknown; tables of older shards have no such column
    ]
)
_SAMPLES_OF_A_FRAME = 65_535  # of FLAC, at most
_LIBRISPEECH_SPLIT = re.compile(r"(dev|test)-(clean|other)|train-(clean-100|clean-360|other-500)")


@dataclass(frozen=True, eq=False)
class Index:
    """N utterances of one or more shard directories; every array is (N,)."""

    shards: tuple[str, ...]
    """The URL of every shard file of every directory, a path for local ones."""
    checksums: tuple[str, ...]
    """SHA-256 of every shard file, in hexadecimal."""
    shard: np.ndarray
    """int32: number into `shards`."""
    offset: np.ndarray
    """int64: where the FLAC starts in its shard."""
    bytes: np.ndarray
    """int64: length of the FLAC."""
    samples: np.ndarray
    """int64: length of the audio, at 16 kHz."""
    keys: pyarrow.Array
    texts: pyarrow.Array
    speakers: pyarrow.Array
    """"" where the source names none."""
    key_hash: np.ndarray
    """uint64: identifies the utterance in every random draw, whatever its row."""

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def hours(self) -> float:
        """Hours of audio."""
        return float(self.samples.sum()) / SAMPLE_RATE_HZ / 3600

    def key(self, row: int) -> str:
        """The utterance's key."""
        return str(self.keys[int(row)].as_py())

    def text(self, row: int) -> str:
        """The utterance's transcript, as given."""
        return str(self.texts[int(row)].as_py())

    def speaker(self, row: int) -> str:
        """Who speaks in the utterance, as the source names them; "" where it names nobody."""
        return str(self.speakers[int(row)].as_py())

    def take(self, rows: np.ndarray | Sequence[int]) -> Index:
        """The given rows in the given order; a boolean mask is taken too. Shards keep their numbers."""
        numbers = np.asarray(rows)
        numbers = np.flatnonzero(numbers) if numbers.dtype == bool else numbers.astype(np.int64)
        flat = {name: getattr(self, name)[numbers] for name in ("shard", "offset", "bytes", "samples", "key_hash")}
        strings = {name: getattr(self, name).take(pyarrow.array(numbers)) for name in ("keys", "texts", "speakers")}
        return Index(shards=self.shards, checksums=self.checksums, **flat, **strings)

    def fingerprint(self) -> str:
        """SHA-256 over (key, samples, text) sorted by key: independent of paths, shard cuts and order."""
        order = pyarrow.compute.sort_indices(self.keys)
        columns = (self.keys.take(order), pyarrow.array(self.samples).take(order), self.texts.take(order))
        digest = hashlib.sha256()
        for row in zip(*(column.to_pylist() for column in columns), strict=True):
            digest.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        return digest.hexdigest()


def key_hashes(keys: Sequence[str]) -> np.ndarray:
    """uint64 (N,): the first 8 bytes of BLAKE2b over each key, little endian."""
    hashes = b"".join(hashlib.blake2b(key.encode()).digest()[:8] for key in keys)
    return np.frombuffer(hashes, "<u8").astype(np.uint64)


def read_index(directories: Sequence[str | Path]) -> Index:
    """The rows of all directories, in order.

    Raises:
        UserError: where a directory is missing, incomplete, damaged or overlaps another.
    """
    if not directories:
        raise UserError("no shard directory given: name at least one, such as shards/train-clean-100")
    names = [os.fspath(directory) for directory in directories]
    tables: list[pyarrow.Table] = []
    shards: list[str] = []
    checksums: list[str] = []
    for directory in names:
        store = open_store(directory)
        dataset = read_dataset_json(directory)
        tables.append(_read_table(store, directory, dataset, first_shard=len(shards)))
        for shard in dataset["shards"]:
            shards.append(_complete_shard(store, directory, shard))
            checksums.append(shard["sha256"])
    table = pyarrow.concat_tables(tables)
    _refuse_duplicates(names, tables, table)
    keys = _flat(table, "key")
    return Index(
        shards=tuple(shards),
        checksums=tuple(checksums),
        shard=_flat(table, "shard").to_numpy(),
        offset=_flat(table, "offset").to_numpy(),
        bytes=_flat(table, "bytes").to_numpy(),
        samples=_flat(table, "samples").to_numpy(),
        keys=keys,
        texts=_flat(table, "text"),
        speakers=_flat(table, "speaker"),
        key_hash=key_hashes(keys.to_pylist()),
    )


def read_dataset_json(directory: str | Path) -> dict[str, Any]:
    """What `dataset.json` says; where there is none, sharding has not finished."""
    directory = os.fspath(directory)
    name = directory.rstrip("/").rpartition("/")[2]
    split = name if _LIBRISPEECH_SPLIT.fullmatch(name) else "SOURCE"
    remedy = f"python -m ddp_asr.shard {split} --out {directory}"
    try:
        dataset = json.loads(_read_whole(open_store(directory), _join(directory, "dataset.json")))
    except (FileNotFoundError, NotADirectoryError):
        if scheme_of(directory) == "" and not os.path.isdir(directory):
            raise UserError(f"{directory}: no such shard directory; this command makes it: {remedy}") from None
        raise UserError(f"{directory}: no dataset.json in it, so its shards are not finished; run: {remedy}") from None
    except (OSError, ValueError, RecursionError) as error:
        message = f"{directory}/dataset.json cannot be read ({error}); delete {directory} and run: {remedy}"
        raise UserError(message) from None
    found = (dataset.get("format"), dataset.get("version")) if isinstance(dataset, dict) else None
    if found != (FORMAT, FORMAT_VERSION):
        raise UserError(
            f"{directory}/dataset.json describes {found or 'no shards'}, this program reads "
            f"{(FORMAT, FORMAT_VERSION)}; make the shards again with: {remedy}"
        )
    problem = _misfit(dataset)
    if dataset.get("seal", seal(dataset)) != seal(dataset):  # shards that are older than the seal have none
        problem = "does not match its own checksum: it was changed or damaged"
    if problem:
        raise UserError(f"{directory}/dataset.json {problem}; delete {directory} and run: {remedy}")
    return dict(dataset)


def _misfit(dataset: dict[str, Any]) -> str:
    """What this program cannot use in a `dataset.json`; "" where nothing is wrong."""
    kinds = {"source": dict, "settings": dict, "shards": list, "dropped": dict, "utterances": int, "hours": int | float}
    for name, kind in kinds.items():
        if not isinstance(dataset.get(name), kind):
            return f"says {dataset.get(name)!r} for {name}"
    for shard in dataset["shards"]:
        fields = shard if isinstance(shard, dict) else {}
        # A name with a folder in it would be read, and a checksum that is a path be written, outside the directory.
        named = re.fullmatch(r"shard-\d{6,}\.tar", str(fields.get("name")))
        summed = re.fullmatch(r"[0-9a-f]{64}", str(fields.get("sha256")))
        if not (named and summed and isinstance(fields.get("bytes"), int)):
            return f"says {shard!r} for a shard"
    return ""


def write_index(path: Path, columns: dict[str, Sequence[Any]]) -> None:
    """Writes `index.parquet`; the same columns give the same bytes."""
    pyarrow.parquet.write_table(pyarrow.table(columns, schema=COLUMNS), path)


def _join(directory: str, name: str) -> str:
    return f"{directory.rstrip('/')}/{name}"


def _read_whole(store: Store, name: str) -> bytes:
    return store.read(name, 0, store.size(name))


def _read_table(store: Store, directory: str, dataset: dict[str, Any], first_shard: int) -> pyarrow.Table:
    """The directory's rows, their shards numbered from `first_shard`."""
    path = _join(directory, "index.parquet")
    try:
        content = _read_whole(store, path)  # read once, so that what is checked is what is used
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); delete {directory} and shard it again") from None
    # Our Parquet file has no checksum inside, so a flipped bit could change a transcript and raise nothing. The check
    # costs 0.06 s for the 64 MB of 281,241 rows.
    found, expected = hashlib.sha256(content).hexdigest(), str(dataset.get("index_sha256"))
    if found != expected:
        raise UserError(
            f"{path} does not match its checksum (SHA-256 {found[:16]}..., {directory}/dataset.json says "
            f"{expected[:16]}...): it is damaged; delete {directory} and shard it again"
        )
    try:
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(content))
        if "language" not in table.column_names:
            table = table.append_column("language", pyarrow.nulls(table.num_rows, pyarrow.string()))
        table = table.select(COLUMNS.names).cast(COLUMNS)
        table.validate(full=True)  # UTF-8 in texts, for instance
        fitting = _rows_fit(table, dataset)
    except (pyarrow.ArrowException, ValueError, KeyError, OSError, OverflowError):
        fitting = False
    if not fitting:
        raise UserError(f"{path} is no table of these shards, though its checksum is right; shard {directory} again")
    numbers = pyarrow.compute.add(table["shard"], pyarrow.scalar(first_shard, pyarrow.int32()))
    return table.set_column(COLUMNS.get_field_index("shard"), COLUMNS.field("shard"), numbers)


def _rows_fit(table: pyarrow.Table, dataset: dict[str, Any]) -> bool:
    """Whether there are as many rows as stated, and every row has all values but the language and lies in a shard."""
    if table.num_rows != dataset["utterances"] or any(c.null_count for c in table.drop_columns("language").columns):
        return False
    shard, offset, size, samples = (_flat(table, name).to_numpy() for name in ("shard", "offset", "bytes", "samples"))
    if not ((shard >= 0) & (shard < len(dataset["shards"])) & (offset >= 0) & (size > 0) & (samples > 0)).all():
        return False
    ends = np.array([each["bytes"] for each in dataset["shards"]], np.int64)[shard]
    within = size <= ends - np.minimum(offset, ends)
    # A loader makes room for so many samples before it opens the FLAC, whose frames have at least 10 bytes.
    return bool((within & (samples // _SAMPLES_OF_A_FRAME * 10 <= size)).all())


def _complete_shard(store: Store, directory: str, shard: dict[str, Any]) -> str:
    """The shard's URL, if it is there in its full size; its content is compared by `shard --verify`, in minutes."""
    url = _join(directory, shard["name"])
    try:
        size = store.size(url)
    except FileNotFoundError:
        raise UserError(f"{url} is missing; delete {directory} and shard it again") from None
    if size != shard["bytes"]:
        raise UserError(f"{url} has {size} bytes instead of {shard['bytes']}; delete {directory} and shard it again")
    return url


def _refuse_duplicates(directories: Sequence[str], tables: list[pyarrow.Table], table: pyarrow.Table) -> None:
    counts = pyarrow.compute.value_counts(table["key"])
    repeated = counts.filter(pyarrow.compute.greater(counts.field("counts"), 1))
    if len(repeated):
        key = repeated.field("values")[0].as_py()
        holders = [d for d, t in zip(directories, tables, strict=True) if key in t["key"].to_pylist()]
        raise UserError(
            f"{len(repeated)} utterances are there more than once, such as {key!r} in {' and '.join(holders)}: "
            "every key may be trained once an epoch; name each shard directory once and leave out overlapping ones"
        )


def _flat(table: pyarrow.Table, name: str) -> pyarrow.Array:
    column = table[name].combine_chunks()
    return column.chunk(0) if isinstance(column, pyarrow.ChunkedArray) else column
