"""The batch scripts and cluster profiles, as far as no cluster is needed (tests/slurm runs them on one).

Every option in them exists where it is used, the scripts and docs/slurm.md agree with what they name, and what a script
does before and without `srun` is run for real.
"""

import argparse
import dataclasses
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ddp_asr import cli
from ddp_asr.config import Config, load_config
from ddp_asr.data.index import read_dataset_json
from ddp_asr.data.sources import openslr
from launch import cluster, job, node
from tests import tiny_speech
from tests.conftest import REPOSITORY
from tests.repository import PAGES, commands, help_of, text_of

SCRIPTS = sorted((REPOSITORY / "slurm").glob("*.sbatch"))
PROFILES = sorted((REPOSITORY / "configs" / "clusters").glob("*.yaml"))

# Options of Slurm that scripts and pages use. Where Slurm is installed, it is asked itself whether it knows them.
SBATCH = {
    *("account", "array", "cpus-per-task", "dependency", "gpus-per-node", "job-name", "kill-on-invalid-dep", "nodes"),
    *("ntasks-per-node", "open-mode", "output", "parsable", "requeue", "signal", "time"),
}
SRUN = {"cpu-bind", "cpus-per-task", "export", "kill-on-bad-exit", "nodes", "ntasks", "ntasks-per-node", "wait"}


def text(script: Path) -> str:
    return script.read_text(encoding="utf-8")


def code(script: Path) -> str:
    """The script without comments, continued lines joined."""
    lines = [line for line in text(script).splitlines() if not line.lstrip().startswith("#")]
    return "\n".join(lines).replace("\\\n", " ")


def directives(script: Path) -> list[str]:
    return re.findall(r"^#SBATCH (.*)$", text(script), re.MULTILINE)


def options(words: str) -> list[str]:
    """`name` of each `--name` or `--name=value`."""
    return re.findall(r"(?<![^\s\"'+{-])--([a-z][\w.-]*)", words)


