"""Tracking against a stand-in for Comet on the loopback: real files, real processes, comet_ml itself."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddp_asr import tracking as command
from ddp_asr.errors import UserError
from ddp_asr.runs import comet as comet_module
from ddp_asr.runs import records, tracking
from ddp_asr.runs import tensorboard as tensorboard_module
from ddp_asr.runs.checkout import git_checkout
from ddp_asr.runs.comet import TrackingStatus
from tests import tiny_training as tiny
from tests.comet_archive import in_archive
from tests.comet_stand_in import StandIn

REPOSITORY = Path(__file__).resolve().parent.parent
STARTED_S = 1_700_000_000.0
COMMIT = {"git_commit": "6c0ffee" * 5 + "6c0ff", "git_dirty": True}
PNG = bytes.fromhex(  # one grey pixel
    "89504e470d0a1a0a0000000d4948445200000001000000010800000000 3a7e9b550000000a4944415408d763680000008200812b"
    "cd4f9e0000000049454e44ae426082".replace(" ", "")
)


# ---- a run, as the trainer leaves it -------------------------------------------------------------------------------


def train_line(step):
    return {
        **{"kind": "train", "step": step, "epoch": 1 + (step - 1) // 50},
        **{"loss": 3.0 / step, "learning_rate": 1e-5 * step},
        **{"gradient_norm": 2.0, "audio_s_per_s": 300.0, "data_wait": 0.01, "padding": 0.05, "skipped": 0},
        **{"gpu_memory_gb": None, "host_memory_gb": 1.5},
        "time_s": STARTED_S + step,
    }


def test_line(step):
    rates = {"loss": 4.0 / step, "wer": 10.0 / step, "cer": 5.0 / step}
    return {"kind": "test", "step": step, "epoch": 1 + (step - 1) // 50, **rates, "time_s": STARTED_S + step + 0.5}


test_line.__test__ = False  # type: ignore[attr-defined]


def metrics(last_step):
    lines = []
    for step in range(1, last_step + 1):
        lines.append(train_line(step))
        if step % 50 == 0:
            lines.append(test_line(step))
    return lines


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def samples(last_step):
    pairs = [{"key": "a-1", "reference": "hello world", "hypothesis": "helo world"}]
    return [{"step": step, "epoch": 1, "samples": pairs} for step in range(50, last_step + 1, 50)]


@pytest.fixture
def run(tmp_path):
    """A run of 120 steps with two evaluations, killed: nothing says that it ended."""
    directory = tmp_path / "an4"
    directory.mkdir()
    (directory / "config.yaml").write_text(
        "encoder: {time_strides: [2, 2]}\noptim: {learning_rate: 0.0005}\ntrain: {precision: bf16}\n"
        "tracking: {project: speech, workspace: '', tags: [baseline]}\n"
    )
    environment = {"python": "3.11", "packages": {"torch": "2.11.0"}, "processes": 4, **COMMIT}
    environment["command"] = "train.py --config configs/an4.yaml --train.epochs=3"
    (directory / "environment.json").write_text(json.dumps(environment))
    (directory / "spectrogram.png").write_bytes(PNG)
    (directory / "curves.png").write_bytes(PNG)
    write_lines(directory / "metrics.jsonl", metrics(120))
    write_lines(directory / "samples.jsonl", samples(120))
    return directory


TRAIN_METRICS = (
    *("loss", "learning_rate", "gradient_norm", "audio_s_per_s", "data_wait", "padding", "skipped"),
    *("host_memory_gb", "minutes"),
)
TEST_METRICS = ("loss", "wer", "cer", "minutes")
VALUES_120 = {("train", name, step) for name in TRAIN_METRICS for step in range(1, 121)} | {
    ("test", name, step) for name in TEST_METRICS for step in (50, 100)
}


# ---- Comet's stand-in ----------------------------------------------------------------------------------------------


@pytest.fixture
def comet(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setenv("COMET_URL_OVERRIDE", stand_in.url)
    monkeypatch.setenv("COMET_API_KEY", "k" * 25)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield stand_in
    stand_in.close()


def track(run, *arguments):
    """Runs the command; returns what it printed. Raises when it failed."""
    command = [sys.executable, "-m", "ddp_asr.tracking", str(run), *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def assert_holds_the_rest(comet):
    """Beside each metric of each step: settings, environment, summary and pictures."""
    assert float(comet.parameters["optim.learning_rate"]) == 0.0005
    assert comet.parameters["encoder.time_strides"] == "[2, 2]"
    assert comet.system["packages.torch"] == "2.11.0"
    summary = {**COMMIT, "Name": "an4", "best_wer": 0.1, "best_wer_step": 100, "started": "2023-11-14T22:13:21+00:00"}
    assert {name: comet.others.get(name) for name in summary} == summary
    values = {value[:3]: value[3:] for value in comet.values}
    assert values["train", "minutes", 61] == (2, pytest.approx(1.0))
    assert values["test", "wer", 100] == (2, pytest.approx(0.1))
    assert {(None, "curves"), (None, "spectrogram")} <= set(comet.uploads)
    assert (None, "environment.json") in comet.uploads and (None, "config.yaml") in comet.uploads


def wait_for_end(pid):
    """Waits for a process that need not be a child of this one."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([handle], [], [], 120)[0], f"process {pid} did not end"
    finally:
        os.close(handle)


