"""CTC loss of each utterance of a micro-batch: logits (B, T', V) -> loss / target length (B,).

In float32, outside autocast. The training loss of a step is the mean of these over *all* its utterances (DESIGN 2.5).
Micro-batches and ranks therefore only ever add: each contributes a weighted sum and a count, and the one division
follows the sum over all ranks.

Graves et al., "Connectionist temporal classification" (2006); the same mean as `nn.CTCLoss(reduction="mean")`.
"""

import torch
from torch import Tensor


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
        at_least_float32 = logits if logits.dtype == torch.float64 else logits.float()
        log_probabilities = at_least_float32.log_softmax(-1).transpose(0, 1)  # (T', B, V)
        losses = torch.nn.functional.ctc_loss(
            log_probabilities, targets, frames, target_lengths, blank=logits.shape[-1] - 1, reduction="none"
        )
        return losses / target_lengths.clamp(min=1)
