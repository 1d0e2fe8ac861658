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

TABLE_LIMIT_MB = 1024.0  # larger language models stay arcs


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


@dataclass(frozen=True)
class Arcs:
    """A language model as sorted arcs, for models whose table would be too large; what it adds has the same bits.

    Where a state has no arc of a symbol, the symbol adds what it adds after the state's suffix, and the back-off
    weight; it leads to where it leads after the suffix. State 0, the empty context, has an arc of each symbol, and
    they are the first. The suffixes of a state are walked from the shortest to the state itself, so each level is one
    binary search for all texts and symbols. (The idea is that of NGPU-LM in NeMo, Bataev et al. 2025.)
    """

    key: Tensor  # int64 (arcs + 1,): state * columns + column, rising; the last one is above all others
    log_p: Tensor  # (arcs + 1,)
    next_state: Tensor  # int32 (arcs + 1,): -1 where the next state is that of the suffix
    suffix: Tensor  # int32 (states,): the longest proper suffix of a state
    back_off: Tensor  # (states,): natural logarithm
    end: Tensor  # (states,)
    column: Tensor  # int64 (symbols,): several symbols may be <unk>
    columns: int
    order: int  # at most order - 1 suffixes of a state follow each other, the empty one included
    start: int

    def gain(self, state: Tensor, symbol: Tensor) -> Tensor:
        return self.look_up(state, symbol)[0]

    def step(self, state: Tensor, symbol: Tensor) -> Tensor:
        return self.look_up(state, symbol)[1]

    @property
    def table_mb(self) -> float:
        """What `table` needs, in 10^6 bytes."""
        return len(self.end) * (12 * len(self.column) + 4) / 1e6

    @property
    def summary(self) -> str:
        """How large the model is in a search."""
        size = f"{len(self.end):,} states x {len(self.column)} symbols"
        if self.table_mb <= TABLE_LIMIT_MB:
            return f"a table of {size}, {self.table_mb:,.1f} MB"
        arcs_mb = (16 * len(self.key) + 12 * len(self.end)) / 1e6
        return f"{len(self.key) - 1:,} arcs of {size}, {arcs_mb:,.1f} MB"

    def table(self) -> Table:
        """The same as a table."""
        symbol = torch.arange(len(self.column))
        log_p = torch.empty(len(self.end), len(symbol))
        next_state = torch.empty(log_p.shape, dtype=torch.int64)
        for state in torch.arange(len(self.end)).split(1 << 14):  # look_up needs several times their rows
            log_p[state], next_state[state] = self.look_up(state[:, None], symbol)
        return Table(log_p, next_state, self.end, self.start)

    def look_up(self, state: Tensor, symbol: Tensor) -> tuple[Tensor, Tensor]:
        """What the symbol adds, and the next state."""
        column = self.column[symbol]
        states = [state]
        for _ in range(self.order - 2):
            states.append(self.suffix[states[-1]].long())
        log_p, next_state = self.log_p[column], self.next_state[column].clamp(min=0)
        for state in reversed(states):
            wanted = state * self.columns + column
            place = torch.searchsorted(self.key, wanted)
            found, leads_to = self.key[place] == wanted, self.next_state[place]
            log_p = torch.where(found, self.log_p[place], log_p + self.back_off[state])
            next_state = torch.where(found & (leads_to >= 0), leads_to, next_state)
        return log_p, next_state.long()


def move(automaton: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """The automaton on a device, what it adds to scores in this dtype."""
    tensors = {name: value for name, value in vars(automaton).items() if isinstance(value, Tensor)}
    return replace(
        automaton,
        **{name: value.to(device, dtype if value.is_floating_point() else None) for name, value in tensors.items()},
    )
