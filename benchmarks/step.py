"""A training step beside the one of AssemblyAI's tutorial: how much speech each trains on in a second.

    shards --soundfile--> the same utterances --> the tutorial's steps: 20 random ones, padded to the longest
                                              --> ours: what the plan makes of them, by the trainer's own learner

The tutorial is "Building an End-to-End Speech Recognition Model in PyTorch" (Michael Nguyen, AssemblyAI, 2020), written
out here from its description: residual CNN and BiGRU of 23,705,373 parameters, mel spectrogram and masks of each
utterance by torchaudio, padded batches, CTC loss, AdamW, one-cycle learning rate. One thing is mended: all its GRUs run
over time (in the tutorial all but the first run over the batch). Ours is the same network at the same size.

Speech is counted without padding. Reading and decoding are left out of both; the features are in both. The ways run one
step each in every round, one after the other, so that a busy machine slows them alike. Shares of the peak are floating
point operations of the network without padding, over those of a large matrix product that is measured in each round.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import speech
from ddp_asr import SAMPLE_RATE_HZ
from ddp_asr.errors import run_entry_point

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ddp_asr.config import Config
    from ddp_asr.data.index import Index
    from ddp_asr.ranks.world import World
    from ddp_asr.training.learner import Learner

TUTORIAL_BATCH = 20  # utterances
STEPS = 10_000  # of the learning rates' cycles, of which a benchmark sees the first few
EPOCHS = 50
GEMM_SIZE = 2048


@dataclass(frozen=True)
class Sizes:
    """Of both networks; the defaults are the tutorial's."""

    channels: int = 32
    blocks: int = 3
    layers: int = 5
    hidden: int = 512
    bands: int = 128


SMALL = Sizes(channels=4, blocks=1, layers=2, hidden=32, bands=32)


@dataclass
class Way:
    """One of those that are compared."""

    name: str
    draw: Callable[[], tuple[Any, float]]  # a step's batch and its seconds of speech
    train: Callable[[Any], None]
    precision: str
    model: nn.Module
    speeds: list[dict[str, float]] = field(default_factory=list)  # of each round


# the tutorial


