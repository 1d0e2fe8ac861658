"""What a sweep tries: a file that names settings and values -> trials, each with a directory name and a checked Config.

    sweep = read_sweep(Path("configs/sweeps/an4.yaml"))
    trials = plan(sweep, ["--train.epochs=3"])       # Trial(name="000-learning_rate=1e-3", values, config) ...

A trial is known by its values and not by its number: a sweep that is given more values keeps the trials it had, in
their directories, and random trials are drawn each by itself, so that more of them, or another setting beside, change
none of the former.
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddp_asr.config import Config, Run, config_from_dict, load_config
from ddp_asr.errors import UserError
from ddp_asr.settings import convert, declared, differences, flatten, nearest, read_yaml, suggest

LABEL_CHARACTERS = 60  # of a run's name, which is a directory's and an argument's
DRAWS_A_TRIAL = 1000  # before a trial unlike the others is given up


# ---- the file ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Range:
    """Numbers to draw from, both ends included."""

    minimum: float
    maximum: float
    log: bool
    whole: bool

    def at(self, share: float) -> str:
        """The value `share` (0 up to 1) of the way up, as text with the digits that matter."""
        low, high = self.minimum, self.maximum + self.whole
        value = low * (high / low) ** share if self.log else low + share * (high - low)
        if self.whole:
            return str(min(math.floor(value), int(self.maximum)))
        digits = 3 + int(math.log10(max(abs(low), abs(high)) / (high - low)))
        text = f"{value:.{digits}g}"
        return text if low <= float(text) <= high else repr(low if float(text) < low else high)


Values = dict[str, str]  # of the settings that vary, as texts for load_config


@dataclass(frozen=True)
class Sweep:
    """What SWEEP.yaml asks for."""

    config: Path
    name: str
    search: str
    trials: int
    seed: int
    parallel: int
    settings: dict[str, list[str] | Range]
    fixed: Values


_KEYS = tuple(field.name for field in dataclasses.fields(Sweep))


def read_sweep(path: Path) -> Sweep:
    """Reads and checks a sweep's file.

    Raises:
        UserError: an unreadable file, an unknown key or setting, a value that is none.
    """
    tree = read_yaml(path)
    for key in tree:
        if key not in _KEYS:
            raise UserError(f"unknown key {key!r} in {path}; {nearest(key, _KEYS)}")
    if not tree.get("config"):
        raise UserError(f"{path} names no config: add 'config: configs/an4.yaml', the settings that all trials share")
    texts = {key: convert(tree.get(key, default), str, key) for key, default in (("config", ""), ("name", path.stem))}
    if not re.fullmatch(r"[\w.+=,-]+", texts["name"]) or texts["name"].startswith("."):
        raise UserError(f"name must be that of a directory, letters, digits and '_.-' only, not {texts['name']!r}")
    search = tree.get("search", "grid")
    if search not in ("grid", "random"):
        raise UserError(f"search must be grid or random, not {search!r}")
    if search == "grid" and (given := [key for key in ("trials", "seed") if key in tree]):
        raise UserError(f"{given[0]} in {path} is for 'search: random': a grid tries every combination once")
    counts = {key: _count(tree.get(key, "0"), key) for key in ("trials", "seed", "parallel")}
    if search == "random" and not counts["trials"]:
        raise UserError(f"{path} must say how many trials to draw, such as 'trials: 20'")
    fixed = {name: _text(value, name) for name, value in _mapping(tree, "fixed", path).items()}
    settings = {name: _choice(name, value, search) for name, value in _mapping(tree, "settings", path).items()}
    if not settings:
        raise UserError(f"{path} varies nothing: add 'settings:' with 'optim.learning_rate: [1e-3, 2e-3]' below it")
    for name in settings.keys() & fixed.keys():
        raise UserError(f"{name} stands under both settings and fixed in {path}: take it out of one")
    return Sweep(Path(texts["config"]), texts["name"], search, **counts, settings=settings, fixed=fixed)


def _count(value: Any, key: str) -> int:
    count = convert(value, int, key)
    if count < 0:
        raise UserError(f"{key} must be 0 or more, not {count}")
    return count


def _mapping(tree: Mapping[str, Any], key: str, path: Path) -> dict[str, Any]:
    """The settings under `key`, each of a name that there is."""
    mapping = tree.get(key) or {}
    if not isinstance(mapping, dict):
        raise UserError(f"{key} in {path} must hold settings by their names, such as 'train.epochs: 3'")
    known = [each.name for each in declared(Config)]
    for name in mapping:
        if name not in known:
            raise UserError(f"unknown setting {name!r} under {key} in {path}; {suggest(Config, name)}")
        if name == "run.name" or (name == "run.dir" and key == "settings"):
            raise UserError(f"{name} cannot stand under {key} in {path}: each trial has a directory of its own")
    return mapping


def _text(value: Any, name: str) -> str:
    """A value as --section.key=value takes it."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, str) for part in value):
        return ",".join(value)
    raise UserError(f"{name} must be a value or a list of values, not {value!r}")


