"""Sources of utterances: a SOURCE named on the command line -> its `Utterance`s, always in the same order.

    source = open_source("train-clean-100", cache=Path("data"), openslr_url=OPENSLR_URL)
    size, utterances = source.open()

A LibriSpeech directory or a manifest is listed when it is opened; worker processes read the audio files. An OpenSLR
archive is never unpacked: one pass reads its transcripts, a second pass streams its audio. A directory and an archive
of the same files give the same utterances, because `_list_librispeech` decides for both; the order of an archive's
members decides only the order of its utterances. The name of a LibriSpeech split stands for its archive: `fetch` puts
it into the cache, goes on with an interrupted download, and compares the published checksum.

`Source.identity` tells whether shards were made from this source; it is known before anything is fetched.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from ddp_asr.errors import UserError

if TYPE_CHECKING:
    import tarfile

MISSING_TRANSCRIPT = "missing transcript"
EMPTY_TRANSCRIPT = "empty transcript"
MISSING_AUDIO = "missing audio"
BAD_AUDIO = "undecodable or truncated audio"
TOO_LONG = "too long"
DUPLICATE = "duplicate key"
BAD_LINE = "malformed manifest line"
REASONS = (MISSING_TRANSCRIPT, EMPTY_TRANSCRIPT, MISSING_AUDIO, BAD_AUDIO, TOO_LONG, DUPLICATE, BAD_LINE)

AUDIO_SUFFIXES = (".flac", ".wav", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".w64", ".caf")
OPENSLR_URL = "https://www.openslr.org/resources/12"
LIBRISPEECH_MD5 = {  # published beside the archives, in md5sum.txt
    "dev-clean": "42e2234ba48799c1f50f24a7926300a1",
    "dev-other": "c8d0bcc9cca99d4f8b62fcc847357931",
    "test-clean": "32fa31d27d2e1cad72775fee3f4849a9",
    "test-other": "fb5a50374b501bb3bac4815ee91d3135",
    "train-clean-100": "2a93770f6d5c6c964bc36631d331a522",
    "train-clean-360": "c0e676e450a7ff2f54aeade5171606fa",
    "train-other-500": "d1a0fd59409feb2c614ce4d30c387708",
}

RETRY_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0)


@dataclass(frozen=True)
class Utterance:
    """What a source knows of one utterance; `reason` is set where it is already known to be unusable."""

    key: str
    source: str  # path or archive member, relative to the source: for people who look for it
    text: str | None
    speaker: str = ""
    path: Path | None = None
    data: bytes | None = None  # the audio file's content, where it comes from an archive
    offset_s: float | None = None  # where the utterance begins in the file; None: at the file's beginning
    duration_s: float | None = None  # from there; None: to the file's end
    reason: str = ""
    detail: str = ""
    position: int = 0  # bytes of the archive read so far; sources that know their list count utterances instead


@dataclass(frozen=True)
class Source:
    """An order of utterances, not opened yet."""

    identity: dict[str, str]
    open: Callable[[], tuple[int, Iterator[Utterance]]]  # the size counts utterances, or bytes of an archive


def sanitise_key(name: str) -> str:
    """'.', '/', space and control characters become '_': WebDataset cuts a key at its first dot.

    So do lone surrogates, which are what Python makes of a file name that is not UTF-8: no format can hold them.
    """
    return "".join("_" if c in "./ " or unicodedata.category(c) in ("Cc", "Cs") else c for c in name)


def make_key(identity: str, offset_s: float | None = None) -> str:
    """The key: a source's id or relative path without suffix, then `-<offset_ms>` where the source states an offset.

    The length of the audio has no part in it, since a source is listed without opening its audio.
    """
    return sanitise_key(identity) + ("" if offset_s is None else f"-{round(offset_s * 1000)}")


def open_source(name: str, cache: Path, openslr_url: str) -> Source:
    """The source that the user named; an existing path comes before a split of the same name."""
    path = Path(name)
    try:
        if path.is_dir():
            return directory_source(path)
        if path.is_file() and path.name.endswith((".tar.gz", ".tgz")):
            return archive_source(path)
        if path.is_file():
            return manifest_source(path)
    except OSError as error:
        raise UserError(f"{error.filename or name} cannot be read: {error.strerror or error}") from None
    if not path.exists() and name in LIBRISPEECH_MD5:
        return split_source(name, cache, openslr_url)
    raise UserError(
        f"{name}: no such source; it may be a LibriSpeech directory, an OpenSLR .tar.gz, a JSONL manifest, "
        f"or the name of a LibriSpeech split: {', '.join(LIBRISPEECH_MD5)}"
    )


def directory_source(root: Path) -> Source:
    """A LibriSpeech split on disk: `speaker/chapter/*.flac` beside `speaker-chapter.trans.txt`, at any depth."""
    audio: list[str] = []
    transcripts: dict[str, bytes] = {}

    def unreadable(error: OSError) -> None:
        raise error  # without this, os.walk skips a folder that it cannot read

    for folder, _, names in os.walk(root, onerror=unreadable, followlinks=True):
        below = folder.removeprefix(str(root)).lstrip("/")
        audio += [os.path.join(below, name) for name in names if is_audio(name)]
        for name in filter(_is_transcript, names):
            transcripts[os.path.join(below, name)] = Path(folder, name).read_bytes()
    listed = _list_librispeech(audio, transcripts)
    if not listed:
        raise UserError(f"{root}: neither *.trans.txt nor audio in it or below; give a LibriSpeech split's directory")
    utterances = [u if u.reason == MISSING_AUDIO else replace(u, path=root / path) for path, u in listed]
    return _listed_source("directory", root.resolve().name, utterances)


def _list_librispeech(audio: Iterable[str], transcripts: dict[str, bytes]) -> list[tuple[str, Utterance]]:
    """(path, utterance) from the paths of all audio files and the contents of all `.trans.txt`, sorted by folder.

    The order of the arguments has no effect. An audio file takes its text from any transcript in its own folder; where
    two of them name it, the last by name counts. Where several audio files with a text have the same key, the first
    path is the utterance and the others are duplicates, even if the first proves to be undecodable.
    """
    texts: dict[str, dict[str, str]] = {}  # folder -> id -> text
    for path in sorted(transcripts):
        texts.setdefault(os.path.dirname(path), {}).update(read_transcripts(transcripts[path]))
    stems: dict[str, list[tuple[str, str]]] = {}  # folder -> (path, id) of its audio
    for path in sorted(audio):
        stems.setdefault(os.path.dirname(path), []).append((path, os.path.splitext(os.path.basename(path))[0]))
    listed: list[tuple[str, Utterance]] = []
    owners: dict[str, str] = {}  # key -> path
    for folder in sorted(texts.keys() | stems.keys(), key=lambda folder: PurePosixPath(folder).parts):
        missing = texts.get(folder, {}).copy()
        for path, stem in stems.get(folder, []):
            missing.pop(stem, None)
            utterance = _librispeech_utterance(stem, path, texts.get(folder, {}).get(stem))
            if utterance.text and utterance.text.strip():
                owner = owners.setdefault(utterance.key, path)
                if owner != path:
                    utterance = replace(utterance, reason=DUPLICATE, detail=f"same key as {valid_text(owner)}")
            listed.append((path, utterance))
        for stem in sorted(missing):
            path = os.path.join(folder, stem)
            listed.append((path, _librispeech_utterance(stem, path, missing[stem], reason=MISSING_AUDIO)))
    return listed


def is_audio(name: str) -> bool:
    """Whether a file's name has an audio suffix. `._*` are AppleDouble files, which a Mac's tar adds to each file."""
    return name.lower().endswith(AUDIO_SUFFIXES) and not name.startswith("._")


def _is_transcript(name: str) -> bool:
    return name.endswith(".trans.txt") and not name.startswith("._")


def read_transcripts(content: bytes) -> dict[str, str]:
    """The lines `id TEXT` of a `.trans.txt`. Not splitlines(): it would cut at characters inside a text, too."""
    lines = content.decode("utf-8", "replace").split("\n")
    pairs = (line.strip().partition(" ") for line in lines if line.strip())
    return {identity: text for identity, _, text in pairs}


def _librispeech_utterance(identity: str, source: str, text: str | None, **rest: Any) -> Utterance:
    return Utterance(make_key(identity), valid_text(source), text, speaker=valid_text(identity.split("-")[0]), **rest)


def manifest_source(manifest: Path) -> Source:
    """NeMo's JSONL: an object a line with `audio_filepath`, `text`, optional `id`, `speaker`, `offset`, `duration`.

    The utterance is `duration` seconds of the file from `offset` on; `offset` is 0 and `duration` lasts to the file's
    end where they are missing. Manifests carry rounded durations: without `offset`, a file that is at most 0.25 s
    longer than `duration` is taken whole. A line that states more audio than there is, by over 0.25 s + 1 %, is
    dropped. KEY gets `-<offset_ms>` only where the line states an offset, be it 0, whether or not the audio is cut.
    """
    try:
        lines = manifest.read_bytes().decode("utf-8").split("\n")
    except ValueError:
        raise UserError(f"{manifest} is not text in UTF-8: a manifest is a JSON object a line, UTF-8") from None
    numbered = ((number, line) for number, line in enumerate(lines, start=1) if line.strip())
    utterances = [_manifest_utterance(manifest, number, line) for number, line in numbered]
    if all(u.reason == BAD_LINE for u in utterances):
        raise UserError(
            f'{manifest}: not one line of it is a manifest\'s, such as {{"audio_filepath": "a.wav", "text": "HELLO"}}'
        )
    return _listed_source("manifest", manifest.name, utterances)


def _manifest_utterance(manifest: Path, number: int, line: str) -> Utterance:
    def unusable(reason: str, detail: str) -> Utterance:
        return Utterance(f"line-{number}", f"{manifest.name}:{number}", None, reason=reason, detail=detail)

    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        return unusable(BAD_LINE, f"not JSON: {error}")
    if not isinstance(entry, dict):
        return unusable(BAD_LINE, "not an object")
    audio = entry.get("audio_filepath")
    if not isinstance(audio, str) or not audio or "\0" in audio:
        return unusable(BAD_LINE, "no audio_filepath")
    try:
        offset_s, duration_s = _seconds(entry, "offset"), _seconds(entry, "duration")
    except ValueError as error:
        return unusable(BAD_LINE, str(error))
    text, identity, speaker = entry.get("text"), entry.get("id"), entry.get("speaker")
    return Utterance(
        key=make_key(_relative_stem(audio, manifest.parent) if identity in (None, "") else str(identity), offset_s),
        source=valid_text(audio),
        text=valid_text(text) if isinstance(text, str) else None,
        speaker="" if speaker is None else valid_text(str(speaker)),
        path=manifest.parent / audio,
        offset_s=offset_s,
        duration_s=duration_s,
    )


def _seconds(entry: dict[str, Any], name: str) -> float | None:
    value = entry.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 <= value < 1e9):
        raise ValueError(f"{name} is {value!r}, not a number of seconds")
    if name == "duration" and value == 0:
        raise ValueError("duration is 0; leave it out to take the audio to the end of the file")
    return float(value)


def _relative_stem(audio: str, folder: Path) -> str:
    """The path relative to the manifest where it lies below it, else as given; without suffix and leading '/'."""
    path = PurePosixPath(os.path.normpath(audio))
    if path.is_absolute():
        below = PurePosixPath(os.path.relpath(path, folder.absolute()))
        path = path.relative_to("/") if below.parts[0] == ".." else below
    return str(path.with_suffix("")) if path.name else audio


def valid_text(text: str) -> str:
    """Lone surrogates (JSON escapes, file names) replaced, so that every format can hold the text."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _listed_source(kind: str, name: str, utterances: list[Utterance]) -> Source:
    """A source whose utterances are known in advance; its identity covers the list, texts and file sizes."""
    digest = hashlib.sha256()
    for u in utterances:
        try:
            size = u.path.stat().st_size if u.path else -1
        except OSError:
            size = -1
        digest.update(json.dumps([u.key, u.source, u.text, u.speaker, u.offset_s, u.duration_s, size]).encode())
    identity = {"kind": kind, "name": valid_text(name), "digest": digest.hexdigest()}
    return Source(identity, lambda: (len(utterances), iter(utterances)))


