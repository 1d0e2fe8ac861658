"""Decoders: logits (B, T', V) and frames (B,) -> hypotheses with words, times and scores, one module a kind.

    decoder = make_decoder(config.decoder, tokeniser, frame_s=config.frame_s)

A new kind is a module with a class that keeps to protocol.py, its settings in config.py, and a line in `DECODERS`.
"""

from typing import Any

from ddp_asr.decoding.beam import Beam
from ddp_asr.decoding.greedy import Greedy
from ddp_asr.decoding.lexicon import Lexicon
from ddp_asr.decoding.protocol import Decoder, Hypothesis, Word
from ddp_asr.text import Tokeniser

__all__ = ["DECODERS", "Decoder", "Hypothesis", "Word", "make_decoder"]

# kind in the settings -> class, made from (its settings, tokeniser, seconds a frame)
DECODERS: dict[str, Any] = {
    "greedy": Greedy,
    "beam": Beam,
    "lexicon": Lexicon,
}


def make_decoder(settings: Any, tokeniser: Tokeniser, frame_s: float) -> Decoder:
    """The decoder that `settings.kind` names."""
    decoder: Decoder = DECODERS[settings.kind](settings, tokeniser, frame_s)
    return decoder