# ---- small parts ---------------------------------------------------------------------------------------------------


def test_auto_is_online_where_a_key_is_set(monkeypatch):
    monkeypatch.delenv("COMET_API_KEY", raising=False)
    assert comet_module.resolve_mode("auto") == "offline"
    monkeypatch.setenv("COMET_API_KEY", "k")
    assert comet_module.resolve_mode("auto") == "online"
    assert comet_module.resolve_mode("offline") == "offline"


def test_the_key_is_made_once_and_suits_comet(tmp_path):
    key = comet_module.experiment_key(tmp_path)
    assert 32 <= len(key) <= 50 and key.isalnum() and key == key.lower()
    assert comet_module.experiment_key(tmp_path) == key == comet_module.experiment_key(tmp_path, known="other")
    (tmp_path / "comet.json").unlink()
    assert comet_module.experiment_key(tmp_path, known=key) == key  # from a checkpoint, when comet.json was lost


steps_and_cuts = st.lists(
    st.one_of(
        st.tuples(st.just("grow"), st.integers(1, 8)),
        st.tuples(st.just("cut"), st.integers(0, 12)),
        st.tuples(st.just("torn"), st.integers(1, 20)),
        st.tuples(st.just("look"), st.just(0)),
    ),
    max_size=20,
)


@given(steps_and_cuts, st.booleans())
def test_reader_misses_no_line_however_the_file_is_cut_back(tmp_path_factory, story, replaced):
    """What the file holds at the end has been read; a value written after a cut is the last one read of its step."""
    path = tmp_path_factory.mktemp("lines") / "metrics.jsonl"
    reader, read, lines, torn = records.LineReader(path), {}, [], b""
    for number, (what, amount) in enumerate([*story, ("look", 0)]):
        if what == "grow":
            first = len(lines) + 1
            lines += [
                json.dumps({"step": step, "at": number}).encode() + b"\n" for step in range(first, first + amount)
            ]
            torn = b""
        elif what == "cut":
            lines, torn = lines[: max(0, len(lines) - amount)], b""
        elif what == "torn":
            torn = json.dumps({"step": 10_000, "text": "torn"}).encode()[:amount]
        else:
            read |= {line["step"]: line for line in reader.new()}
            continue
        if replaced:
            (aside := path.with_suffix(".aside")).write_bytes(b"".join(lines) + torn)
            aside.replace(path)
        else:
            path.write_bytes(b"".join(lines) + torn)
    assert [read.get(step) for step in range(1, len(lines) + 1)] == [json.loads(line) for line in lines]
    assert 10_000 not in read


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"is not a run: it has no config\.yaml"):
        command.main([str(tmp_path)])


