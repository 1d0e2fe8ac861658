"""Settings: frozen dataclasses, one section a concern; a YAML file first, `--section.key=value` on top.

    config = load_config(Path("configs/an4.yaml"), ["--train.epochs=3"])
    config.train.epochs                      # 3
    describe(config)                         # all of it as YAML text, which repeats the run

Every value, from file and command line alike, is a text that its field's declared type converts, because YAML 1.1 would
read `off` as False, `5e-4` as a string and `0123` as 83. Unknown keys are refused with the nearest valid one. Nothing
here imports torch: launchers read settings on login nodes that have none.

The sections in `SHAPES_THE_RESULT` decide what is trained, so a checkpoint only continues under the same ones;
`differences` names the first that is not. All others may change between attempts of one run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unicodedata import category

import yaml

from ddp_asr import SAMPLE_RATE_HZ
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
    cache_dir: str = setting(
        "", "node-local directory to copy the shards to once, shared by a node's ranks; empty: none"
    )
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

    @property
    def window_samples(self) -> int:
        return int(self.window_ms * SAMPLE_RATE_HZ / 1000)

    @property
    def hop_samples(self) -> int:
        return int(self.hop_ms * SAMPLE_RATE_HZ / 1000)

    def frames(self, samples: Any) -> Any:
        """T of S: complete windows, 0 where not one fits. For ints, numpy arrays and tensors alike."""
        count = 1 + (samples - self.window_samples) // self.hop_samples
        return count * (count > 0)


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
    consistency_weight: float = setting(0.0, "pull of two differently masked views on each other; 0: one view alone")
    short_context_s: list[float] = setting(
        [], "second view: its GRUs start anew every so many seconds, drawn between two bounds a step; empty: never"
    )

    @property
    def views(self) -> int:
        """Masked views of an utterance in a step."""
        return 2 if self.consistency_weight else 1


@dataclass(frozen=True)
class Model:
    """Sizes of the ResCNN + BiGRU (see model.py)."""

    conv_channels: int = setting(32, "channels of every convolution")
    time_strides: list[int] = setting([2], "time stride of each strided convolution; each halves the mel bands")
    residual_blocks: int = setting(3, "pre-activation residual blocks of two convolutions")
    rnn_layers: int = setting(5, "bidirectional GRU blocks")
    rnn_size: int = setting(512, "GRU units a direction")
    dropout: float = setting(0.1, "dropout everywhere")
    intermediate_ctc_weight: float = setting(
        0.0, "share of the CTC loss that is taken behind the first of the GRU blocks, in training; 0: none"
    )

    def output_frames(self, frames: Any) -> Any:
        """T' of T: what the strided convolutions leave. For ints, numpy arrays and tensors alike."""
        for stride in self.time_strides:
            frames = (frames + stride - 1) // stride
        return frames


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

    @property
    def frame_s(self) -> float:
        """Seconds from one frame of the logits to the next."""
        return self.features.hop_ms / 1000 * math.prod(self.model.time_strides)


# Data is compared by the fingerprint of its utterances, never by path (DESIGN 5), so `data` is not here.
SHAPES_THE_RESULT = (
    *("vocabulary", "batch", "features", "augment", "model", "optim"),
    *("train.seed", "train.epochs", "train.precision"),
)


class _TextLoader(yaml.SafeLoader):
    """Leaves values the texts they are, and refuses a key given twice, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    problem = f"{key_node.value!r} is given twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_TextLoader.yaml_implicit_resolvers = {}  # what would take a text for a truth value, a number or a date


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Reads `path` (None: the defaults), lays `--section.key=value` overrides on top and checks every value.

    Raises:
        UserError: an unreadable file, an unknown key, a value of the wrong type or out of range.
    """
    tree = {} if path is None else _read_sections(path)
    _refuse_unknown(tree, str(path))
    for override in overrides:
        name, separator, text = override.removeprefix("--").partition("=")
        section, dot, key = name.partition(".")
        if not (override.startswith("--") and separator and dot):
            raise UserError(f"{override!r} is no setting: write --section.key=value, for instance --train.epochs=3")
        _refuse_unknown({section: {key: text}}, "the command line")
        tree.setdefault(section, {})[key] = _parse_list(text)
    config = config_from_dict(tree, "the command line" if path is None else str(path))
    if not config.run.name:
        named = dataclasses.replace(config.run, name="default" if path is None else path.stem)
        config = dataclasses.replace(config, run=named)
    return config


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file's mapping, every value in it still a text; {} where it is empty.

    Raises:
        UserError: an unreadable file, or no mapping in it.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf8"), Loader=_TextLoader)
    except OSError as error:
        raise UserError(f"cannot read the settings {path}: {error.strerror}; give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold settings by their names, such as 'train:' with 'epochs: 3' below it")
    return tree


def _read_sections(path: Path) -> dict[str, dict[str, Any]]:
    tree = read_yaml(path)
    if not all(isinstance(section, dict) or section == "" for section in tree.values()):
        raise UserError(f"{path} must hold sections of settings, such as 'train:' with 'epochs: 3' below it")
    return {name: section or {} for name, section in tree.items()}


