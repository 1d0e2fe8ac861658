"""A sweep's file and trials, which trials are submitted, and the ranking; whole sweeps on this machine."""

import fcntl
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddp_asr.config import load_config
from ddp_asr.errors import UserError
from ddp_asr.files import read_json_lines
from ddp_asr.runs import checkpoint
from ddp_asr.settings import describe
from launch import submit, sweep
from launch.cluster import Submission
from launch.search import Range, Sweep, make_trials, read_sweep, trial_name, trial_values
from launch.status import RunSummary
from launch.sweep import best_evaluation, is_due, ranked
from tests import tiny_training
from tests.conftest import REPOSITORY
from tests.run_files import evaluation_line, read_to_end, read_until, train_line, write_run
from tests.tiny_training import wait_until


@pytest.fixture
def write(tmp_path):
    """`write("settings: ...")`: a sweep's file around `base.yaml`, which trains under tmp_path/runs."""
    (tmp_path / "base.yaml").write_text(f"run: {{dir: {tmp_path / 'runs'}}}\ntrain: {{epochs: 7}}\n")

    def written(text, config=tmp_path / "base.yaml", name="search.yaml"):
        (tmp_path / name).write_text(f"config: {config}\n{text}\n")
        return tmp_path / name

    return written


def trials_of(path, *overrides):
    return make_trials(read_sweep(path, overrides))


GRID = "settings: {optim.learning_rate: [1e-3, 2e-3], encoder.dropout: [0, 0.1, 0.2]}"


# ---- the file ------------------------------------------------------------------------------------------------------


def test_a_file_is_read_as_it_is_written(write, tmp_path):
    path = write(
        "search: random\ntrials: 20\nseed: 3\nparallel: 4\nfixed: {train.epochs: 2, data.train: [a, b]}\n"
        "settings:\n  encoder.time_strides: [[2], [2, 1]]\n  optim.anneal: [linear, cosine]\n"
        "  optim.learning_rate: {min: 1e-4, max: 1e-2, scale: log}\n  encoder.rnn_size: {min: 64, max: 512}"
    )
    assert read_sweep(path, ["--optim.beta1=0.8"]) == Sweep(
        config=str(tmp_path / "base.yaml"),
        name="search",
        search="random",
        trials=20,
        seed=3,
        parallel=4,
        overrides=["--train.epochs=2", "--data.train=a,b", "--optim.beta1=0.8"],
        settings={
            "encoder.time_strides": ["2", "2,1"],
            "optim.anneal": ["linear", "cosine"],
            "optim.learning_rate": Range(1e-4, 1e-2, log=True, whole=False),
            "encoder.rnn_size": Range(64, 512, log=False, whole=True),
        },
    )


