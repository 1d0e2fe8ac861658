"""A sweep's file and trials, what is submitted and what not, and the ranking; whole sweeps on this machine."""

import fcntl
import json
import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddp_asr.config import load_config
from ddp_asr.errors import UserError
from ddp_asr.settings import describe
from launch import submit, sweep
from launch.cluster import Request, Submission
from launch.search import Range, Sweep, label_of, names_of, plan, read_sweep, trials_of
from launch.status import Overview
from launch.sweep import Follower, Result, conclusion, evaluations, is_due, ranking, result_of
from tests.conftest import REPOSITORY
from tests.test_launch_status import evaluation, read_to_end, read_until, train, write_run


@pytest.fixture
def write(tmp_path):
    """`write("settings: ...")`: a sweep's file around `base.yaml`, which trains under tmp_path/runs."""
    (tmp_path / "base.yaml").write_text(f"run: {{dir: {tmp_path / 'runs'}}}\ntrain: {{epochs: 7}}\n")

    def written(text, config=tmp_path / "base.yaml", name="search.yaml"):
        (tmp_path / name).write_text(f"config: {config}\n{text}\n")
        return tmp_path / name

    return written


GRID = "settings: {optim.learning_rate: [1e-3, 2e-3], encoder.dropout: [0, 0.1, 0.2]}"


# ---- the file ------------------------------------------------------------------------------------------------------


def test_a_file_is_read_as_it_is_written(write, tmp_path):
    path = write(
        "search: random\ntrials: 20\nseed: 3\nparallel: 4\nfixed: {train.epochs: 2, data.train: [a, b]}\n"
        "settings:\n  encoder.time_strides: [[2], [2, 1]]\n  optim.anneal: [linear, cosine]\n"
        "  optim.learning_rate: {min: 1e-4, max: 1e-2, scale: log}\n  encoder.rnn_size: {min: 64, max: 512}"
    )
    assert read_sweep(path) == Sweep(
        config=tmp_path / "base.yaml",
        name="search",
        search="random",
        trials=20,
        seed=3,
        parallel=4,
        settings={
            "encoder.time_strides": ["2", "2,1"],
            "optim.anneal": ["linear", "cosine"],
            "optim.learning_rate": Range(1e-4, 1e-2, log=True, whole=False),
            "encoder.rnn_size": Range(64, 512, log=False, whole=True),
        },
        fixed={"train.epochs": "2", "data.train": "a,b"},
    )


def test_a_grid_needs_nothing_but_a_config_and_values(write, tmp_path):
    found = read_sweep(write(f"name: mine\n{GRID}"))
    assert (found.name, found.search, found.parallel, found.fixed) == ("mine", "grid", 0, {})


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
        ("settings: {run.name: [a, b]}", "run.name cannot stand under settings .* a directory of its own"),
        ("settings: {run.dir: [a, b]}", "run.dir cannot stand under settings"),
        (f"{GRID}\nfixed: {{run.name: a}}", "run.name cannot stand under fixed"),
        (f"{GRID}\nfixed: {{encoder.dropout: 0}}", "encoder.dropout stands under both settings and fixed"),
        (f"{GRID}\nsearch: bayes", "search must be grid or random, not 'bayes'"),
        (f"{GRID}\nsearch: random", "must say how many trials to draw"),
        (f"{GRID}\nsearch: random\ntrials: -1", "trials must be 0 or more, not -1"),
        (f"{GRID}\nsearch: random\ntrials: many", "trials must be a whole number, not 'many'"),
        (f"{GRID}\ntrials: 3", "trials in .* is for 'search: random'"),
        (f"{GRID}\nseed: 3", "seed in .* is for 'search: random'"),
        (f"{GRID}\nparallel: two", "parallel must be a whole number, not 'two'"),
        (f"{GRID}\nname: a/b", "name must be that of a directory, .* not 'a/b'"),
        (f"{GRID}\nname: ..", "name must be that of a directory"),
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
        ("optim.learning_rate: {min: 2, max: 1}", "must go up: min = 2 is not below max = 1"),
        ("optim.learning_rate: {min: 1, max: 1}", "must go up"),
        ("optim.learning_rate: {min: 1, max: inf}", "must go up"),
        ("optim.learning_rate: {min: a, max: 1}", "min of optim.learning_rate must be a number, not 'a'"),
        ("optim.learning_rate: {min: 0, max: 1, scale: log}", "must lie above 0 for 'scale: log'"),
        ("optim.learning_rate: {min: 0, max: 1, scale: exp}", "the scale of optim.learning_rate must be linear or log"),
        ("encoder.rnn_size: {min: 1.5, max: 2}", "min of encoder.rnn_size must be a whole number, not '1.5'"),
        ("optim.anneal: {min: 1, max: 2}", "optim.anneal is no number"),
        ("vocabulary.lowercase: {min: 1, max: 2}", "vocabulary.lowercase is no number"),
        ("augment.speeds: {min: 1, max: 2}", "augment.speeds is no number"),
    ],
)
def test_a_mistake_in_a_range_is_one_sentence(write, setting, said):
    with pytest.raises(UserError, match=said):
        read_sweep(write(f"search: random\ntrials: 2\nsettings:\n  {setting}"))


