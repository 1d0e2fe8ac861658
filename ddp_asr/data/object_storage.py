"""Shards on object storage and web servers: `s3://`, `gs://`, `az://`, `http://`, `https://`.

    store = ObjectStore()
    store.read("s3://bucket/train/shard-000000.tar", offset, size)      # bytes; from any thread
    upload(Path("shards/mine"), "s3://bucket/mine", report)             # a directory of shards, dataset.json last

The requests go through `obstore`, whose settings are the environment variables of each service: AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL, for instance. Its own retries are turned off, because they do
not see an answer that is too short. Here a broken connection, a server's error and an answer cut short are tried again
after growing pauses; after PATIENCE_S the run ends with a sentence.

`obstore` must not be used in a process that was forked after its first use, where it hangs (seen with 0.12.1). Ranks
are started and not forked, and loaders are threads.
"""

from __future__ import annotations

import errno
import json
import random
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from ddp_asr.data.storage import Unreachable
from ddp_asr.errors import UserError, printable

PATIENCE_S = 300.0  # less than distributed.timeout_s, after which the other ranks give this one up
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0
SAY_AFTER_S = 5.0  # a longer disturbance is said on stderr
_REQUEST_S = 60  # for one answer, whole
UPLOAD_LIST = "uploading.json"  # there while an upload is unfinished: what it is the upload of

Result = TypeVar("Result")


class ObjectStore:
    """Reads byte ranges of objects, see `storage.Store`."""

    def read(self, name: str, offset: int, size: int) -> bytes:
        if not size:
            return b""
        return _patiently(name, lambda: self._read(name, offset, size))

    def _read(self, name: str, offset: int, size: int) -> bytes:
        import obstore

        folder, file = _split(name)
        try:
            data = bytes(obstore.get_range(folder, file, start=offset, length=size))
        except obstore.exceptions.GenericError:
            self._check_end(name, offset, size)  # a range that lies behind the end is refused with many words
            raise
        if len(data) != size:
            self._check_end(name, offset, size)
            raise ConnectionError(f"{len(data):,} bytes came instead of {size:,}")
        return data

    def _check_end(self, name: str, offset: int, size: int) -> None:
        end = _size(name)
        if offset + size > end:
            raise OSError(f"{name} ends at byte {end}, before byte {offset + size}")

    def size(self, name: str) -> int:
        return _patiently(name, lambda: _size(name))


def _size(name: str) -> int:
    import obstore

    folder, file = _split(name)
    return int(obstore.head(folder, file)["size"])


def _split(name: str) -> tuple[Any, str]:
    """The client of the folder that the object lies in, and the object's name there."""
    folder, _, file = name.rpartition("/")
    return _folder(folder), file


@lru_cache(maxsize=64)
def _folder(url: str) -> Any:
    try:
        from obstore.store import from_url
    except ImportError:
        raise UserError(f"{url} needs the package obstore: run pip install 'ddp-asr[object-storage]'") from None
    options: Any = {"allow_http": True, "timeout": timedelta(seconds=_REQUEST_S)}
    try:
        return from_url(url, client_options=options, retry_config={"max_retries": 0})
    except Exception as error:  # obstore's errors have no common base below Exception that is public for a bad URL
        raise UserError(f"{url} cannot be used: {_reason(error)}; {_ADVICE}") from None


_ADVICE = "check the URL, and the environment variables with the credentials of the service (docs/object-storage.md)"


def _patiently(name: str, request: Callable[[], Result]) -> Result:
    """The request's result; repeated with growing pauses where it may succeed later.

    Raises:
        FileNotFoundError: there is no such object.
        OSError: it ends before what was asked for.
        UserError: it is refused.
        Unreachable: nothing has helped for PATIENCE_S.
    """
    from obstore import exceptions

    began_s, pause_s, said = time.monotonic(), FIRST_PAUSE_S, False
    while True:
        try:
            return request()
        except (FileNotFoundError, exceptions.NotFoundError):  # obstore raises Python's own, its type says the other
            raise FileNotFoundError(errno.ENOENT, "no such object", name) from None
        except (PermissionError, exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
            raise UserError(f"{name} may not be read or written: {_reason(error)}; {_ADVICE}") from None
        except (exceptions.GenericError, exceptions.JoinError, ConnectionError) as error:
            waited_s = time.monotonic() - began_s
            if waited_s > PATIENCE_S:
                raise Unreachable(
                    f"{name} could not be reached for {waited_s:.0f} s ({_reason(error)}): check the network and the "
                    "service, then start again; a run goes on from its newest checkpoint"
                ) from None
            if waited_s > SAY_AFTER_S and not said:
                said = True
                print(
                    f"{name}: {_reason(error)}; tried again for up to {PATIENCE_S:.0f} s", file=sys.stderr, flush=True
                )
        except exceptions.BaseError as error:
            raise UserError(f"{name} cannot be read or written: {_reason(error)}; {_ADVICE}") from None
        time.sleep(pause_s * random.uniform(0.5, 1.0))  # at random, so that the ranks do not all come at once
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _reason(error: Exception) -> str:
    """The first sentence of obstore's words, which go on with the structure of the error."""
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return printable(first_line, 200)


def upload(directory: Path, url: str, report: Callable[[str], None]) -> None:
    """Copies a finished shard directory to a URL, `dataset.json` last; `report` gets each file's name when it is there.

    What an interrupted upload of the same shards has copied is not copied again.

    Raises:
        UserError: there are other shards under the URL, or it cannot be written.
    """
    import obstore

    dataset = (directory / "dataset.json").read_bytes()
    there = _read_if_any(f"{url}/dataset.json")
    if there == dataset:
        return
    if there is not None:
        raise UserError(f"{url} holds other shards; name another --out, or delete those first")
    shards = [shard["name"] for shard in json.loads(dataset)["shards"]]
    goes_on = _read_if_any(f"{url}/{UPLOAD_LIST}") == dataset
    if not goes_on:
        _put(f"{url}/{UPLOAD_LIST}", dataset)
    for name in (*shards, "index.parquet", "dropped.jsonl", "dataset.json"):
        path = directory / name
        if not (goes_on and _size_if_any(f"{url}/{name}") == path.stat().st_size):
            _put(f"{url}/{name}", path)
        report(name)
    folder, file = _split(f"{url}/{UPLOAD_LIST}")
    _patiently(url, lambda: obstore.delete(folder, file))


def _put(name: str, content: bytes | Path) -> None:
    import obstore

    folder, file = _split(name)
    _patiently(name, lambda: obstore.put(folder, file, content))


def _read_if_any(name: str) -> bytes | None:
    size = _size_if_any(name)
    return None if size is None else ObjectStore().read(name, 0, size)


def _size_if_any(name: str) -> int | None:
    try:
        return ObjectStore().size(name)
    except FileNotFoundError:
        return None
