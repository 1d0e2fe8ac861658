"""Tiny corpora made in milliseconds: noise with transcripts, laid out as sources of `ddp_asr.shard`."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import soundfile

from ddp_asr.shard import main


def noise(seconds=0.3, seed=0, rate_hz=16_000):
    """int16 noise, which no codec can shorten to nothing."""
    return np.random.default_rng(seed).integers(-8000, 8000, round(seconds * rate_hz), dtype=np.int16)


def encode(waveform, rate_hz=16_000, format="FLAC", subtype="PCM_16"):
    """The waveform as the bytes of an audio file."""
    file = io.BytesIO()
    soundfile.write(file, waveform, rate_hz, format=format, subtype=subtype)
    return file.getvalue()


def librispeech(root, speakers=3, utterances=4, seconds=0.3):
    """`root/SPEAKER/7/SPEAKER-7-000N.flac` beside `SPEAKER-7.trans.txt`."""
    for speaker in range(100, 100 + speakers):
        chapter = Path(root) / str(speaker) / "7"
        chapter.mkdir(parents=True)
        keys = [f"{speaker}-7-{n:04d}" for n in range(utterances)]
        for n, key in enumerate(keys):
            (chapter / f"{key}.flac").write_bytes(encode(noise(seconds, seed=speaker * 100 + n)))
        lines = [f"{key} SPEAKER {speaker} SAYS {'NO ' * n}MORE\n" for n, key in enumerate(keys)]
        (chapter / f"{speaker}-7.trans.txt").write_text("".join(lines))
    return Path(root)


def archive(path, root, transcripts="first"):
    """A .tar.gz of a LibriSpeech directory, transcripts `first` or `last` in each chapter or at the `end`."""
    order = {
        "first": lambda file: (file.parent, file.suffix != ".txt", file),
        "last": lambda file: (file.parent, file.suffix == ".txt", file),
        "end": lambda file: (file.suffix == ".txt", file),
    }[transcripts]
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for file in sorted((file for file in Path(root).rglob("*") if file.is_file()), key=order):
            tar.add(file, Path("LibriSpeech") / Path(root).name / file.relative_to(root))
    return path


def manifest(path, entries):
    """A JSONL manifest; a string stands in it as it is."""
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    path.write_text("\n".join(lines) + "\n")
    return path


def webdataset(path, samples):
    """A tar of samples, {"__key__": ..., suffix: content}, as the package writes it."""
    from webdataset import TarWriter  # imports torch, which takes seconds

    path.parent.mkdir(parents=True, exist_ok=True)
    with TarWriter(str(path)) as tar:
        for sample in samples:
            tar.write(sample)
    return path


def huggingface(rows):
    """A dataset of Hugging Face with a column `audio` of {"bytes": ..., "path": ...}."""
    import datasets

    datasets.disable_progress_bars()
    # `Audio` in the features would encode each struct anew, by torchcodec; a cast leaves it as it is.
    struct = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    types = {name: datasets.Value("string") for row in rows for name in row if name != "audio"}
    types |= {name: datasets.Value("int64") for row in rows for name in row if isinstance(row[name], int)}
    dataset = datasets.Dataset.from_list(rows, features=datasets.Features({"audio": struct, **types}))
    return dataset.cast_column("audio", datasets.Audio(decode=False))


def shard(source, out, *options):
    """Runs the command in this process, with one worker; returns the output directory."""
    assert main([str(source), "--out", str(out), "--workers", "1", *options]) == 0
    return Path(out)


def content(directory):
    """Every file below the directory: relative path -> bytes."""
    return {str(f.relative_to(directory)): f.read_bytes() for f in sorted(Path(directory).rglob("*")) if f.is_file()}
