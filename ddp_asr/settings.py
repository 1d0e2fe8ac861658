"""The settings engine: frozen dataclasses declare settings; YAML and `--section.key=value` give the values.

    @dataclass(frozen=True)
    class Oven:
        \"\"\"Baking in an oven.\"\"\"
        kind: ClassVar[str] = "oven"
        degrees: float = setting(180.0, "temperature in Celsius", above=0, at_most=300, also_called=("temp",))

    @dataclass(frozen=True)
    class Cake:
        bake: Oven | Steamer = section(Oven, shapes_result=True)   # `bake: {kind: oven, degrees: 200}`

    cake = load(Cake, Path("cake.yaml"), ["--bake.kind=oven", "--bake.degrees=200"])
    describe(cake)                                                 # YAML text that gives the same settings again

A setting stands under its dotted name at any depth. Values are read into a flat dict {dotted name: text}, the command
line over the file; then the classes are built from it. Each text is converted by the declared type of its field and not
by YAML, because YAML 1.1 reads `off` as False, `5e-4` as a text and `0123` as 83.

A section whose classes have a `kind` is a choice between them. Its `kind` decides which class is built and which names
are valid. A method `check` of a class is called when its settings are converted and within their bounds; it raises a
UserError for values that do not go together.

The engine knows nothing of what is being set, and imports no torch: launchers read settings on login nodes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import math
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from unicodedata import category

import yaml

from ddp_asr.errors import UserError

T = TypeVar("T")
Flat = Mapping[str, Any]  # dotted name -> value, usually a text


# ---- declaring -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """What a field declares beside its type and default. Bounds of a list hold for each of its items."""

    meaning: str = ""
    above: float = -math.inf
    at_least: float = -math.inf
    below: float = math.inf
    at_most: float = math.inf
    choices: tuple[str, ...] = ()
    not_empty: bool = False  # of a text or a list
    shapes_result: bool = False  # on a section: everything in it does
    also_called: tuple[str, ...] = ()  # names in other programs, for the hint beside an unknown name

    @property
    def allowed(self) -> str:
        """The choices or the range in words, to follow "must be"; empty: any value of the type."""
        if self.choices:
            return f"{'one of ' if len(self.choices) > 1 else ''}{', '.join(self.choices)}"
        if self.at_least > -math.inf and self.at_most < math.inf:
            return f"between {self.at_least:g} and {self.at_most:g}"
        if (self.above, self.below, self.at_most) == (-math.inf, math.inf, math.inf) and self.at_least > -math.inf:
            return f"{self.at_least:g} or more"
        ends = {"above": self.above, "at least": self.at_least, "below": self.below, "at most": self.at_most}
        return " and ".join(f"{words} {end:g}" for words, end in ends.items() if math.isfinite(end))

    def admits(self, value: Any) -> bool:
        """Whether one value, no list, is a choice or within the bounds."""
        if isinstance(value, str):
            return not self.choices or value in self.choices
        return self.above < value < self.below and self.at_least <= value <= self.at_most


def setting(default: Any, meaning: str, **declared: Any) -> Any:
    """A field of a settings class; `declared` are fields of Setting, such as `above=0`."""
    metadata = {"setting": Setting(meaning, **declared)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(default: type, **declared: Any) -> Any:
    """A field that holds another settings class; of a choice of kinds, `default` is the one that no `kind` means."""
    return field(default_factory=default, metadata={"setting": Setting(**declared)})


@dataclass(frozen=True)
class _Part:
    """A field of a settings class: a section if it has `kinds`, else a setting."""

    key: str
    type: Any
    default: Any
    setting: Setting
    kinds: dict[str, type]  # "": a section without a choice

    def chosen(self, name: str, flat: Flat) -> type:
        """The class that `NAME.kind` chooses."""
        if "" in self.kinds:
            return self.kinds[""]
        kind = convert(flat.get(f"{name}.kind", self.default.kind), str, f"{name}.kind")
        check_bounds(kind, Setting(choices=tuple(self.kinds)), f"{name}.kind")
        return self.kinds[kind]


@functools.cache
def _parts(cls: type) -> tuple[_Part, ...]:
    hints = typing.get_type_hints(cls)
    parts = []
    for each in dataclasses.fields(cls):
        hint = hints[each.name]
        classes = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        sections = all(dataclasses.is_dataclass(one) for one in classes)
        kinds = {getattr(one, "kind", ""): one for one in classes} if sections else {}
        default = each.default if each.default_factory is dataclasses.MISSING else each.default_factory()
        parts.append(_Part(each.name, hint, default, each.metadata["setting"], kinds))
    return tuple(parts)


@dataclass(frozen=True)
class Declared:
    """A setting where it stands."""

    name: str
    type: Any
    default: Any
    setting: Setting
    shapes_result: bool


def declared(
    cls: type, flat: Flat = types.MappingProxyType({}), prefix: str = "", shapes: bool = False
) -> Iterator[Declared]:
    """Every setting of `cls` in order, of the kinds that `flat` chooses."""
    for part in _parts(cls):
        name, shapes_result = prefix + part.key, shapes or part.setting.shapes_result
        if not part.kinds:
            yield Declared(name, part.type, part.default, part.setting, shapes_result)
            continue
        if "" not in part.kinds:
            kind = Setting(f"which kind of {part.key}", choices=tuple(part.kinds))
            yield Declared(f"{name}.kind", str, part.default.kind, kind, shapes_result)
        yield from declared(part.chosen(name, flat), flat, f"{name}.", shapes_result)


# ---- reading -------------------------------------------------------------------------------------------------------


def load(cls: type[T], path: Path | None, overrides: Sequence[str] = ()) -> T:
    """The settings in the YAML file `path` (None: the defaults) with `--section.key=value` texts on top.

    Raises:
        UserError: an unreadable file, an unknown name, or a value of the wrong type or out of its range.
    """
    in_file = {} if path is None else _flattened(read_yaml(path), str(path))
    on_top = dict(_override(cls, text) for text in overrides)
    flat = in_file | on_top
    _refuse_unknown(cls, in_file, flat, str(path))
    _refuse_unknown(cls, on_top, flat, "the command line")
    built: T = _build(cls, flat)
    return built


def from_dict(cls: type[T], tree: Mapping[str, Any], origin: str) -> T:
    """The settings in a nested dict, or one by dotted names; checked like a file, which errors call `origin`."""
    flat = _flattened(tree, origin)
    _refuse_unknown(cls, flat, flat, origin)
    built: T = _build(cls, flat)
    return built


class _TextLoader(yaml.SafeLoader):
    """Keeps every value as its text, and refuses a key that is given twice, where YAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    problem = f"{key_node.value!r} is given twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
                seen.add(key_node.value)
        return super().construct_mapping(node, deep)


