"""Audio without transcripts, such as noises and room responses: a directory, a .tar.gz or a .zip, with `--no-text`.

Every audio file is one recording, at any depth. It is never taken without being asked for: a directory of speech whose
transcripts are missing would otherwise be packed as noise.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from ddp_asr.data.audio import MAX_ARCHIVED_BYTES
from ddp_asr.data.sources import (
    IMPLAUSIBLE,
    Source,
    SourceOptions,
    Utterance,
    is_audio,
    listed_source,
    make_key,
    valid_text,
)
from ddp_asr.data.sources.archive import TAR_SUFFIXES, damage_reported, identity_of, read_archive
from ddp_asr.data.sources.librispeech import files_below


def try_open(name: str, options: SourceOptions) -> Source | None:
    """A directory with audio in it or below, or an archive, where `--no-text` says that there are no transcripts."""
    root = Path(name)
    if not options.no_text:
        return None
    if root.is_file() and name.endswith((*TAR_SUFFIXES, ".zip")):
        return Source(identity_of("recordings", root.name, [root]), lambda: read_recordings(root))
    paths = (str(path.relative_to(root)) for path in files_below(root) if is_audio(path.name))
    listed = [replace(utterance, path=root / path) for path, utterance in list_recordings(paths)]
    return listed_source("recordings", root.resolve().name, listed) if listed else None


def list_recordings(audio: Iterable[str]) -> list[tuple[str, Utterance]]:
    """(path, recording) of each audio file, sorted by path; the key is the path without its suffix."""
    return [
        (path, Utterance(make_key(str(Path(path).with_suffix(""))), valid_text(path), None, has_text=False))
        for path in sorted(audio)
    ]


def read_recordings(archive: Path, folder: str = "") -> tuple[int, Iterator[Utterance]]:
    """How many recordings there are in a folder of the archive, and they one by one."""
    if archive.suffix == ".zip":
        return _read_zip(archive, folder)
    return read_archive(archive, lambda audio, _: list_recordings(path for path in audio if path.startswith(folder)))


def _read_zip(archive: Path, folder: str) -> tuple[int, Iterator[Utterance]]:
    """Of several members with the same name the last counts, as when the archive is unpacked."""
    with damage_reported(archive), zipfile.ZipFile(archive) as members:
        names = {name for name in members.namelist() if name.startswith(folder) and is_audio(Path(name).name)}
    listed = list_recordings(names)
    return len(listed), _with_audio(archive, listed)


def _with_audio(archive: Path, listed: list[tuple[str, Utterance]]) -> Iterator[Utterance]:
    with damage_reported(archive), zipfile.ZipFile(archive) as members:
        for name, utterance in listed:
            # What a member's entry states bounds what is read of it; zipfile compares the checksum at its end.
            size = members.getinfo(name).file_size
            if size > MAX_ARCHIVED_BYTES:
                detail = f"{size:,} bytes, at most {MAX_ARCHIVED_BYTES:,} are read"
                yield replace(utterance, reason=IMPLAUSIBLE, detail=detail)
            else:
                yield replace(utterance, data=members.read(name))
