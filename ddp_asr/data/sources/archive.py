"""LibriSpeech archives as OpenSLR publishes them (.tar.gz), read as a stream and never unpacked.

The first pass reads the transcripts and the names of all files and links, the second pass the audio. So any order of
members gives the same utterances, and memory holds one audio file, and the names and texts of the whole archive
(about 1 kB an utterance). The first pass takes about 2.5 s a GB on one core, as long as an MD5.

A link leads to a file of the same archive or to none: no file outside the archive is opened.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import lzma
import os
import struct
import tarfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import IO

from ddp_asr.data.audio import MAX_ARCHIVED_BYTES
from ddp_asr.data.sources import IMPLAUSIBLE, MISSING_AUDIO, Source, SourceOptions, Utterance, is_audio, valid_text
from ddp_asr.data.sources.librispeech import is_transcript, list_librispeech
from ddp_asr.errors import UserError

TAR_SUFFIXES = (".tar.gz", ".tgz")
EDGE_BYTES = 1 << 20
MAX_TEXT_BYTES = 64 << 20  # of a transcript, or of the names and attributes in a header
MAX_LINKS = 40  # followed one after the other, as on Linux


def try_open(name: str, options: SourceOptions) -> Source | None:
    """A file that ends in .tar.gz."""
    archive = Path(name)
    if options.no_text or not archive.is_file() or not name.endswith(TAR_SUFFIXES):
        return None
    return Source(identity_of("archive", archive.name, [archive]), lambda: read_archive(archive))


def identity_of(kind: str, name: str, files: Iterable[Path]) -> dict[str, str]:
    """The digest covers the size and both ends of each file, since reading all of them takes minutes."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(EDGE_BYTES))
            file.seek(max(0, size - EDGE_BYTES))
            digest.update(file.read(EDGE_BYTES))
    return {"kind": kind, "name": valid_text(name), "digest": digest.hexdigest()}


Listing = Callable[[Iterable[str], dict[str, bytes]], list[tuple[str, Utterance]]]


def read_archive(archive: Path, listing: Listing = list_librispeech) -> tuple[int, Iterator[Utterance]]:
    """How many utterances there are, and they in the order of the archive's audio, then those without audio.

    Of several members with the same path the last counts, as when the archive is unpacked. `listing` makes the
    utterances of the paths of all audio files and the contents of all transcripts.
    """
    files: dict[str, int] = {}  # path -> number of its last member
    links: dict[str, str] = {}  # path -> path that it leads to
    texts: dict[str, bytes] = {}
    with damage_reported(archive):
        for number, (path, target, file) in enumerate(members_of(archive)):
            files.pop(path, None)
            links.pop(path, None)
            if file is None:
                links[path] = target
                continue
            files[path] = number
            if is_transcript(os.path.basename(path)):
                texts[path] = read_text(path, file)
        found = {path: _resolve(path, files, links) for path in (*files, *links)}
        transcripts = {p: file for p, file in found.items() if file is not None and is_transcript(os.path.basename(p))}
        if unread := set(transcripts.values()) - texts.keys():  # links to files that have other names
            for number, (path, _, file) in enumerate(members_of(archive)):
                if file is not None and path in unread and files[path] == number:
                    texts[path] = read_text(path, file)
    audio = {path: files[file] for path, file in found.items() if file is not None and is_audio(os.path.basename(path))}
    listed = listing(audio, {path: texts[file] for path, file in transcripts.items()})
    return len(listed), _with_audio(archive, listed, audio)


def _with_audio(archive: Path, listed: list[tuple[str, Utterance]], audio: dict[str, int]) -> Iterator[Utterance]:
    by_member = defaultdict(list)
    for path, utterance in listed:
        if utterance.reason != MISSING_AUDIO:
            by_member[audio[path]].append(utterance)
    with damage_reported(archive):
        for number, (_, _, file) in enumerate(members_of(archive)):
            data, size = None, file.seek(0, io.SEEK_END) if file is not None else 0
            for utterance in by_member[number]:
                if not utterance.reason and size > MAX_ARCHIVED_BYTES:
                    detail = f"{size:,} bytes, at most {MAX_ARCHIVED_BYTES:,} are read"
                    utterance = replace(utterance, reason=IMPLAUSIBLE, detail=detail)
                elif not utterance.reason and file is not None:
                    if data is None:
                        file.seek(0)
                        data = file.read()
                    utterance = replace(utterance, data=data)
                yield utterance
    yield from (utterance for _, utterance in listed if utterance.reason == MISSING_AUDIO)