_TextLoader.yaml_implicit_resolvers = {}  # they turn texts into truth values, numbers and dates


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, with every value in it still a text; {} for an empty file.

    Raises:
        UserError: the file cannot be read, or holds no mapping.
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
        raise UserError(f"{path} must hold settings by their names, each as 'name: value'")
    return tree


def _flattened(tree: Mapping[str, Any], origin: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        below = {"": value}
        if isinstance(value, Mapping) and value:
            below = {f".{name}": inner for name, inner in _flattened(value, origin).items()}
        for end, inner in below.items():
            if f"{key}{end}" in flat:
                raise UserError(f"{key}{end} is given twice in {origin}: remove one of the two")
            flat[f"{key}{end}"] = inner
    return flat


def _override(cls: type, text: str) -> tuple[str, Any]:
    """(name, value) of `--section.key=value`; a value such as `[a, 'b, c']` is read as a YAML list."""
    name, separator, value = text.removeprefix("--").partition("=")
    known = {each.name: each for each in declared(cls)}
    if not (text.startswith("--") and separator and ("." in name or name in known)):
        likely = _candidates(cls, name, known)
        example = f"{likely[0]}={value or known[likely[0]].default}" if likely else _example(cls)
        raise UserError(f"{text!r} is no setting: write --section.key=value, for instance --{example}")
    try:
        return name, yaml.load(value, Loader=_TextLoader) if value[:1] == "[" else value
    except yaml.YAMLError:
        return name, value


def _example(cls: type) -> str:
    """`name=value` of the first number, for a message that shows how a setting is written."""
    first = min(declared(cls), key=lambda each: each.type not in (int, float))
    return f"{first.name}={first.default}"


def _build(cls: type, flat: Flat, prefix: str = "") -> Any:
    values = {}
    for part in _parts(cls):
        name = prefix + part.key
        if part.kinds:
            values[part.key] = _build(part.chosen(name, flat), flat, f"{name}.")
        elif name in flat:
            values[part.key] = value = convert(flat[name], part.type, name)
            check_bounds(value, part.setting, name)
            _refuse_control_characters(value, name)
    built = cls(**values)
    if hasattr(built, "check"):
        built.check()
    return built


def convert(value: Any, kind: Any, name: str) -> Any:
    """`value`, a text or already of a plain type, as the type `kind`; a UserError that says `name` otherwise."""
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
    """Accepts texts such as 1e3, but reads digits without a float in between, which would round large seeds."""
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


def check_bounds(value: Any, setting: Setting, name: str) -> None:
    """Raises a UserError unless `value`, or each of its items, is finite and one that `setting` allows."""
    if setting.not_empty and not value:
        raise UserError(f"{name} must not be empty: give at least one value ({setting.meaning})")
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, float) and not math.isfinite(item):
            raise UserError(f"{name} must be a finite number, not {value!r}")
        if not setting.admits(item):
            close = difflib.get_close_matches(str(item), setting.choices, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UserError(f"{name} must be {setting.allowed}, not {value!r}{hint}")


def _refuse_control_characters(value: Any, name: str) -> None:
    """YAML turns some line separators into spaces, so that a saved file would not give the same settings."""
    for text in value if isinstance(value, list) else [value]:
        for broken in (c for c in text if category(c) in ("Cc", "Zl", "Zp")) if isinstance(text, str) else ():
            raise UserError(f"{name} holds the control character {broken!r}: take it out of {value!r}")


# ---- unknown names -------------------------------------------------------------------------------------------------


def _refuse_unknown(cls: type, given: Flat, flat: Flat, origin: str) -> None:
    """Raises a UserError for a name in `given` that `cls` does not have with the kinds that `flat` chooses."""
    known = {each.name for each in declared(cls, flat)}
    for name, value in given.items():
        if name in known:
            continue
        inside = [each for each in known if each.startswith(f"{name}.")]
        if not inside:
            kind = _kind_above(cls, name, flat)
            raise UserError(f"unknown setting {name!r} in {origin}{kind}; {suggest(cls, name, flat)}")
        if value not in ("", {}):
            example = next(each.name for each in declared(cls, flat) if each.name in inside)
            raise UserError(f"{name} in {origin} is a section, not {value!r}: name a setting in it, such as {example}")


def _kind_above(cls: type, name: str, flat: Flat) -> str:
    """ ", where bake.kind is 'oven'", if the unknown name stands in a section that could be of another kind."""
    kinds = [each for each in declared(cls, flat) if each.name.endswith(".kind") and len(each.setting.choices) > 1]
    above = [each for each in kinds if name.startswith(each.name.removesuffix("kind"))]
    return f", where {above[-1].name} is {flat.get(above[-1].name, above[-1].default)!r}" if above else ""


def suggest(cls: type, name: str, flat: Flat = types.MappingProxyType({})) -> str:
    """What to say beside an unknown name: the settings that are probably meant, or all that stand beside it."""
    known = {each.name: each for each in declared(cls, flat)}
    found = _candidates(cls, name, known)
    if found:
        return f"did you mean {' or '.join(repr(each) for each in found[:3])}?"
    above = _resolved(cls, name).rpartition(".")[0]
    while above and not any(each.startswith(f"{above}.") for each in known):
        above = above.rpartition(".")[0]
    inside = f"{above}." if above else ""
    names = dict.fromkeys(each.removeprefix(inside).partition(".")[0] for each in known if each.startswith(inside))
    return f"known{' in ' + above if above else ''} are: {', '.join(names)}"


def _candidates(cls: type, name: str, known: Mapping[str, Declared]) -> list[str]:
    """Settings that an unknown name probably means.

    The same last part in any section counts most (`model.dropout`), then a name from other programs (`lr`), then
    the nearest spelling. So `train.lr` is `optim.learning_rate`, and not the `train.seed` that is spelled like it.
    """
    wanted = _resolved(cls, name)
    beside, _, key = wanted.rpartition(".")
    exact = [each for each in known if each.rpartition(".")[2] == key]
    other = [each.name for each in known.values() if key in each.setting.also_called]
    for found in (exact, other):
        if found:
            return [each for each in found if each.startswith(f"{beside}.")] or found
    inside = [each for each in known if each.startswith(f"{beside}.")]
    for names, least in ((inside, 0.65), (known, 0.8)):
        best = max(names, key=lambda each: _likeness(wanted, each), default="")
        if _likeness(wanted, best) >= least:
            return [best]
    return []


def _resolved(cls: type, name: str) -> str:
    """The name in lower case with `_` for `-`, and its section by our name if another program's is known."""
    head, dot, rest = name.replace("-", "_").lower().partition(".")
    ours = [part.key for part in _parts(cls) if part.kinds and head in part.setting.also_called]
    return (ours[0] if ours else head) + dot + rest


def _likeness(wanted: str, known: str) -> float:
    """0 to 1; a section that both stand in does not count, or any two settings in it would look alike."""
    ours, theirs = wanted.split("."), known.split(".")
    while len(ours) > 1 and len(theirs) > 1 and ours[0] == theirs[0]:
        ours, theirs = ours[1:], theirs[1:]
    pairs = [(".".join(ours), ".".join(theirs)), (ours[-1], theirs[-1])]
    return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)


