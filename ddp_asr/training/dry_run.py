"""`--dry-run`: what a run would be, from settings, index and checkpoints; reads no audio and starts nothing."""

from pathlib import Path

import numpy as np
import torch

from ddp_asr import SAMPLE_RATE_HZ
from ddp_asr.config import Config, Pieces
from ddp_asr.data.corpus import Corpus, read_corpus
from ddp_asr.data.index import read_index
from ddp_asr.data.plan import micro_batches_of_rank, speed_samples
from ddp_asr.data.targets import REASONS, TOO_FEW_FRAMES, explain_left_out
from ddp_asr.decoding import make_decoder
from ddp_asr.errors import counted
from ddp_asr.model import AcousticModel, count_parameters, make_model
from ddp_asr.runs.directory import read_status
from ddp_asr.settings import describe_changes
from ddp_asr.text import UNITS, tokeniser_from_state
from ddp_asr.training.first_weights import take_weights
from ddp_asr.training.precision import autocast
from ddp_asr.training.resume import (
    checkpoint_was_saved,
    find_checkpoint,
    make_progress,
    read_state,
    require_same_corpus,
)

_FLOAT_BYTES = 4
_OPTIMISER_COPIES = 4  # weights, gradients and AdamW's two moments
_WORLD_SIZES = (2, 4, 8, 16, 32)
_KEYS_SHOWN = 5


def report(config: Config, world_size: int, resume: str = "auto") -> str:
    """The report as text; raises the UserErrors that the run itself would raise before its first step."""
    micro_batches_of_rank(config.batch.micro_batches, 0, world_size)
    run, warnings = Path(config.run.dir) / config.run.name, list[str]()
    saved = checkpoint_was_saved(run, read_status(run) or {})
    found = find_checkpoint(run, resume, saved, lambda text: warnings.append(f"warning           {text}"))
    state = read_state(found, config)
    corpus = read_corpus(config, tokeniser_from_state(state["tokeniser"]) if state else None)
    require_same_corpus(found, state, config, corpus.whole, corpus.clips)
    make_decoder(config.decoder, corpus.tokeniser, config.frame_s)
    model = make_model(config, corpus.tokeniser.size)
    if state is not None:
        starts = f"from step {make_progress(found, state, run).step}: {found}"
    elif config.train.init_from:
        taken = [f"                  {line}" for line in take_weights(model, config, corpus.tokeniser)]
        starts = "\n".join([f"at step 0, from the weights of {config.train.init_from}", *taken])
    else:
        starts = "at step 0, from random weights"
    sections = [
        [*_run_lines(config, corpus, count_parameters(model)), *warnings, f"starts            {starts}"],
        _plan_lines(config, corpus, world_size),
        _memory_lines(config, corpus, model, world_size),
        _left_out_lines(corpus),
        ["settings that differ from the defaults:", describe_changes(config).rstrip() or "none"],
    ]
    return "\n\n".join("\n".join(lines) for lines in sections)


def _run_lines(config: Config, corpus: Corpus, parameters: int) -> list[str]:
    test = read_index(config.data.test) if config.data.test else None
    tested = f"{len(test):,} utterances, {test.samples.sum() / SAMPLE_RATE_HZ / 3600:.2f} h" if test else "none"
    return [
        f"run               {Path(config.run.dir) / config.run.name}",
        f"model             {parameters:,} parameters, {corpus.tokeniser.size} classes",
        f"frames            {1 / config.frame_s:.1f} a second of audio in the logits",
        f"vocabulary        {_vocabulary(config, corpus)}",
        f"training data     {len(corpus.index):,} utterances, {corpus.hours:.2f} h",
        f"test data         {tested}",
        *(
            f"{name:18}{len(index):,} recordings, {index.hours:.2f} h, for {getattr(config.augment, name).share:.0%} "
            "of the utterances"
            for name, index in corpus.clips.items()
        ),
    ]


def _vocabulary(config: Config, corpus: Corpus) -> str:
    tokeniser = corpus.tokeniser
    a_second = corpus.target_lengths.sum() / (corpus.hours * 3600)
    text = f"{len(tokeniser.symbols)} {UNITS[tokeniser.unit]}, {a_second:.1f} of them a second, beside the blank"
    if tokeniser.unit == "char":
        return text
    model = config.vocabulary.model if isinstance(config.vocabulary, Pieces) else ""
    shown = ", ".join(repr(symbol) for symbol in sorted(tokeniser.symbols, key=len)[-3:])
    return f"{text}; {f'of {model}' if model else 'learnt from the transcripts'}, such as {shown}"


