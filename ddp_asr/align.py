"""Texts aligned with recordings: `python -m ddp_asr.align RUN SHARDS|AUDIO... --format json|ctm|textgrid|srt|vtt`

checkpoint --> Recogniser    shards, or audio with texts --recognition.alignment--> Aligned, Unaligned --> file, report
"""

from __future__ import annotations

import argparse
import os
import sys
from bisect import insort
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ddp_asr import SAMPLE_RATE_HZ
from ddp_asr.errors import UserError, run_entry_point
from ddp_asr.files import check_writable, open_input, replace_file
from ddp_asr.ranks.environment import before_torch

if TYPE_CHECKING:
    from ddp_asr.decoding.formats import Aligned, Unaligned
    from ddp_asr.recognition.recogniser import Recogniser

    # (row, result) of each utterance as it is done, how many there are, and files that could not be read till then
    Results = tuple[Iterator[tuple[int, Aligned | Unaligned]], int, list[str]]

ONE_FILE_EACH = ("textgrid", "srt", "vtt")
UNALIGNED_SHOWN = 20
LOG_EVERY = 1000  # utterances, where stderr is no terminal and shows no bar

EXAMPLES = """
examples:
  python -m ddp_asr.align runs/an4 shards/an4-dev --suspicious 20          the 20 most doubtful transcripts
  python -m ddp_asr.align runs/an4 shards/an4-dev --format ctm --out an4-dev.ctm
  python -m ddp_asr.align runs/an4 hello.wav --text "hello world"          one recording, as JSON
  python -m ddp_asr.align runs/an4 talk.mp3 --format srt > talk.srt        the text is read from talk.txt
  python -m ddp_asr.align runs/an4 *.flac --format textgrid --out grids    grids/NAME.TextGrid for each
"""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ddp_asr.align",
        description="Find when each word of known texts is said, and how well the texts agree with the recordings.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", help="a checkpoint, or a run directory: its best.pt, else its newest")
    add(
        "inputs",
        nargs="+",
        metavar="SHARDS|AUDIO",
        help="shard directories, aligned as one corpus; or audio files, each with its text in a file of the same name "
        "that ends in .txt",
    )
    add("--text", help="the text of the one audio file")
    add(
        "--format",
        default="json",
        choices=("json", "ctm", *ONE_FILE_EACH),
        help="json (JSON lines, the default) and ctm: all utterances in one file; textgrid, srt and vtt: a file for "
        "each",
    )
    add(
        "--out",
        type=Path,
        help="the file to write, stdout without it; a directory for textgrid, srt and vtt, except for one audio file",
    )
    add(
        "--suspicious",
        type=int,
        default=0,
        metavar="N",
        help="list the N utterances with the lowest scores, whose transcripts may be wrong; "
        "without --out nothing else is printed",
    )
    add(
        "--piece-seconds",
        type=float,
        default=20.0,
        help="longest piece of an audio file that goes through the model at once; longer files are cut in their "
        "pauses and aligned as a whole (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    _check(arguments)
    return arguments


def _check(arguments: argparse.Namespace) -> None:
    from ddp_asr.data.storage import scheme_of

    for name in arguments.inputs:
        if not scheme_of(name) and not Path(name).exists():
            raise UserError(f"there is no {name}: name shard directories or audio files")
    shards = [name for name in arguments.inputs if scheme_of(name) or Path(name).is_dir()]
    if shards and len(shards) < len(arguments.inputs):
        raise UserError(f"{shards[0]} is a shard directory and others are audio files: name one kind at a time")
    arguments.shards = shards
    if arguments.text is not None and (shards or len(arguments.inputs) > 1):
        raise UserError("--text is the text of one audio file: name one, or put a .txt file beside each")
    if not 1 <= arguments.piece_seconds <= 3600:
        raise UserError(f"--piece-seconds must be between 1 and 3600, not {arguments.piece_seconds}")
    if arguments.suspicious < 0:
        raise UserError(f"--suspicious must be 0 or more, not {arguments.suspicious}")
    stems = [Path(name).stem for name in arguments.inputs]
    if not shards and len(set(stems)) < len(stems):
        twice = next(stem for stem in stems if stems.count(stem) > 1)
        raise UserError(
            f"two audio files are named {twice!r}, so their results would be, too: align them one at a time"
        )
    arguments.into_directory = arguments.format in ONE_FILE_EACH and (bool(shards) or len(stems) > 1)
    if arguments.into_directory and arguments.out is None and not arguments.suspicious:
        raise UserError(f"--format {arguments.format} makes a file for each utterance: name a directory with --out")


def main(argv: Sequence[str] | None = None) -> int:
    """0 when all audio was read and something was aligned; a text that does not fit is listed and is no error."""
    arguments = parse_arguments(argv)
    _prepare_out(arguments)
    before_torch(os.environ)
    from rich.console import Console
    from rich.progress import track

    from ddp_asr.decoding.formats import Aligned
    from ddp_asr.recognition.recogniser import load_recogniser

    recogniser = load_recogniser(arguments.checkpoint)
    results, total, failed = (_of_shards if arguments.shards else _of_files)(arguments, recogniser)
    rendered: dict[int, str] = {}  # of each row that is aligned: for all of LibriSpeech less than a GB
    unaligned: dict[int, Unaligned] = {}
    lowest: list[Aligned] = []
    console = Console(stderr=True)
    hidden = not console.is_terminal
    for row, utterance in track(results, "aligning", total, console=console, disable=hidden, transient=True):
        if isinstance(utterance, Aligned):
            rendered[row] = _render(arguments, utterance)
            insort(lowest, utterance, key=lambda aligned: aligned.score)
            del lowest[arguments.suspicious :]
        else:
            unaligned[row] = utterance
        if (done := len(rendered) + len(unaligned)) % LOG_EVERY == 0 and hidden:
            print(f"{done:,} of {total:,} utterances done", file=sys.stderr, flush=True)
    listed = [unaligned[row] for row in sorted(unaligned)]
    _write(arguments, listed, [rendered[row] for row in sorted(rendered)])
    _report(arguments, listed, lowest, len(rendered))
    if not rendered and not failed:
        raise UserError("no utterance could be aligned: look at the reasons above")
    return 2 if failed else 0


def _prepare_out(arguments: argparse.Namespace) -> None:
    """Finds out before the work whether the result can be written."""
    if arguments.out is None:
        return
    if not arguments.into_directory:
        check_writable(arguments.out)
        return
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--out {arguments.out} cannot be made: {error.strerror}; --format {arguments.format} needs a directory"
        ) from None
    check_writable(arguments.out / "NAME")


