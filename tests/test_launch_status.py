"""The states of runs and how they are listed: real run directories and leases, Slurm's commands as small scripts."""

import json
import os
import pty
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddp_asr.errors import UserError
from ddp_asr.runs.directory import read_lines
from ddp_asr.runs.lease import Lease
from launch import status
from launch.cluster import JobState
from launch.status import Evidence, RunReader, RunState, find_runs, last_lines, main, run_state
from tests.conftest import REPOSITORY
from tests.run_files import evaluation_line, read_to_end, read_until, train_line, write_run


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """`slurm(squeue="12|RUNNING|None", sacct="13|FAILED")`: what Slurm's commands print; returns who was called."""
    commands = tmp_path / "commands"
    commands.mkdir()
    calls = tmp_path / "calls"
    calls.touch()
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")

    def answer(**answers):
        for name, printed in answers.items():
            script = commands / name
            printed = printed and printed + "\n"
            script.write_text(f"#!/bin/sh\necho {name} >> {calls}\ncat << END\n{printed}END\n")
            script.chmod(0o755)
        calls.write_text("")
        return lambda: calls.read_text().split()

    return answer


def listed(directory, *arguments):
    command = [sys.executable, "-m", "launch.status", str(directory), *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)


# ---- the judgement -------------------------------------------------------------------------------------------------


def said(state, retry=True, reason=""):
    return {"state": state, "retry": retry, "reason": reason}


RUNNING, STOPPED, FAILED, DONE = said("running"), said("stopped", reason="SIGUSR2"), said("failed"), said("done")
REFUSED = {"refused": "unknown setting 'optim.lr'"}


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        # A job that lives decides, whatever the last attempt has left behind.
        (Evidence(job=JobState("PENDING", "Priority")), RunState("PENDING", "Priority", living=True)),
        (Evidence(job=JobState("PENDING"), status=FAILED), RunState("PENDING", living=True)),
        (Evidence(job=JobState("PENDING", "BeginTime"), status=STOPPED), RunState("PENDING", "BeginTime", living=True)),
        (Evidence(job=JobState("RUNNING"), status=RUNNING, lease="unknown"), RunState("RUNNING", living=True)),
        (
            Evidence(job=JobState("RUNNING"), status=STOPPED, lease="free"),
            RunState("RUNNING", "starting", living=True),
        ),
        (Evidence(job=JobState("RUNNING"), status=RUNNING, lease="alive"), RunState("RUNNING", living=True)),
        (
            Evidence(job=JobState("RUNNING"), status=RUNNING, lease="dead"),
            RunState("RUNNING", "its lease is no longer renewed", living=True),
        ),
        (Evidence(job=JobState("COMPLETING"), status=STOPPED), RunState("COMPLETING", living=True)),
        # ... but a run that is done is done, while its job is still closing Comet.
        (Evidence(job=JobState("RUNNING"), status=DONE), RunState("done", finished=True)),
        (Evidence(job=JobState("COMPLETED"), status=DONE), RunState("done", finished=True)),
        # A job that has ended, and what the run had said.
        (Evidence(job=JobState("COMPLETED"), status=STOPPED), RunState("stopped", "SIGUSR2")),
        (Evidence(job=JobState("CANCELLED"), status=STOPPED), RunState("cancelled", "SIGUSR2")),
        (Evidence(job=JobState("CANCELLED"), status=RUNNING, lease="unknown"), RunState("cancelled")),
        (Evidence(job=JobState("CANCELLED")), RunState("cancelled")),
        (Evidence(job=JobState("FAILED"), status=FAILED), RunState("failed")),
        (Evidence(job=JobState("NODE_FAIL"), status=FAILED), RunState("failed", "NODE_FAIL")),
        (Evidence(job=JobState("FAILED")), RunState("failed", "FAILED")),
        (Evidence(job=JobState("COMPLETED")), RunState("failed", "COMPLETED")),
        (
            Evidence(job=JobState("OUT_OF_MEMORY"), status=RUNNING, lease="unknown"),
            RunState("failed", "OUT_OF_MEMORY"),
        ),
        (Evidence(job=JobState("TIMEOUT"), status=RUNNING, lease="unknown"), RunState("dead", "TIMEOUT")),
        (Evidence(job=JobState("NODE_FAIL"), status=RUNNING, lease="dead"), RunState("dead", "NODE_FAIL")),
        # The copy on a node that Slurm has lost goes on writing.
        (
            Evidence(job=JobState("NODE_FAIL"), status=RUNNING, lease="alive"),
            RunState("running", "although Slurm says NODE_FAIL", living=True),
        ),
        (
            Evidence(status=said("stopped", retry=False, reason="train.stop_at_step = 4")),
            RunState("stopped", "train.stop_at_step = 4", finished=True),
        ),
        # An attempt that was refused changes nothing.
        (Evidence(status=DONE | REFUSED), RunState("done", "newest attempt refused", finished=True)),
        (Evidence(status=STOPPED | REFUSED), RunState("stopped", "SIGUSR2, newest attempt refused")),
        (
            Evidence(status=STOPPED | REFUSED, job=JobState("RUNNING"), lease="alive"),
            RunState("RUNNING", living=True),
        ),
        # Slurm has forgotten the job, or was not asked.
        (Evidence(job=JobState("UNKNOWN")), RunState("unknown")),
        (Evidence(job=JobState("UNKNOWN"), status=STOPPED), RunState("stopped", "SIGUSR2")),
        (Evidence(job=JobState("UNKNOWN"), status=RUNNING, lease="dead"), RunState("dead")),
        (Evidence(), RunState("unknown")),
        (Evidence(status=RUNNING), RunState("dead")),  # it would have said how it ended, and then given its lease back
        (Evidence(status=RUNNING, lease="dead"), RunState("dead")),
        (Evidence(status=RUNNING, lease="alive"), RunState("running", living=True)),
        (Evidence(status=RUNNING, lease="unknown", lease_age_s=59.0), RunState("running", living=True)),
        (
            Evidence(status=RUNNING, lease="unknown", lease_age_s=7200.0),
            RunState("running?", "no sign of life for 2 h 00 min", living=True),
        ),
        (Evidence(lease="unknown", lease_age_s=1.0), RunState("starting", living=True)),
        # On this machine the job is a process.
        (Evidence(process=True), RunState("starting", living=True)),
        (Evidence(process=True, status=FAILED), RunState("starting", living=True)),
        (Evidence(process=True, status=RUNNING, lease="unknown"), RunState("running", living=True)),
        (Evidence(process=True, status=RUNNING, lease="dead"), RunState("starting", living=True)),
        (Evidence(process=False), RunState("failed", "its process is gone")),
        (Evidence(process=False, status=STOPPED), RunState("stopped", "SIGUSR2")),
        (Evidence(process=False, status=RUNNING, lease="dead"), RunState("dead")),
    ],
)
def test_the_state_follows_from_all_evidence(seen, expected):
    assert run_state(seen) == expected


