"""Error rates as one HTML file that needs no server and no network, with the recordings beside it.

    utterances, systems --page_data--> numbers and texts as JSON --render--> DIR/index.html, from report.html
    index --copy_audio--> DIR/audio/*.flac, the shards' own bytes

A system is a recogniser whose hypotheses are shown: one in `evaluate --report`, two in `compare --report`. The page
draws what is in its JSON: it divides errors by words, and neither aligns nor resamples.
"""

from __future__ import annotations

import datetime
import html
import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ddp_asr.data.index import Index
from ddp_asr.data.storage import Shards
from ddp_asr.errors import UserError
from ddp_asr.files import finite, replace_file
from ddp_asr.text.score import Counts, Interval, Units, align_words

AUDIO = ("none", "worst", "all")
WORST_BYTES = 100_000_000  # of recordings that a report has unasked
MOST_SPEAKERS, MOST_CONFUSIONS = 100, 40  # listed
LENGTHS_S = (1, 2, 3, 5, 8, 12, 16, 20, 30)
SNRS_DB = (5, 10, 15, 20, 25, 30, 35, 40, 45, 50)
MARK = b'<meta name="generator" content="ddp_asr report">'
Group = dict[str, Any]


@dataclass(frozen=True)
class System:
    """The result of one recogniser on all utterances."""

    name: str
    hypotheses: Sequence[str]
    each: np.ndarray  # int64 (N, 8)
    wer_interval: Interval
    cer_interval: Interval

    @property
    def counts(self) -> Counts:
        return Counts.from_array(self.each.sum(axis=0))


@dataclass(frozen=True)
class Utterance:
    """What is the same for all recognisers."""

    key: str
    reference: str
    speaker: str
    seconds: float
    snr_db: float  # not a number where it is unknown, as seconds may be


def check_directory(directory: Path) -> None:
    """Makes the directory of a report, before the long work; raises UserError where none can be made."""
    page = directory / "index.html"
    try:
        (directory / "audio").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
        if page.exists() and MARK not in page.read_bytes()[:2_000]:
            raise UserError(
                f"--report {directory} holds an index.html that is no report of ours; name another directory"
            )
    except OSError as error:
        raise UserError(f"--report {directory} cannot be written: {error.strerror}; name another directory") from None