def test_a_grid_needs_nothing_but_a_config_and_values(write, tmp_path):
    found = read_sweep(write(f"name: mine\n{GRID}"))
    assert (found.name, found.search, found.parallel, found.overrides) == ("mine", "grid", 0, [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{GRID}\nsetings: 1", "unknown key 'setings' in .*search.yaml; did you mean 'settings'"),
        (
            "settings: {optim.learnin_rate: [1]}",
            "unknown setting 'optim.learnin_rate' under settings in .*'optim.learn",
        ),
        (f"{GRID}\nfixed: {{train.epoch: 1}}", "unknown setting 'train.epoch' under fixed in .*'train.epochs'"),
        ("settings: {optim: {learning_rate: [1]}}", "unknown setting 'optim' under settings"),
        ("parallel: 2", "varies nothing: add 'settings:'"),
        ("settings: [optim.learning_rate]", "settings in .* must hold settings by their names"),
        ("settings: {optim.learning_rate: 1e-3}", "optim.learning_rate must be a list of values to try"),
        ("settings: {optim.learning_rate: []}", "optim.learning_rate must be a list of values to try"),
        ("settings: {optim.learning_rate: [[[1]]]}", "optim.learning_rate must be a value or a list of values"),
        ("settings: {optim.learning_rate: {min: 1, max: 2}}", "is a range, which 'search: grid' cannot list"),
        ("settings: {run.name: [a, b]}", "run.name cannot be under settings .* a directory of its own"),
        ("settings: {run.dir: [a, b]}", "run.dir cannot be under settings"),
        (f"{GRID}\nfixed: {{run.name: a}}", "run.name cannot be under fixed"),
        (f"{GRID}\nfixed: {{encoder.dropout: 0}}", "encoder.dropout is under both settings and fixed"),
        (f"{GRID}\nsearch: bayes", "search must be one of grid, random, not 'bayes'"),
        (f"{GRID}\nsearch: random", "trials must say how many to draw"),
        (f"{GRID}\nsearch: random\ntrials: -1", "trials must be at least 0, not -1"),
        (f"{GRID}\nsearch: random\ntrials: many", "trials must be a whole number, not 'many'"),
        (f"{GRID}\ntrials: 3", "trials and seed are for 'search: random'"),
        (f"{GRID}\nseed: 3", "trials and seed are for 'search: random'"),
        (f"{GRID}\nparallel: two", "parallel must be a whole number, not 'two'"),
        (f"{GRID}\nname: a/b", "name must be a directory's, .* not 'a/b'"),
        (f"{GRID}\nname: ..", "name must be a directory's"),
        (f"{GRID}\nname:", "name must be a directory's"),
        (f"{GRID}\nname: [a]", r"name must be a text, not \['a'\]"),
    ],
)
def test_a_mistake_in_the_file_is_one_sentence(write, text, said):
    with pytest.raises(UserError, match=said):
        read_sweep(write(text))


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (
            "optim.learning_rate: {mn: 1, max: 2}",
            "unknown key 'mn' in the range of optim.learning_rate; did you mean 'min'",
        ),
        ("optim.learning_rate: {max: 2}", "the range of optim.learning_rate needs both ends"),
        ("optim.learning_rate: {min: 2, max: 1}", "min of optim.learning_rate must be below its max, not 2 and 1"),
        ("optim.learning_rate: {min: 1, max: 1}", "must be below its max"),
        ("optim.learning_rate: {min: 1, max: inf}", "max of optim.learning_rate must be a finite number"),
        ("optim.learning_rate: {min: a, max: 1}", "min of optim.learning_rate must be a finite number, not 'a'"),
        ("optim.learning_rate: {min: 0, max: 1, scale: log}", "min of optim.learning_rate must be above 0, not 0.0"),
        (
            "optim.learning_rate: {min: 0, max: 1, scale: exp}",
            "scale of optim.learning_rate must be one of linear, log",
        ),
        ("encoder.rnn_size: {min: 1.5, max: 2}", "min of encoder.rnn_size must be a whole number, not '1.5'"),
        ("optim.anneal: {min: 1, max: 2}", "optim.anneal is not a number"),
        ("vocabulary.lowercase: {min: 1, max: 2}", "vocabulary.lowercase is not a number"),
        ("augment.speeds: {min: 1, max: 2}", "augment.speeds is not a number"),
    ],
)
def test_a_mistake_in_a_range_is_one_sentence(write, setting, said):
    with pytest.raises(UserError, match=said):
        read_sweep(write(f"search: random\ntrials: 2\nsettings:\n  {setting}"))


def test_a_file_without_a_config(tmp_path):
    (tmp_path / "a.yaml").write_text(GRID)
    with pytest.raises(
        UserError, match=r"config must name the settings that all trials share, such as 'config: configs/an4.yaml'"
    ):
        read_sweep(tmp_path / "a.yaml")


def test_the_example_is_sound():
    found = read_sweep(REPOSITORY / "configs" / "sweeps" / "an4.yaml")
    assert (found.config, found.name, len(list(trial_values(found)))) == ("configs/an4.yaml", "an4_rates", 6)


# ---- trials --------------------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_and_the_last_setting_turns_fastest(write):
    rates, dropouts = ["1e-3", "2e-3"], ["0", "0.1", "0.2"]
    assert list(trial_values(read_sweep(write(GRID)))) == [
        {"optim.learning_rate": rate, "encoder.dropout": dropout} for rate in rates for dropout in dropouts
    ]


RANDOM = """search: random
trials: {trials}
seed: {seed}
settings:
  optim.learning_rate: {{min: 1e-4, max: 1e-2, scale: log}}
  encoder.dropout: [0, 0.1, 0.2]
"""


def drawn(write, trials=4, seed=0, more=""):
    return list(trial_values(read_sweep(write(RANDOM.format(trials=trials, seed=seed) + more))))