def _choice(name: str, value: Any, search: str) -> list[str] | Range:
    """What a setting may become: a list of values, or a range to draw from."""
    if isinstance(value, dict):
        if search == "grid":
            raise UserError(f"{name} is a range, which 'search: grid' cannot list: give values, or 'search: random'")
        return _range(name, value)
    if not isinstance(value, list) or not value:
        raise UserError(f"{name} must be a list of values to try, such as [1e-3, 2e-3], not {value!r}")
    return [_text(item, name) for item in value]


def _range(name: str, given: Mapping[str, Any]) -> Range:
    keys = ("min", "max", "scale")
    for key in given:
        if key not in keys:
            raise UserError(f"unknown key {key!r} in the range of {name}; {nearest(key, keys)}")
    kind = _type_of(name)
    if kind not in (int, float):
        raise UserError(f"{name} is no number, so it has no range: give a list of values to draw from")
    if not {"min", "max"} <= given.keys():
        raise UserError(f"the range of {name} needs both ends, such as {{min: 1e-4, max: 1e-2, scale: log}}")
    low, high = (convert(given[key], kind, f"{key} of {name}") for key in ("min", "max"))
    scale = given.get("scale", "linear")
    if scale not in ("linear", "log"):
        raise UserError(f"the scale of {name} must be linear or log, not {scale!r}")
    if not -math.inf < low < high < math.inf:
        raise UserError(f"the range of {name} must go up: min = {low:g} is not below max = {high:g}")
    if scale == "log" and low <= 0:
        raise UserError(f"the range of {name} must lie above 0 for 'scale: log', and min is {low:g}")
    return Range(low, high, log=scale == "log", whole=kind is int)


def _type_of(name: str) -> Any:
    return next(each.type for each in declared(Config) if each.name == name)


# ---- the trials ----------------------------------------------------------------------------------------------------


def trials_of(sweep: Sweep) -> list[Values]:
    """The values of each trial, in the order of their numbers."""
    if sweep.search == "random":
        return list(itertools.islice(_draws(sweep), sweep.trials))
    lists = typing.cast("dict[str, list[str]]", sweep.settings)
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def _draws(sweep: Sweep) -> Iterator[Values]:
    """Random trials, each another one; more of them, or another setting beside, leave the former as they were."""
    seen: list[Values] = []
    for trial in itertools.count():
        for attempt in range(DRAWS_A_TRIAL):
            values = {name: _draw(sweep, name, trial, attempt) for name in sweep.settings}
            if values not in seen:
                break
        else:
            raise UserError(
                f"trials = {sweep.trials}, but only about {len(seen)} different ones can be drawn: lower it, or use "
                "'search: grid'"
            )
        seen.append(values)
        yield values


def _draw(sweep: Sweep, name: str, trial: int, attempt: int) -> str:
    # Python promises the same `random()` of a seed for ever, and of nothing else in that module.
    share = random.Random(f"{sweep.seed}/{trial}/{attempt}/{name}").random()
    choice = sweep.settings[name]
    return choice.at(share) if isinstance(choice, Range) else choice[int(share * len(choice))]


