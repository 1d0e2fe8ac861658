"""What `auto` becomes on which hardware, what is refused where, and what each precision switches."""

import pytest
import torch

from ddp_asr.errors import UserError
from ddp_asr.training.precision import autocast, make_scaler, resolve, set_matmul_precision

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("avx512, amx, expected", [(0, 0, "fp32"), (1, 0, "bf16"), (0, 1, "bf16"), (1, 1, "bf16")])
def test_auto_on_a_cpu_asks_for_its_bf16_units(avx512, amx, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(avx512))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx))
    assert resolve("auto", CPU) == expected


@pytest.mark.parametrize("units, expected", [(True, "bf16"), (False, "fp32")])
def test_auto_on_a_gpu_wants_real_bf16_and_no_emulation(units, expected, monkeypatch):
    def is_bf16_supported(including_emulation=True):
        return units or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert resolve("auto", CUDA) == expected


@pytest.mark.parametrize("precision", ["bf16", "fp16", "tf32", "fp32"])
def test_what_is_asked_for_by_name_is_taken_or_refused_in_one_sentence(precision):
    assert resolve(precision, CUDA) == precision
    if precision in ("bf16", "fp32"):
        assert resolve(precision, CPU) == precision
        return
    with pytest.raises(UserError, match=f"train.precision = {precision} needs an NVIDIA GPU.*use auto, bf16 or fp32"):
        resolve(precision, CPU)


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_autocast_covers_products_and_leaves_float32_to_fp32(precision, dtype):
    with autocast(precision, CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


@pytest.fixture
def backends():
    """Where TF32 can be allowed; as it was afterwards."""
    found = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in found]
    yield found
    for backend, allowed in zip(found, before, strict=True):
        backend.allow_tf32 = allowed


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16", "tf32"])
def test_tf32_is_a_precision_of_its_own(precision, backends):
    for before in (True, False):  # cuDNN allows it by default
        for backend in backends:
            backend.allow_tf32 = before
        set_matmul_precision(precision)
        assert [backend.allow_tf32 for backend in backends] == [precision == "tf32"] * 2


def test_a_scaler_that_scales_nothing_but_in_fp16():
    scalers = {precision: make_scaler(precision, CPU) for precision in ("fp32", "tf32", "bf16", "fp16")}
    assert {precision for precision, scaler in scalers.items() if scaler.is_enabled()} == {"fp16"}
    assert scalers["bf16"].scale(torch.tensor(3.0)) == 3.0
    assert scalers["fp16"].scale(torch.tensor(3.0)) > 3.0
