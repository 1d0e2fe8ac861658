"""A recogniser as files that other programs read, and the comparison of the ONNX model with torch's.

    Recogniser --write_model--> model.onnx, model.json, transcribe.py    numpy and onnxruntime are enough
                                model.safetensors, settings.yaml         the weights for torch
    directory --largest_difference--> between the script with onnxruntime and the recogniser

model.onnx: features (B, T, F) float32 and frames (B,) int64 -> log_probs (B, T', V) and output_frames (B,). B and T are
free. It is made by tracing (`dynamo=False`): `torch.export` and the exporter built on it fix T in torch 2.11.
"""

from __future__ import annotations

import itertools
import json
import shutil
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from ddp_asr import SAMPLE_RATE_HZ, config
from ddp_asr.features.log_mel import DEVIATION_FLOOR, POWER_FLOOR
from ddp_asr.model import AcousticModel
from ddp_asr.recognition import standalone
from ddp_asr.recognition.recogniser import Recogniser

OPSET = 17
# Of `largest_difference`. On noise and on speech 3e-5 was the most that was seen: float32 adds in another order.
TOLERANCE = 1e-3
NOT_EXPORTED = ("run", "tracking", "distributed")  # sections of no meaning elsewhere


class _LogProbs(nn.Module):
    """What is exported: log-probabilities, because decoders other than the greedy one need them."""

    def __init__(self, model: AcousticModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(features, frames)
        return output.logits.log_softmax(-1), output.frames


def write_model(recogniser: Recogniser, directory: Path) -> None:
    """Writes all files but the model card; the recogniser is on the CPU, in fp32."""
    from safetensors.torch import save

    tokeniser = recogniser.tokeniser
    _write_onnx(recogniser, directory / "model.onnx")
    settings = script_settings(recogniser.config.features, tokeniser.symbols, recogniser.piece_s)
    (directory / "model.json").write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    shutil.copyfile(standalone.__file__, directory / "transcribe.py")
    weights = save(recogniser.model.state_dict(), metadata={"format": "pt"})
    (directory / "model.safetensors").write_bytes(weights)
    for name, content in tokeniser.files().items():
        (directory / name).write_bytes(content)
    sections = {name: section for name, section in asdict(recogniser.config).items() if name not in NOT_EXPORTED}
    text = yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)
    (directory / "settings.yaml").write_text(text, encoding="utf-8")


def script_settings(features: config.Features, symbols: Sequence[str], longest_s: float) -> dict[str, Any]:
    """What model.json says."""
    return {
        "sample_rate_hz": SAMPLE_RATE_HZ,
        "window_samples": features.window_samples,
        "hop_samples": features.hop_samples,
        "n_fft": features.n_fft,
        "mel_bands": features.mel_bands,
        "power_floor": POWER_FLOOR,
        "deviation_floor": DEVIATION_FLOOR,
        "longest_s": longest_s,
        "symbols": list(symbols),
    }


def _write_onnx(recogniser: Recogniser, path: Path) -> None:
    bands = recogniser.config.features.mel_bands
    example = torch.randn(2, 96, bands), torch.tensor([96, 71])
    free = {0: "batch", 1: "time"}
    with torch.no_grad(), warnings.catch_warnings():
        # It says that this exporter is the old one, and that the initial state of a GRU may fix the batch size; ours
        # has the size of the batch. `largest_difference` finds what a trace has fixed.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _LogProbs(recogniser.model).eval(),
            example,
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=["features", "frames"],
            output_names=["log_probs", "output_frames"],
            dynamic_axes={
                "features": free,
                "frames": {0: "batch"},
                "log_probs": {0: "batch", 1: "output_time"},
                "output_frames": {0: "batch"},
            },
        )


def largest_difference(recogniser: Recogniser, directory: Path, waveforms: list[np.ndarray] | None = None) -> float:
    """Between log-probabilities of the exported files and of the recogniser, in batches of one to three recordings.

    A difference is divided by one more than the log-probability's size, because unlikely classes have large ones.

    Args:
        waveforms: int16 (S,) each; noise of random lengths where there are none.
    """
    model, largest = standalone.Model(directory, threads=torch.get_num_threads()), 0.0
    for batch in _batches(_noises() if waveforms is None else waveforms):
        samples = torch.tensor([len(each) for each in batch])
        padded = np.stack([np.pad(each, (0, int(samples.max()) - len(each))) for each in batch])
        logits, frames = recogniser.logits(torch.from_numpy(padded), samples)
        found = model.log_probs([model.features(each) for each in batch])
        for row, length, exported in zip(logits.log_softmax(-1), frames.tolist(), found, strict=True):
            if len(exported) != length:
                return float("inf")
            expected = row[:length].numpy()
            largest = max(largest, float((np.abs(exported - expected) / (1 + np.abs(expected))).max(initial=0.0)))
    return largest


def _batches(waveforms: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
    waiting = iter(waveforms)
    for size in itertools.cycle((1, 3, 2)):
        if not (batch := list(itertools.islice(waiting, size))):
            return
        yield batch


def _noises() -> list[np.ndarray]:
    """Noise that swells and fades, 0.1 to 4 s long."""
    random = np.random.default_rng(0)
    noises = []
    for samples in random.integers(SAMPLE_RATE_HZ // 10, 4 * SAMPLE_RATE_HZ, 6).tolist():
        swell = np.sin(np.linspace(0, random.uniform(1, 30), samples))
        noises.append((3000 * swell * random.standard_normal(samples)).clip(-32768, 32767).astype(np.int16))
    return noises
