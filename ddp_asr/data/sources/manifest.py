"""JSONL manifests as NeMo's: each line has `audio_filepath`, `text`, and what of the following is known.

`id`, `speaker`, `language` or `lang`, `offset`, `duration`.

The utterance is `duration` seconds of the file, starting at `offset`. Without `offset` it starts at 0, without
`duration` it lasts to the end of the file. Manifests carry rounded durations: without `offset`, a file that is at most
0.25 s longer than `duration` is taken whole. A line that states over 0.25 s + 1 % more audio than there is, is dropped
(data/audio.py applies these rules). The key gets `-<offset_ms>` only if the line states an offset, even 0, whether or
not the audio is cut.
"""

import os
from pathlib import Path, PurePosixPath
from typing import Any

from ddp_asr.data.sources import (
    BAD_LINE,
    Source,
    SourceOptions,
    Utterance,
    first_string,
    listed_source,
    make_key,
    parse_json,
    valid_text,
)
from ddp_asr.errors import UserError


def try_open(name: str, options: SourceOptions) -> Source | None:
    """A file named *.jsonl or *.json."""
    manifest = Path(name)
    if options.no_text or not manifest.is_file() or manifest.suffix not in (".jsonl", ".json"):
        return None
    try:
        lines = manifest.read_bytes().decode("utf-8-sig").split("\n")  # Windows writes a byte order mark
    except ValueError:
        raise UserError(f"{manifest} is not UTF-8 text: a manifest has a JSON object on each line, in UTF-8") from None
    utterances = [_utterance(manifest, n, line) for n, line in enumerate(lines, start=1) if line.strip()]
    if all(u.reason == BAD_LINE for u in utterances):
        raise UserError(
            f"{manifest}: no line of it is a manifest line such as "
            '{"audio_filepath": "a.wav", "text": "HELLO"}; write one object a line'
        )
    return listed_source("manifest", manifest.name, utterances)


def _utterance(manifest: Path, number: int, line: str) -> Utterance:
    try:
        entry = _parse(line)
        offset_s, duration_s = (seconds(name, entry.get(name)) for name in ("offset", "duration"))
    except ValueError as error:
        return Utterance(f"line-{number}", f"{manifest.name}:{number}", None, reason=BAD_LINE, detail=str(error))
    audio: str = entry["audio_filepath"]
    text, identity = entry.get("text"), entry.get("id")
    return Utterance(
        key=make_key(relative_stem(audio, manifest.parent) if identity in (None, "") else str(identity), offset_s),
        source=valid_text(audio),
        text=valid_text(text) if isinstance(text, str) else None,
        speaker=first_string(entry, "speaker"),
        language=first_string(entry, "language", "lang"),
        path=manifest.parent / audio,
        offset_s=offset_s,
        duration_s=duration_s,
    )


def _parse(line: str) -> dict[str, Any]:
    entry = parse_json(line)
    if not isinstance(entry, dict):
        raise ValueError("not an object")
    audio = entry.get("audio_filepath")
    if not isinstance(audio, str) or not audio or "\0" in audio:
        raise ValueError("no audio_filepath")
    return entry


def seconds(name: str, value: object) -> float | None:
    """The value that a line states under this name; None where it states none.

    Raises:
        ValueError: it is something else than a number of seconds.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 <= value < 1e9):
        raise ValueError(f"{name} is {value!r}, not a number of seconds")
    if name == "duration" and value == 0:
        raise ValueError("duration is 0; leave it out to take the audio to the end of the file")
    return float(value)


def relative_stem(audio: str, folder: Path) -> str:
    """The path without suffix: relative to the folder if it lies below it, else as given without leading '/'."""
    path = PurePosixPath(os.path.normpath(audio))
    if path.is_absolute():
        below = PurePosixPath(os.path.relpath(path, folder.absolute()))
        path = path.relative_to("/") if below.parts[0] == ".." else below
    return str(path.with_suffix("")) if path.name else audio
