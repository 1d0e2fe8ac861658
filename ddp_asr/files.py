"""Files that are whole or absent, files of JSON lines, checksums: each done in one place.

with open_input(path) as file: ...              # of a path that the user names: never waits for a writer
with open_lines(path, "name a text") as lines: ...  # compressed with gzip or not
replace_file(path, b"...")                      # readers see the old file or the new one, both whole
with writing_aside(path) as file: ...           # the same for what is written piece by piece
for line in read_json_lines(path, LINE): ...    # torn and damaged lines are left out
read_json(path, {"step": is_count})             # and fields of another kind than these
check_writable(path)                            # before long work
scheme_of("s3://bucket/shards")                 # "s3"; "" of a path
sha256_of(path)
replace_file(path, sealed_json({...}))          # JSON with its own checksum
(value := read_json(path))["seal"] == seal(value)
"""

import contextlib
import errno
import gzip
import hashlib
import io
import json
import math
import os
import secrets
import stat
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any, TypeGuard

from ddp_asr.errors import UserError

BLOCK_BYTES = 8 << 20
MAX_LINE_BYTES = 16 << 20

# Every temporary file of this process carries this name, so that another process can tell them from its own.
WRITER = secrets.token_hex(8)


def open_input(path: str | Path) -> io.BufferedReader:
    """Opens a regular file for reading, or a pipe that is open already (`/dev/stdin`, the shell's `<(command)`).

    A named pipe without a writer would be waited for without end, and a device may never end.

    Raises:
        OSError: there is no such file, it cannot be read, or it is something else.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
        # Only what has no name in the file system still lies in /proc when its links are followed.
        is_open_pipe = stat.S_ISFIFO(mode) and os.path.realpath(path).startswith("/proc/")
        if not (stat.S_ISREG(mode) or is_open_pipe):
            raise _not_regular(path)
        os.set_blocking(descriptor, True)
        return open(descriptor, "rb")
    except BaseException:  # Ctrl-C is one, too
        os.close(descriptor)
        raise


@contextlib.contextmanager
def open_lines(path: str | Path, remedy: str) -> Iterator[Iterable[bytes]]:
    """Opens a text of the user's, compressed with gzip or not, for reading its lines.

    Args:
        remedy: what to do where it cannot be read.

    Raises:
        UserError: the file cannot be read or was cut, a line has no end, or the block raises a UnicodeDecodeError.
    """
    try:
        with open_input(path) as file:
            compressed = file.peek(2)[:2] == b"\x1f\x8b"
            yield _lines(path, gzip.GzipFile(fileobj=file) if compressed else file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged or was cut ({error}): copy the file again") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {remedy}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason}): convert it, as with iconv") from None


def _lines(path: str | Path, file: io.BufferedReader | gzip.GzipFile) -> Iterator[bytes]:
    """The lines; a kilobyte of gzip may hold a megabyte without one, and a damaged or hostile file any number."""
    while line := file.readline(MAX_LINE_BYTES + 1):
        if len(line) > MAX_LINE_BYTES:
            raise UserError(f"{path} has a line of more than {MAX_LINE_BYTES >> 20} MB: it is no text of lines")
        yield line


def _not_regular(path: str | Path) -> OSError:
    return OSError(errno.EINVAL, "Not a regular file", os.fspath(path))


@contextlib.contextmanager
def writing_aside(
    path: Path, before_rename: Callable[[], None] | None = None, aside_in: Path | None = None
) -> Iterator[IO[bytes]]:
    """A binary file that gets its name `path` when the block ends well; it is removed after an error.

    The content is synced to the disk before the rename, and the directory after it, so that a power failure leaves
    either the old file or the new one.

    Args:
        before_rename: called when the content is on the disk; where it raises, nothing is renamed.
        aside_in: directory for the temporary file, on the same file system; `path`'s own without it.

    Raises:
        OSError: the directory cannot be written or is full, or `path` is a device, a pipe or the like, which the file
            would replace.
    """
    if path.exists() and not path.is_file():
        raise _not_regular(path)
    aside = (aside_in or path.parent) / f".{path.name}.{WRITER}-{secrets.token_hex(4)}.tmp"
    try:
        with aside.open("xb") as file:
            yield file
            sync(file)
        if before_rename is not None:
            before_rename()
        os.replace(aside, path)
        sync_directory(path.parent)
    finally:
        with contextlib.suppress(OSError):  # the error that is on its way says more
            aside.unlink(missing_ok=True)


def replace_file(
    path: Path,
    content: bytes | str,
    before_rename: Callable[[], None] | None = None,
    aside_in: Path | None = None,
) -> None:
    """Writes `content` as the whole file `path`, see `writing_aside`; text is encoded as UTF-8."""
    with writing_aside(path, before_rename, aside_in) as file:
        # Half of a surrogate pair, which no UTF-8 has, is written as \\ud800: as JSON escapes it.
        file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


def check_writable(path: Path) -> None:
    """Raises UserError where no file can be written under the name that `--out` gives."""
    if path.is_dir():
        raise UserError(f"--out {path} is a directory: name a file in it")
    try:
        if path.exists() and not path.is_file():
            raise _not_regular(path)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror}; name another place") from None


def left_behind(directory: Path, names: str) -> list[Path]:
    """Temporary files that other processes have begun for files of these names (a glob pattern) and not renamed."""
    return [path for path in directory.glob(f".{names}.*.tmp") if WRITER not in path.name]


def sync(file: IO[Any]) -> None:
    """Returns when all that was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Makes a rename in the directory outlive a power failure."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def json_lines(objects: Iterable[dict[str, Any]]) -> str:
    """The objects as JSONL text."""
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in objects)