def archive_source(archive: Path) -> Source:
    """An OpenSLR .tar.gz, read as a stream; its identity is its size and both ends, since reading all takes minutes."""
    size = archive.stat().st_size
    with archive.open("rb") as file:
        edges = file.read(1 << 20)
        file.seek(max(0, size - (1 << 20)))
        edges += file.read()
    digest = hashlib.sha256(f"{size} ".encode() + edges).hexdigest()
    identity = {"kind": "archive", "name": valid_text(archive.name), "digest": digest}
    return Source(identity, lambda: (size, stream_archive(archive)))


def stream_archive(archive: Path) -> Iterator[Utterance]:
    """The utterances in the order of the archive's audio, then those whose audio is missing.

    The archive is decompressed twice: first for the transcripts and the names, then for the audio. Any order of members
    gives the same utterances, and no audio has to wait in memory: it holds one audio file, and the names and texts of
    the whole archive (about 1 kB an utterance). The first pass takes about 2.5 s a GB on one core, as the MD5 does. Of
    members with the same path the last counts, as when the archive is unpacked.
    """
    audio: dict[str, int] = {}  # path -> number of its last member
    transcripts: dict[str, bytes] = {}
    for number, (member, content, _) in enumerate(_members(archive)):
        if _is_transcript(os.path.basename(member)):
            transcripts[member] = content()
        elif is_audio(os.path.basename(member)):
            audio[member] = number
    listed = _list_librispeech(audio, transcripts)
    by_path = {path: utterance for path, utterance in listed if utterance.reason != MISSING_AUDIO}
    position = 0
    for number, (member, content, position) in enumerate(_members(archive)):
        if audio.get(member) == number:
            utterance = by_path[member]
            yield replace(utterance, data=None if utterance.reason else content(), position=position)
    for _, utterance in listed:
        if utterance.reason == MISSING_AUDIO:
            yield replace(utterance, position=position)


