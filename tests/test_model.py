"""The acoustic model: the tutorial's size, and classifiers behind intermediate layers in training alone."""

import pytest
import torch

from ddp_asr import config
from ddp_asr.encoders import ENCODERS
from ddp_asr.model import AcousticModel, count_parameters, make_model
from tests.tiny_encoders import MEL_BANDS, encoder_of


def test_the_default_sizes_are_the_tutorials():
    defaults = config.Config()
    assert count_parameters(make_model(defaults, len(defaults.vocabulary.symbols) + 1)) == 23_705_373


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_intermediate_classifier_reads_its_layer_in_training_alone(kind):
    encoder = encoder_of(kind)
    plain = AcousticModel(encoder, 6).double().eval()
    model = AcousticModel(encoder, 6, [1]).double().eval()
    model.classifier = plain.classifier
    features, frames = torch.randn(2, 40, MEL_BANDS, dtype=torch.float64), torch.tensor([40, 33])
    assert torch.equal(model(features, frames).logits, plain(features, frames).logits)
    assert model(features, frames).intermediate == []

    logits, _, (intermediate,) = model.train()(features, frames)
    assert intermediate.shape == logits.shape
    assert count_parameters(model) - count_parameters(plain) == encoder.tap_sizes[1] * 6 + 6
    intermediate.sum().backward()
    reached = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert {"intermediate.1.weight", "intermediate.1.bias"} < reached
    assert not any(name.startswith("classifier") for name in reached)
    unreached = {name for name, _ in model.named_parameters()} - reached
    assert {"classifier.weight", "classifier.bias"} <= unreached
    if len(encoder.tap_sizes) > 1:  # nothing above the layer is reached
        assert any(name.startswith("encoder.") for name in unreached)


def test_the_settings_decide_whether_there_is_one():
    tree = {"objective": {"intermediate_weight": 0.3, "intermediate_layers": [2, 3]}}
    model = make_model(config.config_from_dict(tree, "the test"), 29)
    assert list(model.intermediate) == ["2", "3"]
    assert list(make_model(config.Config(), 29).intermediate) == []