def _plan_lines(config: Config, corpus: Corpus, world_size: int) -> list[str]:
    plan, epoch = corpus.plan, corpus.plan.epoch(0)
    sizes = np.diff(epoch.bounds)
    audio_s = corpus.index.samples.sum() / SAMPLE_RATE_HZ / plan.steps_per_epoch
    sizes_of_world = [w for w in sorted({*_WORLD_SIZES, world_size}) if 1 < w <= config.batch.micro_batches]
    balance = ", ".join(f"{epoch.balance(w):.3f} on {w}" for w in sizes_of_world) or "1 process only"
    advice, buckets = plan.advise(), counted(len(plan.buckets), "bucket")
    return [
        f"steps             {plan.steps_per_epoch:,} an epoch, {plan.steps_per_epoch * config.train.epochs:,} in all",
        f"a step            {config.batch.micro_batches} micro-batches, {audio_s:.0f} s of audio on average",
        f"a micro-batch     {sizes.min()} to {sizes.max()} utterances, from {buckets} of duration",
        f"padding           {epoch.padding:.1%} of what is computed (epoch 1)",
        f"balance           {balance} processes (share of the slowest rank's time that the average rank works)",
        f"processes         up to {config.batch.micro_batches}; the result is the same for any number",
        *([f"advice            {advice}"] if advice else []),
    ]


def _memory_lines(config: Config, corpus: Corpus, model: AcousticModel, world_size: int) -> list[str]:
    # What `auto` becomes depends on the hardware, which need not be this machine's: every recent GPU has bf16.
    precision = "bf16" if config.train.precision == "auto" else config.train.precision
    a_second = activation_bytes_per_second(config, model, precision)
    fixed = count_parameters(model) * _FLOAT_BYTES * _OPTIMISER_COPIES

    def largest(fuse: int) -> list[str]:
        lines = []
        for name, rows in corpus.plan.largest_micro_batches(corpus.target_lengths, fuse).items():
            samples = speed_samples(corpus.index.samples[rows], min(corpus.plan.speeds))
            longest_s = float(samples.max()) / SAMPLE_RATE_HZ
            total = fixed + a_second * longest_s * len(rows)
            lines.append(f"  {name:22}{len(rows)} x {longest_s:.1f} s, about {total / 2**30:.2f} GiB")
        return list(dict.fromkeys(lines))

    # The last rank's, of which no other rank has more.
    micro_batches = len(micro_batches_of_rank(config.batch.micro_batches, world_size - 1, world_size))
    lines = [
        "memory            of the largest batches, with weights, gradients and optimiser: an estimate for "
        f"{precision}, which knows neither cuDNN's work space nor the allocator's gaps",
        *largest(1),
    ]
    if (fuse := min(config.train.fuse_micro_batches or micro_batches, micro_batches)) > 1:
        lines += [f"  with {fuse} micro-batches as one batch, as a GPU with enough memory runs them:", *largest(fuse)]
    return lines


def activation_bytes_per_second(config: Config, model: AcousticModel, precision: str) -> float:
    """What autograd keeps for each second of padded audio, counted in forward passes on the CPU.

    Everything that grows is proportional to utterances x frames, so short pieces tell. The difference between two of
    them leaves out what does not grow, such as autocast's copies of the weights. Each view of an utterance is kept.
    """
    seconds = 2
    growth = _kept_bytes(config, model, precision, 2 * seconds) - _kept_bytes(config, model, precision, seconds)
    return config.objective.views * growth / seconds


def _kept_bytes(config: Config, model: AcousticModel, precision: str, seconds: int) -> int:
    """What autograd keeps of a forward pass of one utterance, each storage once."""
    frames = config.features.frames(seconds * SAMPLE_RATE_HZ)
    kept: dict[int, int] = {}
    held: list[torch.Tensor] = []  # alive, so that no two of them share an address

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return tensor

    features, lengths = torch.zeros(1, frames, config.features.mel_bands), torch.tensor([frames])
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        autocast(precision, torch.device("cpu")),
    ):
        model(features, lengths, seeds=torch.zeros(1, dtype=torch.int64))
    return sum(kept.values())


def _left_out_lines(corpus: Corpus) -> list[str]:
    headline, *lines = explain_left_out(corpus.targets) or ["nothing"]
    short = [key for key, reason in corpus.targets.left_out(corpus.whole) if reason == REASONS[TOO_FEW_FRAMES]]
    if short:
        more = f" and {len(short) - _KEYS_SHOWN:,} more" if len(short) > _KEYS_SHOWN else ""
        lines.append(f"too few frames    {', '.join(short[:_KEYS_SHOWN])}{more}")
    return [f"left out          {headline}", *lines]
