"""`python -m benchmarks.gpu`: it runs to its end, no block stops another, and docs/gpu.md is its report."""

import importlib.metadata
import json
import os
import subprocess
import sys
import textwrap
import zipfile

import pytest
import torch

from benchmarks.gpu import bigru, report, results, runner, wheels
from benchmarks.gpu.blocks import BLOCKS, Block, variants
from ddp_asr import config
from ddp_asr.encoders.rescnn_bigru import BiGRU
from ddp_asr.errors import UserError
from ddp_asr.model import make_model
from tests.conftest import REPOSITORY
from tests.tiny_training import is_alive

# Hides every package that a machine with a GPU need not have.
GATE = """
import sys
from importlib.machinery import PathFinder
class Gate(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {absent} else super().find_spec(name, path, target)
sys.meta_path = [Gate if finder is PathFinder else finder for finder in sys.meta_path]
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute on two cores that do nothing else
def test_the_reduced_form_runs_to_its_end_with_what_is_carried(tmp_path):
    carried = wheels.with_requirements([*wheels.THERE, *wheels.NEEDED])
    top_level = importlib.metadata.packages_distributions().items()
    absent = {name for name, owners in top_level if not {wheels.normalised(owner) for owner in owners} & carried}
    assert {"comet_ml", "submitit", "datasets"} <= absent
    (tmp_path / "sitecustomize.py").write_text(GATE.format(absent=absent - {"ddp_asr", "launch"}))
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    command = [sys.executable, "-m", "benchmarks.gpu", "--small", "--total-s", "1700", "--out", str(tmp_path / "out")]
    answer = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    log = (tmp_path / "out" / "log.txt").read_text()
    assert answer.returncode == 0, answer.stdout + answer.stderr + log
    found = results.read(tmp_path / "out")
    assert {name: result.ended for name, result in found.items()} == dict.fromkeys(BLOCKS, results.OK), log
    for name, result in found.items():
        assert result.tables or "needs CUDA" in str(result.notes), name
        assert f"==== {name}: ok" in log
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.jsonl", "log.txt", "trace.json.gz"}


@pytest.fixture
def block(tmp_path, monkeypatch):
    """Makes a block of the body of its `run(job)`."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def of(name, body, limit_s=60.0):
        (tmp_path / f"block_{name}.py").write_text(f"def run(job):\n{textwrap.indent(textwrap.dedent(body), '    ')}")
        return Block(name, "", limit_s, f"block_{name}")

    return of


def test_no_block_stops_the_others(tmp_path, block):
    blocks = {
        "hangs": block(
            "hangs",
            """
            import signal, subprocess, sys
            child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
            job.row("before", pid=child.pid)
            signal.pause()
            """,
            limit_s=8,
        ),
        "raises": block("raises", "raise ValueError('out of luck')"),
        "disagrees": block("disagrees", "job.check('sums', 1 + 1 == 3, total=2)"),
        "works": block("works", "job.row('steps', ms=1.5); job.note('as it should')"),
    }
    assert runner.run(blocks, tmp_path / "out", small=False, total_s=600) == 1
    found = results.read(tmp_path / "out")
    states = {name: result.ended for name, result in found.items()}
    assert states == {"hangs": "timed out", "raises": "failed", "disagrees": "failed", "works": "ok"}
    (row,) = found["hangs"].tables["before"]  # what was measured before stays
    assert not is_alive(row["pid"])
    assert found["disagrees"].tables["sums"] == [{"total": 2, "holds": False}]
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "ValueError: out of luck" in log and "block_hangs.py" in log  # where it hung
    page = report.render(found, blocks)
    assert "| 1.5 |" in page and "- as it should" in page and "| 2 | **no** |" in page


def test_a_block_that_runs_again_replaces_what_it_left(tmp_path, block):
    for number in (1, 2):
        blocks = {"counts": block("counts", f"job.row('runs', number={number})")}
        assert runner.run(blocks, tmp_path / "out", small=True, total_s=600) == 0
    assert results.read(tmp_path / "out")["counts"].tables == {"runs": [{"number": 2}]}


