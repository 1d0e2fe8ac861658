"""CTC beam search over the words of a lexicon, with an n-gram model of words, by flashlight-text and its KenLM.

    words.arpa[.gz], lexicon  --read_word_model-->  WordModel: the spellings as a trie, the language model
    logits (B, T', V)  --a row at a time, on the CPU-->  the best texts of each row  --forced alignment-->  words

The score of a text is log p(text | audio) + lm_weight * log p_lm(text) + word_bonus * words, in natural logarithms, and
p_lm includes the end of the sentence. p(text | audio) is the sum over all CTC paths that spell the words of the text
with one or more spaces between them, and any number of spaces before the first word and after the last. KenLM gives
logarithms to base 10, which flashlight-text adds as they are, so its weight is lm_weight * ln 10.

Each spelling in the trie ends with a space, or the words "ab" and "c" would be found where the audio says "abc". No
space need follow the last word of a recording, so each row gets one more frame, in which the space is certain. That
frame adds nothing to a text that ends with a whole word. Any other text loses 10,000 in it (LOWEST), and is found only
where the search has kept none that ends with a whole word.

With flashlight's option `log_add` the search adds up the paths of a text; without it, which is torchaudio's default,
only the best path counts. Its option `unk_score`, a score for words outside the lexicon, is off, because any letters
would be one.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddp_asr import config
from ddp_asr.decoding.align import align
from ddp_asr.decoding.ngram import END, SPACE, START, UNKNOWN
from ddp_asr.decoding.path import collapse, words_on
from ddp_asr.decoding.protocol import Hypothesis, Word
from ddp_asr.errors import UserError, printable
from ddp_asr.files import open_lines
from ddp_asr.text import Tokeniser

# In place of a log-probability of -inf, of which flashlight's log-add makes NaN.
LOWEST = -1e4


@dataclass(frozen=True)
class WordModel:
    """A lexicon and its language model, as the search reads them."""

    texts: list[str]
    """What each word writes."""
    trie: Any
    """flashlight's Trie of all spellings, each closed by a space."""
    lm: Any
    """flashlight's KenLM, or its ZeroLM, which gives every text 0."""
    space: int
    """The class of the space."""


class Lexicon:
    """The decoder; see the module for its score."""

    def __init__(
        self, settings: config.Lexicon, tokeniser: Tokeniser, frame_s: float, model: WordModel | None = None
    ) -> None:
        """`model`: the lexicon and the language model, if they have been read already."""
        self.settings, self.tokeniser, self.frame_s = settings, tokeniser, frame_s
        self._model = model or read_word_model(settings, tokeniser)
        flashlight = _flashlight()
        options = flashlight.LexiconDecoderOptions(
            beam_size=settings.size,
            beam_size_token=settings.symbols_per_frame or tokeniser.size,
            beam_threshold=settings.threshold,
            lm_weight=settings.lm_weight * math.log(10),
            word_score=settings.word_bonus,
            unk_score=-math.inf,
            sil_score=0.0,
            log_add=True,
            criterion_type=flashlight.CriterionType.CTC,
        )
        self._search = flashlight.LexiconDecoder(
            options=options,
            trie=self._model.trie,
            lm=self._model.lm,
            sil_token_idx=self._model.space,
            blank_token_idx=tokeniser.blank,
            unk_token_idx=-1,  # not read, because unk_score is off
            transitions=[],
            is_token_lm=False,
        )

    def __call__(self, logits: Tensor, frames: Tensor) -> list[Hypothesis]:
        # Copied from the device once for the whole batch.
        log_p = logits.detach().float().log_softmax(-1).cpu().nan_to_num(nan=LOWEST, neginf=LOWEST)
        return [self._hypothesis(log_p[row, :length]) for row, length in enumerate(frames.tolist())]

    def _hypothesis(self, log_p: Tensor) -> Hypothesis:
        """Of one row: its log-probabilities (T', V)."""
        frames, classes = log_p.shape
        closing = log_p.new_full((1, classes), LOWEST)
        closing[0, self._model.space] = 0.0
        closed = torch.cat([log_p, closing]).contiguous()
        found = self._search.decode(closed.data_ptr(), len(closed), classes)
        # By the words, too: those that are spelled alike may have equal scores, and flashlight's order of them varies.
        ranked = sorted(
            (-each.score, [label for label in each.words if label >= 0], place) for place, each in enumerate(found)
        )
        texts: dict[str, float] = {}
        for negative, labels, _ in ranked:
            if len(texts) < self.settings.n_best:
                texts.setdefault(" ".join(self._model.texts[label] for label in labels), -negative)
        (text, score), *others = texts.items()
        _, labels, place = ranked[0]
        path = np.asarray(found[place].tokens[1 : frames + 1])  # without flashlight's own start, closing frame and end
        return Hypothesis(text, self._words(log_p, path, labels), score, others)

    def _words(self, log_p: Tensor, path: np.ndarray, labels: list[int]) -> list[Word]:
        """The words of these labels with their times; `path` (T',) spells them, and perhaps a part of another word."""
        if not labels:
            return []
        found = align(log_p, collapse(path, self.tokeniser.blank)[0])
        spelled = words_on(found.path, found.path_log_p, self.tokeniser, self.frame_s)
        return [replace(word, text=self._model.texts[label]) for label, word in zip(labels, spelled, strict=False)]


# ---- reading -------------------------------------------------------------------------------------------------------