def run(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The script by bash, as Slurm would start it, with these variables beside the usual ones."""
    usual = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{usual['PATH']}"
    return subprocess.run(
        ["bash", str(REPOSITORY / "slurm" / script), *arguments],
        cwd=REPOSITORY,
        env={**usual, "PATH": path, **variables},
        capture_output=True,
        text=True,
    )


# ---- options --------------------------------------------------------------------------------------------------------


def test_there_are_three_scripts():
    assert [script.name for script in SCRIPTS] == ["evaluate.sbatch", "shard.sbatch", "train.sbatch"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_bash_reads_the_script(script):
    answer = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (answer.returncode, answer.stderr) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_slurm_reads_every_directive(script):
    assert text(script).startswith("#!/bin/bash\n")
    before_the_first_command = re.split(r"^[^#\n]", text(script), maxsplit=1, flags=re.MULTILINE)[0]
    assert re.findall(r"^#SBATCH (.*)$", before_the_first_command, re.MULTILINE) == directives(script)
    for directive in directives(script):
        assert re.fullmatch(r"--[a-z-]+(=\S+)?", directive), f"not one option: {directive}"
        assert set(options(directive)) <= SBATCH


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_runs_on_any_cluster_but_for_the_account(script):
    named = {option for directive in directives(script) for option in options(directive)}
    assert not named & {"account", "partition", "qos", "time", "gpus-per-node", "constraint", "mem"}
    assert re.findall(r"^##SBATCH (.*)$", text(script), re.MULTILINE) == ["--account=NAME"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_options_of_ours_exist(script):
    found = re.findall(r"-m (ddp_asr(?:\.\w+)+)([^\n&|;)]*)", code(script))
    assert found
    for module, rest in found:
        assert (REPOSITORY / module.replace(".", "/")).with_suffix(".py").exists()
        for option in options(rest):
            assert f"--{option}" in help_of(module), f"{script.name}: {module} has no --{option}"


@pytest.mark.parametrize("name", ["train.sbatch", "evaluate.sbatch"])
def test_options_of_srun_exist(name):
    srun = re.search(r"\bsrun (--.*?) python -m ddp_asr.launch.node ", code(REPOSITORY / "slurm" / name))
    assert srun and set(options(srun[1])) <= SRUN


def test_both_launchers_run_the_same_batch_script():
    """Apart from how a node's task is told what to train: the same traps, the same srun, the same conclusion."""
    ours = code(REPOSITORY / "slurm" / "train.sbatch")
    theirs = cluster.sbatch_text(Path("/a"), cluster.Request(cpus_per_task=2), name="a", code=Path("/a"), after=["end"])
    srun = re.search(r"^srun .*?(?= python)", ours, re.MULTILINE)[0].replace('"$SLURM_CPUS_PER_TASK"', "2")
    chosen = shlex.split(re.sub(r"\$\{SLURM_CPUS_PER_TASK:\+(\S+)\}", r"\1", srun))
    submitits = shlex.split(re.search(r"^srun .*", theirs, re.MULTILINE)[0])
    assert set(chosen) == set(submitits[: submitits.index(sys.executable)]) - {
        "--unbuffered",
        "--output",
        "/a/%j_%t_log.out",
    }
    traps = [re.findall(r"^trap .*?(?=\s#|$)", script, re.MULTILINE) for script in (ours, theirs)]
    assert len(traps[0]) == 2 and [line.strip() for line in traps[0]] == traps[1]


def test_whoever_starts_torchrun_takes_the_stop_signals_from_where_they_are_defined():
    """So that it hands on exactly those that the ranks handle."""
    folders = ("launch", "configs", "slurm", "docs")
    files = [path for folder in folders for path in (REPOSITORY / folder).rglob("*") if path.is_file()]
    files = [path for path in files if path.suffix in (".py", ".yaml", ".sbatch", ".md")]
    listed = re.compile(r"(?:(?:signal\.)?SIG[A-Z0-9]+,\s*){3}")
    for path in (*files, REPOSITORY / "Makefile", REPOSITORY / "README.md", REPOSITORY / "ddp_asr" / "cli.py"):
        assert not listed.search(text(path)), path


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="asks the parser of sbatch, which is not installed")
def test_slurm_knows_these_options(tmp_path):
    """By its own reading of them, which comes before --help, for which it wants no more than a configuration."""
    conf = tmp_path / "slurm.conf"
    conf.write_text("ClusterName=none\nSlurmctldHost=localhost\nNodeName=localhost\nPartitionName=all Nodes=ALL\n")

    def read(command: str, options: list[str]) -> tuple[int, str]:
        environment = {**os.environ, "SLURM_CONF": str(conf)}
        answer = subprocess.run([command, *options, "--help"], env=environment, capture_output=True, text=True)
        return answer.returncode, answer.stderr

    for script in SCRIPTS:
        assert read("sbatch", directives(script)) == (0, "")
    for page in ("docs/slurm.md", *(f"slurm/{script.name}" for script in SCRIPTS)):
        for words in sbatch_commands(page):
            chosen = [re.sub(r"\$\{\w+:\?\}", "1", word) for word in before_the_script(words)]
            assert read("sbatch", chosen) == (0, ""), f"{page}: {words}"
    plain = {"cpu-bind": "none", "export": "ALL"}
    assert read("srun", [f"--{option}={plain.get(option, 1)}" for option in sorted(SRUN)]) == (0, "")
    assert read("sbatch", ["--open-made=append"])[0] != 0


# ---- what scripts do before and without srun ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "arguments", "complaint"),
    [
        ("train.sbatch", [], "no config: no such file"),
        ("train.sbatch", ["configs/nope.yaml"], "configs/nope.yaml: no such file"),
        ("evaluate.sbatch", ["runs/demo"], "say what to score, and on what"),
    ],
)
def test_a_mistake_is_one_sentence(script, arguments, complaint):
    answer = run(script, *arguments)
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: ") and answer.stderr.count("\n") == 1 and complaint in answer.stderr


def test_the_array_has_a_task_for_every_split():
    named = re.search(r"sources=\((\w.*)\)", text(REPOSITORY / "slurm" / "shard.sbatch"))
    assert named and sorted(named[1].split()) == sorted(openslr.LIBRISPEECH_MD5)
    assert f"--array=0-{len(openslr.LIBRISPEECH_MD5) - 1}" in directives(REPOSITORY / "slurm" / "shard.sbatch")


