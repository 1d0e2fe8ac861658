"""Formats of audio with transcripts: a SOURCE named on the command line -> its `Utterance`s, always in the same order.

    source = open_source("train-clean-100", SourceOptions(cache=Path("data")))
    total, utterances = source.open()

Each format is one module of this package and one line in `FORMATS`. The module defines

    def try_open(name: str, options: SourceOptions) -> Source | None

which returns None where `name` is not in its format, and raises `UserError` where it is but cannot be read. What the
tests demand of every format: the order and the content of the utterances depend on the source alone; an utterance
without usable audio or text is yielded too, so that it is counted and listed; `identity` is known before anything is
downloaded and decoded, does not depend on where the source lies, and changes when its content changes.
"""

from __future__ import annotations

import collections
import hashlib
import importlib
import json
import os
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddp_asr.errors import UserError, counted

FORMATS = {  # module -> what it reads; tried in this order
    "librispeech": "a LibriSpeech directory (audio files beside *.trans.txt)",
    "archive": "a LibriSpeech archive from OpenSLR (.tar.gz)",
    "kaldi": "a Kaldi data directory (wav.scp, text, optionally segments)",
    "folder": "a directory of audio files, each with a .txt or .lab of the same name beside it",
    "lhotse": "lhotse manifests (cuts.jsonl.gz, or recordings.jsonl.gz with supervisions.jsonl.gz)",
    "manifest": "a JSONL manifest as NeMo's, named *.jsonl or *.json (audio_filepath, text)",
    "table": "a table with a header, named *.csv or *.tsv (Common Voice, DeepSpeech, others by --columns)",
    "webdataset": "WebDataset tars, one or a directory of them (*.tar: KEY.flac, .wav ... beside KEY.txt or KEY.json)",
    "huggingface": "a Hugging Face dataset on disk (save_to_disk, or *.parquet, with a column audio)",
    "openslr": "the name of a LibriSpeech split (dev-clean, dev-other, test-clean, test-other, train-clean-100, "
    "train-clean-360, train-other-500) or of noises or room responses (musan-noise, musan-music, musan-speech, "
    "pointsource-noises, simulated-rirs)",
    "recordings": "with --no-text, a directory or an archive (.tar.gz, .zip) of audio files",
}

MISSING_TRANSCRIPT = "missing transcript"
EMPTY_TRANSCRIPT = "empty transcript"
MISSING_AUDIO = "missing audio"
BAD_AUDIO = "undecodable or truncated audio"
IMPLAUSIBLE = "implausible audio"
TOO_LONG = "too long"
DUPLICATE = "duplicate key"
BAD_LINE = "unusable entry"
REASONS = (
    MISSING_TRANSCRIPT,
    EMPTY_TRANSCRIPT,
    MISSING_AUDIO,
    BAD_AUDIO,
    IMPLAUSIBLE,
    TOO_LONG,
    DUPLICATE,
    BAD_LINE,
)

AUDIO_SUFFIXES = (".flac", ".wav", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".w64", ".caf")


@dataclass(frozen=True)
class Utterance:
    """What a source knows about one utterance; `reason` is set if it is already known to be unusable."""

    key: str
    source: str  # path or archive member, relative to the source: shown to users
    text: str | None
    speaker: str = ""
    language: str = ""  # as the source names it, "en" or "English"; "": unknown
    path: Path | None = None
    data: bytes | None = None  # the audio file's content, where it comes from an archive
    offset_s: float | None = None  # where the utterance starts in the file; None: at the start of the file
    duration_s: float | None = None  # counted from there; None: to the end of the file
    has_text: bool = True  # False: a noise or a room response, of which no transcript is missed
    reason: str = ""  # one of REASONS
    detail: str = ""


@dataclass(frozen=True)
class Source:
    """A source that has been found but not read yet."""

    identity: dict[str, str]  # kind, name and digest; equal kind and digest mean equal utterances
    open: Callable[[], tuple[int, Iterator[Utterance]]]  # how many there are, and they one by one


@dataclass(frozen=True)
class SourceOptions:
    """Options of the command line that some formats read."""

    cache: Path = Path("data")  # where downloaded archives are kept
    openslr_url: str = ""  # directory of the archives; "": that of OpenSLR
    no_text: bool = False  # the source is audio without transcripts
    columns: str = ""  # of a table, such as "audio=path,text=sentence"


def open_source(name: str, options: SourceOptions) -> Source:
    """The source that the user named, by the first format that recognises it."""
    if source := find_source(name, options):
        return source
    formats = ", or ".join(re.sub(r" \([^)]*\)", "", meaning) for meaning in FORMATS.values())
    raise UserError(
        f"no such source: {name} {_seen_at(Path(name))}; a source is {formats}: "
        "ddp-asr shard --help has their files and names"
    )


