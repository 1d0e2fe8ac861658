"""CTC prefix beam search with a language model, batched over utterances and hypotheses on the device of the logits.

    logits (B, T', V)  --search-->  the W best texts of each row, as classes  --forced alignment-->  words with times

The score of a text is log p(text | audio) + lm_weight * log p_lm(text) + bonuses for its symbols, words and hot words.
p(text | audio) is the sum over all CTC paths that spell the text, so the search keeps, for each text of its beam, the
probability of the paths so far that end in a blank and of those that end in a symbol (Graves 2012, "Sequence
transduction with recurrent neural networks"; Hannun et al. 2014, "First-pass large vocabulary continuous speech
recognition using bi-directional recurrent DNNs"). What language model and bonuses add is read from automata
(automaton.py).

There is one loop, over frames. A frame extends all texts of all rows by all symbols, and keeps the W best. An extended
text may be in the beam already; two texts are equal if their 64-bit hashes are. A place of the beam without a text has
the score -inf. It must neither give nor take paths, or a text would be counted twice, and a larger beam would do worse.

Beyond its own frames, each row gets frames in which the blank is certain. They change no score, so neither padding nor
the other rows change a result.

The times of words come from the most probable path that spells the found text, and not from the frames in which the
search first wrote a symbol: that may be long before the symbol is likely.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddp_asr import config
from ddp_asr.decoding.align import best_path
from ddp_asr.decoding.automaton import TABLE_LIMIT_MB, Automaton, move
from ddp_asr.decoding.bonuses import make_bonuses, read_hot_words
from ddp_asr.decoding.ngram import read_arpa
from ddp_asr.decoding.path import words_on
from ddp_asr.decoding.protocol import Hypothesis
from ddp_asr.text import Tokeniser

SAID_ABOVE_MB = 100.0  # language models
INFINITY = float("inf")


class Beam:
    """The decoder; its score is log p(text | audio), of all paths that the search has kept, plus the text model's."""

    def __init__(
        self, settings: config.Beam, tokeniser: Tokeniser, frame_s: float, table: Automaton | None = None
    ) -> None:
        """`table`: the language model, if it has been read already; else it is read from `settings.lm`."""
        self.settings, self.tokeniser, self.frame_s = settings, tokeniser, frame_s
        if table is None and settings.lm:
            table = read_table(settings.lm, tokeniser)
        hot_words = read_hot_words(Path(settings.hot_words), tokeniser) if settings.hot_words else []
        bonuses = make_bonuses(
            tokeniser.symbols, settings.symbol_bonus, settings.word_bonus, hot_words, settings.hot_word_bonus
        )
        self.text_model = make_text_model(bonuses, table, settings.lm_weight)
        self._moved: dict[tuple[torch.device, torch.dtype], TextModel] = {}

    def __call__(self, logits: Tensor, frames: Tensor) -> list[Hypothesis]:
        log_p = log_probabilities(logits, frames)
        place = (log_p.device, log_p.dtype)
        if place not in self._moved:
            self._moved[place] = self.text_model.to(*place)
        found, scores = search(log_p, self._moved[place], self.settings.size, self.settings.symbols_per_frame)
        # Copied from the device once for the whole batch.
        found, scores, log_p = found.cpu(), scores.cpu(), log_p.cpu()
        return [
            self._hypothesis(log_p[row, :length], found[row].numpy(), scores[row].tolist())
            for row, length in enumerate(frames.tolist())
        ]

    def _hypothesis(self, log_p: Tensor, found: np.ndarray, scores: list[float]) -> Hypothesis:
        """Of one row: its log-probabilities (T', V), and the classes (W, T' or more) and scores that were found."""
        blank, n_best = self.tokeniser.blank, self.settings.n_best
        texts: dict[str, float] = {}
        for classes, score in zip(found, scores, strict=True):
            if score > -INFINITY and len(texts) < n_best:
                # Two may differ in spaces only: the better one counts.
                texts.setdefault(" ".join(self.tokeniser.decode(classes).split()), score)
        words = []
        classes = found[0][found[0] != blank]
        if texts and len(classes):
            words = words_on(*best_path(log_p, classes), self.tokeniser, self.frame_s)
        return Hypothesis(" ".join(word.text for word in words), words, scores[0], list(texts.items())[1:])


def read_table(lm: str, tokeniser: Tokeniser) -> Automaton:
    """The language model in an ARPA file, over the tokeniser's symbols: as a table if that is small enough, else arcs.

    Raises:
        UserError: the file cannot be read, or is a model of other symbols.
    """
    arcs = read_arpa(Path(lm)).arcs(tokeniser.symbols)
    if arcs.table_mb > SAID_ABOVE_MB:
        print(f"language model {lm}: {arcs.summary} in each process", file=sys.stderr, flush=True)
    return arcs.table() if arcs.table_mb <= TABLE_LIMIT_MB else arcs


