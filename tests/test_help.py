"""Every entry point answers `--help` at once: without torch, webdataset (which imports torch) and comet_ml."""

import json
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

ENTRY_POINTS = [
    "ddp_asr",
    *(
        f"ddp_asr.{name}"
        for name in (
            "inspect",
            "shard",
            "train",
            "evaluate",
            "compare",
            "transcribe",
            "align",
            "vocabulary",
            "lm",
            "tune",
            "average",
            "export",
            "tracking",
            "configs",
            "bandwidth",
        )
    ),
    *(f"launch.{name}" for name in ("submit", "doctor", "sweep", "status", "job", "node")),
    *(f"benchmarks.{name}" for name in ("plan", "loader", "step", "encoders", "scaling", "gpu")),
    "tests.fuzz",
    "tests.faults",
]
SLOW_TO_IMPORT = [
    "torch",
    "torchaudio",
    "webdataset",
    "comet_ml",
    "matplotlib",
    "pyarrow",
    "numpy",
    "jiwer",
    "soundfile",
]

ASK = """
import json, runpy, sys
module, slow = sys.argv[1], json.loads(sys.argv[2])
sys.argv[1:] = ["--help"]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
except SystemExit as end:
    print(json.dumps({"status": end.code or 0, "loaded": sorted(set(slow) & set(sys.modules))}), file=sys.stderr)
"""


@pytest.mark.parametrize("module", ENTRY_POINTS)
def test_help_answers_at_once_and_with_examples(module):
    command = [sys.executable, "-W", "error", "-c", ASK, module, json.dumps(SLOW_TO_IMPORT)]
    answer = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert json.loads(answer.stderr) == {"status": 0, "loaded": []}
    assert answer.stdout.startswith("usage: ")
    _, heading, examples = answer.stdout.partition("\nexamples")
    names = (f" -m {module}", f" -m ddp_asr.{module}", f"ddp-asr {module.rpartition('.')[2]}")
    assert heading and any(name in examples for name in names)