def test_random_trials_are_the_same_for_ever(write):
    assert drawn(write) == [
        {"optim.learning_rate": rate, "encoder.dropout": dropout}
        for rate, dropout in [("0.000873", "0.2"), ("0.000116", "0"), ("0.000163", "0.2"), ("0.00387", "0")]
    ]


def test_more_trials_or_another_setting_leave_the_former_as_they_were(write):
    few = drawn(write)
    assert drawn(write, trials=9)[:4] == few
    wider = drawn(write, more="  encoder.rnn_size: [64, 128]\n")
    assert [{name: trial[name] for name in few[0]} for trial in wider] == few
    assert drawn(write, seed=1) != few


def test_random_trials_are_all_different(write):
    path = write(
        "search: random\ntrials: 6\nsettings: {encoder.rnn_layers: {min: 1, max: 3}, optim.anneal: [linear, cosine]}"
    )
    assert len({tuple(trial.values()) for trial in trial_values(read_sweep(path))}) == 6
    path.write_text(path.read_text().replace("trials: 6", "trials: 7"))
    with pytest.raises(UserError, match="trials = 7, but only about 6 different ones can be drawn"):
        list(trial_values(read_sweep(path)))


shares = st.floats(0, 1, exclude_max=True)
ends = st.floats(1e-6, 1e6).filter(lambda x: x == x)


@given(ends, ends, st.booleans(), shares, shares)
def test_a_draw_is_within_its_range_and_rises_with_the_position(one, other, log, share, further):
    low, high = sorted((one, other))
    if low == high:
        return
    values = [float(Range(low, high, log, whole=False).at(at)) for at in sorted((share, further))]
    assert low <= values[0] <= values[1] <= high


@given(st.integers(-50, 50), st.integers(1, 50), shares)
def test_whole_numbers_of_a_range_are_all_as_likely(low, count, share):
    found = Range(low, low + count, log=False, whole=True).at(share)
    assert found == str(low + int(share * (count + 1)))


def test_a_range_in_numbers():
    rates = Range(1e-4, 1e-2, log=True, whole=False)
    assert [rates.at(share) for share in (0.0, 0.25, 0.5, 0.75)] == ["0.0001", "0.000316", "0.001", "0.00316"]
    sizes = Range(16, 1024, log=True, whole=True)
    assert [sizes.at(share) for share in (0.0, 0.5, 1 - 1e-12)] == ["16", "128", "1024"]
    narrow = Range(1000.1, 1000.2, log=False, whole=False)
    assert [narrow.at(share) for share in (0.0, 0.5)] == ["1000.1", "1000.15"]
    assert Range(0.12345678, 1, log=False, whole=False).at(0.0) == "0.12345678"  # not rounded out of the range
    assert Range(0, 1, log=False, whole=False).at(0.5) == "0.5"


# ---- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "label"),
    [
        ({"optim.learning_rate": "1e-3"}, "learning_rate=1e-3"),
        ({"optim.learning_rate": "1e-3", "encoder.dropout": "0.1"}, "learning_rate=1e-3,dropout=0.1"),
        ({"data.train": "shards/a,shards/b"}, r"train=shards-a-shards-b@\w{6}"),
        ({"vocabulary.drop": ""}, r"drop=none@\w{6}"),
        ({"vocabulary.drop": "none"}, r"drop=none@\w{6}"),
        ({"run.name": "a", "model.name": "b"}, "run.name=a,model.name=b"),
        ({"a.b": "x" * 80}, r"b=x{51}@\w{6}"),
    ],
)
def test_a_trial_is_known_by_its_values(values, label):
    assert re.fullmatch(label, trial_name(values))


texts = st.text(st.sampled_from("ab,/=~ -1."), max_size=40)


@given(st.lists(st.fixed_dictionaries({"optim.x": texts, "model.y": texts}), unique_by=lambda d: tuple(d.values())))
def test_other_values_have_another_name_which_is_short_and_plain(trials):
    labels = [trial_name(values) for values in trials]
    assert len(set(labels)) == len(labels)
    assert all(re.fullmatch(r"[\w.+=,@-]{1,60}", label) for label in labels)


def test_trials_keep_their_directories_when_others_join_them(write):
    few = [trial.run for trial in trials_of(write(GRID))]
    more = [trial.run for trial in trials_of(write(GRID.replace("[1e-3", "[5e-4, 1e-3")))]
    assert set(few) < set(more) and len(more) == 9


