"""Who may import whom. The table is the design's (docs/architecture.md); a module that is in no group fails here."""

import ast
import configparser
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

GROUPS = {
    "ground": "__init__ errors config draws",
    "data": "vocabulary sources shard index plan loader corpus",
    "mathematics": "features augment gru model loss optim precision decode score",
    "machine": "distributed positions checkpoint lease tracking display signals run_directory",
    "runs": "trainer rehearsal session dry_run train recogniser evaluate transcribe bandwidth",
}
MAY_IMPORT = {
    "ground": {"ground"},
    "data": {"ground", "data"},  # of ranks they know two numbers, handed to them
    "mathematics": {"ground", "mathematics"},
    "machine": {"ground", "machine"},
    "runs": {"ground", "data", "mathematics", "machine", "runs"},
}
BESIDES = {("decode", "vocabulary")}  # a path becomes text by its symbols

# The loop drives callables that it does not know: no Comet, no decoder and no WER in it.
NEVER = {
    "trainer": {"tracking", "display", "decode", "score", "evaluate", "checkpoint", "session", "train"},
    "rehearsal": {"tracking", "display", "decode", "score", "evaluate", "checkpoint", "session", "train"},
}
# Not even through what they import: launchers use these on login nodes that have no torch, and `plan` is arithmetic.
WITHOUT_TORCH = [
    *("errors", "config", "draws", "plan", "index", "corpus", "score", "lease", "run_directory", "positions"),
]
TORCH = {"torch", "torchaudio", "webdataset"}  # webdataset imports torch
ONLY_IN = {"torch.distributed": {"distributed"}, "comet_ml": {"tracking"}, "webdataset": {"shard"}}
DISTRIBUTIONS = {"yaml": "pyyaml"}  # where a package is imported by another name

MODULES = sorted(path.stem for path in (REPOSITORY / "ddp_asr").glob("*.py"))
LAUNCH = sorted(path.stem for path in (REPOSITORY / "launch").glob("*.py"))
GROUP_OF = {module: group for group, modules in GROUPS.items() for module in modules.split()}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those under `if TYPE_CHECKING:`, which never run."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield node
            yield from nodes(node)


@cache
def imports(package: str, module: str) -> frozenset[str]:
    """Dotted names that a module imports, in functions too; `from a import b` counts as `a` and `a.b`."""
    found: set[str] = set()
    for node in nodes(tree(REPOSITORY / package / f"{module}.py")):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{package}/{module}.py:{node.lineno}: relative import"
            found.update([str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)])
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed."):
            found.add("torch.distributed")  # used through a plain `import torch`
    return frozenset(found)


def ours(package: str, module: str) -> set[str]:
    """Modules of ddp_asr that a module imports."""
    parts = [name.split(".") for name in imports(package, module)]
    return {name[1] for name in parts if name[0] == "ddp_asr" and len(name) > 1 and name[1] in MODULES}


def reached(package: str, module: str) -> set[str]:
    """Outside packages that a module can come to import, through any number of ours."""
    seen, waiting, found = set(), [(package, module)], set()
    while waiting:
        at = waiting.pop()
        if at not in seen:
            seen.add(at)
            found |= {name.split(".")[0] for name in imports(*at)}
            waiting += [("ddp_asr", name) for name in ours(*at)]
    return found - {"ddp_asr", "launch"}


def test_every_module_is_in_one_group():
    listed = sorted(" ".join(GROUPS.values()).split())
    assert listed == sorted(set(listed))
    assert set(MODULES) <= set(listed), "a new module needs its place in GROUPS"
    assert set(listed) <= set(MODULES), "GROUPS names a module that is gone"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_what_its_group_may(module):
    allowed = {name for name in MODULES if GROUP_OF.get(name) in MAY_IMPORT[GROUP_OF[module]]}
    allowed |= {other for importer, other in BESIDES if importer == module}
    assert ours("ddp_asr", module) - allowed - NEVER.get(module, set()) == set()
    assert ours("ddp_asr", module) & NEVER.get(module, set()) == set()


@pytest.mark.parametrize(("package", "homes"), ONLY_IN.items())
def test_a_package_that_has_one_home(package, homes):
    users = {
        module
        for module in MODULES
        if any(name == package or name.startswith(f"{package}.") for name in imports("ddp_asr", module))
    }
    assert users == homes


@pytest.mark.parametrize(
    ("package", "module"), [("ddp_asr", m) for m in WITHOUT_TORCH] + [("launch", m) for m in LAUNCH]
)
def test_what_runs_where_there_is_no_torch(package, module):
    assert reached(package, module) & TORCH == set()


def test_every_imported_package_is_declared():
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    declared = {re.match(r"[\w-]*", line).group() for line in setup["options"]["install_requires"].split("\n")}
    used = {
        name.split(".")[0]
        for package, modules in (("ddp_asr", MODULES), ("launch", LAUNCH))
        for module in modules
        for name in imports(package, module)
    }
    used -= set(sys.stdlib_module_names) | {"ddp_asr", "launch"}
    assert {DISTRIBUTIONS.get(name, name) for name in used} <= declared


def test_no_module_is_a_drawer():
    assert not {"utils", "util", "common", "helpers", "misc"} & set(MODULES + LAUNCH)
