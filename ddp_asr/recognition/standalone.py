"""Transcribes WAV files with the model beside this script: python transcribe.py hello.wav more.wav

It needs numpy and onnxruntime. model.json has the settings of the features, and what each class of the model writes.
"""

import json
import sys
import wave
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


class Model:
    """model.onnx and model.json of a directory."""

    def __init__(self, directory: Path, threads: int = 0) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads  # 0: one for each core
        self.settings: dict[str, Any] = json.loads((directory / "model.json").read_text(encoding="utf-8"))
        path, providers = str(directory / "model.onnx"), ["CPUExecutionProvider"]
        self.session = onnxruntime.InferenceSession(path, options, providers=providers)
        self.filters = mel_filters(self.settings)

    def features(self, samples: np.ndarray) -> np.ndarray:
        """int16 (S,) -> log-mel features (T, F) with mean 0 and deviation 1 in each band."""
        window, hop = self.settings["window_samples"], self.settings["hop_samples"]
        if len(samples) < window:
            return np.zeros((0, self.settings["mel_bands"]), np.float32)
        hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
        cut = np.lib.stride_tricks.sliding_window_view(samples / 32768, window)[::hop]
        power = np.abs(np.fft.rfft(cut * hann, self.settings["n_fft"])) ** 2
        log_mel = np.log(power @ self.filters + self.settings["power_floor"])
        centred = log_mel - log_mel.mean(0)
        deviation = np.sqrt(np.square(centred).mean(0))
        return (centred / np.maximum(deviation, self.settings["deviation_floor"])).astype(np.float32)

    def log_probs(self, features: Sequence[np.ndarray]) -> list[np.ndarray]:
        """(T, F) of each recording -> log-probabilities (T', V) of each; they run as one batch."""
        frames = np.array([len(each) for each in features])
        batch = np.stack([np.pad(each, ((0, frames.max() - len(each)), (0, 0))) for each in features])
        rows, lengths = self.session.run(None, {"features": batch, "frames": frames})
        return [row[:length] for row, length in zip(rows, lengths, strict=True)]

    def text(self, samples: np.ndarray) -> str:
        """What is said in int16 (S,), by the most probable class of each frame."""
        texts = []
        for piece in cut_in_pauses(samples, int(self.settings["longest_s"] * self.settings["sample_rate_hz"])):
            if len(features := self.features(piece)):
                path = self.log_probs([features])[0].argmax(1)
                changed = np.append(True, path[1:] != path[:-1])
                symbols = [*self.settings["symbols"], ""]  # the blank is the last class
                texts.append("".join(symbols[number] for number in path[changed]))
        return " ".join(" ".join(texts).split())


def mel_filters(settings: dict[str, Any]) -> np.ndarray:
    """(n_fft // 2 + 1, F) triangles that are equally wide on the mel scale 2595 log10(1 + f / 700)."""
    top_hz = settings["sample_rate_hz"] / 2
    mels = np.linspace(0, 2595 * np.log10(1 + top_hz / 700), settings["mel_bands"] + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)
    hz = np.linspace(0, top_hz, settings["n_fft"] // 2 + 1)[:, None]
    rising, falling = (hz - edges[:-2]) / np.diff(edges)[:-1], (edges[2:] - hz) / np.diff(edges)[1:]
    return np.maximum(0, np.minimum(rising, falling))


def cut_in_pauses(samples: np.ndarray, longest: int, block: int = 160) -> Iterator[np.ndarray]:
    """Pieces of at most `longest` samples; each ends where its second half is quietest over 200 ms."""
    blocks = samples[: len(samples) // block * block].reshape(-1, block)
    power = np.einsum("ij,ij->i", blocks, blocks, dtype=np.float32)
    loudness = np.convolve(np.pad(power, 10, constant_values=2**40), np.ones(20, np.float32) / 20, "valid")
    start = 0
    while len(samples) - start > longest:
        first = start + longest // 2
        last = start + min(longest, len(samples) - start - longest // 4)
        quietest = first // block + int(loudness[first // block : last // block + 1].argmin())
        stop = min(max(quietest * block, first), last)
        yield samples[start:stop]
        start = stop
    yield samples[start:]


def read_wav(path: str, rate_hz: int) -> np.ndarray:
    """int16 (S,), the mean of the channels; raises ValueError with a sentence for the user."""
    remedy = f"convert it, as with: ffmpeg -i {path} -ar {rate_hz} -c:a pcm_s16le converted.wav"
    try:
        with wave.open(path, "rb") as file:
            found_hz, channels, bits = file.getframerate(), file.getnchannels(), 8 * file.getsampwidth()
            data = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise ValueError(f"{path} cannot be read as WAV ({str(error) or 'it is cut off'}): {remedy}") from None
    if (found_hz, bits) != (rate_hz, 16):
        raise ValueError(f"{path} has {found_hz} Hz and {bits} bits, the model needs {rate_hz} Hz and 16: {remedy}")
    samples = np.frombuffer(data[: len(data) // (2 * channels) * 2 * channels], "<i2").reshape(-1, channels)
    if not len(samples):
        raise ValueError(f"{path} holds no audio")
    return samples.mean(1, dtype=np.float32).round().astype(np.int16)


def main(paths: Sequence[str]) -> int:
    """0 when every file was transcribed; one that cannot be read is named, and the others still come."""
    if not paths or paths[0].startswith("-"):
        print("usage: python transcribe.py FILE.wav ...", file=sys.stderr)
        return 2
    model, failed = Model(Path(__file__).resolve().parent), 0
    for path in paths:
        try:
            text = model.text(read_wav(path, model.settings["sample_rate_hz"]))
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            failed += 1
        else:
            print(text if len(paths) == 1 else f"{path}\t{text}", flush=True)
    return 2 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
