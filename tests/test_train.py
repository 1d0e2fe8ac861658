"""The command: what it prints, and that every mistake is one sentence, non-zero on every rank, and soon."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests import tiny_training as tiny
from tests.conftest import REPOSITORY


def command(*arguments, **environment):
    """The real command, alone."""
    return subprocess.run(
        [sys.executable, "-m", "ddp_asr.train", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
def test_the_real_command_alone(tiny_corpus, tmp_path):
    done = command(*tiny_corpus.arguments(tmp_path, "run", "--train.epochs=1"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "done at step 4: all 1 epoch" in done.stdout and "1 process on cpu, fp32" in done.stdout
    assert (tmp_path / "run" / "curves.png").is_file() and (tmp_path / "run" / "spectrogram.png").is_file()


@pytest.mark.slow
def test_the_real_command_under_torchrun_is_what_the_other_tests_run(tiny_corpus, tmp_path):
    torchrun = tiny.Torchrun(tiny_corpus.arguments(tmp_path, "torchrun"), 3)
    assert torchrun.wait() == 0, torchrun.output
    tiny.train(tiny_corpus.arguments(tmp_path, "forked"), 3)
    tiny.assert_same_run(tmp_path / "torchrun", tmp_path / "forked")


def test_dry_run_says_what_would_run_and_starts_nothing(tiny_corpus, tmp_path):
    output = tiny.train(tiny_corpus.arguments(tmp_path, "run", "--dry-run"), 2)
    assert "9,669 parameters" in output and "4 an epoch, 12 in all" in output
    assert "26 utterances" in output and "rnn_size: 16" in output
    assert list(tmp_path.iterdir()) == []


def test_a_profile_is_a_trace_in_the_run_directory(tiny_corpus, tmp_path):
    output = tiny.train(tiny_corpus.arguments(tmp_path, "run", "--train.epochs=2", "--profile", "2"))
    (trace,) = (tmp_path / "run").glob("trace-step-*.json")
    assert str(trace) in output
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert any("gru" in str(name).lower() for name in names)


def test_settings_may_stand_behind_a_space(tiny_corpus, tmp_path):
    tiny.train([*tiny_corpus.arguments(tmp_path), "--train.epochs", "1"])
    assert tiny.status(tmp_path / "run")["step"] == 4


MISTAKES = [
    (["--train.epoch=3"], r"^unknown setting 'train.epoch' .*did you mean 'train.epochs'\?$"),
    (["--trian.epochs=3"], r"^unknown setting 'trian.epochs' .*did you mean 'train.epochs'\?$"),
    (["--train.epochs=many"], r"^train.epochs must be a whole number, not 'many'$"),
    (["--train.epochs=0"], r"^train.epochs must be .*not 0$"),
    (["--train.epochs"], r"^--train.epochs has no value: write --train.epochs=VALUE$"),
    (["epochs=3"], r"'epochs=3' is no setting: write --train.epochs=3"),
    (["--config=nowhere.yaml"], r"^cannot read the settings nowhere.yaml: No such file.*give the path of a YAML file$"),
    (["--train.precision=fp16"], r"^train.precision = fp16 needs an NVIDIA GPU"),
    (["--batch.micro_batches=1"], r"^2 processes cannot share out 1 micro-batches a step: start at most 1, or train"),
    (["--batch.micro_batches=40"], r"^26 usable utterances cannot fill the 40 micro-batches of a step: set batch.mic"),
    (["--batch.max_seconds=0.1"], r"^0 usable utterances cannot fill"),
    (["--data.train=DIR/none"], r"^there are no shards at .*none; make them, with a SOURCE"),
    (["--data.train=DIR"], r"^.*DIR.*(is not complete|no shards|dataset.json|shard)"),
    (["--run.dir=DIR/a-file"], r"^the run directory .*a-file/run cannot be written \(Not a directory\): .*--run.dir=D"),
]


@pytest.mark.parametrize("options, expected", MISTAKES, ids=[options[0] for options, _ in MISTAKES])
def test_a_mistake_is_one_sentence_and_ends_every_rank(tiny_corpus, tmp_path, options, expected):
    (tmp_path / "a-file").write_text("")
    options = [option.replace("DIR", str(tmp_path)) for option in options]
    ranks = tiny.start([*tiny_corpus.arguments(tmp_path / "runs"), *options], 2)
    sentence = ranks.fail()
    assert re.search(expected.replace("DIR", str(tmp_path)), sentence.replace("\n", " ")), sentence
    assert not (tmp_path / "runs" / "run" / "checkpoints").exists()


def test_a_decoder_that_cannot_be_made_ends_every_rank_before_the_rehearsal(tiny_corpus, tmp_path):
    decoder = ["--decoder.kind=beam", f"--decoder.lm={tmp_path / 'none.arpa'}"]
    ranks = tiny.start([*tiny_corpus.arguments(tmp_path / "runs"), *decoder], 2)
    assert re.search(r"none\.arpa cannot be read \(No such file or directory\)", ranks.fail())
    assert "rehearsed" not in ranks.output


def signalled_while_it_ends() -> None:
    """The rank gets a SIGTERM while it reports its mistake, as from a torchrun whose other rank has ended already."""
    import os
    import signal

    from ddp_asr.ranks.watchdog import Watchdog

    before = Watchdog.announce_exit

    def announce_exit(self, reason):
        os.kill(os.getpid(), signal.SIGTERM)
        before(self, reason)

    Watchdog.announce_exit = announce_exit  # type: ignore[method-assign]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_does_not_interrupt_the_report_of_a_mistake(tiny_corpus, tmp_path, processes):
    arguments = [*tiny_corpus.arguments(tmp_path), "--resume", "nowhere.pt"]
    sentence = tiny.start(arguments, processes, [signalled_while_it_ends]).fail()
    assert sentence.startswith("checkpoint nowhere.pt cannot be read")


def test_the_commands_that_make_missing_shards_are_named(tiny_corpus, tmp_path):
    done = command(*tiny_corpus.arguments(tmp_path), "--data.train=no/train", "--data.test=no/test")
    assert done.returncode == 2 and done.stderr.startswith("error: there are no shards at no/train, no/test")
    for name in ("train", "test"):
        assert f"python -m ddp_asr.shard SOURCE --out no/{name}" in done.stderr


@pytest.mark.slow
def test_torchrun_shows_the_sentence_once(tiny_corpus, tmp_path):
    torchrun = tiny.Torchrun([*tiny_corpus.arguments(tmp_path), "--batch.micro_batches=2"], 3)
    assert torchrun.wait() == 1
    assert torchrun.output.count("error: 3 processes cannot share out 2 micro-batches a step") == 1, torchrun.output
    assert torchrun.output.count("\nerror: ") + torchrun.output.startswith("error: ") == 1, torchrun.output


def test_alone_a_mistake_is_found_without_torch(tiny_corpus, tmp_path):
    code = """if True:
        import sys
        from ddp_asr import errors, train
        assert errors.run_entry_point(lambda: train.main(sys.argv[1:])) == 2
        assert "torch" not in sys.modules
    """
    done = subprocess.run(
        [sys.executable, "-c", code, *tiny_corpus.arguments(tmp_path), "--train.epoch=1"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "did you mean 'train.epochs'?" in done.stderr, done.stderr


def test_shards_that_do_not_match_their_index_are_refused_or_named(tiny_corpus, tmp_path):
    copy = tiny.copy_of(tiny_corpus, tmp_path / "copy")
    (copy.train / "shard-000000.tar").unlink()
    sentence = tiny.start(copy.arguments(tmp_path), 2).fail()
    assert "shard-000000.tar" in sentence or str(copy.train) in sentence


def test_a_truncated_shard_costs_samples_and_then_the_run(tiny_corpus, tmp_path):
    copy = tiny.copy_of(tiny_corpus, tmp_path / "copy")
    shard = copy.train / "shard-000000.tar"
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size // 4)
    ranks = tiny.start(copy.arguments(tmp_path), 2)
    sentence = ranks.fail()
    assert "more than data.max_bad_samples = 10" in sentence or "shard-000000.tar" in sentence, ranks.output


def test_a_cached_shard_is_checked(tiny_corpus, tmp_path):
    copy = tiny.copy_of(tiny_corpus, tmp_path / "copy")
    data = bytearray((copy.train / "shard-000000.tar").read_bytes())
    data[5_000] ^= 1
    (copy.train / "shard-000000.tar").write_bytes(data)
    sentence = tiny.start(copy.arguments(tmp_path, "run", f"--data.cache_dir={tmp_path / 'cache'}"), 2).fail()
    assert "does not match its checksum" in sentence and "shard it again" in sentence


def test_an_error_in_a_loader_thread_ends_the_run(tiny_corpus, tmp_path):
    ranks = tiny.start(tiny_corpus.arguments(tmp_path, "run", "--data.threads=2"), 2, [tiny.failing_loader])
    assert ranks.wait(limit_s=60) == [2, 2], ranks.output
    assert "error: the shards are gone" in ranks.output and "Traceback" not in ranks.output
    assert tiny.status(tmp_path / "run")["state"] == "failed"
