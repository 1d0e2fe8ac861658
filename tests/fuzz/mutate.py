"""Broken inputs from valid ones, the same for the same random generator.

    tree = {"status.json": b"...", "metrics.jsonl": b"..."}
    write_tree(mutate_file(tree, "status.json", random), directory)

An input is a tree of files: name -> content, or a link, a FIFO or a folder. Bytes are flipped, cut, inserted, doubled
and swapped, and numbers in them become extremes. JSON and YAML are also changed as what they mean: a value becomes one
of another type, a key goes, comes twice or gets another name.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import yaml


@dataclass(frozen=True)
class Link:
    """A symbolic link."""

    to: str


@dataclass(frozen=True)
class Fifo:
    """A named pipe that nobody writes to: whoever opens it for reading waits for ever."""


@dataclass(frozen=True)
class Folder:
    """An empty directory, where a file may be expected."""


Tree = dict[str, bytes | Link | Fifo | Folder]
Mutator = Callable[[bytes, Random], bytes]


def write_tree(tree: Tree, directory: Path) -> None:
    """Replaces what is in the directory by the tree."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    for name, content in tree.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, Link):
            path.symlink_to(content.to)
        elif isinstance(content, Fifo):
            os.mkfifo(path)
        else:
            path.mkdir()


def read_tree(directory: Path) -> Tree:
    """What `write_tree` has written, or what has become of it."""
    tree: Tree = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_symlink():
            tree[name] = Link(os.readlink(path))
        elif path.is_fifo():
            tree[name] = Fifo()
        elif path.is_file():
            tree[name] = path.read_bytes()
        elif not any(path.iterdir()):
            tree[name] = Folder()
    return tree


def mutate_file(tree: Tree, name: str, random: Random) -> Tree:
    """The tree with one of its files changed, by what its name says that it holds."""
    content = tree[name]
    assert isinstance(content, bytes)
    return {**tree, name: mutator_of(name)(content, random)}


def mutator_of(name: str) -> Mutator:
    """What changes files of this name."""
    suffix = name.rpartition(".")[2]
    return {
        "json": mutate_json,
        "jsonl": mutate_lines,
        "yaml": mutate_yaml,
        "txt": mutate_text,
        "arpa": mutate_text,
    }.get(suffix, mutate_bytes)


# ---- bytes ---------------------------------------------------------------------------------------------------------


EXTREME_BYTES = (0, 1, 0x7F, 0x80, 0xFE, 0xFF)


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """One to four changes of any bytes."""
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        data = random.choice(_BYTE_CHANGES)(data, random)
    return data


def _flip(data: bytes, random: Random) -> bytes:
    place = random.randrange(max(1, len(data)))
    return (
        data[:place] + bytes(byte ^ (1 << random.randrange(8)) for byte in data[place : place + 1]) + data[place + 1 :]
    )


def _extreme_byte(data: bytes, random: Random) -> bytes:
    place = random.randrange(max(1, len(data)))
    return data[:place] + bytes([random.choice(EXTREME_BYTES)]) + data[place + 1 :]


def _extreme_number(data: bytes, random: Random) -> bytes:
    """Two, four or eight bytes become a number at an end of its type."""
    size = random.choice((2, 4, 8))
    number = random.choice((0, 1, -1, 2 ** (8 * size - 1) - 1, -(2 ** (8 * size - 1)), len(data), 2 ** (4 * size)))
    place = random.randrange(max(1, len(data) - size))
    piece = (number % 2 ** (8 * size)).to_bytes(size, random.choice(("little", "big")))
    return data[:place] + piece + data[place + size :]