def label_of(values: Values) -> str:
    """`learning_rate=1e-3,dropout=0.1`: what a trial is known by, another for any other values."""
    keys = Counter(name.rpartition(".")[2] for name in values)
    parts = []
    for name, value in values.items():
        key = name.rpartition(".")[2]
        shown = re.sub(r"[^\w.+-]+", "-", value).strip("-") if value else "none"
        parts.append(f"{key if keys[key] == 1 else name}={shown}")
    label = ",".join(parts)
    exact = all(re.fullmatch(r"[\w.+-]+", value) and value != "none" for value in values.values())
    if exact and len(label) <= LABEL_CHARACTERS:
        return label
    digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()[:6]
    return f"{label[: LABEL_CHARACTERS - 7]}@{digest}"


def names_of(trials: Sequence[Values], taken: Iterable[str]) -> list[str]:
    """A directory name a trial: number and label. Trials that already have a directory keep it (`taken`)."""
    known = {found[1]: name for name in sorted(taken) if (found := re.fullmatch(r"\d{3,}-(.+)", name))}
    labels = [label_of(values) for values in trials]
    used = {name.partition("-")[0] for name in known.values()}
    further = (str(n).zfill(3) for n in itertools.count(len(trials)))
    names = []
    for index, label in enumerate(labels):
        if label not in known:
            own = str(index).zfill(3)
            digits = own if own not in used else next(n for n in further if n not in used)
            used.add(digits)
            known[label] = f"{digits}-{label}"
        names.append(known[label])
    return names


@dataclass(frozen=True)
class Trial:
    """One training of a sweep."""

    name: str
    values: Values
    config: Config

    @property
    def run(self) -> Path:
        return Path(self.config.run.dir) / self.config.run.name


def plan(sweep: Sweep, overrides: Sequence[str] = ()) -> list[Trial]:
    """The trials with their settings, every one of them checked.

    Raises:
        UserError: settings that are wrong, alike in two trials, or others than a run in the directory was begun with.
    """
    for name in sweep.settings:
        if any(override.startswith(f"--{name}=") for override in overrides):
            raise UserError(f"--{name} is what the sweep varies: change it in the sweep's file")
    base = load_config(sweep.config, [*(f"--{name}={value}" for name, value in sweep.fixed.items()), *overrides])
    folder = Path(base.run.dir) / sweep.name
    values_of = trials_of(sweep)
    names = names_of(values_of, [path.name for path in folder.iterdir()] if folder.is_dir() else [])
    trials = []
    for name, values in zip(names, values_of, strict=True):
        settings = flatten(base) | {"run.dir": str(folder), "run.name": name} | values
        try:
            trials.append(Trial(name, values, config_from_dict(settings, str(sweep.config))))
        except UserError as error:
            raise UserError(f"trial {name}: {error}") from None
    _refuse_alike(trials)
    _refuse_others(trials)
    return trials


def _refuse_alike(trials: Iterable[Trial]) -> None:
    seen: dict[str, str] = {}
    for trial in trials:
        settings = repr(dataclasses.replace(trial.config, run=Run()))
        if settings in seen:
            raise UserError(
                f"trials {seen[settings]} and {trial.name} have the same settings: remove one of the values"
            )
        seen[settings] = trial.name


def _refuse_others(trials: Iterable[Trial]) -> None:
    """A ranking must not mix in what was trained before the sweep's file was changed."""
    for trial in trials:
        if not (trial.run / "config.yaml").is_file():
            continue
        for name, ours, theirs in differences(trial.config, load_config(trial.run / "config.yaml")):
            if (name, ours) != ("train.precision", "auto"):  # what it became stands in the run's file
                raise UserError(
                    f"{trial.run} was begun with {name} = {theirs!r}, and the sweep now says {ours!r}: set it back, "
                    "give the sweep another name, or remove that directory"
                )
