"""Texts aligned with their recordings by a trained model.

    shards            --eval_loader--> logits, a batch a time       --align_text--> Aligned, or Unaligned and why
    recording, text   --cut in pauses--> logits, a piece a time  --joined--> the same

The model and its features run on the recogniser's device, the alignment on the CPU, an utterance at a time. A long
recording goes through the model in pieces, as `transcribe` does it, and is aligned as a whole, so its text need not be
cut. That is possible up to MOST_CELLS of decoding/align.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ddp_asr import SAMPLE_RATE_HZ
from ddp_asr.data.index import Index
from ddp_asr.data.loader import eval_loader
from ddp_asr.decoding.align import Misfit, align_text, misfits
from ddp_asr.decoding.formats import Aligned, Unaligned
from ddp_asr.decoding.path import collapse
from ddp_asr.recognition.recogniser import Recogniser
from ddp_asr.recognition.transcription import batches_of, cut_in_pauses, logits_of


def align_corpus(recogniser: Recogniser, index: Index) -> Iterator[tuple[int, Aligned | Unaligned]]:
    """(row, result) of every utterance: first those whose text does not fit, which takes no audio, then by length."""
    config, tokeniser = recogniser.config, recogniser.tokeniser
    frames = config.encoder.output_frames(config.features.frames(index.samples))
    reasons = misfits(index.texts.to_pylist(), frames.tolist(), tokeniser)
    for row, reason in enumerate(reasons):
        if reason:
            yield row, Unaligned(index.key(row), tokeniser.normalise(index.text(row)), reason)
    fitting = np.flatnonzero([not reason for reason in reasons])
    usable, row_of_key = index.take(fitting), {index.key(row): row for row in fitting.tolist()}
    for batch in eval_loader(usable, tokeniser, config) if len(usable) else ():
        assert batch is not None, "one process has a batch in every round"
        logits, batch_frames = recogniser.logits(batch.waveforms, batch.samples)
        log_p = logits.float().log_softmax(-1).cpu()  # (B, T', V)
        for row, key, samples, length, weight in zip(
            range(len(log_p)), batch.keys, batch.samples.tolist(), batch_frames.tolist(), batch.weight, strict=True
        ):
            if weight:  # not the silent stand-in of an empty batch
                number = row_of_key[key]
                times = _frame_times(recogniser, slice(0, samples), length)
                seconds = samples / SAMPLE_RATE_HZ
                yield number, _align(recogniser, key, seconds, index.text(number), log_p[row, :length], *times)
        for key, reason in batch.bad:
            yield row_of_key[key], Unaligned(key, tokeniser.normalise(index.text(row_of_key[key])), reason)


def align_recording(
    recogniser: Recogniser, key: str, waveform: np.ndarray, text: str, longest_samples: int
) -> Aligned | Unaligned:
    """The alignment of a recording (S,) of any length, which goes through the model in pieces."""
    parts, starts_s, ends_s = [], [], []
    cut = cut_in_pauses(waveform, longest_samples)
    for batch in batches_of([piece.stop - piece.start for piece in cut]):
        pieces = cut[batch]
        logits, frames = logits_of(recogniser, [waveform[piece] for piece in pieces])
        log_p = logits.float().log_softmax(-1).cpu()
        for row, (piece, length) in enumerate(zip(pieces, frames.tolist(), strict=True)):
            start_s, end_s = _frame_times(recogniser, piece, length)
            parts.append(log_p[row, :length])
            starts_s.append(start_s)
            ends_s.append(end_s)
    seconds, times = len(waveform) / SAMPLE_RATE_HZ, (np.concatenate(starts_s), np.concatenate(ends_s))
    return _align(recogniser, key, seconds, text, torch.cat(parts), *times)


def _frame_times(recogniser: Recogniser, piece: slice, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """When each frame (T',) of a piece of a recording begins, and when it ends."""
    start_s = piece.start / SAMPLE_RATE_HZ + recogniser.config.frame_s * np.arange(frames)
    # The last frame of a piece may reach beyond its end, since strides round up.
    return start_s, np.minimum(start_s + recogniser.config.frame_s, piece.stop / SAMPLE_RATE_HZ)


def _align(
    recogniser: Recogniser, key: str, seconds: float, text: str, log_p: Tensor, start_s: np.ndarray, end_s: np.ndarray
) -> Aligned | Unaligned:
    tokeniser = recogniser.tokeniser
    normalised = tokeniser.normalise(text)
    try:
        words, score = align_text(log_p, text, tokeniser, start_s, end_s)
    except Misfit as misfit:
        return Unaligned(key, normalised, str(misfit))
    symbols, _, _ = collapse(log_p.argmax(-1).numpy(), tokeniser.blank)
    return Aligned(key, seconds, normalised, " ".join(tokeniser.decode(symbols).split()), score, words)
