"""What the benchmarks share: synthesised shards where none are given, waveforms, and the model of the CPU."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddp_asr.data.index import Index


def synthesised(directory: Path, utterances: int = 400) -> Path:
    """Shards of a synthesised corpus, many small ones: the stock pipeline deals out whole shards to its workers."""
    corpus, shards = directory / "corpus", directory / "shards"
    for command in (
        ["synthetic_speech", "--out", str(corpus), "--train-utterances", str(utterances), "--test-utterances", "1"],
        ["ddp_asr.shard", str(corpus / "train"), "--out", str(shards), "--shard-mb", "2"],
    ):
        subprocess.run([sys.executable, "-m", *command], check=True, stdout=sys.stderr)
    return shards


def waveform(index: Index, row: int) -> Any:
    """int16 (S,) of a row, read and decoded."""
    import soundfile

    from ddp_asr.data.storage import Shards

    flac = Shards(index.shards).read(int(index.shard[row]), int(index.offset[row]), int(index.bytes[row]))
    return soundfile.read(io.BytesIO(flac), dtype="int16")[0]


def shuffled_rows(rows: int) -> Iterator[int]:
    """Epoch after epoch, each in an order of its own."""
    import numpy as np

    generator = np.random.default_rng(0)
    while True:
        yield from generator.permutation(rows).tolist()


def cpu_model() -> str:
    """As /proc/cpuinfo names it, with the number of cores that this process may use."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'unknown CPU'}, {len(os.sched_getaffinity(0))} core(s)"