def test_each_trial_has_a_checked_config_and_a_directory(write, tmp_path):
    trials = trials_of(write(f"{GRID}\nfixed: {{optim.anneal: cosine, train.epochs: 3}}"), "--train.epochs=2")
    assert [trial.name for trial in trials][:2] == ["learning_rate=1e-3,dropout=0", "learning_rate=1e-3,dropout=0.1"]
    last = trials[-1]
    assert last.run == tmp_path / "runs" / "search" / "learning_rate=2e-3,dropout=0.2"
    config = last.config
    assert (config.optim.learning_rate, config.encoder.dropout) == (2e-3, 0.2)
    assert (config.optim.anneal, config.train.epochs) == ("cosine", 2)


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        (
            "settings: {encoder.dropout: [0, high]}",
            [],
            "trial dropout=high: encoder.dropout must be a finite number, not 'high'",
        ),
        ("settings: {encoder.dropout: [0, 1]}", [], "trial dropout=1: encoder.dropout must be at least 0 and below 1"),
        ("settings: {encoder.dropout: [0, 0.0]}", [], "trials dropout=0 and dropout=0.0 have the same settings"),
        (GRID, ["--encoder.dropout=0.3"], "--encoder.dropout is varied by the sweep: change it in .*search.yaml"),
        (GRID, ["--encoder.droput=0.3"], "unknown setting 'encoder.droput' in the command line.*'encoder.dropout'"),
    ],
)
def test_wrong_trials_are_refused_before_anything_is_submitted(write, text, overrides, said):
    with pytest.raises(UserError, match=said):
        trials_of(write(text), *overrides)


def test_a_run_with_other_settings_is_not_ranked_with_these(write):
    path = write(GRID)
    trial = trials_of(path)[1]
    trial.run.mkdir(parents=True)
    (trial.run / "config.yaml").write_text(
        describe(load_config(None, ["--optim.learning_rate=1e-3", "--train.epochs=7"]))
    )
    trials_of(path)
    with pytest.raises(
        UserError, match=r"0.1 was started with train.epochs = 7, and the sweep now says 3: set it back"
    ):
        trials_of(path, "--train.epochs=3")


# ---- what is submitted ---------------------------------------------------------------------------------------------


def summary(name="a", state="done", **changes) -> RunSummary:
    fields = {"living": state in LIVING, "finished": state == "done"} | changes
    return RunSummary(state, name=name, path=Path(name), **fields)


LIVING = ("PENDING", "RUNNING", "running", "running?")


@pytest.mark.parametrize(
    ("run", "due", "with_retry"),
    [
        (summary(state="not submitted"), True, True),
        (summary(state="unknown"), True, True),
        (summary(state="stopped"), True, True),
        (summary(state="cancelled"), True, True),
        (summary(state="dead"), True, True),
        (summary(state="failed"), False, True),
        (summary(state="done"), False, False),
        (summary(state="stopped", finished=True), False, False),
        (summary(state="PENDING"), False, False),
        (summary(state="running?"), False, False),
    ],
)
def test_only_what_is_missing_resumable_or_asked_for_is_submitted(run, due, with_retry):
    assert (is_due(run, False), is_due(run, True)) == (due, with_retry)


class Scheduler:
    """Records what is submitted; the six trials of GRID have the states that the test sets."""

    def __init__(self, monkeypatch, path: Path, states: list[str]):
        self.path, self.states, self.slurm_error = path, states, ""
        self.names = [trial.name for trial in trials_of(path)]
        self.submitted: list[tuple[list[int], int]] = []
        monkeypatch.setattr(sweep, "RunReader", lambda: self)
        monkeypatch.setattr(submit, "check_all", lambda configs, request: None)
        monkeypatch.setattr(submit, "submit_training", self.submit)
        monkeypatch.setattr(sweep, "_start_here", self.start)

    def read(self, runs):
        return [
            summary(run.name, state, job_id=None if state == "unknown" else "7_1")
            for run, state in zip(runs, self.states, strict=True)
        ]

    def submit(self, configs, request, folder, *, name, parallel):
        numbers = [self.names.index(config.run.name) for config in configs]
        self.submitted.append((numbers, parallel))
        for number in numbers:
            self.states[number] = "PENDING"
        return Submission(folder, [f"12_{index}" for index in range(len(numbers))])

    def start(self, trial, request):
        self.submitted.append(([self.names.index(trial.name)], 1))
        self.states[self.names.index(trial.name)] = "running"
        return trial.run / "log"

    def main(self, *options: str) -> int:
        return sweep.main([str(self.path), *options])


