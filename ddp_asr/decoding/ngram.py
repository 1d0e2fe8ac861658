"""N-gram language models: ARPA files in and out, and the automaton that a search reads.

    lm.arpa[.gz]  --read_arpa-->  NGramModel  --arcs(symbols)-->  Arcs (automaton.py)
    NGramModel  --write_arpa-->  lm.arpa[.gz]

The model is a trie: the n-grams of one length are sorted by (prefix, symbol), and a prefix is a place among the n-grams
that are one symbol shorter. An ARPA file holds base-10 logarithms and so does the model; the arcs have natural ones,
as the log-probabilities of the network are.

The states are the contexts that make a difference: the empty one, and each that has a longer n-gram or a back-off
weight. The state of a history is the longest of its suffixes among them. An arc is an n-gram: from the state of its
context, with its last symbol, to the state of the whole. Where a state has no arc of a symbol, its longest proper
suffix decides, with the back-off weight.
"""

from __future__ import annotations

import gzip
import math
import re
from array import array
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, NoReturn

import numpy as np
import torch

from ddp_asr.decoding.automaton import Arcs
from ddp_asr.errors import UserError
from ddp_asr.files import open_lines, writing_aside

UNKNOWN, START, END = "<unk>", "<s>", "</s>"
SPACE = "<space>"  # how an ARPA file writes " ", because spaces part its symbols
PIECE_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # and that of a word piece, as all programs that use sentencepiece write it
_LN_10 = math.log(10)
_LARGEST_WEIGHT = 1e6  # a log10 far beyond what a model has; larger ones are infinite in float32
_NAMES_SHOWN = 5


@dataclass(frozen=True, eq=False)
class NGrams:
    """The N n-grams of one length, sorted by (prefix, symbol)."""

    prefix: np.ndarray  # int64 (N,): place of the n-gram without its last symbol; 0 for unigrams
    symbol: np.ndarray  # int64 (N,): the last symbol
    log10_p: np.ndarray  # float64 (N,)
    log10_back_off: np.ndarray  # float64 (N,): 0 where no longer n-gram begins with this one

    def __len__(self) -> int:
        return len(self.symbol)


