"""The number types of a run: `auto` resolved against the hardware, autocast, and the gradient scaler of fp16.

    fp32   IEEE float32, TF32 off            tf32   float32 storage, TF32 matrix units (NVIDIA)
    bf16   autocast to bfloat16              fp16   autocast to float16, with a gradient scaler

Weights, optimiser and loss are float32 in all of them. `auto` looks at the hardware before it chooses: bfloat16 on a
CPU without AMX or AVX512-BF16 runs a hundred times slower than float32.
"""

import torch

from ddp_asr.errors import UserError

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def has_bf16_units(device: torch.device) -> bool:
    """Whether bfloat16 is fast here."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # Private in torch 2.11.0, which offers nothing public; should they go, the flags `avx512_bf16` and `amx_tile` of
    # /proc/cpuinfo say the same on Linux.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def resolve(precision: str, device: torch.device) -> str:
    """`auto` as what it means on this device; anything else as it is, checked."""
    if precision == "auto":
        return "bf16" if has_bf16_units(device) else "fp32"
    if precision in ("fp16", "tf32") and device.type != "cuda":
        raise UserError(f"train.precision = {precision} needs an NVIDIA GPU, and there is none: use auto, bf16 or fp32")
    return precision


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The context in which the model runs."""
    dtype = _AUTOCAST.get(precision)
    # Autocast's cache of cast weights lives for one context, which here is one micro-batch.
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def set_matmul_precision(precision: str) -> None:
    """TF32 on or off, for matrix products and cuDNN alike; cuDNN allows it by default."""
    allowed = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """The loss scaler, which does nothing but in fp16."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
