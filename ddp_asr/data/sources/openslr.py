"""Splits of LibriSpeech, noises and room responses by name: the archive is downloaded from OpenSLR, then read.

`fetch` puts the archive into the cache, continues an interrupted download, and compares the published checksum.
"""

from __future__ import annotations

import fcntl
import hashlib
import http.client
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from ddp_asr.data.sources import Source, SourceOptions, Utterance
from ddp_asr.data.sources.archive import read_archive
from ddp_asr.data.sources.recordings import read_recordings
from ddp_asr.errors import UserError

LIBRISPEECH_MD5 = {  # published beside the archives, in md5sum.txt
    "dev-clean": "42e2234ba48799c1f50f24a7926300a1",
    "dev-other": "c8d0bcc9cca99d4f8b62fcc847357931",
    "test-clean": "32fa31d27d2e1cad72775fee3f4849a9",
    "test-other": "fb5a50374b501bb3bac4815ee91d3135",
    "train-clean-100": "2a93770f6d5c6c964bc36631d331a522",
    "train-clean-360": "c0e676e450a7ff2f54aeade5171606fa",
    "train-other-500": "d1a0fd59409feb2c614ce4d30c387708",
}


class Recordings(NamedTuple):
    """A folder of an archive of audio without transcripts."""

    url: str  # of the directory at OpenSLR
    archive: str
    md5: str
    folder: str


_MUSAN = "https://www.openslr.org/resources/17", "musan.tar.gz", "0c472d4fc0c5141eca47ad1ffeb2a7df"
_RIRS = "https://www.openslr.org/resources/28", "rirs_noises.zip", "e6f48e257286e05de56413b4779d8ffb"
RECORDINGS = {
    "musan-noise": Recordings(*_MUSAN, "musan/noise/"),
    "musan-music": Recordings(*_MUSAN, "musan/music/"),
    "musan-speech": Recordings(*_MUSAN, "musan/speech/"),
    "pointsource-noises": Recordings(*_RIRS, "RIRS_NOISES/pointsource_noises/"),
    "simulated-rirs": Recordings(*_RIRS, "RIRS_NOISES/simulated_rirs/"),
}

LIBRISPEECH_URL = "https://www.openslr.org/resources/12"
BLOCK_BYTES = 1 << 20
RETRY_PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0)


def try_open(name: str, options: SourceOptions) -> Source | None:
    """A name from the tables, if there is no file or directory of it; downloaded when the source is opened."""
    if Path(name).exists():
        return None
    if name in RECORDINGS:
        recordings = RECORDINGS[name]
        digest = hashlib.sha256(f"{recordings.md5} {recordings.folder}".encode()).hexdigest()

        def open_recordings() -> tuple[int, Iterator[Utterance]]:
            url = f"{(options.openslr_url or recordings.url).rstrip('/')}/{recordings.archive}"
            return read_recordings(fetch(url, options.cache, recordings.md5), recordings.folder)

        return Source({"kind": "recordings", "name": name, "digest": digest}, open_recordings)
    if name not in LIBRISPEECH_MD5 or options.no_text:
        return None
    md5 = LIBRISPEECH_MD5[name]

    def open_split() -> tuple[int, Iterator[Utterance]]:
        url = f"{(options.openslr_url or LIBRISPEECH_URL).rstrip('/')}/{name}.tar.gz"
        return read_archive(fetch(url, options.cache, md5))

    return Source({"kind": "split", "name": name, "digest": md5}, open_split)


def fetch(url: str, cache: Path, md5: str) -> Path:
    """The file behind the URL, in `cache`; continues from what an earlier, interrupted run has downloaded."""
    archive = cache / url.rsplit("/", 1)[1]
    try:
        cache.mkdir(parents=True, exist_ok=True)
        if not archive.exists():
            part = archive.with_name(archive.name + ".part")
            with part.open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if not archive.exists():  # another process may have downloaded it while this one waited for the lock
                    _download(url, file)
                    file.flush()
                    part.rename(archive)
        digest = hashlib.md5(usedforsecurity=False)
        with archive.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        problem = f"{cache} cannot be written: {error.strerror or error}"
        raise UserError(f"{problem}; free some space or name another directory with --cache") from None
    if digest.hexdigest() != md5:
        problem = f"{archive} is damaged, or not what OpenSLR publishes (MD5 {digest.hexdigest()}, not {md5})"
        raise UserError(f"{problem}; delete it and run the command again")
    return archive


def _download(url: str, file: IO[bytes]) -> None:
    """Connects until the file is complete; gives up after the last pause without a single new byte."""
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

    columns = (*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    if not console.is_terminal:
        print(f"downloading {url}", flush=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("downloading", total=None)
        pauses_s = iter(RETRY_PAUSES_S)
        before = file.tell()
        while problem := _receive(url, file, lambda total: bar.update(task, completed=file.tell(), total=total)):
            if file.tell() > before:
                before, pauses_s = file.tell(), iter(RETRY_PAUSES_S)
            pause_s = next(pauses_s, None)
            if pause_s is None:
                raise UserError(
                    f"{url} cannot be downloaded: {problem}; the {before:,} bytes so far are kept, "
                    "run the same command again to continue, or name a mirror with --openslr-url"
                )
            time.sleep(pause_s)


def _receive(url: str, file: IO[bytes], report: Callable[[int], None]) -> str:
    """Appends what one connection sends; returns what went wrong, or "" if the file is complete."""
    start = file.tell()
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            if response.status != 206:  # the server cannot resume
                file.truncate(0)
                start = file.seek(0)
            total = start + int(response.headers.get("Content-Length") or 0)
            while block := response.read1(BLOCK_BYTES):  # ends early if the connection breaks
                file.write(block)
                report(total)
            return f"the connection ended after {file.tell():,} of {total:,} bytes" if file.tell() < total else ""
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:
            return ""  # the server has nothing beyond what is here: complete, or the checksum will differ
        if 400 <= error.code < 500 and error.code not in (408, 429):
            raise UserError(f"{url} cannot be downloaded: {error}; name a mirror with --openslr-url") from None
        return str(error)
    except (urllib.error.URLError, ConnectionError, TimeoutError, http.client.HTTPException) as error:
        return str(error) or type(error).__name__
