"""Greedy decoding: the most probable symbol of each frame, and the time at which the words lie.

    logits (B, T', V), frames (B,)  --argmax a frame-->  path (B, T')  --collapse-->  symbols  --tokeniser-->  text

Words are parted by single spaces with none at the ends, because a space, a blank and a space again would otherwise
count as a wrong character. Their times and confidence come from the same path (see path.py).
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ddp_asr import config
from ddp_asr.decoding.path import words_on
from ddp_asr.decoding.protocol import Hypothesis
from ddp_asr.text import Tokeniser


@dataclass(frozen=True)
class Greedy:
    """The decoder; its score is the log-probability of the best path, not of all paths that spell the text."""

    settings: config.Greedy
    tokeniser: Tokeniser
    frame_s: float  # from one frame of the logits to the next

    def __call__(self, logits: Tensor, frames: Tensor) -> list[Hypothesis]:
        best = logits.detach().argmax(-1, keepdim=True)  # (B, T', 1)
        log_probabilities = logits.detach().float().log_softmax(-1).gather(-1, best)
        # Two copies from the device for the whole batch, of a number a frame each and not of logits.
        paths, scores = best[:, :, 0].cpu().numpy(), log_probabilities[:, :, 0].cpu().numpy()  # (B, T')
        return [
            self._hypothesis(path[:length], score[:length])
            for path, score, length in zip(paths, scores, frames.tolist(), strict=True)
        ]

    def _hypothesis(self, path: np.ndarray, log_p: np.ndarray) -> Hypothesis:
        words = words_on(path, log_p, self.tokeniser, self.frame_s)
        return Hypothesis(" ".join(word.text for word in words), words, float(log_p.sum(dtype=np.float64)))