def log_probabilities(logits: Tensor, frames: Tensor) -> Tensor:
    """Log-probabilities (B, longest of `frames`, V) in float32 or better; beyond its frames a row has blanks."""
    logits = logits.detach()[:, : int(frames.max())]
    log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    beyond = torch.arange(log_p.shape[1], device=log_p.device) >= frames.to(log_p.device, non_blocking=True)[:, None]
    log_p = log_p.masked_fill(beyond[:, :, None], -INFINITY)
    log_p[:, :, -1].masked_fill_(beyond, 0.0)
    return log_p


# ---- the search ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextModel:
    """What a text adds to its score apart from the audio: a weighted sum of automata, each with its state."""

    parts: tuple[Automaton, ...]
    weights: tuple[float, ...]

    def gain(self, states: Sequence[Tensor], symbol: Tensor) -> Tensor:
        return self._sum([part.gain(state, symbol) for part, state in zip(self.parts, states, strict=True)])

    def step(self, states: Sequence[Tensor], symbol: Tensor) -> tuple[Tensor, ...]:
        return tuple(part.step(state, symbol) for part, state in zip(self.parts, states, strict=True))

    def end(self, states: Sequence[Tensor]) -> Tensor:
        return self._sum([part.end[state] for part, state in zip(self.parts, states, strict=True)])

    def _sum(self, gains: Sequence[Tensor]) -> Tensor:
        total = self.weights[0] * gains[0]
        for weight, gain in zip(self.weights[1:], gains[1:], strict=True):
            total = total + weight * gain
        return total

    def to(self, device: torch.device, dtype: torch.dtype) -> TextModel:
        return replace(self, parts=tuple(move(part, device, dtype) for part in self.parts))


def make_text_model(bonuses: Automaton, lm: Automaton | None, lm_weight: float) -> TextModel:
    """The bonuses, and the language model if there is one that counts."""
    if lm is None or lm_weight == 0:  # 0 * -inf would be no number
        return TextModel((bonuses,), (1.0,))
    return TextModel((bonuses, lm), (1.0, lm_weight))


def search(log_p: Tensor, model: TextModel, size: int, symbols_per_frame: int = 0) -> tuple[Tensor, Tensor]:
    """The best texts of each row of log-probabilities (B, T', V): classes (B, W, T') and scores (B, W), best first.

    A text's classes stand at the frames in which they were first written, and blanks at the others. The score is -inf
    where the row has fewer than W = `size` texts.

    Args:
        symbols_per_frame: in each frame only so many symbols, the most probable ones, extend a text; 0: all.
    """
    rows, frames, classes = log_p.shape
    blank = classes - 1
    nothing = log_p.new_full((rows, size), -INFINITY)
    beam = Texts(  # the empty text in the first place
        in_blank=torch.cat([torch.zeros_like(nothing[:, :1]), nothing[:, 1:]], 1),
        in_symbol=nothing,
        prior=torch.zeros_like(nothing),
        states=tuple(torch.full_like(nothing, part.start, dtype=torch.int64) for part in model.parts),
        last=torch.full_like(nothing, blank, dtype=torch.int64),
        hashed=torch.zeros_like(nothing, dtype=torch.int64),
        hashed_before=torch.zeros_like(nothing, dtype=torch.int64),
    )
    trace = []
    for frame in range(frames):
        beam, source, written = advance(beam, log_p[:, frame], model, symbols_per_frame)
        trace.append((source, written))
    score = beam.total + beam.prior + model.end(beam.states)
    scores, place = score.sort(dim=1, descending=True, stable=True)
    found = torch.full((rows, size, frames), blank, device=log_p.device)
    for frame, (source, written) in reversed(list(enumerate(trace))):
        found[:, :, frame] = written.gather(1, place)
        place = source.gather(1, place)
    return found, scores


@dataclass(frozen=True)
class Texts:
    """The beam: W texts of each row, each field (B, W). One whose score is -inf is no text."""

    in_blank: Tensor  # log-probability of the paths that end in a blank
    in_symbol: Tensor  # and of those that end in the text's last symbol
    prior: Tensor  # what the text model has added
    states: tuple[Tensor, ...]  # of the text model
    last: Tensor  # the last symbol; the blank where there is none yet
    hashed: Tensor  # int64: the text's hash
    hashed_before: Tensor  # that of the text without its last symbol

    @functools.cached_property
    def total(self) -> Tensor:
        """Log-probability of all paths."""
        return torch.logaddexp(self.in_blank, self.in_symbol)


