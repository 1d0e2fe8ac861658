"""One writer a run: every rule of the lease, with a clock of the test's own and with real processes."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from ddp_asr.errors import UserError
from ddp_asr.runs import lease as lease_module
from ddp_asr.runs.lease import DEAD_AFTER_S, POLL_S, Lease, LeaseLost, Owner, Watch, is_gone

REPOSITORY = Path(__file__).resolve().parent.parent
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are known through /proc")


class Clock:
    """A clock that only sleeping moves; `events` happen on the way, once their time has come."""

    def __init__(self):
        self.now_s = 1000.0
        self.events = []

    def __call__(self):
        return self.now_s

    def sleep(self, seconds):
        self.now_s += seconds
        for event in [event for event in self.events if event[0] <= self.now_s]:
            self.events.remove(event)
            event[1]()

    def at(self, after_s, action):
        self.events.append((self.now_s + after_s, action))


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def acquire(tmp_path, clock):
    """`acquire(job_id=..., attempt=...)` on the test's directory and clock; released at the end."""
    taken = []

    def take(job_id=None, attempt=1, **arguments):
        defaults = {"clock": clock, "sleep": clock.sleep, "on_wait": lambda message: None}
        taken.append(Lease.acquire(tmp_path, job_id=job_id, attempt=attempt, **(defaults | arguments)))
        return taken[-1]

    yield take
    for lease in taken:
        lease.release()


def owner(**changes) -> Owner:
    """Somebody on another host, of whom nothing is known."""
    somebody = Owner("elsewhere", 4711, 12345, "boot pid:[1]", job_id="77", attempt=3, nonce="somebody")
    return replace(somebody, **changes)


def on_this_host(process, **changes):
    start_time = lease_module._process(process.pid).start_time
    here = {"host": socket.gethostname(), "pid_space": lease_module._pid_space(), "pid": process.pid}
    return owner(**(here | {"start_time": start_time} | changes))


def put(directory: Path, holder: Owner, renewals: int = 1) -> None:
    (directory / "lease.json").write_text(json.dumps(asdict(holder) | {"renewals": renewals}))


def holder_of(directory: Path) -> Owner | None:
    watch = Watch(directory)
    watch.verdict()
    return watch.owner


def refuse_to_wait(seconds: float) -> None:
    """In place of `sleep`: ends an `acquire` that would watch a lease which may be dead."""
    raise UserError("another run may hold the directory")


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen]:
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def python(code: str, *arguments: object) -> subprocess.Popen:
    """A process that imports the lease and talks over its standard streams."""
    code = f"import sys, pathlib\nfrom ddp_asr.errors import UserError\nfrom ddp_asr.runs.lease import *\n{code}"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )


def ask(process, line=""):
    if line:
        process.stdin.write(line + "\n")
        process.stdin.flush()
    return process.stdout.readline().strip()


# --- what the file says --------------------------------------------------------------------------------------------


def test_the_lease_names_its_owner(tmp_path, acquire):
    lease = acquire(job_id="4711", attempt=2)
    record = json.loads((tmp_path / "lease.json").read_text())
    assert (record["host"], record["pid"]) == (socket.gethostname(), os.getpid())
    assert (record["job_id"], record["attempt"], record["nonce"]) == ("4711", 2, lease.owner.nonce)
    assert holder_of(tmp_path) == lease.owner


@needs_proc
def test_start_time_is_the_kernels(sleeper):
    fields = Path(f"/proc/{sleeper.pid}/stat").read_text().rsplit(")", 1)[1].split()
    assert lease_module._process(sleeper.pid).start_time == int(fields[19])
    assert lease_module.this_process(None, 1).start_time == lease_module._process(os.getpid()).start_time


def test_every_renewal_changes_the_file_in_place(tmp_path, acquire):
    lease = acquire()
    before = (tmp_path / "lease.json").read_bytes()
    inode = (tmp_path / "lease.json").stat().st_ino
    lease.renew()
    after = (tmp_path / "lease.json").read_bytes()
    assert before != after and len(before) == len(after)
    assert (tmp_path / "lease.json").stat().st_ino == inode
    lease.check()


def test_a_thread_renews(tmp_path):
    lease = Lease.acquire(tmp_path, job_id=None, attempt=1, renew_every_s=0.01)
    lease.start_renewing()
    watch = Watch(tmp_path)
    try:
        while watch.verdict() == "unknown":
            time.sleep(0.01)
        assert watch.verdict() == "alive"
        lease.check()
    finally:
        lease.release()
    assert watch.verdict() == "free"


def test_the_modules_of_launchers_need_no_torch():
    process = python("print('torch' in sys.modules)")
    assert process.communicate()[0].strip() == "False"