STATES = (
    "PENDING RUNNING COMPLETING SUSPENDED COMPLETED FAILED CANCELLED TIMEOUT NODE_FAIL PREEMPTED OUT_OF_MEMORY UNKNOWN"
)
witnesses = st.builds(
    Evidence,
    status=st.none() | st.builds(said, st.sampled_from(["running", "stopped", "failed", "done"]), st.booleans()),
    job=st.none() | st.builds(JobState, st.sampled_from(STATES.split())),
    process=st.none() | st.booleans(),
    lease=st.sampled_from(["free", "dead", "alive", "unknown"]),
    lease_age_s=st.floats(0, 1e4),
)


@given(witnesses)
def test_what_holds_for_every_run(seen):
    standing = run_state(seen)
    recorded = (seen.status or {}).get("state")
    assert not (standing.living and standing.finished)
    assert (standing.state == "done") == (recorded == "done")
    assert not standing.finished or recorded in ("done", "stopped")
    if recorded != "done":
        # Whoever may still write, or get its turn, is never handed out a second time.
        lives = bool(seen.job and seen.job.living) or seen.process or seen.lease == "alive"
        assert standing.living or not lives
        if seen.lease in ("free", "dead") and not lives:
            assert not standing.living


# ---- the files -----------------------------------------------------------------------------------------------------


