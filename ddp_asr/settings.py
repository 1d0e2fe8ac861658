"""The settings engine: frozen dataclasses declare settings; YAML and `--section.key=value` give the values.

    @dataclass(frozen=True)
    class Oven:
        \"\"\"Baking in an oven.\"\"\"
        kind: str = field(default="oven", init=False)
        degrees: float = setting(180.0, "temperature in Celsius", above=0, at_most=300, also_called="temp")

    @dataclass(frozen=True)
    class Cake:
        bake: Oven | Steamer = section(Oven, shapes_result=True)   # `bake: {kind: oven, degrees: 200}`

    cake = load(Cake, Path("cake.yaml"), ["--bake.kind=oven", "--bake.degrees=200"])
    describe(cake)                                                 # YAML text that gives the same settings again

A setting stands under its dotted name at any depth. Values are read into a flat dict {dotted name: text}, the command
line over the file; then the classes are built from it. Each text is converted by the declared type of its field and not
by YAML, because YAML 1.1 reads `off` as False, `5e-4` as a text and `0123` as 83.

A section whose classes have a `kind` is a choice between them. Its `kind` decides which class is built and which names
are valid. A method `check` of a class is called when all settings are converted and within their bounds; it raises a
UserError for values that do not go together.

The engine knows nothing of what is being set, and imports no torch: launchers read settings on login nodes.
"""

from __future__ import annotations

import difflib
import functools
import math
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from unicodedata import category

import yaml

from ddp_asr.errors import UserError
from ddp_asr.files import open_input

T = TypeVar("T")
Flat = Mapping[str, Any]  # dotted name -> value, usually a text
DEFAULTS: Flat = types.MappingProxyType({})  # no value is given


# Of a number without a bound of its own. Beyond these nobody means what they have written, and a product or quotient of
# two such numbers leaves the range of float32.
LARGEST, SMALLEST = 1e9, 1e-12
MAX_DEPTH = 5  # of sections in sections


# ---- declaring -----------------------------------------------------------------------------------------------------


def _true_or_false(text: str) -> bool:
    return {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}[text.lower()]


def _whole_number(text: str) -> int:
    try:
        return int(text)  # without a float in between, which would round large seeds
    except ValueError:
        if not float(text).is_integer():  # 1e3 is a whole number, too
            raise
        return int(float(text))


def _finite_number(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError
    return float(text)


_TYPES: dict[Any, tuple[str, Any]] = {  # its name in messages, and how it is made from a text
    str: ("a text", str),
    bool: ("true or false", _true_or_false),
    int: ("a whole number", _whole_number),
    float: ("a finite number", _finite_number),
}


@dataclass(frozen=True)
class Setting:
    """A field of a settings class, a section too: what it declares, and where it stands. Bounds hold for each item."""

    meaning: str = ""
    above: float = -math.inf
    at_least: float = -math.inf
    below: float = math.inf
    at_most: float = math.inf
    choices: tuple[str, ...] = ()
    not_empty: bool = False  # of a text or a list
    shapes_result: bool = False  # of a section: everything in it does
    also_called: str = ""  # names in other programs, with spaces between, for the hint beside an unknown name
    # The engine adds these.
    name: str = ""
    type: Any = str
    default: Any = ""

    @property
    def kinds(self) -> dict[str, type]:
        """The classes of a section by kind, "" where there is no choice; {}: this is no section."""
        classes = typing.get_args(self.type) if isinstance(self.type, types.UnionType) else (self.type,)
        return {getattr(one, "kind", ""): one for one in classes if is_dataclass(one)}

    @property
    def allowed(self) -> str:
        """The choices or the range in words, to follow "must be"; empty: any value of the type."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        ends = {"above": self.above, "at least": self.at_least, "below": self.below, "at most": self.at_most}
        shown = {words: f"{end:,}" if isinstance(end, int) else f"{end:g}" for words, end in ends.items()}
        return " and ".join(f"{words} {shown[words]}" for words, end in ends.items() if math.isfinite(end))

    def read(self, value: Any) -> Any:
        """`value`, a text or already of a plain type, as this setting's type; a UserError if it is not allowed."""
        if self.not_empty and not value:
            raise UserError(f"{self.name} must not be empty: give at least one value ({self.meaning})")
        if typing.get_origin(self.type) is not list:
            return self._read_item(value, self.type)
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",")] if value else []
        (kind,) = typing.get_args(self.type)
        return [self._read_item(item, kind) for item in (value if isinstance(value, list) else [value])]

    def _read_item(self, value: Any, kind: Any) -> Any:
        words, convert = _TYPES[kind]
        try:
            if isinstance(value, list | dict):
                raise ValueError
            item = convert(str(value))
        except (ValueError, KeyError):
            raise UserError(f"{self.name} must be {words}, not {value!r}") from None
        if isinstance(item, str):
            allowed = not self.choices or item in self.choices
        else:
            allowed = self.above < item < self.below and self.at_least <= item <= self.at_most
        if not allowed:
            raise UserError(f"{self.name} must be {self.allowed}, not {item!r}")
        if not isinstance(item, str):
            self._refuse_what_nobody_means(item)
        return item

    def _refuse_what_nobody_means(self, number: float) -> None:
        if (number > LARGEST and self.at_most == math.inf) or (number < -LARGEST and self.at_least == -math.inf):
            raise UserError(f"{self.name} must be at most {LARGEST:g} in size, not {number!r}")
        if isinstance(number, float) and 0 < abs(number) < SMALLEST:
            raise UserError(f"{self.name} must be 0 or at least {SMALLEST:g} in size, not {number!r}")