# --- who is dead, and when -----------------------------------------------------------------------------------------


def test_a_silent_lease_is_dead_after_60_s_of_watching(tmp_path, clock, acquire):
    put(tmp_path, owner())
    begin_s, told = clock.now_s, []
    acquire(on_wait=told.append).check()
    assert DEAD_AFTER_S <= clock.now_s - begin_s <= DEAD_AFTER_S + 2 * POLL_S
    assert len(told) == 1 and "elsewhere, pid 4711, job 77, attempt 3" in told[0] and "60 s" in told[0]


def test_a_lease_renewed_in_the_last_second_is_refused(tmp_path, clock, acquire):
    put(tmp_path, owner())
    clock.at(59, lambda: put(tmp_path, owner(), renewals=2))
    with pytest.raises(UserError, match=r"another run holds .*elsewhere, pid 4711, job 77, attempt 3.*stop it"):
        acquire()
    assert holder_of(tmp_path) == owner()


def test_how_old_the_file_says_it_is_does_not_matter(tmp_path, acquire):
    put(tmp_path, owner())
    os.utime(tmp_path / "lease.json", (0, 0))
    with pytest.raises(UserError, match="another run may hold"):
        acquire(sleep=refuse_to_wait)


@needs_proc
@pytest.mark.parametrize("reaped", [True, False])
def test_a_killed_process_of_this_host_is_dead_at_once(tmp_path, clock, acquire, reaped):
    process = python("Lease.acquire(pathlib.Path(sys.argv[1]), job_id=None, attempt=1); print(1, flush=True); input()",
                     tmp_path)  # fmt: skip
    assert ask(process) == "1"
    assert not is_gone(holder_of(tmp_path))
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and a zombie still
    if reaped:
        process.wait()
    begin_s = clock.now_s
    assert Watch(tmp_path, clock=clock).verdict() == "dead"
    acquire(sleep=refuse_to_wait).check()
    assert clock.now_s == begin_s
    process.communicate()


@needs_proc
def test_a_reused_pid_is_another_process(tmp_path, sleeper, acquire):
    put(tmp_path, on_this_host(sleeper, start_time=lease_module._process(sleeper.pid).start_time - 1))
    acquire(sleep=refuse_to_wait).check()


@needs_proc
@pytest.mark.parametrize(
    "changes",
    [{}, {"host": "elsewhere"}, {"pid_space": "a container"}, {"start_time": None}],
    ids=["alive", "other host", "other pid namespace", "start time unknown"],
)
def test_nobody_is_gone_whose_process_cannot_be_judged(tmp_path, sleeper, changes, clock, acquire):
    if changes:  # gone here, which says nothing about there
        changes = {"pid": 2**22 + 1} | changes
    put(tmp_path, on_this_host(sleeper, **changes))
    with pytest.raises(UserError, match="another run may hold"):
        acquire(sleep=refuse_to_wait)
    begin_s = clock.now_s
    acquire()
    assert clock.now_s - begin_s >= DEAD_AFTER_S


@needs_proc
def test_a_process_that_proc_hides_is_not_gone(sleeper, monkeypatch):
    holder = on_this_host(sleeper)
    monkeypatch.setattr(lease_module, "_process", lambda pid: None)
    assert not is_gone(holder)
    sleeper.kill()
    sleeper.wait()
    assert is_gone(holder)


@needs_proc
@pytest.mark.parametrize(("stat", "ended"), [("S 9", False), ("Z 1", True), ("X 1", True), ("Z 2", False)])
def test_a_zombie_with_threads_left_may_still_write(monkeypatch, stat, ended):
    state, threads = stat.split()
    fields = [state, *["0"] * 16, threads, "0", "123", "0"]
    monkeypatch.setattr(Path, "read_text", lambda path: f"7 (a) name) {' '.join(fields)}")
    assert lease_module._process(7) == lease_module._Process(start_time=123, ended=ended)


def test_a_lease_in_the_making_is_nobodys_yet_and_not_dead(tmp_path, clock, acquire):
    (tmp_path / "lease.json").write_bytes(b"")
    assert holder_of(tmp_path) is None
    told = []
    with pytest.raises(UserError, match="another run may hold"):
        acquire(sleep=refuse_to_wait, on_wait=told.append)
    assert "(just starting)" in told[0]
    acquire().check()  # its maker was killed in between: 60 s