def test_a_run_and_all_that_is_shown_of_it(tmp_path, slurm):
    slurm(squeue="12|RUNNING|None")
    lines = [
        *(train_line(step) for step in range(1, 8)),
        evaluation_line(7, 0.4),
        train_line(8),
        evaluation_line(8, 0.5),
        train_line(9),
    ]
    run = write_run(tmp_path / "a", "running", lines=lines, job={"job_id": "12"}, job_id="12", total_steps=40)
    lease = Lease.acquire(run, job_id="12", attempt=1)
    (shown,) = RunReader().read([run], tmp_path)
    lease.release()
    assert (shown.name, shown.state, shown.note, shown.living) == ("a", "RUNNING", "", True)
    assert (shown.step, shown.total_steps, shown.epoch, shown.loss) == (9, 40, 1, 3.0 / 9)
    assert (shown.wer, shown.best_wer, shown.audio_s_per_s) == (0.5, 0.5, 312.4)
    assert (shown.job_id, shown.attempt, shown.submitted_s, shown.error, shown.refused) == ("12", 1, 1.8e9, "", "")
    assert shown.updated_s == max(line["time_s"] for line in lines) or shown.updated_s > lines[-1]["time_s"]


def test_the_best_error_rate_is_the_runs_own_or_a_newer_one(tmp_path):
    for name, best_wer, newest, expected in (("a", 0.3, 0.4, 0.3), ("b", 0.3, 0.2, 0.2), ("c", None, 0.4, 0.4)):
        run = write_run(
            tmp_path / name, "stopped", lines=[train_line(1), evaluation_line(1, newest)], best_wer=best_wer
        )
        assert RunReader().read([run])[0].best_wer == expected
    empty = write_run(tmp_path / "d", "running", lines=[train_line(1)])
    assert RunReader().read([empty])[0].best_wer is None


kinds = st.sampled_from(["train", "test"])
whole = st.builds(lambda kind, step: json.dumps({"kind": kind, "step": step}).encode() + b"\n", kinds, st.integers())
broken = st.sampled_from(
    [b"\x00\x00\n", b'{"kind": "tr\n', b"\n", b"[1]\n", b'{"kind": "other", "step": 1}\n', b"{}\n"]
)
torn = st.sampled_from([b"", b'{"kind": "train", "step": 9}', b'{"kind"', b"\x00"])


@given(st.lists(whole | broken, max_size=30), torn, st.integers(1, 2000))
def test_the_end_of_a_file_tells_what_the_whole_file_tells(tmp_path_factory, lines, end, tail_bytes):
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    path.write_bytes(b"".join(lines) + end)
    kept = list(read_lines(path))
    expected = tuple(next((x for x in reversed(kept) if x.get("kind") == kind), {}) for kind in ("train", "test"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(status, "TAIL_BYTES", (tail_bytes, 1 << 20))
        assert last_lines(path) == expected


def test_of_a_large_file_only_the_end_is_read(tmp_path, monkeypatch):
    lines = [json.dumps(line) for line in (evaluation_line(1, 0.9), *(train_line(step) for step in range(1, 2000)))]
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines) + "\n")
    assert last_lines(path)[1]["wer"] == 0.9
    monkeypatch.setattr(status, "TAIL_BYTES", (1000, 100_000))
    newest, test = last_lines(path)
    assert newest["step"] == 1999 and test == {}
    assert last_lines(tmp_path / "none.jsonl") == ({}, {})


def test_one_run_the_runs_of_a_directory_and_those_of_a_sweep_in_it(tmp_path):
    single, first, second = (write_run(tmp_path / name, "done") for name in ("single", "sweep/000-a", "sweep/001-b"))
    (tmp_path / "sweep" / "jobs" / "20260101-000000").mkdir(parents=True)
    (tmp_path / "sweep" / "jobs" / "20260101-000000" / "config.yaml").touch()
    (tmp_path / "single" / "jobs" / "20260101-000000").mkdir(parents=True)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    assert find_runs(tmp_path) == [single, first, second]
    assert find_runs(tmp_path / "sweep") == [first, second]
    assert find_runs(single) == [single]
    assert find_runs(tmp_path / "empty") == []
    with pytest.raises(UserError, match=r"there is no directory .*nowhere: name the one that holds the runs"):
        find_runs(tmp_path / "nowhere")


def test_somebodys_own_files_are_listed_and_break_nothing(tmp_path):
    for name, text in (("status.json", "[1, 2]"), ("job.json", '"mine"'), ("metrics.jsonl", '{"kind": []}\n"x"\n[]\n')):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(text)
    assert [run.state for run in RunReader().read(find_runs(tmp_path))] == ["unknown"] * 3


