"""What the loader costs beyond decoding: with 0, 1, 2 ... threads, beside the decoder alone and stock WebDataset.

    floor       the same FLAC bytes, in memory --soundfile--> int16, nothing else, in one thread
    threads N   ddp_asr: index -> plan -> N threads -> collated micro-batches; 0: in the main thread
    pipeline    webdataset: WebDataset -> shuffle -> soundfile -> padded batches of the loader's mean size, 2 processes

All of them decode the same utterances in each round, one after the other, so that a busy machine slows them alike; each
is divided by the floor of its own round, and medians are shown. CPU seconds are those of this process and its children.
Afterwards some more epochs watch the memory of this process.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
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

PIPELINE_PROCESSES = 2


@dataclass(frozen=True)
class Setup:
    """What all of them run on."""

    index: Index
    config: Config
    times: int  # how often the index repeats its shards
    batch_size: int  # of the stock pipeline: the mean of the loader's

    @property
    def seconds(self) -> float:
        return float(self.index.samples.sum()) / SAMPLE_RATE_HZ


def floor(setup: Setup) -> Callable[[], None]:
    """Reads every FLAC into memory; what is returned, and measured, decodes them."""
    import soundfile

    from ddp_asr.data.storage import Shards

    index, shards = setup.index, Shards(setup.index.shards)
    flacs = [
        shards.read(int(index.shard[row]), int(index.offset[row]), int(index.bytes[row])) for row in range(len(index))
    ]

    def decode_all() -> None:
        for flac in flacs:
            soundfile.read(io.BytesIO(flac), dtype="int16")

    return decode_all


def loader(setup: Setup, threads: int, epochs: int = 1) -> Iterator[MicroBatch]:
    """The trainer's own path, masks included."""
    from ddp_asr.data.loader import train_loader
    from ddp_asr.data.plan import Plan
    from ddp_asr.text import make_tokeniser

    config, index = setup.config, setup.index
    config = replace(config, data=replace(config.data, threads=threads))
    plan = Plan(index.samples, index.key_hash, settings=config.batch, speeds=config.augment.speeds)
    tokeniser = make_tokeniser(config.vocabulary)
    return train_loader(index, tokeniser, plan, config, rank=0, world_size=1, epochs=epochs)


def pipeline(setup: Setup) -> Iterator[tuple[Any, ...]]:
    """Stock WebDataset as its documentation has it, with the same decoder, targets and padding."""
    import webdataset

    from ddp_asr.text import make_tokeniser

    tokeniser = make_tokeniser(setup.config.vocabulary)
    dataset = (
        webdataset.WebDataset(list(setup.index.shards) * setup.times, shardshuffle=False, empty_check=False)
        .shuffle(1000)
        .to_tuple("__key__", "flac", "txt")
        .map(partial(_decode, tokeniser))
        .batched(setup.batch_size, collation_fn=_collate)
    )
    return iter(webdataset.WebLoader(dataset, batch_size=None, num_workers=PIPELINE_PROCESSES, prefetch_factor=4))


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


def measure(setup: Setup, rounds: int, threads: Sequence[int]) -> dict[str, list[tuple[float, float]]]:
    """(audio-seconds per CPU-second, audio-seconds per second) of every round of each of them."""
    ways: dict[str, Callable[[], None]] = {"floor": floor(setup)}
    for number in threads:
        ways[f"threads {number}"] = partial(_drain_loader, setup, number)
    ways["pipeline"] = lambda: drain(pipeline(setup))
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            cpu_before, before = cpu_s(), time.perf_counter()
            run()
            if number:  # the first round fills the page cache and imports what is imported late
                cpu, wall = cpu_s() - cpu_before, time.perf_counter() - before
                speeds[name].append((setup.seconds / cpu, setup.seconds / wall))
    return speeds


def _drain_loader(setup: Setup, threads: int) -> None:
    drain(loader(setup, threads))