def test_online_without_a_key_is_refused_on_demand(run, monkeypatch):
    monkeypatch.delenv("COMET_API_KEY", raising=False)
    with pytest.raises(UserError, match="COMET_API_KEY"):
        command.main([str(run), "--mode", "online"])


def test_off_starts_nothing(run):
    follower = tracking.start(run, "off")
    assert follower.process is None
    assert follower.close().summary(run) == "not tracked"
    assert not (run / "comet.json").exists()


def test_a_follower_that_cannot_start_is_a_failure_on_record(run, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(run / "no-python"))
    report = tracking.start(run, "offline").close()
    assert report.failures == 1 and "could not be started" in report.last_error


def test_one_process_at_a_time_tracks_a_run(run):
    refused = pytest.raises(UserError, match="tracked by another process")
    with tracking._alone(run, wait=True), refused, tracking._alone(run, wait=False):
        raise AssertionError("two at once")
    with tracking._alone(run, wait=False):
        pass


class Experiment:
    """In the place of comet_ml's: counts what is logged, and fails at a method as often as it is in `fails`."""

    alive, url = True, "http://127.0.0.1/"

    def __init__(self, status, fails=()):
        self.status, self.fails = status, Counter(fails)
        self.logged, self.last = Counter(), ""

    def __getattr__(self, name):
        def log(*_, **__):
            self.logged[name] += 1
            self.last = name

        return log

    def context_manager(self, _):
        return contextlib.nullcontext()

    def flush(self, timeout):
        if self.fails[self.last] > 0:
            self.fails[self.last] -= 1
            self.status.failed("status code 500")
        self.last = ""
        return True


def upload_to(run, experiment, monkeypatch):
    monkeypatch.setattr(comet_module, "_start_experiment", lambda *_: experiment)
    return comet_module.Upload(run, experiment.status)


def test_metrics_are_sent_until_comet_takes_them(run, monkeypatch):
    status = TrackingStatus(mode="online")
    upload = upload_to(run, experiment := Experiment(status, ["log_metrics"] * 3), monkeypatch)
    assert [upload.advance() for _ in range(4)] == [False, False, False, True]
    assert "status code 500" in status.last_error and not upload.put_off
    assert experiment.logged["log_metrics"] == 122 + 3 * comet_module.BATCH
    assert upload.advance() and experiment.logged["log_metrics"] == 122 + 3 * comet_module.BATCH


@pytest.mark.parametrize("method", ["log_table", "log_image"])
def test_what_fails_keeps_no_other_back_and_is_tried_again_when_asked(run, monkeypatch, method):
    class Raising(Experiment):
        def log_image(self, *_, name, **__):
            self.logged["log_image"] += 1
            if self.fails["log_image"] > 0:
                self.fails["log_image"] -= 1
                raise ValueError(f"no picture: {name}")

    write_lines(run / "samples.jsonl", samples(50))
    status = TrackingStatus(mode="online")
    upload = upload_to(run, experiment := Raising(status, [method]), monkeypatch)
    assert [upload.advance() for _ in range(3)] == [False, True, True]
    assert len(upload.put_off) == 1 and status.failures
    expected = {"log_table": 1, "log_image": 2, "log_code": 1, "log_metrics": 122}
    assert {name: experiment.logged[name] for name in expected} == expected
    upload.put_off.clear()
    assert upload.advance() and not upload.put_off
    assert {name: experiment.logged[name] for name in expected} == expected | {method: expected[method] + 1}


def test_a_longer_run_is_thinned_to_what_comet_keeps(monkeypatch):
    monkeypatch.setattr(comet_module, "MOST_POINTS", 10)
    lines = [records.Metrics(kind, step, 1, {}) for step in range(1, 26) for kind in ("train", "test")]
    kept = list(comet_module._thinned([*lines, records.CODE]))
    assert [each.step for each in kept[:-1] if each.kind == "train"] == list(range(1, 26, 3))
    assert [each.step for each in kept[:-1] if each.kind == "test"] == list(range(1, 26)) and kept[-1] == records.CODE
    assert list(comet_module._thinned(lines[:20])) == lines[:20]


