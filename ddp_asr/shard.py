"""Pack speech and its transcripts into shards, once: SOURCE --utterances--> pack, in parallel --in order--> Output.

    python -m ddp_asr.shard train-clean-100 --out shards/train-clean-100

A source (sources.py) yields `Utterance`s in an order of its own that never changes. `pack`, in worker processes,
decodes each one to know that it is good, and converts it where it is not mono 16 kHz FLAC. `Output` takes the results
in the source's order, so neither the number of workers nor their speed can change a byte.

Killed at any moment, the same command goes on: a shard is written aside in `.partial/`, synced and renamed, and a
sidecar with its rows, its drops and the number of source utterances used up says that it is finished. So a restart
skips that many utterances and decodes nothing twice. `dataset.json` comes last: a directory with it is complete.

Only utterances that can never be used are dropped here (`sources.REASONS`). What depends on the training settings,
such as characters outside the alphabet, is left out by the run, which lists it.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import errno
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ddp_asr import SAMPLE_RATE_HZ
from ddp_asr.data.sources import (
    BAD_AUDIO,
    DUPLICATE,
    EMPTY_TRANSCRIPT,
    MISSING_AUDIO,
    MISSING_TRANSCRIPT,
    OPENSLR_URL,
    REASONS,
    TOO_LONG,
    Source,
    Utterance,
    open_source,
    valid_text,
)
from ddp_asr.errors import UserError, run_entry_point

if TYPE_CHECKING:
    import numpy as np
    import soundfile


DURATION_TOLERANCE_S = 0.25  # manifests round, some to tenths of a second


class Packed(NamedTuple):
    """A worker's answer: FLAC and its samples, or the reason why not. `flac` None: the source's bytes as they are."""

    flac: bytes | None = None
    samples: int = 0
    reason: str = ""
    detail: str = ""


# ---- audio: in worker processes -------------------------------------------------------------------------------------


class BadAudio(Exception):
    """The file opens, but is not what it says it is."""


class TooLong(Exception):
    """Longer than --max-seconds."""


def pack(utterance: Utterance, max_seconds: float | None) -> Packed:
    """Mono 16 kHz FLAC known to decode, and its number of samples; or why there is none."""
    if utterance.reason:
        return Packed(reason=utterance.reason, detail=utterance.detail)
    if utterance.text is None:
        return Packed(reason=MISSING_TRANSCRIPT)
    if not utterance.text.strip():
        return Packed(reason=EMPTY_TRANSCRIPT)
    try:
        return _pack_audio(utterance, math.inf if max_seconds is None else max_seconds)
    except OSError as error:
        return Packed(reason=MISSING_AUDIO, detail=error.strerror or str(error))
    except TooLong as error:
        return Packed(reason=TOO_LONG, detail=str(error))
    except (BadAudio, RuntimeError, ValueError, TypeError, MemoryError) as error:  # all raised by soundfile
        # libsndfile's words alone: soundfile adds the address of the file object, another one in each process.
        return Packed(reason=BAD_AUDIO, detail=getattr(error, "error_string", str(error)))


def _pack_audio(utterance: Utterance, max_seconds: float) -> Packed:
    import soundfile

    if utterance.data is None and utterance.offset_s is not None and utterance.path:
        data = b""
        opened: Any = utterance.path.open("rb")  # of a long recording, only the segment is read
    else:
        data = utterance.path.read_bytes() if utterance.data is None and utterance.path else utterance.data or b""
        opened = io.BytesIO(data)
    with opened, soundfile.SoundFile(opened) as audio:
        start, stop = _bounds(utterance, audio)
        whole = utterance.offset_s is None and stop == audio.frames
        untouched = whole and data[:4] == b"fLaC" and audio.samplerate == SAMPLE_RATE_HZ and audio.channels == 1
        _refuse_too_long(stop - start, audio.samplerate, max_seconds)
        audio.seek(start)
        dtype = "float32" if not untouched else "int16" if audio.subtype == "PCM_16" else "int32"
        waveform = _read(audio, stop - start, dtype)
        _refuse_truncated(utterance.duration_s, audio, len(waveform), stop - start, whole)
    if untouched:
        _check_md5(data, waveform)
        _refuse_too_long(len(waveform), SAMPLE_RATE_HZ, max_seconds)
        return Packed(data if utterance.data is None else None, len(waveform))
    flac, samples = convert(waveform, audio.samplerate)
    _refuse_too_long(samples, SAMPLE_RATE_HZ, max_seconds)
    return Packed(flac, samples)


def _bounds(utterance: Utterance, audio: soundfile.SoundFile) -> tuple[int, int]:
    """First and last + 1 sample of the utterance, at the file's rate, by the rule in `sources.manifest_source`."""
    start = round((utterance.offset_s or 0.0) * audio.samplerate)
    if utterance.offset_s is not None and start >= audio.frames:
        raise BadAudio(f"starts at {utterance.offset_s} s of {audio.frames / audio.samplerate:.3f} s")
    if utterance.duration_s is None:
        return start, audio.frames
    stop = start + round(utterance.duration_s * audio.samplerate)
    if utterance.offset_s is None and audio.frames - stop <= DURATION_TOLERANCE_S * audio.samplerate:
        return start, audio.frames
    return start, min(audio.frames, stop)


