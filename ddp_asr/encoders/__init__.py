"""Encoders: log-mel features (B, T, F) and frames (B,) -> hidden states (B, T', D), one module a kind.

    encoder = make_encoder(config.encoder, mel_bands=config.features.mel_bands)

A new kind is a module with a class that keeps the promises in protocol.py, its settings in config.py, and a line in
`ENCODERS`; the tests run over all that are registered.
"""

from typing import Any

from ddp_asr.encoders.conformer import Conformer
from ddp_asr.encoders.dropout import number_sites
from ddp_asr.encoders.protocol import Encoded, Encoder
from ddp_asr.encoders.rescnn_bigru import ResCNNBiGRU

__all__ = ["ENCODERS", "Encoded", "Encoder", "make_encoder"]

# kind in the settings -> class, made from (its settings, mel bands)
ENCODERS: dict[str, Any] = {
    "rescnn_bigru": ResCNNBiGRU,
    "conformer": Conformer,
}


def make_encoder(settings: Any, mel_bands: int) -> Encoder:
    """The encoder that `settings.kind` names, with random weights."""
    encoder: Encoder = ENCODERS[settings.kind](settings, mel_bands)
    number_sites(encoder)
    return encoder
