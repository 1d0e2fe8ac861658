"""Train CTC speech recognisers: exact epochs, batches by duration, the same training at any number of processes.

The way of an utterance, one module a stage::

    shard --tar + index--> index --rows--> plan --micro-batches--> loader --int16 waveforms (B, S), lengths-->
    features --log-mel (B, T, F)--> model --logits (B, T', V)--> loss --> trainer --> checkpoint -->
    evaluate --> decode --> score

Axes, the same letters in every module:

    B   utterances in a micro-batch
    S   samples at 16 kHz, of the longest utterance in the micro-batch
    T   feature frames            T'  frames after the encoder's strides
    F   mel bands                 V   symbols with the blank, which is the last
    U   target symbols
    K   micro-batches in a step   W   processes (the world size), W <= K

Importing the package imports nothing else: `--help` and the launchers answer without loading torch.
"""

__version__ = "0.1.0"

SAMPLE_RATE_HZ = 16_000
