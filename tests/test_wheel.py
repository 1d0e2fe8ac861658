"""The wheel in an environment of its own, outside the checkout: one name, the whole program, configs and templates."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow

SOURCES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "ddp_asr", "launch", "configs", "slurm")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, because setuptools writes beside the sources."""
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (REPOSITORY / name).is_dir():
            shutil.copytree(REPOSITORY / name, copy / name, symlinks=True)
        else:
            shutil.copy(REPOSITORY / name, copy / name)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out), str(copy)]
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *build], check=True)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The folder of the environment's programs. Other packages come from the environment of these tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    programs = folder / "bin"
    arguments = ["install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", programs / "python", *arguments], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # A folder named in a .pth file is searched, but its own .pth files, such as the checkout's, are not read.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return programs


@pytest.fixture
def call(installed, tmp_path):
    """Runs one of the environment's programs in an empty folder and returns what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PATH"] = f"{installed}:{environment['PATH']}"

    def run(program, *arguments, status=0):
        command = [installed / program, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == status, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def test_it_has_one_name_and_every_file_of_the_program(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {"ddp_asr"}
    wanted = {f"ddp_asr/{path.relative_to(REPOSITORY / 'ddp_asr')}" for path in (REPOSITORY / "ddp_asr").rglob("*.py")}
    wanted |= {f"ddp_asr/{path.relative_to(REPOSITORY)}" for path in (REPOSITORY / "launch").glob("*.py")}
    wanted.add("ddp_asr/recognition/report.html")
    for pattern in ("configs/**/*.yaml", "slurm/*.sbatch"):
        wanted |= {f"ddp_asr/share/{path.relative_to(REPOSITORY)}" for path in REPOSITORY.glob(pattern)}
    assert {name for name in names if not name.endswith("/")} >= wanted


def test_no_package_launch_is_installed(call):
    where = "import importlib.util, ddp_asr; print(importlib.util.find_spec('launch'), ddp_asr.__file__)"
    launch, file = call("python", "-c", where).split()
    assert launch == "None" and "site-packages" in file


def test_configs_are_listed_and_copied(call, tmp_path):
    listed = call("ddp-asr", "configs")
    assert "configs/an4.yaml" in listed and "slurm/train.sbatch" in listed
    call("ddp-asr", "configs", "configs/an4.yaml", "slurm/train.sbatch")
    assert (tmp_path / "configs/an4.yaml").read_bytes() == (REPOSITORY / "configs/an4.yaml").read_bytes()
    call("ddp-asr", "configs", "--all")  # equal files are no obstacle
    (tmp_path / "configs/an4.yaml").write_text("mine")
    assert "exists and differs" in call("ddp-asr", "configs", "--all", status=2)
    assert "did you mean 'configs/an4.yaml" in call("ddp-asr", "configs", "configs/an5.yaml", status=2)


def test_a_submitted_training_runs_from_its_copy_of_the_code(call, tiny_corpus, tmp_path):
    runs = tmp_path / "runs"
    arguments = [*tiny_corpus.arguments(runs), "--train.epochs=1"]
    call("ddp-asr", "submit", "--cluster", "debug", *arguments)
    assert json.loads((runs / "run/status.json").read_text())["state"] == "done"
    assert "done" in call("ddp-asr", "status", str(runs))


def test_a_training_on_two_processes(call, tiny_corpus, tmp_path):
    call("ddp-asr", "train", "--processes", "2", *tiny_corpus.arguments(tmp_path / "runs"), "--train.epochs=1")
    assert json.loads((tmp_path / "runs/run/status.json").read_text())["state"] == "done"