def read_word_model(settings: config.Lexicon, tokeniser: Tokeniser) -> WordModel:
    """The lexicon and the language model that the settings name; without a lexicon its words are the model's.

    Raises:
        UserError: flashlight-text is missing, a file cannot be read, a word cannot be spelled, no word is left, or the
            language model is none of these words.
    """
    flashlight = _flashlight()
    if tokeniser.unit != "char":
        raise UserError(
            "decoder.kind = lexicon needs a vocabulary of characters, in which a space ends each word; this run has "
            "word pieces: set decoder.kind to beam, with a language model of python -m ddp_asr.lm --unit piece"
        )
    if " " not in tokeniser.symbols:
        raise UserError("decoder.kind = lexicon needs the space among vocabulary.symbols, and this run has none")
    space = list(tokeniser.symbols).index(" ")
    known = _unigrams(Path(settings.lm)) if settings.lm else []
    if SPACE in known:
        raise UserError(
            f"the language model {settings.lm} is one of characters, and decoder.kind = lexicon needs one of words: "
            "make one with python -m ddp_asr.lm --unit word, or set decoder.kind to beam"
        )
    if not (settings.lexicon or settings.lm):
        raise UserError("decoder.kind = lexicon needs words: name a language model as decoder.lm or a decoder.lexicon")
    spellings = _spellings(settings, known, tokeniser)
    words = list(spellings)
    lm = _load_lm(settings.lm, words) if settings.lm else flashlight.ZeroLM()
    if not words:
        raise UserError(f"{settings.lexicon or settings.lm} has no word for the lexicon: name a file with words")
    if settings.lm and not set(known).intersection(words):
        raise UserError(
            f"the language model {settings.lm} has none of the {len(words):,} words of {settings.lexicon}, such as "
            f"{words[0]!r}: name one of the same words, in the same upper and lower case"
        )
    trie, state = flashlight.Trie(tokeniser.size, space), lm.start(True)
    scores = [lm.score(state, label)[1] for label in range(len(words))]
    # The most probable first, because flashlight takes no more than six words of the same spelling.
    for label in sorted(range(len(words)), key=lambda label: -scores[label]):
        for classes in spellings[words[label]]:
            trie.insert([*classes, space], label, scores[label])
    trie.smear(flashlight.SmearingMode.MAX)  # a part of a word gets the best score of the words that begin with it
    return WordModel([tokeniser.normalise(word) for word in words], trie, lm, space)


def _flashlight() -> ModuleType:
    try:
        from flashlight.lib.text import decoder
    except ImportError:
        raise UserError(
            "decoder.kind = lexicon needs the package flashlight-text: install it with pip install -e '.[lexicon]'"
        ) from None
    return decoder


def _load_lm(path: str, words: Sequence[str]) -> Any:
    from flashlight.lib.text.decoder.kenlm import KenLM
    from flashlight.lib.text.dictionary import Dictionary

    try:
        return KenLM(path, Dictionary(list(words)))
    except (RuntimeError, UnicodeDecodeError) as error:
        # The message says where in KenLM's sources, then what is wrong, and quotes the file in whatever bytes it has.
        text = str(error) if isinstance(error, RuntimeError) else error.object.decode("utf8", "replace")
        lines = text.splitlines()
        reason = printable(lines[min(1, len(lines) - 1)].partition(".  ")[0])
        raise UserError(
            f"KenLM cannot read {path} ({reason}): copy the file again, or make one of order 2 to 6 with python -m "
            "ddp_asr.lm --unit word"
        ) from None


def _unigrams(path: Path) -> list[str]:
    """The words of an ARPA file; whether the rest of it is whole, KenLM finds out."""
    words: list[str] = []
    for _, line in _lines(path):
        if line.startswith("\\") and words:
            break
        if len(fields := line.split()) > 1 and fields[0] != "ngram":
            words.append(fields[1])
    return [word for word in words if word not in (START, END, UNKNOWN, "<UNK>")]


def _spellings(settings: config.Lexicon, known: Sequence[str], tokeniser: Tokeniser) -> dict[str, list[list[int]]]:
    """The spellings, as classes, of each word of the lexicon, or else of each `known` one that can be spelled."""
    spellings: dict[str, list[list[int]]] = {}
    left_out = []
    for number, line in _lines(Path(settings.lexicon)) if settings.lexicon else enumerate(known):
        word, _, spelling = (part.strip() for part in line.strip().partition("\t"))
        if not word:
            continue
        try:
            classes, reason = tokeniser.encode(spelling or word).tolist(), ""
        except ValueError:
            reason = f"the model cannot write {tokeniser.count([spelling or word]).foreign[0]!r}"
        if any(len(tokeniser.normalise(text).split()) != 1 for text in (word, spelling or word)):
            reason = "it or its spelling is not a single word"
        if reason and settings.lexicon:
            raise UserError(
                f"{settings.lexicon}, line {number}: {word!r} cannot be spelled with the run's symbols, because "
                f"{reason}: take it out, or write the word, a tab and a spelling without spaces"
            )
        if reason:
            left_out.append(word)
        elif classes not in spellings.setdefault(word, []):
            spellings[word].append(classes)
    if left_out:
        named = ", ".join(map(repr, left_out[:5])) + (" ..." if len(left_out) > 5 else "")
        print(
            f"warning: {len(left_out):,} of {len(known):,} words of {settings.lm} cannot be spelled with the run's "
            f"symbols and are left out: {named}",
            file=sys.stderr,
            flush=True,
        )
    return spellings


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text, compressed with gzip or not, counted from 1."""
    with open_lines(path, "name a file that can") as lines:
        for number, line in enumerate(lines, 1):
            yield number, line.decode("utf-8-sig").rstrip("\r\n")  # Windows writes a byte order mark