def advance(beam: Texts, log_p: Tensor, model: TextModel, symbols_per_frame: int) -> tuple[Texts, Tensor, Tensor]:
    """The beam after a frame (B, V), and of each text in it: its predecessor's place, and the class written to that.

    Of W texts that stay as they are and W * K that grow by one of K symbols, the W best are kept.
    """
    blank = log_p.shape[1] - 1
    is_parent = _parents(beam, blank)
    stay_blank, stay_symbol = _stay(beam, log_p, is_parent)
    symbol, grown, grown_prior = _grow(beam, log_p, is_parent, model, symbols_per_frame)
    in_symbol = torch.cat([stay_symbol[:, :, None], grown], 2).flatten(1)  # (B, W * (1 + K))
    in_any = torch.cat([torch.logaddexp(stay_blank, stay_symbol)[:, :, None], grown], 2).flatten(1)
    prior = torch.cat([beam.prior[:, :, None], grown_prior], 2).flatten(1)
    chosen = (in_any + prior).topk(beam.last.shape[1], dim=1).indices
    choices = 1 + symbol.shape[1]
    source, choice = chosen // choices, chosen % choices
    stays = choice == 0
    added = symbol.gather(1, (choice - 1).clamp(min=0))
    written = torch.where(stays, blank, added)
    before = tuple(state.gather(1, source) for state in beam.states)
    after = model.step(before, added)
    hashed = beam.hashed.gather(1, source)
    texts = Texts(
        in_blank=stay_blank.gather(1, source).masked_fill(~stays, -INFINITY),
        in_symbol=in_symbol.gather(1, chosen),
        prior=prior.gather(1, chosen),
        states=tuple(torch.where(stays, old, new) for old, new in zip(before, after, strict=True)),
        last=torch.where(stays, beam.last.gather(1, source), written),
        hashed=torch.where(stays, hashed, _hash(hashed, written)),
        hashed_before=torch.where(stays, beam.hashed_before.gather(1, source), hashed),
    )
    return texts, source, written


def _parents(beam: Texts, blank: int) -> Tensor:
    """(B, W, W): whether the second text is the first without its last symbol; a place without a text is in no pair."""
    alive = beam.total + beam.prior > -INFINITY
    has_parent = alive & (beam.last != blank)
    equal = beam.hashed_before[:, :, None] == beam.hashed[:, None, :]
    return equal & has_parent[:, :, None] & alive[:, None, :]


def _stay(beam: Texts, log_p: Tensor, is_parent: Tensor) -> tuple[Tensor, Tensor]:
    """(B, W) each, of texts that stay as they are: of paths that end in a blank, and in the last symbol.

    The latter write the last symbol once more, or come from the parent, which lacks it.
    """
    log_p_last = log_p.gather(1, beam.last)
    parent = is_parent.int().argmax(2)
    repeats = beam.last == beam.last.gather(1, parent)  # a text that ends in two equal symbols has a blank between them
    from_parent = torch.where(repeats, beam.in_blank.gather(1, parent), beam.total.gather(1, parent))
    from_parent = from_parent.masked_fill(~is_parent.any(2), -INFINITY)
    return beam.total + log_p[:, -1:], torch.logaddexp(beam.in_symbol, from_parent) + log_p_last


def _grow(
    beam: Texts, log_p: Tensor, is_parent: Tensor, model: TextModel, symbols_per_frame: int
) -> tuple[Tensor, Tensor, Tensor]:
    """K symbols of each row (B, K), and for each text that they extend (B, W, K) its paths and its prior."""
    blank = log_p.shape[1] - 1
    symbol_log_p, symbol = log_p[:, :blank], torch.arange(blank, device=log_p.device).expand(len(log_p), blank)
    if 0 < symbols_per_frame < blank:
        symbol_log_p, symbol = symbol_log_p.topk(symbols_per_frame, dim=1)
    repeats = symbol[:, None, :] == beam.last[:, :, None]
    grown = torch.where(repeats, beam.in_blank[:, :, None], beam.total[:, :, None]) + symbol_log_p[:, None, :]
    # `_stay` has given these paths to the child, which is in the beam.
    child_in_beam = is_parent.mT.to(log_p.dtype) @ repeats.to(log_p.dtype) > 0
    grown = grown.masked_fill(child_in_beam, -INFINITY)
    gain = model.gain([state[:, :, None] for state in beam.states], symbol[:, None, :])
    return symbol, grown, beam.prior[:, :, None] + gain


def _hash(hashed: Tensor, symbol: Tensor) -> Tensor:
    """The hash of a text and one more symbol: a product that overflows, and its high bits mixed into its low ones."""
    hashed = (hashed ^ (symbol + 1)) * -7046029254386353131  # an odd number; 2^64 / the golden ratio
    return hashed ^ (hashed >> 29)