def cpu_s() -> float:
    """CPU seconds of this process and of all its children that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def memory_mb(setup: Setup, threads: int, epochs: int) -> list[float]:
    """Memory of this process after each epoch."""
    memory: list[float] = []
    for batch in loader(setup, threads, epochs + 1):
        if batch.epoch == len(memory) + 1:  # the first of the next epoch
            lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
            memory.append(int(next(line for line in lines if line.startswith("Pss:")).split()[1]) / 1024)
            if len(memory) == epochs:
                break
    return memory


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


def _setup(arguments: argparse.Namespace) -> Setup:
    """The usable utterances, as many times over as make up the hours, because a short set measures the start."""
    import numpy as np

    from ddp_asr import config
    from ddp_asr.data.index import read_index
    from ddp_asr.data.plan import Plan
    from ddp_asr.data.targets import explain_left_out, fit_targets
    from ddp_asr.text import make_tokeniser

    settings = config.load_config(None, arguments.settings)
    settings = replace(settings, batch=replace(settings.batch, micro_batches=2))
    index = read_index(arguments.shards)
    tokeniser = make_tokeniser(settings.vocabulary)
    targets = fit_targets(index, tokeniser, settings.features.frames, max_seconds=settings.batch.max_seconds)
    if len(targets.usable_rows) < len(index):
        left_out = "; ".join(line.strip() for line in explain_left_out(targets))
        raise UserError(f"the stock pipeline cannot leave out utterances, and these settings would: {left_out}")
    times = max(1, round(arguments.hours / index.hours))
    index = index.take(np.tile(np.arange(len(index)), times))
    plan = Plan(index.samples, index.key_hash, settings=settings.batch, speeds=settings.augment.speeds)
    return Setup(index, settings, times, round(len(index) / (plan.steps_per_epoch * plan.micro_batches)))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loader",
        description="Speed from shards to micro-batches, by number of threads, beside the decoder and WebDataset.",
        epilog="Settings of a run, such as --augment.speeds=0.9,1,1.1, are taken too.\n\nexamples:\n"
        "  python -m benchmarks.loader\n  python -m benchmarks.loader shards/dev-clean --rounds 9 --threads 0 1 2 4",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", nargs="*", type=Path, help="shard directories (default: synthesised, in a minute)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measured rounds (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="numbers to try (default: 0 1 2)"
    )
    parser.add_argument("--hours", type=float, default=8.0, metavar="H", help="audio a round (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=5, metavar="N", help="epochs that memory is watched over")
    parser.add_argument("--json", action="store_true", help="print one object instead of the table")
    arguments, settings = parser.parse_known_args(argv)
    arguments.settings = settings
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    with ExitStack() as stack:
        if not arguments.shards:
            arguments.shards = [_synthesised(Path(stack.enter_context(tempfile.TemporaryDirectory())))]
        setup = _setup(arguments)
        speeds = measure(setup, arguments.rounds, arguments.threads)
        memory = memory_mb(setup, max(arguments.threads), arguments.epochs)
    result: dict[str, Any] = {
        "speeds": {name: _medians(speeds[name], speeds["floor"]) for name in speeds},
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
    print("               audio-seconds per CPU-second   audio-seconds per second")
    for name, speed in result["speeds"].items():
        of_cpu, of_wall = speed["per_cpu_s"], speed["per_s"]
        print(
            f"  {name:12} {of_cpu:9,.0f}   {speed['per_cpu_s_of_floor']:5.2f} of the floor  "
            f"{of_wall:9,.0f}   {speed['per_s_of_floor']:5.2f} of the floor"
        )
    print("  memory of this process after each epoch: " + ", ".join(f"{mb:.0f}" for mb in memory) + " MB")
    return 0


def _medians(own: list[tuple[float, float]], floors: list[tuple[float, float]]) -> dict[str, float]:
    found = {}
    for place, name in enumerate(("per_cpu_s", "per_s")):
        found[name] = statistics.median(speed[place] for speed in own)
        ratios = [speed[place] / of_floor[place] for speed, of_floor in zip(own, floors, strict=True)]
        found[f"{name}_of_floor"] = statistics.median(ratios)
    return found


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
