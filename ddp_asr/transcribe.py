"""Recordings to text: `python -m ddp_asr.transcribe CHECKPOINT AUDIO...`"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ddp_asr import SAMPLE_RATE_HZ
from ddp_asr.errors import UserError, run_entry_point
from ddp_asr.ranks.environment import before_torch

EXAMPLES = """
examples:
  python -m ddp_asr.transcribe runs/an4 hello.wav                  text, a line a file
  python -m ddp_asr.transcribe runs/an4/best.pt *.flac             several: PATH<tab>text
  python -m ddp_asr.transcribe runs/an4 --json talk.mp3 > talk.jsonl   with the time of every word
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
    parser.add_argument("checkpoint", help="a checkpoint, or a run directory: its best.pt, else its newest")
    parser.add_argument("audio", nargs="+", help="files that libsndfile reads (WAV, FLAC, OGG, MP3, ...); '-': stdin")
    parser.add_argument("--json", action="store_true", help="an object a file, with time and confidence of every word")
    parser.add_argument("--decoder", type=Path, help="YAML file with a section 'decoder' to use in place of the run's")
    parser.add_argument(
        "--piece-seconds",
        type=float,
        default=20.0,
        help="longest piece recognised at once, best near the longest utterances trained on; "
        "longer recordings are cut in their pauses (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.piece_seconds <= 3600:
        raise UserError(f"--piece-seconds must be between 1 and 3600, not {arguments.piece_seconds}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every file was transcribed; one that cannot be read is named and the others still come."""
    arguments = parse_arguments(argv)
    before_torch(os.environ)
    from ddp_asr.config import load_decoder
    from ddp_asr.recognition.recogniser import load_recogniser
    from ddp_asr.recognition.transcription import transcribe

    decoder = load_decoder(arguments.decoder) if arguments.decoder else None
    recogniser = load_recogniser(arguments.checkpoint, decoder=decoder)
    longest_samples = int(arguments.piece_seconds * SAMPLE_RATE_HZ)
    failed = 0
    for source in arguments.audio:
        try:
            transcript = transcribe(recogniser, source, longest_samples)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            failed += 1
            continue
        if arguments.json:
            print(json.dumps(transcript.as_dict(), ensure_ascii=False), flush=True)
        else:
            print(transcript.text if len(arguments.audio) == 1 else f"{source}\t{transcript.text}", flush=True)
    return 2 if failed else 0


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
