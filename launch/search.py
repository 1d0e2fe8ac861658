"""The trials of a sweep: a file of settings and values -> trials, each with a directory name and a checked Config.

    sweep = read_sweep(Path("configs/sweeps/an4.yaml"), ["--train.epochs=3"])
    trials = make_trials(sweep)                      # Trial(name="learning_rate=1e-3,dropout=0.1", values, config) ...

A trial is identified by its values, which also make the name of its directory. So a sweep that is given more values
keeps the trials it had. Each random value is drawn from a seed of its own (trial and setting), so more trials, or one
more setting, change none of the other draws.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import random
import re
import typing
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddp_asr.config import Config, Run, load_config
from ddp_asr.errors import UserError
from ddp_asr.settings import (
    Setting,
    differences,
    flatten,
    from_dict,
    nearest,
    read_yaml,
    setting,
    suggest,
)

NAME_CHARACTERS = 60  # longest name of a trial, which becomes a directory and an argument
MAX_DRAWS = 1000  # of one random trial, before the search gives up finding one unlike all others


# ---- the file ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """Numbers to draw from, both ends included."""

    minimum: float
    maximum: float
    log: bool
    whole: bool

    def at(self, position: float) -> str:
        """The value at a position between the minimum (0) and the maximum (1), rounded to about three digits."""
        low, high = self.minimum, self.maximum + self.whole
        value = low * (high / low) ** position if self.log else low + position * (high - low)
        if self.whole:
            return str(min(math.floor(value), int(self.maximum)))
        digits = 3 + int(math.log10(max(abs(low), abs(high)) / (high - low)))
        return repr(min(max(float(f"{value:.{digits}g}"), low), high))


Values = dict[str, str]  # of the settings that vary, as texts for load_config


@dataclass(frozen=True)
class Options:
    """The keys of a sweep's file, apart from `settings` and `fixed`."""

    config: str = setting("", "the settings that all trials share, such as configs/an4.yaml")
    name: str = setting("", "directory of the trials under run.dir")
    search: str = setting("grid", "all combinations, or random draws", choices=("grid", "random"))
    trials: int = setting(0, "number of random trials", at_least=0)
    seed: int = setting(0, "of the random draws", at_least=0)
    parallel: int = setting(0, "jobs at a time; 0: all", at_least=0)

    def check(self) -> None:
        if not self.config:
            raise UserError("config must name the settings that all trials share, such as 'config: configs/an4.yaml'")
        if not re.fullmatch(r"\w[\w.+=,-]*", self.name):
            raise UserError(f"name must be a directory's, letters, digits and '_.-' only, not {self.name!r}")
        if self.search == "random" and not self.trials:
            raise UserError("trials must say how many to draw for 'search: random', such as 'trials: 20'")
        if self.search == "grid" and (self.trials or self.seed):
            raise UserError("trials and seed are for 'search: random': a grid tries every combination once")


@dataclass(frozen=True, kw_only=True)
class Sweep(Options):
    """A sweep's file, together with the settings of the command line."""

    settings: dict[str, list[str] | Range]
    overrides: list[str]  # the same for all trials: `fixed`, then the command line


def read_sweep(path: Path, overrides: Sequence[str] = ()) -> Sweep:
    """Reads and checks a sweep's file; `overrides` are settings (--section.key=value) for all of its trials.

    Raises:
        UserError: an unreadable file, an unknown key or setting, a wrong value.
    """
    tree = read_yaml(path)
    keys = [*(field.name for field in dataclasses.fields(Options)), "settings", "fixed"]
    for key in tree:
        if key not in keys:
            raise UserError(f"unknown key {key!r} in {path}; {nearest(key, keys)}")
    mappings = {key: tree.pop(key, "") or {} for key in ("settings", "fixed")}
    options = from_dict(Options, {"name": path.stem} | tree, str(path))
    defaults = flatten(load_config(Path(options.config), overrides))
    varied, fixed = (_settings(mappings[key], key, defaults, path) for key in mappings)
    if not varied:
        raise UserError(f"{path} varies nothing: add 'settings:' with 'optim.learning_rate: [1e-3, 2e-3]' below it")
    for name in varied:
        if name in fixed:
            raise UserError(f"{name} is under both settings and fixed in {path}: remove it from one")
        if any(override.startswith(f"--{name}=") for override in overrides):
            raise UserError(f"--{name} is varied by the sweep: change it in {path}")
    every_trial = [*(f"--{name}={_text(value, name)}" for name, value in fixed.items()), *overrides]
    choices = {name: _choices(name, value, options.search, defaults[name]) for name, value in varied.items()}
    return Sweep(**vars(options), settings=choices, overrides=every_trial)