def _refuse_too_long(samples: int, rate_hz: int, max_seconds: float) -> None:
    if samples > max_seconds * rate_hz:
        raise TooLong(f"{samples / rate_hz:.3f} s")


def _read(audio: soundfile.SoundFile, samples: int, dtype: str) -> np.ndarray:
    """(n, channels), n <= samples; in blocks, because a broken header can promise any length."""
    import numpy as np

    blocks = []
    while samples > 0 and len(block := audio.read(min(samples, 1 << 20), dtype=dtype, always_2d=True)):
        blocks.append(block)
        samples -= len(block)
    if not blocks:
        raise BadAudio("no samples")
    return np.concatenate(blocks)


def _refuse_truncated(
    stated_s: float | None, audio: soundfile.SoundFile, samples: int, expected: int, whole: bool
) -> None:
    """libsndfile reads truncated files up to their end and reports the truncation only in its log."""
    if samples < 0.98 * expected:  # MP3 headers are not exact
        raise BadAudio(f"{samples} samples instead of {expected}")
    log = audio.extra_info
    for chunk in re.finditer(r"^ *(data|SSND) *: (\d+) \(should be (\d+)\)", log, re.MULTILINE):
        stated, there = int(chunk[2]), int(chunk[3])
        if there < stated < 0x7FFF0000:  # programs that write to a pipe state 2 or 4 GB
            raise BadAudio(f"{there} bytes of audio instead of {stated}")
    if whole and "lacks an end-of-stream bit" in log:
        raise BadAudio("the last page is missing")
    seconds = samples / audio.samplerate
    if stated_s is not None and seconds < 0.99 * stated_s - DURATION_TOLERANCE_S:
        raise BadAudio(f"{seconds:.3f} s of audio, where the source states a duration of {stated_s} s")


