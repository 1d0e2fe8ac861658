"""lhotse manifests: `cuts.jsonl.gz`, or recordings and supervisions beside each other; read as JSON, without lhotse.

A cut with one supervision is an utterance, and so is each supervision of recordings. The key is the supervision's id.
The audio is `start` and `duration` of the recording, whose file is taken as it is where they cover it whole. `text`,
`speaker` and `language` are the supervision's. A relative path starts at the manifest, else at the current directory,
as for lhotse.

Recordings are files only. A `command` is never run and a `url` never fetched: what needs them is dropped by name, and
so are cuts that are mixed, padded or have several supervisions, and recordings of several channels or with transforms.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ddp_asr.data.sources import (
    BAD_LINE,
    MISSING_AUDIO,
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

SUFFIXES = (".jsonl", ".jsonl.gz")
MAX_LINE_BYTES = 16 << 20
TOLERANCE_S = 0.01  # by which a supervision may end after its cut, or a cut that is whole before its recording


def try_open(name: str, options: SourceOptions) -> Source | None:
    """A file of cuts, of recordings or of supervisions, or a directory with one set of them."""
    root = Path(name)
    if options.no_text or not root.exists() or not (root.is_dir() or name.endswith(SUFFIXES)):
        return None
    paths = sorted(root.iterdir()) if root.is_dir() else [root]
    kinds = {path: _kind_of(path) for path in paths if path.name.endswith(SUFFIXES) and path.is_file()}
    cuts = [path for path, kind in kinds.items() if kind == "cuts"]
    # Of the two manifests of a set, either names it.
    sets = {_beside(path, "recordings") for path, kind in kinds.items() if kind in ("recordings", "supervisions")}
    if len(cuts) + len(sets) > 1:
        names = ", ".join(path.name for path in (*cuts, *sorted(sets)))
        raise UserError(f"{root} holds several sets of lhotse manifests: {names}; name one of these files")
    if cuts:
        utterances = [_of_cut(cuts[0], number, entry) for number, entry in _entries(cuts[0])]
        return listed_source("lhotse", cuts[0].name, utterances)
    if not sets:
        return None
    (recordings,) = sets
    supervisions = _beside(recordings, "supervisions")
    for path, kind in ((recordings, "recordings"), (supervisions, "supervisions")):
        if not path.is_file() or _kind_of(path) != kind:
            raise UserError(
                f"{root} is half a set of lhotse manifests: {path} is no file of {kind}; put it there, with the "
                "name of the other but for the word"
            )
    return listed_source("lhotse", recordings.name, _of_set(recordings, supervisions))


def _beside(path: Path, kind: str) -> Path:
    other = {"recordings": "supervisions", "supervisions": "recordings"}[kind]
    return path.with_name(path.name.replace(other, kind))


def _kind_of(path: Path) -> str:
    """What the first object of a file is; "" where it is nothing of lhotse's, such as a line of NeMo's."""
    for _, entry in _entries(path):
        if isinstance(entry, dict):
            if "audio_filepath" in entry:
                return ""
            if str(entry.get("type")).endswith("Cut") or {"id", "start", "duration", "supervisions"} <= entry.keys():
                return "cuts"
            if {"id", "sources", "sampling_rate"} <= entry.keys():
                return "recordings"
            return "supervisions" if {"id", "recording_id", "start", "duration"} <= entry.keys() else ""
    return ""


def _entries(path: Path) -> Iterator[tuple[int, Any]]:
    """(number of the line, its value, or the ValueError that it gives instead)."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise UserError(f"{path}: line {number} has over {MAX_LINE_BYTES >> 20} MB; no manifest has such")
                if line.strip():
                    yield number, _value(line)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is damaged or cut short ({error}); write it again with lhotse") from None


def _value(line: bytes) -> Any:
    try:
        return parse_json(line.decode("utf-8-sig"))
    except ValueError as error:
        return error


def _of_set(recordings: Path, supervisions: Path) -> list[Utterance]:
    """The utterances, in the order of the supervisions, then the recordings without any; damaged lines too."""
    audio: dict[str, dict[str, Any]] = {}
    utterances = []
    supervised = set()
    for number, entry in _entries(recordings):
        try:
            audio[_id(entry)] = entry
        except ValueError as error:
            utterances.append(_unusable(recordings, number, error))
    for number, entry in _entries(supervisions):
        try:
            utterance = _supervised(entry, f"{supervisions.name}:{number}")
            recording_id = first_string(entry, "recording_id")
            start_s, duration_s = _seconds(entry, "start"), _seconds(entry, "duration")
        except ValueError as error:
            utterances.append(_unusable(supervisions, number, error))
            continue
        supervised.add(recording_id)
        if recording_id in audio:
            utterance = _with_audio(utterance, supervisions, audio[recording_id], start_s, duration_s, entry)
        else:
            utterance = replace(utterance, reason=MISSING_AUDIO, detail=f"no recording {recording_id}")
        utterances.append(utterance)
    for name, recording in audio.items():
        if name not in supervised:
            utterance = Utterance(make_key(name), valid_text(recordings.name), None)
            utterances.append(_with_audio(utterance, recordings, recording, 0.0, None, recording))
    return utterances