def test_blocks_for_which_no_time_is_left_are_not_started(tmp_path, block):
    blocks = {"late": block("late", "job.row('never', ms=1)")}
    assert runner.run(blocks, tmp_path / "out", small=False, total_s=5) == 1
    late = results.read(tmp_path / "out")["late"]
    assert (late.ended, late.tables) == ("timed out", {}) and "not started" in late.notes[0]


def test_the_page_is_the_report_of_the_results_beside_it():
    page = report.PAGE.read_text(encoding="utf-8")
    assert page == report.render(results.read(report.RESULTS)), "run: python -m benchmarks.gpu --report"
    assert "NCCL between ranks has not been run" in page


def test_the_limits_of_the_blocks_add_up_to_ten_minutes():
    assert 540 <= sum(block.limit_s for block in BLOCKS.values()) <= 620


# ---- wheels --------------------------------------------------------------------------------------------------------


def wheel(folder, name, **files):
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for file, text in files.items():
            archive.writestr(f"{file}.py", text)
    return folder


def test_wheels_of_what_is_missing_are_unpacked_and_no_others(tmp_path):
    folder = wheel(tmp_path / "wheels", "not_installed_here", not_installed_here="answer = 42")
    wheel(folder, "numpy", numpy="raise ImportError")
    wheels.unpack(folder, tmp_path / "site")
    assert [path.name for path in (tmp_path / "site").iterdir()] == ["not_installed_here.py"]
    with pytest.raises(UserError, match="holds no wheel"):
        wheels.unpack(tmp_path / "site", tmp_path)


def test_a_missing_package_is_named_with_the_remedy(tmp_path):
    (tmp_path / "soxr.py").write_text("raise ImportError('built for another Python')")
    with pytest.raises(
        UserError, match=r"built for another Python.*--download-wheels DIR --python 3\.\d+.*--wheels DIR"
    ):
        wheels.require_packages(tmp_path)


def test_what_is_carried_is_all_that_is_needed_and_nothing_large():
    carried = wheels.to_carry()
    assert set(wheels.NEEDED) <= set(carried) and {"cffi", "rapidfuzz"} <= set(carried)
    assert not {"torch", "numpy", "pyarrow", "pytest", "triton", "comet-ml"} & set(carried)
    assert json.dumps(carried)  # versions are texts


# ---- ways to run a bidirectional layer -----------------------------------------------------------------------------


@pytest.mark.parametrize("way", [bigru.in_two_streams, bigru.in_one_call, bigru.in_one_call_without_lengths])
def test_every_way_computes_the_same_layer(way):
    """Forwards and backwards, in each row's own frames."""
    torch.manual_seed(0)
    layer = BiGRU(6, 4, 0.0).double()
    frames = torch.tensor([9, 5, 7] if way is not bigru.in_one_call_without_lengths else [9, 9, 9])
    lengths = bigru.lengths_of(frames, 9, torch.device("cpu"))
    own = (torch.arange(9)[:, None] < frames)[:, :, None]
    found = []
    for each in (way, bigru.in_turn):
        x = torch.randn(9, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * own
        output = each(layer, x.requires_grad_(), lengths) * own
        found.append([output, *torch.autograd.grad(output.square().sum(), [x, *layer.forward_gru.parameters()])])
        found[-1] += torch.autograd.grad(
            (each(layer, x, lengths) * own).square().sum(), [*layer.backward_gru.parameters()]
        )
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_the_layers_of_a_model_can_run_in_another_way():
    """What the block `variants` replaces is what the encoder calls."""
    settings = config.config_from_dict({"encoder": {"conv_channels": 2, "rnn_layers": 2, "rnn_size": 8}}, "the test")
    torch.manual_seed(0)
    model = make_model(settings, 5).double()
    features, frames = torch.randn(2, 21, 128, dtype=torch.float64), torch.tensor([21, 14])
    features[1, 14:] = 0
    seeds = torch.tensor([3, 4])
    outputs = [model(features, frames, seeds=seeds)]
    with variants.gru_by(bigru.in_one_call):
        outputs.append(model(features, frames, seeds=seeds))
    for row, length in enumerate(outputs[0].frames.tolist()):
        torch.testing.assert_close(outputs[0].logits[row, :length], outputs[1].logits[row, :length])
