"""A file of transcripts, JSON lines, that grows and is continued: a line for each recording, whole after any end.

    with continued(path, settings) as (append, done): ...

Beside it lies `NAME.settings.json`: what decided the transcripts. A file that was begun with other settings is refused,
because its lines would not belong together. A line goes to the file in one write, so only a kill or a lost machine can
leave a part of one, which the next call removes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ddp_asr.decoding.formats import json_words
from ddp_asr.errors import UserError
from ddp_asr.files import check_writable, parse_json_line, read_json, replace_file, sha256_of
from ddp_asr.recognition.recogniser import Recogniser
from ddp_asr.recognition.transcription import Transcript

DECODER_FILES = ("lm", "lexicon", "hot_words")


def settings_beside(path: Path) -> Path:
    """Where the settings of a file of transcripts lie."""
    return path.with_name(f"{path.name}.settings.json")


def render_json(transcript: Transcript) -> str:
    """A line with one object; `reference` is in it where it is known."""
    fields: dict[str, Any] = {"key": transcript.key, "seconds": round(transcript.seconds, 3), "text": transcript.text}
    if transcript.reference is not None:
        fields["reference"] = transcript.reference
    return json.dumps(fields | {"words": json_words(transcript.words)}, ensure_ascii=False) + "\n"


def settings_of(recogniser: Recogniser, cut: str, piece_seconds: float) -> dict[str, Any]:
    """What decides a transcript, as JSON has it: weights and files of the decoder by their checksums, cuts."""
    digest, decoder = hashlib.sha256(), asdict(recogniser.config.decoder)
    for name, weight in sorted(recogniser.model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.cpu().contiguous().numpy().tobytes())
    settings = {
        "weights": digest.hexdigest(),
        "decoder": decoder,
        "decoder_files": {name: sha256_of(Path(path)) for name in DECODER_FILES if (path := decoder.get(name))},
        "cut": cut,
        "piece_seconds": piece_seconds,
    }
    return dict(json.loads(json.dumps(settings)))


@contextlib.contextmanager
def continued(
    path: Path, settings: dict[str, Any]
) -> Iterator[tuple[Callable[[Transcript], None], dict[str, tuple[str, str | None]]]]:
    """A function that appends a transcript, and of those that are there key -> (text, reference).

    Raises:
        UserError: the file cannot be written, has other lines than transcripts, was begun with other settings, or
            another process is writing it.
    """
    check_writable(path)
    with open(path, "a+b", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {path} is being written by another process: wait, or name another file") from None
        _check_settings(path, settings, is_new=os.fstat(file.fileno()).st_size == 0)
        done, end = _read(path)
        file.truncate(end)

        def append(transcript: Transcript) -> None:
            line = render_json(transcript).encode(errors="backslashreplace")
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        yield append, done


def _check_settings(path: Path, settings: dict[str, Any], is_new: bool) -> None:
    beside = settings_beside(path)
    if is_new:
        replace_file(beside, json.dumps(settings, indent=2) + "\n")
        return
    known = read_json(beside)
    if known is None:
        raise UserError(f"--out {path} is there and {beside.name} is not: it is not a file to continue; name another")
    if differing := [name for name in settings if settings[name] != known.get(name)]:
        each = ", ".join(f"{name} {known.get(name)}, now {settings[name]}" for name in differing)
        raise UserError(
            f"--out {path} was begun with other settings ({each}): give the same ones, or name another file"
        )


def _read(path: Path) -> tuple[dict[str, tuple[str, str | None]], int]:
    """What is done, and where the last whole line ends. What a kill can leave behind it has no line feed."""
    done: dict[str, tuple[str, str | None]] = {}
    end = 0
    with path.open("rb") as file:
        for number, text in enumerate(file, 1):
            if not text.endswith(b"\n"):
                break
            line = parse_json_line(text) or {}
            key, said, reference = line.get("key"), line.get("text"), line.get("reference")
            if not (isinstance(key, str) and isinstance(said, str) and isinstance(reference, str | None)):
                raise UserError(f"--out {path} has no transcript in line {number}: mend it, or name another file")
            done[key] = said, reference
            end += len(text)
    return done, end