def _of_shards(arguments: argparse.Namespace, recogniser: Recogniser) -> Results:
    from ddp_asr.data.index import read_index
    from ddp_asr.recognition.alignment import align_corpus

    index = read_index(arguments.shards)
    return align_corpus(recogniser, index), len(index), []


def _of_files(arguments: argparse.Namespace, recogniser: Recogniser) -> Results:
    """As of shards; a file that cannot be read is named, and the others are still aligned."""
    from ddp_asr.recognition.alignment import align_recording
    from ddp_asr.recognition.transcription import read_audio

    failed: list[str] = []

    def results() -> Iterator[tuple[int, Aligned | Unaligned]]:
        for row, source in enumerate(arguments.inputs):
            try:
                text = _read_text(Path(source)) if arguments.text is None else arguments.text
                waveform = read_audio(source)
            except UserError as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
                failed.append(source)
                continue
            longest_samples = int(arguments.piece_seconds * SAMPLE_RATE_HZ)
            yield row, align_recording(recogniser, Path(source).stem, waveform, text, longest_samples)

    return results(), len(arguments.inputs), failed


def _read_text(audio: Path) -> str:
    path = audio.with_suffix(".txt")
    try:
        with open_input(path) as file:
            return file.read().decode("utf-8-sig")  # Windows writes a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(
            f"cannot read {path}: {reason}; the text of {audio} is expected there, or with --text for one audio file"
        ) from None


def _render(arguments: argparse.Namespace, utterance: Aligned) -> str:
    """The utterance in its format; what has a file of its own in a directory is written there at once."""
    from ddp_asr.decoding.formats import OF_MANY, OF_ONE

    if arguments.format in OF_MANY:
        return OF_MANY[arguments.format](utterance)
    render, suffix = OF_ONE[arguments.format]
    if not arguments.into_directory:
        return render(utterance)
    if arguments.out is not None:
        _replace(arguments.out / f"{utterance.key}{suffix}", render(utterance))
    return ""


def _write(arguments: argparse.Namespace, unaligned: Sequence[Unaligned], rendered: Sequence[str]) -> None:
    """The file, or stdout; an utterance that is not aligned is in it where the format can say so, and comes first."""
    from ddp_asr.decoding.formats import OF_MANY

    notes = map(OF_MANY[arguments.format], unaligned) if arguments.format in OF_MANY else ()
    content = "".join([*notes, *rendered])
    if arguments.out is None and not arguments.suspicious:
        sys.stdout.write(content)
    elif arguments.out is not None and not arguments.into_directory and rendered:
        _replace(arguments.out, content)


def _replace(path: Path, content: str) -> None:
    try:
        replace_file(path, content)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; free space or name another --out") from None


def _report(
    arguments: argparse.Namespace, unaligned: Sequence[Unaligned], lowest: Sequence[Aligned], aligned: int
) -> None:
    """What does not fit, then what fits worst; on stderr where the alignments are on stdout."""
    lines = [f"{len(unaligned):,} of {len(unaligned) + aligned:,} utterances are not aligned:"] if unaligned else []
    lines += [f"  {utterance.key}: {utterance.reason}" for utterance in unaligned[:UNALIGNED_SHOWN]]
    if len(unaligned) > UNALIGNED_SHOWN:
        lines.append(f"  and {len(unaligned) - UNALIGNED_SHOWN:,} more")
    if lowest:
        lines.append(f"the {len(lowest):,} utterances with the lowest scores (1: the hypothesis is exactly the text):")
    for utterance in lowest:
        lines += [f"  {utterance.key}: {utterance.score:.2g}", f"    text        {utterance.text}"]
        lines.append(f"    hypothesis  {utterance.hypothesis}")
    if arguments.out is not None and aligned:
        lines.append(f"{arguments.out}: {aligned:,} utterances aligned")
    on_stdout = arguments.out is not None or arguments.suspicious
    for line in lines:
        print(line, file=sys.stdout if on_stdout else sys.stderr)


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