@dataclass(frozen=True, eq=False)
class NGramModel:
    """An n-gram model with back-off weights."""

    symbols: tuple[str, ...]
    """The symbols by number; <s> and </s> are among them, <unk> may be."""
    orders: tuple[NGrams, ...]
    """By length, from 1; the unigrams are in the order of the symbols."""

    @property
    def order(self) -> int:
        """Length of the longest n-grams."""
        return len(self.orders)

    def members(self, length: int) -> np.ndarray:
        """int64 (N, length): the symbols of the n-grams of one length."""
        ngrams = self.orders[length - 1]
        if length == 1:
            return ngrams.symbol[:, None]
        return np.column_stack([self.members(length - 1)[ngrams.prefix], ngrams.symbol])

    def arcs(self, symbols: Sequence[str]) -> Arcs:
        """The model over what each class of a recogniser writes, in class order and without the blank.

        A symbol that the model does not have gets the probability of <unk>.

        Raises:
            UserError: the model is one of other symbols.
        """
        classes = self._numbers_of(symbols)  # (symbols,)
        used = list(dict.fromkeys(classes))  # several classes may be <unk>
        column = np.full(len(self.symbols), -1)
        column[used] = np.arange(len(used))
        states, count = self._states(column)
        arcs = Arcs(
            key=torch.tensor([count * len(used)]),  # of no arc, so that each search ends at a place
            log_p=torch.zeros(1),
            next_state=torch.zeros(1, dtype=torch.int32),
            suffix=torch.zeros(count, dtype=torch.int32),
            back_off=torch.zeros(count),
            end=torch.full((count,), -math.inf),
            column=torch.arange(len(used)),
            columns=len(used),
            order=self.order,
            start=max(0, int(states[0][self.symbols.index(START)])),
        )
        begins = np.zeros(len(self.symbols), np.int64)  # the state that each n-gram of this length begins with
        for length, (ngrams, own) in enumerate(zip(self.orders, states, strict=True), 1):
            arcs = self._extended(arcs, ngrams, begins, column[ngrams.symbol], own)
            if length < self.order:
                begins = own[self.orders[length].prefix]
        return replace(arcs, column=torch.from_numpy(column[classes]))

    def _extended(self, arcs: Arcs, ngrams: NGrams, begins: np.ndarray, columns: np.ndarray, own: np.ndarray) -> Arcs:
        """The arcs with those of n-grams that are one symbol longer; fills `suffix`, `back_off` and `end` in place.

        Args:
            begins: the state that each n-gram begins with, -1 where that is none.
            own: the state that each n-gram is, -1 where it is none.
        """
        log_p = torch.from_numpy(ngrams.log10_p * _LN_10).float()
        ends = np.flatnonzero((begins >= 0) & (ngrams.symbol == self.symbols.index(END)))
        arcs.end[begins[ends]] = log_p[ends]
        within = np.flatnonzero((begins >= 0) & (columns >= 0))
        known = within[own[within] >= 0]
        if len(arcs.key) > 1:  # the suffix of a unigram is the empty context
            before = arcs.suffix[begins[known]].long()
            arcs.suffix[own[known]] = arcs.step(before, torch.from_numpy(columns[known])).int()
        rows = own[own >= 0]
        arcs.back_off[rows] = torch.from_numpy(ngrams.log10_back_off[own >= 0] * _LN_10).float()
        arcs.end[rows] = arcs.end[arcs.suffix[rows]] + arcs.back_off[rows]
        keys = begins[within] * arcs.columns + columns[within]
        order = np.argsort(keys)  # states are numbered in the order of their n-grams, and columns are not
        longer = (torch.from_numpy(keys[order]), log_p[within[order]], torch.from_numpy(own[within[order]]).int())
        key, log_p, next_state = (
            torch.cat([former[:-1], values, former[-1:]])
            for former, values in zip((arcs.key, arcs.log_p, arcs.next_state), longer, strict=True)
        )
        return replace(arcs, key=key, log_p=log_p, next_state=next_state)

    def _numbers_of(self, symbols: Sequence[str]) -> list[int]:
        number = {text: place for place, text in enumerate(self.symbols)}
        missing = [text for text in symbols if text not in number]
        foreign = set(number) - {UNKNOWN, START, END} - set(symbols)
        # A model of a text without a "z" is a good one, and so is one that also has digits. One that lacks some symbols
        # and has others instead is one of words, of capitals or with another sign for the space.
        if missing and (foreign or UNKNOWN not in number):
            has = f" and has {_named(sorted(foreign))}, which the recogniser cannot write" if foreign else " or <unk>"
            raise UserError(
                f"the language model does not have the recogniser's {_named(missing)}{has}: it is one of other "
                "symbols; make one with python -m ddp_asr.lm TEXT --run RUN --out lm.arpa"
            )
        return [number.get(text, number.get(UNKNOWN, -1)) for text in symbols]

    def _states(self, column: np.ndarray) -> tuple[list[np.ndarray], int]:
        """For each length the state of each n-gram, -1 where it is none, and the number of states; 0 is the empty one.

        Symbols without a column are never written, so contexts that hold one are no states.
        """
        start, end = self.symbols.index(START), self.symbols.index(END)
        states, count = [], 1
        reachable = column >= 0  # of unigrams
        reachable[start] = True
        for ngrams, longer in zip(self.orders[:-1], self.orders[1:], strict=True):
            follows = (column[longer.symbol] >= 0) | (longer.symbol == end)
            extended = np.zeros(len(ngrams), bool)
            extended[longer.prefix[follows]] = True
            is_state = reachable & (extended | (ngrams.log10_back_off != 0))
            states.append(np.where(is_state, count - 1 + np.cumsum(is_state), -1))
            count += int(is_state.sum())
            reachable = reachable[longer.prefix] & (column[longer.symbol] >= 0)
        states.append(np.full(len(self.orders[-1]), -1))  # the longest are no contexts
        return states, count


