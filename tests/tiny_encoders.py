"""Small settings of every registered encoder, for the tests that run over all of them.

A new kind of encoder adds its lines here, and gets all of these tests: tests/test_encoders.py, the properties over
processes (tests/test_properties.py), the estimate of a dry run (tests/test_dry_run.py).
"""

from ddp_asr import config
from ddp_asr.encoders import ENCODERS, Encoder, make_encoder

MEL_BANDS = 16

# Settings under `encoder`, by kind; several where a kind has several ways to change lengths.
SETTINGS: dict[str, list[dict]] = {
    "rescnn_bigru": [
        {"conv_channels": 3, "time_strides": strides, "residual_blocks": 2, "rnn_layers": 2, "rnn_size": 8}
        for strides in ([2], [1], [2, 1], [2, 2], [3, 2])
    ],
    "conformer": [
        {**sizes, "conv_channels": 3, "time_strides": strides, "blocks": 2, "feed_forward_factor": 2}
        for sizes, strides in (
            ({"size": 16, "heads": 2, "kernel": 5}, [2]),
            ({"size": 8, "heads": 1, "kernel": 1}, [1]),
            ({"size": 8, "heads": 1, "kernel": 15}, [2, 2]),
            ({"size": 8, "heads": 1, "kernel": 3}, [2, 2, 2]),
            ({"size": 16, "heads": 1, "kernel": 7}, [3, 2]),
        )
    ],
}
# Large enough to learn a few utterances by heart in a hundred steps.
ABLE: dict[str, dict] = {
    "rescnn_bigru": {"conv_channels": 8, "time_strides": [2, 2], "residual_blocks": 1, "rnn_layers": 2, "rnn_size": 64},
    "conformer": {"conv_channels": 16, "size": 64, "blocks": 3, "heads": 2, "kernel": 9},
}
CASES = [
    (kind, number) for kind in ENCODERS for number in range(len(SETTINGS[kind]))
]  # fails at import where a registered kind has no settings here


def settings_of(kind: str, number: int = 0, **changes):
    """The settings object of a case."""
    tree = {"encoder": {"kind": kind, "dropout": 0.0, **SETTINGS[kind][number], **changes}}
    return config.config_from_dict({"features": {"mel_bands": MEL_BANDS, "n_fft": 512}, **tree}, "the test")


def encoder_of(kind: str, number: int = 0, **changes) -> Encoder:
    """An encoder with all its parts, its weights drawn from a fixed seed, that drops nothing out."""
    import torch

    torch.manual_seed(0)
    return make_encoder(settings_of(kind, number, **changes).encoder, MEL_BANDS).eval()