def _settings(mapping: Any, key: str, defaults: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The settings under `key`, each with a known name."""
    if not isinstance(mapping, dict):
        raise UserError(f"{key} in {path} must hold settings by their names, such as 'train.epochs: 3'")
    for name in mapping:
        if name not in defaults:
            raise UserError(f"unknown setting {name!r} under {key} in {path}; {suggest(Config, name, defaults)}")
        if name == "run.name" or (name == "run.dir" and key == "settings"):
            raise UserError(f"{name} cannot be under {key} in {path}: each trial has a directory of its own")
    return mapping


def _text(value: Any, name: str) -> str:
    """A value as --section.key=value takes it."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return ",".join(value)
    raise UserError(f"{name} must be a value or a list of values, not {value!r}")


def _choices(name: str, value: Any, search: str, default: Any) -> list[str] | Range:
    """The values that a setting may have: a list, or a range to draw from."""
    if isinstance(value, dict):
        if search == "grid":
            raise UserError(f"{name} is a range, which 'search: grid' cannot list: give values, or 'search: random'")
        return _range(name, value, type(default))
    if not isinstance(value, list) or not value:
        raise UserError(f"{name} must be a list of values to try, such as [1e-3, 2e-3], not {value!r}")
    return [_text(item, name) for item in value]


def _range(name: str, given: Mapping[str, Any], kind: type) -> Range:
    keys = ("min", "max", "scale")
    for key in given:
        if key not in keys:
            raise UserError(f"unknown key {key!r} in the range of {name}; {nearest(key, keys)}")
    if kind not in (int, float):
        raise UserError(f"{name} is not a number, so it has no range: give a list of values to draw from")
    if not {"min", "max"} <= given.keys():
        raise UserError(f"the range of {name} needs both ends, such as {{min: 1e-4, max: 1e-2, scale: log}}")
    scale = given.get("scale", "linear")
    Setting(name=f"scale of {name}", choices=("linear", "log")).read(scale)
    least = 0 if scale == "log" else -math.inf
    low, high = (Setting(name=f"{key} of {name}", type=kind, above=least).read(given[key]) for key in ("min", "max"))
    if low >= high:
        raise UserError(f"min of {name} must be below its max, not {low:g} and {high:g}")
    return Range(low, high, log=scale == "log", whole=kind is int)


# ---- the trials ----------------------------------------------------------------------------------------------------


def trial_values(sweep: Sweep) -> Iterator[Values]:
    """The values of each trial. In a grid the last setting changes fastest."""
    if sweep.search == "random":
        return itertools.islice(_random_values(sweep), sweep.trials)
    lists = typing.cast("dict[str, list[str]]", sweep.settings)
    return (dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values()))


def _random_values(sweep: Sweep) -> Iterator[Values]:
    """Random trials without end, no two alike."""
    seen: list[Values] = []
    for trial in itertools.count():
        draws = ({name: _draw(sweep, name, trial, n) for name in sweep.settings} for n in range(MAX_DRAWS))
        values = next((drawn for drawn in draws if drawn not in seen), None)
        if values is None:
            raise UserError(
                f"trials = {sweep.trials}, but only about {len(seen)} different ones can be drawn: lower it, or use "
                "'search: grid'"
            )
        seen.append(values)
        yield values


def _draw(sweep: Sweep, name: str, trial: int, attempt: int) -> str:
    # Of the random module, Python only guarantees that `random()` of a seed stays the same in later versions.
    position = random.Random(f"{sweep.seed}/{trial}/{attempt}/{name}").random()
    choices = sweep.settings[name]
    return choices.at(position) if isinstance(choices, Range) else choices[int(position * len(choices))]


def short_names(names: Collection[str]) -> dict[str, str]:
    """The last part of each setting's name where it is unique, else the whole name."""
    counts = Counter(name.rpartition(".")[2] for name in names)
    return {name: name if counts[key := name.rpartition(".")[2]] > 1 else key for name in names}


def trial_name(values: Values) -> str:
    """`learning_rate=1e-3,dropout=0.1`: a directory name, different for different values."""
    short, parts = short_names(values), []
    for name, value in values.items():
        shown = re.sub(r"[^\w.+-]+", "-", value).strip("-") if value else "none"
        parts.append(f"{short[name]}={shown}")
    label = ",".join(parts)
    exact = all(re.fullmatch(r"[\w.+-]+", value) and value != "none" for value in values.values())
    if exact and len(label) <= NAME_CHARACTERS:
        return label
    digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()[:6]
    return f"{label[: NAME_CHARACTERS - 7]}@{digest}"


@dataclass(frozen=True)
class Trial:
    """One training of a sweep."""

    name: str
    values: Values
    config: Config

    @property
    def run(self) -> Path:
        return Path(self.config.run.dir) / self.config.run.name


def make_trials(sweep: Sweep) -> list[Trial]:
    """The trials with their settings, all of them checked.

    Raises:
        UserError: wrong settings, the same settings in two trials, or other settings than those of an existing run.
    """
    folder = Path(load_config(Path(sweep.config), sweep.overrides).run.dir) / sweep.name
    trials: dict[str, Trial] = {}
    for values in trial_values(sweep):
        name = trial_name(values)
        settings = {"run.dir": str(folder), "run.name": name} | values
        try:
            config = load_config(
                Path(sweep.config), [*sweep.overrides, *(f"--{key}={settings[key]}" for key in settings)]
            )
        except UserError as error:
            raise UserError(f"trial {name}: {error}") from None
        trial, same_settings = Trial(name, values, config), repr(dataclasses.replace(config, run=Run()))
        if same_settings in trials:
            raise UserError(f"trials {trials[same_settings].name} and {name} have the same settings: remove one value")
        _refuse_other_settings(trial)
        trials[same_settings] = trial
    return list(trials.values())


def _refuse_other_settings(trial: Trial) -> None:
    """A ranking must not compare runs that were trained before and after a change of the sweep's other settings."""
    if not (trial.run / "config.yaml").is_file():
        return
    for name, ours, theirs in differences(trial.config, load_config(trial.run / "config.yaml")):
        if (name, ours) != ("train.precision", "auto"):  # the run's file holds what it was resolved to
            raise UserError(
                f"{trial.run} was started with {name} = {theirs!r}, and the sweep now says {ours!r}: set it back, "
                "give the sweep another name, or remove that directory"
            )
