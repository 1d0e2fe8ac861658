"""A directory of audio files, at any depth, each with its transcript beside it: `a/one.wav` and `a/one.txt` or `.lab`.

A transcript is UTF-8; its lines are joined by spaces. Of `one.txt` and `one.lab` the first counts. The key is the path
without its suffix. The format names no speaker, because a folder may be one or anything else.

Audio without a transcript is listed as such. A transcript without audio is listed only where it must be one: in a
folder that has audio with transcripts, and not under the name of a document, such as README.txt.
"""

import os
from pathlib import Path

from ddp_asr.data.sources import (
    MISSING_AUDIO,
    MISSING_TRANSCRIPT,
    Source,
    SourceOptions,
    Utterance,
    is_audio,
    listed_source,
    make_key,
    valid_text,
)
from ddp_asr.data.sources.librispeech import files_below

TEXT_SUFFIXES = (".txt", ".lab")  # the first that is there counts
MAX_TEXT_BYTES = 1 << 20
DOCUMENTS = ("readme", "license", "licence", "copying", "notice", "changelog", "metadata", "speakers", "transcripts")


def try_open(name: str, options: SourceOptions) -> Source | None:
    """A directory in which at least one audio file has a transcript beside it."""
    if options.no_text:
        return None
    root = Path(name)
    audio: list[Path] = []
    texts: dict[str, dict[str, Path]] = {}  # path without suffix -> suffix -> the transcript
    for path in files_below(root):
        stem, suffix = os.path.splitext(path)
        if is_audio(path.name):
            audio.append(path)
        elif suffix.lower() in TEXT_SUFFIXES and not path.name.startswith("._"):
            texts.setdefault(stem, {}).setdefault(suffix.lower(), path)
    stems = {os.path.splitext(path)[0] for path in audio}
    if not stems & texts.keys():
        return None
    folders = {os.path.dirname(stem) for stem in stems & texts.keys()}
    alone = sorted(stem for stem in texts.keys() - stems if os.path.dirname(stem) in folders and not _is_document(stem))
    utterances = [_utterance(root, path, texts.get(os.path.splitext(path)[0], {})) for path in sorted(audio)]
    utterances += [_utterance(root, None, texts[stem]) for stem in alone]
    return listed_source("folder", root.resolve().name, utterances)


def _utterance(root: Path, audio: Path | None, texts: dict[str, Path]) -> Utterance:
    """The utterance of an audio file, or of a transcript that has none."""
    transcript = next((texts[suffix] for suffix in TEXT_SUFFIXES if suffix in texts), None)
    path = str((audio or transcript or root).relative_to(root))
    text, detail = _read_text(transcript) if transcript else (None, "")
    reason = MISSING_AUDIO if audio is None else MISSING_TRANSCRIPT if detail else ""
    key = make_key(os.path.splitext(path)[0])
    return Utterance(key, valid_text(path), text, path=audio, reason=reason, detail=valid_text(detail))


def _is_document(stem: str) -> bool:
    return os.path.basename(stem).lower().startswith(DOCUMENTS)


def _read_text(path: Path) -> tuple[str | None, str]:
    """The lines of a transcript, joined by spaces; or None, and why it cannot be read as text."""
    with path.open("rb") as file:
        content = file.read(MAX_TEXT_BYTES + 1)
    if len(content) > MAX_TEXT_BYTES:
        return None, f"{path.name} has more than {MAX_TEXT_BYTES >> 20} MB"
    try:
        text = content.decode("utf-8-sig")  # Windows writes a byte order mark
    except ValueError:
        return None, f"{path.name} is not UTF-8"
    if "\0" in text:
        return None, f"{path.name} is not UTF-8 text, since it has NUL bytes"
    lines = (line.strip() for line in text.replace("\r", "\n").split("\n"))
    return " ".join(line for line in lines if line), ""
