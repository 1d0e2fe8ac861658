"""Rank and world size from the environment, the rendezvous, and the collectives of a run, on real gloo processes."""

import os
import signal
import socket
import sys
import textwrap

import pytest
import torch

from ddp_asr.config import Distributed
from ddp_asr.errors import UserError
from ddp_asr.ranks.rendezvous import join, place
from ddp_asr.ranks.world import World, no_sync
from tests import tiny_training as tiny

ALONE = World(0, 1, 0, torch.device("cpu"))


# ---- the place -----------------------------------------------------------------------------------------------------


def environment(**changes):
    given = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    return {name: value for name, value in {**given, **changes}.items() if value is not None}


def test_the_place_comes_from_the_environment():
    assert place(environment()) == (1, 4, 1)
    assert place({}) == (0, 1, 0)


@pytest.mark.parametrize(
    "changes, expected",
    [
        (
            {"MASTER_PORT": None},
            r"^MASTER_PORT not set beside RANK/WORLD_SIZE: set all of RANK, .* or start with t",
        ),
        ({"RANK": None}, r"^RANK not set beside"),
        ({"RANK": "one"}, r"^RANK=one, WORLD_SIZE=4, LOCAL_RANK=1 must be whole numbers$"),
        ({"RANK": "4"}, r"^RANK = 4 must lie between 0 and WORLD_SIZE - 1 = 3$"),
    ],
)
def test_a_broken_environment_is_named(changes, expected):
    with pytest.raises(UserError, match=expected):
        place(environment(**changes))


def test_peers_that_do_not_come_are_waited_for_as_long_as_set(monkeypatch):
    variables = environment(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_PORT=str(tiny.free_port()))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"rank 0 could not meet the other 1 rank\(s\) at 127.0.0.1:\d+"):
        join(Distributed(timeout_s=1))


# ---- alone ---------------------------------------------------------------------------------------------------------


def test_alone_every_collective_is_the_identity():
    vector = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert ALONE.sum(vector) is vector and ALONE.any(True) and not ALONE.any(False)
    assert ALONE.gather_objects("mine") == ["mine"]
    assert ALONE.run_on_all(lambda: 7) == ALONE.run_on_rank_zero(lambda: 7) == 7
    model = torch.nn.Linear(1, 1)
    assert ALONE.wrap(model) is model
    with no_sync(model):
        pass
    ALONE.set_phase(1, "reducing")
    ALONE.leave()


def test_alone_a_mistake_is_raised_as_it_is():
    for run in (ALONE.run_on_all, ALONE.run_on_rank_zero):
        with pytest.raises(UserError, match="mine"):
            run(mistaken)
        with pytest.raises(ZeroDivisionError):
            run(lambda: 1 // 0)


def mistaken():
    raise UserError("mine")


# ---- together ------------------------------------------------------------------------------------------------------


def run_on(processes: int, body: str, tmp_path) -> list[str]:
    """Runs a script on so many ranks, each with its `world`; returns what each printed."""
    ranks = start_on(processes, body, tmp_path)
    assert ranks.wait() == [0] * processes, ranks.output
    return [log.read_text() for log in ranks.logs]


def start_on(processes: int, body: str, tmp_path) -> tiny.Ranks:
    file = tmp_path / "script.py"
    head = "from tests.test_world import *\nfrom ddp_asr.ranks.world import *\nfrom ddp_asr.config import *\n"
    file.write_text(f"{head}world = join(Distributed(timeout_s=60))\n{textwrap.dedent(body)}")
    return tiny.start([f"--run.dir={tmp_path}"], processes, [Script(str(file))])


class Script:
    """Runs a file in place of a rank's training."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self) -> None:
        with open(self.path) as file:
            exec(compile(file.read(), self.path, "exec"), {"__name__": "script"})
        sys.exit(0)


def test_collectives_of_three_ranks(tiny_corpus, tmp_path):
    printed = run_on(
        3,
        """
        rank = world.rank
        assert world.sum(torch.tensor([1.0, rank], dtype=torch.float64)).tolist() == [3.0, 3.0]
        assert world.any(rank == 2) and not world.any(False)
        assert world.gather_objects({"rank": rank}) == ([{"rank": 0}, {"rank": 1}, {"rank": 2}] if rank == 0 else None)
        assert world.run_on_rank_zero(lambda: {"made by": rank}) == {"made by": 0}
        assert world.run_on_all(lambda: rank) == rank
        assert world.all_gather_objects(rank) == [0, 1, 2]

        # One rank raises the error and all get it; on the others it is a RaisedElsewhere.
        for run in (world.run_on_all, world.run_on_rank_zero):
            mistaken_rank = 1 if run == world.run_on_all else 0
            try:
                run(lambda: mistaken() if rank == mistaken_rank else None)
            except UserError as error:
                assert str(error) == "mine" and isinstance(error, RaisedElsewhere) == (rank != mistaken_rank)
            else:
                raise AssertionError("not raised")

        model = world.wrap(torch.nn.Linear(1, 1, bias=False))
        with no_sync(model):
            model(torch.tensor([[float(rank)]])).sum().backward()
        assert model.module.weight.grad.item() == rank
        model(torch.tensor([[float(rank)]])).sum().backward()
        assert model.module.weight.grad.item() == 2.0  # twice the mean
        world.leave()
        print("all held")
        """,
        tmp_path,
    )
    assert printed == ["all held\n"] * 3


def test_a_lost_peer_is_one_sentence_on_every_rank_that_waits(tiny_corpus, tmp_path):
    ranks = start_on(
        3,
        """
        world.sum(torch.zeros(1))
        if world.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            while True:
                world.sum(torch.zeros(1))
        except PeerLost as error:
            print(error)
            world.watchdog.announce_exit(str(error))
        """,
        tmp_path,
    )
    assert ranks.wait(limit_s=30) == [0, -signal.SIGKILL, 0]
    for rank in (0, 2):
        text = ranks.logs[rank].read_text()
        assert text.startswith(f"rank {rank} of 3 lost the others (") and text.count("\n") == 1
        assert f"): rank 1 on {socket.gethostname()} was last seen " in text


def test_a_mistake_of_ours_keeps_its_traceback():
    from ddp_asr.ranks.world import naming_lost_peers

    with pytest.raises(RuntimeError, match="shapes"), naming_lost_peers(ALONE):
        raise RuntimeError("shapes cannot be multiplied")


@pytest.mark.slow
def test_a_port_in_use_ends_every_rank(tiny_corpus, tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(tiny, "free_port", lambda: port)
        ranks = tiny.start(tiny_corpus.arguments(tmp_path, "run", "--distributed.timeout_s=60"), 2)
        codes = ranks.wait(limit_s=30)
    assert codes == [2, 2], ranks.output
    for log in ranks.logs:
        text = log.read_text()
        assert text == f"error: 127.0.0.1:{port} is in use by another program: choose another MASTER_PORT\n"
    assert os.listdir(tmp_path) == []
