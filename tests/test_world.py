"""Rank and world size from the environment, the rendezvous, and the collectives of a run, on real gloo processes."""

import os
import signal
import socket
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from ddp_asr.config import Distributed
from ddp_asr.errors import UserError
from ddp_asr.ranks import rendezvous
from ddp_asr.ranks.environment import before_nccl, before_torch
from ddp_asr.ranks.rendezvous import choose_device, join, place, refuse_shared_gpus
from ddp_asr.ranks.watchdog import Watchdog
from ddp_asr.ranks.world import PeerLost, World, no_sync
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
    with pytest.raises(UserError, match=r"rank 0 could not meet the other 1 rank at 127.0.0.1:\d+"):
        join(Distributed(timeout_s=1))


@pytest.mark.parametrize(
    "backend, local_rank, gpus, expected",
    [
        ("auto", 3, 0, ("gloo", "cpu")),
        ("gloo", 3, 0, ("gloo", "cpu")),
        ("auto", 3, 8, ("nccl", "cuda:3")),
        ("nccl", 3, 8, ("nccl", "cuda:3")),
        ("auto", 3, 1, ("nccl", "cuda:0")),  # srun --gpus-per-task=1
        ("gloo", 3, 1, ("gloo", "cuda:0")),
        ("gloo", 3, 2, ("gloo", "cuda:1")),
    ],
)
def test_backend_and_device_of_a_rank(backend, local_rank, gpus, expected):
    chosen, device = choose_device(backend, local_rank, gpus)
    assert (chosen, str(device)) == expected


def test_gpus_that_do_not_suffice_are_refused():
    with pytest.raises(UserError, match=r"^distributed.backend = nccl needs an NVIDIA GPU, and this host has none"):
        choose_device("nccl", 0, 0)
    with pytest.raises(UserError, match=r"^LOCAL_RANK = 2, but this host has 2 GPUs: start at most that many "):
        choose_device("auto", 2, 2)


def test_two_ranks_on_one_gpu_are_refused_under_nccl():
    refuse_shared_gpus(["a of one", "b of one", "a of two"])
    with pytest.raises(UserError, match=r"^ranks 1 and 3 have the same GPU \(b of one\), and NCCL needs one"):
        refuse_shared_gpus(["a of one", "b of one", "a of two", "b of one"])


def test_what_torch_reads_is_set_unless_the_user_has():
    environment = {}
    before_torch(environment)
    assert environment == {"TORCH_CPP_LOG_LEVEL": "ERROR", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        environment = {name: "max_split_size_mb:64", "TORCH_CPP_LOG_LEVEL": "INFO"}
        before_torch(environment)
        assert environment == {name: "max_split_size_mb:64", "TORCH_CPP_LOG_LEVEL": "INFO"}


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, "2"),
        ({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1", "TORCHELASTIC_RUN_ID": "x"}, "2"),  # torchrun's default
        ({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "3", "TORCHELASTIC_RUN_ID": "x"}, "3"),
        ({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}, "1"),
        ({"NCCL_ASYNC_ERROR_HANDLING": "0"}, None),
    ],
)
def test_nccl_leaves_the_process_alive_unless_the_user_wants_otherwise(given, expected):
    environment = dict(given)
    before_nccl(environment)
    assert environment.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") == expected


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


# ---- as under NCCL, with a stand-in for it -------------------------------------------------------------------------


def test_nccl_connects_the_ranks_gpu_at_once_in_a_phase_of_its_own(monkeypatch):
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "")
    made, seen = [], {}
    monkeypatch.setattr(rendezvous, "_connect", lambda *_: dist.TCPStore("127.0.0.1", tiny.free_port(), is_master=True))
    monkeypatch.setattr(rendezvous, "Watchdog", lambda *given: made.append(Watchdog(*given)) or made[0])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="4711"))

    def init_process_group(backend, *, device_id, timeout, **_):
        seen.update(made[0]._own_post()._asdict(), backend=backend, device_id=device_id, timeout=timeout)

    monkeypatch.setattr(dist, "init_process_group", init_process_group)
    device = torch.device("cuda", 3)
    rendezvous._join_group(0, 1, "nccl", device, timeout_s=60.0).close()
    assert (seen["backend"], seen["device_id"], seen["timeout"].total_seconds()) == ("nccl", device, 120.0)
    assert seen["phase"] == "connecting nccl on cuda:3" and not made[0]._here.waiting
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "2"