# ---- records -------------------------------------------------------------------------------------------------------


def values_of(found, name):
    return next(each.value for each in found if isinstance(each, records.Item) and each.name == name)


def test_a_run_is_read_as_records(run):
    found = records.RunReader(run).unsent(records.Sent())
    lines = [each for each in found if isinstance(each, records.Metrics)]
    assert [(each.kind, each.step) for each in lines] == [(each["kind"], each["step"]) for each in metrics(120)]
    assert set(lines[0].values) == set(TRAIN_METRICS) and lines[0].epoch == 1  # no null, no time, no place
    assert lines[-1].values["minutes"] == pytest.approx(119 / 60)
    assert values_of(found, "settings")["encoder.time_strides"] == "[2, 2]"
    assert values_of(found, "environment")["packages.torch"] == "2.11.0"
    assert values_of(found, "git") == COMMIT
    assert values_of(found, "best WER") == {"best_wer": 0.1, "best_wer_step": 100}
    assert values_of(found, "start") == {"started": "2023-11-14T22:13:21+00:00"}
    tags = [tag for each in found if isinstance(each, records.Item) and each.role == "tags" for tag in each.value]
    assert tags == ["bf16", "baseline", "4 processes", "an4"]


def test_only_what_is_new_or_changed_is_sent_again(run):
    sent = records.Sent()
    reader = records.RunReader(run)
    for record in reader.unsent(sent):
        sent.add(record)
    assert reader.unsent(sent) == [] == records.RunReader(run).unsent(sent)
    (run / "config.yaml").write_text((run / "config.yaml").read_text())  # a resumed run writes it again
    assert reader.unsent(sent) == []
    (run / "curves.png").write_bytes(PNG + b"redrawn")
    write_lines(run / "metrics.jsonl", metrics(80))  # cut back, and trained on
    assert [each.name for each in reader.unsent(sent)] == ["curves"]
    write_lines(run / "metrics.jsonl", [*metrics(120), train_line(121), test_line(121) | {"wer": 0.05}])
    found = reader.unsent(sent)
    assert [(each.kind, each.step) for each in found[:2]] == [("train", 121), ("test", 121)]
    assert values_of(found, "best WER") == {"best_wer": 0.05, "best_wer_step": 121}
    assert len(found) == 4


def test_of_equal_error_rates_the_lower_loss_is_best(run):
    lines = [test_line(step) | {"wer": wer, "loss": loss} for step, wer, loss in ((50, 0.2, 1), (60, 0.2, 0.5))]
    write_lines(run / "metrics.jsonl", [*lines, test_line(70) | {"wer": 0.3}, test_line(80) | {"wer": None}])
    found = records.RunReader(run).unsent(records.Sent())
    assert values_of(found, "best WER") == {"best_wer": 0.2, "best_wer_step": 60}


def test_what_is_missing_or_damaged_is_left_out(tmp_path):
    assert records.RunReader(tmp_path).unsent(records.Sent())[1:] == [records.CODE]
    (tmp_path / "environment.json").write_text('{"torn')
    found = records.RunReader(tmp_path).unsent(records.Sent())
    assert values_of(found, "environment") == {}


def test_the_commit_and_changes_of_a_checkout(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    nothing = {"git_commit": None, "git_dirty": None}
    assert git_checkout(tmp_path / "missing") == nothing
    git("init")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "module.py").write_text("x = 1\n")
    (tmp_path / "other.py").write_text("x = 1\n")
    git("add", "other.py")
    git("commit", "-m", "first")
    assert git_checkout(tmp_path / "package") == nothing  # untracked: this commit is not of this code
    git("add", "package")
    git("commit", "-m", "second")
    commit = (tmp_path / ".git" / "HEAD").read_text().split()[1]
    expected = {"git_commit": (tmp_path / ".git" / commit).read_text().strip(), "git_dirty": False}
    assert git_checkout(tmp_path / "package") == expected
    (tmp_path / "package" / "module.py").write_text("x = 2\n")
    assert git_checkout(tmp_path / "package") == expected | {"git_dirty": True}


