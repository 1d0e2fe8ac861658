"""What a run takes over from the checkpoint of another one, symbol by symbol."""

import pytest
import torch

from ddp_asr.config import config_from_dict
from ddp_asr.errors import UserError
from ddp_asr.model import make_model
from ddp_asr.text import make_tokeniser
from ddp_asr.training.first_weights import take_weights
from tests.tiny_recogniser import SETTINGS, tiny_state, write_checkpoint

HEADS = ("classifier.weight", "classifier.bias")


def taking(path, **sections):
    """A model before and after it has taken the weights, and what was said."""
    config = config_from_dict({**SETTINGS, "train": {"init_from": str(path)}, **sections}, "the test")
    tokeniser = make_tokeniser(config.vocabulary)
    torch.manual_seed(3)
    model = make_model(config, tokeniser.size)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    lines = take_weights(model, config, tokeniser)
    return before, model.state_dict(), lines


@pytest.fixture
def theirs():
    return tiny_state()  # " ab'"


@pytest.fixture
def path(tmp_path, theirs):
    return write_checkpoint(tmp_path / "their.pt", theirs)


def test_equal_symbols_take_everything(path, theirs):
    _, after, lines = taking(path)
    assert all(torch.equal(after[name], weight) for name, weight in theirs["model"].items())
    assert lines == [f"first weights from {path} (step 7): the encoder, the blank and 4 of 4 symbols"]


def test_a_classifier_is_taken_symbol_by_symbol(path, theirs):
    before, after, lines = taking(path, vocabulary={"symbols": "b\u00e4 '"})
    for name in HEADS:
        head, other = after[name], theirs["model"][name]
        # their classes: blank 4, ' ' 0, a 1, b 2, ' 3
        assert torch.equal(head[[0, 2, 3, 4]], other[[2, 0, 3, 4]])
        assert torch.equal(head[1], before[name][1])
    assert all(torch.equal(after[name], w) for name, w in theirs["model"].items() if name not in HEADS)
    assert lines == [
        f"first weights from {path} (step 7): the encoder, the blank and 3 of 4 symbols; new are '\u00e4'; "
        "not taken are 'a'"
    ]


def test_long_lists_of_symbols_are_cut(path):
    _, _, (line,) = taking(path, vocabulary={"symbols": "cdefghijklmnopqrstuvwxyz"})
    assert "and 0 of 24 symbols; new are 'c' 'd'" in line and "'n' and 12 more; not taken are ' ' 'a' 'b'" in line


def test_the_classifier_of_an_intermediate_layer_is_taken_where_there_is_one(tmp_path, path):
    inner = {"objective": {"intermediate_weight": 0.3, "intermediate_layers": [1]}}
    before, after, (line,) = taking(path, **inner)
    assert line.endswith("; the classifier of layer 1 is new")
    assert torch.equal(after["intermediate.1.weight"], before["intermediate.1.weight"])
    with_inner = write_checkpoint(tmp_path / "inner.pt", tiny_state(**inner))
    _, after, (line,) = taking(with_inner, **inner)
    assert "layer" not in line and not torch.equal(after["intermediate.1.weight"], before["intermediate.1.weight"])
    taking(with_inner)  # without it, nothing is missing


def test_the_moving_average_is_taken(tmp_path, theirs):
    averages = {name: weight + 1 for name, weight in theirs["model"].items()}
    path = write_checkpoint(tmp_path / "average.pt", {**theirs, "averages": averages})
    _, after, _ = taking(path)
    assert all(torch.equal(after[name], weight) for name, weight in averages.items())


@pytest.mark.parametrize(
    "sections, named",
    [
        ({"features": {**SETTINGS["features"], "hop_ms": 10}}, "features.hop_ms = 12.5, and this run has 10.0"),
        (
            {"encoder": {**SETTINGS["encoder"], "time_strides": [4]}},
            r"encoder.time_strides = [2], and this run has [4]",
        ),
    ],
)
def test_weights_of_other_input_fit_with_a_warning(path, sections, named):
    _, _, (_, warning) = taking(path, **sections)
    assert warning.startswith(f"WARNING: the weights were trained with {named}: set --")


def test_another_encoder_is_refused(path):
    with pytest.raises(UserError, match=r"is of another model \(.*\): take over its encoder settings"):
        taking(path, encoder={**SETTINGS["encoder"], "rnn_size": 8})


def test_an_encoder_knows_its_lower_layers():
    config = config_from_dict({**SETTINGS, "encoder": {**SETTINGS["encoder"], "rnn_layers": 3}}, "the test")
    encoder = make_model(config, 5).encoder
    names = {id(parameter): name for name, parameter in encoder.named_parameters()}

    def lower(layers):
        return {names[id(parameter)] for parameter in encoder.lower_parameters(layers)}

    assert lower(0) == set(names.values())
    for layers in (1, 2, 3):
        assert {name.split(".")[1] for name in lower(layers) if name.startswith("rnn.")} == set(map(str, range(layers)))
        assert {name.split(".")[0] for name in lower(layers)} == {"strided", "blocks", "bridge", "rnn"}