def find_source(name: str, options: SourceOptions) -> Source | None:
    """The same; None where no format does."""
    try:
        for module in FORMATS:
            source: Source | None = importlib.import_module(f"{__name__}.{module}").try_open(name, options)
            if source is None:
                continue
            if options.columns and module != "table":
                raise UserError(f"--columns names columns of a table, and {name} is {FORMATS[module]}; leave it out")
            return source
    except OSError as error:
        raise UserError(f"{error.filename or name} cannot be read: {error.strerror or error}") from None
    return None


def _seen_at(path: Path) -> str:
    """What lies at a path that is in no known format."""
    from ddp_asr.data.sources.librispeech import files_below  # imports this module

    if path.is_dir():
        names = [str(file.relative_to(path)) for file in files_below(path)]
        suffixes = collections.Counter(os.path.splitext(name)[1] or "without suffix" for name in names).most_common(4)
        seen = ", ".join(f"{count:,} {suffix}" for suffix, count in suffixes)
        examples = f" ({seen}), such as {' and '.join(sorted(names)[:2])}" if names else ""
        return f"is in no known format, a directory with {counted(len(names), 'file')}{examples}"
    if path.is_file():
        with path.open("rb") as file:
            first = file.read(40)
        is_text = first and all(byte >= 32 or byte in b"\t\n\r" for byte in first)
        begins = f"the text {first.decode(errors='replace')!r}" if is_text else f"the bytes {first[:8].hex(' ')}"
        return f"is in no known format, a file that {f'begins with {begins}' if first else 'is empty'}"
    return "is neither a file nor a directory"


# ---- for the formats ------------------------------------------------------------------------------------------------


def make_key(identity: str, offset_s: float | None = None) -> str:
    """The key: a source's id or relative path without suffix, then `-<offset_ms>` if the source states an offset.

    '.', '/', space and control characters become '_', since WebDataset cuts a key at its first dot. So do lone
    surrogates, which Python makes of a file name that is not UTF-8, since no format can hold them. The length of the
    audio is no part of the key, because a source is listed without opening its audio.
    """
    key = "".join("_" if c in "./ " or unicodedata.category(c) in ("Cc", "Cs") else c for c in identity)
    return key if offset_s is None else f"{key}-{round(offset_s * 1000)}"


def valid_text(text: str) -> str:
    """The text with lone surrogates (from JSON escapes and file names) replaced, so that every format can hold it."""
    return text.encode("utf-8", "replace").decode("utf-8")


def read_utf8(path: Path) -> str:
    """The text of a file of the user's, with its line ends and without a byte order mark, which Windows writes.

    Raises:
        UserError: it is in another encoding, or no text.
    """
    content = path.read_bytes()
    try:
        if b"\0" not in content:  # UTF-16 has them, which would else pass
            return content.decode("utf-8-sig")
    except ValueError:
        pass
    raise UserError(f"{path} is not UTF-8 text; save it as UTF-8, or convert it, as with iconv -t UTF-8")


def is_audio(name: str) -> bool:
    """Whether a file's name has an audio suffix. `._*` are AppleDouble files, which a Mac's tar adds to each file."""
    return name.lower().endswith(AUDIO_SUFFIXES) and not name.startswith("._")


def parse_json(content: str | bytes) -> Any:
    """The value; ValueError for whatever is not JSON, and for what is nested too deep."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None


def first_string(entry: Mapping[str, Any], *names: str) -> str:
    """The value of the first of the fields that is a string or a whole number; "" where none is."""
    values = (entry.get(name) for name in names)
    return next((valid_text(str(v)) for v in values if isinstance(v, str | int) and not isinstance(v, bool)), "")


def listed_source(kind: str, name: str, utterances: list[Utterance]) -> Source:
    """A source whose utterances are known in advance; its digest covers the list with texts and file sizes."""
    digest = hashlib.sha256()
    for u in utterances:
        try:
            size = u.path.stat().st_size if u.path else -1
        except (OSError, ValueError):  # ValueError: no file system has such a name
            size = -1
        fields = [u.key, u.source, u.text, u.speaker, u.offset_s, u.duration_s, size]
        fields += [u.language] if u.language else []  # shards of a source without languages keep their digest
        digest.update(json.dumps(fields).encode())
    identity = {"kind": kind, "name": valid_text(name), "digest": digest.hexdigest()}
    return Source(identity, lambda: (len(utterances), iter(utterances)))
