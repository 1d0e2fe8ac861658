"""LibriSpeech directories: `speaker/chapter/*.flac` beside `speaker-chapter.trans.txt`, at any depth.

`list_librispeech` makes the utterances from the names of all files and the contents of the transcripts. Archives use
it too (archive.py), so a directory and an archive of the same files give the same utterances.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath

from ddp_asr.data.sources import (
    DUPLICATE,
    MISSING_AUDIO,
    Source,
    SourceOptions,
    Utterance,
    is_audio,
    listed_source,
    make_key,
    valid_text,
)


def try_open(name: str, options: SourceOptions) -> Source | None:
    """A directory with a `.trans.txt` in it or below."""
    if options.no_text:
        return None
    root = Path(name)
    audio: list[str] = []
    transcripts: dict[str, bytes] = {}
    for path in files_below(root):
        if is_audio(path.name):
            audio.append(str(path.relative_to(root)))
        elif is_transcript(path.name):
            transcripts[str(path.relative_to(root))] = path.read_bytes()
    if not transcripts:
        return None
    listed = list_librispeech(audio, transcripts)
    utterances = [u if u.reason == MISSING_AUDIO else replace(u, path=root / path) for path, u in listed]
    return listed_source("directory", root.resolve().name, utterances)


def files_below(root: Path) -> Iterator[Path]:
    """Every file below `root`, links followed; of several paths to a directory one is listed, one without a link first.

    So a link to a directory above itself ends, and no file is a duplicate of itself. A link that leads nowhere is no
    file, nor is a pipe.
    """

    def unreadable(error: OSError) -> None:
        raise error  # without this, os.walk skips a directory that it cannot read

    seen: set[str] = set()
    waiting = [root] if root.is_dir() else []
    for start in waiting:  # grows by the links that are met
        for folder, folders, files in os.walk(start, onerror=unreadable):
            folders.sort()
            real = os.path.realpath(folder)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            waiting += [path for name in folders if (path := Path(folder, name)).is_symlink()]
            yield from (path for name in sorted(files) if (path := Path(folder, name)).is_file())


def list_librispeech(audio: Iterable[str], transcripts: dict[str, bytes]) -> list[tuple[str, Utterance]]:
    """(path, utterance) from the paths of all audio files and the contents of all `.trans.txt`, sorted by folder.

    The order of the arguments has no effect. An audio file takes its text from any transcript in its own folder; if
    two of them contain it, the last by name counts. If several audio files with a text have the same key, the first
    path is the utterance and the others are duplicates, even if the first turns out to be undecodable.
    """
    texts: dict[str, dict[str, str]] = {}  # folder -> id -> text
    for path in sorted(transcripts):
        texts.setdefault(os.path.dirname(path), {}).update(read_transcripts(transcripts[path]))
    stems: dict[str, list[tuple[str, str]]] = {}  # folder -> (path, id) of its audio
    for path in sorted(audio):
        stems.setdefault(os.path.dirname(path), []).append((path, os.path.splitext(os.path.basename(path))[0]))
    listed: list[tuple[str, Utterance]] = []
    first_paths: dict[str, str] = {}  # key -> path
    for folder in sorted(texts.keys() | stems.keys(), key=lambda folder: PurePosixPath(folder).parts):
        missing = texts.get(folder, {}).copy()
        for path, stem in stems.get(folder, []):
            missing.pop(stem, None)
            utterance = _utterance(stem, path, texts.get(folder, {}).get(stem))
            if utterance.text and utterance.text.strip():
                first = first_paths.setdefault(utterance.key, path)
                if first != path:
                    utterance = replace(utterance, reason=DUPLICATE, detail=f"same key as {valid_text(first)}")
            listed.append((path, utterance))
        for stem in sorted(missing):
            path = os.path.join(folder, stem)
            listed.append((path, replace(_utterance(stem, path, missing[stem]), reason=MISSING_AUDIO)))
    return listed


def is_transcript(name: str) -> bool:
    """Whether a file's name is that of a chapter's transcripts, and not of its AppleDouble file."""
    return name.endswith(".trans.txt") and not name.startswith("._")


def read_transcripts(content: bytes) -> dict[str, str]:
    """The lines `id TEXT` of a `.trans.txt`. Not splitlines(), which also cuts at characters inside a text."""
    lines = content.decode("utf-8-sig", "replace").split("\n")  # Windows writes a byte order mark
    pairs = (line.strip().partition(" ") for line in lines if line.strip())
    return {identity: text for identity, _, text in pairs}


def _utterance(identity: str, path: str, text: str | None) -> Utterance:
    return Utterance(make_key(identity), valid_text(path), text, speaker=valid_text(identity.split("-")[0]))
