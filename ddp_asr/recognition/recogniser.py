"""A trained model with all that stands before and after it: waveforms in, logits and hypotheses out.

    checkpoint or run directory --read_trained--> Trained --build_recogniser--> Recogniser

Evaluation, transcription and training along the way all run the model through `Recogniser.logits`. The weights are the
moving average where the training kept one, as when it was evaluated along the way.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddp_asr.config import Config, DecoderSettings, config_from_dict
from ddp_asr.decoding import Decoder, make_decoder
from ddp_asr.errors import UserError, printable
from ddp_asr.features.log_mel import LogMel
from ddp_asr.files import is_number
from ddp_asr.model import AcousticModel, make_model
from ddp_asr.runs.checkpoint import DamagedCheckpoint, newest_good, read
from ddp_asr.text import Tokeniser, tokeniser_from_state
from ddp_asr.training.precision import autocast, resolve, set_matmul_precision

USUAL_PIECE_S = 20.0  # where a checkpoint does not say how long its utterances were


def print_warning(sentence: str) -> None:
    print(f"warning: {sentence}", file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Recogniser:
    """A model with its features before it and its decoder after it."""

    config: Config
    tokeniser: Tokeniser
    log_mel: LogMel
    model: AcousticModel
    decoder: Decoder
    device: torch.device
    precision: str
    piece_s: float = USUAL_PIECE_S
    """How long a piece of a longer recording is best: as long as the longest utterance that was trained on."""

    def logits(self, waveforms: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Waveforms (B, S) int16 and samples (B,) -> logits (B, T', V) and, on the CPU, frames (B,); no gradients."""
        with torch.no_grad(), autocast(self.precision, self.device):
            features, frames = self.log_mel(waveforms.to(self.device, non_blocking=True), samples)
            output = self.model(features, frames)
            return output.logits, output.frames


@dataclass(frozen=True)
class Trained:
    """What a checkpoint says about a recogniser, without the state of its training."""

    path: str
    step: int
    epoch: int
    config: dict[str, Any]
    tokeniser: dict[str, Any]  # its state
    weights: dict[str, Tensor]  # their moving average where the training kept one
    plain_weights: dict[str, Tensor]  # the same dict where it kept none
    longest_s: float | None = None  # of the utterances trained on; older checkpoints do not say it


def read_trained(checkpoint: str | Path, warn: Callable[[str], None] = print_warning) -> Trained:
    """Reads a checkpoint file, or a run directory's best.pt, else its newest good checkpoint.

    Args:
        warn: gets a sentence for each damaged checkpoint that is passed over.

    Raises:
        UserError: there is none, it is damaged, or it is not one of a training run.
    """
    path = Path(checkpoint)
    if path.is_dir():
        return _read_run(path, warn)
    if not path.exists():
        raise UserError(f"there is no {path}: name a run directory (runs/NAME) or a .pt file")
    try:
        return _trained(path, read(path))
    except DamagedCheckpoint as error:
        raise UserError(f"checkpoint {path} is damaged ({error.reason}): name another one of its run") from None


def _read_run(run_directory: Path, warn: Callable[[str], None]) -> Trained:
    def pass_over(path: Path, reason: str) -> None:
        warn(f"{path} is damaged ({reason}) and passed over")

    best = run_directory / "best.pt"
    try:
        if best.is_file():
            return _trained(best, read(best))
    except DamagedCheckpoint as error:
        pass_over(best, error.reason)
    found = newest_good(run_directory, pass_over)
    if found is None:
        raise UserError(f"{run_directory} holds no good checkpoint: name a run directory (runs/NAME) or a .pt file")
    return _trained(found.path, found.state)


def _trained(path: Path, state: dict[str, Any]) -> Trained:
    try:
        plain = dict(state["model"])
        weights = plain if state["averages"] is None else {**plain, **state["averages"]}  # what training evaluated, too
        both = (*plain.items(), *weights.items())
        if not all(isinstance(name, str) and isinstance(weight, Tensor) for name, weight in both):
            raise TypeError("its model holds more than tensors by name")
        step, epoch, config, tokeniser = (state[name] for name in ("step", "epoch", "config", "tokeniser"))
        if not (isinstance(config, dict) and isinstance(tokeniser, dict)):
            raise TypeError("its config and tokeniser are not dicts")
        longest_s = state.get("longest_s")
        longest_s = float(longest_s) if is_number(longest_s) and longest_s > 0 else None
        return Trained(str(path), int(step), int(epoch), config, tokeniser, weights, plain, longest_s)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path} is no checkpoint of a training run ({error!r}): name one that python -m ddp_asr.train wrote"
        ) from None


def build_recogniser(
    trained: Trained, device: torch.device, precision: str = "fp32", decoder: DecoderSettings | None = None
) -> Recogniser:
    """The recogniser of a checkpoint; settings of a `decoder` replace those of the checkpoint."""
    config = config_from_dict(trained.config, f"the checkpoint {trained.path}")
    if decoder is not None:
        config = replace(config, decoder=decoder)
    tokeniser = tokeniser_from_state(trained.tokeniser)
    model = make_model(config, tokeniser.size)
    try:
        model.load_state_dict(trained.weights)
    except RuntimeError as error:
        first = printable(str(error).strip().splitlines()[-1].strip())
        raise UserError(
            f"the weights in {trained.path} are not those of the model that its settings describe ({first}): "
            "it was written by another version of this program, or put together by hand"
        ) from None
    precision = resolve(precision, device)
    set_matmul_precision(precision)
    return Recogniser(
        config=config,
        tokeniser=tokeniser,
        log_mel=LogMel(config.features).to(device),
        model=model.to(device).eval(),
        decoder=make_decoder(config.decoder, tokeniser, config.frame_s),
        device=device,
        precision=precision,
        piece_s=min(max(trained.longest_s or USUAL_PIECE_S, 1.0), 3600.0),
    )


def load_recogniser(
    checkpoint: str | Path,
    precision: str = "fp32",
    decoder: DecoderSettings | None = None,
    warn: Callable[[str], None] = print_warning,
) -> Recogniser:
    """The recogniser of a checkpoint or run directory, on the GPU if there is one; see `build_recogniser`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return build_recogniser(read_trained(checkpoint, warn), device, precision, decoder)
