"""A training step of several encoders on the same batch: parameters and processor time, one step each in every round.

    shards --the first settings' plan--> a batch (without masks) --each settings' own features, encoder, objective-->
    forward, backward, update --> CPU-seconds of a step, the median over the rounds

Processor time of one thread is counted, and not the clock, so that another program on the machine matters less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import speech
from ddp_asr import SAMPLE_RATE_HZ
from ddp_asr.errors import run_entry_point

DEFAULT = ["configs/librispeech_100.yaml", "configs/librispeech_100_conformer.yaml"]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from ddp_asr.config import load_config
    from ddp_asr.data.corpus import read_corpus
    from ddp_asr.data.loader import MicroBatch, train_loader
    from ddp_asr.model import count_parameters
    from ddp_asr.ranks.world import World
    from ddp_asr.training.session import make_learner

    torch.set_num_threads(1)
    batch: MicroBatch | None = None
    learners, ways = {}, {}
    for way in arguments.way or DEFAULT:
        path, *overrides = way.split()
        given = [f"--data.train={arguments.shards}", "--data.test=", f"--train.precision={arguments.precision}"]
        config = load_config(Path(path), [*given, *overrides])
        corpus = read_corpus(config)
        if batch is None:
            batches = train_loader(corpus.index, corpus.tokeniser, corpus.plan, config, rank=0, world_size=1)
            batch = replace(next(batches), masks=None)
        learners[way] = make_learner(config, World(0, 1, 0, torch.device("cpu")), corpus, None)
        parameters = count_parameters(learners[way].plain_model)
        ways[way] = {"parameters": parameters, "frames_per_s": 1 / config.frame_s}
    assert batch is not None
    cpu_s: dict[str, list[float]] = {way: [] for way in learners}
    for number in range(arguments.rounds + 1):  # the first warms up
        for way, learner in learners.items():
            begun = time.process_time()
            learner.accumulate(batch, step=number + 1, last=True)
            learner.update(number + 1, 1000, float(batch.utterances))
            cpu_s[way] += [time.process_time() - begun] if number else []
    return {
        "cpu": speech.cpu_model(),
        "batch": {"utterances": batch.utterances, "audio_s": batch.audio_samples / SAMPLE_RATE_HZ},
        "ways": {way: {**of, "cpu_s": cpu_s[way]} for way, of in ways.items()},
    }


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.encoders",
        description="Processor time of a training step of several encoders, on the same batch.",
        epilog="examples:\n  python -m benchmarks.encoders shards/train-mini\n  python -m benchmarks.encoders "
        "shards/an4 --way configs/an4.yaml --way 'configs/an4_conformer.yaml --encoder.blocks=8' --precision bf16",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("shards", type=Path, help="a shard directory")
    add(
        "--way",
        action="append",
        metavar="'FILE --section.key=value ...'",
        help="settings of a way to compare; may be repeated (default: the two of LibriSpeech 100)",
    )
    add("--precision", default="fp32", choices=("fp32", "bf16"), help="number type (default: %(default)s)")
    add("--rounds", type=int, default=5, metavar="N", help="steps of each way (default: %(default)s)")
    add("--json", action="store_true", help="print one object instead of lines")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    result = measure(arguments)
    if arguments.json:
        print(json.dumps(result))
        return 0
    batch = result["batch"]
    print(f"{result['cpu']}, one thread, {arguments.precision}")
    print(f"{batch['utterances']} utterances, {batch['audio_s']:.1f} s of audio; CPU-seconds of a step")
    for way, of in result["ways"].items():
        middle, least, most = statistics.median(of["cpu_s"]), min(of["cpu_s"]), max(of["cpu_s"])
        print(f"{middle:7.2f} ({least:.2f} to {most:.2f})  {batch['audio_s'] / middle:6.1f} audio-s/CPU-s  {way}")
        print(f"        {of['parameters']:,} parameters, {of['frames_per_s']:.1f} frames a second")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
