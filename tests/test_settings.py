"""The settings engine, with settings of a cake: reading, choosing kinds, refusing, and writing what repeats the run."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import asdict, dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddp_asr.errors import UserError
from ddp_asr.settings import (
    declared,
    describe,
    differences,
    flatten,
    from_dict,
    help_text,
    load,
    nearest,
    section,
    setting,
    suggest,
)


@dataclass(frozen=True)
class Oven:
    """Baking in an oven."""

    kind: str = field(default="oven", init=False)

    degrees: float = setting(180.0, "temperature", above=0, at_most=300, also_called="temp heat")
    fan: bool = setting(False, "blow the air around")


@dataclass(frozen=True)
class Steamer:
    """Steaming in a pot."""

    kind: str = field(default="steamer", init=False)

    water_ml: int = setting(500, "water in the pot", at_least=1)


@dataclass(frozen=True)
class Icing:
    """Sugar on the top."""

    share: float = setting(0.0, "fraction of the surface", at_least=0, below=1)
    colour: str = setting("white", "colour of the icing", choices=("white", "pink"))


@dataclass(frozen=True)
class Top:
    """What is on the cake."""

    nuts: int = setting(0, "nuts on the top", at_least=0)
    icing: Icing = section(Icing)
    layers: list[float] = setting([1.0], "thickness of each layer", above=0, not_empty=True)

    def check(self) -> None:
        if self.nuts and self.icing.share:
            raise UserError("top.nuts and top.icing.share exclude each other: set one of them to 0")


@dataclass(frozen=True)
class Cake:
    """A cake."""

    name: str = setting("", "name of the cake")
    seed: int = setting(
        0,
        "seed of the decoration",
        at_least=-(2**63),
        at_most=2**63,
        shapes_result=True,
        also_called="random_seed",
    )
    notes: list[str] = setting([], "notes for the baker")
    bake: Oven | Steamer = section(Oven, shapes_result=True, also_called="cook")
    top: Top = section(Top)

    def check(self) -> None:
        if self.top.nuts > 9 and self.bake.kind == "steamer":
            raise UserError("top.nuts would sink in steam: set bake.kind=oven")


def refusal(*overrides, path=None):
    with pytest.raises(UserError) as error:
        load(Cake, path, overrides)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "cake.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        # what YAML 1.1 makes something else of
        *(("name", text, text) for text in ("off", "no", "on", "Yes", "null", "2024-01-31", "1e3", "0123")),
        ("bake.degrees", "5e-4", 5e-4),
        ("bake.degrees", "5E-04", 5e-4),
        ("seed", "010", 10),
        # types
        ("bake.degrees", "90", 90.0),
        ("seed", "1e3", 1000),
        ("seed", "3.0", 3),
        ("seed", "9007199254740993", 2**53 + 1),  # no float holds it
        *(("bake.fan", text, False) for text in ("off", "no", "False")),
        *(("bake.fan", text, True) for text in ("on", "yes", "TRUE")),
        ("name", "", ""),
        ("top.icing.share", "0.5", 0.5),
        # lists
        ("notes", "a", ["a"]),
        ("notes", "a, b,c", ["a", "b", "c"]),
        ("notes", "[a, 'b, c']", ["a", "b, c"]),
        ("notes", "[off, 010]", ["off", "010"]),
        ("notes", "", []),
        ("notes", "[]", []),
        ("top.layers", "0.9,1,1.1", [0.9, 1.0, 1.1]),
        ("top.layers", "1", [1.0]),
    ],
)
def test_a_text_becomes_what_its_field_declares_from_file_and_command_line_alike(file, name, text, expected):
    *sections, key = name.split(".")
    nested = "".join(f"{'  ' * depth}{part}:\n" for depth, part in enumerate(sections))
    from_file = flatten(load(Cake, file(f"{nested}{'  ' * len(sections)}{key}: {text}\n")))[name]
    for value in (flatten(load(Cake, None, [f"--{name}={text}"]))[name], from_file):
        assert value == expected and type(value) is type(expected)


@given(st.from_regex(r"[A-Za-z0-9~+.][A-Za-z0-9_.:+-]{0,8}[A-Za-z0-9]", fullmatch=True))
def test_any_word_reads_alike_from_file_and_command_line(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "word.yaml"
    path.write_text(f"name: {text}\n")
    assert load(Cake, path).name == load(Cake, None, [f"--name={text}"]).name == text


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("seed", "2.5", "seed must be a whole number, not '2.5'"),
        ("seed", "", "seed must be a whole number, not ''"),
        ("seed", "inf", "seed must be a whole number, not 'inf'"),
        ("seed", "[3]", "seed must be a whole number, not ['3']"),
        ("bake.degrees", "hot", "bake.degrees must be a finite number, not 'hot'"),
        ("bake.degrees", "on", "bake.degrees must be a finite number, not 'on'"),
        ("bake.fan", "maybe", "bake.fan must be true or false, not 'maybe'"),
        ("bake.fan", "1", "bake.fan must be true or false, not '1'"),
        ("top.layers", "2,x", "top.layers must be a finite number, not 'x'"),
        ("name", "[a]", "name must be a text, not ['a']"),
        # ranges
        ("bake.degrees", "0", "bake.degrees must be above 0 and at most 300, not 0.0"),
        ("top.nuts", "1000000001", "top.nuts must be at most 1e+09 in size, not 1000000001"),
        ("top.layers", "1e-13", "top.layers must be 0 or at least 1e-12 in size, not 1e-13"),
        ("bake.degrees", "301", "bake.degrees must be above 0 and at most 300, not 301.0"),
        ("bake.degrees", "nan", "bake.degrees must be a finite number, not 'nan'"),
        ("top.icing.share", "1", "top.icing.share must be at least 0 and below 1, not 1.0"),
        ("top.nuts", "-1", "top.nuts must be at least 0, not -1"),
        ("top.layers", "1,0", "top.layers must be above 0, not 0.0"),
        ("top.layers", "", "top.layers must not be empty: give at least one value (thickness of each layer)"),
        ("top.icing.colour", "pnik", "top.icing.colour must be one of white, pink, not 'pnik'"),
        ("notes", "a\x85b", r"notes must be without control characters, not 'a\x85b'"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_what_can(name, text, said):
    assert refusal(f"--{name}={text}") == said


def test_the_kind_decides_what_stands_in_a_section(file):
    assert load(Cake, None).bake == Oven()
    assert load(Cake, None, ["--bake.kind=steamer"]).bake == Steamer()
    assert load(Cake, None, ["--bake.water_ml=9", "--bake.kind=steamer"]).bake == Steamer(9)
    steamed = file("bake: {kind: steamer, water_ml: 7}")
    assert load(Cake, steamed).bake == Steamer(7)
    assert load(Cake, steamed, ["--bake.water_ml=8"]).bake == Steamer(8)
    assert refusal("--bake.kind=steemer") == "bake.kind must be one of oven, steamer, not 'steemer'"
    assert refusal("--bake.kind=[oven]") == "bake.kind must be a text, not ['oven']"
    assert refusal("--bake.degree=9", "--bake.kind=steamer") == (
        "unknown setting 'bake.degree' in the command line, where bake.kind is 'steamer'; "
        "known in bake are: kind, water_ml"
    )
    assert refusal("--bake.degree=9") == (
        "unknown setting 'bake.degree' in the command line, where bake.kind is 'oven'; did you mean 'bake.degrees'?"
    )
    # What the file says of one kind is not silently dropped when the command line chooses the other.
    assert re.fullmatch(
        r"unknown setting 'bake.water_ml' in \S*cake.yaml, where bake.kind is 'oven'; known in bake are: .*",
        refusal("--bake.kind=oven", path=steamed),
    )


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("bake.degree", "'bake.degrees'"),  # spelling
        ("bake.Fan", "'bake.fan'"),
        ("top.water-ml", None),  # of the kind that is not chosen
        ("top.degrees", "'bake.degrees'"),  # the same key in another section
        ("icing.colour", "'top.icing.colour'"),
        ("bkae.fan", "'bake.fan'"),
        ("top.icing_share", "'top.icing.share'"),
        ("top.seed", "'seed'"),
        ("top.temp", "'bake.degrees'"),  # another program's name
        ("cook.fan", "'bake.fan'"),  # another program's section
        ("cook.degree", "'bake.degrees'"),
        ("cook.kind", "'bake.kind'"),
        ("top.nut", "'top.nuts'"),
        ("top.icing.xyz", None),  # shares its section with all that are known, and nothing else
        ("top.xy", None),
    ],
)
def test_an_unknown_name_is_answered_with_what_was_probably_meant(name, meant):
    said = suggest(Cake, name)
    assert said == f"did you mean {meant}?" if meant else said.startswith("known in top")


def test_where_nothing_is_near_all_names_in_the_section_are_listed():
    in_top = "known in top are: nuts, icing.share, icing.colour, layers"
    assert suggest(Cake, "top.xy") == suggest(Cake, "top.icing.xyz") == suggest(Cake, "top.xy.z") == in_top
    assert suggest(Cake, "zzz.q") == "known are: name, seed, notes, bake, top"
    assert nearest("slrum", ["slurm", "local"]) == "did you mean 'slurm'?"
    assert nearest("zz", ["slurm", "local"]) == "known are: slurm, local"


@dataclass(frozen=True)
class Twice:
    """The same section twice."""

    one: Icing = section(Icing)
    other: Icing = section(Icing)


def test_a_name_in_several_sections_is_answered_with_all_of_them():
    assert suggest(Twice, "third.share") == "did you mean 'one.share' or 'other.share'?"
    assert suggest(Twice, "other.colr") == "did you mean 'other.colour'?"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("bake.fan=on", "'bake.fan=on' is no setting: write --bake.fan=on"),
        ("--bake.fan", "'--bake.fan' is no setting: write --bake.fan=value"),
        ("--heat", "'--heat' is no setting: write --bake.degrees=value"),
        ("zzz", "'zzz' is no setting: write --section.key=value"),
        ("--fan=on", "unknown setting 'fan' in the command line; did you mean 'bake.fan'?"),
        ("--heat=9", "unknown setting 'heat' in the command line; did you mean 'bake.degrees'?"),
        ("--zzz=9", "unknown setting 'zzz' in the command line; known are: name, seed, notes, bake, top"),
        ("--seed.x=3", "unknown setting 'seed.x' in the command line; known are: name, seed, notes, bake, top"),
        ("--top=3", "top in the command line is a section, not '3': name a setting in it, such as top.nuts"),
    ],
)
def test_what_is_no_setting_is_answered_with_one_that_is(override, said):
    assert refusal(override) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("bake: {degree: 3}", "unknown setting 'bake.degree' in .*cake.yaml, where .*; did you mean 'bake.degrees'"),
        ("cooking: {fan: on}", "unknown setting 'cooking.fan' in .*cake.yaml; did you mean 'bake.fan'"),
        ("1: {fan: on}", "unknown setting '1.fan' in"),
        ("top: {on: 3}", "unknown setting 'top.on' in"),
        ("top: 3", "top in .*cake.yaml is a section, not '3': name a setting in it, such as top.nuts"),
        ("top: {icing: [1]}", r"top.icing in .*cake.yaml is a section, not \['1'\]"),
        ("seed: {x: 3}", "unknown setting 'seed.x' in"),
        ("seed: {}", "seed must be a whole number, not {}"),
        ("top:\n  nuts: 3\n  nuts: 4\n", "cake.yaml is no valid YAML: 'nuts' is given twice .*line 3"),
        ("top: {nuts: 3}\ntop: {nuts: 4}\n", "'top' is given twice"),
        ("top: {nuts: 3}\ntop.nuts: 4\n", "top.nuts is given twice in .*cake.yaml: remove one"),
        ("[a]: 3\n", "cake.yaml is no valid YAML"),
        ("top:\n\tnuts: 3\n", "cake.yaml is no valid YAML: .*line 2"),
        ("- top\n", "cake.yaml must hold settings by their names"),
        ("top", "cake.yaml must hold settings by their names"),
        (b"\xff\xfe\x00", "cake.yaml is no valid YAML"),
    ],
)
def test_a_file_that_cannot_be_understood_is_one_sentence(file, text, said):
    assert re.search(said, refusal(path=file(text)))


def test_a_file_that_is_not_there_is_one_sentence(tmp_path):
    assert "none.yaml: No such file or directory; give the path" in refusal(path=tmp_path / "none.yaml")


def test_the_command_line_replaces_single_settings_of_the_file_and_the_last_one_counts(file):
    path = file("seed: 3\ntop:\n  nuts: 5\n  icing:\n    colour: pink\nbake:\n")
    cake = load(Cake, path, ["--top.nuts=1", "--top.nuts=2"])
    assert (cake.seed, cake.top.nuts, cake.top.icing.colour, cake.bake) == (3, 2, "pink", Oven())
    assert load(Cake, file("")) == load(Cake, None) == Cake()


def test_values_that_do_not_go_together_are_refused_where_their_classes_say_so():
    assert refusal("--top.nuts=1", "--top.icing.share=0.5").startswith("top.nuts and top.icing.share exclude")
    assert refusal("--top.nuts=10", "--bake.kind=steamer").startswith("top.nuts would sink")
    # Bounds come first: a check may rely on them.
    assert refusal("--top.nuts=1", "--top.icing.share=2").startswith("top.icing.share must be")


TEXTS = st.text(st.characters(codec="utf8", exclude_categories=["Cc", "Zl", "Zp"]), max_size=12)
COOKED = [
    st.fixed_dictionaries({"bake.degrees": st.floats(1e-12, 300), "bake.fan": st.booleans()}),
    st.fixed_dictionaries({"bake.kind": st.just("steamer"), "bake.water_ml": st.integers(1, 10**9)}),
]
REST = {
    "name": TEXTS,
    "seed": st.integers(-(2**63), 2**63),
    "notes": st.lists(TEXTS, max_size=3),
    "top.layers": st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=3),
    "top.icing.share": st.just(0.0) | st.floats(1e-12, 0.99),
}


@given(st.one_of(COOKED), st.fixed_dictionaries(REST))
def test_what_is_written_gives_the_same_settings_again(tmp_path_factory, cooked, rest):
    cake = from_dict(Cake, cooked | rest, "the test")
    path = tmp_path_factory.getbasetemp() / "written.yaml"
    path.write_text(describe(cake), encoding="utf8")
    assert load(Cake, path) == cake
    assert from_dict(Cake, asdict(cake), "a checkpoint") == cake
    assert from_dict(Cake, flatten(cake), "a checkpoint") == cake
    assert (cooked | rest).items() <= flatten(cake).items()


def test_the_kind_is_written_first():
    assert list(asdict(Cake())["bake"]) == ["kind", "degrees", "fan"]
    assert (
        list(flatten(Cake()))
        == [each.name for each in declared(Cake)]
        == [
            *("name", "seed", "notes", "bake.kind", "bake.degrees", "bake.fan"),
            *("top.nuts", "top.icing.share", "top.icing.colour", "top.layers"),
        ]
    )


def test_differences_are_of_what_shapes_the_result_and_a_kind_is_one_difference():
    ours = load(Cake, None, ["--bake.fan=on", "--top.nuts=3", "--seed=1"])
    assert differences(ours, Cake()) == [("seed", 1, 0), ("bake.fan", True, False)]
    assert differences(ours, dataclasses.replace(ours, bake=Steamer())) == [("bake.kind", "oven", "steamer")]


def test_the_help_shows_every_setting_of_every_kind_with_its_range():
    shown = help_text(Cake)
    assert shown.splitlines()[:2] == ["  --name=", "        name of the cake"]
    assert "\nbake, for --bake.kind=oven (default): Baking in an oven.\n  --bake.degrees=180.0\n" in shown
    entry = "  --bake.water_ml=500\n        water in the pot (at least 1)\n"
    assert f"\nbake, for --bake.kind=steamer: Steaming in a pot.\n{entry}" in shown
    assert "\ntop.icing: Sugar on the top.\n  --top.icing.share=0.0\n" in shown
    assert "colour of the icing (one of white, pink)" in shown
    assert shown.index("--top.layers") < shown.index("--top.icing.share")  # under its own heading


def test_nothing_can_be_changed_afterwards_and_no_list_is_shared():
    cake = Cake()
    with pytest.raises(dataclasses.FrozenInstanceError):
        cake.top.nuts = 3
    assert cake.notes is not Cake().notes and load(Cake, None).notes is not load(Cake, None).notes