@pytest.fixture
def scheduler(write, monkeypatch):
    return lambda *states: Scheduler(monkeypatch, write(f"{GRID}\nparallel: 2"), list(states))


def test_all_that_is_due_goes_to_slurm_as_one_array(scheduler, tmp_path, capsys):
    slurm = scheduler("done", "unknown", "failed", "PENDING", "stopped", "unknown")
    assert slurm.main() == 0
    assert slurm.submitted == [([1, 4, 5], 2)]
    folder, told = tmp_path / "runs" / "search", capsys.readouterr().out.splitlines()
    assert told[0] == "submitted 3 trials as job 12, 2 at a time"
    assert told[1] == f"{folder}: 1 of 6 trials finished (1 done, 4 PENDING, 1 failed)"
    assert told[-3] == f"watch   ddp-asr status {folder} --watch"
    assert told[-2:] == ["cancel  scancel 7", "rank    the same command again, at any time"]
    assert slurm.main() == 0 and len(slurm.submitted) == 1  # the same command again


def test_the_same_command_ends_with_the_ranking_when_nothing_is_left_to_do(scheduler, capsys):
    assert scheduler(*["done"] * 6).main() == 0
    assert "6 of 6 trials finished (6 done)" in capsys.readouterr().out
    slurm = scheduler(*["done"] * 5, "failed")
    assert slurm.main() == 1 and slurm.submitted == []
    assert capsys.readouterr().out.endswith("retry   the same command with --retry-failed\n")


def test_failed_trials_are_submitted_again_when_asked(scheduler):
    slurm = scheduler("done", "done", "failed", "done", "failed", "done")
    assert slurm.main("--retry-failed", "--parallel=0") == 0
    assert slurm.submitted == [([2, 4], 0)]


def test_ranking_alone_submits_nothing(scheduler, capsys):
    slurm = scheduler("done", *["unknown"] * 5)
    assert slurm.main("--rank") == 1 and slurm.submitted == []
    assert "1 of 6 trials finished (1 done, 5 not submitted)" in capsys.readouterr().out


def test_nothing_is_submitted_while_slurm_does_not_say_what_is_queued(scheduler, capsys):
    slurm = scheduler(*["unknown"] * 6)
    slurm.slurm_error = "slurmctld is away"
    with pytest.raises(UserError, match="so nothing was submitted: slurmctld is away"):
        slurm.main()
    assert slurm.submitted == []
    assert slurm.main("--rank") == 1  # still prints what the files say
    assert capsys.readouterr().out.endswith("Slurm could not be asked: slurmctld is away\n")


def test_this_machine_trains_so_many_at_a_time(scheduler, monkeypatch, capsys):
    here = scheduler("unknown", "running", *["unknown"] * 4)  # one still runs from an earlier call
    ends = iter([{0: "done"}, {1: "done"}, {2: "failed", 3: "done"}, {}, {4: "done"}, {5: "done"}])
    started = []

    def sleep(seconds):
        started.append([number for numbers, _ in here.submitted for number in numbers])
        for number, state in next(ends).items():
            here.states[number] = state

    monkeypatch.setattr(sweep.time, "sleep", sleep)
    assert here.main("--cluster=local") == 1
    assert started == [[0], [0, 2], [0, 2, 3], [0, 2, 3, 4, 5], [0, 2, 3, 4, 5], [0, 2, 3, 4, 5]]
    told = capsys.readouterr().out.splitlines()
    assert told[:2] == [f"{here.names[0]}: starting, log {told[0].rpartition(' ')[2]}", f"{here.names[0]}: done"]
    assert f"{here.names[2]}: failed" in told


# ---- the ranking ---------------------------------------------------------------------------------------------------


