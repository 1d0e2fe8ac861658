"""Layer normalisation in its input's type on every device."""

import torch
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` that gives what it gets: bfloat16 under a bfloat16 autocast; it sums in float32 all the same.

    Under CUDA's autocast `nn.LayerNorm` returns float32, and under the CPU's its input's type. In float32 its output
    and that of the GELU behind it, both kept for the backward pass, would take twice the memory.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            # CUDA's kernel takes weights of the input's type alone.
            return nn.functional.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype))