def _cut(data: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def _remove(data: bytes, random: Random) -> bytes:
    start, stop = _piece(data, random)
    return data[:start] + data[stop:]


def _insert(data: bytes, random: Random) -> bytes:
    place, size = random.randrange(len(data) + 1), random.choice((1, 4, 16, 300))
    return data[:place] + random.choice((random.randbytes(size), bytes(size), b"\xff" * size)) + data[place:]


def _double(data: bytes, random: Random) -> bytes:
    start, stop = _piece(data, random)
    return data[:stop] + data[start:]


def _swap(data: bytes, random: Random) -> bytes:
    a, b, c, d = sorted(random.randrange(len(data) + 1) for _ in range(4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def _overwrite(data: bytes, random: Random) -> bytes:
    start, stop = _piece(data, random)
    place = random.randrange(len(data) + 1)
    return data[:place] + data[start:stop] + data[place + stop - start :]


def _number_in_text(data: bytes, random: Random) -> bytes:
    """A number in decimal digits becomes an extreme one."""
    found = list(re.finditer(rb"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?", data[: 1 << 16]))
    if not found:
        return _flip(data, random)
    match = random.choice(found)
    return data[: match.start()] + random.choice(NUMBERS).encode() + data[match.end() :]


def _piece(data: bytes, random: Random) -> tuple[int, int]:
    start = random.randrange(len(data) + 1)
    return start, min(len(data), start + random.choice((1, 2, 4, 16, 64, 1024)))


_BYTE_CHANGES = (
    *(_flip, _flip, _extreme_byte, _extreme_number, _cut, _remove, _insert, _double, _swap, _overwrite),
    _number_in_text,
)

NUMBERS = (
    *(
        "0",
        "-1",
        "1",
        "-0",
        "0.0",
        "-0.5",
        "1e-320",
        "1e308",
        "-1e308",
        "1e400",
        "nan",
        "NaN",
        "inf",
        "-inf",
        "Infinity",
    ),
    *("2147483647", "2147483648", "-2147483649", "4294967296", "9223372036854775807", "9223372036854775808"),
    *("18446744073709551616", "-18446744073709551616", "1" + "0" * 30, "9" * 400, "9" * 5000, "0x10", "1_000", "007"),
)


# ---- text ----------------------------------------------------------------------------------------------------------


WORDS = (
    *(b"", b" ", b"\t", b"\0", b"\x0b", b"\x1b[31m", b"\r", b"\r\n", b"\n\n", b"\xef\xbb\xbf", b"\xff\xfe", b"\xc3"),
    *(b"\xed\xa0\x80", "\u2028".encode(), "\u0085".encode(), "\u00a0".encode(), "\u0130".encode(), "\ufb01".encode()),
    *("e\u0301".encode(), "\u0627\u0644".encode(), b"\xf4\x8f\xbf\xbf", b"..", b"../../x", b"/", b"/dev/zero", b"-"),
    *(b"%s", b"{}", b"$HOME", b"~", b"*", b"#", b"'", b'"', b"\\", b"a" * 5000, b"<unk>", b"<s>", b"\\end\\"),
)


def mutate_text(data: bytes, random: Random) -> bytes:
    """Changes of lines and of words in them, or of any bytes."""
    if random.random() < 0.3:
        return mutate_bytes(data, random)
    for _ in range(random.choice((1, 1, 2, 3))):
        data = random.choice((_change_lines, _change_lines, _change_word, _number_in_text))(data, random)
    return data


def _change_lines(data: bytes, random: Random) -> bytes:
    lines = data.split(b"\n")
    one, other = random.randrange(len(lines)), random.randrange(len(lines))
    change = random.randrange(6)
    if change == 0:
        del lines[one]
    elif change == 1:
        lines.insert(other, lines[one])
    elif change == 2:
        lines[one], lines[other] = lines[other], lines[one]
    elif change == 3:
        lines[one] += lines[other]
    elif change == 4:
        return random.choice(
            (b"\xef\xbb\xbf" + data, data.replace(b"\n", b"\r\n"), data.replace(b"\n", b"\r"), data * 3)
        )
    else:
        lines[one : one + 1] = [lines[one][:3], lines[one][3:]]
    return b"\n".join(lines)


def _change_word(data: bytes, random: Random) -> bytes:
    words = re.split(rb"([\s=:,]+)", data)
    place = random.randrange(len(words))
    words[place] = random.choice((random.choice(WORDS), random.choice(words), words[place] + random.choice(WORDS)))
    return b"".join(words)


# ---- JSON ----------------------------------------------------------------------------------------------------------


def mutate_json(data: bytes, random: Random) -> bytes:
    """A change of a JSON document: mostly of what it means, else of its text."""
    if random.random() < 0.25:
        return mutate_text(data, random)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, random)
    for _ in range(random.choice((1, 1, 2))):
        value = mutate_value(value, random)
    text = json.dumps(value)
    if random.random() < 0.2:  # a number that Python's own writer cannot write
        text = _number_in_text(text.encode(), random).decode(errors="replace")
    if random.random() < 0.03 and text.startswith("{") and len(text) > 2:
        text = random.choice((text[:-1] + "," + text[1:], text * 2))  # every key twice; two documents
    return text.encode()


def mutate_lines(data: bytes, random: Random) -> bytes:
    """A change of a file of JSON lines: of one of its lines, or of their order."""
    if random.random() < 0.3:
        return mutate_text(data, random)
    lines = data.split(b"\n")
    place = random.randrange(len(lines))
    lines[place] = mutate_json(lines[place], random)
    return b"\n".join(lines)


VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, 0.5, -0.5, 1e308, 5e-324),
    *(float("nan"), float("inf"), float("-inf"), "", " ", "x", "0", "-1", "nan", "1e999", "true", "off", "a" * 3000),
    *("\0", "\ud800", "\n", "\x1b[31m", "\u2028", "../../x", "..", "/dev/zero", "/", "~", "e\u0301", "%s", "{}"),
    *([], {}, [[]], [None], {"a": None}, {"": {}}, [0, "a"], [1e400], ["\ud800"], {"kind": "x"}, {"kind": []}),
)


