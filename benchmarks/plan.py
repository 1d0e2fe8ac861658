"""What a plan costs and what it is worth: seconds to make it, padding, steps against the fewest possible, balance.

    lengths like LibriSpeech's --Plan--> buckets --epoch--> micro-batches --> the table, a row a world size

No audio and no torch: lengths are drawn, or read from the index of shards that are given.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddp_asr import SAMPLE_RATE_HZ
from ddp_asr.errors import run_entry_point

if TYPE_CHECKING:
    import numpy as np

LIBRISPEECH_960_UTTERANCES = 281_241


def librispeech_like(utterances: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples and key hashes: three quarters of 12 to 17 s, the others spread below, which is LibriSpeech's shape."""
    import numpy as np

    generator = np.random.default_rng(0)
    long, short = generator.normal(14.5, 1.2, utterances), generator.uniform(1.3, 15.0, utterances)
    seconds = np.where(generator.random(utterances) < 0.75, long, short).clip(1.3, 24.5)
    return (seconds * SAMPLE_RATE_HZ).astype(np.int64), generator.integers(0, 2**64, utterances, np.uint64)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    from ddp_asr.config import Batch
    from ddp_asr.data.index import read_index
    from ddp_asr.data.plan import Plan, fits

    samples, key_hash = librispeech_like(arguments.utterances)
    if arguments.shards:
        index = read_index(arguments.shards)
        samples, key_hash = index.samples, index.key_hash
    usable = fits(samples, arguments.max_seconds, arguments.speeds)
    samples, key_hash = samples[usable], key_hash[usable]
    settings = Batch(arguments.max_seconds, arguments.micro_batches, arguments.buckets)
    started = time.perf_counter()
    plan = Plan(samples, key_hash, settings=settings, speeds=arguments.speeds)
    made = time.perf_counter()
    epoch = plan.epoch(0)
    ended = time.perf_counter()
    worlds = [2**power for power in range(10) if 2**power <= arguments.micro_batches]
    return {
        "utterances": len(plan),
        "hours": float(epoch.samples.sum()) / SAMPLE_RATE_HZ / 3600,
        "plan_s": made - started,
        "epoch_s": ended - made,
        "buckets": len(plan.buckets),
        "steps": plan.steps_per_epoch,
        "fewest_steps": float(epoch.samples.sum()) / SAMPLE_RATE_HZ / (arguments.micro_batches * arguments.max_seconds),
        "padding": epoch.padding,
        "balance": {world_size: epoch.balance(world_size) for world_size in worlds},
    }


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan",
        description="Seconds to plan an epoch, its padding and its balance over ranks.",
        epilog="examples:\n  python -m benchmarks.plan\n  python -m benchmarks.plan shards/mine --speeds .9 1 1.1",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("shards", nargs="*", type=Path, help="shard directories (default: drawn lengths, like LibriSpeech-960's)")
    add("--utterances", type=int, default=LIBRISPEECH_960_UTTERANCES, metavar="N", help="drawn (default: %(default)s)")
    add("--micro-batches", type=int, default=32, metavar="K", help="micro-batches in a step (default: %(default)s)")
    add("--max-seconds", type=float, default=120.0, metavar="S", help="of a micro-batch (default: %(default)s)")
    add("--buckets", type=int, default=30, metavar="N", help="most buckets (default: %(default)s)")
    add("--speeds", type=float, nargs="+", default=[1.0], metavar="X", help="speed factors (default: 1)")
    add("--json", action="store_true", help="print one object instead of the table")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    result = measure(arguments)
    if arguments.json:
        print(json.dumps(result))
        return 0
    print(f"{result['utterances']:,} utterances, {result['hours']:,.1f} h")
    print(f"  plan {result['plan_s']:.3f} s, each epoch {result['epoch_s']:.3f} s, {result['buckets']} buckets")
    print(f"  {result['steps']:,} steps; full and without padding there would be {result['fewest_steps']:,.1f}")
    print(f"  padding {result['padding']:.1%} of what is computed")
    for world_size, balance in result["balance"].items():
        print(f"  {world_size:3} processes: {balance:.1%} busy, the rest waits for the slowest of a step")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
