"""What every encoder offers; the model, the objective and the tests know encoders by this alone.

    encoder(features (B, T, F), frames (B,), context, seeds) -> Encoded: hidden (B, T', D), frames (B,), taps

Numbers of frames are on the CPU, also where the features are on a GPU: whoever needs a length as a number (CTC, the
decoder) then does not wait for the GPU. `frame_mask` sends them there.

An encoder has to keep three promises, which tests/test_encoders.py checks for each registered kind:

- Padding is invisible: a row's hidden states are the same alone and beside longer rows (1e-5 relative in float32,
  1e-10 in float64). Frames beyond a row's own are zero before every operation that looks at neighbours.
- Its length arithmetic is that of its settings: T' = `settings.output_frames(T)`, which the plan uses before there is
  any tensor.
- Nothing couples the rows, dropout neither: it is `encoders.dropout.Dropout`, which drops by the row's own seed.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn


class Encoded(NamedTuple):
    """What an encoder makes of a batch."""

    hidden: Tensor  # (B, T', D)
    frames: Tensor  # (B,) T' of each row, on the CPU
    taps: dict[int, Tensor]  # hidden states (B, T', D of the layer) behind each layer, by its number from 1


class Encoder(nn.Module):
    """Log-mel features to hidden states."""

    layers_name: str
    """The attribute that is the list of layers; what stands before it in the order of attributes runs before it."""
    size: int  # D of `hidden`
    tap_sizes: dict[int, int]  # D behind each layer, by its number from 1

    def forward(
        self, features: Tensor, frames: Tensor, context: Sequence[int] | None = None, seeds: Tensor | None = None
    ) -> Encoded:
        """Encodes a batch.

        Args:
            features: (B, T, F), zero beyond each row's own frames.
            frames: (B,) T of each row, on the CPU.
            context: a number for each row: the layers that look along time begin anew after so many frames of T', so
                that a row knows nothing from further away; 0: no restriction. None: none for any row.
            seeds: int64 (B,) what each row's dropout is drawn from; needed in training with dropout alone.
        """
        raise NotImplementedError

    def lower_parameters(self, layers: int) -> list[nn.Parameter]:
        """The weights of so many layers, from the features on, and of what comes before them; of all with 0 layers."""
        if not layers:
            return list(self.parameters())
        lower: list[nn.Parameter] = []
        for name, child in self.named_children():
            if name == self.layers_name:
                assert isinstance(child, nn.ModuleList)
                return lower + list(child[:layers].parameters())
            lower += child.parameters()
        raise AttributeError(f"the encoder has no layers called {self.layers_name}")