def test_the_ranking_is_by_error_rate_then_loss_and_failures_come_last(write, scheduler, capsys, tmp_path):
    folder = tmp_path / "runs" / "search"
    outcomes = [
        ("done", 0.2, 0.5, 40, ""),
        ("failed", 0.1, 0.1, 20, "the loss was not finite"),
        ("done", 0.1, 0.6, 30, ""),
    ]
    outcomes += [
        ("done", 0.1, 0.4, 40, ""),
        ("done", None, None, None, ""),
        ("failed", None, None, None, "no space left"),
    ]
    for trial, (state, wer, loss, step, error) in zip(trials_of(write(GRID)), outcomes, strict=True):
        lines = [evaluation_line(step, wer, loss=loss)] if step else []
        write_run(trial.run, state, reason=error, lines=lines)
    assert sweep.main([str(write(GRID)), "--rank"]) == 1
    best = f"{folder}/learning_rate=2e-3,dropout=0"
    assert capsys.readouterr().out.splitlines() == [
        f"{folder}: 4 of 6 trials finished (4 done, 2 failed)",
        "rank  learning_rate  dropout  best WER   loss  step  state         run",
        "   1           2e-3        0    10.0 %  0.400    40  done          learning_rate=2e-3,dropout=0",
        "   2           1e-3      0.2    10.0 %  0.600    30  done          learning_rate=1e-3,dropout=0.2",
        "   3           1e-3        0    20.0 %  0.500    40  done          learning_rate=1e-3,dropout=0",
        "   4           2e-3      0.1         -      -     -  done          learning_rate=2e-3,dropout=0.1",
        "   -           1e-3      0.1    10.0 %  0.100    20  failed        learning_rate=1e-3,dropout=0.1",
        "   -           2e-3      0.2         -      -     -  failed        learning_rate=2e-3,dropout=0.2",
        "learning_rate=1e-3,dropout=0.1: the loss was not finite",
        "learning_rate=2e-3,dropout=0.2: no space left",
        f"best    {best}",
        f"        python -m ddp_asr.evaluate {best} shards/dev-clean",
        "retry   the same command with --retry-failed",
    ]


def test_without_an_evaluation_no_trial_is_the_best(scheduler, capsys):
    scheduler(*["done"] * 6).main()
    assert "best  " not in capsys.readouterr().out


outcomes = st.tuples(
    st.sampled_from(["done", "failed", "stopped"]), st.none() | st.floats(0, 2), st.none() | st.floats(0, 9)
)


@given(st.lists(outcomes, min_size=1, max_size=9))
def test_no_trial_is_ranked_before_a_better_one(found):
    results = ranked((None, summary(state=state), {"wer": wer, "loss": loss}) for state, wer, loss in found)
    finished = [run.finished for _, run, _ in results]
    assert finished == sorted(finished, reverse=True)
    rates = [best["wer"] for _, run, best in results if run.finished and best["wer"] is not None]
    assert rates == sorted(rates)


def test_the_best_evaluation_of_a_run_is_found_among_its_steps(tmp_path):
    lines = [train_line(1), evaluation_line(1, 0.5, loss=2.0), evaluation_line(2, 0.3, loss=0.9), train_line(3)]
    lines += [evaluation_line(3, 0.3, loss=0.7), evaluation_line(4, 0.4, loss=0.1), evaluation_line(5, None, loss=None)]
    write_run(tmp_path / "run", "done", lines=lines)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "test", "torn\n{"kind": "test", "wer": 0.0, "loss": 0.0}')
    assert best_evaluation(tmp_path / "run")["step"] == 3
    assert best_evaluation(tmp_path / "none") == {}


# ---- the command ---------------------------------------------------------------------------------------------------


def swept(*arguments):
    command = [sys.executable, "-m", "launch.sweep", *map(str, arguments)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)


def test_a_mistake_is_one_sentence_and_leaves_nothing(write, tmp_path):
    for arguments, said in (
        ([write(GRID), "--cluster=debug"], "--cluster debug trains in this process"),
        ([tmp_path / "none.yaml"], "cannot read the settings"),
        ([write(GRID), "--paralel=2"], "unknown setting 'paralel' in the command line"),
        ([write(GRID), "--cluster=local"], "there are no shards at shards/train-clean-100"),
    ):
        answer = swept(*arguments)
        assert answer.returncode == 2, answer.stderr
        assert answer.stderr.startswith("error: ") and said in answer.stderr and "Traceback" not in answer.stderr
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_prints_the_array_and_submits_nothing(scheduler, capsys):
    slurm = scheduler("done", "failed", *["unknown"] * 4)
    assert slurm.main("--dry-run") == 0 and slurm.submitted == []
    told = capsys.readouterr().out
    states = ["done", "failed", *["to submit"] * 4]
    assert [re.split(r"  +", line)[-2] for line in told.splitlines()[1:7]] == states
    assert "#SBATCH --array=0-3%2" in told and "-m ddp_asr.launch.job conclude --submission" in told


