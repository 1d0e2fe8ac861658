"""The acoustic model: an encoder, a linear classifier over V symbols, and one for each layer with a loss of its own.

    features (B, T, F) --encoder--> hidden (B, T', D) --classifier--> logits (B, T', V)
                                    taps              --classifiers of their own--> intermediate logits, in training

An intermediate CTC loss makes a lower layer spell by itself: Lee and Watanabe, "Intermediate loss regularization for
CTC-based speech recognition" (2021). Its classifier is of no use after training, and does not run there.
"""

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ddp_asr.config import Config
from ddp_asr.encoders import Encoder, make_encoder
from ddp_asr.errors import UserError


class Output(NamedTuple):
    """What the model makes of a batch."""

    logits: Tensor  # (B, T', V), the blank last
    frames: Tensor  # (B,) T' of each row, on the CPU
    intermediate: list[Tensor]  # (B, T', V) of each intermediate layer, in training; else empty


class AcousticModel(nn.Module):
    """Encoder and classifiers."""

    def __init__(self, encoder: Encoder, classes: int, intermediate_layers: Sequence[int] = ()) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = nn.Linear(encoder.size, classes)
        self.intermediate = nn.ModuleDict(
            {str(layer): nn.Linear(encoder.tap_sizes[layer], classes) for layer in intermediate_layers}
        )

    def forward(
        self, features: Tensor, frames: Tensor, context: Sequence[int] | None = None, seeds: Tensor | None = None
    ) -> Output:
        """Features (B, T, F), zero beyond each row's own frames (B,); the arguments are those of `Encoder.forward`."""
        hidden, frames, taps = self.encoder(features, frames, context, seeds)
        intermediate = []
        if self.training:
            intermediate = [classify(taps[int(layer)]) for layer, classify in self.intermediate.items()]
        return Output(self.classifier(hidden), frames, intermediate)


def make_model(config: Config, classes: int, copies: int = 1) -> AcousticModel:
    """The model of the settings for so many classes, the blank included, with random weights.

    Args:
        copies: how often this machine's memory must hold the weights.

    Raises:
        UserError: it cannot.
    """

    def make() -> AcousticModel:
        encoder = make_encoder(config.encoder, config.features.mel_bands)
        layers = config.objective.intermediate_layers if config.objective.intermediate_weight else []
        return AcousticModel(encoder, classes, layers)

    with torch.device("meta"):  # tensors without memory
        parameters = count_parameters(make())
    needed_gb, has_gb = copies * 4 * parameters / 1e9, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    if needed_gb > has_gb:
        raise UserError(
            f"the model has {parameters:,} parameters, which need {needed_gb:,.0f} GB, and this machine has "
            f"{has_gb:,.0f} GB of memory: lower the sizes in encoder"
        )
    return make()


def count_parameters(model: nn.Module) -> int:
    """Trainable numbers."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
