"""Recordings to text: `python -m ddp_asr.transcribe RUN INPUT...`

files, folders, sources, shards --recognition.inputs--> recordings --recognition.transcription--> transcripts
--> stdout, a file of JSON lines that a second call continues, or a file for each; error rates where texts are known
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddp_asr import SAMPLE_RATE_HZ
from ddp_asr.errors import UserError, counted, run_entry_point
from ddp_asr.files import check_writable, replace_file, writing_aside
from ddp_asr.ranks.environment import before_torch

if TYPE_CHECKING:
    from ddp_asr.recognition.inputs import Input
    from ddp_asr.recognition.recogniser import Recogniser
    from ddp_asr.recognition.transcription import Cut, Recording, Transcript

    Write = Callable[[Transcript], object]
    Done = dict[str, tuple[str, str | None]]

ONE_FILE_EACH = ("textgrid", "srt", "vtt")
_CONTROL = re.compile(r"[\x00-\x1f]")
_LONGEST_NAME = 200  # bytes of a file's name, of 255, because it is written under a longer one first

EXAMPLES = """
examples:
  python -m ddp_asr.transcribe runs/an4 hello.wav                      text
  python -m ddp_asr.transcribe runs/an4 *.flac                         KEY<tab>text, a line a file
  python -m ddp_asr.transcribe runs/an4 recordings --out said.jsonl    a folder, with the time of every word; the same
                                                                       command continues after Ctrl-C or a kill
  python -m ddp_asr.transcribe runs/an4 talk.mp3 --format srt > talk.srt
  python -m ddp_asr.transcribe runs/an4 talks --format vtt --out subtitles --cut voice
  python -m ddp_asr.transcribe runs/an4 mine.jsonl shards/an4-dev --out said.jsonl    with error rates
  python -m ddp_asr.transcribe runs/an4 --decoder runs/an4/decoder.yaml hello.wav
  ffmpeg -i film.mkv -f wav - | python -m ddp_asr.transcribe runs/an4 -
"""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m ddp_asr.transcribe",
        description="Write down what recordings say.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("checkpoint", help="a checkpoint, or a run directory: its best.pt, else its newest")
    inputs = "audio files (WAV, FLAC, OGG, MP3, ...), folders of them, shard directories, or any source that shard "
    inputs += "takes (manifests, tables, tars, ...); '-': stdin"
    add("inputs", nargs="+", metavar="INPUT", help=inputs)
    formats = "text (on stdout the default); json: JSON lines with time and confidence of every word (with --out the "
    formats += "default); ctm; textgrid, srt and vtt: a file for each recording"
    add("--format", choices=("text", "json", "ctm", *ONE_FILE_EACH), help=formats)
    out = "the file to write, stdout without it; one of JSON lines is continued where it ends; for textgrid, srt and "
    out += "vtt a directory, except for one audio file"
    add("--out", type=Path, help=out)
    add("--decoder", type=Path, help="YAML file with a section 'decoder' to use in place of the run's")
    cut = "how recordings are cut that are longer than a piece: in their pauses, or by voice activity (silero-vad: pip "
    cut += "install 'ddp-asr[vad]'), which is the default where that is installed"
    add("--cut", choices=("pauses", "voice"), help=cut)
    piece = "longest piece recognised at once (default: the longest utterance that the run was trained on)"
    add("--piece-seconds", type=float, help=piece)
    columns = "columns of a table (.csv, .tsv) whose names are not known, as for shard"
    add("--columns", default="", metavar="audio=NAME,text=NAME", help=columns)
    arguments = parser.parse_args(argv)
    arguments.format = arguments.format or ("json" if arguments.out else "text")
    if arguments.piece_seconds is not None and not 1 <= arguments.piece_seconds <= 3600:
        raise UserError(f"--piece-seconds must be between 1 and 3600, not {arguments.piece_seconds}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every recording was transcribed; one that cannot be read is named and the others still come."""
    arguments = parse_arguments(argv)
    before_torch(os.environ)
    from ddp_asr.config import load_decoder
    from ddp_asr.recognition.inputs import open_inputs
    from ddp_asr.recognition.recogniser import load_recogniser
    from ddp_asr.recognition.transcripts import settings_of
    from ddp_asr.recognition.voice import choose_cut

    if arguments.out is not None:
        _check_out(arguments)
    decoder = load_decoder(arguments.decoder) if arguments.decoder else None
    recogniser = load_recogniser(arguments.checkpoint, decoder=decoder)
    piece_s = arguments.piece_seconds or recogniser.piece_s
    kind, cut = choose_cut(arguments.cut, int(piece_s * SAMPLE_RATE_HZ))
    inputs = open_inputs(arguments.inputs, arguments.columns)
    with _writing(arguments, inputs, lambda: settings_of(recogniser, kind, piece_s)) as (write, done):
        return 2 if _transcribe(arguments, recogniser, cut, inputs, write, done) else 0


def _check_out(arguments: argparse.Namespace) -> None:
    """Raises a UserError for a place that cannot be written, or that holds something that must not be lost."""
    from ddp_asr.recognition.transcripts import settings_beside

    out: Path = arguments.out
    for name in arguments.inputs:
        if out.exists() and os.path.exists(name) and out.samefile(name):
            raise UserError(f"--out {out} is one of the inputs, which it would replace: name another place")
    if arguments.format == "json":
        if "-" in arguments.inputs:
            raise UserError("a file that is continued cannot hold stdin, which has no name: use --format json > FILE")
    elif settings_beside(out).exists():
        raise UserError(f"--out {out} holds transcripts as JSON lines, which are continued: name another file")
    if arguments.format not in ONE_FILE_EACH:
        check_writable(out)


