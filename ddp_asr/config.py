"""Settings: frozen dataclasses, one section a concern; a YAML file first, `--section.key=value` on top.

    config = load_config(Path("configs/an4.yaml"), ["--train.epochs=3"])
    config.train.epochs                      # 3
    save_config(config, run_directory / "config.yaml")

Every value, from file and command line alike, is converted by its field's declared type, because YAML 1.1 reads `off`
as False and `5e-4` as a string. Unknown keys are refused with the nearest valid one. Nothing here imports torch:
launchers read settings on login nodes that have none.

The sections in `SHAPES_THE_RESULT` decide what is trained, so a checkpoint only continues under the same ones;
`differences` names the first that is not. All others may change between attempts of one run.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ddp_asr.errors import UserError


def setting(default: Any, meaning: str) -> Any:
    """A field with its one line of meaning, which is also its `--help`."""
    metadata = {"meaning": meaning}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Run:
    """Where a run lives."""

    name: str = setting("", "directory of the run under run.dir; empty: the config file's stem")
    dir: str = setting("runs", "directory that holds the runs")


@dataclass(frozen=True)
class Data:
    """What is trained and tested on, and how it is read."""

    train: list[str] = setting(["shards/train-clean-100"], "shard directories to train on, mixed")
    test: list[str] = setting(["shards/dev-clean"], "shard directories to evaluate on along the way; may be empty")
    cache_dir: str = setting("", "node-local directory to copy the shards to once, shared by a node's ranks; empty: none")
    workers: int = setting(2, "loader processes a rank; 0: decode in the rank itself")
    prefetch: int = setting(4, "micro-batches that each loader process keeps ready")
    max_bad_samples: int = setting(10, "utterances that may fail to decode in a run before it stops")


@dataclass(frozen=True)
class Vocabulary:
    """Which symbols the recogniser writes; the blank is one more, the last class."""

    symbols: str = setting("' abcdefghijklmnopqrstuvwxyz", "every symbol, in class order")
    lowercase: bool = setting(True, "lower-case transcripts first")
    drop: str = setting("", "characters removed from transcripts first, such as punctuation")


@dataclass(frozen=True)
class Batch:
    """How an epoch is cut into steps (see plan.py)."""

    max_seconds: float = setting(120.0, "utterances x longest of a micro-batch, in seconds of audio")
    micro_batches: int = setting(8, "K: micro-batches in a step, and the most processes a run can ever use")
    buckets: int = setting(30, "most buckets by duration; small sets get fewer, so that micro-batches stay full")


@dataclass(frozen=True)
class Features:
    """Log-mel features (see features.py)."""

    mel_bands: int = setting(128, "F: mel bands")
    window_ms: float = setting(25.0, "analysis window")
    hop_ms: float = setting(12.5, "distance of two frames")
    n_fft: int = setting(1024, "points of the Fourier transform; the window is padded to it")


@dataclass(frozen=True)
class Augment:
    """What is done to training utterances only, seeded by utterance and epoch (see augment.py)."""

    frequency_masks: int = setting(1, "SpecAugment frequency masks an utterance")
    frequency_mask_bands: int = setting(15, "widest frequency mask, in mel bands")
    time_masks: int = setting(2, "SpecAugment time masks an utterance")
    time_mask_share: float = setting(0.05, "widest time mask, as a share of the utterance's frames")
    speeds: list[float] = setting([1.0], "speed factors, one drawn an utterance and epoch")
    noise_share: float = setting(0.0, "share of utterances that get white noise")
    noise_snr_db_min: float = setting(15.0, "loudest noise, as signal-to-noise ratio")
    noise_snr_db_max: float = setting(40.0, "faintest noise, as signal-to-noise ratio")


@dataclass(frozen=True)
class Model:
    """Sizes of the ResCNN + BiGRU (see model.py)."""

    conv_channels: int = setting(32, "channels of every convolution")
    time_strides: list[int] = setting([2], "time stride of each strided convolution; each halves the mel bands")
    residual_blocks: int = setting(3, "pre-activation residual blocks of two convolutions")
    rnn_layers: int = setting(5, "bidirectional GRU blocks")
    rnn_size: int = setting(512, "GRU units a direction")
    dropout: float = setting(0.1, "dropout everywhere")


@dataclass(frozen=True)
class Optim:
    """AdamW under a one-cycle learning rate (see optim.py)."""

    learning_rate: float = setting(5e-4, "highest rate of the cycle")
    weight_decay: float = setting(0.01, "AdamW's decoupled decay, on matrices and kernels only")
    beta1: float = setting(0.9, "AdamW's first moment")
    beta2: float = setting(0.999, "AdamW's second moment")
    warmup_share: float = setting(0.3, "share of all steps in which the rate rises")
    start_divisor: float = setting(25.0, "the cycle starts at learning_rate / start_divisor")
    end_divisor: float = setting(1e4, "the cycle ends at learning_rate / start_divisor / end_divisor")
    anneal: str = setting("linear", "shape of the cycle: linear or cosine")
    clip_norm: float = setting(5.0, "largest gradient norm; larger ones are scaled down to it")
    ema_decay: float = setting(0.0, "decay a step of the weights' moving average, which is then evaluated; 0: none")


@dataclass(frozen=True)
class Train:
    """The run itself."""

    epochs: int = setting(10, "epochs; every usable utterance is trained once in each")
    seed: int = setting(0, "seed of order, weights, masks, noise and dropout")
    precision: str = setting("auto", "auto, bf16, fp16, tf32 or fp32; auto: bf16 where the hardware has it, else fp32")
    init_from: str = setting("", "checkpoint of another run whose weights to start from (fine-tuning)")
    eval_every_steps: int = setting(0, "evaluate every so many steps; 0: at the end of every epoch")
    save_every_steps: int = setting(1000, "checkpoint every so many steps; 0: not by steps")
    save_every_min: float = setting(15.0, "checkpoint after so many minutes; 0: not by time")
    keep_last: int = setting(3, "newest checkpoints to keep, beside the best")
    stop_at_step: int = setting(0, "checkpoint and stop after this step, resumable; 0: run to the end")
    max_nonfinite_steps: int = setting(20, "steps skipped for a non-finite loss or gradient before the run stops")


@dataclass(frozen=True)
class Tracking:
    """Comet, as a mirror of the run's own files (see tracking.py)."""

    mode: str = setting("auto", "auto, online, offline or off; auto: online when COMET_API_KEY is set, else offline")
    project: str = setting("ddp-asr", "Comet project")
    workspace: str = setting("", "Comet workspace; empty: the account's own")
    samples: int = setting(20, "reference/hypothesis pairs shown at each evaluation")


@dataclass(frozen=True)
class Distributed:
    """How processes wait for each other."""

    timeout_s: float = setting(600.0, "longest wait in a collective before the run ends with an error")
    stop_grace_s: float = setting(20.0, "after a signal, a rank that reaches no step boundary for so long ends itself")


@dataclass(frozen=True)
class Config:
    """Every setting of a run."""

    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    batch: Batch = field(default_factory=Batch)
    features: Features = field(default_factory=Features)
    augment: Augment = field(default_factory=Augment)
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)
    tracking: Tracking = field(default_factory=Tracking)
    distributed: Distributed = field(default_factory=Distributed)


# Data is compared by the fingerprint of its utterances, never by path (DESIGN 5), so `data` is not here.
SHAPES_THE_RESULT = (
    *("vocabulary", "batch", "features", "augment", "model", "optim"),
    *("train.seed", "train.epochs", "train.precision", "train.init_from"),
)