def _members(archive: Path) -> Iterator[tuple[str, Callable[[], bytes], int]]:
    """Name, content and position of every file in the archive; a content must be read before the next name is."""
    import gzip
    import tarfile

    # Through GzipFile and not mode "r|gz": tarfile ends silently where a stream is cut short, GzipFile raises.
    with _damage_told(archive), archive.open("rb") as file, gzip.GzipFile(fileobj=file) as stream:
        with tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 20) as tar:
            for member in tar:
                if member.isfile():
                    yield os.path.normpath(member.name), functools.partial(_content, archive, tar, member), file.tell()
                tar.members.clear()  # type: ignore[attr-defined]  # or memory grows by a kilobyte a member
        while stream.read(1 << 20):
            pass  # the checksum comes last


def _content(archive: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    with _damage_told(archive):
        file = tar.extractfile(member)
        return file.read() if file else b""


@contextlib.contextmanager
def _damage_told(archive: Path) -> Iterator[None]:
    import tarfile
    import zlib

    try:
        yield
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"{archive} is damaged or cut short ({error}); fetch it again") from None


def split_source(name: str, cache: Path, openslr_url: str) -> Source:
    """A split of LibriSpeech, fetched only when it is opened."""

    def open_split() -> tuple[int, Iterator[Utterance]]:
        archive = fetch(f"{openslr_url.rstrip('/')}/{name}.tar.gz", cache, LIBRISPEECH_MD5[name])
        return archive.stat().st_size, stream_archive(archive)

    return Source({"kind": "split", "name": name, "digest": LIBRISPEECH_MD5[name]}, open_split)