@contextlib.contextmanager
def _writing(
    arguments: argparse.Namespace, inputs: list[Input], settings: Callable[[], dict[str, Any]]
) -> Iterator[tuple[Write, Done]]:
    """A function that writes a transcript where it belongs, and what is there already: key -> (text, reference)."""
    from ddp_asr.recognition.transcripts import continued

    out, several = arguments.out, not (len(inputs) == 1 and inputs[0].is_file)
    render = _renderer(arguments.format, several)
    if out is None:
        if several and arguments.format in ONE_FILE_EACH:
            raise UserError(f"--format {arguments.format} makes a file for each recording: name a directory with --out")
        yield lambda transcript: print(render(transcript), end="", flush=True), {}
    elif arguments.format == "json":
        with continued(out, settings()) as (append, done):
            yield append, done
    elif several and arguments.format in ONE_FILE_EACH:
        if out.exists() and not out.is_dir():
            raise UserError(f"--out {out} is a file: name a directory, which gets a file for each recording")
        out.mkdir(parents=True, exist_ok=True)
        yield (
            lambda transcript: replace_file(out / _file_name(transcript.key, arguments.format), render(transcript)),
            {},
        )
    else:
        if out.is_dir():
            raise UserError(f"--out {out} is a directory: name the file to write")
        with writing_aside(out) as file:  # whole, or as it was after an error and Ctrl-C
            yield lambda transcript: file.write(render(transcript).encode(errors="backslashreplace")), {}


def _renderer(format: str, several: bool) -> Callable[[Transcript], str]:
    from ddp_asr.decoding.formats import OF_ONE, render_ctm
    from ddp_asr.recognition.transcripts import render_json

    if format == "text":
        return lambda said: f"{_CONTROL.sub('_', said.key)}\t{said.text}\n" if several else f"{said.text}\n"
    return {"json": render_json, "ctm": render_ctm}.get(format) or OF_ONE[format][0]


def _file_name(key: str, format: str) -> str:
    """Of the file in the directory `--out`: the name of the audio file, or the key in its source."""
    from ddp_asr.decoding.formats import OF_ONE

    stem = _CONTROL.sub("_", Path(key).stem).encode(errors="replace")[:_LONGEST_NAME].decode(errors="ignore")
    return stem + OF_ONE[format][1]


def _transcribe(
    arguments: argparse.Namespace, recogniser: Recogniser, cut: Cut, inputs: list[Input], write: Write, done: Done
) -> int:
    """Writes what is not done, shows progress, says at the end what came out, and returns how many failed."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from ddp_asr.recognition.transcription import Failure, transcribe

    console = Console(stderr=True)
    hidden = not console.is_terminal or (arguments.out is None and sys.stdout.isatty())  # there texts are progress
    columns = (TextColumn("transcribing"), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    total, started_s, audio_s, failed = sum(each.total for each in inputs), time.monotonic(), 0.0, 0
    texts = list(done.values())

    def speed() -> str:
        wall_s = time.monotonic() - started_s
        if not audio_s:
            return "0.00 h of audio"
        return f"{audio_s / 3600:.2f} h of audio, real-time factor {wall_s / max(audio_s, 1e-3):.4f}"

    def on_batch(seconds: float) -> None:
        nonlocal audio_s
        audio_s += seconds
        bar.update(task, description=f"{len(texts) + failed:,} of {counted(total, 'recording')}, {speed()}")

    with Progress(*columns, console=console, disable=hidden, transient=True, redirect_stdout=False) as bar:
        task = bar.add_task("", total=total)
        for item in transcribe(recogniser, _not_done(arguments, inputs, done), cut, on_batch):
            if isinstance(item, Failure):
                print(f"error: {item.error}", file=sys.stderr, flush=True)
                failed += 1
            else:
                write(item)
                texts.append((item.text, item.reference))
            bar.update(task, completed=len(texts) + failed)
    where = sys.stderr if arguments.out is None else sys.stdout
    if arguments.out is not None or not hidden:
        before = f"; with the {len(done):,} that {arguments.out} held, {len(texts):,}" if done else ""
        new = counted(len(texts) - len(done), "recording")
        print(f"{new} transcribed, {failed:,} failed, {speed()}{before}", file=where)
    if scored := [(reference, text) for text, reference in texts if reference is not None]:
        print(_error_rates(scored), file=where)
    return failed


def _not_done(arguments: argparse.Namespace, inputs: list[Input], done: Done) -> Iterator[Recording]:
    """The recordings that are left; a second one of the same key, or whose file would have the same name, cannot be."""
    from ddp_asr.recognition.inputs import unreadable

    each_its_file = arguments.out is not None and arguments.format in ONE_FILE_EACH
    seen: set[str] = set()
    for recording in (recording for each in inputs for recording in each.recordings):
        name = _file_name(recording.key, arguments.format) if each_its_file else recording.key
        if name in seen:
            twice = UserError(f"{recording.key}: another recording has the name {name}, so this one is left out")
            yield unreadable(recording.key, twice)
        elif recording.key not in done:
            yield recording
        seen.add(name)


def _error_rates(scored: list[tuple[str, str]]) -> str:
    """Without intervals: `ddp-asr evaluate` draws them over speakers, which recordings need not name."""
    from ddp_asr.text.score import Counts, count_each

    counts = Counts.from_array(count_each(*zip(*scored, strict=True)).sum(axis=0))
    rates = f"WER {100 * counts.wer:.2f} %, CER {100 * counts.cer:.2f} %"
    return f"{rates}, over {counted(len(scored), 'recording')} with a reference"


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
