"""The same training as when tests/golden_losses.json was recorded."""

import json

import pytest

from tests import golden

# Of another CPU; on the one that recorded them they are the same digits.
TOLERANCE = {"one view": 1e-4, "two views": 1e-4, "two views in bf16": 0.03}


@pytest.mark.slow
@pytest.mark.parametrize("world_size", golden.WORLD_SIZES)
@pytest.mark.parametrize("case", golden.CASES)
def test_losses_and_gradient_norms_are_those_recorded(tiny_corpus, tmp_path, case, world_size):
    recorded = json.loads(golden.RECORDED.read_text())[case][str(world_size)]
    found = golden.steps_of(tiny_corpus, tmp_path, case, world_size)
    assert len(found) == len(recorded) == golden.STEPS
    for step, (now, then) in enumerate(zip(found, recorded, strict=True), start=1):
        assert now == pytest.approx(then, rel=TOLERANCE[case]), f"step {step}"
