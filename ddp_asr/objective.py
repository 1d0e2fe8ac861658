"""CTC loss of each utterance of a micro-batch: logits (B, T', V) -> loss / target length (B,), and a regulariser of it.

In float32, outside autocast. The training loss of a step is the mean of these over *all* its utterances (DESIGN 2.5).
Micro-batches and ranks therefore only ever add: each contributes a weighted sum and a count, and the one division
follows the sum over all ranks.

Graves et al., "Connectionist temporal classification" (2006); the same mean as `nn.CTCLoss(reduction="mean")`.
"""

import torch
from torch import Tensor

from ddp_asr.features.log_mel import frame_mask


def ctc_loss(logits: Tensor, frames: Tensor, targets: Tensor, target_lengths: Tensor) -> Tensor:
    """CTC loss / target length of each utterance; the blank is the last symbol.

    Args:
        logits: (B, T', V), any float type; computed in float32 at least.
        frames: (B,) T' of each utterance.
        targets: (B, U) symbols, padded with anything.
        target_lengths: (B,) at least 1 wherever the result is used.

    Returns:
        (B,) losses; infinite for an utterance with fewer frames than its targets need.
    """
    with torch.autocast(logits.device.type, enabled=False):
        losses = torch.nn.functional.ctc_loss(
            _log_probabilities(logits).transpose(0, 1),
            targets,
            frames,
            target_lengths,
            blank=logits.shape[-1] - 1,
            reduction="none",
        )
        return losses / target_lengths.clamp(min=1)


def consistency_loss(logits: Tensor, frames: Tensor, target_lengths: Tensor) -> Tensor:
    """How far apart the symbols of two views of each utterance lie; each view is pulled towards the other as it stands.

    Yao et al., "CR-CTC: Consistency regularization on CTC for improved speech recognition" (2024), eq. 6: the mean of
    both Kullback-Leibler divergences, summed over the frames, here by target length as the CTC loss beside it.

    Args:
        logits: (2 B, T', V), all first views and then all second ones.
        frames: (B,) T' of each utterance.
        target_lengths: (B,) at least 1 wherever the result is used.

    Returns:
        (B,) divergences / target length.
    """
    with torch.autocast(logits.device.type, enabled=False):
        one, other = _log_probabilities(logits).chunk(2)  # (B, T', V)
        divergence = (_towards(one, other) + _towards(other, one)) / 2
        own = frame_mask(frames, logits.shape[1])
        return torch.where(own, divergence, 0.0).sum(1) / target_lengths.clamp(min=1)


def _towards(view: Tensor, goal: Tensor) -> Tensor:
    """(B, T') divergence of a view (B, T', V) from a goal that stands still."""
    goal = goal.detach()
    return (goal.exp() * (goal - view)).sum(-1)


def _log_probabilities(logits: Tensor) -> Tensor:
    """(B, T', V) in float32 at least."""
    at_least_float32 = logits if logits.dtype == torch.float64 else logits.float()
    return at_least_float32.log_softmax(-1)
