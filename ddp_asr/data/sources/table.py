"""Tables with a header, .csv or .tsv: Common Voice's, DeepSpeech's, and any other, by the names of its columns.

`COLUMNS` has the names that are known; `--columns audio=path,text=sentence` chooses others. Paths are relative to the
table; Common Voice's files lie in `clips` beside it. `offset`, `duration`, and the key follow the rules of a manifest
(manifest.py); `end` is another way to state the duration.

Cells are quoted as Python's csv module writes them, but not in Common Voice's .tsv, where `"` is a letter. A .csv is
separated by whichever of `,` `;` `|` and the tabulator is most frequent in its header.
"""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from ddp_asr.data.sources import (
    BAD_LINE,
    Source,
    SourceOptions,
    Utterance,
    listed_source,
    make_key,
    read_utf8,
    valid_text,
)
from ddp_asr.data.sources.manifest import relative_stem, seconds
from ddp_asr.errors import UserError, printable

COLUMNS = {  # field -> the names of its column, in any case
    "audio": ("audio", "path", "file", "filename", "file_name", "audio_filepath", "wav", "wav_filename"),
    "text": ("text", "transcript", "transcription", "sentence"),
    "id": ("id",),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "language": ("language", "locale"),
    "offset": ("offset", "start"),
    "duration": ("duration",),
    "end": ("end",),
}
COMMON_VOICE = {"client_id", "path", "sentence"}
EXAMPLE = "--columns audio=path,text=sentence"


def try_open(name: str, options: SourceOptions) -> Source | None:
    """A file named *.csv or *.tsv; with `--columns` of any name."""
    table = Path(name)
    suffix = table.suffix.lower()
    if options.no_text or not table.is_file() or not (suffix in (".csv", ".tsv") or options.columns):
        return None
    lines = _read(read_utf8(table), is_tsv=suffix == ".tsv")
    _, header = next(lines, (1, []))
    if isinstance(header, str):
        raise UserError(f"{table}: its first line is no header of a table: {header}")
    names = [cell.strip() for cell in header]
    columns = _columns_of(table, names, _chosen(options.columns))
    clips = table.parent / "clips"
    folder = clips if set(names) >= COMMON_VOICE and clips.is_dir() else table.parent
    utterances = []
    for number, cells in lines:
        try:
            if isinstance(cells, str):
                raise ValueError(cells)
            if len(cells) != len(header):
                raise ValueError(f"{len(cells)} columns, where the header has {len(header)}")
            utterances.append(_utterance(table, folder, {field: cells[n] for field, n in columns.items()}))
        except ValueError as error:
            source = valid_text(f"{table.name}:{number}")
            utterances.append(Utterance(f"line-{number}", source, None, reason=BAD_LINE, detail=str(error)))
    return listed_source("table", table.name, utterances)


def _read(text: str, is_tsv: bool) -> Iterator[tuple[int, list[str] | str]]:
    """(number of the first line, cells or what is wrong) of each row, the header first; empty lines are left out."""
    first = text.partition("\n")[0]
    delimiter = "\t" if is_tsv else max(",;|\t", key=first.count)
    is_common_voice = is_tsv and {cell.strip() for cell in first.split(delimiter)} >= COMMON_VOICE
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=delimiter,
        quoting=csv.QUOTE_NONE if is_common_voice else csv.QUOTE_MINIMAL,
        strict=True,
    )
    while True:
        number = reader.line_num + 1
        try:
            if cells := next(reader):
                yield number, cells
        except StopIteration:
            return
        except csv.Error as error:
            # A quote that is not closed may have swallowed many rows.
            lines = f"lines {number} to {reader.line_num}: " if reader.line_num > number else ""
            yield number, lines + str(error).replace("\t", "tab")


def _utterance(table: Path, folder: Path, row: dict[str, str]) -> Utterance:
    if not (audio := row["audio"]):
        raise ValueError("no audio")
    offset_s, duration_s, end_s = (seconds(name, number(row.get(name, ""))) for name in ("offset", "duration", "end"))
    if end_s is not None and duration_s is None:
        duration_s = end_s - (offset_s or 0.0)
        if duration_s <= 0:
            raise ValueError(f"end is {end_s}, which is not after the start")
    identity = row.get("id") or relative_stem(audio, table.parent)
    return Utterance(
        key=make_key(identity, offset_s),
        source=audio,
        text=row["text"] or None,
        speaker=row.get("speaker", ""),
        language=row.get("language", ""),
        path=(table.parent if "/" in audio else folder) / audio,
        offset_s=offset_s,
        duration_s=duration_s,
    )


def number(cell: str) -> float | str | None:
    """The number in a cell, None where it is blank, or the cell itself, which `seconds` refuses by name."""
    try:
        return float(cell) if cell.strip() else None
    except ValueError:
        return cell


def _chosen(columns: str) -> dict[str, str]:
    """`audio=path,text=sentence` as field -> name."""
    chosen: dict[str, str] = {}
    for item in columns.split(",") if columns else ():
        field, equals, name = (part.strip() for part in item.partition("="))
        if not equals or field not in COLUMNS or field in chosen:
            raise UserError(
                f"--columns has {item!r}; it names each field once, as in {EXAMPLE}; fields are {', '.join(COLUMNS)}"
            )
        chosen[field] = name
    return chosen


def _columns_of(table: Path, header: list[str], chosen: dict[str, str]) -> dict[str, int]:
    """Field -> place of its column: the chosen one, else that with a known name. `id=` chooses none."""
    seen = ", ".join(printable(name, most=40) for name in header[:20]) + ", ..." * (len(header) > 20)
    columns = {}
    for field, known in COLUMNS.items():
        if field in chosen:
            places = [n for n, name in enumerate(header) if name == chosen[field]]
            if chosen[field] and not places:
                raise UserError(f"--columns: {table} has no column {chosen[field]}; its columns are {seen}")
        else:
            places = [n for n, name in enumerate(header) if name.lower() in known and name not in chosen.values()]
        if len(places) > 1:
            several = " and ".join(printable(header[n]) for n in places)
            raise UserError(f"{table} has several columns for {field}: {several}; choose one, as with {EXAMPLE}")
        if places and header[places[0]]:
            columns[field] = places[0]
    if missing := [field for field in ("audio", "text") if field not in columns]:
        raise UserError(
            f"{table} has no known column for {' and '.join(missing)}; its columns are {seen}; "
            f"name them, as with {EXAMPLE}"
        )
    return columns
