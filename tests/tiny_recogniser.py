"""A checkpoint of a tiny model with random weights, and noises for it to hear."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddp_asr import config
from ddp_asr.model import make_model
from ddp_asr.runs import checkpoint
from ddp_asr.text import make_tokeniser

SETTINGS: dict[str, dict[str, Any]] = {
    "features": {"mel_bands": 16, "n_fft": 512},
    "encoder": {"conv_channels": 2, "residual_blocks": 1, "rnn_layers": 1, "rnn_size": 12},
    "vocabulary": {"symbols": " ab'", "drop": "."},
}


def tiny_state(seed: int = 10, **sections: dict) -> dict:
    """What training would save of a model that has learnt nothing and is sure of it."""
    settings = config.config_from_dict({**SETTINGS, **sections}, "the test")
    tokeniser = make_tokeniser(settings.vocabulary)
    torch.manual_seed(seed)
    model = make_model(settings, tokeniser.size)
    with torch.no_grad():
        # Random weights alone write the same symbol in every frame: loud ones write a text.
        for name, parameter in model.named_parameters():
            if "gru" in name or name.startswith(("classifier", "encoder.projection")):
                parameter.mul_(6)
    return {
        "model": dict(model.state_dict()),
        "averages": None,
        "config": dataclasses.asdict(settings),
        "tokeniser": tokeniser.state(),
        "step": 7,
        "epoch": 2,
    }


def write_checkpoint(path: Path, state: dict | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.write(path, checkpoint.snapshot(state or tiny_state()), may_write=lambda: None)
    return path


def noises(seconds: float, seed: int = 0) -> np.ndarray:
    """int16 at 16 kHz: bursts of noise and of tones, with pauses."""
    random = np.random.default_rng(seed)
    parts: list[np.ndarray] = []
    while sum(map(len, parts)) < seconds * 16_000:
        samples = int(random.integers(1_500, 5_000))
        tone = np.sin(2 * np.pi * random.uniform(150, 3_000) / 16_000 * np.arange(samples))
        sound = tone if random.random() < 0.5 else random.standard_normal(samples) / 3
        parts += [random.uniform(2_000, 9_000) * sound, random.standard_normal(int(random.integers(500, 6_000)))]
    return np.concatenate(parts)[: round(seconds * 16_000)].round().astype(np.int16)
