"""Weighted automata: what each symbol adds to the score of a text, and the state after it.

    state, symbol  --gain-->  what the symbol adds
    state, symbol  --step-->  the state after it

A beam search advances many texts at once. So both take tensors of states and symbols, which broadcast together, and
run on their device without a loop over texts. A language model is an automaton (ngram.py), and so are the bonuses for
symbols, words and hot words (bonuses.py).
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor


class Automaton(Protocol):
    """What a search reads; each kind is a dataclass of tensors."""

    @property
    def end(self) -> Tensor:
        """(states,): what the end of the text adds."""
        ...

    @property
    def start(self) -> int:
        """The state before the first symbol."""
        ...

    def gain(self, state: Tensor, symbol: Tensor) -> Tensor: ...

    def step(self, state: Tensor, symbol: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Table:
    """An automaton as a table: each of its functions is one gather."""

    log_p: (
        Tensor  # (states, symbols): what a symbol adds; of a language model the natural logarithm of p(symbol | state)
    )
    next_state: Tensor  # int64 (states, symbols)
    end: Tensor  # (states,)
    start: int

    def gain(self, state: Tensor, symbol: Tensor) -> Tensor:
        return self.log_p[state, symbol]

    def step(self, state: Tensor, symbol: Tensor) -> Tensor:
        return self.next_state[state, symbol]


def move(automaton: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The automaton on a device, what it adds to scores in this dtype."""
    tensors = {name: value for name, value in vars(automaton).items() if isinstance(value, Tensor)}
    return replace(
        automaton,
        **{name: value.to(device, dtype if value.is_floating_point() else None) for name, value in tensors.items()},
    )
