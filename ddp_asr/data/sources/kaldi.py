"""Kaldi data directories: `wav.scp` and `text`, optionally `segments`, `utt2spk` and `utt2lang`.

    wav.scp     RECORDING PATH          (without segments RECORDING is the utterance)
    segments    UTTERANCE RECORDING START_S END_S   (an END_S of -1: to the end of the recording)
    text        UTTERANCE TEXT
    utt2spk     UTTERANCE SPEAKER
    utt2lang    UTTERANCE LANGUAGE

Utterances are sorted by id, which is also the key. As in Kaldi a path is relative to the working directory; where there
is no such file, to the data directory. Entries of wav.scp that are no files, as a command that ends in `|`, are
dropped by name: nothing in a file is run.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ddp_asr.data.sources import (
    BAD_LINE,
    MISSING_AUDIO,
    Source,
    SourceOptions,
    Utterance,
    listed_source,
    make_key,
    read_utf8,
)
from ddp_asr.data.sources.manifest import seconds
from ddp_asr.data.sources.table import number
from ddp_asr.errors import UserError

Lines = dict[str, list[str]]  # id -> what follows it, for each of its lines


def try_open(name: str, options: SourceOptions) -> Source | None:
    """A directory with a `wav.scp`."""
    root = Path(name)
    if options.no_text or not (root / "wav.scp").is_file():
        return None
    if not (root / "text").is_file():
        raise UserError(f"{root} has a wav.scp, as Kaldi's data directories, but no file `text`; add its transcripts")
    recordings, texts, segments = (_lines(root / file) for file in ("wav.scp", "text", "segments"))
    speakers, languages = _lines(root / "utt2spk"), _lines(root / "utt2lang")
    if not (is_cut := (root / "segments").is_file()):
        segments = {recording: [""] for recording in recordings}
    utterances = []
    for identity in sorted(texts.keys() | segments.keys()):  # an id of several lines gives several, all but one dropped
        speaker, language = (lines.get(identity, [""])[0] for lines in (speakers, languages))
        for found in _found(root, identity, segments.get(identity, []), recordings, is_cut):
            for text in texts.get(identity, [None]):
                utterances.append(replace(found, text=text, speaker=speaker, language=language))
    return listed_source("kaldi", root.resolve().name, utterances)


def _lines(path: Path) -> Lines:
    """The lines of a file, `id REST`; none if there is no such file."""
    lines: Lines = {}
    for line in read_utf8(path).split("\n") if path.is_file() else ():
        identity, *rest = re.split(r"[ \t]+", line.strip(" \t\r"), maxsplit=1)
        if identity:
            lines.setdefault(identity, []).append("".join(rest))
    return lines


def _found(root: Path, identity: str, segments: list[str], recordings: Lines, is_cut: bool) -> Iterator[Utterance]:
    """The utterance with its audio, for each line that says where it is; one without audio if there is none.

    `is_cut`: recordings are cut by segments; else each is an utterance.
    """
    nothing = Utterance(make_key(identity), identity, None, reason=MISSING_AUDIO)
    if not segments:
        yield nothing
    for segment in segments:
        try:
            recording, offset_s, duration_s = _parse(segment) if is_cut else (identity, None, None)
        except ValueError as error:
            yield replace(nothing, reason=BAD_LINE, detail=f"in segments: {error}")
            continue
        if recording not in recordings:
            yield replace(nothing, detail=f"wav.scp has no {recording}")
        for entry in recordings.get(recording, []):
            found = replace(nothing, source=entry or identity, offset_s=offset_s, duration_s=duration_s)
            if entry.startswith("|") or entry.endswith("|"):
                yield replace(found, detail="a command is never run; write its output into a file")
            elif re.search(r":[0-9]+$", entry):
                yield replace(found, detail="a place in a Kaldi archive is not read; write the audio into a file")
            elif entry:
                yield replace(found, path=Path(entry) if os.path.exists(entry) else root / entry, reason="")
            else:
                yield replace(found, detail="wav.scp has no path for it")


def _parse(segment: str) -> tuple[str, float | None, float | None]:
    """Recording, offset and duration of `RECORDING START_S END_S`."""
    columns = re.split(r"[ \t]+", segment)
    if len(columns) != 3:
        raise ValueError(f"{len(columns) + 1} columns, not 4")
    recording, start, end = columns
    offset_s = seconds("start", number(start))
    if number(end) == -1:
        return recording, offset_s, None
    duration_s = (seconds("end", number(end)) or 0.0) - (offset_s or 0.0)
    if duration_s <= 0:
        raise ValueError(f"end is {end}, which is not after the start")
    return recording, offset_s, duration_s
