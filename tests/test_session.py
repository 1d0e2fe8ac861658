"""An attempt put together: who may write where, what stands in the run directory, what a run begins with."""

import json
import re
import subprocess
import sys

import pytest
import torch
import yaml

from ddp_asr.config import load_config
from ddp_asr.runs import checkpoint
from ddp_asr.training.session import make_schedule
from tests import tiny_training as tiny
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_corpus):
    """A finished run on two processes."""
    runs = tmp_path_factory.mktemp("session")
    tiny.train(tiny_corpus.arguments(runs), 2)
    return runs / "run"


def test_the_schedule_is_that_of_the_settings(tiny_corpus):
    overrides = ["--train.save_every_min=1.5", "--train.stop_at_step=7"]
    schedule = make_schedule(load_config(tiny_corpus.directory / "tiny.yaml", overrides), 4)
    assert schedule.total_steps == tiny.STEPS
    assert (schedule.save_every_s, schedule.save_every_steps, schedule.stop_at_step) == (90.0, 3, 7)


def test_a_run_directory_holds_what_the_design_says(run):
    status, wers = tiny.status(run), [line["wer"] for line in tiny.metrics(run) if line["kind"] == "test"]
    assert status["state"] == "done" and not (run / "lease.json").exists()
    assert (status["step"], status["total_steps"], status["best_wer"]) == (tiny.STEPS, tiny.STEPS, min(wers))
    assert yaml.safe_load((run / "config.yaml").read_text())["encoder"]["rnn_size"] == 16
    environment = json.loads((run / "environment.json").read_text())
    assert environment["processes"] == 2 and {"git_commit", "git_dirty"} <= environment.keys()
    assert environment["fused_micro_batches"] == [1, 1]  # on CPUs
    newest = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert newest == ["step-00000006.pt", "step-00000009.pt", "step-00000012.pt"]  # train.keep_last
    for rank in (0, 1):
        assert f"rank {rank} of 2" in (run / f"rank-{rank:04d}.log").read_text()
    lines = tiny.read_lines(run / "metrics.jsonl")
    train = "kind step epoch loss learning_rate gradient_norm audio_s_per_s process_audio_s_per_s data_wait rank_wait"
    train += " padding skipped gpu_memory_gb host_memory_gb time_s"
    fields = {
        "train": train,
        "test": "kind step epoch loss wer cer time_s",
        "epoch": "kind step epoch utterances fired time_s",
    }
    assert all(" ".join(line) == fields[line["kind"]] for line in lines)
    assert all(line["host_memory_gb"] > 0.01 for line in lines if line["kind"] == "train")
    assert [(line["step"], line["epoch"]) for line in lines if line["kind"] == "train"] == [
        (step, (step - 1) // 4 + 1) for step in range(1, 13)
    ]
    samples = tiny.read_lines(run / "samples.jsonl")
    assert [each["step"] for each in samples] == [5, 10, 12]
    assert all(set(pair) == {"key", "reference", "hypothesis"} for each in samples for pair in each["samples"])
    assert len(samples[0]["samples"]) == 2  # tracking.samples


def test_the_first_attempt_says_where_the_longest_are_alone(tiny_corpus, tmp_path):
    options = ("--batch.max_seconds=1.5", "--batch.micro_batches=2")
    for step in (1, 2):
        output = tiny.train(tiny_corpus.arguments(tmp_path, "run", *options, f"--train.stop_at_step={step}"))
        advised = "at speed 0.9 are alone in their micro-batches, because batch.max_seconds = 1.5 is less" in output
        assert advised == (step == 1)  # a checkpoint of other batches could not be continued


def test_each_epoch_says_how_often_its_augmentations_fired(run):
    """Over both processes; that it does not depend on their number or on stops is part of the properties."""
    epochs = [line for line in tiny.metrics(run) if line["kind"] == "epoch"]
    assert [(line["epoch"], line["step"], line["utterances"]) for line in epochs] == [
        (1, 4, 26),
        (2, 8, 26),
        (3, 12, 26),
    ]
    for line in epochs:
        assert list(line["fired"]) == ["speed 0.9", "speed 1.1", "noise", "frequency masks", "time masks"]
        assert all(0 < count <= 26 for count in line["fired"].values())
    assert "epoch 3: speed 0.9 in " in (run / "rank-0000.log").read_text()


def test_the_best_checkpoint_is_of_the_best_evaluation(run):
    tests = [line for line in tiny.metrics(run) if line["kind"] == "test"]
    best = checkpoint.read(run / "best.pt")
    lowest = min((line["wer"], line["loss"]) for line in tests)  # of equal error rates the lower loss
    assert best["progress"]["best"] == lowest
    assert best["step"] == best["progress"]["best_step"]
    assert best["step"] == next(line["step"] for line in tests if (line["wer"], line["loss"]) == lowest)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_on_the_way_is_that_of_the_command(run, tiny_corpus, processes):
    """The last checkpoint's own numbers, averages of the weights included."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if processes == 2 else []
    command = [sys.executable, *launcher, "-m", "ddp_asr.evaluate", str(checkpoint.step_path(run, tiny.STEPS))]
    done = subprocess.run(
        [*command, str(tiny_corpus.test), "--json"], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )
    found = json.loads(done.stdout)
    (line,) = [line for line in tiny.metrics(run) if (line["kind"], line["step"]) == ("test", tiny.STEPS)]
    assert (found["wer"], found["cer"]) == (line["wer"], line["cer"])
    assert found["loss"] == pytest.approx(line["loss"], rel=1e-5)


def test_a_finished_run_names_its_results_and_the_next_command(run, tiny_corpus):
    """Here one that is started again: its display and its evaluation are long gone."""
    found = tiny.status(run)
    best_step = checkpoint.read(run / "best.pt")["step"]
    output = tiny.train(tiny_corpus.arguments(run.parent), 2)
    assert f"best WER {100 * found['best_wer']:.1f} % at step {best_step}: {run / 'best.pt'}\n" in output
    assert f"curves: {run / 'curves.png'}\n" in output
    assert output.endswith(f"next: ddp-asr evaluate {run} {tiny_corpus.test}\n")


def test_left_out_utterances_are_listed(tiny_corpus, tmp_path):
    arguments = tiny_corpus.arguments(tmp_path, "run", "--vocabulary.symbols= ab", "--train.epochs=1")
    output = tiny.train([*arguments, "--batch.micro_batches=2"])
    listed = tiny.read_lines(tmp_path / "run" / "left_out.jsonl")
    assert listed and all("character" in each["reason"] for each in listed)
    assert f"{26 - len(listed)} utterances, {len(listed)} left out" in output
    assert f'"\'" in {len(listed)} (such as {listed[0]["key"]})' in output
    assert "WARNING: " in output and "--vocabulary.symbols" in output


def test_speech_is_cached_once_for_all_ranks(tiny_corpus, tmp_path):
    arguments = tiny_corpus.arguments(tmp_path, "run", f"--data.cache_dir={tmp_path / 'cache'}", "--train.epochs=1")
    tiny.train(arguments, 3)
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 2
    plain = tiny_corpus.arguments(tmp_path, "plain", "--train.epochs=1")
    tiny.train(plain, 3)
    assert tiny.differences(tiny.final_state(tmp_path / "run", 4), tiny.final_state(tmp_path / "plain", 4)) == []


@pytest.mark.slow
def test_a_second_run_in_the_same_directory_is_refused(tiny_corpus, tmp_path):
    gate = tiny.Gate(tmp_path, step=2)
    first = tiny.start(tiny_corpus.arguments(tmp_path, "run", "--train.epochs=1"), 1, [gate])
    gate.wait()
    sentence = tiny.start(tiny_corpus.arguments(tmp_path), 2).fail(limit_s=60)
    assert tiny.matches(
        rf"^another run holds {tmp_path / 'run'} \(.*pid {first.processes[0].pid}, .*run.name=", sentence
    )
    assert tiny.status(tmp_path / "run")["state"] == "running"
    gate.open()
    first.succeed()
    assert tiny.status(tmp_path / "run")["state"] == "done"


def test_a_run_that_is_taken_over_ends_without_writing(tiny_corpus, tmp_path):
    gate = tiny.Gate(tmp_path, step=2)
    ranks = tiny.start(tiny_corpus.arguments(tmp_path), 2, [gate])
    gate.wait()
    run = tmp_path / "run"
    lease = json.loads((run / "lease.json").read_text())
    (run / "lease.json").unlink()
    (run / "lease.json").write_text(json.dumps({**lease, "nonce": "another", "host": "elsewhere"}))
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file() and path.suffix != ".log"}
    gate.open()
    assert f"{run} was taken over by another run (elsewhere, " in ranks.fail()
    assert {path: path.read_bytes() for path in before} == before


def test_checkpoints_that_cannot_be_written_end_every_rank(tiny_corpus, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("a file where the directory should be")
    sentence = tiny.start(tiny_corpus.arguments(tmp_path), 3).fail()
    assert tiny.matches(r"^checkpoint .*step-0.* cannot be written \(.*: free space or mend the directory", sentence)
    assert tiny.status(tmp_path / "run")["state"] == "failed"


# ---- fine-tuning ---------------------------------------------------------------------------------------------------


def test_a_run_starts_from_anothers_weights(run, tiny_corpus, tmp_path):
    """From its moving average, with everything else anew."""
    theirs = checkpoint.step_path(run, tiny.STEPS)
    options = (f"--train.init_from={theirs}", "--train.stop_at_step=1", "--optim.learning_rate=1e-12")
    tiny.train(tiny_corpus.arguments(tmp_path, "run", *options), 2)
    averages, tuned = checkpoint.read(theirs)["averages"], tiny.final_state(tmp_path / "run", 1)
    assert all(torch.equal(weight, averages[name]) for name, weight in tuned["model"].items())
    assert tuned["progress"]["step"] == 1


@pytest.mark.parametrize(
    "option, expected",
    [
        ("--encoder.rnn_size=8", r"init_from = .* is of another model \(.*\): take over its encoder settings"),
        (
            "--train.init_from=nowhere.pt",
            r"^train.init_from: there is no nowhere.pt: name a run directory",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(run, tiny_corpus, tmp_path, option, expected):
    arguments = tiny_corpus.arguments(tmp_path, "run", f"--train.init_from={checkpoint.step_path(run, 12)}", option)
    assert tiny.matches(expected, tiny.start(arguments, 2).fail())
    assert tiny.matches(expected, tiny.start([*arguments, "--dry-run"]).fail())


def test_a_run_of_other_symbols_says_what_it_takes(run, tiny_corpus, tmp_path):
    more = (f"--train.init_from={run}", "--vocabulary.symbols= abc", "--train.stop_at_step=1")
    taken = r"first weights from \S*best.pt \(step \d+\): the encoder, the blank and 3 of 4 symbols; new are 'c'; not"
    arguments = tiny_corpus.arguments(tmp_path, "run", *more)
    assert re.search(taken, tiny.train([*arguments, "--dry-run"]))
    assert re.search(taken, tiny.train(arguments, 2))


@pytest.mark.parametrize("layers", [0, 1])
def test_frozen_layers_keep_their_weights_for_so_many_steps(run, tiny_corpus, tmp_path, layers):
    frozen = ("--optim.frozen_steps=3", f"--optim.frozen_layers={layers}")
    options = (f"--train.init_from={checkpoint.step_path(run, tiny.STEPS)}", *frozen)
    averages = checkpoint.read(checkpoint.step_path(run, tiny.STEPS))["averages"]

    def changed(name, step):
        state = tiny.final_state(tmp_path / name, step)["model"]
        return {weight for weight, value in state.items() if not torch.equal(value, averages[weight])}

    tiny.train(tiny_corpus.arguments(tmp_path, "run", *options, "--train.stop_at_step=3"))
    learnt = changed("run", 3)
    assert {"classifier.weight", "classifier.bias"} <= learnt
    assert any(name.startswith("encoder.") for name in learnt) == bool(layers)
    assert not any(name.startswith(("encoder.strided", "encoder.blocks", "encoder.bridge")) for name in learnt)
    assert not any(name.startswith("encoder.rnn.0.") for name in learnt)
    tiny.train(tiny_corpus.arguments(tmp_path, "run", *options))  # on from within, and beyond
    assert changed("run", tiny.STEPS) == set(averages)
    tiny.train(tiny_corpus.arguments(tmp_path, "other", *options), 3)
    tiny.assert_close_runs(tmp_path / "run", tmp_path / "other", 1e-4)


def test_a_run_directory_stands_for_its_best_weights(run, tiny_corpus, tmp_path):
    """As for evaluation: best.pt, else the newest good checkpoint."""
    arguments = tiny_corpus.arguments(tmp_path, "run", f"--train.init_from={run}", "--optim.learning_rate=1e-12")
    assert f"starts            at step 0, from the weights of {run}" in tiny.train([*arguments, "--dry-run"])
    tiny.train([*arguments, "--train.stop_at_step=1"])
    averages = checkpoint.read(run / "best.pt")["averages"]
    assert all(torch.equal(w, averages[name]) for name, w in tiny.final_state(tmp_path / "run", 1)["model"].items())