def tutorial_model(sizes: Sizes, classes: int) -> nn.Module:
    """(B, 1, F, T) -> logits (B, T', V)."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        """LayerNorm over the bands, GELU, dropout, convolution, twice, around a residual connection."""

        def __init__(self, channels: int, bands: int) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(bands) for _ in range(2))
            self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))
            self.dropouts = nn.ModuleList(nn.Dropout(0.1) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            residual = x
            for norm, conv, dropout in zip(self.norms, self.convs, self.dropouts, strict=True):
                normed = norm(x.transpose(2, 3).contiguous()).transpose(2, 3).contiguous()
                x = conv(dropout(functional.gelu(normed)))
            return x + residual

    class Recurrent(nn.Module):
        """LayerNorm, GELU, bidirectional GRU, dropout."""

        def __init__(self, input_size: int, hidden: int) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(input_size)
            self.gru = nn.GRU(input_size, hidden, batch_first=True, bidirectional=True)
            self.dropout = nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            return self.dropout(self.gru(functional.gelu(self.norm(x)))[0])

    class Tutorial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            hidden, bands = sizes.hidden, sizes.bands // 2
            self.strided = nn.Conv2d(1, sizes.channels, 3, stride=2, padding=1)
            self.blocks = nn.Sequential(*(Block(sizes.channels, bands) for _ in range(sizes.blocks)))
            self.bridge = nn.Linear(sizes.channels * bands, hidden)
            self.recurrent = nn.Sequential(
                *(Recurrent(2 * hidden if layer else hidden, hidden) for layer in range(sizes.layers))
            )
            self.classifier = nn.Sequential(
                nn.Linear(2 * hidden, hidden), nn.GELU(), nn.Dropout(0.1), nn.Linear(hidden, classes)
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks(self.strided(x))  # (B, C, F / 2, T')
            x = self.bridge(x.flatten(1, 2).transpose(1, 2))  # (B, T', H)
            logits: Tensor = self.classifier(self.recurrent(x))
            return logits

    torch.manual_seed(0)
    return Tutorial()


def tutorial(index: Index, config: Config, sizes: Sizes, precision: str, utterances: int = TUTORIAL_BATCH) -> Way:
    """Its collation and its step, in float32 as there, or under autocast."""
    import torch
    import torchaudio
    from torch import nn

    from ddp_asr.text import make_tokeniser
    from ddp_asr.training.precision import autocast

    warnings.filterwarnings("ignore", "At least one mel filterbank")  # four of the tutorial's are empty
    tokeniser = make_tokeniser(config.vocabulary)
    model = tutorial_model(sizes, tokeniser.size).train()
    transform = nn.Sequential(
        torchaudio.transforms.MelSpectrogram(sample_rate=SAMPLE_RATE_HZ, n_mels=sizes.bands),
        torchaudio.transforms.FrequencyMasking(freq_mask_param=min(15, sizes.bands)),
        torchaudio.transforms.TimeMasking(time_mask_param=35),
    )
    optimizer = torch.optim.AdamW(model.parameters(), 5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-4, total_steps=STEPS, anneal_strategy="linear")
    loss_of = nn.CTCLoss(blank=tokeniser.size - 1)
    rows = speech.shuffled_rows(len(index))

    def draw() -> tuple[list[tuple[Tensor, Tensor]], float]:
        drawn = [next(rows) for _ in range(utterances)]
        waveforms = [torch.from_numpy(speech.waveform(index, row)).float() / 32768 for row in drawn]
        targets = [torch.from_numpy(tokeniser.encode(index.text(row))) for row in drawn]
        return list(zip(waveforms, targets, strict=True)), sum(map(len, waveforms)) / SAMPLE_RATE_HZ

    def train(batch: list[tuple[Tensor, Tensor]]) -> None:
        waveforms, targets = zip(*batch, strict=True)
        spectrograms = [transform(waveform[None]).squeeze(0).transpose(0, 1) for waveform in waveforms]  # (T, F)
        padded = nn.utils.rnn.pad_sequence(spectrograms, batch_first=True)[:, None].transpose(2, 3)  # (B, 1, F, T)
        labels = nn.utils.rnn.pad_sequence(list(targets), batch_first=True)
        frames = torch.tensor([len(spectrogram) // 2 for spectrogram in spectrograms])
        optimizer.zero_grad()
        with autocast(precision, torch.device("cpu")):
            logits = model(padded)
        log_probabilities = logits.float().log_softmax(2).transpose(0, 1)
        loss = loss_of(log_probabilities, labels, frames, torch.tensor([len(target) for target in targets]))
        loss.backward()
        optimizer.step()
        schedule.step()

    return Way(f"tutorial {precision}", draw, train, precision, model)


# ours


def ours(index: Index, config: Config, learner: Learner) -> Way:
    """The trainer's own plan, loader and learner."""
    batches = _steps(index, config)
    steps = iter(range(1, STEPS))

    def draw() -> tuple[Any, float]:
        batch = next(batches)
        return batch, sum(micro_batch.audio_samples for micro_batch in batch) / SAMPLE_RATE_HZ

    def train(batch: list[Any]) -> None:
        step = next(steps)
        for number, micro_batch in enumerate(batch, start=1):
            learner.accumulate(micro_batch, step=step, last=number == len(batch))
        learner.update(step, STEPS, sum(micro_batch.utterances for micro_batch in batch))

    return Way(f"ddp_asr {learner.precision}", draw, train, learner.precision, learner.plain_model)


def make_learner(config: Config, precision: str, world: World | None = None) -> Learner:
    """On the device of this rank, or on the CPU where there is only this process."""
    import torch

    from ddp_asr.features.log_mel import LogMel
    from ddp_asr.model import make_model
    from ddp_asr.objective import Objective
    from ddp_asr.ranks.world import World
    from ddp_asr.text import make_tokeniser
    from ddp_asr.training.learner import Learner
    from ddp_asr.training.optim import make_optimizer

    torch.manual_seed(0)
    world = world or World(0, 1, 0, torch.device("cpu"))
    model = make_model(config, make_tokeniser(config.vocabulary).size).train().to(world.device)
    return Learner(
        world=world,
        model=world.wrap(model),
        log_mel=LogMel(config.features).to(world.device),
        objective=Objective(config.objective, seed=0, frame_s=config.frame_s),
        optimizer=make_optimizer(model, config.optim),
        optim=config.optim,
        precision=precision,
    )


def _steps(index: Index, config: Config) -> Iterator[list[Any]]:
    from ddp_asr.data.loader import train_loader
    from ddp_asr.data.plan import Plan
    from ddp_asr.text import make_tokeniser

    plan = Plan(index.samples, index.key_hash, settings=config.batch, speeds=config.augment.speeds)
    batches = train_loader(index, make_tokeniser(config.vocabulary), plan, config, rank=0, world_size=1, epochs=EPOCHS)
    while True:
        yield [next(batches) for _ in range(plan.micro_batches)]


# what is measured


