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

Importing the package imports nothing else: `--help` and the launchers answer without loading torch.
"""

__version__ = "0.1.0"

SAMPLE_RATE_HZ = 16_000