def _parse_list(text: str) -> Any:
    """`[a, b]` as YAML has it; any other text as it is."""
    try:
        return yaml.load(text, Loader=_TextLoader) if text[:1] == "[" else text
    except yaml.YAMLError:
        return text


def config_from_dict(tree: dict[str, dict[str, Any]], origin: str) -> Config:
    """The settings in a plain nested dict, as YAML files and checkpoints hold them; checked like a file's."""
    _refuse_unknown(tree, origin)
    config = Config(**{section: _build_section(section, settings) for section, settings in tree.items()})
    check(config)
    return config


def _refuse_unknown(tree: dict[str, dict[str, Any]], origin: str) -> None:
    sections = [section.name for section in dataclasses.fields(Config)]
    for section, settings in tree.items():
        if section not in sections:
            raise UserError(f"unknown section {section!r} in {origin}; {nearest(section, sections)}")
        names = [f"{section}.{field.name}" for field in dataclasses.fields(_section_type(section))]
        for name in (f"{section}.{key}" for key in settings):
            if name not in names:
                raise UserError(f"unknown setting {name!r} in {origin}; {nearest(name, names)}")


def _section_type(name: str) -> Any:
    return typing.get_type_hints(Config)[name]


def _build_section(section: str, settings: dict[str, Any]) -> Any:
    kind = _section_type(section)
    types = typing.get_type_hints(kind)
    return kind(**{key: convert(value, types[key], f"{section}.{key}") for key, value in settings.items()})


def nearest(name: str, names: Iterable[str]) -> str:
    """What to say beside an unknown name: the one that was meant, or all there are."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(names)}"


def convert(value: Any, kind: Any, name: str) -> Any:
    """`value`, a text or what a checkpoint holds, as the type `kind`; a UserError that names the setting otherwise."""
    wrong = UserError(f"{name} must be {_describe_type(kind)}, not {value!r}")
    if typing.get_origin(kind) is list:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",")] if value else []
        if not isinstance(value, list):
            value = [value]
        (item,) = typing.get_args(kind)
        return [convert(part, item, name) for part in value]
    if kind is str:
        if not isinstance(value, str):
            raise wrong
        return value
    if kind is bool:
        words = {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}
        if str(value).lower() not in words:
            raise wrong
        return words[str(value).lower()]
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise wrong
    try:
        return float(value) if kind is float else _whole(value)
    except (ValueError, OverflowError):
        raise wrong from None


def _whole(value: int | float | str) -> int:
    """Texts such as 1e3, too; without the detour over a float, which rounds large seeds, where there is another way."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            return int(value)
    number = value if isinstance(value, int) else float(value)
    if number != int(number):
        raise ValueError(value)
    return int(number)


def _describe_type(kind: Any) -> str:
    if typing.get_origin(kind) is list:
        return f"a list, each item {_describe_type(typing.get_args(kind)[0])}"
    return {str: "a text", bool: "true or false", int: "a whole number", float: "a number"}[kind]


# What each number may be: (setting, test, what is allowed in words).
_POSITIVE = (
    *("batch.max_seconds", "batch.micro_batches", "batch.buckets", "features.mel_bands", "features.window_ms"),
    *("features.hop_ms", "features.n_fft", "augment.speeds", "model.conv_channels", "model.time_strides"),
    *("model.rnn_layers", "model.rnn_size", "optim.learning_rate", "optim.start_divisor", "optim.end_divisor"),
    *("optim.clip_norm", "train.epochs", "train.keep_last", "distributed.timeout_s", "distributed.stop_grace_s"),
    *("data.prefetch",),
)
_SHARES = ("augment.time_mask_share", "augment.noise_share", "optim.warmup_share")
_SHARES_BELOW_ONE = (
    *("model.dropout", "model.intermediate_ctc_weight", "optim.ema_decay", "optim.beta1", "optim.beta2"),
)
_NOT_NEGATIVE = (
    *("data.workers", "data.max_bad_samples", "augment.frequency_masks", "augment.frequency_mask_bands"),
    *("augment.time_masks", "augment.consistency_weight", "model.residual_blocks", "optim.weight_decay"),
    *("train.seed", "train.eval_every_steps"),
    *("train.save_every_steps", "train.save_every_min", "train.stop_at_step", "train.max_nonfinite_steps"),
    "tracking.samples",
)
_CHOICES = {
    "train.precision": ("auto", "bf16", "fp16", "tf32", "fp32"),
    "optim.anneal": ("linear", "cosine"),
    "tracking.mode": ("auto", "online", "offline", "off"),
}