def _named(symbols: Sequence[str]) -> str:
    shown = ", ".join(map(repr, symbols[:_NAMES_SHOWN]))
    more = len(symbols) - _NAMES_SHOWN
    return f"{shown} and {more:,} more" if more > 0 else shown


# ---- ARPA files ----------------------------------------------------------------------------------------------------


def write_arpa(model: NGramModel, path: Path) -> None:
    """Writes the model; compressed where the name ends in .gz. The same model gives the same bytes.

    Raises:
        OSError: the file cannot be written.
    """
    with writing_aside(path) as file:
        if path.name.endswith(".gz"):
            # Without a name and a time in the header. Level 9 takes seven times as long for 5 % less.
            with gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0) as compressed:
                _write(model, compressed)
        else:
            _write(model, file)


def _write(model: NGramModel, file: IO[bytes] | gzip.GzipFile) -> None:
    counts = "".join(f"ngram {length}={len(ngrams)}\n" for length, ngrams in enumerate(model.orders, 1))
    file.write(f"\\data\\\n{counts}".encode())
    texts = [SPACE if symbol == " " else symbol.replace(" ", PIECE_SPACE) for symbol in model.symbols]
    written = [""]  # the n-grams one shorter
    for length, ngrams in enumerate(model.orders, 1):
        parts = zip(ngrams.prefix.tolist(), ngrams.symbol.tolist(), strict=True)
        written = [f"{written[prefix]} {texts[symbol]}".lstrip(" ") for prefix, symbol in parts]
        file.write(f"\n\\{length}-grams:\n".encode())
        rows = zip(ngrams.log10_p.tolist(), written, ngrams.log10_back_off.tolist(), strict=True)
        if length < model.order:
            file.writelines(f"{p:.8g}\t{text}\t{back_off:.8g}\n".encode() for p, text, back_off in rows)
        else:
            file.writelines(f"{p:.8g}\t{text}\n".encode() for p, text, _ in rows)
    file.write(b"\n\\end\\\n")


def read_arpa(path: Path) -> NGramModel:
    """Reads an ARPA file of any program, compressed with gzip or not.

    Raises:
        UserError: there is no such file, or it is no whole and valid ARPA file.
    """
    with open_lines(path, "name an .arpa or .arpa.gz file") as lines:
        return _Reader(path, lines).model()


