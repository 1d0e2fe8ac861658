"""How much of a CPU second the loader spends on anything but decoding, beside stock WebDataset and the floor.

    floor     the same FLAC bytes, in memory --soundfile--> int16, nothing else, in as many processes
    loader    ddp_asr: index -> plan -> DataLoader workers -> collated micro-batches in this process
    pipeline  webdataset: WebDataset -> shuffle -> soundfile -> padded batches of the loader's mean size

All three decode the same utterances in each round, in as many processes (two threads of one core slow each other), one
after the other, so that a busy machine slows them alike. CPU seconds are those of this process and its children.
Afterwards some epochs more watch the memory of this process and its workers.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddp_asr import SAMPLE_RATE_HZ
from ddp_asr.errors import UserError, run_entry_point

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ddp_asr.config import Config
    from ddp_asr.data.index import Index
    from ddp_asr.data.loader import MicroBatch


@dataclass(frozen=True)
class Setup:
    """What all three run on."""

    index: Index
    config: Config
    times: int  # how often the index repeats its shards
    batch_size: int  # of the stock pipeline: the mean of the loader's

    @property
    def seconds(self) -> float:
        return float(self.index.samples.sum()) / SAMPLE_RATE_HZ


def floor(setup: Setup) -> Callable[[], None]:
    """Reads every FLAC into memory; what is returned, and measured, decodes them in `data.workers` processes."""
    import soundfile

    index, flacs = setup.index, []
    for number, path in enumerate(index.shards):
        with open(path, "rb") as shard:
            for row in (index.shard == number).nonzero()[0]:
                shard.seek(index.offset[row])
                flacs.append(shard.read(index.bytes[row]))

    def decode(part: Sequence[bytes]) -> None:
        for flac in part:
            soundfile.read(io.BytesIO(flac), dtype="int16")

    def decode_all() -> None:
        fork, processes = multiprocessing.get_context("fork"), max(1, setup.config.data.workers)
        children = [fork.Process(target=decode, args=(flacs[part::processes],)) for part in range(processes)]
        for child in children:
            child.start()
        for child in children:
            child.join()

    return decode_all


def loader(setup: Setup, epochs: int = 1) -> Iterator[MicroBatch]:
    """The trainer's own path, masks included."""
    from ddp_asr.data.loader import train_loader
    from ddp_asr.data.plan import Plan
    from ddp_asr.features.masks import draw
    from ddp_asr.text import make_tokeniser

    config, index = setup.config, setup.index
    plan = Plan(index.samples, index.key_hash, settings=config.batch)
    tokeniser = make_tokeniser(config.vocabulary)
    return train_loader(index, tokeniser, plan, draw, config, rank=0, world_size=1, epochs=epochs)


def pipeline(setup: Setup) -> Iterator[tuple[Any, ...]]:
    """Stock WebDataset as its documentation has it, with the same decoder, targets and padding."""
    import webdataset

    from ddp_asr.text import make_tokeniser

    tokeniser = make_tokeniser(setup.config.vocabulary)
    shards = [str(path) for path in setup.index.shards] * setup.times
    dataset = (
        webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)
        .shuffle(1000)
        .to_tuple("__key__", "flac", "txt")
        .map(partial(_decode, tokeniser))
        .batched(setup.batch_size, collation_fn=_collate)
    )
    data = setup.config.data
    prefetch = data.prefetch if data.workers else None
    return iter(webdataset.WebLoader(dataset, batch_size=None, num_workers=data.workers, prefetch_factor=prefetch))


def _decode(tokeniser: Any, sample: tuple[str, bytes, bytes]) -> tuple[str, np.ndarray, np.ndarray]:
    import soundfile

    key, flac, text = sample
    return key, soundfile.read(io.BytesIO(flac), dtype="int16")[0], tokeniser.encode(text.decode())