# ---- whole sweeps on this machine ----------------------------------------------------------------------------------

LOCAL = """
config: {corpus.directory}/tiny.yaml
parallel: 2
settings:
  train.seed: [0, 1]
  train.init_from: ["", /nowhere.pt]
fixed: {{run.dir: {runs}, data.train: {corpus.train}, data.test: {corpus.test}, train.epochs: 1}}
"""


@pytest.mark.slow
def test_a_sweep_on_this_machine_is_trained_ranked_and_not_trained_again(tiny_corpus, tmp_path):
    path, folder = tmp_path / "search.yaml", tmp_path / "runs" / "search"
    path.write_text(LOCAL.format(corpus=tiny_corpus, runs=tmp_path / "runs"))
    dry = swept(path, "--cluster=local", "--dry-run")
    assert dry.returncode == 0 and dry.stdout.count("to submit") == 4 and not folder.exists()

    first = swept(path, "--cluster=local")
    assert first.returncode == 1, first.stdout + first.stderr
    assert f"{folder}: 2 of 4 trials finished (2 done, 2 failed)" in first.stdout
    runs = [folder / line.split()[-1] for line in re.findall(r"^ +[12-] .*", first.stdout, flags=re.MULTILINE)]
    assert [tiny_training.status(run)["state"] for run in runs] == ["done", "done", "failed", "failed"]
    assert re.search(rf"^{re.escape(runs[2].name)}: .*/nowhere.pt", first.stdout, flags=re.MULTILINE)
    assert f"        python -m ddp_asr.evaluate {runs[0]} {tiny_corpus.test}\n" in first.stdout

    jobs = {run: (run / "job.json").read_text() for run in runs}
    again = swept(path, "--cluster=local")
    assert again.returncode == 1 and first.stdout.endswith(again.stdout)
    assert {run: (run / "job.json").read_text() for run in runs} == jobs

    assert swept(path, "--cluster=local", "--retry-failed").returncode == 1
    assert [run for run in runs if (run / "job.json").read_text() != jobs[run]] == runs[2:]


@pytest.mark.slow
def test_ctrl_c_stops_the_trials_with_a_checkpoint_and_the_same_command_continues(tiny_corpus, tmp_path):
    path, folder = tmp_path / "search.yaml", tmp_path / "runs" / "search"
    text = LOCAL.format(corpus=tiny_corpus, runs=tmp_path / "runs").replace(", /nowhere.pt", "")
    path.write_text(text.replace("parallel: 2", "parallel: 1").replace("train.epochs: 1", "train.epochs: 300"))
    screen, terminal = pty.openpty()
    command = [sys.executable, "-m", "launch.sweep", str(path), "--cluster=local"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TERM": "xterm", "COLUMNS": "150", "LINES": "20"}
    with subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    ) as process:
        os.close(terminal)
        read_until(screen, rb"starting, log")
        (run,) = wait_until(lambda: [path.parent for path in folder.glob("*/metrics.jsonl")], "the first trial's steps")
        os.write(screen, b"\x03")
        told = read_to_end(screen).decode()
        assert process.wait(60) == 130
    assert "stopping 1 trial at a checkpoint; the same command" in told and "Traceback" not in told
    stopped = tiny_training.status(run)
    assert (stopped["state"], stopped["reason"], stopped["retry"]) == ("stopped", "SIGTERM", True)
    assert checkpoint.step_path(run, stopped["step"]).is_file()
    assert [path.parent.name for path in folder.glob("*/job.json")] == [run.name]  # the second was not started

    last = stopped["step"] + 4
    path.write_text(path.read_text().replace("train.epochs: 300", f"train.epochs: 300, train.stop_at_step: {last}"))
    back = swept(path, "--cluster=local")
    assert back.returncode == 0 and "2 of 2 trials finished" in back.stdout, back.stdout + back.stderr
    for each in (path.parent for path in folder.glob("*/metrics.jsonl")):
        steps = [line["step"] for line in read_json_lines(each / "metrics.jsonl") if line["kind"] == "train"]
        assert steps == list(range(1, last + 1))
