"""The tests marked gpu, by pytest in this process; a row for each test as soon as it has ended."""

import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.job import REPOSITORY, Job


class _Rows:
    """A plugin of pytest."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            why = str(report.longrepr[2] if report.skipped else report.longrepr or "").strip().splitlines()
            values = {"outcome": report.outcome, "seconds": report.duration, "why": why[-1] if why else ""}
            self.job.check("tests", report.outcome != "failed", test=report.nodeid, **values)


def run(job: Job) -> None:
    # Other test files import packages that are not carried to a machine without a network.
    files = [str(path) for path in sorted((REPOSITORY / "tests").glob("test_*.py")) if _has_gpu_tests(path)]
    # A machine may have plugins that nobody here has tried.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    options = [
        "-p",
        "pytest_timeout",
        "-m",
        "gpu",
        "-v",
        "-p",
        "no:cacheprovider",
        f"--basetemp={job.folder / 'pytest'}",
        "--timeout=60",
    ]
    status = pytest.main([*options, *files], plugins=[_Rows(job)])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        job.check("tests", False, test="all", outcome=f"pytest ended with {status!r}", seconds=0.0, why="see the log")
    if not job.on_gpu:
        job.note("needs CUDA: without a GPU every test is skipped")


def _has_gpu_tests(path: Path) -> bool:
    return "pytest.mark.gpu" in path.read_text(encoding="utf-8")
