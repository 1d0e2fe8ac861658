"""Where the bytes of shards are read from, and node-local copies of them.

    store = open_store("shards/train-clean-100/shard-000000.tar")      # the store for URLs of this scheme
    store.read(name, offset, size)                                     # bytes; from any thread
    store.size(name)
    index = cache_shards(index, "/local/disk", limit_bytes)            # the same index over local copies

A name is a URL as text, never a `Path`, which would make `s3:/bucket` of `s3://bucket`; a local path is a URL without a
scheme. A new kind of store is a class with the methods of `Store` and a line in `STORES`.

An epoch reads every shard all the time, a few utterances from each, so a cache that is smaller than the corpus is best
filled once and left alone: any rule by which copies replace each other would copy the corpus again and again for no
more hits. The shards that do not fit are read where they are, by the loader's threads, ahead of the steps.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import itertools
import math
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ddp_asr.errors import UserError
from ddp_asr.files import BLOCK_BYTES, scheme_of, writing_aside

if TYPE_CHECKING:
    from ddp_asr.data.index import Index

# What to do where utterances no longer decode; a copy is compared with its checksum only while it is made.
CHECK_SHARDS = (
    "check the shards with 'python -m ddp_asr.shard --verify --out DIR', and if data.cache_dir is set, delete the "
    "copies there"
)
_OPEN_FILES = 256  # descriptors that a store keeps; most systems allow a process 1,024


class Unreachable(UserError):
    """A store that did not answer for minutes, although nothing is wrong with what was asked: it may answer later."""


class Store(Protocol):
    """Reads byte ranges. All methods may be called from several threads at once."""

    def read(self, name: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset` on.

        Raises:
            FileNotFoundError: there is no such name.
            OSError: it ends before, or it cannot be read.
            Unreachable: the service does not answer.
        """
        ...

    def size(self, name: str) -> int:
        """Bytes under the name; FileNotFoundError where there are none."""
        ...


class LocalStore:
    """Files of this machine. Descriptors stay open, the most recently used ones."""

    def __init__(self) -> None:
        self._descriptor = lru_cache(maxsize=_OPEN_FILES)(_Descriptor)

    def read(self, name: str, offset: int, size: int) -> bytes:
        descriptor = self._descriptor(name)  # held until this read is done, so that no other thread closes it
        data = os.pread(descriptor.number, size, offset)
        if len(data) != size:
            raise OSError(f"{name} ends at byte {offset + len(data)}, before byte {offset + size}")
        return data

    def size(self, name: str) -> int:
        return os.stat(name).st_size


class _Descriptor:
    """An open file, closed when the last reference to it goes."""

    number = -1

    def __init__(self, path: str) -> None:
        # Without O_NONBLOCK the opening of a named pipe would wait for a writer.
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


def _object_store() -> Store:
    from ddp_asr.data.object_storage import ObjectStore

    return ObjectStore()


# By URL scheme; "" is a path.
STORES: dict[str, Callable[[], Store]] = {"": LocalStore} | dict.fromkeys(
    ("s3", "gs", "az", "http", "https"), _object_store
)


def open_store(url: str) -> Store:
    """A store that reads this URL and all others of its scheme.

    Raises:
        UserError: there is no store for the scheme.
    """
    scheme = scheme_of(url)
    if scheme not in STORES:
        known = ", ".join(f"{name}://" if name else "a local path" for name in STORES)
        raise UserError(f"{url}: shards cannot be read from {scheme}://; known are: {known}")
    return STORES[scheme]()


class Shards:
    """The shard files of an index, by number, each read through the store of its scheme."""

    def __init__(self, urls: tuple[str, ...]) -> None:
        self._urls = urls
        one_of_each = {scheme_of(url): url for url in urls}
        self._stores = {scheme: open_store(url) for scheme, url in one_of_each.items()}

    def read(self, shard: int, offset: int, size: int) -> bytes:
        url = self._urls[shard]
        return self._stores[scheme_of(url)].read(url, offset, size)


# node-local copies


def cache_shards(index: Index, cache_dir: str | Path, limit_bytes: float = math.inf) -> Index:
    """The index with its shards copied to a node-local directory, once for all ranks and runs of the node.

    A copy is named by its checksum, compared with it while it is written, and renamed into place. All ranks of a node
    call this at the same time: in the first pass each copies what nobody else is copying, in the second it waits for
    what is not yet there. Those copies that a killed run had finished are used.

    With a limit the first shards are copied, as many as fit beside the copies of other corpora that are there; the
    others stay where they are.
    """
    directory = Path(cache_dir)
    copies = [
        directory / f"{checksum[:16]}-{url.rpartition('/')[2]}"
        for url, checksum in zip(index.shards, index.checksums, strict=True)
    ]
    used = np.unique(index.shard).tolist()
    sizes = {shard: open_store(index.shards[shard]).size(index.shards[shard]) for shard in used}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        others = sum(path.stat().st_size for path in directory.glob("*.tar") if path not in set(copies))
        ends = itertools.accumulate(sizes.values(), initial=others)
        next(ends)
        kept = [shard for shard, end in zip(used, ends, strict=True) if end <= limit_bytes]
        for wait in (False, True):
            for shard in kept:
                _copy_once(index.shards[shard], sizes[shard], copies[shard], index.checksums[shard], wait=wait)
    except OSError as error:
        needed_mb = sum(sizes.values()) / 1e6
        raise UserError(
            f"data.cache_dir {directory}: {error.strerror or error}; it must be writable and hold the shards' "
            f"{needed_mb:.0f} MB: make room, name another directory, or leave data.cache_dir empty"
        ) from None
    placed = [str(copies[shard]) if shard in set(kept) else url for shard, url in enumerate(index.shards)]
    return dataclasses.replace(index, shards=tuple(placed))


def _copy_once(url: str, size: int, copy: Path, checksum: str, *, wait: bool) -> None:
    """Makes the copy if it is not there; where another process is making it, returns at once unless `wait`."""
    with open(copy.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return
        if copy.exists() and copy.stat().st_size == size:
            return
        for unfinished in copy.parent.glob(f".{copy.name}.*"):  # of a process that was killed: we hold the lock
            unfinished.unlink()
        _copy(url, size, copy, checksum)


def _copy(url: str, size: int, copy: Path, checksum: str) -> None:
    """Copies the shard; an UserError where it does not match its checksum."""
    store, digest = open_store(url), hashlib.sha256()

    def check() -> None:
        found = digest.hexdigest()
        if found != checksum:
            raise UserError(
                f"{url} does not match its checksum (SHA-256 {found[:16]}..., expected {checksum[:16]}...): it is "
                f"damaged; delete {url.rpartition('/')[0]} and shard it again"
            )

    with writing_aside(copy, before_rename=check) as file:
        for offset in range(0, size, BLOCK_BYTES):
            block = store.read(url, offset, min(BLOCK_BYTES, size - offset))
            digest.update(block)
            file.write(block)