def parse_json_line(text: bytes | str) -> dict[str, Any] | None:
    """The object of one line; None for a line that was torn by a kill or lost in a power failure.

    A machine that loses power may leave blocks of zeros in a file, so a line feed at its end proves nothing.
    """
    line = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    if not (line.endswith("\n") and line.startswith("{")):
        return None
    with contextlib.suppress(ValueError, RecursionError):  # the latter for [[[[...
        value = json.loads(line)
        return value if isinstance(value, dict) else None
    return None


Fields = Mapping[str, Callable[[Any], bool]]  # of an object in a file: whether a value may stand under a name
ANY: Fields = MappingProxyType({})


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is finite, and a float can hold it: JSON has integers of any length, and Python's has NaN."""
    return isinstance(value, int | float) and not is_flag(value) and abs(value) <= sys.float_info.max


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not is_flag(value) and 0 <= value < 2**63


def is_time(value: Any) -> bool:
    """Whether it is a Unix time, of a year that has four digits."""
    return is_number(value) and bool(0 <= value < 2.5e11)


def only(record: dict[str, Any], fields: Fields) -> dict[str, Any]:
    """The object without the fields that hold something else than `fields` allows; other names stay.

    Somebody may have edited a run's files by hand. A field that is not there is provided for everywhere.
    """
    return {name: value for name, value in record.items() if name not in fields or fields[name](value)}


def read_json_lines(path: Path, fields: Fields = ANY) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file that grows, see `only`: torn lines are left out, and a missing file has none."""
    try:
        file = open_input(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    with file:
        for text in file:
            if (line := parse_json_line(text)) is not None:
                yield only(line, fields)


def read_json(path: Path, fields: Fields = ANY) -> dict[str, Any] | None:
    """The object in a JSON file, see `only`; None where there is no file, or one that holds something else.

    Raises:
        OSError: there is a file that cannot be read.
    """
    try:
        with open_input(path) as file:
            value = json.load(file)
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):  # the last for [[[[...
        return None
    return only(value, fields) if isinstance(value, dict) else None


def sealed_json(value: dict[str, Any]) -> str:
    """JSON text of an object, with the checksum of its fields as one more field, `seal`."""
    return json.dumps(value | {"seal": seal(value)}, indent=2, ensure_ascii=False) + "\n"


def seal(value: dict[str, Any]) -> str:
    """The checksum of all fields but `seal`; where that has another value, somebody or something changed the file."""
    fields = {name: value[name] for name in value if name != "seal"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def scheme_of(url: str) -> str:
    """`s3` of `s3://bucket/name`; "" of a path."""
    scheme, separator, _ = url.partition("://")
    return scheme if separator else ""


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def finite(number: float) -> float | None:
    """The number as JSON can hold it: JSON has neither NaN nor infinity."""
    return number if math.isfinite(number) else None
