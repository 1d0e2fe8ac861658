"""Datasets of Hugging Face on disk: a directory of `save_to_disk`, or parquet files, read through pyarrow.

The audio is a column of structs with `bytes` and `path`: `audio`, or the only such column. The bytes are used where
there are any, else the file at `path`, which starts at the dataset's directory if it is relative. Text, key, speaker
and language are the first columns of `TEXTS`, `KEYS`, `SPEAKERS` and `LANGUAGES` that the dataset has; without a key,
it is the path's stem, and without a path the number of the row.

Of several splits one must be named: DIR/SPLIT, where DIR has a directory SPLIT or files SPLIT-00000-of-00002.parquet.
Files are mapped into memory or read by pages, in the order of their names, and only the columns that are used. So
memory holds a few rows, and the page of a parquet file that they are in.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ddp_asr.data.audio import MAX_ARCHIVED_BYTES
from ddp_asr.data.sources import (
    IMPLAUSIBLE,
    MISSING_AUDIO,
    Source,
    SourceOptions,
    Utterance,
    first_string,
    make_key,
    valid_text,
)
from ddp_asr.data.sources.archive import identity_of
from ddp_asr.data.sources.manifest import relative_stem
from ddp_asr.errors import UserError

if TYPE_CHECKING:
    import pyarrow

TEXTS = ("text", "sentence", "transcription", "transcript", "normalized_text", "normalized_transcript", "raw_text")
KEYS = ("id", "utt_id", "utterance_id", "segment_id", "audio_id")
SPEAKERS = ("speaker_id", "speaker", "client_id")
LANGUAGES = ("language", "lang", "locale")

BATCH_ROWS = 16
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_NUMBERED = re.compile(r"(.*)-(\d{5,6})-of-(\d{5,6}).*")


def try_open(name: str, options: SourceOptions) -> Source | None:
    """A file that ends in .parquet or .arrow, a directory with such files of one split, or DIR/SPLIT."""
    root = Path(name)
    if options.no_text:
        return None
    if root.is_file() and root.suffix in (".parquet", ".arrow"):
        splits = {"": [root]}
    elif root.exists():
        splits = _splits(root)
    else:
        splits = {split: files for split, files in _splits(root.parent).items() if split == root.name}
    if not splits:
        return None
    if len(splits) > 1:
        raise UserError(f"{root} holds the splits {', '.join(splits)}; name one of them, such as {root / min(splits)}")
    (files,) = splits.values()
    if not root.is_file():
        _refuse_missing(files)
    columns = _columns(files[0])
    return Source(identity_of("huggingface", root.resolve().name, files), lambda: _read(files, columns))


def _splits(root: Path) -> dict[str, list[Path]]:
    """split -> its files: arrow files of a directory or of those in it, or parquet files there or in `data`."""
    arrows = {folder: sorted(folder.glob("data-*-of-*.arrow")) for folder in (root, *sorted(root.glob("*/")))}
    if arrows[root]:
        return {root.name: arrows[root]}
    if found := {folder.name: files for folder, files in arrows.items() if files}:
        return found
    splits: dict[str, list[Path]] = {}
    for path in sorted(root.glob("*.parquet")) or sorted(root.glob("data/*.parquet")):
        numbered = _NUMBERED.fullmatch(path.stem)
        splits.setdefault(numbered[1] if numbered else "", []).append(path)
    return splits


def _refuse_missing(files: list[Path]) -> None:
    numbered = [match for path in files if (match := _NUMBERED.fullmatch(path.stem))]
    found = [(int(match[2]), int(match[3])) for match in numbered]
    if len(found) == len(files) and found != [(n, len(files)) for n in range(len(files))]:
        raise UserError(
            f"{files[0].parent} has {len(files)} files such as {files[0].name}, which are not those of one dataset: "
            "some are missing or left over; save the dataset again in an empty directory"
        )


class _Columns(NamedTuple):
    """The names of the columns that are read, "" for what the dataset does not have."""

    audio: str
    text: str
    key: str
    speaker: str
    language: str


def _columns(path: Path) -> _Columns:
    with _opened(path) as file:  # names and types are broken, too, where the file is
        return _columns_of(path, file.schema_arrow if path.suffix == ".parquet" else file.schema)


def _columns_of(path: Path, schema: pyarrow.Schema) -> _Columns:
    from pyarrow import types

    audio = [field.name for field in schema if types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0]
    if "audio" in audio:
        audio = ["audio"]
    strings = {field.name for field in schema if types.is_string(field.type) or types.is_large_string(field.type)}
    numbers = {field.name for field in schema if types.is_integer(field.type)}
    text = next((name for name in TEXTS if name in strings), "")
    if len(audio) != 1 or not text or len(set(schema.names)) != len(schema.names):
        seen = valid_text(", ".join(f"{field.name} ({str(field.type)[:40]})" for field in schema))
        raise UserError(
            f"{path} needs a column `audio` of structs with bytes and path, and one of strings for the text, named "
            f"{', '.join(TEXTS)}; its columns are {seen}"
        )
    key, speaker = (next((n for n in names if n in strings | numbers), "") for names in (KEYS, SPEAKERS))
    return _Columns(audio[0], text, key, speaker, next((name for name in LANGUAGES if name in strings), ""))


def _read(files: list[Path], columns: _Columns) -> tuple[int, Iterator[Utterance]]:
    return sum(_count(path) for path in files), _utterances(files, columns)


def _utterances(files: list[Path], columns: _Columns) -> Iterator[Utterance]:
    number = 0
    for path in files:
        for row in _rows(path, [name for name in columns if name]):
            yield _utterance(row, columns, path, number)
            number += 1


def _utterance(row: dict[str, Any], columns: _Columns, file: Path, number: int) -> Utterance:
    audio = row[columns.audio] or {}
    path, data = str(audio.get("path") or ""), audio.get("bytes")
    key = first_string(row, columns.key)
    reason, detail = "", ""
    if not data and not path:
        reason = MISSING_AUDIO
    elif data and len(data) > MAX_ARCHIVED_BYTES:
        reason, detail = IMPLAUSIBLE, f"{len(data):,} bytes, at most {MAX_ARCHIVED_BYTES:,} are read"
    return Utterance(
        key=make_key(key or (relative_stem(path, file.parent) if path else f"row-{number}")),
        source=valid_text(path or f"{file.name}, row {number}"),
        text=row[columns.text],
        speaker=first_string(row, columns.speaker),
        language=first_string(row, columns.language),
        path=None if data else file.parent / path,
        data=data or None,
        reason=reason,
        detail=detail,
    )


# ---- files ----------------------------------------------------------------------------------------------------------


def _count(path: Path) -> int:
    with _opened(path) as file:
        return int(file.metadata.num_rows) if path.suffix == ".parquet" else sum(batch.num_rows for batch in file)


def _rows(path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    with _opened(path) as file:
        left = _count(path)
        is_parquet = path.suffix == ".parquet"
        for batch in file.iter_batches(BATCH_ROWS, columns=columns) if is_parquet else file:
            used = batch.select(columns)
            used.validate(full=True)  # a broken offset would be read, a broken UTF-8 be raised, without the file's name
            left -= len(used)
            for row in range(len(used)):  # one by one, since to_pylist copies the audio
                yield used.slice(row, 1).to_pylist()[0]
        if left:
            raise ValueError(f"it states {left:,} more rows than it has")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A ParquetFile, or the reader of an arrow stream; what is wrong with the file is said in one sentence."""
    import pyarrow
    import pyarrow.parquet

    try:
        if path.suffix == ".parquet":
            with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
                yield file
        else:
            with pyarrow.memory_map(str(path)) as mapped:
                size = mapped.size()
                # Without it, a stream that is cut between two batches would look whole.
                if size < len(END_OF_STREAM) or mapped.read_at(len(END_OF_STREAM), size - 8) != END_OF_STREAM:
                    raise ValueError("it has no end")
                with pyarrow.ipc.open_stream(mapped) as reader:
                    yield reader
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, MemoryError, OverflowError) as error:
        problem = valid_text(" ".join(str(error).split())[:200])
        raise UserError(f"{path} is damaged or cut short ({problem}); save or download it again") from None
