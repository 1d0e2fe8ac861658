"""The objective: what the model made of a batch and its targets -> one loss an utterance (B,).

    objective = Objective(config.objective, seed=config.train.seed, frame_s=config.frame_s)
    context = objective.context(step, utterances)            # a number for each row of all views
    output = model(features of all views, frames, context)
    losses = objective(output, targets, target_lengths)      # (B,)

Its terms are functions of this module, each with its setting:

    ctc_loss            always
    ctc_loss, a layer   intermediate_weight, intermediate_layers: that share of the CTC loss is taken at lower layers
    consistency_loss    consistency_weight: two differently masked views of an utterance are pulled towards each other

With `consistency_weight` a batch holds two views of each utterance, 2 B rows: all first views, then all second ones.
`short_context_s` restricts how far the second view's encoder looks along time. A small corpus is learned by heart from
its context (on AN4, the other letters of the name that is spelled), and no longer from the sound; the view without
context cannot do that, and pulls the other one along. Full and limited context side by side are Yu et al.'s, "Dual-mode
ASR" (2021), there for streaming.

Lengths stay on the CPU: `ctc_loss` would copy them back from a GPU, and wait for it.

All terms are computed in float32 at least, outside autocast. The training loss of a step is the mean of these losses
over *all* its utterances: micro-batches and ranks add their losses and gradients up, and the one division follows the
sum over all ranks (training/loop.py).
"""

import torch
from torch import Tensor

from ddp_asr import config
from ddp_asr.draws import seed_of
from ddp_asr.features.log_mel import frame_mask
from ddp_asr.model import Output


class Objective:
    """The terms of the loss, as the settings weigh them."""

    def __init__(self, settings: config.Objective, *, seed: int, frame_s: float) -> None:
        """`frame_s`: seconds from one frame of T' to the next."""
        self.settings, self.seed, self.frame_s = settings, seed, frame_s
        self.views = settings.views

    def context(self, step: int, utterances: int) -> list[int] | None:
        """For each of (views x B) rows the frames of T' that its encoder may look along; 0: all. None: all, for all.

        One number for all second views of a step, so that it depends on nothing but the step. Whole numbers of frames,
        each as likely.
        """
        if not self.settings.short_context_s:
            return None
        shortest, longest = (max(1, round(seconds / self.frame_s)) for seconds in self.settings.short_context_s)
        frames = shortest + seed_of("short context", self.seed, step) % (longest - shortest + 1)
        return [0] * utterances + [frames] * utterances

    def __call__(self, output: Output, targets: Tensor, target_lengths: Tensor) -> Tensor:
        """(B,) losses of the utterances.

        Args:
            output: of (views x B) rows.
            targets: (B, U) classes, padded with anything.
            target_lengths: (B,) at least 1 wherever the result is used, on the CPU.
        """
        settings = self.settings
        rows = (output.frames, targets.repeat(self.views, 1), target_lengths.repeat(self.views))
        losses = ctc_loss(output.logits, *rows)  # (views x B,)
        if output.intermediate:
            at_layers = torch.stack([ctc_loss(logits, *rows) for logits in output.intermediate])
            losses = torch.lerp(losses, at_layers.mean(0), settings.intermediate_weight)
        losses = losses.view(self.views, -1).mean(0)  # (B,)
        if settings.consistency_weight:
            frames = output.frames[: len(losses)]
            divergence = consistency_loss(output.logits, frames, target_lengths)
            losses = losses + settings.consistency_weight * divergence
        return losses


def ctc_loss(logits: Tensor, frames: Tensor, targets: Tensor, target_lengths: Tensor) -> Tensor:
    """CTC loss / target length of each row; the blank is the last class.

    Graves et al., "Connectionist temporal classification" (2006); its mean is that of `nn.CTCLoss(reduction="mean")`.

    Args:
        logits: (B, T', V), any float type; computed in float32 at least.
        frames: (B,) T' of each row, on the CPU.
        targets: (B, U) classes, padded with anything.
        target_lengths: (B,) at least 1 wherever the result is used, on the CPU.

    Returns:
        (B,) losses; infinite for a row with fewer frames than its targets need.
    """
    with torch.autocast(logits.device.type, enabled=False):
        losses = torch.nn.functional.ctc_loss(
            log_probabilities(logits).transpose(0, 1),
            targets,
            frames,
            target_lengths,
            blank=logits.shape[-1] - 1,
            reduction="none",
        )
        return losses / _at_least_one(target_lengths, losses)


def consistency_loss(logits: Tensor, frames: Tensor, target_lengths: Tensor) -> Tensor:
    """How far apart the symbols of two views of each utterance lie; no gradient flows into the view that is the goal.

    Yao et al., "CR-CTC: Consistency regularization on CTC for improved speech recognition" (2024), eq. 6: the mean of
    both Kullback-Leibler divergences, summed over the frames, here by target length as the CTC loss beside it.

    Args:
        logits: (2 B, T', V), all first views and then all second ones.
        frames: (B,) T' of each utterance, on the CPU.
        target_lengths: (B,) at least 1 wherever the result is used, on the CPU.

    Returns:
        (B,) divergences / target length.
    """
    with torch.autocast(logits.device.type, enabled=False):
        one, other = log_probabilities(logits).chunk(2)  # (B, T', V)
        divergence = (_divergence(one, goal=other) + _divergence(other, goal=one)) / 2
        own = frame_mask(frames, logits.shape[1], logits.device)
        divergences = torch.where(own, divergence, 0.0).sum(1)
        return divergences / _at_least_one(target_lengths, divergences)


def _at_least_one(target_lengths: Tensor, losses: Tensor) -> Tensor:
    """Target lengths to divide losses by, on the device of the losses."""
    return target_lengths.clamp(min=1).to(losses.device, non_blocking=True)


def _divergence(view: Tensor, goal: Tensor) -> Tensor:
    """(B, T') Kullback-Leibler divergence of a view (B, T', V) from a goal that gets no gradient."""
    goal = goal.detach()
    return (goal.exp() * (goal - view)).sum(-1)


def log_probabilities(logits: Tensor) -> Tensor:
    """(B, T', V) in float32 at least."""
    at_least_float32 = logits if logits.dtype == torch.float64 else logits.float()
    return at_least_float32.log_softmax(-1)
