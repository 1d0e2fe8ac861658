"""Words with their times as text that other programs read: CTM, Praat's TextGrid, JSON lines, SRT and WebVTT subtitles.

    an aligned or transcribed utterance: key, seconds, words with start, end and confidence  --render-->  text

A CTM or JSON lines file holds many utterances one after the other. A TextGrid or a file of subtitles holds one.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ddp_asr.decoding.protocol import Word

CUE_CHARACTERS = 42  # the usual length of a line of subtitles
CUE_PAUSE_S = 0.5  # a longer pause ends a subtitle


class Timed(Protocol):
    """What can be rendered: an utterance and its words."""

    @property
    def key(self) -> str: ...
    @property
    def seconds(self) -> float: ...
    @property
    def words(self) -> list[Word]: ...


@dataclass(frozen=True)
class Aligned:
    """An utterance whose text is aligned with its recording."""

    key: str
    seconds: float
    text: str
    """As it was aligned, normalised."""
    hypothesis: str
    """What the most probable path says, whatever the text is."""
    score: float
    words: list[Word]


@dataclass(frozen=True)
class Unaligned:
    """An utterance whose text does not fit its recording, and why."""

    key: str
    text: str
    reason: str


def render_jsonl(utterance: Aligned | Unaligned) -> str:
    """A line with one object; an utterance without an alignment has a `reason` in it and no `words`."""
    fields: dict[str, Any] = {"key": utterance.key, "text": utterance.text}
    if isinstance(utterance, Unaligned):
        fields["reason"] = utterance.reason
    else:
        fields |= {"seconds": round(utterance.seconds, 3), "score": float(f"{utterance.score:.3g}")}
        fields["words"] = json_words(utterance.words)
    return json.dumps(fields, ensure_ascii=False) + "\n"


def json_words(words: list[Word]) -> list[dict[str, Any]]:
    return [
        {
            "word": word.text,
            "start_s": round(word.start_s, 3),
            "end_s": round(word.end_s, 3),
            "confidence": round(word.confidence, 4),
        }
        for word in words
    ]


def render_ctm(utterance: Timed | Unaligned) -> str:
    """NIST's columns, a line for each word: key, channel, start, duration, word, confidence; `;;` is a comment."""
    key = "_".join(utterance.key.split())  # spaces part columns
    if isinstance(utterance, Unaligned):
        return f";; {key} is not aligned: {utterance.reason}\n"
    return "".join(
        f"{key} 1 {w.start_s:.3f} {w.end_s - w.start_s:.3f} {w.text} {w.confidence:.3f}\n" for w in utterance.words
    )


def render_textgrid(utterance: Timed) -> str:
    """Praat's long text format with one tier, `words`; intervals between words have no text."""
    intervals: list[tuple[float, float, str]] = []
    at_s = 0.0
    for word in utterance.words:
        if word.start_s > at_s:
            intervals.append((at_s, word.start_s, ""))
        intervals.append((word.start_s, word.end_s, word.text))
        at_s = word.end_s
    if at_s < utterance.seconds:
        intervals.append((at_s, utterance.seconds, ""))
    end = f"{utterance.seconds:.6f}"
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", "xmin = 0", f"xmax = {end}"]
    lines += ["tiers? <exists>", "size = 1", "item []:", "    item [1]:", '        class = "IntervalTier"']
    lines += ['        name = "words"', "        xmin = 0", f"        xmax = {end}"]
    lines.append(f"        intervals: size = {len(intervals)}")
    for number, (start_s, end_s, text) in enumerate(intervals, 1):
        quoted = text.replace('"', '""')
        lines += [f"        intervals [{number}]:", f"            xmin = {start_s:.6f}"]
        lines += [f"            xmax = {end_s:.6f}", f'            text = "{quoted}"']
    return "\n".join(lines) + "\n"


def render_srt(utterance: Timed) -> str:
    """Subtitles of one line of at most 42 characters; a pause of more than half a second ends one, too."""
    return "".join(
        f"{number}\n{_clock(cue[0].start_s, ',')} --> {_clock(cue[-1].end_s, ',')}\n{' '.join(w.text for w in cue)}\n\n"
        for number, cue in enumerate(_cues(utterance.words), 1)
    )


def render_vtt(utterance: Timed) -> str:
    """The same subtitles as WebVTT, which web browsers show."""
    return "WEBVTT\n\n" + "".join(
        f"{_clock(cue[0].start_s, '.')} --> {_clock(cue[-1].end_s, '.')}\n"
        f"{html.escape(' '.join(w.text for w in cue), quote=False)}\n\n"
        for cue in _cues(utterance.words)
    )


def _cues(words: list[Word]) -> list[list[Word]]:
    cues: list[list[Word]] = []
    for word in words:
        fits = cues and len(" ".join(w.text for w in [*cues[-1], word])) <= CUE_CHARACTERS
        if fits and word.start_s - cues[-1][-1].end_s <= CUE_PAUSE_S:
            cues[-1].append(word)
        else:
            cues.append([word])
    return cues


def _clock(time_s: float, point: str) -> str:
    minutes, milliseconds = divmod(round(time_s * 1000), 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{milliseconds // 1000:02d}{point}{milliseconds % 1000:03d}"


# Formats of alignments whose files hold any number of utterances, and all formats whose files hold one, with the suffix
# of their files.
OF_MANY: dict[str, Callable[[Aligned | Unaligned], str]] = {"json": render_jsonl, "ctm": render_ctm}
OF_ONE: dict[str, tuple[Callable[[Timed], str], str]] = {
    "textgrid": (render_textgrid, ".TextGrid"),
    "srt": (render_srt, ".srt"),
    "vtt": (render_vtt, ".vtt"),
}