def _resolve(path: str, files: dict[str, int], links: dict[str, str]) -> str | None:
    """The file that a path leads to, through links to files and to directories; None if it is not in the archive."""
    for _ in range(MAX_LINKS):
        if path in files:
            return path
        link = next((p for p in (path, *map(str, PurePosixPath(path).parents)) if p in links), None)
        if link is None:
            return None
        path = os.path.normpath(links[link] + path[len(link) :])
    return None


def read_text(path: str, file: IO[bytes]) -> bytes:
    """The content of a member that is a text, of at most MAX_TEXT_BYTES."""
    content = file.read(MAX_TEXT_BYTES + 1)
    if len(content) > MAX_TEXT_BYTES:
        raise tarfile.ReadError(f"{path} has more than {MAX_TEXT_BYTES >> 20} MB")
    return content


def members_of(archive: Path) -> Iterator[tuple[str, str, IO[bytes] | None]]:
    """(path, "", content) of each file and (path, target, None) of each link; read the content before the next one."""
    # Through GzipFile and not mode "r|gz": tarfile ends silently if the stream is cut short, GzipFile raises.
    is_plain = archive.name.endswith(".tar")
    with archive.open("rb", buffering=0) as file, _Plain(file) if is_plain else _Gzip(fileobj=file) as stream:
        with tarfile.open(fileobj=stream, mode="r:", tarinfo=_Header) as tar:
            for member in tar:
                path = os.path.normpath(member.name)
                if member.isfile():
                    yield path, "", tar.extractfile(member)
                elif member.issym():
                    yield path, os.path.normpath(os.path.join(os.path.dirname(path), member.linkname)), None
                elif member.islnk() and os.path.normpath(member.linkname) != path:  # tar has them for what it met twice
                    yield path, os.path.normpath(member.linkname), None
                # A public attribute that typeshed lacks. Without this, memory grows by a kilobyte a member.
                tar.members.clear()  # type: ignore[attr-defined]
        while block := stream.read(1 << 20):  # a GzipFile compares the checksum when it reaches the end
            if block.strip(b"\0"):
                raise tarfile.ReadError("more follows where the archive ends")


class _Forward(io.BufferedIOBase):
    """A stream that is read forward only: by the sizes in a damaged header tarfile would go back again and again."""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_SET and offset < self.tell():
            raise tarfile.ReadError("a size in a header leads backward")
        return super().seek(offset, whence)


class _Gzip(_Forward, gzip.GzipFile):
    pass


class _Plain(_Forward, io.BufferedReader):
    pass


class _Header(tarfile.TarInfo):
    """A header that is whole: tarfile takes any other for the end of the archive, and reads as much as it states."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Header:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not buf.strip(b"\0"):
                raise  # the end
            raise tarfile.ReadError(str(error)) from None
        if header.size < 0 or (header.type not in tarfile.REGULAR_TYPES and header.size > MAX_TEXT_BYTES):
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        return header


@contextlib.contextmanager
def damage_reported(archive: Path) -> Iterator[None]:
    try:
        yield
    except (
        *(OSError, EOFError, zlib.error, tarfile.TarError, zipfile.BadZipFile),
        *(ValueError, OverflowError),  # from tarfile, for attributes in a header that are no numbers, or too large ones
        *(RuntimeError, lzma.LZMAError, struct.error),  # from zipfile, the first for a password or an unknown method
    ) as error:
        raise UserError(
            f"{archive} is damaged or cut short ({error}); download it again, or unpack it and shard the directory"
        ) from None