def of_two(backend="nccl"):
    """A rank of two whose collectives are stand-ins, on the CPU in any case."""
    watchdog = Watchdog(0, 2, timeout_s=60.0)
    watchdog.name_lost_rank = lambda reason: f"lost the others ({reason})"
    return World(0, 2, 0, torch.device("cpu"), watchdog, backend)


class StandInWork:
    def __init__(self, error=None):
        self.error, self.waited_s = error, None

    def wait(self, timeout=None):
        self.waited_s = timeout and timeout.total_seconds()
        if self.error:
            raise self.error
        return True


def all_reduce_that(changes, work, monkeypatch):
    def all_reduce(tensor, async_op):
        assert async_op
        changes(tensor)
        return work

    monkeypatch.setattr(dist, "all_reduce", all_reduce)


def test_a_sum_waits_on_the_host_for_longer_than_the_watchdog(monkeypatch):
    work = StandInWork()
    all_reduce_that(lambda tensor: tensor.mul_(2), work, monkeypatch)
    assert of_two().sum(torch.tensor([1.0, 3.0])).tolist() == [2.0, 6.0]
    assert work.waited_s == 120.0  # without a time-out NCCL's `wait` returns at once


@pytest.mark.parametrize(
    "changes, error",
    [
        (lambda tensor: None, None),  # aborted before it began, and torch has not noticed
        (lambda tensor: tensor[:-1].mul_(2), None),  # aborted half-way
        (lambda tensor: tensor.mul_(2), dist.DistBackendError("NCCL communicator was aborted on rank 0")),
    ],
)
def test_the_sum_of_an_aborted_all_reduce_is_not_used(changes, error, monkeypatch):
    all_reduce_that(changes, StandInWork(error), monkeypatch)
    with pytest.raises(PeerLost, match=r"^lost the others \((NCCL communicator was|nccl ended an all-reduce before)"):
        of_two().sum(torch.tensor([1.0, 3.0]))


class Noting(torch.autograd.Function):
    """The identity, which notes in its backward pass where the rank is."""

    @staticmethod
    def forward(context, x, note):
        context.note = note
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        context.note("computing")
        return gradient, None


def places_of_a_backward_pass(world):
    """What the rank does in turn, and where it is meanwhile."""
    first, second, seen = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), []

    def note(what):
        here = world.watchdog._here
        seen.append((what, here.phase, here.waiting))

    world.set_phase(1, "backward")
    for _ in range(2):  # it leaves no hook behind
        with world.reducing_gradients(torch.nn.Sequential(first, second)):
            second(Noting.apply(first(torch.ones(1, 2)), note)).sum().backward()
            note("ended on the host")
        note("all done")
        world.set_phase(1, "backward")
    assert seen[:3] == seen[3:]
    return seen[:3]


def test_a_rank_waits_for_the_others_from_its_last_gradient_on():
    seen = places_of_a_backward_pass(of_two("gloo"))
    reducing = ("reducing the gradients", True)
    assert seen == [("computing", "backward", False), ("ended on the host", *reducing), ("all done", *reducing)]


def test_ddp_leaves_lengths_on_the_host(monkeypatch):
    given = {}
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", lambda model, **options: given.update(options))
    of_two("nccl").wrap(torch.nn.Linear(1, 1))
    assert given == {"gradient_as_bucket_view": True}  # with `device_ids` it sends every argument to the GPU


def test_a_gpu_that_still_computes_does_not_wait_for_the_others(monkeypatch):
    world, calls = of_two("nccl"), []

    class StandInEvent:
        def record(self):
            calls.append(("record", world.watchdog._here.waiting))

        def synchronize(self):
            calls.append(("synchronize", world.watchdog._here.waiting))

    monkeypatch.setattr(torch.cuda, "Event", StandInEvent)
    seen = places_of_a_backward_pass(world)
    assert calls == 2 * [("record", False), ("synchronize", False)]
    assert seen[1] == ("ended on the host", "backward", False)
    assert seen[2] == ("all done", "reducing the gradients", True)


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
        with world.reducing_gradients(model):
            model(torch.tensor([[1.0]])).sum().backward()
        assert model.module.weight.grad.item() == 3.0 and world.watchdog._here.waiting
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
