"""Forced alignment: at which frames a known text is said, and how well the recording agrees with it.

    log-probabilities (T', V), classes (U,)  --torchaudio's forced_align-->  path (T',) and symbols (U,): Alignment
    Alignment, times of the frames  --words_on (path.py)-->  words with start, end and confidence

The path is the most probable one of all that spell the text. The greedy decoder takes its words from a path by the same
function: its path is the most probable of all, so it is the alignment of the text that it spells.

The score of the whole is another figure than the confidence of words: how much less probable the path is than the best
path of all, for each symbol of the text. It counts the blanks, so it also falls where the recording says something that
the text leaves out, and it falls less where a noisy recording leaves the model in doubt of everything.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torchaudio.functional import forced_align

from ddp_asr.decoding.path import collapse, words_on
from ddp_asr.decoding.protocol import Word
from ddp_asr.text import Tokeniser

# Frames x symbols that are aligned at once: 4 s and 1 GB.
MOST_CELLS = 500_000_000


class Misfit(Exception):
    """A text that cannot be aligned with its recording; the message says why."""


@dataclass(frozen=True)
class Alignment:
    """The most probable path that spells a text, and the U symbols on it."""

    path: np.ndarray  # int64 (T',): the class of each frame
    path_log_p: np.ndarray  # float32 (T',): its log-probability
    start: np.ndarray  # int64 (U,): its first frame
    end: np.ndarray  # int64 (U,): the frame after its last
    log_p: np.ndarray  # float64 (U,): mean over its frames of its log-probability
    score: float  # 0 to 1; 1 where the path is the most probable of all


def why_not(symbols: int, repeats: int, frames: int) -> str:
    """Why CTC cannot align so many symbols, among them so many pairs of equal neighbours; "" where it can."""
    if not symbols:
        return "the text is empty after normalisation"
    if symbols + repeats > frames:
        return (
            f"the text needs {symbols + repeats:,} frames (symbols + adjacent equal ones), the recording has {frames:,}"
        )
    if frames * symbols > MOST_CELLS:
        return (
            f"{frames:,} frames x {symbols:,} symbols are more than {MOST_CELLS:,}, which is what is aligned at once: "
            "cut the recording and its text into parts"
        )
    return ""


def misfits(texts: Sequence[str], frames: Sequence[int], tokeniser: Tokeniser) -> list[str]:
    """For each text why it cannot be aligned with a recording of so many frames; "" where it can."""
    counts = tokeniser.count(texts)
    return [
        f"the model cannot write {foreign!r}" if foreign else why_not(symbols, repeats, row_frames)
        for foreign, symbols, repeats, row_frames in zip(
            counts.foreign, counts.length.tolist(), counts.repeats.tolist(), frames, strict=True
        )
    ]


def align(log_p: Tensor, classes: np.ndarray) -> Alignment:
    """The alignment of classes (U,) with log-probabilities (T', V), whose last class is the blank.

    Raises:
        Misfit: there are too few frames or too many, no classes, or no path that has a probability.
    """
    frames, blank = log_p.shape[0], log_p.shape[1] - 1
    if reason := why_not(len(classes), int((classes[1:] == classes[:-1]).sum()), frames):
        raise Misfit(reason)
    path, path_log_p = best_path(log_p, classes)
    log_p = log_p.detach().to("cpu", torch.float32)
    excess = float(path_log_p.sum(dtype=np.float64) - log_p.amax(-1).sum(dtype=torch.float64))
    if not np.isfinite(excess):
        raise Misfit("the model gives no path of this text a probability")
    _, start, end = collapse(path, blank)
    before = np.concatenate([[0.0], np.cumsum(path_log_p, dtype=np.float64)])
    of_symbols = (before[end] - before[start]) / (end - start)
    return Alignment(path, path_log_p, start, end, of_symbols, float(np.exp(excess / len(classes))))


def best_path(log_p: Tensor, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The most probable path (T',) that spells one or more classes (U,), and its log-probabilities (T',)."""
    log_p = log_p.detach().to("cpu", torch.float32).contiguous()
    targets = torch.as_tensor(classes, dtype=torch.int64)
    paths, scores = forced_align(log_p[None], targets[None], blank=log_p.shape[1] - 1)
    return paths[0].numpy(), scores[0].numpy()


def align_text(
    log_p: Tensor, text: str, tokeniser: Tokeniser, start_s: np.ndarray, end_s: np.ndarray
) -> tuple[list[Word], float]:
    """The words of a text with their times and confidence, and the score of the whole.

    Args:
        log_p: log-probabilities (T', V).
        start_s: (T',): when each frame begins; `end_s`: when it ends.

    Raises:
        Misfit: the text cannot be aligned.
    """
    (reason,) = misfits([text], [log_p.shape[0]], tokeniser)
    if reason:
        raise Misfit(reason)
    found = align(log_p, tokeniser.encode(text))
    words = []
    for word in words_on(found.path, found.path_log_p, tokeniser, frame_s=1.0):  # times are numbers of frames
        first, stop = round(word.start_s), round(word.end_s)
        words.append(replace(word, start_s=float(start_s[first]), end_s=float(end_s[stop - 1])))
    return words, found.score
