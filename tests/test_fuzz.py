"""The suite of bad input: it finds planted faults, and gives the same cases every time."""

import json
import subprocess
import sys
from random import Random

import pytest

from tests.conftest import REPOSITORY
from tests.fuzz import mutate
from tests.fuzz.mutate import Fifo, Folder, Link

FOUND = {
    "refuses": None,
    "raises": "KeyError",
    "exits": "SystemExit",
    "computes": "slow",
    "waits": "hang",
    "crashes": "died",
    "eats memory": "memory",
    "stammers": "sentence",
    "changes silently": "Wrong",
}


@pytest.mark.slow
def test_every_planted_fault_is_found():
    answer = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.planted"], cwd=REPOSITORY, check=True, capture_output=True, text=True
    )
    found = json.loads(answer.stdout)
    for name, kind in FOUND.items():
        assert found.pop(name) == ([1, 1, []] if kind is None else [1, 0, [[f"{name}:0:1", kind]]])
    kinds = [[f"is too strict:0:{number}", kind] for number, kind in enumerate(("refused though valid", "refused"))]
    assert found == {"is too strict": [0, 1, kinds[:1]]}


@pytest.mark.slow
def test_a_case_is_the_same_every_time_and_its_end_is_the_exit_status(tmp_path):
    def run(out, *options):
        command = [sys.executable, "-m", "tests.fuzz", "--out", str(out), *options]
        return subprocess.run(command, cwd=REPOSITORY, check=False, capture_output=True, text=True)

    once, again = (run(tmp_path, "--only", "tokeniser:3:77") for _ in range(2))
    assert once.returncode == again.returncode == 0, once.stdout + once.stderr
    assert "| tokeniser | 1 | " in once.stdout
    wrong = run(tmp_path, "--only", "tokeniser")
    assert wrong.returncode == 2 and "must be TARGET:SEED:NUMBER" in wrong.stderr


DATA = {
    "a.json": b'{"a": [1, 2.5, {"b": null}], "c": "text", "d": true}',
    "a.jsonl": b'{"step": 1}\n{"step": 2}\n',
    "a.yaml": b"a: {b: [1, 2], c: x}\nd: 5e-4\n",
    "a.arpa": b"ngram 1=3\n-1.5 a -0.5\n",
    "a.flac": bytes(range(200)),
}


@pytest.mark.parametrize("name", DATA)
def test_mutations_change_any_content_and_are_the_same_for_the_same_seed(name):
    for content in (DATA[name], b"", b"\n", b"\xff\xfe", b"[[[", b"{}", b"null"):
        changed = [mutate.mutate_file({name: content}, name, Random(seed))[name] for seed in range(1000)]
        assert changed == [mutate.mutate_file({name: content}, name, Random(seed))[name] for seed in range(1000)]
        assert len(set(changed)) > 20


def test_a_tree_is_written_and_read_back(tmp_path):
    tree: mutate.Tree = {"a/b.txt": b"x", "a/link": Link("../nowhere"), "pipe": Fifo(), "empty": Folder()}
    mutate.write_tree({"other": b""}, tmp_path / "tree")
    mutate.write_tree(tree, tmp_path / "tree")
    assert mutate.read_tree(tmp_path / "tree") == tree


def test_changed_ogg_pages_get_their_checksums():
    from tests.fuzz.targets.sources import encoded, with_ogg_checksums

    valid = encoded("ogg")
    assert with_ogg_checksums(valid) == valid == encoded("ogg")
    assert with_ogg_checksums(valid[:22] + bytes(4) + valid[26:]) == valid
