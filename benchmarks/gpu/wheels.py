"""Packages for a machine that has torch, torchaudio, numpy, pyarrow and pytest, and no network.

    download(Path("wheels"), "3.12")     # where there is a network: a wheel of each package that is needed beside those
    unpack(Path("wheels"), site)         # where there is none: into a directory for PYTHONPATH, without pip
    require_packages(site)               # a sentence where something is still missing; whether there is a GPU

The versions are those installed here, so what was tried here is what runs there.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

from ddp_asr.errors import UserError

THERE = ("torch", "torchaudio", "numpy", "pyarrow", "pytest")
# Distributions that the blocks import beside those, and the name by which they do.
NEEDED = {
    "soundfile": "soundfile",
    "soxr": "soxr",
    "jiwer": "jiwer",
    "pyyaml": "yaml",
    "rich": "rich",
    "matplotlib": "matplotlib",
    "webdataset": "webdataset",
    "hypothesis": "hypothesis",
    "pytest-timeout": "pytest_timeout",
}
# pip takes a platform literally, so every glibc that a wheel may have been built for is named.
PLATFORMS = [*(f"manylinux_2_{minor}_x86_64" for minor in range(5, 40)), "manylinux2014_x86_64", "manylinux1_x86_64"]


def to_carry() -> dict[str, str]:
    """Name and version of each distribution that is needed there: `NEEDED` and what those need, without `THERE`."""
    names = with_requirements(NEEDED) - with_requirements(THERE)
    return {name: importlib.metadata.version(name) for name in sorted(names)}


def with_requirements(names: Iterable[str]) -> set[str]:
    from packaging.requirements import Requirement

    found: set[str] = set()
    waiting = [normalised(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            for requirement in map(Requirement, importlib.metadata.requires(name) or []):
                if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                    waiting.append(normalised(requirement.name))
    return found


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def download(folder: Path, python: str) -> None:
    """Fetches the wheels with pip, for x86-64 Linux and that version of Python."""
    wanted = [f"{name}=={version}" for name, version in to_carry().items()]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    command += ["--implementation", "cp", "--python-version", python]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    try:
        subprocess.run([*command, *wanted], check=True)
    except subprocess.CalledProcessError as error:
        raise UserError(
            f"pip could not fetch the wheels (status {error.returncode}, its own words are above): check the network, "
            "or name another version of Python with --python"
        ) from None


def unpack(folder: Path, site: Path) -> None:
    """Unpacks the wheels of distributions that this Python lacks."""
    wheels = sorted(folder.glob("*.whl"))
    if not wheels:
        raise UserError(f"--wheels {folder} holds no wheel: fetch them with --download-wheels where there is a network")
    for wheel in wheels:
        try:
            importlib.metadata.version(wheel.name.split("-")[0])
        except importlib.metadata.PackageNotFoundError:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)


def require_packages(site: Path | None) -> bool:
    """Raises a UserError if a package that the blocks import is missing or unusable; says whether torch sees a GPU."""
    names = ["numpy", "pyarrow.parquet", "pytest", *NEEDED.values(), "torchaudio", "torch"]
    code = "; ".join([*(f"import {name}" for name in names), "print(torch.cuda.is_available())"])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site or ""), os.environ.get("PYTHONPATH", "")])}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if answer.returncode:
        reason = (answer.stderr.strip().splitlines() or ["it says nothing"])[-1]
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise UserError(
            f"{sys.executable} lacks a package ({reason}): where there is a network run 'python -m benchmarks.gpu "
            f"--download-wheels DIR --python {python}', bring DIR here and add --wheels DIR"
        )
    return answer.stdout.split()[-1] == "True"