# ---- offline -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_run_gets_its_archive_and_comet_upload_takes_it(run, comet):
    with (run / "metrics.jsonl").open("a") as file:  # a crash tore the last line
        file.write(json.dumps(train_line(121))[:40])
    assert "comet upload" in track(run)
    counts, others, experiment = in_archive(run)
    assert counts == dict.fromkeys(VALUES_120, 1)
    assert experiment["offline_id"] == comet_module.experiment_key(run)
    assert experiment["project_name"] == "speech"
    assert {"bf16", "baseline", "4 processes", "an4"} == set(experiment["tags"])
    files = {each["payload"]["additional_params"].get("fileName") for each in others if each["type"] == "file_upload"}
    assert {"ddp_asr/runs/comet.py", "samples-00000050.csv", "samples-00000100.csv", "environment.json"} <= files
    assert sorted(path.name for path in (run / "comet").iterdir()) == sorted(
        [f"{comet_module.experiment_key(run)}.zip", "comet.log"]
    )

    command = [str(Path(sys.executable).with_name("comet")), "upload", str(comet_module.archive_path(run))]
    uploaded = subprocess.run(command, capture_output=True, text=True)
    assert uploaded.returncode == 0, uploaded.stdout + uploaded.stderr
    assert comet.created == [comet_module.experiment_key(run)]
    assert comet.counts() == dict.fromkeys(VALUES_120, 1)
    assert_holds_the_rest(comet)


@pytest.mark.slow
def test_the_archive_is_made_anew_with_the_same_key(run):
    track(run)
    (run / "comet" / ".making").mkdir()  # by a process that was killed
    write_lines(run / "metrics.jsonl", metrics(80) + metrics(120)[81:])  # cut back to 80 and trained on
    track(run)
    counts, _, experiment = in_archive(run)
    assert counts == dict.fromkeys(VALUES_120, 1)
    assert experiment["offline_id"] == comet_module.experiment_key(run)
    left = sorted(path.name for path in (run / "comet").iterdir())
    assert left == sorted([f"{comet_module.experiment_key(run)}.zip", "comet.log"])


@pytest.mark.slow
def test_a_resumed_run_has_the_archive_of_its_first_attempt_and_then_the_whole(run):
    follower = tracking.start(run, "offline")
    assert follower.process.pid == os.getsid(follower.process.pid)  # out of reach of the ranks' signals
    while not (archives := list((run / "comet").glob("*.zip"))):
        assert follower.process.poll() is None
        time.sleep(0.05)
    for each in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP):
        follower.process.send_signal(each)
    write_lines(run / "metrics.jsonl", metrics(150))
    report = follower.close(120)
    assert report.finished and not report.failures and follower.process.returncode == 0
    assert list((run / "comet").glob("*.zip")) == archives
    assert in_archive(run)[0]["train", "loss", 150] == 1