def nearest(name: str, names: Iterable[str]) -> str:
    """What to say beside an unknown name: the one that is spelled most like it, or all there are."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(names)}"


# ---- writing -------------------------------------------------------------------------------------------------------


def to_dict(settings: Any) -> dict[str, Any]:
    """The settings as plain nested containers, as YAML files and checkpoints hold them."""
    tree: dict[str, Any] = {"kind": settings.kind} if hasattr(settings, "kind") else {}
    cls: type = type(settings)
    for part in _parts(cls):
        value = getattr(settings, part.key)
        tree[part.key] = to_dict(value) if part.kinds else list(value) if isinstance(value, list) else value
    return tree


def flatten(settings: Any) -> dict[str, Any]:
    """The value of every setting by its dotted name, in order."""
    return _flattened(to_dict(settings), "the settings")


def describe(settings: Any) -> str:
    """The settings as YAML text, which gives the same settings when it is loaded."""
    return yaml.safe_dump(to_dict(settings), sort_keys=False, allow_unicode=True, width=120)


def differences(ours: Any, theirs: Any) -> list[tuple[str, Any, Any]]:
    """(name, our value, their value) of every setting that shapes the result and differs.

    Where two sections are of different kinds, that is the difference, and settings that only one of them has are not.
    """
    mine, other = flatten(ours), flatten(theirs)
    shaping = [each.name for each in declared(type(ours), mine) if each.shapes_result and each.name in other]
    return [(name, mine[name], other[name]) for name in shaping if mine[name] != other[name]]


def help_text(cls: type) -> str:
    """Every setting with its default, meaning and range, and those of every kind, for an entry point's `--help`."""
    return "\n".join(_help_lines(cls, ""))


def _help_lines(cls: type, prefix: str) -> Iterator[str]:
    parts = _parts(cls)
    for part in (part for part in parts if not part.kinds):
        shown = ",".join(map(str, part.default)) if isinstance(part.default, list) else part.default
        yield from _help_entry(f"{prefix}{part.key}={shown}", part.setting)
    for part in (part for part in parts if part.kinds):
        name = prefix + part.key
        for kind, below in part.kinds.items():
            yield f"\n{name}: {(below.__doc__ or '').partition(chr(10))[0]}"
            if kind:
                choice = Setting(f"the kind with the settings below; default: {part.default.kind}")
                yield from _help_entry(f"{name}.kind={kind}", choice)
            yield from _help_lines(below, f"{name}.")


def _help_entry(name: str, setting: Setting) -> list[str]:
    text = f"{setting.meaning} ({setting.allowed})" if setting.allowed else setting.meaning
    return [f"  --{name}", *textwrap.wrap(text, 100, initial_indent=" " * 8, subsequent_indent=" " * 8)]
