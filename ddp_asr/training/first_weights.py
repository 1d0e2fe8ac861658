"""The first weights of a run that starts from those of another one (`train.init_from`), for fine-tuning.

    lines = take_weights(model, config, tokeniser)     # what was taken and what is new, for the user

The encoder is taken whole. A classifier is taken by symbol: the row of each symbol that both runs write, and that of
the blank. The rows of other symbols stay random, and so does the classifier of a layer that has none in the other run.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ddp_asr.config import Config, config_from_dict
from ddp_asr.errors import UserError
from ddp_asr.model import AcousticModel
from ddp_asr.recognition.recogniser import Trained, read_trained
from ddp_asr.settings import differences
from ddp_asr.text import Tokeniser, tokeniser_from_state

_SHOWN = 12  # symbols named in a line


def take_weights(model: AcousticModel, config: Config, tokeniser: Tokeniser) -> list[str]:
    """Loads the weights of `train.init_from`, its moving average if there is one; says what was taken.

    Raises:
        UserError: there is no such checkpoint, or its encoder is another one.
    """
    try:
        trained = read_trained(config.train.init_from)
    except UserError as error:
        raise UserError(f"train.init_from: {error}") from None
    theirs, own = tokeniser_from_state(trained.tokeniser), model.state_dict()
    rows = _same_symbols(theirs, tokeniser)
    weights = {name: weight for name, weight in trained.weights.items() if name.startswith("encoder.")}
    new_layers = []
    for name, head in own.items():
        if name.startswith("encoder."):
            continue
        if name in trained.weights and trained.weights[name].shape[1:] == head.shape[1:]:
            weights[name] = _by_symbol(head, trained.weights[name], rows)
        else:
            weights[name] = head
            new_layers += [name.split(".")[1]] * name.endswith(".weight")
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[-1].strip()
        raise UserError(
            f"train.init_from = {trained.path} is of another model ({first}): take over its encoder settings"
        ) from None
    return list(_describe(trained, theirs, tokeniser, new_layers)) + _warnings(trained, config)


def _same_symbols(theirs: Tokeniser, ours: Tokeniser) -> Tensor:
    """int64 (2, N): their class and ours of each symbol that both have, and of the blank."""
    place = {symbol: number for number, symbol in enumerate(theirs.symbols)}
    pairs = [(place[symbol], number) for number, symbol in enumerate(ours.symbols) if symbol in place]
    return torch.tensor([*pairs, (theirs.blank, ours.blank)]).t()


def _by_symbol(head: Tensor, other: Tensor, rows: Tensor) -> Tensor:
    taken = head.clone()
    taken[rows[1]] = other[rows[0]].to(head)
    return taken


def _describe(trained: Trained, theirs: Tokeniser, ours: Tokeniser, new_layers: Sequence[str]) -> Iterator[str]:
    known, wanted = set(theirs.symbols), set(ours.symbols)
    new = [symbol for symbol in ours.symbols if symbol not in known]
    dropped = [symbol for symbol in theirs.symbols if symbol not in wanted]
    line = f"first weights from {trained.path} (step {trained.step}): the encoder, the blank"
    line += f" and {len(wanted) - len(new)} of {len(wanted)} symbols"
    line += f"; new are {_shown(new)}" if new else ""
    line += f"; not taken are {_shown(dropped)}" if dropped else ""
    line += f"; the classifier of layer {', '.join(new_layers)} is new" if new_layers else ""
    yield line


def _shown(symbols: Sequence[str]) -> str:
    more = f" and {len(symbols) - _SHOWN:,} more" if len(symbols) > _SHOWN else ""
    return " ".join(map(repr, symbols[:_SHOWN])) + more


def _warnings(trained: Trained, config: Config) -> list[str]:
    """Where weights fit that were trained on other input, such as another hop."""
    other = config_from_dict(trained.config, f"the checkpoint {trained.path}")
    return [
        f"WARNING: the weights were trained with {name} = {value!r}, and this run has {own!r}: set --{name} to the "
        "former"
        for name, own, value in differences(config, other)
        if name.startswith(("features.", "encoder.")) and not name.endswith("dropout")
    ]
