"""What the tests of documents, scripts and imports share: pages, the commands in them, rooms and their rules."""

import re
import subprocess
import sys
from functools import cache

from ddp_asr import cli
from tests.conftest import REPOSITORY

# ---- documents -----------------------------------------------------------------------------------------------------

PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((REPOSITORY / "docs").glob("*.md")))]
OURS = r"(?:ddp_asr|launch|tests|benchmarks|synthetic_speech)"


def text_of(page: str) -> str:
    return (REPOSITORY / page).read_text(encoding="utf-8")


def commands(text: str) -> list[str]:
    """Lines that run one of our modules, continued lines joined, without their comments."""
    lines = [line.removeprefix("# ") for line in re.sub(r"\\\n#?", " ", text).splitlines()]
    return [re.split(r"\s#\s", line)[0] for line in lines if re.search(rf"-m {OURS}\b|\bddp-asr \w", line)]


@cache
def help_of(module: str) -> str:
    if module.startswith("ddp_asr.") and module.split(".")[1] in cli.LAUNCH:  # as in `ddp-asr submit`
        module = f"ddp_asr.launch.{module.split('.')[1]}"
    command = [sys.executable, "-m", module, "--help"]
    return subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout


# ---- imports -------------------------------------------------------------------------------------------------------

ROOMS = ("text", "data", "features", "encoders", "decoding", "ranks", "runs", "recognition", "training")
TOP_LEVEL = {
    "ground": "errors settings config draws files",
    "objective": "model objective",
    "doors": (
        "__init__ __main__ api cli train evaluate transcribe align inspect shard vocabulary lm tune average export "
        "tracking bandwidth configs compare"
    ),
}
MAY_IMPORT = {
    "ground": {"ground"},
    "text": {"ground"},
    "data": {"ground", "text", "features"},  # of ranks it knows two numbers, handed to it
    "features": {"ground"},
    "encoders": {"ground", "features"},
    "objective": {"ground", "features", "encoders"},
    "decoding": {"ground", "text"},
    "ranks": {"ground"},
    "runs": {"ground"},
    "recognition": {*("ground", "data", "text", "features", "objective", "decoding", "ranks", "runs", "training")},
    "training": {"ground", "objective", *ROOMS},
    "doors": {*("ground", "objective", "doors", *ROOMS)},
}