def setting(default: Any, meaning: str, **declared: Any) -> Any:
    """A field of a settings class; `declared` are fields of Setting, such as `above=0`."""
    metadata = {"setting": Setting(meaning, **declared)}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(default: type, **declared: Any) -> Any:
    """A field that holds another settings class; of a choice of kinds, `default` is the one that no `kind` means."""
    return field(default_factory=default, metadata={"setting": Setting(**declared)})


@functools.cache
def _fields(cls: type) -> list[Setting]:
    types_of, default = typing.get_type_hints(cls), cls()
    return [
        replace(each.metadata["setting"], name=each.name, type=types_of[each.name], default=getattr(default, each.name))
        for each in fields(cls)
        if each.init  # `kind` is the engine's
    ]


def declared(cls: type, flat: Flat = DEFAULTS, prefix: str = "", shapes_result: bool = False) -> Iterator[Setting]:
    """Every setting of `cls` in order, by its dotted name, of the kinds that `flat` chooses."""
    for found in _fields(cls):
        each = replace(found, name=prefix + found.name, shapes_result=shapes_result or found.shapes_result)
        if not each.kinds:
            yield each
            continue
        chosen = type(each.default)
        if "" not in each.kinds:
            kind = Setting(
                f"which kind of {found.name}",
                choices=tuple(each.kinds),
                shapes_result=each.shapes_result,
                name=f"{each.name}.kind",
                default=each.default.kind,
            )
            yield kind
            chosen = each.kinds[kind.read(flat.get(kind.name, kind.default))]
        yield from declared(chosen, flat, f"{each.name}.", each.shapes_result)


# ---- reading -------------------------------------------------------------------------------------------------------


def load(cls: type[T], path: Path | None, overrides: Sequence[str] = ()) -> T:
    """The settings in the YAML file `path` (None: the defaults) with `--section.key=value` texts on top.

    Raises:
        UserError: an unreadable file, an unknown name, or a value of the wrong type or out of its range.
    """
    return from_dict(cls, {} if path is None else read_yaml(path), str(path), overrides)


def from_dict(cls: type[T], tree: Mapping[str, Any], origin: str, overrides: Sequence[str] = ()) -> T:
    """The settings in a nested dict, or one by dotted names; checked like a file, which errors call `origin`."""
    given = _flattened(tree, origin)
    on_top = dict(_override(cls, text) for text in overrides)
    flat = given | on_top
    known = {each.name: each for each in declared(cls, flat)}
    _refuse_unknown(cls, known, given, flat, origin)
    _refuse_unknown(cls, known, on_top, flat, "the command line")
    values = {name: each.read(flat[name]) for name, each in known.items() if name in flat}
    for name, value in values.items():
        # YAML turns some of these into spaces and cannot write others: a saved file would give other settings.
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and any(category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text):
                raise UserError(f"{name} must be without control characters, not {text!r}")
    built: T = _build(cls, values)
    return built


