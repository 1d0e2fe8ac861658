"""Who may import whom. docs/architecture.md has the same table; a module that is in no room fails here.

A room is a package of `ddp_asr`; the modules at its top level stand in groups of their own.
"""

import ast
import configparser
import re
import sys
from collections.abc import Iterator
from functools import cache

import pytest

from tests.conftest import REPOSITORY
from tests.repository import MAY_IMPORT, ROOMS, TOP_LEVEL

# The loop drives callables that it does not know: no Comet, no decoder and no WER in it.
UNKNOWN_TO_THE_LOOP = {
    "tracking",
    "runs",
    "decoding",
    "recognition",
    "text",
    "train",
    "training.attempt",
    "training.recorder",
    "training.session",
}
NEVER = dict.fromkeys(("training.loop", "training.learner", "training.rehearsal"), UNKNOWN_TO_THE_LOOP)
NEVER["training.loop"] = UNKNOWN_TO_THE_LOOP | {
    "model",
    "objective",
    "encoders",
    "features",
}  # what the loss is made of is the learner's
# Not even through what they import: launchers use these on login nodes that have no torch, and `plan` is arithmetic.
WITHOUT_TORCH = [
    *("errors", "settings", "config", "draws", "data.plan", "data.index", "data.storage", "data.targets"),
    *("data.corpus", "text.characters", "text.pieces", "text.score", "features"),
    *("runs.lease", "runs.directory", "ranks.watchdog"),
]
TORCH = {"torch", "torchaudio", "webdataset"}  # webdataset imports torch
ONLY_IN = {
    "torch.distributed": {"ranks.world", "ranks.rendezvous", "ranks.torchrun"},
    "comet_ml": {"runs.comet"},
    "webdataset": {"data.writer"},
    "flashlight": {"decoding.lexicon"},
    "obstore": {"data.object_storage"},
    "onnxruntime": {"recognition.standalone"},
    "safetensors": {"recognition.exporting"},
    "tensorboard": {"runs.tensorboard"},
    "sentencepiece": {"text.pieces"},
    "silero_vad": {"recognition.voice"},
}
# where a package is imported by another name, or comes with another one (Triton with a torch for CUDA)
DISTRIBUTIONS = {"yaml": "pyyaml", "triton": "torch", "flashlight": "flashlight-text", "silero_vad": "silero-vad"}


def modules_of(package: str) -> list[str]:
    """Dotted names below the package; a package is named by itself."""
    root = REPOSITORY / package
    paths = [path.relative_to(root).with_suffix("") for path in root.rglob("*.py")]
    names = [".".join(path.parent.parts if path.name == "__init__" else path.parts) for path in paths]
    return sorted(name or "__init__" for name in names)


MODULES, LAUNCH = modules_of("ddp_asr"), modules_of("launch")
GROUP_OF = {module: group for group, modules in TOP_LEVEL.items() for module in modules.split()}
GROUP_OF |= {module: module.split(".")[0] for module in MODULES if module.split(".")[0] in ROOMS}


@cache
def tree(package: str, module: str) -> ast.Module:
    path = REPOSITORY / package / module.replace(".", "/")
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
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
    for node in nodes(tree(package, module)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # `launch` is ddp_asr.launch in a wheel, so its modules import each other relatively, and no others do.
            assert node.level <= (package == "launch"), f"{package}.{module}:{node.lineno}: relative import"
            origin = ".".join([package] * node.level + ([node.module] if node.module else []))
            assert node.level or not origin.startswith("launch"), f"{package}.{module}:{node.lineno}: not in a wheel"
            found.update([origin, *(f"{origin}.{alias.name}" for alias in node.names)])
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed."):
            found.add("torch.distributed")  # used through a plain `import torch`
    return frozenset(found)


def ours(package: str, module: str) -> set[str]:
    """Modules of ddp_asr that a module imports."""
    names = {name.removeprefix("ddp_asr.") for name in imports(package, module) if name.startswith("ddp_asr.")}
    return names & set(MODULES)


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


def test_every_module_is_in_one_room():
    assert set(MODULES) == set(GROUP_OF), "a new module needs its place in ROOMS or TOP_LEVEL"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_what_its_room_may(module):
    group = GROUP_OF[module]
    strangers = {name for name in ours("ddp_asr", module) if GROUP_OF[name] not in MAY_IMPORT[group] | {group}}
    assert strangers == set()
    unwanted = NEVER.get(module, set())
    assert {name for name in ours("ddp_asr", module) if name in unwanted or name.split(".")[0] in unwanted} == set()


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
    extras = setup["options.extras_require"]
    ours = ("lexicon", "object-storage", "onnx", "pieces", "tensorboard", "vad")  # extras of ddp_asr
    lines = setup["options"]["install_requires"] + "".join(extras[name] for name in ours)
    declared = {re.match(r"[\w-]*", line).group() for line in lines.split("\n")}
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
