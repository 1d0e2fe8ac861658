"""Train CTC speech recognisers: exact epochs, batches by duration, the same training at any number of processes.

The way of an utterance (docs/architecture.md#the-way-of-an-utterance says more)::

    shard --tar + index--> data/index --rows--> data/plan --micro-batches--> data/loader --int16 waveforms (B, S)-->
    features --log-mel (B, T, F)--> encoders --hidden (B, T', D)--> model --logits (B, T', V)--> objective
    --losses (B,)--> training --> runs (checkpoints, metrics)
    evaluate, transcribe: the same way to the logits --> decoding --hypotheses--> text/score

Axes, the same letters in every module:

    B   utterances in a micro-batch
    S   samples at 16 kHz, of the longest utterance in the micro-batch
    T   feature frames            T'  frames after the encoder's strides
    F   mel bands                 V   symbols with the blank, which is the last
    U   target symbols            D   size of a hidden state
    K   micro-batches in a step   W   processes (the world size), W <= K

Importing the package imports nothing else: `--help` and the launchers answer without loading torch. `load` is the
interface for programs (docs/api.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from ddp_asr.api import Recogniser

__version__ = "0.1.0"

SAMPLE_RATE_HZ = 16_000


def load(
    checkpoint: str | Path,
    *,
    decoder: str | Path | None = None,
    cut: str | None = None,
    piece_seconds: float | None = None,
) -> Recogniser:
    """The recogniser of a run directory or a checkpoint, on the GPU if there is one.

    Args:
        checkpoint: a checkpoint file, or a run directory: its best.pt, else its newest.
        decoder: YAML file with a section 'decoder' to use in place of the run's, such as `ddp-asr tune` writes.
        cut: how recordings are cut that are longer than a piece, "pauses" or "voice" (silero-vad, extra `vad`); the
            latter by default where that is installed.
        piece_seconds: longest piece recognised at once; by default the longest utterance that was trained on.

    Raises:
        UserError: there is no good checkpoint, or an argument cannot be used.
    """
    from ddp_asr.api import Recogniser

    return Recogniser(checkpoint, decoder=decoder, cut=cut, piece_seconds=piece_seconds)