def fetch(url: str, cache: Path, md5: str) -> Path:
    """The file behind the URL, in `cache`; what an earlier, interrupted run has fetched is kept and gone on from."""
    archive = cache / url.rsplit("/", 1)[1]
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not archive.exists():
            with _only_fetcher(archive) as part:
                if not archive.exists():  # another process may have fetched it while this one waited
                    _fetch_part(url, part)
                    _check_archive(part, md5, url)
                    part.rename(archive)
                    return archive
    except OSError as error:
        problem = f"{cache} cannot be written: {error.strerror or error}"
        raise UserError(f"{problem}; free some space or name another directory with --cache") from None
    _check_archive(archive, md5, url)
    return archive


@contextlib.contextmanager
def _only_fetcher(archive: Path) -> Iterator[Path]:
    """Where to put the unfinished file; a second process that wants the same one waits here."""
    import fcntl

    with archive.with_name(archive.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield archive.with_name(archive.name + ".part")


def _check_archive(path: Path, md5: str, url: str) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != md5:
        if path.suffix == ".part":
            path.unlink()  # or the next attempt would go on from it
            raise UserError(f"{url} is not what OpenSLR publishes (MD5 {digest.hexdigest()}, not {md5}); try again")
        raise UserError(f"{path} is damaged (MD5 {digest.hexdigest()}, not {md5}); delete it and run the command again")


def _fetch_part(url: str, part: Path) -> None:
    """Until the file is whole; gives up when the pauses are used up without a single new byte."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("fetching"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    if not console.is_terminal:
        print(f"fetching {url}", flush=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=None)
        pauses_s = iter(RETRY_PAUSES_S)
        while True:
            before = _size(part)
            problem = _fetch_more(url, part, lambda done, total: bar.update(task, completed=done, total=total))
            if not problem:
                return
            if _size(part) > before:
                pauses_s = iter(RETRY_PAUSES_S)
            pause_s = next(pauses_s, None)
            if pause_s is None:
                raise UserError(
                    f"{url} cannot be fetched: {problem}; the {_size(part):,} bytes so far are kept, "
                    "run the same command again to go on, or name a mirror with --openslr-url"
                )
            time.sleep(pause_s)


def _fetch_more(url: str, part: Path, report: Callable[[int, int], None]) -> str:
    """Appends what one connection gives; returns what went wrong, or nothing when the file is whole."""
    import http.client
    import urllib.error
    import urllib.request

    start = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            if response.status != 206:
                start = 0  # the server does not resume
            total = start + int(response.headers.get("Content-Length") or 0)
            with part.open("ab" if start else "wb") as file:
                while block := _receive(response):
                    file.write(block)
                    report(file.tell(), total)
                done = file.tell()
            return f"the connection ended after {done:,} of {total:,} bytes" if done < total else ""
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:
            return ""  # nothing beyond what is here: whole, or the checksum will tell
        if 400 <= error.code < 500 and error.code not in (408, 429):
            raise UserError(f"{url} cannot be fetched: {error}; name a mirror with --openslr-url") from None
        return str(error)
    except (urllib.error.URLError, ConnectionError, TimeoutError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__


def _receive(response: Any) -> bytes:
    """A block of the answer; a broken connection is an end like any other, since the length tells."""
    import http.client

    try:
        return bytes(response.read(1 << 20))
    except http.client.IncompleteRead as error:
        return error.partial


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