def check(config: Config) -> None:
    """Raises a UserError for the first value out of its range or at odds with another."""
    values = dict(flatten(config))
    parts = {name: value if isinstance(value, list) else [value] for name, value in values.items()}

    def require(names: Iterable[str], allowed: Callable[[float], bool], words: str) -> None:
        for name in names:
            if not parts[name] or not all(allowed(number) for number in parts[name]):
                raise UserError(f"{name} must be {words}, not {values[name]!r}")

    for name, texts in parts.items():
        # YAML folds some line separators into spaces, so that a saved file would not repeat the run.
        for broken in (c for text in texts if isinstance(text, str) for c in text if category(c) in ("Cc", "Zl", "Zp")):
            raise UserError(f"{name} holds the control character {broken!r}: take it out of {values[name]!r}")
    fractional = [name for name in parts if any(isinstance(part, float) for part in parts[name])]
    require(fractional, lambda x: abs(x) < float("inf"), "finite")
    require(_POSITIVE, lambda x: x > 0, "above 0")
    require(_SHARES, lambda x: 0 <= x <= 1, "between 0 and 1")
    require(_SHARES_BELOW_ONE, lambda x: 0 <= x < 1, "at least 0 and below 1")
    require(_NOT_NEGATIVE, lambda x: x >= 0, "0 or more")
    for name, choices in _CHOICES.items():
        if values[name] not in choices:
            raise UserError(f"{name} must be one of {', '.join(choices)}, not {values[name]!r}")
    _check_together(config)


def _check_together(config: Config) -> None:
    symbols, features, augment = config.vocabulary.symbols, config.features, config.augment
    if not config.data.train:
        raise UserError("data.train is empty: name at least one shard directory")
    if not symbols or len(set(symbols)) != len(symbols):
        raise UserError(f"vocabulary.symbols must hold each symbol once and at least one, not {symbols!r}")
    window_samples = features.window_ms * 16
    if window_samples != int(window_samples) or features.hop_ms * 16 != int(features.hop_ms * 16):
        raise UserError("features.window_ms and features.hop_ms must be whole numbers of samples at 16 kHz (1/16 ms)")
    if features.n_fft < window_samples:
        raise UserError(
            f"features.n_fft = {features.n_fft} is shorter than features.window_ms = {features.window_ms:g}, "
            f"{window_samples:.0f} samples: raise the former or lower the latter"
        )
    if features.mel_bands % 2 ** len(config.model.time_strides):
        raise UserError(
            f"features.mel_bands = {features.mel_bands} must be divisible by {2 ** len(config.model.time_strides)}, "
            f"because each of the {len(config.model.time_strides)} strided convolutions halves the bands"
        )
    if augment.frequency_mask_bands >= features.mel_bands:
        raise UserError(
            f"augment.frequency_mask_bands = {augment.frequency_mask_bands} would hide all bands of "
            f"features.mel_bands = {features.mel_bands}: choose a smaller number"
        )
    if augment.noise_snr_db_min > augment.noise_snr_db_max:
        raise UserError("augment.noise_snr_db_min is above augment.noise_snr_db_max")
    bounds = augment.short_context_s
    if bounds and not (len(bounds) == 2 and 0 < bounds[0] <= bounds[1]):
        raise UserError(f"augment.short_context_s must be two rising numbers above 0, or empty, not {bounds!r}")
    if bounds and augment.views == 1:
        raise UserError(
            "augment.short_context_s is for the second view of an utterance, and augment.consistency_weight = 0 makes "
            "no second view: set the latter above 0 or leave the former empty"
        )


def flatten(config: Config) -> Iterator[tuple[str, Any]]:
    """(`section.key`, value) of every setting, in order."""
    for section in dataclasses.fields(config):
        part = getattr(config, section.name)
        for key in dataclasses.fields(part):
            yield f"{section.name}.{key.name}", getattr(part, key.name)


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """The settings as plain containers, as YAML files and checkpoints hold them."""
    return dataclasses.asdict(config)


def describe(config: Config) -> str:
    """The settings as YAML text."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True, width=120)


def differences(ours: Config, theirs: Config) -> list[tuple[str, Any, Any]]:
    """(name, our value, their value) of every setting that shapes the result and differs."""
    other = dict(flatten(theirs))
    return [
        (name, value, other[name])
        for name, value in flatten(ours)
        if (name in SHAPES_THE_RESULT or name.split(".")[0] in SHAPES_THE_RESULT) and value != other[name]
    ]


def settings_help() -> str:
    """Every setting with its default and meaning, for an entry point's `--help`."""
    lines = []
    for section in dataclasses.fields(Config):
        kind = _section_type(section.name)
        lines.append(f"\n{section.name}: {kind.__doc__}")
        for key in dataclasses.fields(kind):
            default = getattr(kind(), key.name)
            shown = ",".join(map(str, default)) if isinstance(default, list) else default
            lines.append(f"  --{section.name}.{key.name}={shown}\n        {key.metadata['meaning']}")
    return "\n".join(lines)


def require_shards(config: Config) -> None:
    """Raises a UserError that names the commands which make the shards that are not there."""
    missing = [Path(path) for path in (*config.data.train, *config.data.test) if not Path(path).is_dir()]
    if missing:
        commands = "\n".join(f"  python -m ddp_asr.shard {path.name} --out {path}" for path in missing)
        names = ", ".join(map(str, missing))
        raise UserError(
            f"there are no shards at {names}; make them with (the source is a LibriSpeech split, directory, .tar.gz "
            f"or JSONL manifest):\n{commands}"
        )