def test_a_watch_follows_a_run(tmp_path, clock):
    watch = Watch(tmp_path, clock=clock)
    assert watch.verdict() == "free"
    put(tmp_path, owner())
    assert watch.verdict() == "unknown"
    clock.now_s += 59
    assert watch.verdict() == "unknown"
    put(tmp_path, owner(), renewals=2)
    assert watch.verdict() == "alive"
    clock.now_s += 59
    assert watch.verdict() == "alive"
    clock.now_s += 1
    assert watch.verdict() == "dead" and watch.owner == owner()
    (tmp_path / "lease.json").unlink()
    assert watch.verdict() == "free"


# --- taking over ---------------------------------------------------------------------------------------------------


def test_a_higher_attempt_of_the_same_job_takes_over_at_once(tmp_path, clock, acquire):
    loser = acquire(job_id="77", attempt=1)
    loser.check()
    begin_s = clock.now_s
    winner = acquire(job_id="77", attempt=2, sleep=refuse_to_wait)
    assert clock.now_s == begin_s
    winner.check()
    for _ in range(2):  # once lost, lost for good
        with pytest.raises(LeaseLost, match=r"taken over by another run .*job 77, attempt 2.*ends without writing"):
            loser.check()
    loser.release()
    winner.check()


@pytest.mark.parametrize(
    ("job_id", "attempt"), [("77", 3), ("77", 2), ("78", 4), (None, 4)], ids=["same", "lower", "other job", "no job"]
)
def test_anyone_else_is_refused(tmp_path, clock, acquire, job_id, attempt):
    put(tmp_path, owner())
    clock.at(1, lambda: put(tmp_path, owner(), renewals=2))
    with pytest.raises(UserError, match=r"another run holds .*wait until it has been silent for 60 s"):
        acquire(job_id=job_id, attempt=attempt)
    assert holder_of(tmp_path) == owner()


def test_two_runs_without_a_job_do_not_supersede_each_other(tmp_path, acquire):
    put(tmp_path, owner(job_id=None))
    with pytest.raises(UserError, match="another run may hold"):
        acquire(job_id=None, attempt=9, sleep=refuse_to_wait)


def test_a_starter_that_was_too_slow_puts_the_fresh_lease_back(tmp_path, clock, acquire):
    lease = acquire()
    answers = iter([True, False])  # dead when read, another's fresh one when alone in our hands
    lease_module._remove(tmp_path / "lease.json", lambda content: next(answers))
    lease.renew()
    lease.check()
    assert json.loads((tmp_path / "lease.json").read_text())["renewals"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["lease.json"]


def test_the_owner_outlasts_the_moment_in_which_its_lease_is_aside(tmp_path, clock, acquire):
    lease = acquire()
    aside = tmp_path / ".lease-x.aside"
    (tmp_path / "lease.json").rename(aside)
    clock.at(0.1, lambda: aside.rename(tmp_path / "lease.json"))
    lease.check()


def test_a_removed_lease_is_lost(tmp_path, clock, acquire):
    lease = acquire()
    (tmp_path / "lease.json").unlink()
    with pytest.raises(LeaseLost, match="is gone"):
        lease.check()


STARTER = """
def refuse_to_wait(seconds):
    raise UserError("another run may hold the directory")

for line in sys.stdin:
    directory, job_id, attempt = line.split()
    print("ready", flush=True)
    while not pathlib.Path(directory, "go").exists():
        pass
    try:
        doubt = {"sleep": refuse_to_wait, "on_wait": lambda text: None}
        lease = Lease.acquire(pathlib.Path(directory), job_id=job_id, attempt=int(attempt), **doubt)
        print("took", flush=True)
    except UserError as error:
        assert "another run" in str(error), error
        lease = None
        print("refused", flush=True)
    sys.stdin.readline()  # all have tried
    try:
        lease.check() if lease else None
        print("holds" if lease else "nothing", flush=True)
    except LeaseLost:
        print("nothing", flush=True)
    sys.stdin.readline()  # all have checked
"""


@needs_proc
@pytest.mark.parametrize("before", ["nothing", "a dead lease", "a lower attempt"])
def test_of_many_starters_exactly_one_wins(tmp_path, sleeper, before):
    gone = on_this_host(sleeper, start_time=1)
    starters = [python(STARTER) for _ in range(4)]
    for number in range(15):
        directory = tmp_path / f"{number}"
        directory.mkdir()
        if before != "nothing":
            put(directory, gone if before == "a dead lease" else owner(attempt=1))
        for starter in starters:
            starter.stdin.write(f"{directory} 77 2\n")
            starter.stdin.flush()
        assert {ask(starter) for starter in starters} == {"ready"}
        (directory / "go").touch()
        assert "took" in [ask(starter) for starter in starters]
        assert sorted(ask(starter, "check") for starter in starters) == ["holds"] + ["nothing"] * 3
        for starter in starters:
            starter.stdin.write("next\n")
        assert holder_of(directory).pid in [starter.pid for starter in starters]
        assert sorted(path.name for path in directory.iterdir()) == ["go", "lease.json"]
    for starter in starters:
        starter.communicate()


FROZEN = """
directory = pathlib.Path(sys.argv[1])
# A clock that stands still: only reading the file anew can tell that the lease is lost.
lease = Lease.acquire(directory, job_id=None, attempt=1, clock=lambda: 0.0)
print("owns", flush=True)
for line in sys.stdin:
    try:
        lease.renew()
        lease.check()
        (directory / "metrics.jsonl").open("a").write("mine\\n")
        print("wrote", flush=True)
    except LeaseLost as error:
        print(error, flush=True)
"""


@needs_proc
def test_a_frozen_owner_that_wakes_after_the_take_over_writes_nothing(tmp_path, acquire):
    frozen = python(FROZEN, tmp_path)
    assert ask(frozen) == "owns"
    assert ask(frozen, "write") == "wrote"
    frozen.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, frozen.pid, os.WSTOPPED | os.WNOWAIT)
    winner = acquire()  # alive, but silent for 60 s of the watcher's clock
    written = (tmp_path / "lease.json").read_bytes()
    frozen.send_signal(signal.SIGCONT)
    assert f"pid {os.getpid()}" in ask(frozen, "write")
    assert (tmp_path / "metrics.jsonl").read_text() == "mine\n"
    assert (tmp_path / "lease.json").read_bytes() == written  # its renewal went into its own, removed file
    winner.check()
    frozen.communicate()


