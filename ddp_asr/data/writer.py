"""The directory of shards: packed utterances, in the order of the source -> tars, index.parquet, dataset.json.

    source = open_source("mine.jsonl", SourceOptions())
    dataset = write_shards(source, Path("shards/mine"), shard_mb=256, max_seconds=None, workers=4, report=report)
    for shard in verify(Path("shards/mine"), workers=4): ...

Threads pack the utterances in parallel and the results are written in the source's order, so neither the number of
threads nor their speed changes a byte.

Killed at any moment, the same call continues: a shard is written aside in `.partial/`, synced and renamed, and then a
sidecar in `.partial/` with its rows, the dropped utterances and the number of source utterances used up says that it
is finished. A restart skips that many utterances and decodes nothing twice. `dataset.json` comes last: a directory
with it is complete.

Only utterances that can never be used are dropped here (`sources.REASONS`), and `dropped.jsonl` lists them. What
depends on the training settings, such as characters outside the alphabet, is left out by the run, which lists it.
"""

from __future__ import annotations

import collections
import contextlib
import fcntl
import functools
import hashlib
import itertools
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet

from ddp_asr import SAMPLE_RATE_HZ, files
from ddp_asr.data import index
from ddp_asr.data.audio import Packed, pack
from ddp_asr.data.sources import DUPLICATE, REASONS, Source, Utterance
from ddp_asr.data.threads import in_order
from ddp_asr.errors import UserError

if TYPE_CHECKING:
    from webdataset import TarWriter

ENTRY_OVERHEAD_BYTES = 4096  # headers, metadata and padding of an utterance's three members


