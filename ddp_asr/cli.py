"""The command `ddp-asr COMMAND ...`, also as `python -m ddp_asr COMMAND ...`.

train, evaluate --> torchrun with so many processes, or this process alone --> ddp_asr.train, ddp_asr.evaluate
submit, status, sweep, doctor --> ddp_asr.launch, which is a link to launch/ of the checkout
the others --> the module of that name
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ddp_asr.errors import UserError, run_entry_point
from ddp_asr.ranks.signals import STOP_SIGNALS
from ddp_asr.runs.directory import read_status

COMMANDS = {
    "inspect": "show what is in recordings and transcripts, and propose a vocabulary",
    "shard": "turn recordings and transcripts into shards",
    "train": "train on shards, on all GPUs of this machine; the same command goes on with a stopped run",
    "evaluate": "word and character error rates of a trained model on shards",
    "compare": "which of two evaluations of the same utterances is better, and how sure that is",
    "transcribe": "write down what is said in audio files",
    "align": "find when each word of known texts is said, and transcripts that may be wrong",
    "vocabulary": "learn word pieces of text or transcripts",
    "lm": "make an n-gram language model of text or transcripts",
    "tune": "find the weights of a decoder with a language model",
    "average": "average the weights of several checkpoints of a run",
    "export": "export a trained model as ONNX with a script, and as safetensors with a model card",
    "tracking": "send a run to Comet, or make its offline archive or the events of TensorBoard",
    "submit": "queue a training on Slurm, or start it here as a job would",
    "status": "list runs and jobs, and what each is doing",
    "sweep": "train a grid of settings and rank the runs",
    "doctor": "test the nodes of a cluster before a long run",
    "configs": "list the settings and sbatch scripts that come with ddp_asr, and copy them",
}
LAUNCH = ("submit", "status", "sweep", "doctor")

EXAMPLES = """\
examples:
  ddp-asr train --config configs/librispeech_100.yaml
  ddp-asr train --processes 2 --config configs/an4.yaml --train.epochs=3 --run.name=trial
  ddp-asr evaluate runs/an4 shards/an4-test
  ddp-asr train --help
  python -m ddp_asr transcribe runs/an4 recording.flac
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="ddp-asr",
        usage="ddp-asr COMMAND ...",
        description="commands:\n" + "\n".join(f"  {name:12}{meaning}" for name, meaning in COMMANDS.items()),
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of these; COMMAND --help tells more")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="arguments of the command")
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments:
        parser.print_help()
        return 0
    options = parser.parse_args(arguments)
    if options.command == "train":
        return train(options.arguments)
    if options.command == "evaluate":
        return evaluate(options.arguments)
    package = "ddp_asr.launch" if options.command in LAUNCH else "ddp_asr"
    module = importlib.import_module(f"{package}.{options.command}")
    status: int = module.main(options.arguments)
    return status


def train(arguments: Sequence[str]) -> int:
    """0 when the run is done or was stopped, 2 for a user's mistake, 1 for any other failure."""
    from ddp_asr import train
    from ddp_asr.data.plan import micro_batches_of_rank

    processes, rest = _take_processes(arguments)
    options, settings = train.parse(rest)
    config = train.read_settings(options, settings)  # a mistake is reported here, before torch is imported
    if processes is None:
        processes = _gpus() or 1
    micro_batches_of_rank(config.batch.micro_batches, 0, processes)
    if options.dry_run:
        return train.dry_run(config, options.resume, processes)
    if processes == 1:
        return train.main(rest)
    started_s = time.time()
    status, sentence = _torchrun(processes, "ddp_asr.train", rest)
    # torchrun fails after any signal, even if every rank has ended well, so status.json decides.
    record = read_status(Path(config.run.dir) / config.run.name) or {}
    if record.get("state") in ("done", "stopped") and record.get("time_s", 0.0) >= started_s:
        return 0
    return _report(status, sentence)


def evaluate(arguments: Sequence[str]) -> int:
    """The exit status of the evaluation."""
    from ddp_asr import evaluate

    processes, rest = _take_processes(arguments)
    evaluate.parse_arguments(rest)  # a mistake is reported once
    if processes is None or processes == 1:
        return evaluate.main(rest)
    return _report(*_torchrun(processes, "ddp_asr.evaluate", rest))


def _take_processes(arguments: Sequence[str]) -> tuple[int | None, list[str]]:
    """`--processes N`, and the other arguments."""
    parser = argparse.ArgumentParser(prog="ddp-asr", add_help=False, allow_abbrev=False)
    parser.add_argument("--processes", type=int)
    options, rest = parser.parse_known_args(arguments)
    if options.processes is not None and options.processes < 1:
        raise UserError(f"--processes must be 1 or more, not {options.processes}")
    return options.processes, rest


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _torchrun(processes: int, module: str, arguments: Sequence[str]) -> tuple[int, str]:
    """Runs a module on so many ranks of this machine; this process is their torchrun, and they stop if it is killed."""
    # torchrun's log repeats what the ranks have said. Some of its loggers look at LOGLEVEL, the others at their parent.
    os.environ.setdefault("LOGLEVEL", "CRITICAL")
    logging.getLogger("torch.distributed.elastic").setLevel(os.environ["LOGLEVEL"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    from ddp_asr.ranks import torchrun

    # Under nohup SIGHUP is ignored, so that the run outlives its terminal.
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    handled = [number.name for number in STOP_SIGNALS if number not in ignored]
    command = ["--standalone", f"--nproc-per-node={processes}", f"--signals-to-handle={','.join(handled)}"]
    return torchrun.run([*command, "-m", module, *arguments])


def _report(status: int, sentence: str) -> int:
    if sentence and status != 2:  # after a user's mistake the rank's own sentence says all
        print(sentence, file=sys.stderr, flush=True)
    return status


def entry_point() -> int:
    """The console script."""
    return run_entry_point(main)