# --- renewing fails ------------------------------------------------------------------------------------------------


def test_a_lease_that_cannot_be_renewed_for_60_s_is_lost(tmp_path, clock, acquire, monkeypatch):
    lease = acquire(renew_every_s=0.001)
    failed = threading.Event()

    def pwrite(*arguments):
        failed.set()
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pwrite", pwrite)
    lease.start_renewing()
    assert failed.wait(60)
    clock.now_s += 59.9
    lease.check()
    clock.now_s += 0.1
    with pytest.raises(LeaseLost, match=r"could not be renewed for 60 s \(.*Input/output error\).*start it again"):
        lease.check()
    lease._thread.join(60)  # and it is not brought back to life
    assert not lease._thread.is_alive()


def test_a_renewal_that_succeeds_in_time_mends_it(tmp_path, clock, acquire):
    lease = acquire()
    for _ in range(3):
        clock.now_s += 59
        lease.renew()
        lease.check()


def test_a_process_that_stood_still_for_60_s_has_lost_the_lease(tmp_path, clock, acquire):
    lease = acquire(renew_every_s=0.001)
    clock.now_s += 60
    lease.start_renewing()
    lease._thread.join(60)
    with pytest.raises(LeaseLost, match="did not run for so long"):
        lease.check()
    assert json.loads((tmp_path / "lease.json").read_text())["renewals"] == 1


def test_check_outlasts_a_file_system_that_stumbles(tmp_path, clock, acquire, monkeypatch):
    lease = acquire()
    read, stumbles = lease_module._read, [OSError(errno.ESTALE, "Stale file handle")] * 3

    def stumbling_read(path):
        if stumbles:
            raise stumbles.pop()
        return read(path)

    monkeypatch.setattr(lease_module, "_read", stumbling_read)
    lease.check()
    stumbles[:] = [OSError(errno.ESTALE, "Stale file handle")] * 1000
    begin_s = clock.now_s
    with pytest.raises(LeaseLost, match="could not be renewed"):
        lease.check()
    assert clock.now_s - begin_s <= DEAD_AFTER_S + POLL_S


# --- the ends ------------------------------------------------------------------------------------------------------


def test_released_is_free(tmp_path, acquire):
    lease = acquire()
    lease.release()
    lease.release()
    assert list(tmp_path.iterdir()) == []
    acquire(sleep=refuse_to_wait).check()


def test_release_leaves_anothers_lease_alone(tmp_path, acquire):
    lease = acquire()
    put(tmp_path, owner())
    lease.release()
    assert holder_of(tmp_path) == owner()


def test_a_directory_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\).*--run.dir"):
        Lease.acquire(tmp_path / "file" / "run", job_id=None, attempt=1)


def test_a_full_disk_leaves_no_lease_behind(tmp_path, monkeypatch):
    def pwrite(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(UserError, match="No space left on device"):
        Lease.acquire(tmp_path, job_id=None, attempt=1)
    assert list(tmp_path.iterdir()) == []
