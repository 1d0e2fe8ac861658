"""A secret in the environment stays there: no file that a run or a submission leaves, and nothing printed, holds it."""

import os
import subprocess
import sys
import zipfile

import pytest

from ddp_asr.errors import UserError
from launch import doctor, submit
from tests import tiny_training as tiny
from tests.conftest import REPOSITORY

SECRET = "s3cr3tKEYofNOBODY0123456789"
ENVIRONMENT = {"COMET_API_KEY": SECRET, "COMET_URL_OVERRIDE": "http://127.0.0.1:9/clientlib/", "NO_PROXY": "127.0.0.1"}


def holders(directory):
    """Files below it that hold the secret, those inside archives too."""
    found = []
    for path in directory.rglob("*"):
        if path.is_file():
            contents = [path.read_bytes()]
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    contents += [archive.read(name) for name in archive.namelist()]
            found += [path] * any(SECRET.encode() in content for content in contents)
    return found


def run(module, *arguments):
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_run_and_its_archive_hold_no_key(tiny_corpus, tmp_path):
    """Comet cannot be reached: what is tried online fails, is logged, and becomes an archive."""
    ranks = tiny.start(tiny_corpus.arguments(tmp_path, "run", "--train.stop_at_step=5"), **ENVIRONMENT)
    assert SECRET not in ranks.succeed() + ranks.output
    for mode, files in (("online", "comet.log"), ("offline", "*.zip")):
        code, said = run("ddp_asr.tracking", tmp_path / "run", "--mode", mode)
        assert (code == 0) == (mode == "offline") and SECRET not in said
        assert list((tmp_path / "run" / "comet").glob(files))
    assert holders(tmp_path) == []
    # The test would find it.
    (tmp_path / "leak").write_text(f"key={SECRET}")
    assert holders(tmp_path) == [tmp_path / "leak"]


def test_a_submission_holds_no_key(tiny_corpus, tmp_path, monkeypatch, capfd):
    """The batch script, the pickled task, the frozen code, the settings: all but what Slurm itself does with them."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    for command in ("sbatch", "srun"):
        (tmp_path / "bin" / command).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / command).write_text("#!/bin/sh\necho Submitted batch job 17\n")
        (tmp_path / "bin" / command).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    arguments = [*tiny_corpus.arguments(tmp_path / "runs"), "--time", "1:00:00"]
    assert submit.main([*arguments, "--dry-run"]) == 0
    assert submit.main(arguments) == 0
    (folder,) = (tmp_path / "runs" / "run" / "jobs").iterdir()
    assert {path.suffix for path in folder.iterdir()} >= {".sh", ".pkl", ".yaml", ".json"}
    assert (folder / "code" / "ddp_asr" / "train.py").exists()
    with pytest.raises(UserError):
        submit.main([*arguments, "--train.epochs=0"])
    out, err = capfd.readouterr()
    assert "job 17" in out and SECRET not in out + err
    assert holders(tmp_path) == []


def test_the_doctor_shows_no_key(tiny_corpus, tmp_path, monkeypatch, capfd):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    doctor.main(["--cluster", "local", *tiny_corpus.arguments(tmp_path)[2:], "--json"])
    out, err = capfd.readouterr()
    assert out and SECRET not in out + err
    assert holders(tmp_path) == []