def test_a_task_shards_its_own_source(tmp_path):
    split = tiny_speech.librispeech(tmp_path / "split", speakers=1)
    archive = tiny_speech.archive(tmp_path / "packed.tar.gz", split)
    arguments = ["--shard-mb=1", f"{split}/", str(archive)]
    variables = {"SHARDS": str(tmp_path / "shards"), "DATA": str(tmp_path), "SLURM_ARRAY_TASK_MAX": "1"}
    for task, name in enumerate(["split", "packed"]):
        answer = run("shard.sbatch", *arguments, SLURM_ARRAY_TASK_ID=str(task), **variables)
        assert answer.returncode == 0, answer.stderr
        assert read_dataset_json(tmp_path / "shards" / name)["utterances"] == 4
    assert sorted(path.name for path in (tmp_path / "shards").iterdir()) == ["packed", "split"]


def test_a_task_ends_with_the_status_of_its_sharding(tmp_path):
    answer = run("shard.sbatch", str(tmp_path / "nothing"), SHARDS=str(tmp_path / "shards"))
    assert answer.returncode == 2
    assert "no such source" in answer.stderr


def test_an_array_of_another_size_than_the_sources():
    answer = run("shard.sbatch", "a", "b", SLURM_ARRAY_TASK_ID="2", SLURM_ARRAY_TASK_MAX="6")
    assert (answer.returncode, answer.stdout) == (0, "task 2 has nothing to do: there are 2 source(s)\n")
    answer = run("shard.sbatch", "/nope/a", "/nope/b", "/nope/c", SLURM_ARRAY_TASK_ID="0", SLURM_ARRAY_TASK_MAX="0")
    assert "not sharded: /nope/b /nope/c; give sbatch --array=0-2" in answer.stderr


# ---- pages and profiles ---------------------------------------------------------------------------------------------


def sbatch_commands(page: str) -> list[list[str]]:
    """The words after `sbatch` of each command that runs one of our scripts, in code blocks and script headers."""
    lines = re.sub(r"\\\n#?\s*", "", text_of(page))
    found = re.findall(r"\bsbatch ((?:--\S+\s+)*slurm/\w+\.sbatch[^\n)`\"]*)", lines)
    return [shlex.split(re.split(r"\s#\s|\s{3,}", command)[0]) for command in found]


def before_the_script(words: list[str]) -> list[str]:
    """sbatch's own options."""
    return list(itertools.takewhile(lambda word: word.startswith("--"), words))


@pytest.mark.parametrize("page", [*PAGES, *(f"slurm/{script.name}" for script in SCRIPTS)])
def test_sbatch_commands_name_what_exists(page):
    for words in sbatch_commands(page):
        chosen = before_the_script(words)
        script, *arguments = words[len(chosen) :]
        assert {option for word in chosen for option in options(word)} <= SBATCH, f"{page}: {words}"
        assert (REPOSITORY / script).exists(), f"{page}: {words}"
        for argument in arguments:
            if argument.startswith("configs/"):
                load_config(REPOSITORY / argument)
            section, dot, setting = argument.lstrip("[-").partition(".")
            if argument.lstrip("[").startswith("--") and dot and section != "section":
                assert hasattr(getattr(Config(), section), setting.partition("=")[0]), f"{page}: {words}"


def test_the_slurm_page_is_tried():
    assert len(sbatch_commands("docs/slurm.md")) >= 3
    assert set(cli.LAUNCH) <= set(re.findall(r"\bddp-asr (\w+)", "\n".join(commands(text_of("docs/slurm.md")))))


def test_the_slurm_page_repeats_the_codes_numbers():
    page, defaults = " ".join(text_of("docs/slurm.md").split()), Config().distributed
    assert f"{node.PORTS[0]} to {node.PORTS[-1]} for the rendezvous" in page
    assert f"until {job.MAX_FAILURES} attempts in a row fail" in page
    assert f"SIGUSR2, {cluster.Request().signal_s} s before" in page
    assert f"`distributed.timeout_s` ({defaults.timeout_s:g} s)" in page
    assert f"`distributed.stop_grace_s` ({defaults.stop_grace_s:g} s)" in page


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_a_profile_is_a_request(profile):
    assert text(profile).startswith("# "), "a profile opens with what it is for"
    parser = argparse.ArgumentParser()
    cluster.add_options(parser)
    request = cluster.request_from(parser.parse_args(["--cluster", str(profile)]))
    if profile.stem in cluster.EXECUTORS:
        assert request == dataclasses.replace(cluster.Request(), executor=profile.stem)