def page_data(
    title: str,
    facts: Sequence[tuple[str, str]],
    utterances: Sequence[Utterance],
    systems: Sequence[System],
    units: Units,
    audio: Mapping[str, str],
    comparison: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All that the page shows. `audio` is a path for the key of each utterance whose recording lies beside the page."""
    references = [" ".join(u.reference.split()) for u in utterances]
    aligned = [[align_words(r, h) for r, h in zip(references, s.hypotheses, strict=True)] for s in systems]
    errors = np.stack([s.each[:, 0:3].sum(axis=1) for s in systems])  # (systems, N)
    words = systems[0].each[:, 3]
    by = {
        "speaker": _by_speaker([u.speaker for u in utterances], errors, words),
        "length": _by_bin([u.seconds for u in utterances], LENGTHS_S, "s", errors, words),
        "noise": _by_bin([u.snr_db for u in utterances], SNRS_DB, "dB", errors, words),
    }
    return {
        "title": title,
        "facts": [*facts, ("date", f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M %Z}")],
        "units": {"kind": units.kind, "number": units.number},
        "systems": [_numbers(system) for system in systems],
        "comparison": comparison,
        "speakers": len({u.speaker for u in utterances} - {""}),
        "groups": by,
        "confusions": _confusions(aligned),
        "utterances": [
            {
                "key": u.key,
                "speaker": u.speaker,
                "seconds": finite(round(u.seconds, 2)),
                "snr": finite(round(u.snr_db, 1)),
                "audio": audio.get(u.key),
                "reference": references[row],
                "hypotheses": [" ".join(s.hypotheses[row].split()) for s in systems],
                "alignments": [_run_lengths(of_system[row]) for of_system in aligned],
                "errors": errors[:, row].tolist(),
                "char_errors": [int(s.each[row, 4:7].sum()) for s in systems],
            }
            for row, u in enumerate(utterances)
        ],
    }


def render(data: Mapping[str, Any]) -> str:
    """The page, with its data as JSON that no text in it can end."""
    template = files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    # In a <script>, only "<" can begin what ends it; everything beyond ASCII is escaped as well.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    title, end = template.partition("__DATA__")[::2]
    return title.replace("__TITLE__", html.escape(str(data["title"]).encode(errors="replace").decode())) + text + end


def write(directory: Path, data: Mapping[str, Any]) -> Path:
    """Writes the page into a directory that `check_directory` has made."""
    path = directory / "index.html"
    try:
        replace_file(path, render(data))
    except OSError as error:
        raise UserError(f"--report {directory} cannot be written: {error.strerror}; free space") from None
    return path


def copy_audio(index: Index, rows: Sequence[int], directory: Path, which: str) -> dict[str, str]:
    """Copies recordings into directory/audio in the order of `rows`: {key: path relative to the page}.

    "worst" ends at WORST_BYTES. Recordings of an earlier report in the same directory are removed, and nothing is
    where there was none.
    """
    if (directory / "index.html").exists():  # which is ours: see check_directory
        for old in (directory / "audio").iterdir():
            if re.fullmatch(r"\d{6}-[A-Za-z0-9_-]{1,80}\.flac", old.name):
                old.unlink()
    shards, copied, total = Shards(index.shards), {}, 0
    for row in rows if which != "none" else ():
        total += int(index.bytes[row])
        if which == "worst" and total > WORST_BYTES:
            break
        key = index.key(row)
        # An index is somebody's file: no key of it becomes a path. ASCII needs no escape in a URL.
        name = f"audio/{row:06d}-{re.sub(r'[^A-Za-z0-9_-]', '_', key)[:80]}.flac"
        recording = shards.read(int(index.shard[row]), int(index.offset[row]), int(index.bytes[row]))
        try:
            (directory / name).write_bytes(recording)
        except OSError as error:
            raise UserError(
                f"--report {directory} cannot be written: {error.strerror}; free space, or use --report-audio none"
            ) from None
        copied[key] = name
    return copied


def worst_first(systems: Sequence[System]) -> list[int]:
    """Row numbers as the page shows them: where hypotheses differ, then by the errors of all systems together."""
    total = np.sum([system.each for system in systems], axis=0)
    same = [len(set(hypotheses)) == 1 for hypotheses in zip(*(s.hypotheses for s in systems), strict=True)]
    same = same if len(systems) > 1 else [True] * len(total)
    order = np.lexsort((-total[:, 4:7].sum(axis=1), -total[:, 0:3].sum(axis=1), same))
    return [int(row) for row in order]


def _numbers(system: System) -> dict[str, Any]:
    counts = system.counts
    return {
        "name": system.name,
        "wer": finite(counts.wer),
        "wer_interval": [system.wer_interval.low, system.wer_interval.high],
        "cer": finite(counts.cer),
        "cer_interval": [system.cer_interval.low, system.cer_interval.high],
        **asdict(counts),
    }


def _run_lengths(aligned: list[tuple[str, str, str]]) -> str:
    """ "3=1s2d" for three right words, a substituted one and two deleted ones."""
    return "".join(f"{len(list(run))}{kind}" for kind, run in groupby(kind for kind, _, _ in aligned))


def _group(name: str, rows: Sequence[int], errors: np.ndarray, words: np.ndarray) -> Group:
    chosen = np.asarray(rows, dtype=np.int64)
    counts = {"words": int(words[chosen].sum()), "errors": errors[:, chosen].sum(axis=1).tolist()}
    return {"name": name, "rows": list(rows), **counts}


def _by_speaker(speakers: Sequence[str], errors: np.ndarray, words: np.ndarray) -> list[Group]:
    """The speakers with the most errors, the highest rate first."""
    rows_of: dict[str, list[int]] = {}
    for row, speaker in enumerate(speakers):
        rows_of.setdefault(speaker, []).append(row)
    if not set(rows_of) - {""}:
        return []
    groups = [_group(name or "(unknown)", rows, errors, words) for name, rows in rows_of.items()]
    groups = sorted(groups, key=lambda group: -sum(group["errors"]))[:MOST_SPEAKERS]
    return sorted(groups, key=lambda group: -sum(group["errors"]) / max(group["words"], 1))


def _by_bin(
    values: Sequence[float], edges: Sequence[int], unit: str, errors: np.ndarray, words: np.ndarray
) -> list[Group]:
    known = [row for row, value in enumerate(values) if not math.isnan(value)]
    at = np.digitize([values[row] for row in known], edges)
    names = [
        f"under {edges[0]} {unit}",
        *(f"{a} to {b} {unit}" for a, b in pairwise(edges)),
        f"over {edges[-1]} {unit}",
    ]
    groups = ((name, [row for row, b in zip(known, at, strict=True) if b == n]) for n, name in enumerate(names))
    return [_group(name, rows, errors, words) for name, rows in groups if rows]


def _confusions(aligned: Sequence[Sequence[list[tuple[str, str, str]]]]) -> list[dict[str, Any]]:
    """The most frequent errors of each kind: which word for which, how often in each system, and in which rows."""
    found: dict[tuple[str, str, str], tuple[list[int], dict[int, None]]] = {}
    for number, of_system in enumerate(aligned):
        for row, words in enumerate(of_system):
            for error in words:
                if error[0] != "=":
                    counts, rows = found.setdefault(error, ([0] * len(aligned), {}))
                    counts[number] += 1
                    rows[row] = None
    ranked = sorted(found.items(), key=lambda item: (-sum(item[1][0]), item[0]))
    return [
        {"kind": kind, "reference": said, "hypothesis": heard, "counts": counts, "rows": sorted(rows)}
        for wanted in "sdi"
        for (kind, said, heard), (counts, rows) in [item for item in ranked if item[0][0] == wanted][:MOST_CONFUSIONS]
    ]