def _check_md5(flac: bytes, waveform: np.ndarray) -> None:
    """Against the MD5 in the FLAC's STREAMINFO, over the samples at their own width; all zeros: none was written."""
    bits = ((flac[20] & 1) << 4 | flac[21] >> 4) + 1
    if bits % 8 or not any(flac[26:42]):
        return
    width = waveform.dtype.itemsize  # libsndfile puts narrow samples into an int's upper bytes
    pcm = waveform.reshape(-1, 1).view("uint8")[:, width - bits // 8 :]
    if hashlib.md5(pcm.tobytes(), usedforsecurity=False).digest() != flac[26:42]:
        raise BadAudio("decodes to other samples than were encoded (MD5)")


def convert(waveform: np.ndarray, rate_hz: int) -> tuple[bytes, int]:
    """(n, channels) in [-1, 1) -> 16 bit mono FLAC at 16 kHz and its number of samples."""
    import numpy as np
    import soundfile
    import soxr

    mono = waveform.mean(axis=1)
    if not np.isfinite(mono).all():
        raise BadAudio("samples that are not finite")
    if rate_hz != SAMPLE_RATE_HZ:
        mono = soxr.resample(mono, rate_hz, SAMPLE_RATE_HZ, quality="HQ")
    pcm = np.clip(np.rint(mono * 32768), -32768, 32767).astype(np.int16)
    if not len(pcm):
        raise BadAudio("no samples")
    flac = io.BytesIO()
    soundfile.write(flac, pcm, SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
    return flac.getvalue(), len(pcm)


def in_order(
    function: Callable[..., Any], items: Iterable[Any], workers: int, *arguments: Any
) -> Generator[Any, None, None]:
    """(item, function(item, *arguments)) in the order of the items, computed by so many processes."""
    if workers == 1:
        for item in items:
            yield item, function(item, *arguments)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _end_with_parent)
    waiting: collections.deque[Any] = collections.deque()
    try:
        for item in items:
            with _interrupts_blocked():  # processes started in here inherit it: Ctrl-C is the parent's to answer
                waiting.append((item, pool.submit(function, item, *arguments)))
            if len(waiting) >= 8 * workers:
                item, future = waiting.popleft()
                yield item, future.result()
        while waiting:
            item, future = waiting.popleft()
            yield item, future.result()
    except BrokenProcessPool:
        raise UserError(
            "a worker process was killed, perhaps for want of memory; run the same command again with fewer --workers: "
            "it goes on where it ended"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """In a worker: idle workers hold both ends of their queue, so nothing tells them that the parent was killed."""
    import multiprocessing

    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---- output ---------------------------------------------------------------------------------------------------------


class _Shard:
    """A tar being written aside: `add` returns where the FLAC lies in it."""

    def __init__(self, path: Path) -> None:
        from webdataset import TarWriter

        self.path = path
        self.file = path.open("wb")
        self.sha256 = hashlib.sha256()
        # mtime as an int: a float adds a pax header to every member and doubles small tars. Only keys beyond 100 bytes
        # or ASCII get one now.
        self.tar = TarWriter(self, mtime=0, encoder=False)

    def write(self, data: bytes) -> int:
        """For the tar writer: what is written is hashed on its way."""
        if self.file.closed:  # abandoned: the tar writer still wants to end its tar when it is collected
            return len(data)
        self.sha256.update(data)
        return self.file.write(data)

    def add(self, key: str, flac: bytes, text: str, metadata: dict[str, Any]) -> int:
        """Writes KEY.flac, KEY.json, KEY.txt; returns the offset of the FLAC's first byte."""
        self.tar.write({"__key__": key, "flac": flac})
        offset = self.bytes - -(-len(flac) // 512) * 512
        description = json.dumps(metadata, ensure_ascii=False, sort_keys=True)
        self.tar.write({"__key__": key, "json": description.encode(), "txt": text.encode()})
        return int(offset)

    @property
    def bytes(self) -> int:
        """Size so far, without what the tar is padded with at its end."""
        return int(self.tar.tarstream.offset)

    def abandon(self) -> None:
        """Leaves the unfinished file to the next run, which writes over it; the disk may be full."""
        with contextlib.suppress(OSError):
            self.file.close()

    def rename(self, path: Path) -> int:
        """Finishes the tar and puts it in its place; returns its size."""
        self.tar.close()
        size = self.file.tell()
        _sync(self.file)
        self.path.rename(path)
        return size


class Output:
    """A shard directory in the making; see the module's docstring for what is on disk when."""

    def __init__(self, directory: Path, description: dict[str, Any], shard_bytes: int) -> None:
        self.directory = directory
        self.partial = directory / ".partial"
        self.description = description
        self.shard_bytes = shard_bytes
        self.finished: list[dict[str, Any]] = []  # sidecars of the shards that are in place
        self.rows: list[list[Any]] = []  # of the shard being written
        self.dropped: list[dict[str, str]] = []  # since the last shard was finished
        self.consumed = 0  # utterances of the source
        self.samples = 0
        self.keys: set[str] = set()
        self.shard: _Shard | None = None

    @property
    def hours(self) -> float:
        """Hours of audio so far."""
        return self.samples / SAMPLE_RATE_HZ / 3600

    def resume(self) -> None:
        """Takes up the shards that an earlier, interrupted run of the same command has finished."""
        for number in itertools.count():
            try:
                sidecar = json.loads((self.partial / f"{_shard_name(number)}.json").read_bytes())
                whole = (self.directory / sidecar["name"]).stat().st_size == sidecar["bytes"]
            except (OSError, ValueError, KeyError):
                break
            if not whole:
                break
            self.finished.append(sidecar)
            self.consumed = sidecar["consumed"]
            self.samples += sum(row[3] for row in sidecar["rows"])
            self.keys |= {row[0] for row in sidecar["rows"]}

    def close(self) -> None:
        """Whatever ended the run: nothing but whole shards counts."""
        if self.shard:
            self.shard.abandon()
            self.shard.path.unlink(missing_ok=True)

    def take(self, utterance: Utterance, packed: Packed) -> None:
        """The next utterance of the source, packed or to be dropped."""
        if not packed.reason and utterance.key in self.keys:
            packed = Packed(reason=DUPLICATE)
        if packed.reason:
            self.dropped.append(
                {"key": utterance.key, "reason": packed.reason, "source": utterance.source, "detail": packed.detail}
            )
        else:
            self._add(utterance, packed.flac if packed.flac is not None else utterance.data or b"", packed.samples)
        self.consumed += 1

    def _add(self, utterance: Utterance, flac: bytes, samples: int) -> None:
        text = valid_text((utterance.text or "").strip())
        if self.shard and self.shard.bytes + len(flac) + len(text) + 4096 > self.shard_bytes:
            self.finish_shard()
        if self.shard is None:
            self.shard = _Shard(self.partial / "writing.tar")
        metadata = {"samples": samples, "source": utterance.source, "speaker": utterance.speaker}
        offset = self.shard.add(utterance.key, flac, text, metadata)
        self.rows.append([utterance.key, offset, len(flac), samples, text, utterance.speaker])
        self.keys.add(utterance.key)
        self.samples += samples

    def finish_shard(self) -> None:
        """Puts the shard in its place, then its sidecar: killed in between, the same shard is written again."""
        if self.shard is None:
            return
        name = _shard_name(len(self.finished))
        size = self.shard.rename(self.directory / name)
        sidecar = {
            "name": name,
            "bytes": size,
            "sha256": self.shard.sha256.hexdigest(),
            "consumed": self.consumed,
            "rows": self.rows,
            "dropped": self.dropped,
        }
        self.write_whole(self.partial / f"{name}.json", json.dumps(sidecar).encode())
        self.finished.append(sidecar)
        self.shard, self.rows, self.dropped = None, [], []

    def write_whole(self, path: Path, content: bytes) -> None:
        """Aside, synced, renamed: under its name the file is always whole."""
        temporary = self.partial / "writing"
        with temporary.open("wb") as file:
            file.write(content)
            _sync(file)
        _sync_directory(self.directory)  # what was renamed before is on disk before this is
        temporary.rename(path)

    def all_dropped(self) -> list[dict[str, str]]:
        """Every drop so far."""
        return [case for sidecar in self.finished for case in sidecar["dropped"]] + self.dropped

    def write_dropped(self) -> None:
        """Lists every drop in `dropped.jsonl`."""
        lines = (json.dumps(case, ensure_ascii=False) + "\n" for case in self.all_dropped())
        self.write_whole(self.directory / "dropped.jsonl", "".join(lines).encode())

    def finish(self) -> dict[str, Any]:
        """Index and drops, and `dataset.json` at the very end; returns the latter."""
        from ddp_asr.data import index

        self.finish_shard()
        rows = [[row[0], n, *row[1:]] for n, sidecar in enumerate(self.finished) for row in sidecar["rows"]]
        columns = dict(zip(index.COLUMNS.names, map(list, zip(*rows, strict=True)), strict=True))
        temporary = self.partial / "index.parquet"
        index.write_index(temporary, columns)
        with temporary.open("rb+") as file:
            _sync(file)
        temporary.rename(self.directory / "index.parquet")
        self.write_dropped()
        dataset = self.description | {
            "utterances": len(rows),
            "samples": self.samples,
            "hours": round(self.hours, 4),
            "speakers": len(set(columns["speaker"]) - {""}),
            "shards": [
                {"name": s["name"], "bytes": s["bytes"], "utterances": len(s["rows"]), "sha256": s["sha256"]}
                for s in self.finished
            ],
            "index_sha256": _sha256(self.directory / "index.parquet"),
            "dropped": count_reasons(self.all_dropped()),
        }
        self.write_whole(
            self.directory / "dataset.json", (json.dumps(dataset, indent=2, ensure_ascii=False) + "\n").encode()
        )
        return dataset


def count_reasons(dropped: list[dict[str, str]]) -> dict[str, int]:
    """How many were dropped for each reason, in the order of `REASONS`."""
    counts = collections.Counter(case["reason"] for case in dropped)
    return {reason: counts[reason] for reason in REASONS if counts[reason]}


def _shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---- verification ---------------------------------------------------------------------------------------------------


class ShardCheck(NamedTuple):
    """What a shard should hold."""

    path: Path
    sha256: str
    rows: list[dict[str, Any]]


def verify(out: Path, workers: int) -> None:
    """Re-reads every shard against its checksum and its rows, and decodes every utterance; `UserError` at any fault."""
    import pyarrow.parquet
    from rich.console import Console
    from rich.progress import track

    from ddp_asr.data import index

    dataset = index.read_dataset_json(out)
    index.read_index([out])  # compares the checksum of index.parquet, too
    rows = pyarrow.parquet.read_table(out / "index.parquet").to_pylist()
    by_shard = {number: list(group) for number, group in itertools.groupby(rows, key=lambda row: row["shard"])}
    checks = [
        ShardCheck(out / shard["name"], shard["sha256"], by_shard.get(number, []))
        for number, shard in enumerate(dataset["shards"])
    ]
    faults: list[str] = []
    console = Console(stderr=True)
    results = in_order(verify_shard, checks, min(workers, len(checks)))
    with contextlib.closing(results):
        for _, found in track(
            results, "verifying", len(checks), console=console, disable=not console.is_terminal, transient=True
        ):
            faults += found
    if faults:
        raise UserError(
            f"{out}: {_plural(len(faults), 'fault')}, the first: {faults[0]}; delete {out} and shard its source again"
        )
    print(f"{out}: {_plural(len(checks), 'shard')} as written, all of {_plural(len(rows), 'utterance')} decode")


def verify_shard(check: ShardCheck) -> list[str]:
    """Every way in which a shard is not what its checksum and its rows say."""
    import tarfile

    faults = [] if _sha256(check.path) == check.sha256 else [f"{check.path.name}: another checksum"]
    try:
        with tarfile.open(check.path) as tar, check.path.open("rb") as file:
            members = {member.name: (member.offset_data, member.size) for member in tar}
            for row in check.rows:
                faults += [f"{check.path.name}, {row['key']}: {fault}" for fault in _row_faults(row, members, file)]
    except (OSError, tarfile.TarError) as error:
        faults.append(f"{check.path.name}: {error}")
    if not faults and len(members) != 3 * len(check.rows):
        faults.append(f"{check.path.name}: {len(members)} members for {len(check.rows)} utterances")
    return faults


def _row_faults(row: dict[str, Any], members: dict[str, tuple[int, int]], file: Any) -> Iterator[str]:
    def content(offset: int, size: int) -> bytes:
        file.seek(offset)
        return bytes(file.read(size))

    if members.get(f"{row['key']}.flac") != (row["offset"], row["bytes"]):
        yield "is not where the index says"
        return
    if content(*members.get(f"{row['key']}.txt", (0, 0))) != row["text"].encode():
        yield "has another transcript than the index"
    flac = content(row["offset"], row["bytes"])
    packed = pack(Utterance(row["key"], row["key"], "decode only", data=flac), None)
    if packed.reason:
        yield f"{packed.reason} ({packed.detail})"
    elif packed.flac is not None or packed.samples != row["samples"]:
        yield f"decodes to {packed.samples} samples, the index says {row['samples']}"


# ---- the command ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """The command line."""

    source: str
    out: Path
    shard_mb: float
    workers: int
    max_seconds: float | None
    strict: bool
    verify: bool
    cache: Path
    openslr_url: str

    def describe(self, source: Source) -> dict[str, Any]:
        """What decides the bytes of an output, and so what must be equal for it to be gone on with or left alone."""
        from ddp_asr.data import index

        settings = {"shard_mb": self.shard_mb, "max_seconds": self.max_seconds}
        return {
            "format": index.FORMAT,
            "version": index.FORMAT_VERSION,
            "source": source.identity,
            "settings": settings,
        }


def make(options: Options) -> dict[str, Any]:
    """Makes the shards, or what is still missing of them; leaves complete ones alone; returns `dataset.json`."""
    source = open_source(options.source, options.cache, options.openslr_url)
    description = options.describe(source)
    try:
        if dataset := _complete(options.out, description):
            print(f"{options.out} is complete already")
            if options.strict and dataset["dropped"]:
                lines = (options.out / "dropped.jsonl").read_bytes().splitlines()
                raise UserError(_strict(options, [json.loads(line) for line in lines]))
            return dataset
        created = not options.out.exists()
        with _claimed(options.out, description):
            return _fill(options, source, description, created)
    except OSError as error:
        raise UserError(_writing_failed(options.out, error)) from None


def _fill(options: Options, source: Source, description: dict[str, Any], created: bool) -> dict[str, Any]:
    with contextlib.closing(Output(options.out, description, round(options.shard_mb * 1e6))) as output:
        output.resume()
        size, utterances = source.open()
        unpacked = itertools.islice(utterances, output.consumed, None)
        packed = in_order(pack, unpacked, options.workers, options.max_seconds)
        with contextlib.closing(packed), Progress(size, output) as progress:
            for utterance, result in packed:
                output.take(utterance, result)
                progress.update(utterance)
        dropped = output.all_dropped()
        if not output.keys:
            shutil.rmtree(options.out if created else output.partial)
            raise UserError(f"{options.source}: not one usable utterance in it; {_worst(dropped)}")
        if options.strict and dropped:
            output.finish_shard()  # so that the same command without --strict has nothing left to do
            output.write_dropped()
            raise UserError(_strict(options, dropped))
        dataset = output.finish()
    shutil.rmtree(output.partial)
    return dataset


def _complete(out: Path, description: dict[str, Any]) -> dict[str, Any] | None:
    """`dataset.json`, where the directory is complete and was made from this source with these settings."""
    from ddp_asr.data import index

    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a directory")
    names = set(os.listdir(out)) if out.exists() else set()
    if names and not names & {"dataset.json", ".partial"}:
        raise UserError(f"--out {out} holds other files, such as {min(names)}; name a new or empty directory")
    if "dataset.json" not in names:
        return None
    dataset = index.read_dataset_json(out)
    _refuse_other(out, "holds shards", dataset, description)
    index.read_index([out])  # all files in their full size, or a `UserError`
    shutil.rmtree(out / ".partial", ignore_errors=True)  # killed between dataset.json and this
    return dataset


def _refuse_other(out: Path, holds: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """By content and settings: a source may have moved or been renamed since."""
    remedy = f"name another --out, or delete {out} first"
    for name in ("kind", "digest"):
        if found.get("source", {}).get(name) != wanted["source"][name]:
            raise UserError(f"{out} {holds} made from another source, or from this one before it changed; {remedy}")
    for name, value in wanted["settings"].items():
        other = found.get("settings", {}).get(name)
        if other != value:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{out} {holds} made with other settings ({option}: {other} there, {value} now); {remedy}")


@contextlib.contextmanager
def _claimed(out: Path, description: dict[str, Any]) -> Iterator[None]:
    """Holds the directory against a second process, which ends with this one however it ends."""
    import fcntl

    partial = out / ".partial"
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing shards to {out}; wait for it or name another --out") from None
        settings = partial / "settings.json"
        if settings.exists():
            _refuse_other(out, "holds unfinished shards", json.loads(settings.read_bytes()), description)
        else:
            temporary = partial / "writing"
            with temporary.open("w") as file:
                json.dump(description, file)
                _sync(file)
            temporary.rename(settings)
        yield


def _writing_failed(out: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            f"{out}: {error.strerror}; free some and run the same command again: it keeps every finished shard and "
            "goes on from there"
        )
    return f"{out} cannot be written: {error.strerror or error}; name a directory that you may write to with --out"


def _worst(dropped: list[dict[str, str]]) -> str:
    if not dropped:
        return "it is empty"
    counts = ", ".join(f"{count:,} x {reason}" for reason, count in count_reasons(dropped).items())
    first = dropped[0]
    detail = f": {first['detail']}" if first["detail"] else ""
    return f"dropped: {counts}; the first is {first['source']} ({first['reason']}{detail})"


def _strict(options: Options, dropped: list[dict[str, str]]) -> str:
    return (
        f"--strict: {_plural(len(dropped), 'utterance')} cannot be used, {_worst(dropped)}; "
        f"{options.out}/dropped.jsonl lists all; "
        "mend the source and name a new --out, or run the same command without --strict to leave them out"
    )


class Progress:
    """A bar with utterances/s and hours on a terminal; a line a finished shard elsewhere."""

    def __init__(self, size: int, output: Output) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self.output = output
        self.console = Console(stderr=True)
        figures = TextColumn(
            "{task.fields[utterances]:,} utterances, {task.fields[rate]:.0f}/s, {task.fields[hours]:.2f} h"
        )
        columns = (TextColumn("sharding"), BarColumn(), figures, TimeRemainingColumn())
        self.bar = Bar(*columns, console=self.console, disable=not self.console.is_terminal, transient=True)
        self.task = self.bar.add_task("", total=size, utterances=len(output.keys), rate=0.0, hours=output.hours)
        self.start_s, self.before, self.shards = time.monotonic(), output.consumed, len(output.finished)

    def __enter__(self) -> Progress:
        self.bar.start()
        if self.before and not self.console.is_terminal:
            print(f"going on after {len(self.output.finished)} finished shards, {self.before:,} utterances", flush=True)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def update(self, utterance: Utterance) -> None:
        """After every utterance."""
        output = self.output
        rate = (output.consumed - self.before) / (time.monotonic() - self.start_s)
        position = utterance.position or output.consumed
        self.bar.update(self.task, completed=position, utterances=len(output.keys), rate=rate, hours=output.hours)
        if len(output.finished) > self.shards:
            self.shards = len(output.finished)
            if not self.console.is_terminal:
                name = output.finished[-1]["name"]
                print(f"{name}: {len(output.keys):,} utterances, {output.hours:.2f} h, {rate:.0f}/s", flush=True)


def print_table(out: Path, dataset: dict[str, Any]) -> None:
    """What was written, and what was dropped for which reason."""
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column(str(out), overflow="fold")
    table.add_column("utterances", justify="right")
    table.add_row(
        f"written, {dataset['hours']:.2f} h, {_plural(len(dataset['shards']), 'shard')}", f"{dataset['utterances']:,}"
    )
    for reason, count in dataset["dropped"].items():
        table.add_row(f"dropped: {reason}", f"{count:,}")
    Console().print(table)
    if dataset["dropped"]:
        print(f"{out}/dropped.jsonl lists every dropped utterance")


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("s" if count != 1 else "")


def parse(argv: Sequence[str] | None) -> Options:
    """The command line as `Options`."""
    parser = argparse.ArgumentParser(
        prog="python -m ddp_asr.shard",
        description="Pack speech and its transcripts into WebDataset shards with an index, once.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m ddp_asr.shard train-clean-100 --out shards/train-clean-100     fetched from OpenSLR, resumable
  python -m ddp_asr.shard dev-clean.tar.gz --out shards/dev-clean          streamed, never unpacked
  python -m ddp_asr.shard LibriSpeech/dev-clean --out shards/dev-clean     a split on disk
  python -m ddp_asr.shard mine.jsonl --out shards/mine --max-seconds 35    a NeMo-style manifest
  python -m ddp_asr.shard --verify --out shards/mine                       is every byte still as written?

Interrupted or killed, the same command goes on where it ended.""",
    )
    parser.add_argument(
        "source",
        nargs="?",
        default="",
        metavar="SOURCE",
        help="LibriSpeech directory, OpenSLR .tar.gz, JSONL manifest, or name of a LibriSpeech split",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory for the shards")
    parser.add_argument("--shard-mb", type=float, default=256.0, help="size of a shard, in 10^6 bytes (256)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes (one a core)")
    parser.add_argument("--max-seconds", type=float, help="drop longer utterances (none)")
    parser.add_argument("--strict", action="store_true", help="any dropped utterance is an error")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="afterwards, or alone without SOURCE: compare checksums and decode every utterance",
    )
    parser.add_argument(
        "--cache", type=Path, default=Path("data"), metavar="DIR", help="where archives from OpenSLR are kept (data)"
    )
    parser.add_argument(
        "--openslr-url", default=OPENSLR_URL, metavar="URL", help=f"mirror to fetch from ({OPENSLR_URL})"
    )
    options = Options(**vars(parser.parse_args(argv)))
    if not options.source and not options.verify:
        parser.error("SOURCE is missing; without one, --verify checks the shards in --out")
    for name, value in (
        ("shard-mb", options.shard_mb),
        ("workers", options.workers),
        ("max-seconds", options.max_seconds),
    ):
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name} is {value}; it must be more than 0")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point."""
    options = parse(argv)
    if options.source:
        try:
            print_table(options.out, make(options))
        except KeyboardInterrupt:
            print(f"{options.out}: every finished shard is kept; the same command goes on from there", file=sys.stderr)
            raise
    if options.verify:
        verify(options.out, options.workers)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
