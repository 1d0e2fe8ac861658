"""What README, CONTRIBUTING and docs name exists: links, paths, identifiers, make targets, options, settings.

And the other way round: documents, sections and properties that the code names exist, and docs/architecture.md lists
every module and the same rules of import as tests/test_imports.py.
"""

import re
import subprocess

import pytest

from ddp_asr.config import Config
from ddp_asr.settings import flatten
from tests.conftest import REPOSITORY
from tests.repository import MAY_IMPORT, OURS, PAGES, commands, help_of, text_of
from tests.test_config import NAMES

MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
ARCHITECTURE = "docs/architecture.md"


def sections(text: str) -> dict[str, str]:
    """Heading -> the text below it, up to the next heading of any level."""
    parts = re.split(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def slugs(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in sections(text)}


def code_spans(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def test_the_first_lines_are_the_two_commands():
    first_block = re.search(r"```sh\n(.*?)```", text_of("README.md"), re.DOTALL)
    assert first_block and first_block.start() < 20
    assert [line.split("  ")[0] for line in first_block.group(1).splitlines()] == ["make demo", "make test"]


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    for target in re.findall(r"\]\(([^)]+)\)", text_of(page)):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (REPOSITORY / page).parent / path if path else REPOSITORY / page
        assert file.exists(), f"{page} links to {target}"
        if anchor:
            assert anchor in slugs(file.read_text(encoding="utf-8")), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page):
    # What runs leave behind (shards/, runs/, demo/) is not in the repository, and not looked for.
    for path in re.findall(
        r"(?<![\w/.-])((?:ddp_asr|launch|configs|slurm|tests|benchmarks|docs|\.ci)/[\w./-]*)", text_of(page)
    ):
        assert (REPOSITORY / path.rstrip(".")).exists(), f"{page} names {path}"


@pytest.mark.parametrize("page", [*PAGES, "Makefile"])
def test_modules_exist(page):
    for module in re.findall(rf"-m ({OURS}(?:\.\w+)+)", text_of(page)):
        path = REPOSITORY / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"{page} runs {module}"


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    code = "\n".join(re.findall(r"```.*?```|`[^`]+`", text_of(page), re.DOTALL))
    for named in re.findall(r"\bmake ((?:[a-z-]+ ?)+)", code):
        assert set(named.split()) <= targets, f"{page} names make {named}"


def test_make_help_lists_every_target():
    listed = subprocess.run(["make", "-s", "help"], cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    phony = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE).group(1).split()
    assert [line.split()[0] for line in listed.splitlines()] == phony


CONFIGS = [str(path.relative_to(REPOSITORY)) for path in sorted((REPOSITORY / "configs").rglob("*.yaml"))]


@pytest.mark.parametrize("page", [*PAGES, "Makefile", *CONFIGS])
def test_options_and_settings_exist(page):
    for line in commands(text_of(page)):
        module, rest = re.search(rf"(-m {OURS}(?:[. ]\w+)?|ddp-asr \w+)(.*)", line).groups()
        module = module.removeprefix("-m ").replace("ddp-asr ", "ddp_asr.").replace(" ", ".")
        for option in re.findall(r"(?<!\S)(--[a-z][\w.-]*)", rest):
            if "." in option:
                assert option[2:] in NAMES, f"{page}: {line}"
            else:
                assert option in help_of(module), f"{page}: {line}"


@pytest.mark.parametrize("page", PAGES)
def test_identifiers_exist(page):
    """`path::Class.method` names what is defined in that file."""
    for path, dotted in re.findall(r"`([\w./-]+)::([\w.]+)`", text_of(page)):
        source = text_of(path)
        for name in dotted.split("."):
            defined = rf"^\s*(?:(?:async )?def|class) {name}\b|^\s*{name}\b.*[:=]"
            assert re.search(defined, source, re.MULTILINE), f"{page} names {path}::{dotted}"


@pytest.mark.parametrize("page", PAGES)
def test_settings_exist(page):
    """`section.name` is a setting, and `section.name = value` its default."""
    defaults = flatten(Config())
    for span in code_spans(text_of(page)):
        name, _, value = span.partition(" = ")
        section = name.split(".")[0]
        is_file = name.endswith((".json", ".py", ".sbatch", ".yaml"))
        if re.fullmatch(r"\w+(\.\w+)+", name) and hasattr(Config(), section) and not is_file:
            assert name in defaults, f"{page} names {name}"
            assert not value or value == str(defaults[name]), f"{page} says {span}"


def cited_by_code() -> list[tuple[str, str]]:
    """(file, text) of all that is not a page and may refer to one."""
    folders = ("ddp_asr", "launch", "tests", "benchmarks", "synthetic_speech", "configs", "slurm", ".ci")
    files = [path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*")) if path.is_file()]
    files += [REPOSITORY / name for name in ("Makefile", "setup.cfg", "pyproject.toml", "constraints.txt")]
    return [
        (str(path.relative_to(REPOSITORY)), path.read_text(encoding="utf-8"))
        for path in files
        if path.suffix not in (".pyc", ".png") and path.name != "test_readme.py"
    ]


def test_documents_and_sections_that_the_code_names_exist():
    for file, text in cited_by_code():
        assert "DESIGN" not in text, f"{file} names a document that is not here"
        for page, anchor in re.findall(r"(docs/[\w./-]+\.md|README\.md|CONTRIBUTING\.md)(?:#([\w-]+))?", text):
            assert (REPOSITORY / page).exists(), f"{file} names {page}"
            assert not anchor or anchor in slugs(text_of(page)), f"{file} names {page}#{anchor}"


def test_properties_that_are_named_exist_and_have_tests():
    known = {}
    for heading, text in sections(text_of(ARCHITECTURE)).items():
        if found := re.match(r"Property (\d): ", heading):
            known[found[1]] = re.findall(r"`(tests/[\w/]+\.py::test_\w+)`", text)
    assert list(known) == list("1234567") and all(known.values())
    for file, text in cited_by_code() + [(page, text_of(page)) for page in PAGES]:
        for numbers in re.findall(r"[Pp]ropert(?:y|ies)\s(\d(?:(?:, | and )\d)*)", text):
            assert set(re.findall(r"\d", numbers)) <= known.keys(), f"{file} names property {numbers}"


def test_the_tree_lists_every_module():
    """The lines of the tree are indented by two columns a level."""
    tree = re.search(r"```\n(ddp_asr/\n.*?)```", text_of(ARCHITECTURE), re.DOTALL)
    listed, folders = set(), []
    for line in tree.group(1).splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        folders = folders[: len(indent) // 2]
        if name.endswith("/"):
            folders.append(name)
        else:
            listed.add("".join(folders) + name)
    modules = {
        str(path.relative_to(REPOSITORY))
        for package in ("ddp_asr", "launch")
        for path in (REPOSITORY / package).rglob("*.py")
        if path.name != "__init__.py"
    }
    assert {path for path in listed if not path.endswith("__init__.py")} == modules


def test_the_rules_of_import_are_those_that_are_checked():
    rows = re.findall(r"^\| `(\w+)`[^|]*\| ([^|]*) \|$", sections(text_of(ARCHITECTURE))["Who may import whom"], re.M)
    written = {room: set(re.findall(r"`(\w+)`", allowed)) for room, allowed in rows}
    assert written == {room: allowed - {room} for room, allowed in MAY_IMPORT.items()}
