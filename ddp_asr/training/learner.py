"""The weights of a run, and how a step changes them.

    losses = learner.accumulate(batch, step=..., last=...)              # for each batch of the rank in a step
    norm, updated = learner.update(step, total_steps, utterances)       # once, on all ranks alike

    waveforms (B, S) --log-mel--> features (B, T, F) --masks, a view each--> model --Output--> objective --> losses (B,)

What the loss is made of is the objective's (objective.py). This module adds the losses of a batch up, and divides the
gradients by the number of utterances of the whole step: batches differ in their number of utterances and ranks in their
number of batches, so any earlier division would weigh utterances unevenly. A batch is one micro-batch or several.

Nothing here draws from a generator: dropout belongs to the utterance (encoders/dropout.py), as its masks do.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from ddp_asr import config
from ddp_asr.data.loader import MicroBatch
from ddp_asr.errors import UserError
from ddp_asr.features import masks
from ddp_asr.features.log_mel import LogMel
from ddp_asr.model import AcousticModel
from ddp_asr.objective import Objective
from ddp_asr.ranks.world import World, naming_lost_peers, no_sync
from ddp_asr.training import precision
from ddp_asr.training.optim import WeightAverage, check_fits, learning_rate, load_moments


@dataclass
class Learner:
    """Weights, optimiser, and what a step needs to change them."""

    world: World
    model: nn.Module  # the acoustic model, wrapped by `world.wrap`
    log_mel: LogMel
    objective: Objective
    optimizer: torch.optim.Optimizer
    optim: config.Optim
    precision: str
    average: WeightAverage | None = None
    scaler: torch.amp.GradScaler = field(init=False)
    frozen: list[nn.Parameter] = field(init=False)  # in the first `optim.frozen_steps` steps

    def __post_init__(self) -> None:
        self.frozen = self.plain_model.encoder.lower_parameters(self.optim.frozen_layers)
        self.scaler = precision.make_scaler(self.precision, self.world.device)

    @property
    def plain_model(self) -> AcousticModel:
        """The acoustic model without its wrapper."""
        wrapped = isinstance(self.model, nn.parallel.DistributedDataParallel)
        return cast(AcousticModel, self.model.module if wrapped else self.model)

    def losses(self, batch: MicroBatch, step: int) -> Tensor:
        """(B,) loss of each utterance; 0 for the stand-in of an emptied micro-batch."""
        views = self.objective.views
        features, frames = self.log_mel(batch.waveforms, batch.samples)  # (B, T, F)
        masked = masks.apply(features, batch.masks, views) if batch.masks is not None else [features] * views
        context = self.objective.context(step, len(frames))
        seeds = None if batch.dropout_seeds is None else batch.dropout_seeds.t().flatten()  # (views x B,)
        with precision.autocast(self.precision, self.world.device):
            output = self.model(torch.cat(masked), frames.repeat(views), context, seeds)  # of (views x B) rows
        losses = self.objective(output, batch.targets, batch.target_lengths)
        return torch.where(batch.weight > 0, losses, 0.0)

    def accumulate(self, batch: MicroBatch, *, step: int, last: bool) -> Tensor:
        """Adds the gradient of the batch's summed loss; the last batch of a step synchronises over the ranks.

        Returns the detached losses (B,), still on the device.
        """
        synchronised = self.world.reducing_gradients(self.model) if last else no_sync(self.model)
        with torch.enable_grad(), naming_lost_peers(self.world), synchronised:
            losses = self.losses(batch, step)
            self.scaler.scale(losses.sum()).backward()
        return losses.detach()

    def update(self, step: int, total_steps: int, utterances: float) -> tuple[float, bool]:
        """Divides the gradients, clips them and steps; returns their norm and whether the weights were updated.

        Gradients are the same on all ranks here, and so is every decision.
        """
        rate = learning_rate(step, total_steps, self.optim)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if step <= self.optim.frozen_steps:  # AdamW leaves weights without a gradient alone, and their moments
            for parameter in self.frozen:
                parameter.grad = None
        self.scaler.unscale_(self.optimizer)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        # DDP has divided the sum over the ranks by their number. `_foreach_mul_` (torch 2.11.0) is one kernel for all
        # on a GPU; its name is private although the documentation lists it, and a loop over `mul_` does the same.
        torch._foreach_mul_(gradients, self.world.world_size / max(utterances, 1.0))
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.optim.clip_norm))  # waits for the GPU
        finite = math.isfinite(norm) and utterances > 0
        if finite:
            self.scaler.step(self.optimizer)
            if self.average is not None:
                self.average.update(self.plain_model.parameters())
        self.scaler.update()
        self.discard()
        return norm, finite

    def discard(self) -> None:
        """Drops the step's gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        """Everything a resume needs, as tensors and plain containers."""
        average = self.average
        return {
            "model": self.plain_model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "averages": None if average is None else dict(zip(self.parameter_names(), average.weights, strict=True)),
            "average_updates": 0 if average is None else average.updates,
        }

    def parameter_names(self) -> list[str]:
        return [name for name, _ in self.plain_model.named_parameters()]

    def load(self, state: dict[str, Any]) -> None:
        """Continues from `state`.

        Raises:
            UserError: it is of another model, or damaged in a way that no checksum shows.
        """
        try:
            self._load(state)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            first = str(error).splitlines()[-1].strip() if str(error) else type(error).__name__
            raise UserError(
                f"the checkpoint does not fit the model of these settings ({first}): another version wrote it, or a "
                "person changed it; choose another with --resume PATH"
            ) from None

    def _load(self, state: dict[str, Any]) -> None:
        self.plain_model.load_state_dict(state["model"])
        load_moments(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.updates = state["average_updates"]
            for name, weight in zip(self.parameter_names(), self.average.weights, strict=True):
                check_fits(f"the average of {name}", state["averages"][name], weight)
                weight.copy_(state["averages"][name])

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The moving average in the model's place, where there is one; the weights come back bit for bit."""
        if self.average is None:
            yield
            return
        weights = list(self.plain_model.parameters())
        kept = [weight.detach().clone() for weight in weights]
        try:
            _overwrite(weights, self.average.weights)
            yield
        finally:
            _overwrite(weights, kept)


@torch.no_grad()
def _overwrite(weights: list[nn.Parameter], values: list[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)