def _collate(samples: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> tuple[Any, ...]:
    keys, waveforms, targets = zip(*samples, strict=True)
    return list(keys), *_pad(waveforms), *_pad(targets)


def _pad(arrays: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    import numpy as np
    import torch

    lengths = np.array([len(array) for array in arrays])
    padded = np.zeros((len(arrays), lengths.max()), arrays[0].dtype)
    for array, into in zip(arrays, padded, strict=True):
        into[: len(array)] = array
    return torch.from_numpy(padded), torch.from_numpy(lengths)


def drain(batches: Iterator[Any]) -> None:
    for _ in batches:
        pass


def cpu_s() -> float:
    """CPU seconds of this process and of all its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(setup: Setup, rounds: int) -> dict[str, list[float]]:
    """Audio-seconds per CPU-second of every round of each of the three."""
    ways = {
        "floor": floor(setup),
        "loader": lambda: drain(loader(setup)),
        "pipeline": lambda: drain(pipeline(setup)),
    }
    speeds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            before = cpu_s()
            run()
            if number:  # the first round fills the page cache and imports what is imported late
                speeds[name].append(setup.seconds / (cpu_s() - before))
    return speeds


def memory_mb(setup: Setup, epochs: int) -> list[float]:
    """Memory of this process and its workers after each epoch, shared pages counted once."""
    memory: list[float] = []
    for batch in loader(setup, epochs + 1):
        if batch.epoch == len(memory) + 1:  # the first of the next epoch
            memory.append(_family_mb())
            if len(memory) == epochs:
                break
    return memory


def _family_mb() -> float:
    """Proportional set size of this process and its children, in MB."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return sum(_pss_kb(pid) for pid in ["self", *children]) / 1024


def _pss_kb(pid: str) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Pss:")).split()[1])


# the command


def _synthesised(directory: Path) -> Path:
    """Shards of a synthesised corpus, many small ones: the stock pipeline deals out whole shards to its workers."""
    corpus, shards = directory / "corpus", directory / "shards"
    for command in (
        ["synthetic_speech", "--out", str(corpus), "--train-utterances", "400", "--test-utterances", "1"],
        ["ddp_asr.shard", str(corpus / "train"), "--out", str(shards), "--shard-mb", "2"],
    ):
        subprocess.run([sys.executable, "-m", *command], check=True, stdout=sys.stderr)
    return shards


def _setup(directories: Sequence[Path], workers: int, hours: float) -> Setup:
    """The usable utterances, as many times over as make up the hours: short sets measure the start of processes."""
    import numpy as np

    from ddp_asr import config
    from ddp_asr.data.index import read_index
    from ddp_asr.data.plan import Plan
    from ddp_asr.data.targets import fit_targets
    from ddp_asr.text import make_tokeniser

    settings = config.Config(data=config.Data(workers=workers), batch=config.Batch(micro_batches=2))
    index = read_index(directories)
    tokeniser = make_tokeniser(settings.vocabulary)
    targets = fit_targets(index, tokeniser, settings.features.frames, max_seconds=settings.batch.max_seconds)
    if len(targets.usable_rows) < len(index):
        raise UserError(f"the stock pipeline cannot leave out the utterances that do not fit: {targets.counts()}")
    times = max(1, round(hours / index.hours))
    index = index.take(np.tile(np.arange(len(index)), times))
    plan = Plan(index.samples, index.key_hash, settings=settings.batch)
    return Setup(index, settings, times, round(len(index) / (plan.steps_per_epoch * plan.micro_batches)))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loader",
        description="Audio-seconds per CPU-second, from shards to micro-batches: ddp_asr, stock webdataset, the floor.",
        epilog="examples:\n  python -m benchmarks.loader\n  python -m benchmarks.loader shards/dev-clean --rounds 9",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", nargs="*", type=Path, help="shard directories (default: synthesised, in a minute)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measured rounds (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="loader processes (default: %(default)s)")
    parser.add_argument("--hours", type=float, default=8.0, metavar="H", help="audio a round (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=5, metavar="N", help="epochs that memory is watched over")
    parser.add_argument("--json", action="store_true", help="print one object instead of the table")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    with ExitStack() as stack:
        if not arguments.shards:
            arguments.shards = [_synthesised(Path(stack.enter_context(tempfile.TemporaryDirectory())))]
        setup = _setup(arguments.shards, arguments.workers, arguments.hours)
        speeds = measure(setup, arguments.rounds)
        memory = memory_mb(setup, arguments.epochs)
    # Each round's own ratio, because what slows the machine slows the round's three alike.
    shares = {
        name: statistics.median(own / of_floor for own, of_floor in zip(speeds[name], speeds["floor"], strict=True))
        for name in speeds
    }
    result: dict[str, Any] = {
        "audio_s_per_cpu_s": {name: statistics.median(speeds[name]) for name in speeds},
        "share_of_floor": shares,
        "memory_mb": memory,
        "utterances": len(setup.index),
        "audio_s": setup.seconds,
    }
    if arguments.json:
        print(json.dumps(result))
        return 0
    print(
        f"{len(setup.index):,} utterances, {setup.seconds / 3600:.1f} h a round, medians of {arguments.rounds} rounds"
    )
    for name, speed in result["audio_s_per_cpu_s"].items():
        print(f"  {name:9} {speed:7,.0f} audio-seconds per CPU-second   {shares[name]:5.2f} of the floor")
    print(
        "  memory of this process and its workers, after each epoch: " + ", ".join(f"{mb:.0f}" for mb in memory) + " MB"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