class _Reader:
    """Reads an ARPA file line by line: headers begin with a backslash, n-grams with a number."""

    def __init__(self, path: Path, lines: Iterable[bytes]) -> None:
        self.path = path
        self.line_number = 0
        self.lines = self._filled(lines)

    def _filled(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        """The lines that are not empty, without white space at their ends."""
        for self.line_number, line in enumerate(lines, 1):
            if line := line.strip():
                yield line

    def _fail(self, wrong: str) -> NoReturn:
        raise UserError(
            f"{self.path}, line {self.line_number}: {wrong}; copy the file or make the language model again"
        )

    def _next(self, where: str) -> bytes:
        line = next(self.lines, None)
        if line is None:
            self._fail(f"the file ends {where}, so it was cut")
        return line

    def model(self) -> NGramModel:
        counts = self._counts()
        numbers: defaultdict[bytes, int] = defaultdict()
        numbers.default_factory = numbers.__len__  # each new symbol gets the next number
        members, *values = self._rows(1, counts, numbers)
        numbers.default_factory = None
        if len(numbers) < counts[0]:
            self._fail("a 1-gram is there twice")
        if missing := [text for text in (START, END) if text.encode() not in numbers]:
            self._fail(f"there is no {' and no '.join(missing)} among the 1-grams")
        orders = [NGrams(np.zeros(counts[0], np.int64), members[:, 0], *values)]
        keys = [members[:, 0]]  # for each length prefix * symbols + symbol, sorted
        for length in range(2, len(counts) + 1):
            self._header(f"\\{length}-grams:", length - 1)
            members, *values = self._rows(length, counts, numbers)
            key = self._prefixes(members, keys) * counts[0] + members[:, -1]
            order = np.argsort(key, kind="stable")
            keys.append(key[order])
            if (keys[-1][1:] == keys[-1][:-1]).any():
                self._fail(f"a {length}-gram is there twice")
            prefix, symbol = np.divmod(keys[-1], counts[0])
            orders.append(NGrams(prefix, symbol, *(column[order] for column in values)))
        self._header("\\end\\", len(counts))
        return NGramModel(self._symbols(numbers), tuple(orders))

    def _counts(self) -> list[int]:
        """How many n-grams of each length there are, as the head says."""
        while (line := next(self.lines, None)) != b"\\data\\":
            if line is None:
                raise UserError(f"{self.path} is no ARPA file, since no line of it is \\data\\: name another file")
        counts: list[int] = []
        while not (line := self._next("in its head")).startswith(b"\\"):
            found = re.fullmatch(rb"ngram\s+(\d{1,9})\s*=\s*(\d{1,18})", line)
            if not found or int(found[1]) != len(counts) + 1:
                self._fail(f"after \\data\\ must stand 'ngram {len(counts) + 1}=' with a number, not {_shown(line)}")
            counts.append(int(found[2]))
        if not counts or line != b"\\1-grams:":
            self._fail(f"after \\data\\ must stand the counts and then \\1-grams:, not {_shown(line)}")
        return counts

    def _header(self, expected: str, length: int) -> None:
        """The line after the n-grams of this length."""
        if (line := self._next(f"before {expected}")) != expected.encode():
            self._fail(f"after as many {length}-grams as the head says must stand {expected}, not {_shown(line)}")

    def _rows(
        self, length: int, counts: Sequence[int], numbers: dict[bytes, int]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One section: symbols (N, length), log10 of the probabilities (N,) and of the back-off weights (N,)."""
        members, log10_p, log10_back_off = array("q"), array("d"), array("d")
        widths = (length + 1, length + 2) if length < len(counts) else (length + 1,)  # the longest have no back-off
        for row in range(counts[length - 1]):
            line = self._next(f"within its {length}-grams")
            if line.startswith(b"\\"):
                self._fail(f"there are {row:,} {length}-grams, and the head says {counts[length - 1]:,}")
            fields = line.split()
            try:
                if len(fields) not in widths:
                    raise ValueError
                log10_p.append(float(fields[0]))
                log10_back_off.append(float(fields[length + 1]) if len(fields) > length + 1 else 0.0)
                members.extend([numbers[text] for text in fields[1 : length + 1]])
            except KeyError as error:
                self._fail(f"{_shown(error.args[0])} is not among the 1-grams")
            except ValueError:
                parts = "a logarithm, the symbols" + " and perhaps a back-off weight" * (len(widths) > 1)
                self._fail(f"one of the {length}-grams has other parts than {parts}: {_shown(line)}")
        logarithms, weights = np.asarray(log10_p), np.asarray(log10_back_off)
        if not ((logarithms <= 0).all() and (np.abs(weights) < _LARGEST_WEIGHT).all()):
            self._fail(
                f"above stands one of the {length}-grams whose probability is above 1 or no number, or whose back-off "
                "weight is"
            )
        return np.asarray(members).reshape(-1, length), logarithms, weights

    def _prefixes(self, members: np.ndarray, keys: list[np.ndarray]) -> np.ndarray:
        """The place of each n-gram's prefix among the n-grams one shorter."""
        place = members[:, 0]
        for length, key in enumerate(keys[1:], 2):
            wanted = place * len(keys[0]) + members[:, length - 1]
            place = np.searchsorted(key, wanted)
            missing = np.append(key, -1)[place] != wanted
            if missing.any():
                self._fail(
                    f"above stands one of the {length + 1}-grams whose first {length} symbols are no {length}-gram"
                )
        return place

    def _symbols(self, numbers: Iterable[bytes]) -> tuple[str, ...]:
        try:
            spaces = (text.decode().replace(SPACE, " ").replace(PIECE_SPACE, " ") for text in numbers)
            return tuple(text.replace("<UNK>", UNKNOWN) for text in spaces)
        except UnicodeDecodeError:
            raise UserError(f"{self.path} has symbols that are not UTF-8: convert the file, as with iconv") from None


def _shown(line: bytes) -> str:
    return repr(line[:60].decode(errors="replace"))
