"""Training on one rank: `python -m ddp_asr.train`, alone or under torchrun, which `ddp-asr train` starts.

    settings -> join the other ranks -> lease -> corpus and plan -> checkpoint to go on from -> learner
      -> rehearsal -> Trainer.run -> status, curves, tracking

An error that one rank finds before the first step is raised on all ranks, and one of them reports it. Only rank 0
writes into the run directory, under the lease. However an attempt ends, `status.json` says how and why.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ddp_asr.config import Config, load_config, require_shards
from ddp_asr.errors import UserError, run_entry_point, users_error
from ddp_asr.ranks.environment import before_torch
from ddp_asr.runs.tracking import require as require_trackers
from ddp_asr.settings import help_text

if TYPE_CHECKING:
    from ddp_asr.training.attempt import Attempt

DEFAULT_CONFIG = Path("configs/librispeech_100.yaml")

EXAMPLES = """\
examples:
  ddp-asr train --processes 8 --config configs/librispeech_100.yaml
  ddp-asr train --config configs/an4.yaml --dry-run
  ddp-asr train --config configs/an4.yaml --train.epochs=3 --run.name=trial
  ddp-asr train --config configs/an4.yaml --resume runs/an4/checkpoints/step-00000400.pt
  torchrun --standalone --nproc_per_node=8 -m ddp_asr.train --config configs/librispeech_100.yaml

`ddp-asr train` starts --processes N ranks on this machine: one per GPU if N is not given, one without GPUs. A rank
alone, or each under torchrun, is `python -m ddp_asr.train`, which has no --processes.

A run is stopped with Ctrl-C, SIGTERM, SIGUSR1, SIGUSR2, SIGHUP or SIGQUIT: it writes a checkpoint at the next step and
ends. The same command goes on from there, on as many processes as you like, up to batch.micro_batches.
"""


def main(argv: Sequence[str] | None = None) -> int:
    options, rest = parse(sys.argv[1:] if argv is None else argv)
    mistake: UserError | None = None
    try:
        config = read_settings(options, rest)
    except (UserError, OSError) as error:
        mistake = users_error(error)
        if mistake is None or os.environ.get("WORLD_SIZE", "1") == "1" or options.dry_run:
            raise
        config = Config()  # all ranks have found it, and one of them reports it
    if options.dry_run:
        return dry_run(config, options.resume, int(os.environ.get("WORLD_SIZE") or 1))
    return run(config, resume=options.resume, profile_steps=options.profile, mistake=mistake)


def dry_run(config: Config, resume: str, processes: int) -> int:
    """Prints what a run on so many processes would be; under torchrun on rank 0 only."""
    from ddp_asr.training.dry_run import report

    if os.environ.get("RANK", "0") == "0":
        print(report(config, processes, resume))
    return 0


def read_settings(options: argparse.Namespace, settings: Sequence[str]) -> Config:
    """The settings of the command line that `parse` has split; the shards that they name exist."""
    config = load_config(_config_path(options.config), list(_joined(settings)))
    require_shards(config)
    if config.tracking.mode != "off":
        require_trackers(config.tracking.to)
    return config


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the settings (`--section.key=value`)."""
    parser = argparse.ArgumentParser(
        prog="python -m ddp_asr.train",
        description="Trains a CTC speech recogniser on one process or many; the result is the same.",
        epilog=EXAMPLES + "\nsettings, with their defaults:\n" + help_text(Config),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        usage="%(prog)s [--config FILE] [--resume auto|never|PATH] [--dry-run] [--profile N] [--section.key=value ...]",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help=f"settings in YAML (default: {DEFAULT_CONFIG})")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto: from the newest good checkpoint of the run, if any; never: refuse a directory with results; "
        "PATH: from that checkpoint; a Slurm job that is requeued goes on as with auto (default: auto)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run, and start nothing")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="trace N steps into the run directory")
    options, rest = parser.parse_known_args(argv)
    if options.profile < 0:
        parser.error(f"--profile must be a number of steps, 0 or more, not {options.profile}")
    return options, rest


def _joined(arguments: Sequence[str]) -> Iterator[str]:
    """`--section.key value` as `--section.key=value`."""
    waiting = iter(arguments)
    for argument in waiting:
        if argument.startswith("--") and "." in argument and "=" not in argument:
            value = next(waiting, None)
            if value is None:
                raise UserError(f"{argument} has no value: write {argument}=VALUE")
            argument = f"{argument}={value}"
        yield argument


def _config_path(given: Path | None) -> Path:
    if given is not None:
        return given
    installed = Path(__file__).parent.parent / DEFAULT_CONFIG
    return DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else installed


def run(config: Config, *, resume: str = "auto", profile_steps: int = 0, mistake: UserError | None = None) -> int:
    """Trains; returns the exit status of this rank: 0 when the run is done or was stopped, 2 for a user's mistake.

    A `mistake` that this rank has found in the settings is raised once the ranks have met.
    """
    before_torch(os.environ)
    from ddp_asr.data.storage import Unreachable
    from ddp_asr.ranks.rendezvous import join
    from ddp_asr.ranks.signals import StoppedBeforeTraining
    from ddp_asr.ranks.world import PeerLost, RaisedElsewhere, describe
    from ddp_asr.training import session
    from ddp_asr.training.attempt import Attempt

    attempt: Attempt | None = None
    world = join(config.distributed, Path(config.run.dir) / config.run.name)

    def end(state: str, reason: str, *, retry: bool) -> None:
        # torchrun signals the ranks that are left as soon as one has ended: it must not interrupt what follows.
        world.watchdog.stop.mark_handled()
        world.watchdog.announce_exit(reason)  # first, because other ranks may be waiting for this one
        if attempt is not None:
            attempt.end(state, reason, retry=retry)

    try:
        world.run_on_all(lambda: _raise(mistake))
        attempt = Attempt(config, world)
        attempt.open()
        with _profiled(profile_steps, attempt) as on_step:
            outcome = session.run(attempt, resume, on_step)
        attempt.end(outcome.state, outcome.reason, retry=outcome.retry)
        world.leave()
        return 0
    except StoppedBeforeTraining as stop:
        end("stopped", f"{stop} before the first step", retry=True)
        return 0
    except UserError as error:
        end("failed", str(error), retry=isinstance(error, PeerLost | Unreachable))
        if isinstance(error, RaisedElsewhere):
            return 2  # the rank that raised it reports it
        raise
    except BaseException as error:  # recorded for the launcher, then raised again; Ctrl-C is one, too
        end("failed", describe(error), retry=True)
        raise


def _raise(mistake: UserError | None) -> None:
    if mistake is not None:
        raise mistake


@contextlib.contextmanager
def _profiled(steps: int, attempt: Attempt) -> Iterator[Callable[[], None]]:
    """Traces `steps` steps of rank 0, after two to warm up, as a Chrome trace in the run directory."""
    if not steps or attempt.world.rank != 0:
        yield lambda: None
        return
    from torch.profiler import profile, schedule

    def save(profiler: profile) -> None:
        path = attempt.path / f"trace-step-{attempt.reached.progress.step}.json"
        profiler.export_chrome_trace(str(path))
        attempt.message(f"trace of {steps} steps: {path} (open it in chrome://tracing or ui.perfetto.dev)")

    with profile(schedule=schedule(wait=1, warmup=1, active=steps, repeat=1), on_trace_ready=save) as profiler:
        yield profiler.step


if __name__ == "__main__":
    raise SystemExit(run_entry_point(main))
