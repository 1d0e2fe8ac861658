"""What the loader costs beyond decoding: with 0, 1, 2 ... threads, beside the decoder alone, WebDataset and lhotse.

    floor        the same FLAC bytes, in memory --soundfile--> int16, nothing else, in one thread
    threads N    ddp_asr: index -> plan -> N threads -> collated micro-batches; 0: in the main thread
    webdataset   WebDataset -> shuffle -> soundfile -> padded batches of the loader's mean size, 2 processes
    lhotse       Shar -> dynamic buckets -> lhotse's own decoding -> padded batches of batch.max_seconds, 2 processes

All of them decode the same utterances in each round, one after the other, so that a busy machine slows them alike; each
is divided by the floor of its own round, and medians are shown. CPU seconds are those of this process and its children.
Settings that change waveforms (speeds, noise) apply to ddp_asr alone. Afterwards some more epochs watch the memory of
this process.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import speech
from ddp_asr import SAMPLE_RATE_HZ
from ddp_asr.errors import UserError, run_entry_point

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ddp_asr.config import Config
    from ddp_asr.data.index import Index
    from ddp_asr.data.loader import MicroBatch

PROCESSES = 2  # of webdataset and lhotse


@dataclass(frozen=True)
class Setup:
    """What all of them run on."""

    index: Index
    config: Config
    times: int  # how often the index repeats its shards
    batch_size: int  # of webdataset: the mean of the loader's
    directory: Path  # for files of the benchmark

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


def webdataset(setup: Setup) -> Iterator[tuple[Any, ...]]:
    """WebDataset as its documentation has it, with the same decoder, targets and padding."""
    import webdataset as wds

    from ddp_asr.text import make_tokeniser

    tokeniser = make_tokeniser(setup.config.vocabulary)
    dataset = (
        wds.WebDataset(list(setup.index.shards) * setup.times, shardshuffle=False, empty_check=False)
        .shuffle(1000)
        .to_tuple("__key__", "flac", "txt")
        .map(partial(_decode, tokeniser))
        .batched(setup.batch_size, collation_fn=_collate)
    )
    return iter(wds.WebLoader(dataset, batch_size=None, num_workers=PROCESSES, prefetch_factor=4))


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


def lhotse(setup: Setup) -> Iterator[tuple[Any, ...]]:
    """lhotse's Shar as its documentation has it: buckets filled in each of the processes, decoding with collation."""
    from lhotse import CutSet
    from lhotse.dataset import DynamicBucketingSampler
    from lhotse.dataset.iterable_dataset import IterableDatasetWrapper
    from torch.utils.data import DataLoader

    from ddp_asr.text import make_tokeniser

    cuts = CutSet.from_shar(in_dir=_shar(setup), split_for_dataloading=True, shuffle_shards=True).repeat(setup.times)
    batch = setup.config.batch
    buckets = min(batch.buckets, len(setup.index) // setup.times // 8)  # lhotse refuses more buckets than utterances
    sampler = DynamicBucketingSampler(
        cuts, max_duration=batch.max_seconds, num_buckets=max(2, buckets), shuffle=True, rank=0, world_size=1
    )
    dataset = IterableDatasetWrapper(_LhotseBatches(make_tokeniser(setup.config.vocabulary)), sampler)
    return iter(DataLoader(dataset, batch_size=None, num_workers=PROCESSES, prefetch_factor=4))


class _LhotseBatches:
    """What lhotse asks for a batch of its cuts."""

    def __init__(self, tokeniser: Any) -> None:
        self.tokeniser = tokeniser

    def __getitem__(self, cuts: Any) -> tuple[Any, ...]:
        from lhotse.dataset.collation import collate_audio

        waveforms, samples = collate_audio(cuts)
        return waveforms, samples, *_pad([self.tokeniser.encode(cut.supervisions[0].text) for cut in cuts])


def _shar(setup: Setup) -> Path:
    """The utterances in lhotse's format, the same FLAC bytes; written once."""
    from lhotse import Recording, SupervisionSegment
    from lhotse.shar import SharWriter

    from ddp_asr.data.storage import Shards

    index, directory = setup.index, setup.directory / "shar"
    if directory.exists():
        return directory
    directory.mkdir()
    utterances, shards = len(index) // setup.times, Shards(index.shards)
    with SharWriter(directory, fields={"recording": "original"}, shard_size=-(-utterances // 8)) as writer:
        for row in range(utterances):
            flac = shards.read(int(index.shard[row]), int(index.offset[row]), int(index.bytes[row]))
            recording = Recording.from_bytes(flac, index.key(row))
            cut = recording.to_cut()
            cut.supervisions = [
                SupervisionSegment(recording.id, recording.id, 0.0, recording.duration, text=index.text(row))
            ]
            writer.write(cut)
    return directory


def drain(batches: Iterator[Any]) -> None:
    for _ in batches:
        pass


def measure(setup: Setup, rounds: int, threads: Sequence[int]) -> dict[str, list[tuple[float, float]]]:
    """(audio-seconds per CPU-second, audio-seconds per second) of every round of each of them."""
    ways: dict[str, Callable[[], None]] = {"floor": floor(setup)}
    for number in threads:
        ways[f"threads {number}"] = partial(_drain_loader, setup, number)
    ways["webdataset"] = lambda: drain(webdataset(setup))
    if importlib.util.find_spec("lhotse"):
        ways["lhotse"] = lambda: drain(lhotse(setup))
    else:
        print("lhotse is not installed, so it is left out: pip install -e '.[bench]'", file=sys.stderr)
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


def _setup(arguments: argparse.Namespace, directory: Path) -> Setup:
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
        raise UserError(f"webdataset and lhotse cannot leave out utterances, and these settings would: {left_out}")
    times = max(1, round(arguments.hours / index.hours))
    index = index.take(np.tile(np.arange(len(index)), times))
    plan = Plan(index.samples, index.key_hash, settings=settings.batch, speeds=settings.augment.speeds)
    mean_batch = round(len(index) / (plan.steps_per_epoch * plan.micro_batches))
    return Setup(index, settings, times, mean_batch, directory)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loader",
        description="Speed from shards to micro-batches, beside the decoder alone, WebDataset and lhotse.",
        epilog="Settings of a run, such as --augment.speeds=0.9,1,1.1, are taken too.\n\nexamples:\n"
        "  python -m benchmarks.loader\n  python -m benchmarks.loader shards/dev-clean --rounds 9 --threads 0 1 2 4\n"
        "  python -m benchmarks.loader shards/dev-clean --augment.speeds=0.9,1,1.1 --augment.noise.share=0.5",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shards", nargs="*", type=Path, help="shard directories (default: synthesised, in a minute)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="measured rounds (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="numbers to try (default: 0 1 2)"
    )
    parser.add_argument("--hours", type=float, default=8.0, metavar="H", help="audio a round (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=5, metavar="N", help="epochs that memory is watched over")
    parser.add_argument("--small", action="store_true", help="little audio and one round: whether it runs, in seconds")
    parser.add_argument("--json", action="store_true", help="print one object instead of the table")
    arguments, settings = parser.parse_known_args(argv)
    arguments.settings = settings
    if arguments.small:
        arguments.rounds, arguments.hours, arguments.epochs = 1, 0.01, 1
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    # What one rank has on this machine, however it is started. (OpenMP's threads spin when they have nothing to do.)
    os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if not arguments.shards:
            arguments.shards = [speech.synthesised(directory, utterances=40 if arguments.small else 400)]
        setup = _setup(arguments, directory)
        speeds = measure(setup, arguments.rounds, arguments.threads)
        memory = memory_mb(setup, max(arguments.threads), arguments.epochs)
    result: dict[str, Any] = {
        "speeds": {name: _medians(speeds[name], speeds["floor"]) for name in speeds},
        "memory_mb": memory,
        "utterances": len(setup.index),
        "audio_s": setup.seconds,
        "cpu": speech.cpu_model(),
        "omp_num_threads": os.environ["OMP_NUM_THREADS"],
    }
    if arguments.json:
        print(json.dumps(result))
        return 0
    print(
        f"{result['cpu']}, OMP_NUM_THREADS={result['omp_num_threads']}; {len(setup.index):,} utterances, "
        f"{setup.seconds / 3600:.1f} h a round, medians of {arguments.rounds} rounds"
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
