"""What README, CONTRIBUTING and docs name exists: links, paths, modules, make targets, options, settings."""

import dataclasses
import re
import subprocess
import sys
from functools import cache

import pytest

from ddp_asr.config import Config
from tests.conftest import REPOSITORY

PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((REPOSITORY / "docs").glob("*.md")))]
MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
OURS = r"(?:ddp_asr|launch|tests|benchmarks)"


def text_of(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def commands(text: str) -> list[str]:
    """Lines that run one of our modules, continued lines joined, without their comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [re.split(r"\s#\s", line)[0] for line in lines if re.search(rf"-m {OURS}\.", line)]


@cache
def help_of(module: str) -> str:
    command = [sys.executable, "-m", module, "--help"]
    return subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout


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
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page} links to {target}"


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
        assert (REPOSITORY / module.replace(".", "/")).with_suffix(".py").exists(), f"{page} runs {module}"


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


@pytest.mark.parametrize("page", [*PAGES, "Makefile"])
def test_options_and_settings_exist(page):
    sections = {section.name: section.default_factory() for section in dataclasses.fields(Config)}
    for command in commands(text_of(page)):
        module = re.search(rf"-m ({OURS}\.\w+)", command).group(1)
        options = re.findall(r"(?<!\S)(--[a-z][\w.-]*)", command.split(module, 1)[1])
        for option in options:
            section, _, setting = option[2:].partition(".")
            if setting:
                assert hasattr(sections.get(section), setting), f"{page}: {command}"
            else:
                assert option in help_of(module), f"{page}: {command}"
