"""WebDataset tars: members that follow each other and have the same name up to its first dot are one sample.

KEY.flac (or .wav, .mp3, .ogg, .opus ...) is its audio, KEY.txt its transcript, KEY.json an object with `speaker`,
`language` and, where there is no KEY.txt, `text`. Other members are not read.

The tars are read in the order of their names, as a stream. The first pass goes from header to header and counts the
samples, the second reads them, so memory holds one of them. No link is followed: a sample that has one in place of its
audio has no audio.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ddp_asr.data.audio import MAX_ARCHIVED_BYTES
from ddp_asr.data.sources import (
    BAD_LINE,
    IMPLAUSIBLE,
    MISSING_AUDIO,
    Source,
    SourceOptions,
    Utterance,
    first_string,
    is_audio,
    make_key,
    parse_json,
    valid_text,
)
from ddp_asr.data.sources.archive import damage_reported, identity_of, members_of, read_text
from ddp_asr.errors import UserError


def try_open(name: str, options: SourceOptions) -> Source | None:
    """A file that ends in .tar, or a directory with such files in it."""
    root = Path(name)
    if options.no_text:
        return None
    if (root / ".partial").is_dir() or ((root / "dataset.json").is_file() and (root / "index.parquet").is_file()):
        raise UserError(
            f"{root} holds shards that this program has made: name it in data.train, and as SOURCE what it was made of"
        )
    tars = sorted(path for path in root.glob("*.tar") if path.is_file() and not path.name.startswith("."))
    if root.is_file() and name.endswith(".tar"):
        tars = [root]
    if not tars:
        return None
    return Source(identity_of("webdataset", root.resolve().name, tars), lambda: _read(tars))


def _read(tars: list[Path]) -> tuple[int, Iterator[Utterance]]:
    total = sum(1 for tar in tars for _ in _samples(tar, read=False))
    return total, (_utterance(key, parts) for tar in tars for key, parts in _samples(tar, read=True))


def _samples(tar: Path, read: bool) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """(key, suffix -> content) of each sample with audio or text; None for audio that is too large for memory."""
    key, parts = "", dict[str, bytes | None]()
    with damage_reported(tar):
        for path, _, file in members_of(tar):
            folder, name = os.path.split(path)
            stem, _, suffix = name.partition(".")
            suffix = suffix.lower()
            if file is None or not stem or not (suffix in ("txt", "json") or is_audio(name)):
                continue
            if os.path.join(folder, stem) != key or suffix in parts:
                if parts:
                    yield key, parts
                key, parts = os.path.join(folder, stem), {}
            if not read:
                parts[suffix] = None
            elif suffix in ("txt", "json"):
                parts[suffix] = read_text(path, file)
            else:
                size = file.seek(0, io.SEEK_END)
                file.seek(0)
                parts[suffix] = file.read() if size <= MAX_ARCHIVED_BYTES else None
        if parts:
            yield key, parts


def _utterance(key: str, parts: dict[str, bytes | None]) -> Utterance:
    audio = [suffix for suffix in parts if suffix not in ("txt", "json")]
    utterance = Utterance(make_key(key), valid_text(f"{key}.{(audio or list(parts))[0]}"), None)
    try:
        described = parse_json(parts.get("json") or b"{}")
    except ValueError as error:
        return replace(utterance, reason=BAD_LINE, detail=f"its .json is {error}")
    entry = described if isinstance(described, dict) else {}
    text = entry.get("text")
    if (content := parts.get("txt")) is not None:
        text = content.decode("utf-8-sig", "replace").strip()
    utterance = replace(
        utterance,
        text=valid_text(text) if isinstance(text, str) else None,
        speaker=first_string(entry, "speaker", "speaker_id"),
        language=first_string(entry, "language", "lang"),
        data=parts[audio[0]] if audio else None,
    )
    if not audio:
        return replace(utterance, reason=MISSING_AUDIO)
    if len(audio) > 1:
        detail = f"several audio files in one sample: {', '.join(audio)}"
        return replace(utterance, data=None, reason=BAD_LINE, detail=detail)
    if utterance.data is None:
        return replace(utterance, reason=IMPLAUSIBLE, detail=f"more than {MAX_ARCHIVED_BYTES:,} bytes")
    return utterance