# ---- leases, Slurm, processes --------------------------------------------------------------------------------------

DIE_WITH_A_LEASE = """
import sys
from pathlib import Path
from ddp_asr.runs.lease import Lease
Lease.acquire(Path(sys.argv[1]), job_id=None, attempt=1)
"""


def test_a_run_whose_process_was_killed_is_dead_at_once(tmp_path):
    run = write_run(tmp_path / "run", "running", lines=[train_line(1)])
    subprocess.run([sys.executable, "-c", DIE_WITH_A_LEASE, str(run)], cwd=REPOSITORY, check=True)
    assert RunReader().read([run])[0].state == "dead"


def test_a_lease_of_another_machine_is_unknown_at_first_and_then_proves_itself(tmp_path):
    run = write_run(tmp_path / "run", "running", lines=[train_line(1)])
    now_s = 0.0
    reader = RunReader(clock=lambda: now_s)

    def renewed(count):
        owner = {"host": "far", "pid": 1, "start_time": 1, "pid_space": "", "job_id": None, "attempt": 1, "nonce": "n"}
        (run / "lease.json").write_text(json.dumps(owner | {"renewals": count}))

    renewed(1)
    assert reader.read([run])[0].state == "running"
    renewed(2)
    now_s = 50.0
    assert reader.read([run])[0].state == "running"
    now_s = 109.0
    assert reader.read([run])[0].state == "running"
    now_s = 110.0
    assert reader.read([run])[0].state == "dead"
    renewed(3)
    assert reader.read([run])[0].state == "running"
    os.utime(run / "lease.json", (1.7e9, 1.7e9))
    assert RunReader().read([run])[0].state == "running?"


def test_slurm_is_asked_once_for_all_and_not_at_all_for_none(tmp_path, slurm):
    called = slurm(
        squeue="12_0|PENDING|Priority\n12_1|RUNNING|None\n99|RUNNING|None", sacct="13|CANCELLED by 0\n14|FAILED"
    )
    write_run(tmp_path / "local", "done")
    write_run(tmp_path / "done", "done", job={"job_id": "11"})
    assert {run.state for run in RunReader().read(find_runs(tmp_path))} == {"done"} and called() == []
    for name, job_id in (("a", "12_0"), ("b", "12_1"), ("c", "13"), ("d", "14"), ("e", "15")):
        write_run(tmp_path / name, job={"job_id": job_id})
    states = {run.name: run.state for run in RunReader().read(find_runs(tmp_path))}
    assert states == {
        **{"a": "PENDING", "b": "RUNNING", "c": "cancelled", "d": "failed", "e": "unknown"},
        **{"done": "done", "local": "done"},
    }
    assert called() == ["squeue", "sacct"]


def test_a_run_of_somebodys_own_batch_script_is_asked_for_by_the_job_that_it_names(tmp_path, slurm):
    slurm(squeue="12|RUNNING|None\n13|PENDING|BeginTime\n14|RUNNING|None", sacct="15|CANCELLED by 0")
    for name, state, job_id in (
        ("a", "running", "12"),
        ("b", "stopped", "13"),
        ("c", "failed", "14"),
        ("d", "stopped", "15"),
    ):
        write_run(tmp_path / name, state, job_id=job_id, reason="SIGTERM")
    shown = [(run.state, run.note, run.job_id) for run in RunReader().read(find_runs(tmp_path))]
    assert shown == [
        ("RUNNING", "starting", "12"),
        ("PENDING", "BeginTime", "13"),
        ("failed", "", "14"),  # in an interactive allocation that goes on
        ("cancelled", "SIGTERM", "15"),
    ]


