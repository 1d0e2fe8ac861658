"""A corpus that is made in seconds and learned in a few hundred steps: each letter is a tone, each word one of 60.

make_shards(folder / "train", utterances=96, seconds=(2, 8), seed=0)     # FLAC, transcripts, shards of them
"""

import json
from pathlib import Path

import numpy as np
import soundfile

from ddp_asr import SAMPLE_RATE_HZ, shard

_LETTER_S = 0.09
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WORDS = ["".join(np.random.default_rng(n).choice(list(_LETTERS), 3 + n % 5)) for n in range(60)]


def speak(text: str, generator: np.random.Generator) -> np.ndarray:
    """int16 at 16 kHz: a tone for each letter, a pause for each space, and faint noise."""
    time_s = np.arange(round(_LETTER_S * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    envelope = np.sin(np.pi * time_s / time_s[-1])  # falls to zero, so that equal neighbours are two
    parts = []
    for letter in text:
        pitch_hz = 200 * 1.12 ** (_LETTERS.index(letter) + 1) if letter != " " else 0.0
        parts.append(6_000 * envelope * np.sin(2 * np.pi * pitch_hz * time_s))
    waveform = np.concatenate(parts)
    return (waveform + 100 * generator.standard_normal(len(waveform))).astype(np.int16)


def make_shards(
    folder: Path, *, utterances: int, seconds: tuple[float, float], seed: int, copies: int = 1
) -> tuple[Path, float]:
    """Shards of so many utterances, each under `copies` keys; their directory, and their hours of audio."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    lines, audio_s = [], 0.0
    for number in range(utterances):
        letters = round(generator.uniform(*seconds) / _LETTER_S)
        text = " ".join(generator.choice(_WORDS, letters // 3))[:letters].strip()
        waveform = speak(text, generator)
        soundfile.write(folder / f"{number:05d}.flac", waveform, SAMPLE_RATE_HZ)
        audio_s += copies * len(waveform) / SAMPLE_RATE_HZ
        lines += [
            {"audio_filepath": f"{number:05d}.flac", "text": text, "id": f"{folder.name}-{number:05d}-{copy}"}
            for copy in range(copies)
        ]
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shard.main([str(manifest), "--out", str(folder / "shards")])
    return folder / "shards", audio_s / 3600