@pytest.mark.slow
def test_the_follower_outlives_a_killed_parent_and_makes_the_archive(run):
    """The parent's forked child, as a loader's worker is, holds the follower's pipe open: no end of file then."""
    code = f"""
        import os, pathlib, signal
        from ddp_asr.runs import tracking
        follower = tracking.start(pathlib.Path({str(run)!r}), "offline")
        worker = os.fork()
        if worker:
            print(follower.process.pid, worker, flush=True)
        signal.pause()
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as parent:
        pid, worker = map(int, parent.stdout.readline().split())
        try:
            parent.kill()
            parent.wait()
            wait_for_end(pid)
        finally:
            os.kill(worker, signal.SIGKILL)
    assert TrackingStatus.load(run).finished
    assert in_archive(run)[0] == dict.fromkeys(VALUES_120, 1)


# ---- online --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_killed_and_resumed_continues_its_experiment_and_sends_no_step_twice(run, comet):
    follower = tracking.start(run, "online")
    while "code" not in TrackingStatus.load(run).sent.versions:  # which is sent last
        assert follower.process.poll() is None
        time.sleep(0.05)
    follower.process.kill()
    assert not follower.close().finished
    assert comet.counts() == dict.fromkeys(VALUES_120, 1)
    assert comet.created == [comet_module.experiment_key(run)] and comet.resumed == []
    assert_holds_the_rest(comet)
    assert comet.tags == {"bf16", "baseline", "4 processes", "an4"}
    tables = [name for _, name in comet.uploads if name and name.startswith("samples")]
    assert sorted(tables) == ["samples-00000050.csv", "samples-00000100.csv"]
    assert ("source_code", "ddp_asr/runs/comet.py") in comet.uploads

    write_lines(run / "metrics.jsonl", metrics(80))  # the checkpoint's step; the new attempt trains 81 to 120 again
    follower = tracking.start(run, "online")
    write_lines(run / "metrics.jsonl", metrics(150))
    write_lines(run / "samples.jsonl", samples(150))
    report = follower.close(120)
    assert report.finished and not report.failures
    assert comet.created == comet.resumed == [comet_module.experiment_key(run)]
    counts = comet.counts()
    assert set(counts.values()) == {1}
    assert {step for _, name, step in counts if name == "learning_rate"} == set(range(1, 151))
    assert {step for _, name, step in counts if name == "wer"} == {50, 100, 150}
    assert Counter(comet.uploads)["source_code", "ddp_asr/runs/comet.py"] == 1
    assert [name for _, name in comet.uploads if name == "samples-00000150.csv"] == ["samples-00000150.csv"]


@pytest.mark.slow
def test_short_failures_are_mended_by_comet_ml_and_nothing_is_lost_or_sent_twice(run, comet):
    comet.refusals.update({"add/run": 1, "experiment/metric": 2})
    comet.drops = {"experiment/metric": {4}, "log-other": {5}}
    assert "train steps to 120" in track(run, "--mode", "online")
    assert not any(comet.refusals.values())
    assert comet.counts() == dict.fromkeys(VALUES_120, 1)


@pytest.mark.slow
def test_a_lost_connection_is_noticed_and_nothing_is_lost_or_sent_twice(run, comet):
    comet.drops = {"experiment/metric": {3, 4, 5, 6}}  # 1 and 2: the first batch; comet_ml tries four times
    assert "train steps to 120" in track(run, "--mode", "online")
    status = TrackingStatus.load(run)
    assert status.finished and status.failures and "onnection" in status.last_error
    assert comet.counts() == dict.fromkeys(VALUES_120, 1)
    assert_holds_the_rest(comet)
    assert comet.created == [comet_module.experiment_key(run)] and len(comet.resumed) == 1


@pytest.mark.slow
def test_late_answers_delay_nothing_but_the_follower(run, comet):
    comet.delay_s = 0.3
    follower = tracking.start(run, "online", close_s=300)
    comet.wait_for(lambda: len(comet.values) >= len(VALUES_120))
    write_lines(run / "metrics.jsonl", metrics(150))
    report = follower.close(300)
    assert report.finished
    assert set(comet.counts().values()) == {1} and comet.counts()["train", "loss", 150] == 1


@pytest.mark.slow
@pytest.mark.parametrize("how", ["never answers", "is not there"])
def test_without_comet_the_run_still_gets_its_archive(run, comet, monkeypatch, how):
    comet.holds = how == "never answers"
    if how == "is not there":
        monkeypatch.setenv("COMET_URL_OVERRIDE", "http://127.0.0.1:9/clientlib/")
    follower = tracking.start(run, "online", close_s=1)
    report = follower.close(120)
    assert follower.process.returncode == 0
    assert report.failures and "within 1 s of the run's end" in report.last_error
    assert in_archive(run)[0] == dict.fromkeys(VALUES_120, 1)


@pytest.mark.slow
def test_what_comet_did_not_take_in_time_is_sent_on_demand(run, comet):
    comet.refusals["experiment/metric"] = 1_000_000
    follower = tracking.start(run, "online", close_s=1)
    comet.wait_for(lambda: comet.refusals["experiment/metric"] < 1_000_000)
    report = follower.close(120)
    assert follower.process.returncode == 1 and not report.finished and report.url
    assert f"{run} --mode online ({report.failures} failures, the last: " in report.summary(run)
    comet.refusals.clear()
    track(run, "--mode", "online")
    assert comet.counts() == dict.fromkeys(VALUES_120, 1)
    assert comet.created == [comet_module.experiment_key(run)] and set(comet.resumed) == set(comet.created)


@pytest.mark.slow
def test_on_demand_an_unreachable_comet_is_told_soon(run, comet, monkeypatch):
    monkeypatch.setenv("COMET_URL_OVERRIDE", "http://127.0.0.1:9/clientlib/")
    monkeypatch.setenv("COMET_GET_OR_ADD_EXPERIMENT_RETRY_TOTAL", "0")
    command = [sys.executable, "-m", "ddp_asr.tracking", str(run), "--mode", "online"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "send the rest with" in done.stdout, done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_online_without_a_key_falls_back_to_the_archive(run, monkeypatch):
    monkeypatch.delenv("COMET_API_KEY", raising=False)
    report = tracking.start(run, "online").close(120)
    assert report.finished and comet_module.archive_path(run).exists() and "COMET_API_KEY" in report.last_error


# ---- TensorBoard -----------------------------------------------------------------------------------------------------


def events(run):
    """{(tag, step): [value, ...]} of the scalars, as TensorBoard itself reads them, and the accumulator."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    found.Reload()
    values = {}
    for tag in found.Tags()["scalars"]:
        for event in found.Scalars(tag):
            values.setdefault((tag, event.step), []).append((event.value, event.wall_time))
    return values, found


