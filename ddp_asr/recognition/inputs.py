"""What a user names for transcription, as recordings that are not read yet: files, folders, sources, shards.

    hello.wav  -                        the file, stdin                    key: the path as it was given
    recordings/                         audio at any depth, texts beside   key: the path
    mine.jsonl  mine.csv  x.tar ...     any source that `shard` knows      key: that of the source
    shards/mine  s3://bucket/mine       shard directories                  key: that of the index

Texts are references and may be missing. How audio is checked is the same as where it is sharded, or for whole files as
in `read_audio`.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from ddp_asr.data import flac
from ddp_asr.data.audio import pack
from ddp_asr.data.index import Index, read_index
from ddp_asr.data.sources import (
    EMPTY_TRANSCRIPT,
    MISSING_TRANSCRIPT,
    SourceOptions,
    Utterance,
    find_source,
    is_audio,
    open_source,
)
from ddp_asr.data.sources.librispeech import files_below
from ddp_asr.data.storage import CHECK_SHARDS, Shards, Unreachable
from ddp_asr.errors import UserError, counted, users_error
from ddp_asr.files import scheme_of
from ddp_asr.recognition.transcription import Recording, read_audio

OTHER_AUDIO = (".m4a", ".mp4", ".aac", ".wma", ".webm", ".amr", ".3gp", ".mkv", ".mov", ".avi")  # libsndfile cannot
PATHS_ARE_KEYS = ("folder", "recordings")  # kinds of sources whose utterances are files with names of the user's


@dataclass(frozen=True)
class Input:
    """The recordings of one name on the command line."""

    total: int
    recordings: Iterator[Recording]
    is_file: bool = False
    """Whether it is one audio file, or stdin."""


def open_inputs(names: Sequence[str], columns: str = "") -> list[Input]:
    """The recordings of each name, in order; what cannot be opened is one that cannot be read.

    Args:
        columns: of tables, as `shard --columns` has them.
    """
    return [_open(name, columns) for name in names]


def _open(name: str, columns: str) -> Input:
    try:
        opened = _opened(name, columns)
    except (UserError, OSError) as error:
        return Input(1, iter([unreadable(name, error)]))
    return replace(opened, recordings=_to_the_end(name, opened.recordings))


def _to_the_end(name: str, recordings: Iterator[Recording]) -> Iterator[Recording]:
    """The recordings; one that cannot be read stands for those behind a place where an archive is damaged."""
    try:
        yield from recordings
    except (UserError, OSError) as error:
        yield unreadable(name, error)


def unreadable(name: str, error: UserError | OSError) -> Recording:
    """A recording whose reading raises the error, as a UserError."""
    mistake = users_error(error)
    if mistake is None or isinstance(mistake, Unreachable):
        raise error

    def read() -> np.ndarray:
        raise mistake

    return Recording(name, read)


def _opened(name: str, columns: str) -> Input:
    if scheme_of(name) or os.path.isfile(os.path.join(name, "dataset.json")):
        index = read_index([name])
        return Input(len(index), _of_shards(index))
    if os.path.isdir(name) or (os.path.isfile(name) and not is_audio(os.path.basename(name))):
        source = find_source(name, SourceOptions(columns=columns)) or find_source(name, SourceOptions(no_text=True))
        if source is not None:
            total, utterances = source.open()
            kind = source.identity["kind"]
            by_path = kind in PATHS_ARE_KEYS
            if os.path.isdir(name):
                _say_what_is_left_out(name, kind)
            return Input(total, (_of_utterance(utterance, by_path) for utterance in utterances))
        if os.path.isdir(name):
            open_source(name, SourceOptions())  # says what lies there, and what a source is
    if name == "-":
        # Read here and not by the thread that reads files: Python cannot end while a thread waits for stdin.
        return Input(1, iter([Recording(name, partial(read_audio, _stdin(), "stdin"))]), is_file=True)
    return Input(1, iter([Recording(name, partial(read_audio, name))]), is_file=True)


def _say_what_is_left_out(name: str, kind: str) -> None:
    """On stderr: that a folder is read by its lists, or that it has audio of kinds that libsndfile does not read."""
    if kind not in PATHS_ARE_KEYS:
        print(f"{name} is read as a source of kind {kind}: other files in it are not transcribed", file=sys.stderr)
        return
    others = [path for path in files_below(Path(name)) if path.suffix.lower() in OTHER_AUDIO]
    if others:
        what = f"{counted(len(others), 'file')} in {name} cannot be read, such as {others[0].name}"
        print(f"{what}: convert them, as with: ffmpeg -i {others[0].name} converted.wav", file=sys.stderr)


def _stdin() -> io.BytesIO:
    if sys.stdin is None:  # closed, as by `<&-`
        raise UserError("cannot read stdin: it is closed; pipe a recording into it, or name a file")
    return io.BytesIO(sys.stdin.buffer.read())


def _of_shards(index: Index) -> Iterator[Recording]:
    shards = Shards(index.shards)

    def read(row: int) -> np.ndarray:
        waveform = np.zeros(int(index.samples[row]), np.int16)
        try:
            content = shards.read(int(index.shard[row]), int(index.offset[row]), int(index.bytes[row]))
            flac.decode(content, len(waveform), waveform)
        except flac.ERRORS as error:
            raise UserError(f"{index.key(row)}: {flac.reason(error)}; {CHECK_SHARDS}") from None
        return waveform

    for row in range(len(index)):
        yield Recording(index.key(row), partial(read, row), index.text(row) or None)


def _of_utterance(utterance: Utterance, by_path: bool) -> Recording:
    key = str(utterance.path) if by_path and utterance.path else utterance.key
    return Recording(key, partial(_read_utterance, key, utterance), utterance.text or None)


def _read_utterance(key: str, utterance: Utterance) -> np.ndarray:
    no_text = utterance.reason in (MISSING_TRANSCRIPT, EMPTY_TRANSCRIPT)
    if (
        utterance.path
        and utterance.offset_s is None
        and utterance.duration_s is None
        and (no_text or not utterance.reason)
    ):
        return read_audio(utterance.path)  # which may last for hours
    packed = pack(replace(utterance, has_text=False, reason="" if no_text else utterance.reason))
    if packed.reason:
        detail = f" ({packed.detail})" if packed.detail else ""
        raise UserError(f"cannot use {key}: {packed.reason}{detail}")
    waveform = np.zeros(packed.samples, np.int16)
    flac.decode(packed.flac, packed.samples, waveform)
    return waveform
