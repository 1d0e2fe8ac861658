"""Lines of each package, printed and held below a bound. Raise a bound by hand, with the reason in the commit."""

import pytest

from tests.conftest import REPOSITORY

BOUNDS = {
    "ddp_asr": 20_900,
    "launch": 2_940,
    "synthetic_speech": 330,
    "benchmarks": 3_280,
    "tests": 30_600,
}


@pytest.mark.parametrize("package", BOUNDS)
def test_lines_of_a_package(package, capsys):
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in (REPOSITORY / package).rglob("*.py"))
    with capsys.disabled():
        print(f"\n{package}: {lines:,} of at most {BOUNDS[package]:,} lines")
    assert 0 < lines <= BOUNDS[package], "remove something, or raise the bound and say why in the commit"