def as_events(lines):
    """What metrics.jsonl says, in the same form."""
    return {
        (f"{line['kind']}/{name}", line["step"]): [(pytest.approx(value), line["time_s"])]
        for line in lines
        for name, value in line.items()
        if name not in records.PLACE and isinstance(value, int | float)
    }


def texts(accumulator, tag):
    return {event.step: event.tensor_proto.string_val[0].decode() for event in accumulator.Tensors(tag)}


def test_the_events_are_those_of_the_metrics_however_the_run_was_cut_back(run):
    board = tensorboard_module.TensorBoard(run)
    write_lines(run / "metrics.jsonl", metrics(60))
    board.advance()
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in metrics(120)[61:])
    board.advance()
    board.advance()
    assert events(run)[0] == as_events(metrics(120))  # before it is closed, too: it is looked at while it grows

    board.close()
    again = [{**line, "loss": 7.0} if line["step"] > 70 else line for line in metrics(110)]
    write_lines(run / "metrics.jsonl", again)  # an attempt that went on from step 70
    board = tensorboard_module.TensorBoard(run)
    board.close()
    assert board.error == ""
    assert events(run)[0] == as_events(again)
    assert len(list((run / "tensorboard").iterdir())) == 1


def test_texts_and_settings_are_in_the_events(run):
    tensorboard_module.TensorBoard(run).close()
    _, found = events(run)
    shown = texts(found, "samples")
    assert list(shown) == [50, 100] and "| a-1 | hello world | helo world |" in shown[50].splitlines()
    assert "| optim.learning_rate | 0.0005 |" in texts(found, "settings")[0].splitlines()
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams["optim.learning_rate"].number_value == 0.0005
    assert hparams["encoder.time_strides"].string_value == "[2, 2]"


