"""What the number of processes W does to a training: balance, padding, compute and all-reduce, from 1 to 1,024.

    lengths like LibriSpeech-960's --Plan--> balance and padding at each W (exact, from the real plan)
    a few steps here with W = 1, 2 ... --> seconds per second of computed audio, of an update, of all-reduces
                                       --> the same steps measured, beside those that the model gives
    both --> seconds of a step, speech a second, time to the same number of steps, for each W (modelled)

    step = audio of the slowest rank x seconds per second of audio + update + all-reduce
    all-reduce = 2 (W - 1) latency + 2 (W - 1) / W x bytes / bandwidth        (a ring; both from all-reduces measured)

Strong scaling: the same training, K micro-batches a step for any W up to K. Weak scaling: as many micro-batches on each
rank for any W, so that a step grows with W. The model lets the all-reduce overlap with nothing, although DDP overlaps
it with the last micro-batch's backward pass, and every link is as fast as the measured one.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import speech
from ddp_asr import SAMPLE_RATE_HZ
from ddp_asr.errors import run_entry_point

if TYPE_CHECKING:
    import numpy as np

    from ddp_asr.config import Config

WORLD_SIZES = [2**power for power in range(11)]
SMALL_BYTES, LARGE_BYTES = 4 << 10, 64 << 20  # the all-reduces that latency and bandwidth come from
# A network of which a process trains 100 seconds of speech a second on a CPU core, so that steps can be measured.
NETWORK = {
    "features.mel_bands": 64,
    "encoder.conv_channels": 16,
    "encoder.residual_blocks": 1,
    "encoder.rnn_layers": 2,
    "encoder.rnn_size": 192,
}
SMALL_NETWORK = NETWORK | {"encoder.conv_channels": 4, "encoder.rnn_layers": 1, "encoder.rnn_size": 32}


@dataclass(frozen=True)
class Pieces:
    """What a machine needs for the parts of a step, measured."""

    per_audio_s: float  # seconds that a process computes for a second of audio, padding included
    update_s: float
    gradient_bytes: int
    latency_s: float  # of a message between two ranks
    bytes_per_s: float  # between two ranks

    def all_reduce_s(self, world_size: int) -> float:
        ring = 2 * (world_size - 1)
        return ring * self.latency_s + ring / world_size * self.gradient_bytes / self.bytes_per_s


# measured


def measure(config: Config, precision: str, steps: int) -> dict[str, Any] | None:
    """Runs some steps as one of the ranks of torchrun; rank 0 returns medians over them."""
    import torch

    from benchmarks.step import STEPS, make_learner
    from ddp_asr.config import Distributed
    from ddp_asr.data.corpus import read_corpus
    from ddp_asr.data.loader import on_device, train_loader
    from ddp_asr.data.plan import micro_batches_of_rank
    from ddp_asr.ranks.rendezvous import join

    world = join(Distributed(timeout_s=300))
    corpus, learner = read_corpus(config), make_learner(config, precision, world)
    own = micro_batches_of_rank(config.batch.micro_batches, world.rank, world.world_size)
    loader = train_loader(
        corpus.index, corpus.tokeniser, corpus.plan, config, rank=world.rank, world_size=world.world_size
    )
    batches, taken = on_device(loader, world.device), []
    for step in range(1, steps + 2):  # the first one warms up
        batch = [next(batches) for _ in own]
        world.any(False)  # all ranks start together
        started_s = time.perf_counter()
        for number, micro_batch in enumerate(batch, start=1):
            learner.accumulate(micro_batch, step=step, last=number == len(batch))
        samples = [
            sum(micro_batch.audio_samples for micro_batch in batch),
            sum(micro_batch.waveforms.numel() for micro_batch in batch),
            sum(micro_batch.utterances for micro_batch in batch),
        ]
        computed_s = time.perf_counter() - started_s
        totals = world.sum(torch.tensor(samples, dtype=torch.float64)).tolist()
        update_from_s = time.perf_counter()
        learner.update(step, STEPS, totals[2])  # returns when the device is done: it reads the norm
        ended_s = time.perf_counter()
        if step > 1:
            taken.append(
                {
                    "step_s": ended_s - started_s,
                    "update_s": ended_s - update_from_s,
                    "audio_s": totals[0] / SAMPLE_RATE_HZ,
                    "slowest_audio_s": max(world.all_gather_objects(samples[1])) / SAMPLE_RATE_HZ,
                    "per_audio_s": computed_s / (samples[1] / SAMPLE_RATE_HZ),
                }
            )
    batches.close()
    result: dict[str, Any] = {name: statistics.median(step[name] for step in taken) for name in taken[0]}
    result["gradient_bytes"] = sum(4 * p.numel() for p in learner.plain_model.parameters())
    result["all_reduce_s"] = {size: world.all_reduce_s(size, 10) for size in (SMALL_BYTES, LARGE_BYTES)}
    result["gradients_s"] = world.all_reduce_s(result["gradient_bytes"], 5)
    result["device"] = str(world.device)
    world.leave()
    return result if world.rank == 0 else None


def measured(arguments: argparse.Namespace, world_size: int, micro_batches: int) -> dict[str, Any]:
    """The measurement by so many processes of this machine."""
    threads = max(1, len(os.sched_getaffinity(0)) // max(arguments.measure))  # the same for any number of processes
    command = [
        *(sys.executable, "-m", "ddp_asr.ranks.torchrun", "--standalone", f"--nproc-per-node={world_size}"),
        *("-m", "benchmarks.scaling", "--as-rank", "--steps", str(arguments.steps), *map(str, arguments.shards)),
        *(
            [f"--precision={arguments.precision}", "--small"]
            if arguments.small
            else [f"--precision={arguments.precision}"]
        ),
        *(*arguments.settings, f"--batch.micro_batches={micro_batches}"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(threads)}
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    found: dict[str, Any] = json.loads(answer.stdout.strip().splitlines()[-1])
    return found


def pieces(alone: dict[str, Any], many: dict[str, Any] | None, world_size: int) -> Pieces:
    """From the steps of one process, and the all-reduces of several; without these an all-reduce takes no time."""
    latency_s, bytes_per_s = 0.0, float("inf")
    if many is not None:
        small_s, large_s = (many["all_reduce_s"][str(size)] for size in (SMALL_BYTES, LARGE_BYTES))
        ring = 2 * (world_size - 1)
        latency_s = small_s / ring
        bytes_per_s = ring / world_size * LARGE_BYTES / max(large_s - small_s, 1e-9)
    return Pieces(alone["per_audio_s"], alone["update_s"], alone["gradient_bytes"], latency_s, bytes_per_s)


# modelled


def curve(config: Config, of: Pieces, samples: np.ndarray, key_hash: np.ndarray, weak: int) -> list[dict[str, Any]]:
    """A row for each W: K fixed where `weak` is 0, else `weak` micro-batches on each rank."""
    from ddp_asr.data.plan import Plan, fits

    usable = fits(samples, config.batch.max_seconds, config.augment.speeds)
    rows = []
    for world_size in WORLD_SIZES:
        micro_batches = weak * world_size or config.batch.micro_batches
        if world_size > micro_batches or len(samples[usable]) < 4 * micro_batches:
            break
        settings = replace(config.batch, micro_batches=micro_batches)
        plan = Plan(samples[usable], key_hash[usable], settings=settings, speeds=config.augment.speeds)
        epoch = plan.epoch(0)
        audio_s = float(epoch.samples.sum()) / SAMPLE_RATE_HZ / plan.steps_per_epoch
        balance = epoch.balance(world_size)
        compute_s = audio_s / (1 - epoch.padding) / world_size / balance * of.per_audio_s
        all_reduce_s = of.all_reduce_s(world_size)
        step_s = compute_s + of.update_s + all_reduce_s
        rows.append(
            {
                "world_size": world_size,
                "micro_batches": micro_batches,
                "steps_per_epoch": plan.steps_per_epoch,
                "padding": epoch.padding,
                "balance": balance,
                "compute_s": compute_s,
                "all_reduce_s": all_reduce_s,
                "step_s": step_s,
                "audio_s_per_s": audio_s / step_s,
            }
        )
    for row in rows:
        row["efficiency"] = row["audio_s_per_s"] / rows[0]["audio_s_per_s"] / row["world_size"]
    return rows


# the command


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description="Balance, padding, compute and all-reduce of a training by 1 to 1,024 processes: what is measured "
        "here, and what a model makes of it.",
        epilog="Settings of a run, such as --encoder.rnn_size=512, are taken too.\n\nexamples:\n"
        "  python -m benchmarks.scaling --plot scaling.png\n"
        "  python -m benchmarks.scaling shards/train-clean-100 --measure 1 2 4 8 --encoder.rnn_size=512\n"
        "  python -m benchmarks.scaling --small",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("shards", nargs="*", type=Path, help="shard directories to measure steps on (default: synthesised speech)")
    add("--measure", type=int, nargs="+", default=[1, 2], metavar="W", help="processes to measure (default: 1 2)")
    add("--steps", type=int, default=3, metavar="N", help="measured steps, after one to warm up (default: 3)")
    add("--weak", type=int, default=4, metavar="N", help="micro-batches of a rank in weak scaling (default: 4)")
    add("--same-steps", type=int, default=100_000, metavar="N", help="steps of the time to so many (default: 100,000)")
    add("--precision", default="fp32", choices=("fp32", "bf16", "tf32", "fp16"), help="(default: fp32)")
    add("--plot", type=Path, metavar="FILE", help="draw speech a second by processes")
    add("--small", action="store_true", help="a tiny network and few utterances: whether it runs, in seconds")
    add("--json", action="store_true", help="print one object instead of the tables")
    add("--as-rank", action="store_true", help=argparse.SUPPRESS)  # one of the processes that are measured
    arguments, settings = parser.parse_known_args(argv)
    arguments.settings = settings
    return arguments


def _config(arguments: argparse.Namespace) -> Config:
    from ddp_asr.config import load_config

    small = arguments.small
    chosen = {"batch.max_seconds": 40, "batch.micro_batches": 4 if small else 32, "augment.frequency_mask_bands": 10}
    chosen |= SMALL_NETWORK if small else NETWORK
    config = load_config(None, [f"--{name}={value}" for name, value in chosen.items()] + arguments.settings)
    shards = [str(path) for path in arguments.shards]
    return replace(config, data=replace(config.data, train=shards, threads=0))


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    config = _config(arguments)
    if arguments.as_rank:
        found = measure(config, arguments.precision, arguments.steps)
        if found is not None:
            print(json.dumps(found), flush=True)
        return 0
    from benchmarks.plan import LIBRISPEECH_960_UTTERANCES, librispeech_like

    with ExitStack() as stack:
        if not arguments.shards:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            arguments.shards = [speech.synthesised(directory, utterances=40 if arguments.small else 400)]
        points = {
            kind: {
                w: measured(arguments, w, arguments.weak * w if kind == "weak" else config.batch.micro_batches)
                for w in arguments.measure
            }
            for kind in ("strong", "weak")
        }
    most = max(arguments.measure)
    of = pieces(points["weak"][min(arguments.measure)], points["weak"][most] if most > 1 else None, most)
    for points_of_kind in points.values():
        for world_size, point in points_of_kind.items():
            point["modelled_gradients_s"] = of.all_reduce_s(world_size)
            point["modelled_s"] = (
                of.per_audio_s * point["slowest_audio_s"] + of.update_s + point["modelled_gradients_s"]
            )
    lengths = librispeech_like(2_000 if arguments.small else LIBRISPEECH_960_UTTERANCES)
    result = {
        "cpu": speech.cpu_model(),
        "pieces": vars(of),
        "measured": points,
        "strong": curve(config, of, *lengths, weak=0),
        "weak": curve(config, of, *lengths, weak=arguments.weak),
    }
    if arguments.plot:
        _draw(arguments.plot, result)
    print(json.dumps(result) if arguments.json else _tables(result, arguments.same_steps))
    return 0


def _tables(result: dict[str, Any], same_steps: int) -> str:
    of = result["pieces"]
    lines = [
        f"{result['cpu']}; measured pieces: {of['per_audio_s'] * 1e3:.2f} ms for a second of audio, an update of "
        f"{of['update_s'] * 1e3:.0f} ms, {of['gradient_bytes'] / 2**20:.1f} MiB of gradients, "
        f"{of['latency_s'] * 1e6:.0f} us and {of['bytes_per_s'] / 1e9:.2f} GB/s between two ranks"
    ]
    for kind, text in (("strong", "the same training for any W"), ("weak", "as many micro-batches on each rank")):
        lines += [
            f"{kind} scaling: {text}",
            "           steps an    from the plan         modelled, seconds            modelled          days to "
            f"{same_steps:,}",
            "     W     K  epoch  padding  balance   compute  all-reduce    step   audio-s/s  efficiency   steps",
        ]
        for row in result[kind]:
            lines.append(
                f"{row['world_size']:6,} {row['micro_batches']:5,} {row['steps_per_epoch']:6,}  {row['padding']:7.1%}  "
                f"{row['balance']:7.3f} {row['compute_s']:9.3f}  {row['all_reduce_s']:10.3f} {row['step_s']:7.3f} "
                f"{row['audio_s_per_s']:11,.0f} {row['efficiency']:11.2f} {row['step_s'] * same_steps / 86_400:7.1f}"
            )
        for world_size, point in result["measured"][kind].items():
            lines.append(
                f"  measured on the shards, W = {world_size}: a step of {point['audio_s']:.0f} s of speech takes "
                f"{point['step_s']:.2f} s (modelled {point['modelled_s']:.2f}), "
                f"{point['audio_s'] / point['step_s']:,.0f} audio-s/s; all-reduce of the gradients "
                f"{point['gradients_s'] * 1e3:.1f} ms (modelled {point['modelled_gradients_s'] * 1e3:.1f})"
            )
    return "\n".join(lines)


def _draw(path: Path, result: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for kind, color in (("weak", "tab:blue"), ("strong", "tab:orange")):
        rows, points = result[kind], result["measured"][kind]
        speeds = [row["audio_s_per_s"] for row in rows]
        axis.plot([row["world_size"] for row in rows], speeds, color=color, label=f"{kind}, modelled")
        axis.plot(
            [int(world_size) for world_size in points],
            [point["audio_s"] / point["step_s"] for point in points.values()],
            "o",
            color=color,
            label=f"{kind}, measured",
        )
    ideal = result["weak"][0]["audio_s_per_s"]
    sizes = [row["world_size"] for row in result["weak"]]
    axis.plot(
        sizes, [ideal * size for size in sizes], color="grey", linewidth=0.8, linestyle=":", label="W times W = 1"
    )
    axis.set(xscale="log", yscale="log", xlabel="processes W", ylabel="seconds of speech a second")
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