class Output:
    """The shards of one directory, those of an interrupted run included."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.partial = directory / ".partial"
        self.replace_file = functools.partial(files.replace_file, aside_in=self.partial)
        self.finished: list[dict[str, Any]] = []  # sidecars of the shards that are in place
        self.dropped: list[dict[str, str]] = []  # since the last shard was finished
        self.consumed = 0  # utterances of the source
        self.samples = 0
        self.keys: dict[str, str] = {}  # key -> where the source has it
        for number in itertools.count():
            sidecar = files.read_json(self.partial / f"{_shard_name(number)}.json") or {}
            path = directory / _shard_name(number)
            # Else the shard is made again, such as one of an older program, which had fewer columns.
            whole = sidecar.get("seal") == files.seal(sidecar)
            whole = whole and all(1 + len(row) == len(index.COLUMNS) for row in sidecar["rows"])
            if not whole or not path.is_file() or path.stat().st_size != sidecar["bytes"]:
                break
            self.finished.append(sidecar)
            self.consumed = sidecar["consumed"]
            self.samples += sum(row[3] for row in sidecar["rows"])
            self.keys |= zip((row[0] for row in sidecar["rows"]), sidecar["places"], strict=True)

    @property
    def hours(self) -> float:
        """Hours of audio so far."""
        return self.samples / SAMPLE_RATE_HZ / 3600

    def write(self, packed: Iterable[tuple[Utterance, Packed]], shard_bytes: int, report: Callable[[], None]) -> None:
        """Writes all shards that are still missing; calls `report` after each utterance."""
        from webdataset import TarWriter  # imports torch, which takes seconds

        entries = self._usable(packed, report)
        entry = next(entries, None)
        while entry is not None:
            name = _shard_name(len(self.finished))
            path = self.directory / name
            rows: list[list[Any]] = []
            # mtime as an int: a float adds a pax header to every member and doubles small tars. With an int, only keys
            # beyond 100 bytes or ASCII get one.
            with (
                files.writing_aside(path, aside_in=self.partial) as file,
                TarWriter(file, mtime=0, encoder=False) as tar,
            ):
                while entry is not None and (not rows or _size_with(tar, *entry) <= shard_bytes):
                    rows.append(_add(tar, *entry))
                    entry = next(entries, None)
            # Killed before this file is in place, the next run writes the same shard again.
            sidecar = {"name": name, "bytes": path.stat().st_size, "sha256": files.sha256_of(path)}
            sidecar |= {"consumed": self.consumed, "rows": rows, "dropped": self.dropped}
            sidecar["places"] = [self.keys[row[0]] for row in rows]
            self.replace_file(self.partial / f"{name}.json", files.sealed_json(sidecar))
            self.finished.append(sidecar)
            self.dropped = []

    def _usable(
        self, packed: Iterable[tuple[Utterance, Packed]], report: Callable[[], None]
    ) -> Iterator[tuple[Utterance, Packed]]:
        """Yields what can be used and counts the rest; an entry is consumed when the next one is asked for."""
        for utterance, result in packed:
            reason, detail = result.reason, result.detail
            if not reason and utterance.key in self.keys:
                reason, detail = DUPLICATE, f"same key as {self.keys[utterance.key]}"
            if reason:
                case = {"key": utterance.key, "reason": reason, "source": utterance.source, "detail": detail}
                self.dropped.append(case)
            else:
                # The number too: segments of one file have the same path.
                self.keys[utterance.key] = f"{utterance.source} (utterance {self.consumed + 1} of the source)"
                self.samples += result.samples
                yield utterance, result
            self.consumed += 1
            report()

    def all_dropped(self) -> list[dict[str, str]]:
        """Every dropped utterance so far."""
        return [case for sidecar in self.finished for case in sidecar["dropped"]] + self.dropped

    def finish(self, description: dict[str, Any]) -> dict[str, Any]:
        """Writes the index, the list of dropped utterances and, last, `dataset.json`, which it returns."""
        rows = [[row[0], n, *row[1:]] for n, sidecar in enumerate(self.finished) for row in sidecar["rows"]]
        columns = dict(zip(index.COLUMNS.names, map(list, zip(*rows, strict=True)), strict=True))
        index.write_index(self.partial / "index.parquet", columns)
        table = (self.partial / "index.parquet").read_bytes()
        self.replace_file(self.directory / "index.parquet", table)
        dropped = self.all_dropped()
        self.replace_file(self.directory / "dropped.jsonl", files.json_lines(dropped))
        dataset = description | {
            "utterances": len(rows),
            "samples": self.samples,
            "hours": round(self.hours, 4),
            "speakers": len(set(columns["speaker"]) - {""}),
            "shards": [
                {"name": s["name"], "bytes": s["bytes"], "utterances": len(s["rows"]), "sha256": s["sha256"]}
                for s in self.finished
            ],
            "index_sha256": hashlib.sha256(table).hexdigest(),
            "dropped": count_reasons(dropped),
        }
        self.replace_file(self.directory / "dataset.json", files.sealed_json(dataset))
        return dataset


def _add(tar: TarWriter, utterance: Utterance, packed: Packed) -> list[Any]:
    """Writes KEY.flac, KEY.json, KEY.txt; returns the utterance's row in the index, without the shard."""
    tar.write({"__key__": utterance.key, "flac": packed.flac})
    offset = _size(tar) - -(-len(packed.flac) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    text = (utterance.text or "").strip()
    metadata = {"samples": packed.samples, "source": utterance.source, "speaker": utterance.speaker}
    metadata |= {"language": utterance.language} if utterance.language else {}
    description = json.dumps(metadata, ensure_ascii=False, sort_keys=True)
    tar.write({"__key__": utterance.key, "json": description.encode(), "txt": text.encode()})
    language = utterance.language or None
    return [utterance.key, offset, len(packed.flac), packed.samples, text, utterance.speaker, language]


def _size(tar: TarWriter) -> int:
    """Bytes so far, without the padding at the end of a tar."""
    # webdataset does not document `tarstream`, tarfile does not document `offset`. The file's own position is no
    # substitute, since tarfile buffers. If they change, offsets in the index are wrong and most tests in
    # tests/test_shard.py fail. Tried with webdataset 1.0.2.
    return int(tar.tarstream.offset)


def _size_with(tar: TarWriter, utterance: Utterance, packed: Packed) -> int:
    """Estimate of the size after the utterance is added."""
    return _size(tar) + len(packed.flac) + len((utterance.text or "").strip()) + ENTRY_OVERHEAD_BYTES


def _shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def count_reasons(dropped: list[dict[str, str]]) -> dict[str, int]:
    """How many were dropped for each reason, in the order of `REASONS`."""
    counts = collections.Counter(case["reason"] for case in dropped)
    return {reason: counts[reason] for reason in REASONS if counts[reason]}


# ---- writing --------------------------------------------------------------------------------------------------------


def write_shards(
    source: Source,
    out: Path,
    *,
    shard_mb: float,
    max_seconds: float | None,
    workers: int,
    report: Callable[[Output, int], None],
) -> dict[str, Any]:
    """Writes the shards, or those that an interrupted run left over; leaves a complete directory as it is.

    `report` is called with the source's number of utterances, at the start and after each of them. Returns what
    `dataset.json` says.

    Raises:
        UserError: the source is empty or damaged, or the directory is in use, full, or made from something else.
    """
    description = {"format": index.FORMAT, "version": index.FORMAT_VERSION}
    description |= {"source": source.identity, "settings": {"shard_mb": shard_mb, "max_seconds": max_seconds}}
    try:
        dataset = _read_complete(out, description)
        if dataset is None:
            with _locked(out, description):
                output = Output(out)
                total, utterances = source.open()
                report(output, total)
                unpacked = itertools.islice(utterances, output.consumed, None)
                with contextlib.closing(in_order(pack, unpacked, workers, max_seconds)) as packed:
                    output.write(packed, round(shard_mb * 1e6), lambda: report(output, total))
                if output.keys:
                    dataset = output.finish(description)
                shutil.rmtree(output.partial)
            if dataset is None:
                counts = ", ".join(f"{n:,} x {reason}" for reason, n in count_reasons(output.dropped).items())
                first = output.dropped[0] if counts else {}
                detail = f" ({first['detail']})" if first.get("detail") else ""
                found = f"{counts}; the first is {first['source']}{detail}" if counts else "it is empty"
                raise UserError(f"{source.identity['name']} has no usable utterance: {found}")
    except OSError as error:
        raise UserError(
            f"{out} cannot be written: {error.strerror or error}; free some space or name another directory with "
            "--out; the same command continues after the last finished shard"
        ) from None
    return dataset


def _read_complete(out: Path, description: dict[str, Any]) -> dict[str, Any] | None:
    """`dataset.json` of a directory that is complete and was made from this source with these settings."""
    names = set(os.listdir(out)) if out.exists() else set()
    if names and not names & {"dataset.json", ".partial"}:
        raise UserError(f"--out {out} holds other files, such as {min(names)}; name a new or empty directory")
    if "dataset.json" not in names:
        return None
    dataset = index.read_dataset_json(out)
    _refuse_other(out, "holds shards", dataset, description)
    index.read_index([out])  # raises UserError if a file is missing or has another size
    shutil.rmtree(out / ".partial", ignore_errors=True)  # left by a kill just after dataset.json was written
    return dataset


def _refuse_other(out: Path, holds: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Compares kind, digest and settings, not the name: a source may have been moved or renamed since."""
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
def _locked(out: Path, description: dict[str, Any]) -> Iterator[None]:
    """Locks the directory; the system unlocks it when this process ends, however it ends."""
    partial = out / ".partial"
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing shards to {out}; wait for it or name another --out") from None
        for aside in partial.glob(".*.tmp"):
            aside.unlink()  # a run that was killed left it
        settings = partial / "settings.json"
        if settings.exists():
            found = files.read_json(settings) or {}
            if found.get("seal") != files.seal(found):
                raise UserError(
                    f"{settings} is damaged, so it is unknown what made the shards here; delete {out} first"
                )
            _refuse_other(out, "holds unfinished shards", found, description)
        else:
            files.replace_file(settings, files.sealed_json(description))
        yield


# ---- verification ---------------------------------------------------------------------------------------------------


def verify(out: Path, workers: int) -> Iterator[dict[str, Any]]:
    """Compares every shard with its checksum and decodes every utterance; yields the shards that are good.

    Raises:
        UserError: anything differs.
    """
    shards = index.read_dataset_json(out)["shards"]
    index.read_index([out])  # compares the checksum of index.parquet, too
    rows = pyarrow.parquet.read_table(out / "index.parquet").to_pylist()
    by_shard = {number: list(group) for number, group in itertools.groupby(rows, key=lambda row: row["shard"])}
    checks = [(out / shard["name"], shard["sha256"], by_shard.get(n, [])) for n, shard in enumerate(shards)]
    with contextlib.closing(in_order(_first_fault, checks, workers)) as results:
        for shard, (_, fault) in zip(shards, results, strict=True):
            if fault:
                raise UserError(f"{out}: {shard['name']}{fault}; delete {out} and shard its source again")
            yield shard


def _first_fault(check: tuple[Path, str, list[dict[str, Any]]]) -> str:
    """What differs between a shard and its checksum and rows; "" where nothing does."""
    path, sha256, rows = check
    if files.sha256_of(path) != sha256:
        return ": another checksum"
    with path.open("rb") as file:
        for row in rows:
            file.seek(row["offset"])
            flac = file.read(row["bytes"])
            packed = pack(Utterance(row["key"], row["key"], "decode only", data=flac))
            if packed.reason:
                return f", {row['key']}: {packed.reason} ({packed.detail})"
            if (packed.flac, packed.samples) != (flac, row["samples"]):
                return f", {row['key']}: decodes to {packed.samples} samples, the index says {row['samples']}"
    return ""