def test_a_file_without_a_config(tmp_path):
    (tmp_path / "a.yaml").write_text(GRID)
    with pytest.raises(UserError, match=r"a.yaml names no config: add 'config: configs/an4.yaml'"):
        read_sweep(tmp_path / "a.yaml")


def test_the_example_is_sound():
    found = read_sweep(REPOSITORY / "configs" / "sweeps" / "an4.yaml")
    assert (found.config, found.name, len(trials_of(found))) == (Path("configs/an4.yaml"), "an4_rates", 6)


# ---- trials --------------------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_and_the_last_setting_turns_fastest(write):
    rates, dropouts = ["1e-3", "2e-3"], ["0", "0.1", "0.2"]
    assert trials_of(read_sweep(write(GRID))) == [
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
    return trials_of(read_sweep(write(RANDOM.format(trials=trials, seed=seed) + more)))


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
    assert len({tuple(trial.values()) for trial in trials_of(read_sweep(path))}) == 6
    path.write_text(path.read_text().replace("trials: 6", "trials: 7"))
    with pytest.raises(UserError, match="trials = 7, but only about 6 different ones can be drawn"):
        trials_of(read_sweep(path))


shares = st.floats(0, 1, exclude_max=True)
ends = st.floats(1e-6, 1e6).filter(lambda x: x == x)


@given(ends, ends, st.booleans(), shares, shares)
def test_a_range_is_kept_to_and_rises_with_the_share(one, other, log, share, further):
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
    assert re.fullmatch(label, label_of(values))


texts = st.text(st.sampled_from("ab,/=~ -1."), max_size=40)


@given(st.lists(st.fixed_dictionaries({"optim.x": texts, "model.y": texts}), unique_by=lambda d: tuple(d.values())))
def test_other_values_have_another_name_which_is_short_and_plain(trials):
    labels = [label_of(values) for values in trials]
    assert len(set(labels)) == len(labels)
    assert all(re.fullmatch(r"[\w.+=,@-]{1,60}", label) for label in labels)


def test_trials_are_numbered_in_their_order():
    trials = [{"a.x": value} for value in "pqr"]
    assert names_of(trials, []) == ["000-x=p", "001-x=q", "002-x=r"]
    assert names_of(trials, ["jobs", "notes-x=p", "1-x=q"]) == names_of(trials, [])


def test_trials_keep_their_directories_when_others_join_them():
    wider = [{"a.x": value} for value in "opqr"]
    assert names_of(wider, ["000-x=p", "001-x=q", "jobs"]) == [
        "004-x=o",
        "000-x=p",
        "001-x=q",
        "003-x=r",
    ]
    assert names_of(wider[1:2], ["000-x=p", "001-x=q"]) == ["000-x=p"]


def test_the_plan_is_a_checked_config_each_under_one_directory(write, tmp_path):
    trials = plan(read_sweep(write(f"{GRID}\nfixed: {{optim.anneal: cosine, train.epochs: 3}}")), ["--train.epochs=2"])
    assert [trial.name for trial in trials][:2] == [
        "000-learning_rate=1e-3,dropout=0",
        "001-learning_rate=1e-3,dropout=0.1",
    ]
    last = trials[-1]
    assert last.run == tmp_path / "runs" / "search" / "005-learning_rate=2e-3,dropout=0.2"
    config = last.config
    assert (config.optim.learning_rate, config.encoder.dropout) == (2e-3, 0.2)
    assert (config.optim.anneal, config.train.epochs) == ("cosine", 2)


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        (
            "settings: {encoder.dropout: [0.1, high]}",
            [],
            "trial 001-dropout=high: encoder.dropout must be a number, not 'high'",
        ),
        (
            "settings: {encoder.dropout: [0.1, 1]}",
            [],
            "trial 001-dropout=1: encoder.dropout must be at least 0 and below 1",
        ),
        (
            "settings: {encoder.dropout: [0.1, 1e-1]}",
            [],
            "trials 000-dropout=0.1 and 001-dropout=1e-1 have the same settings",
        ),
        (GRID, ["--encoder.dropout=0.3"], "--encoder.dropout is what the sweep varies"),
        (
            GRID,
            ["--encoder.droput=0.3"],
            "unknown setting 'encoder.droput' in the command line; did you mean 'encoder.dropout'",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_queued(write, text, overrides, said):
    with pytest.raises(UserError, match=said):
        plan(read_sweep(write(text)), overrides)


def test_a_run_that_was_begun_under_other_settings_is_not_ranked_with_these(write):
    path = write(GRID)
    trial = plan(read_sweep(path))[1]
    trial.run.mkdir(parents=True)
    (trial.run / "config.yaml").write_text(
        describe(load_config(None, ["--optim.learning_rate=1e-3", "--train.epochs=7"]))
    )
    plan(read_sweep(path))
    with pytest.raises(
        UserError, match=r"001-.* was begun with train.epochs = 7, and the sweep now says 3: set it back"
    ):
        plan(read_sweep(path), ["--train.epochs=3"])


# ---- what is submitted ---------------------------------------------------------------------------------------------


def overview(name="000-a", state="done", **changes) -> Overview:
    fields: dict[str, Any] = dict.fromkeys(Overview.__dataclass_fields__) | {
        "name": name,
        "path": Path(name),
        "state": state,
    }
    fields |= {"note": "", "error": "", "living": False, "finished": state == "done"}
    return Overview(**fields | changes)


@pytest.mark.parametrize(
    ("run", "due", "with_retry"),
    [
        (overview(state="waiting"), True, True),
        (overview(state="unknown"), True, True),
        (overview(state="stopped"), True, True),
        (overview(state="cancelled"), True, True),
        (overview(state="dead"), True, True),
        (overview(state="failed"), False, True),
        (overview(state="done"), False, False),
        (overview(state="stopped", finished=True), False, False),
        (overview(state="PENDING", living=True), False, False),
        (overview(state="running?", living=True), False, False),
    ],
)
def test_only_what_is_missing_resumable_or_asked_for_is_submitted(run, due, with_retry):
    assert (is_due(run, False), is_due(run, True)) == (due, with_retry)


class Scheduler:
    """Takes submissions down; trials then stand as the test says, by their numbers."""

    def __init__(self, follower: Follower, monkeypatch, states):
        self.states = states
        self.submitted: list[tuple[list[int], int]] = []
        self.now_s, self.complaint = 0.0, ""
        follower._clock = lambda: self.now_s
        monkeypatch.setattr(follower, "_reader", self)
        monkeypatch.setattr(submit, "check_all", lambda configs, request: None)
        for name in ("_submit", "_submit_detached"):
            monkeypatch.setattr(sweep, name, self.submit)

    def read(self, runs):
        return [
            overview(
                run.name, state, job_id=None if state == "unknown" else "1", living=state in ("PENDING", "RUNNING")
            )
            for run, state in zip(runs, self.states, strict=True)
        ]

    def submit(self, configs, request, folder, name, parallel):
        numbers = [int(config.run.name[:3]) for config in configs]
        self.submitted.append((numbers, parallel))
        for number in numbers:
            self.states[number] = "PENDING"
        return Submission(folder, [f"12_{index}" for index in range(len(numbers))])


@pytest.fixture
def scheduled(write, monkeypatch):
    def scheduled(states, executor="slurm", parallel=2):
        trials = plan(read_sweep(write(GRID)))
        follower = Follower("search", trials, Request(executor=executor), parallel)
        scheduler = Scheduler(follower, monkeypatch, states)
        follower.look()
        return follower, scheduler

    return scheduled


def test_all_that_is_due_goes_to_slurm_as_one_array(scheduled):
    follower, scheduler = scheduled(["done", "unknown", "failed", "PENDING", "stopped", "unknown"])
    assert follower.summary == "1 done, 2 waiting, 1 failed, 1 PENDING, 1 stopped"
    follower.start(retry_failed=False)
    assert scheduler.submitted == [([1, 4, 5], 2)] and follower.waiting == []
    assert not follower.ended
    scheduler.states[:] = ["done", "done", "failed", "done", "done", "done"]
    follower.look()
    assert follower.ended


def test_failed_trials_are_tried_again_when_asked(scheduled):
    follower, scheduler = scheduled(["done", "done", "failed", "done", "failed", "done"])
    assert follower.ended  # the same command again says so at once
    follower.start(retry_failed=True)
    assert scheduler.submitted == [([2, 4], 2)] and not follower.ended


def test_this_machine_trains_so_many_at_a_time(scheduled):
    follower, scheduler = scheduled(["unknown", "RUNNING", *["unknown"] * 4], executor="local")
    follower.start(retry_failed=False)
    assert scheduler.submitted == [([0], 2)]
    scheduler.states[:2] = ["done", "failed"]
    follower.look()
    follower.go_on()
    assert scheduler.submitted == [([0], 2), ([2, 3], 2)]
    follower.go_on()
    assert len(scheduler.submitted) == 2
    scheduler.states[2:] = ["done", "done", "unknown", "unknown"]
    follower.look()
    assert not follower.ended
    follower.go_on()
    scheduler.states[4:] = ["done", "done"]
    follower.look()
    assert follower.ended and scheduler.submitted[2:] == [([4, 5], 2)]


def test_nothing_is_submitted_while_nobody_knows_what_is_queued(scheduled, monkeypatch):
    follower, scheduler = scheduled(["unknown"] * 6)
    scheduler.complaint = "slurmctld is away"
    follower.runs = {}
    follower.look()
    with pytest.raises(UserError, match="so nothing was submitted: slurmctld is away"):
        follower.start(retry_failed=False)
    assert scheduler.submitted == []


def test_trials_stand_as_they_stood_while_slurm_does_not_answer(scheduled):
    follower, scheduler = scheduled(["RUNNING"] * 6)
    follower.start(retry_failed=False)
    scheduler.complaint, scheduler.states[:] = "slurmctld is away", ["dead"] * 6
    scheduler.now_s = 1000.0
    follower.look()
    assert not follower.ended and follower.summary == "6 RUNNING"


@pytest.mark.parametrize(
    ("state", "patience_s"), [("stopped", sweep.SETTLED_AFTER_S), ("unknown", sweep.FORGOTTEN_AFTER_S), ("done", 0.0)]
)
def test_a_job_that_seems_to_have_ended_may_be_requeueing_itself(scheduled, state, patience_s):
    follower, scheduler = scheduled(["RUNNING", *["done"] * 5])
    follower.start(retry_failed=False)
    for began_s, after in ((0.0, "PENDING"), (1000.0, state)):
        scheduler.now_s, scheduler.states[0] = began_s, state
        follower.look()
        assert follower.ended == (patience_s == 0)
        scheduler.now_s += patience_s - 0.1
        follower.look()
        assert follower.ended == (patience_s == 0)
        scheduler.states[0] = after
        follower.look()
    scheduler.now_s += 0.2
    follower.look()
    assert follower.ended


# ---- the ranking ---------------------------------------------------------------------------------------------------


def results(write, *outcomes):
    trials = plan(read_sweep(write(GRID)))
    return [
        Result(trial, overview(trial.name, state, error=error), wer, loss, step)
        for trial, (state, wer, loss, step, error) in zip(trials, outcomes, strict=False)
    ]


def test_the_ranking_is_by_error_rate_then_loss_and_failures_come_last(write):
    found = results(
        write,
        ("done", 0.2, 0.5, 40, ""),
        ("failed", 0.1, 0.1, 20, "the loss was not finite"),
        ("done", 0.1, 0.6, 30, ""),
        ("done", 0.1, 0.4, 40, ""),
        ("done", None, None, None, ""),
        ("failed", None, None, None, "no space left"),
    )
    assert ranking(found) == [
        "rank  trial  optim.learning_rate  encoder.dropout  best WER   loss  at step  state",
        "   1    003                 2e-3                0    10.0 %  0.400       40  done",
        "   2    002                 1e-3              0.2    10.0 %  0.600       30  done",
        "   3    000                 1e-3                0    20.0 %  0.500       40  done",
        "   4    004                 2e-3              0.1         -      -        -  done",
        "   -    001                 1e-3              0.1    10.0 %  0.100       20  failed: the loss was not finite",
        "   -    005                 2e-3              0.2         -      -        -  failed: no space left",
    ]


def test_the_conclusion_names_the_best_run_and_how_to_score_it(write, tmp_path):
    folder = tmp_path / "runs" / "search"
    found = results(write, ("done", 0.2, 0.5, 40, ""), ("done", 0.1, 0.4, 40, ""), ("failed", None, None, None, "x"))
    told = conclusion(found, folder).splitlines()
    assert told[0] == f"{folder}: 2 of 3 trials finished"
    best = f"{folder}/001-learning_rate=1e-3,dropout=0.1"
    assert told[5:] == [
        f"best: {best}",
        f"  python -m ddp_asr.evaluate {best} shards/dev-clean",
        "the same command with --retry-failed submits the failed ones again",
    ]
    nothing = results(write, ("done", None, None, None, ""))
    assert len(conclusion(nothing, folder).splitlines()) == 3  # nothing to choose by


outcomes = st.tuples(
    st.sampled_from(["done", "failed", "stopped"]), st.none() | st.floats(0, 2), st.none() | st.floats(0, 9)
)


@given(st.lists(outcomes, min_size=1, max_size=9))
def test_no_trial_is_ranked_before_a_better_one(found):
    listed = [Result(None, overview(state=state), wer, loss, 1) for state, wer, loss in found]
    ordered = sorted(listed, key=lambda result: result.key)
    finished = [result.run.finished for result in ordered]
    assert finished == sorted(finished, reverse=True)
    scored = [result.wer for result in ordered if result.run.finished and result.wer is not None]
    assert scored == sorted(scored)


def test_the_best_evaluation_of_a_run_is_found_among_its_steps(write, tmp_path):
    lines = [
        train(1),
        evaluation(1, 0.5, loss=2.0),
        evaluation(2, 0.3, loss=0.9),
        train(3),
        evaluation(3, 0.3, loss=0.7),
    ]
    lines += [evaluation(4, 0.4, loss=0.1), evaluation(5, None, loss=None)]
    trial = plan(read_sweep(write(GRID)))[0]
    write_run(trial.run, "done", lines=lines)
    with (trial.run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "test", "torn\n{"kind": "test", "wer": 0.0, "loss": 0.0}')
    found = result_of(trial, overview())
    assert (found.wer, found.loss, found.step) == (0.3, 0.7, 3)
    assert len(list(evaluations(trial.run / "metrics.jsonl"))) == 5
    assert result_of(plan(read_sweep(write(GRID)))[1], overview()).wer is None


# ---- the command ---------------------------------------------------------------------------------------------------


def swept(*arguments, cwd=REPOSITORY, **environment):
    command = [sys.executable, "-m", "launch.sweep", *map(str, arguments)]
    surroundings = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.run(command, cwd=cwd, env=surroundings, capture_output=True, text=True, timeout=300)


def test_a_mistake_is_one_sentence_and_leaves_nothing(write, tmp_path):
    for arguments, said in (
        ([write(GRID), "--cluster=debug"], "'debug' trains in this very process"),
        ([tmp_path / "none.yaml"], "cannot read the settings"),
        ([write(GRID), "--paralel=2"], "'--paralel=2' is no setting"),
        ([write(GRID), "--cluster=local"], "there are no shards at shards/train-clean-100"),
    ):
        answer = swept(*arguments)
        assert answer.returncode == 2, answer.stderr
        assert answer.stderr.startswith("error: ") and said in answer.stderr and "Traceback" not in answer.stderr
    assert not (tmp_path / "runs").exists()


def test_how_to_come_back(scheduled, tmp_path):
    follower, _ = scheduled(["done", *["unknown"] * 5])
    follower.start(retry_failed=False)
    told = sweep._come_back(follower, ["a b.yaml", "--parallel", "2", "--no-wait"]).splitlines()
    assert told == [
        "sweep search: 1 done, 5 PENDING; what runs or is queued goes on without this command",
        f"watch   python -m launch.status {tmp_path / 'runs' / 'search'} --watch",
        "follow  python -m launch.sweep 'a b.yaml' --parallel 2",
        "cancel  scancel 1",
    ]
    assert sweep._submitted(follower).endswith("submitted 5 as job 12, 2 at a time")


def test_lines_for_a_log_tell_each_change_once(scheduled, capsys):
    follower, scheduler = scheduled(["RUNNING", *["done"] * 5])
    lines = sweep._Lines(follower)
    lines.show()
    assert len(capsys.readouterr().out.splitlines()) == 6
    lines.show()
    assert capsys.readouterr().out == ""
    scheduler.states[0] = "failed"
    follower.look()
    lines.show()
    assert capsys.readouterr().out == "000-learning_rate=1e-3,dropout=0: failed\n"


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
    assert dry.returncode == 0 and not folder.exists()
    assert [line.split()[-2:] for line in dry.stdout.splitlines()[1:]] == [["to", "submit"]] * 4

    first = swept(path, "--cluster=local")
    assert first.returncode == 1, first.stdout + first.stderr
    assert f"{folder}: 2 of 4 trials finished" in first.stdout
    ranked = re.findall(r"^ *(\d|-) +(\d{3}) ", first.stdout, flags=re.MULTILINE)
    assert [rank for rank, _ in ranked] == ["1", "2", "-", "-"]
    assert sorted(number for _, number in ranked[:2]) == ["000", "002"]
    assert [number for _, number in ranked[2:]] == ["001", "003"]
    assert re.search(r"failed: .*/nowhere.pt", first.stdout)
    best = next(folder.glob(f"{ranked[0][1]}-*"))
    assert f"  python -m ddp_asr.evaluate {best} {tiny_corpus.test}\n" in first.stdout

    jobs = {run: (run / "job.json").read_text() for run in folder.glob("0*")}
    again = swept(path, "--cluster=local")
    assert again.returncode == 1 and "nothing to submit" in again.stdout
    assert again.stdout.splitlines()[-8:] == first.stdout.splitlines()[-8:]
    assert {run: (run / "job.json").read_text() for run in jobs} == jobs

    retried = swept(path, "--cluster=local", "--retry-failed", "--no-wait")
    assert retried.returncode == 0 and "submitted 2 as job " in retried.stdout, retried.stderr
    changed = {run.name[:3] for run in jobs if (run / "job.json").read_text() != jobs[run]}
    assert changed == {"001", "003"}
    assert swept(path, "--cluster=local").returncode == 1


@pytest.mark.slow
def test_ctrl_c_on_a_terminal_leaves_the_trials_running_and_the_same_command_comes_back(tiny_corpus, tmp_path):
    path, folder = tmp_path / "search.yaml", tmp_path / "runs" / "search"
    text = LOCAL.format(corpus=tiny_corpus, runs=tmp_path / "runs").replace(", /nowhere.pt", "")
    path.write_text(text.replace("parallel: 2", "parallel: 1"))
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
        read_until(screen, rb"starting|running")
        os.write(screen, b"\x03")
        told = read_to_end(screen).decode()
        assert process.wait(60) == 130
    assert "1 waiting" in told and "1 wait for it to be given again" in told and "Traceback" not in told
    assert f"launch.sweep {path} --cluster=local" in told
    kill = re.search(r"cancel  kill (\d+)", told)
    assert kill and kill[1] == submit.read_job(next(folder.glob("000-*")))["job_id"]

    back = swept(path, "--cluster=local")
    assert back.returncode == 0, back.stdout + back.stderr
    assert "submitted 1 as job " in back.stdout or "nothing to submit" in back.stdout.splitlines()[0]
    runs = sorted(folder.glob("0*"))
    assert [json.loads((run / "status.json").read_text())["state"] for run in runs] == ["done", "done"]
    assert [json.loads((run / "status.json").read_text())["attempt"] for run in runs] == [1, 1]