def _of_cut(manifest: Path, number: int, cut: Any) -> Utterance:
    try:
        key = _id(cut)
        place = valid_text(f"{manifest.name}:{number}")
        utterance = Utterance(make_key(key), place, None)
        kind = str(cut.get("type", "MonoCut"))
        if kind != "MonoCut":
            return replace(utterance, reason=BAD_LINE, detail=valid_text(f"a {kind}; a cut must be a MonoCut"))
        supervisions = cut.get("supervisions") or []
        if not isinstance(supervisions, list) or len(supervisions) > 1:
            detail = (
                "several supervisions in a cut; CutSet.trim_to_supervisions(keep_overlapping=False) makes a cut of each"
            )
            return replace(utterance, reason=BAD_LINE, detail=detail)
        start_s, duration_s = _seconds(cut, "start"), _seconds(cut, "duration")
        for supervision in supervisions:
            utterance = _supervised(supervision, place)
            first_s = _seconds(supervision, "start", lowest=-1e9)
            if first_s < -TOLERANCE_S or first_s + _seconds(supervision, "duration") > duration_s + TOLERANCE_S:
                return replace(utterance, reason=BAD_LINE, detail="its supervision is longer than the cut")
    except ValueError as error:
        return _unusable(manifest, number, error)
    return _with_audio(utterance, manifest, cut.get("recording"), start_s, duration_s, cut)


def _supervised(supervision: Any, place: str) -> Utterance:
    text = _object(supervision).get("text")
    return Utterance(
        key=make_key(_id(supervision)),
        source=valid_text(place),
        text=valid_text(text) if isinstance(text, str) else None,
        speaker=first_string(supervision, "speaker"),
        language=first_string(supervision, "language"),
    )


def _with_audio(
    utterance: Utterance, manifest: Path, recording: Any, start_s: float, duration_s: float | None, part: dict[str, Any]
) -> Utterance:
    """The utterance with `duration_s` of the recording, from `start_s` on; `part` names the channel."""
    try:
        path = _path_of(recording, part.get("channel", part.get("channel_ids", 0)))
        whole = start_s == 0 and (duration_s is None or duration_s >= _seconds(recording, "duration") - TOLERANCE_S)
    except _Unavailable as error:
        return replace(utterance, reason=MISSING_AUDIO, detail=valid_text(str(error)))
    except ValueError as error:
        return replace(utterance, reason=BAD_LINE, detail=valid_text(str(error)))
    here = os.path.join(manifest.parent, path)
    return replace(
        utterance,
        source=valid_text(path),
        path=Path(here if os.path.isfile(here) else path),  # unlike Path.is_file, takes a name that no system has
        offset_s=None if whole else start_s,
        duration_s=duration_s,
    )


class _Unavailable(ValueError):
    """A recording that is no file."""


def _path_of(recording: Any, channel: Any) -> str:
    """The one file of a recording."""
    if recording is None:
        raise _Unavailable("no recording")
    sources = _object(recording).get("sources")
    if not isinstance(sources, list) or not sources:
        raise ValueError("its recording has no sources")
    source = _object(sources[0])
    if source.get("type") != "file":
        raise _Unavailable(f"a recording of type {source.get('type')!r}, which is not read; save it as a file")
    channels = source.get("channels")
    if len(sources) > 1 or not isinstance(channels, list) or len(channels) != 1 or channel not in (channels, *channels):
        raise ValueError(f"channel {channel} of a recording with other channels; save it as a file of its own")
    # The audio is resampled in any case, from the rate that the file states.
    transforms = recording.get("transforms") or []
    if not isinstance(transforms, list) or any(_object(each).get("name") != "Resample" for each in transforms):
        raise ValueError(f"its recording has the transforms {transforms}; write the audio with `save_audios`")
    path = source.get("source")
    if not isinstance(path, str) or not path or "\0" in path:
        raise ValueError("its recording has no path")
    return path


def _unusable(manifest: Path, number: int, error: ValueError) -> Utterance:
    place = f"{manifest.name}:{number}"
    return Utterance(make_key(f"{manifest.name}-{number}"), valid_text(place), None, reason=BAD_LINE, detail=str(error))


def _object(entry: Any) -> dict[str, Any]:
    if isinstance(entry, ValueError):
        raise entry
    if not isinstance(entry, dict):
        raise ValueError("not an object")
    return entry


def _id(entry: Any) -> str:
    if not (identity := first_string(_object(entry), "id")):
        raise ValueError("no id")
    return identity


def _seconds(entry: dict[str, Any], name: str, lowest: float = 0.0) -> float:
    value = entry.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not lowest <= value < 1e9:
        raise ValueError(f"{name} is {value!r}, not a number of seconds")
    return float(value)