def flop_per_audio_s(config: Config, model: nn.Module) -> float:
    """Floating point operations of a training step for a second of speech without padding: matrix products alone.

    Every weight of a matrix is used once a frame, one of a kernel once a frame and band; a multiplication and an
    addition forwards, and twice as many backwards.
    """
    uses = 0.0
    for weight in model.parameters():
        if weight.ndim == 4:
            uses += weight.numel() * config.features.mel_bands / 2
        elif weight.ndim == 2:
            uses += weight.numel()
    return 3 * 2 * uses / config.frame_s


def gemm_flop_per_s(precision: str) -> float:
    """The best of three square matrix products, per CPU-second."""
    import torch

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    one, other = (torch.randn(GEMM_SIZE, GEMM_SIZE).to(dtype) for _ in range(2))
    best_s = float("inf")
    for _ in range(3):
        started_s = time.process_time()
        torch.mm(one, other)
        best_s = min(best_s, time.process_time() - started_s)
    return 2 * GEMM_SIZE**3 / best_s


def measure(ways: Sequence[Way], config: Config, rounds: int) -> None:
    """Adds the speeds of each way in each round; a round before them warms up."""
    for number in range(rounds + 1):
        peaks = {precision: gemm_flop_per_s(precision) for precision in {way.precision for way in ways}}
        for way in ways:
            batch, audio_s = way.draw()
            cpu_before_s, before_s = time.process_time(), time.perf_counter()
            way.train(batch)
            cpu_s, wall_s = time.process_time() - cpu_before_s, time.perf_counter() - before_s
            flop_per_s = audio_s * flop_per_audio_s(config, way.model) / cpu_s
            speed = {
                "per_cpu_s": audio_s / cpu_s,
                "per_s": audio_s / wall_s,
                "of_peak": flop_per_s / peaks[way.precision],
                "peak_flop_per_s": peaks[way.precision],
            }
            if number:
                way.speeds.append(speed)
            print(f"round {number}: {way.name} {speed['per_cpu_s']:.1f} audio-s per CPU-second", file=sys.stderr)


def summarise(ways: Sequence[Way]) -> dict[str, dict[str, float]]:
    """Medians over the rounds, and how often as much as the first way in the same round."""
    summary = {}
    for way in ways:
        pairs = list(zip(way.speeds, ways[0].speeds, strict=True))
        summary[way.name] = {
            **{name: statistics.median(speed[name] for speed in way.speeds) for name in way.speeds[0]},
            "ratio": statistics.median(speed["per_cpu_s"] / first["per_cpu_s"] for speed, first in pairs),
            "ratio_per_s": statistics.median(speed["per_s"] / first["per_s"] for speed, first in pairs),
        }
    return summary


def breakdown(way: Way, learner: Learner) -> dict[str, float]:
    """Share of each part in the time of one of our steps. Of its micro-batches, which are alike, one is profiled."""
    from torch.profiler import ProfilerActivity, profile, record_function

    tag = record_function("features")
    learner.log_mel.register_forward_pre_hook(lambda *_: tag.__enter__() and None)
    learner.log_mel.register_forward_hook(lambda *_: tag.__exit__(None, None, None))
    batch, _ = way.draw()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        way.train(batch[:1])
    seconds: dict[str, float] = {}
    for event in profiler.events() or []:
        part = _part_of(event)
        seconds[part] = seconds.get(part, 0.0) + event.self_cpu_time_total
    seconds["optimiser"] /= len(batch)
    total = sum(seconds.values())
    return {part: of_part / total for part, of_part in sorted(seconds.items(), key=lambda item: -item[1])}


def _part_of(event: Any) -> str:
    """The part of a step that an operation belongs to, by its name and the names of those that called it."""
    names = [event.name]
    while event.cpu_parent is not None:
        event = event.cpu_parent
        names.append(event.name)
    called_by = " ".join(names)
    is_product = names[0] in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "mkldnn::_linear_pointwise")
    if "features" in names:
        return "features"
    if "ddp_asr::dropout" in called_by:
        return "dropout"
    if "_GRURecurrence" in called_by:
        return "recurrent products" if is_product else "gates of the recurrence"
    if "convolution" in called_by:
        return "convolutions"
    if is_product:
        return "input products"
    return "optimiser" if "Optimizer.step" in called_by else "norms, GELU, loss and the rest"