def test_a_run_that_was_copied_to_where_there_is_no_slurm_is_just_a_run(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", "stopped", job_id="12", reason="SIGTERM")
    monkeypatch.setenv("PATH", str(tmp_path))
    reader = RunReader()
    assert (reader.read([run])[0].state, reader.slurm_error) == ("stopped", "")


def test_where_slurm_does_not_answer_the_files_speak_and_it_is_said(tmp_path, slurm, capsys):
    slurm(squeue="x")
    script = tmp_path / "commands" / "squeue"
    script.write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1\n")
    write_run(tmp_path / "runs" / "a", "stopped", job={"job_id": "12"}, reason="SIGTERM")
    assert main([str(tmp_path / "runs")]) == 0
    _, row, complaint = capsys.readouterr().out.splitlines()
    assert row.split()[:3] == ["a", "stopped", "(SIGTERM)"]
    assert complaint.startswith("Slurm could not be asked: ") and "Unable to contact slurm controller" in complaint


def test_a_local_job_lives_as_long_as_its_own_process(tmp_path):
    folder = str(tmp_path / "jobs" / "1")
    command = [sys.executable, "-c", "print(flush=True); input()", folder]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        process.stdout.readline()  # Popen returns a moment before /proc shows the arguments
        mine = write_run(tmp_path / "mine", job={"job_id": str(process.pid), "executor": "local", "folder": folder})
        other = write_run(tmp_path / "other", job={"job_id": str(process.pid), "executor": "local"})
        assert RunReader().read([mine])[0].state == "starting"
        (shown,) = RunReader().read([other])  # the pid is another's by now
        assert (shown.state, shown.note) == ("failed", "its process is gone")
    finally:
        process.communicate(b"\n")
    assert RunReader().read([mine])[0].state == "failed"


# ---- the error -----------------------------------------------------------------------------------------------------


def test_the_error_of_a_failed_run_is_its_own_word(tmp_path):
    run = write_run(tmp_path / "run", "failed", reason="CUDA out of memory", retry=False)
    assert RunReader().read([run])[0].error == "CUDA out of memory"


LOG = """submitit INFO (2026-01-01) - Starting with JobEnvironment(job_id=12, hostname=node1)
error: there are no shards at shards/nowhere; make them with:
  python -m ddp_asr.shard nowhere
srun: error: node1: task 0: Exited with exit code 2
"""
TRACE = """Traceback (most recent call last):
  File "x.py", line 1, in <module>
ModuleNotFoundError: No module named 'torch'
srun: error: node1: task 1: Exited with exit code 1
"""
TORCHRUN = TRACE.partition("srun")[0] + "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n"
KILLED = """epoch 1/3  step 4/12
slurmstepd: error: Detected 1 oom_kill event in StepId=12.0. Some of the step tasks have been OOM Killed.
srun: error: node1: task 0: Out Of Memory
"""


@pytest.mark.parametrize(
    ("logs", "expected"),
    [
        ({"12_0_log.out": LOG}, "there are no shards at shards/nowhere; make them with:"),
        ({"12_0_log.out": "srun: error: node1: task 2: Killed\n", "12_10_log.out": "", "12_2_log.out": TRACE}, None),
        ({"12_0_log.out": TORCHRUN}, "ModuleNotFoundError: No module named 'torch'"),
        ({"12_0_log.out": TRACE + LOG + TRACE}, "there are no shards at shards/nowhere; make them with:"),
        ({"12_0_log.out": KILLED}, "srun: error: node1: task 0: Out Of Memory"),
        ({"12_0_log.out": "hello\n"}, ""),
        ({"123_0_log.out": LOG}, ""),
        ({}, ""),
    ],
)
def test_the_error_of_a_run_that_says_nothing_stands_in_its_jobs_logs(tmp_path, slurm, logs, expected):
    slurm(squeue="", sacct="12|FAILED")
    run = write_run(tmp_path / "run", job={"job_id": "12"})
    for name, text in logs.items():
        (run / name).write_text(text)
    (shown,) = RunReader().read([run])
    assert shown.state == "failed"
    assert shown.error == ("ModuleNotFoundError: No module named 'torch'" if expected is None else expected)


# ---- the list ------------------------------------------------------------------------------------------------------


def test_the_living_come_first_then_the_newest(tmp_path, slurm):
    slurm(squeue="1|RUNNING|None\n2|PENDING|Resources", sacct="")
    write_run(tmp_path / "a", "done", lines=[train_line(1, time_s=1.9e9)])
    write_run(tmp_path / "b", "failed", lines=[train_line(1, time_s=2.0e9)])
    write_run(tmp_path / "c", job={"job_id": "1", "time_s": 1.0})
    write_run(tmp_path / "d", job={"job_id": "2", "time_s": 2.0})
    write_run(tmp_path / "e", job={"job_id": "3"})
    shown = status.in_order(RunReader().read(find_runs(tmp_path)))
    assert [run.name for run in shown] == ["d", "c", "b", "a", "e"]


def test_the_table(tmp_path, capsys):
    now_s = 1.8e9
    lines = [
        train_line(119, time_s=now_s - 250),
        evaluation_line(119, 0.1234),
        train_line(120, time_s=now_s - 130, loss=None),
    ]
    first = write_run(tmp_path / "sweep" / "[a]", "stopped", lines=lines, reason="SIGTERM", total_steps=400, attempt=2)
    second = write_run(tmp_path / "b", "failed", reason="no space left on [disk]")
    third = write_run(tmp_path / "c", "done")
    for run, more in ((first, {}), (second, {}), (third, {"refused": "it is done"})):
        record = json.loads((run / "status.json").read_text()) | {"time_s": now_s - 130}
        (run / "status.json").write_text(json.dumps(record | more))
    status.show(status.run_table(RunReader().read([first, second, third], tmp_path), now_s))
    assert capsys.readouterr().out.splitlines() == [
        "run           state                             step  epoch  loss     WER    best  audio-s/s  job  attempt"
        "         updated",
        "sweep/[a]     stopped (SIGTERM)              120/400     12     -  12.3 %  12.3 %        312    -        2"
        "  2 min 10 s ago",
        "b             failed                             0/?      -     -       -       -          -    -        1"
        "  2 min 10 s ago",
        "c             done (newest attempt refused)      0/?      -     -       -       -          -    -        1"
        "  2 min 10 s ago",
        "b: no space left on [disk]",
        "c: newest attempt refused: it is done",
    ]


def test_json_is_what_the_table_shows_and_where_it_lies(tmp_path):
    run = write_run(
        tmp_path / "runs" / "a", "done", lines=[train_line(4), evaluation_line(4, 0.25)], total_steps=4, best_wer=0.25
    )
    answer = listed(tmp_path / "runs", "--json")
    (found,) = json.loads(answer.stdout)
    assert answer.returncode == 0
    assert found | {"updated_s": 0} == {
        **{"name": "a", "path": str(run), "state": "done", "note": "", "living": False, "finished": True},
        **{"step": 4, "total_steps": 4, "epoch": 1, "loss": 0.75, "wer": 0.25, "best_wer": 0.25},
        **{"audio_s_per_s": 312.4, "job_id": None, "attempt": 1, "submitted_s": None, "updated_s": 0, "error": ""},
        **{"refused": ""},
    }


def test_no_runs_and_no_directory(tmp_path):
    assert listed(tmp_path).stdout == f"no runs in {tmp_path}\n"
    answer = listed(tmp_path / "nowhere")
    assert answer.returncode == 2 and answer.stderr.startswith("error: there is no directory ")


@pytest.mark.parametrize("seconds", ["0", "-1", "runs", "nan", "inf"])
def test_a_rhythm_that_is_none(seconds, capsys):
    with pytest.raises(SystemExit):
        main(["--watch", seconds])
    assert "is no number of seconds above 0 (DIR comes before --watch)" in capsys.readouterr().err


def test_watching_a_log_prints_table_after_table_until_ctrl_c(tmp_path):
    write_run(tmp_path / "a", "done")
    command = [sys.executable, "-m", "launch.status", str(tmp_path), "--watch", "0.01"]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watch:
        seen = [watch.stdout.readline().split()[0] for _ in range(6)]
        watch.send_signal(2)
        _, error = watch.communicate(timeout=30)
    assert seen == ["run", "a"] * 3
    assert (watch.returncode, error) == (0, "")


def test_watching_on_a_terminal_draws_in_place_until_ctrl_c(tmp_path):
    """The table is drawn anew when a run changes, and Ctrl-C leaves a sound terminal."""
    run = write_run(tmp_path / "a", "running", lines=[train_line(1)], total_steps=9)
    screen, terminal = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "150", "LINES": "20"}
    command = [sys.executable, "-m", "launch.status", str(tmp_path), "--watch", "0.05"]
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=terminal, stderr=terminal) as watch:
        os.close(terminal)
        shown = read_until(screen, rb"1/9")
        write_run(run, "done", lines=[train_line(2)], total_steps=9)
        shown += read_until(screen, rb"2/9")
        watch.send_signal(2)
        shown += read_to_end(screen)
        assert watch.wait(30) == 0
    assert b"dead" in shown and b"done" in shown and b"Traceback" not in shown
    assert shown.rstrip().endswith(b"\x1b[?25h")  # the cursor is visible again