def mutate_value(value: Any, random: Random) -> Any:
    """The JSON value with one change at a place in it."""
    value = copy.deepcopy(value)
    places: list[tuple[Any, Any]] = []  # (container, key) of each value in it

    def walk(inside: Any) -> None:
        keys = list(inside) if isinstance(inside, dict) else range(len(inside)) if isinstance(inside, list) else ()
        for key in keys:
            places.append((inside, key))
            walk(inside[key])

    walk(value)
    if not places or random.random() < 0.02:
        return copy.deepcopy(random.choice(VALUES))
    container, key = random.choice(places)
    change = random.randrange(8)
    if change == 0:
        del container[key]
    elif change == 1:
        other, place = random.choice(places)
        container[key] = copy.deepcopy(other[place])
    elif change == 2 and isinstance(container, dict):
        container[random.choice([*container, f"{key}x", str(key).upper(), "", "\ud800", 1.5, "kind"])] = container.pop(
            key
        )
    elif change == 3 and isinstance(container, list):
        container.insert(random.randrange(len(container) + 1), copy.deepcopy(container[key]))
    elif change == 4:
        container[key] = random.choice(
            ([container[key]], {"x": container[key]}, str(container[key]), [container[key]] * 2)
        )
    elif change == 5 and isinstance(container[key], str):
        container[key] += random.choice(VALUES[-25:-11])
    elif change == 6 and isinstance(container[key], int | float) and abs(container[key]) < 1e300:
        container[key] = random.choice(
            (-container[key], container[key] * 10**6, container[key] + 1, 0, float(container[key]))
        )
    else:
        container[key] = copy.deepcopy(random.choice(VALUES))
    return value


# ---- YAML ----------------------------------------------------------------------------------------------------------


YAML_PIECES = (
    "\n<<: {a: 1}\n",
    "\n? [1, 2]\n: 3\n",
    "\n? {a: b}\n: 3\n",
    "\ntrain: !!python/object/apply:os.getcwd []\n",
    "\na: &a [1]\nb: *a\n",
    "\nrun: &run {name: *run}\n",
    "\nrun: &run {name: x, dir: *run}\n",
    "\ndata: {train: &x [*x]}\n",
    "\n--- {}\n",
    "\n...\n",
    "\n!!binary a: b\n",
    "\n'': {'': ''}\n",
    "\n%YAML 9.9\n",
    "\ntrain: {epochs: " + "[" * 3000 + "]" * 3000 + "}\n",
    "\nx: " + "{a: " * 3000 + "}" * 3000 + "\n",
    "\na: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "\na: &a {x: 1, y: 2, z: 3}\n"
    + "".join(
        f"{b}: &{b} {{x: *{a}, y: *{a}, z: *{a}, v: *{a}}}\n"
        for a, b in zip("abcdefghijkl", "bcdefghijklm", strict=True)
    ),
)


def mutate_yaml(data: bytes, random: Random) -> bytes:
    """A change of a YAML document: of what it means, of its text, or a piece that few parsers expect."""
    kind = random.random()
    if kind < 0.3:
        return mutate_text(data, random)
    if kind < 0.36:
        place = random.choice((0, len(data)))
        return data[:place] + random.choice(YAML_PIECES).encode() + data[place:]
    try:
        value = yaml.load(data, Loader=yaml.BaseLoader)
        for _ in range(random.choice((1, 1, 2))):
            value = mutate_value(value, random)
        return yaml.safe_dump(value, allow_unicode=random.random() < 0.5, sort_keys=False).encode(
            errors="surrogatepass"
        )
    except (yaml.YAMLError, ValueError, RecursionError, TypeError):
        return mutate_text(data, random)
