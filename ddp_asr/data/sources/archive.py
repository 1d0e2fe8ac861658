"""LibriSpeech archives as OpenSLR publishes them (.tar.gz), read as a stream and never unpacked.

The first pass reads the transcripts and the names of the audio files, the second pass the audio. So any order of
members gives the same utterances, and memory holds one audio file, and the names and texts of the whole archive
(about 1 kB an utterance). The first pass takes about 2.5 s a GB on one core, as long as an MD5.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

from ddp_asr.data.sources import MISSING_AUDIO, Source, SourceOptions, Utterance, is_audio, valid_text
from ddp_asr.data.sources.librispeech import is_transcript, list_librispeech
from ddp_asr.errors import UserError

EDGE_BYTES = 1 << 20


def try_open(name: str, options: SourceOptions) -> Source | None:
    """A file that ends in .tar.gz. Its digest covers its size and both ends, since reading all of it takes minutes."""
    archive = Path(name)
    if not archive.is_file() or not name.endswith((".tar.gz", ".tgz")):
        return None
    size = archive.stat().st_size
    with archive.open("rb") as file:
        edges = file.read(EDGE_BYTES)
        file.seek(max(0, size - EDGE_BYTES))
        edges += file.read()
    digest = hashlib.sha256(f"{size} ".encode() + edges).hexdigest()
    identity = {"kind": "archive", "name": valid_text(archive.name), "digest": digest}
    return Source(identity, lambda: read_archive(archive))


def read_archive(archive: Path) -> tuple[int, Iterator[Utterance]]:
    """How many utterances there are, and they in the order of the archive's audio, then those without audio.

    Of several members with the same path the last counts, as when the archive is unpacked.
    """
    audio: dict[str, int] = {}  # path -> number of its last member
    transcripts: dict[str, bytes] = {}
    with _damage_reported(archive):
        for number, (path, file) in enumerate(_members(archive)):
            if is_transcript(os.path.basename(path)):
                transcripts[path] = file.read()
            elif is_audio(os.path.basename(path)):
                audio[path] = number
    listed = list_librispeech(audio, transcripts)
    return len(listed), _with_audio(archive, listed, audio)


def _with_audio(archive: Path, listed: list[tuple[str, Utterance]], audio: dict[str, int]) -> Iterator[Utterance]:
    by_path = {path: utterance for path, utterance in listed if utterance.reason != MISSING_AUDIO}
    with _damage_reported(archive):
        for number, (path, file) in enumerate(_members(archive)):
            if audio.get(path) == number:
                utterance = by_path[path]
                yield replace(utterance, data=None if utterance.reason else file.read())
    yield from (utterance for _, utterance in listed if utterance.reason == MISSING_AUDIO)


def _members(archive: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Path and content of each file in the archive; read the content before the next member is asked for."""
    # Through GzipFile and not mode "r|gz": tarfile ends silently if the stream is cut short, GzipFile raises.
    with archive.open("rb") as file, gzip.GzipFile(fileobj=file) as stream:
        with tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 20) as tar:
            for member in tar:
                content = tar.extractfile(member) if member.isfile() else None
                if content is not None:
                    yield os.path.normpath(member.name), content
                # A public attribute that typeshed lacks. Without this, memory grows by a kilobyte a member.
                tar.members.clear()  # type: ignore[attr-defined]
        while stream.read(1 << 20):
            pass  # GzipFile compares the checksum when it reaches the end


@contextlib.contextmanager
def _damage_reported(archive: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"{archive} is damaged or cut short ({error}); download it again") from None