class _TextLoader(yaml.SafeLoader):
    """Keeps every value as its text, and refuses a key that is given twice, where YAML silently takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
            seen.append(key.value)
        return super().construct_mapping(node, deep)


# What yaml raises for a text: of its own, for other encodings, for values of an explicit tag, for [[[[...
BAD_YAML = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError)
_TextLoader.yaml_implicit_resolvers = {}  # they turn texts into truth values, numbers and dates


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, with every value in it still a text; {} for an empty file.

    Raises:
        UserError: the file cannot be read, or holds no mapping.
    """
    try:
        with open_input(path) as file:
            tree = yaml.load(file.read().decode(), Loader=_TextLoader) or {}
    except OSError as error:
        raise UserError(f"cannot read the settings {path}: {error.strerror}; give the path of a YAML file") from None
    except BAD_YAML as error:
        raise UserError(f"{path} is no valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold settings by their names, each as 'name: value'")
    return tree


def _flattened(tree: Mapping[str, Any], origin: str, prefix: str = "") -> dict[str, Any]:
    if prefix.count(".") > MAX_DEPTH:  # YAML's aliases can make a mapping its own part
        raise UserError(f"{origin} has sections in sections, more than {MAX_DEPTH} deep: {prefix[:100]}")
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        below = _flattened(value, origin, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
        for twice in flat.keys() & below.keys():
            raise UserError(f"{twice} is given twice in {origin}: remove one of the two")
        flat |= below
    return flat


def _override(cls: type, text: str) -> tuple[str, Any]:
    """(name, value) of `--section.key=value`; a value such as `[a, 'b, c']` is read as a YAML list."""
    name, separator, value = text.removeprefix("--").partition("=")
    if not (text.startswith("--") and separator):
        likely = _candidates(cls, name, DEFAULTS) or ["section.key"]
        raise UserError(f"{text!r} is no setting: write --{likely[0]}={value or 'value'}")
    try:
        return name, yaml.load(value, Loader=_TextLoader) if value[:1] == "[" else value
    except BAD_YAML:
        return name, value


def _build(cls: type, values: Flat, prefix: str = "") -> Any:
    arguments = {}
    for each in _fields(cls):
        name = prefix + each.name
        if each.kinds:
            chosen = each.kinds.get(values.get(f"{name}.kind", ""), type(each.default))
            arguments[each.name] = _build(chosen, values, f"{name}.")
        elif name in values:
            arguments[each.name] = values[name]
    built = cls(**arguments)
    if hasattr(built, "check"):
        built.check()
    return built


# ---- unknown names -------------------------------------------------------------------------------------------------


def _refuse_unknown(cls: type, known: Mapping[str, Setting], given: Flat, flat: Flat, origin: str) -> None:
    """Raises a UserError for a name in `given` that is not in `known`, the settings with the kinds in `flat`."""
    for name, value in given.items():
        inside = [each for each in known if each.startswith(f"{name}.")]
        if name in known or (inside and value in ("", {})):
            continue
        if inside:
            raise UserError(
                f"{name} in {origin} is a section, not {value!r}: name a setting in it, such as {inside[0]}"
            )
        # The section could be of another kind, which may have that name.
        kinds = [each for each in known if each.endswith(".kind") and len(known[each].choices) > 1]
        above = [each for each in kinds if name.startswith(each.removesuffix("kind"))]
        where = f", where {above[-1]} is {flat.get(above[-1], known[above[-1]].default)!r}" if above else ""
        raise UserError(f"unknown setting {name!r} in {origin}{where}; {suggest(cls, name, flat)}")


def suggest(cls: type, name: str, flat: Flat = DEFAULTS) -> str:
    """What to say beside an unknown name: the settings that are probably meant, or all in its section."""
    found = _candidates(cls, name, flat)
    if found:
        return f"did you mean {' or '.join(map(repr, found[:3]))}?"
    above = _resolved(cls, name).partition(".")[0]
    inside = [each.name.removeprefix(f"{above}.") for each in declared(cls, flat) if each.name.startswith(f"{above}.")]
    names = inside or [each.name for each in _fields(cls)]
    return f"known{f' in {above}' if inside else ''} are: {', '.join(names)}"


def _candidates(cls: type, name: str, flat: Flat) -> list[str]:
    """Settings that an unknown name probably means.

    The same last part in any section counts most (`model.dropout`), then a name from other programs (`lr`), then
    the nearest spelling. So `train.lr` is `optim.learning_rate`, and not the `train.seed` that is spelled like it.
    """
    known = {each.name: each for each in declared(cls, flat)}
    beside, _, key = _resolved(cls, name).rpartition(".")
    inside = [each for each in known if each.startswith(f"{beside}.")]
    same_key = [each for each in known if each.rpartition(".")[2] == key]
    for found in (same_key, [each for each in known if key in known[each].also_called.split()]):
        if found:
            return [each for each in found if each in inside] or found
    in_section = {each.removeprefix(f"{beside}."): each for each in inside}
    anywhere = {each.rpartition(".")[2]: each for each in known}
    for names, cutoff in ((in_section, 0.65), (anywhere, 0.8)):
        for close in difflib.get_close_matches(key, names, n=1, cutoff=cutoff):
            return [names[close]]
    return []


def _resolved(cls: type, name: str) -> str:
    """The name in lower case with `_` for `-`, and its section by our name if another program's is known."""
    head, dot, rest = name.replace("-", "_").lower().partition(".")
    ours = [each.name for each in _fields(cls) if each.kinds and head in each.also_called.split()]
    return (ours[0] if ours else head) + dot + rest


def nearest(name: str, names: Iterable[str]) -> str:
    """What to say beside an unknown name: the one that is spelled most like it, or all there are."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(names)}"


# ---- writing -------------------------------------------------------------------------------------------------------


def flatten(settings: Any) -> dict[str, Any]:
    """The value of every setting by its dotted name, in order."""
    return _flattened(asdict(settings), "the settings")


def describe(settings: Any) -> str:
    """The settings as YAML text, which gives the same settings when it is loaded."""
    return yaml.safe_dump(asdict(settings), sort_keys=False, allow_unicode=True, width=120)


def describe_changes(settings: Any) -> str:
    """YAML of the settings that differ from the defaults, to load them again."""
    changed = _changes(settings, type(settings)())
    return yaml.safe_dump(changed, sort_keys=False, allow_unicode=True, width=120) if changed else ""


def _changes(ours: Any, default: Any) -> dict[str, Any]:
    """What `ours` states beyond the defaults of its own kind; `default` may be of another kind."""
    tree, usual, of_kind = asdict(ours), asdict(default), asdict(type(ours)())
    changed = {}
    for name, value in tree.items():
        below = getattr(ours, name, None)
        if is_dataclass(below):
            if found := _changes(below, getattr(default, name, below)):
                changed[name] = found
        elif value != of_kind.get(name) or (name == "kind" and value != usual.get(name)):
            changed[name] = value
    return changed


def differences(ours: Any, theirs: Any) -> list[tuple[str, Any, Any]]:
    """(name, our value, their value) of every setting that shapes the result and differs.

    Where two sections are of different kinds, that is the difference, and settings that only one of them has are not.
    """
    mine, other = flatten(ours), flatten(theirs)
    shaping = [each.name for each in declared(type(ours), mine) if each.shapes_result and each.name in other]
    return [(name, mine[name], other[name]) for name in shaping if mine[name] != other[name]]


def help_text(cls: type, prefix: str = "") -> str:
    """Every setting with its default, meaning and range, and those of every kind, for an entry point's `--help`."""
    text = ""
    for each in _fields(cls):
        if not each.kinds:
            default = ",".join(map(str, each.default)) if isinstance(each.default, list) else each.default
            meaning = f"{each.meaning} ({each.allowed})" if each.allowed else each.meaning
            indented = textwrap.fill(meaning, 100, initial_indent=" " * 8, subsequent_indent=" " * 8)
            text += f"  --{prefix}{each.name}={default}\n{indented}\n"
    for each in _fields(cls):
        for kind, below in each.kinds.items():
            name, is_default = prefix + each.name, " (default)" if below is type(each.default) else ""
            choice = f", for --{name}.kind={kind}{is_default}" if kind else ""
            text += f"\n{name}{choice}: {(below.__doc__ or '').splitlines()[0]}\n{help_text(below, f'{name}.')}"
    return text