# the command


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description="Speech that a training step takes in a second, beside the step of AssemblyAI's tutorial.",
        epilog="Settings of a run, such as --batch.max_seconds=120, are taken too.\n\nexamples:\n"
        "  python -m benchmarks.step shards/train-clean-100\n"
        "  python -m benchmarks.step shards/train-mini --rounds 5 --precisions fp32\n"
        "  python -m benchmarks.step --small",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "shards",
        nargs="*",
        type=Path,
        help="shard directories (default: synthesised speech, whose sentences are short)",
    )
    add("--rounds", type=int, default=2, metavar="N", help="measured rounds, after one to warm up (default: 2)")
    add("--threads", type=int, default=1, metavar="N", help="threads of all of them (default: 1)")
    add(
        "--precisions",
        nargs="+",
        choices=("fp32", "bf16"),
        default=["fp32", "bf16"],
        help="of ours; the tutorial's is float32, and under autocast, too, where bf16 is named (default: both)",
    )
    add("--small", action="store_true", help="small networks and batches: whether the benchmark runs, in seconds")
    add("--json", action="store_true", help="print one object instead of the tables")
    arguments, settings = parser.parse_known_args(argv)
    arguments.settings = settings
    return arguments


def _config(arguments: argparse.Namespace) -> tuple[Config, Sizes]:
    """Settings with some 20 utterances of LibriSpeech a step, as the tutorial has them."""
    from ddp_asr.config import load_config

    sizes = SMALL if arguments.small else Sizes()
    ours = {
        "batch.max_seconds": 40 if arguments.small else 140,
        "batch.micro_batches": 2,
        "features.mel_bands": sizes.bands,
        "augment.frequency_mask_bands": 15,
        "encoder.conv_channels": sizes.channels,
        "encoder.residual_blocks": sizes.blocks,
        "encoder.rnn_layers": sizes.layers,
        "encoder.rnn_size": sizes.hidden,
    }
    config = load_config(None, [f"--{name}={value}" for name, value in ours.items()] + arguments.settings)
    shards = [str(path) for path in arguments.shards]
    return replace(config, data=replace(config.data, train=shards, threads=0)), sizes


def _ways(index: Index, config: Config, sizes: Sizes, arguments: argparse.Namespace) -> tuple[list[Way], Learner]:
    """The tutorial's, then ours, and the learner of the last one."""
    import torch

    from ddp_asr.training.precision import has_bf16_units

    precisions = list(arguments.precisions)
    if "bf16" in precisions and not has_bf16_units(torch.device("cpu")):
        print("this CPU has no bfloat16 units, so bf16 is left out", file=sys.stderr)
        precisions.remove("bf16")
    utterances = 4 if arguments.small else TUTORIAL_BATCH
    ways = [tutorial(index, config, sizes, "fp32", utterances)]
    if "bf16" in precisions:
        ways.append(tutorial(index, config, sizes, "bf16", utterances))
    for precision in precisions:
        learner = make_learner(config, precision)
        ways.append(ours(index, config, learner))
    return ways, learner


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # before torch is imported
    import numpy as np
    import torch

    from ddp_asr.data.corpus import read_corpus
    from ddp_asr.model import count_parameters

    torch.set_num_threads(arguments.threads)
    with ExitStack() as stack:
        if not arguments.shards:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            arguments.shards = [speech.synthesised(directory, utterances=40 if arguments.small else 400)]
        config, sizes = _config(arguments)
        index = read_corpus(config).index
        # As many utterances as in 10 h, so that the plan forms buckets as it does for a whole corpus.
        index = index.take(np.tile(np.arange(len(index)), max(1, round(10 / index.hours))))
        ways, learner = _ways(index, config, sizes, arguments)
        measure(ways, config, arguments.rounds)
        last = ways[-1]
        parts = breakdown(last, learner)
    result = {
        "cpu": speech.cpu_model(),
        "threads": arguments.threads,
        "parameters": count_parameters(last.model),
        "gflop_per_audio_s": flop_per_audio_s(config, last.model) / 1e9,
        "speeds": summarise(ways),
        "breakdown": {"of": last.name, "parts": parts},
    }
    print(json.dumps(result) if arguments.json else _table(result, arguments.rounds))
    return 0


def _table(result: dict[str, Any], rounds: int) -> str:
    lines = [
        f"{result['cpu']}, {result['threads']} thread(s); {result['parameters']:,} parameters, "
        f"{result['gflop_per_audio_s']:.2f} GFLOP a second of speech; medians of {rounds} rounds",
        "                 audio-s per CPU-second   audio-s per second   GEMM peak   share of it",
    ]
    for name, speed in result["speeds"].items():
        lines.append(
            f"  {name:14} {speed['per_cpu_s']:8.2f}  {speed['ratio']:5.2f} x   {speed['per_s']:8.2f}  "
            f"{speed['ratio_per_s']:5.2f} x   {speed['peak_flop_per_s'] / 1e9:5.0f} GFLOP/s  {speed['of_peak']:6.0%}"
        )
    lines.append(f"a step of {result['breakdown']['of']} by operation, under the profiler:")
    lines += [f"  {share:5.1%}  {part}" for part, share in result["breakdown"]["parts"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