def test_what_keeps_the_events_from_being_written_is_said_and_tried_again(run, monkeypatch):
    (run / "tensorboard").write_text("in the way")
    board = tensorboard_module.TensorBoard(run)
    board.advance()
    assert board.error.startswith("FileExistsError")
    (run / "tensorboard").unlink()
    board.advance()
    assert board.error, "only after a pause"
    board.close()
    assert board.error == "" and events(run)[0] == as_events(metrics(120))


def test_on_demand_the_events_are_written_anew(run):
    said = track(run, "--to", "tensorboard")
    assert f"tensorboard --logdir {run}" in said and "comet" not in said.lower()
    first = list((run / "tensorboard").iterdir())
    assert events(run)[0] == as_events(metrics(120))
    with (run / "config.yaml").open("a") as file:
        file.write("tracking: {to: [tensorboard]}\n")  # of equal sections the last one counts
    track(run)
    second = list((run / "tensorboard").iterdir())
    assert len(second) == 1 and second != first and events(run)[0] == as_events(metrics(120))
    assert not (run / "comet").exists()
    assert comet_module.TrackingStatus.load(run).finished


def test_an_unknown_tracker_is_refused(run):
    with pytest.raises(UserError, match="--to has 'wandb'; name one or more of comet,tensorboard"):
        command.main([str(run), "--to", "comet,wandb"])


def test_a_missing_package_is_one_sentence_before_the_training(tiny_corpus, tmp_path, monkeypatch):
    from ddp_asr import train

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    arguments = tiny_corpus.arguments(tmp_path, "run", "--tracking.to=comet,tensorboard", "--tracking.mode=offline")
    with pytest.raises(UserError, match="the package tensorboard is not installed: install it with pip install"):
        train.read_settings(*train.parse(arguments))
    assert list(tmp_path.iterdir()) == []
    train.read_settings(*train.parse([*arguments, "--tracking.mode=off"]))
    train.read_settings(*train.parse([*arguments, "--tracking.to=comet"]))


@pytest.mark.slow
def test_the_process_of_each_attempt_follows_the_run_and_writes_the_events_anew(run):
    write_lines(run / "metrics.jsonl", metrics(60))
    first = tracking.start(run, "offline", ["tensorboard"])
    tiny.wait_until(lambda: list((run / "tensorboard").glob("events*")), "the events of the first steps")
    write_lines(run / "metrics.jsonl", metrics(120))
    status = first.close(timeout_s=120)
    assert status.finished and status.summary(run) == f"look at the curves with: tensorboard --logdir {run}"
    assert events(run)[0] == as_events(metrics(120))

    again = [{**line, "loss": 7.0} if line["step"] > 70 else line for line in metrics(90)]
    write_lines(run / "metrics.jsonl", again)  # a resume from step 70
    assert tracking.start(run, "offline", ["tensorboard"]).close(timeout_s=120).finished
    assert events(run)[0] == as_events(again)
    assert not (run / "comet").exists()


@pytest.mark.slow
def test_a_run_that_was_killed_and_resumed_has_each_step_once_in_its_events(tiny_corpus, tmp_path):
    run, options = tmp_path / "run", ("--tracking.mode=offline", "--tracking.to=tensorboard", "--train.epochs=2")
    arguments = tiny_corpus.arguments(tmp_path, "run", *options, "--train.save_every_steps=3")
    tiny.train([*arguments, "--train.stop_at_step=5"])
    (run / "checkpoints" / "step-00000005.pt").unlink()  # it falls back to an earlier one
    tiny.train(arguments)
    lines = [line for line in tiny.read_lines(run / "metrics.jsonl") if line["kind"] in ("train", "test")]
    assert len({line["step"] for line in lines}) > 5
    assert events(run)[0] == as_events(lines)
    assert not (run / "comet").exists()


def test_a_run_without_metrics_has_nothing_to_track(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    with pytest.raises(UserError, match=r"has no metrics\.jsonl, so there is nothing to track: train it first"):
        command.main([str(tmp_path), "--to", "tensorboard"])
