"""The tokeniser of word pieces: frequent parts of words are classes, learnt by byte-pair encoding with sentencepiece.

    transcripts  --learn-->  bytes of a model  --Pieces-->  tokeniser
    tokeniser.symbols                               # (" t", "he", " a", ..., " the", ..., " ", "e", "t", ...)
    tokeniser.encode("The cat")                     # array([4, 18, 39])
    tokeniser.decode([4, 18, 39])                   # "the cat"

Characters are normalised, and those outside `vocabulary.symbols` are found, as by the tokeniser of characters.
sentencepiece would write each of them as the one class <unk>. No such text is encoded, so there is no class <unk>, and
none for the beginning, the end and padding, which CTC does not write.

A word begins with a space, the first one too, and no piece reaches beyond its word. So the counts of all words decide
what is learnt: the order of transcripts makes no difference, and sentencepiece reads 90,000 words of LibriSpeech
instead of 281,000 sentences. It learns in one thread, so the same transcripts give the same bytes.
"""

from __future__ import annotations

import base64
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ddp_asr import config
from ddp_asr.errors import UserError, printable
from ddp_asr.files import open_input
from ddp_asr.text.characters import Characters
from ddp_asr.text.protocol import TextCounts

FILE = "pieces.model"  # in a run directory
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how sentencepiece writes a space
_LARGEST_MODEL_BYTES = 64 << 20


class Pieces:
    """Pieces in sentencepiece's order; the blank is the last class."""

    unit = "piece"

    def __init__(self, model: bytes, symbols: str, lowercase: bool = True, drop: str = "") -> None:
        """Raises ValueError where `model` is no model of these symbols."""
        self._characters = Characters(symbols, lowercase, drop)
        self._model = model
        self._processor = _read_model(model)
        special = (self._processor.is_unknown, self._processor.is_control, self._processor.is_unused)
        numbers = [n for n in range(self._processor.get_piece_size()) if not any(test(n) for test in special)]
        written = [self._processor.id_to_piece(number) for number in numbers]
        self.symbols: tuple[str, ...] = tuple(piece.replace(_SPACE, " ") for piece in written)
        self.blank = len(self.symbols)
        self.size = len(self.symbols) + 1
        self._class_of = np.full(self._processor.get_piece_size(), -1)
        self._class_of[numbers] = np.arange(len(numbers))
        self._known = set(self._characters.symbols)
        own = {symbol for symbol in self.symbols if len(symbol) == 1} | {" "}
        if own != self._known | {" "}:
            raise ValueError(f"the characters of its pieces are {''.join(sorted(own))!r}, not those of {symbols!r}")

    @classmethod
    def from_settings(cls, settings: config.Pieces, transcripts: Iterable[str]) -> Pieces:
        of = (settings.symbols, settings.lowercase, settings.drop)
        if not settings.model:
            return cls(learn(transcripts, settings.size, *of), *of)
        try:
            with open_input(settings.model) as file:
                tokeniser = cls(file.read(_LARGEST_MODEL_BYTES), *of)
        except OSError as error:
            raise UserError(
                f"vocabulary.model = {settings.model} cannot be read ({error.strerror}): name a file that "
                "ddp-asr vocabulary made, or leave it empty"
            ) from None
        except ValueError as error:
            raise UserError(
                f"vocabulary.model = {settings.model} does not suit this run ({error}): set vocabulary.symbols to what "
                "the file was made with, or make another with ddp-asr vocabulary"
            ) from None
        if len(tokeniser.symbols) != settings.size:
            raise UserError(
                f"vocabulary.model = {settings.model} has {len(tokeniser.symbols)} pieces and vocabulary.size is "
                f"{settings.size}: set --vocabulary.size={len(tokeniser.symbols)}"
            )
        return tokeniser

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Pieces:
        model = base64.b64decode(state["model"], validate=True)
        return cls(model, state["symbols"], state["lowercase"], state["drop"])

    def state(self) -> dict[str, Any]:
        characters = {**self._characters.state(), "kind": "pieces"}
        return {**characters, "model": base64.b64encode(self._model).decode()}

    def files(self) -> Mapping[str, bytes]:
        return {FILE: self._model}

    def normalise(self, text: str) -> str:
        return self._characters.normalise(text)

    def encode(self, text: str, *, skip_foreign: bool = False) -> np.ndarray:
        if not skip_foreign:
            self._characters.encode(text)  # raises ValueError for a character that it does not have
        return self._class_of[self._processor.encode_as_ids(self._writable(text))]

    def decode(self, classes: Sequence[int] | np.ndarray) -> str:
        numbers = np.asarray(classes, np.int64).tolist()
        return "".join(self.symbols[number] for number in numbers if number != self.blank).removeprefix(" ")

    def count(self, texts: Sequence[str]) -> TextCounts:
        encoded = self._processor.encode([self._writable(text) for text in texts], out_type=int, num_threads=1)
        length = np.fromiter(map(len, encoded), np.int64, len(texts))
        written = np.fromiter(itertools.chain.from_iterable(encoded), np.int64, length.sum())
        writer = np.repeat(np.arange(len(texts)), length)  # the text that each piece belongs to
        equal = (written[1:] == written[:-1]) & (writer[1:] == writer[:-1])
        repeats = np.bincount(writer[1:][equal], minlength=len(texts))
        return TextCounts(length, repeats, self._characters.count(texts).foreign)

    def _writable(self, text: str) -> str:
        """The normalised text without the characters that no piece has."""
        text = self.normalise(text)
        if self._known.issuperset(text):
            return text
        return " ".join("".join(character for character in text if character in self._known).split())


def learn(transcripts: Iterable[str], size: int, symbols: str, lowercase: bool = True, drop: str = "") -> bytes:
    """The model of `size` pieces of the transcripts that have no other characters than these.

    Raises:
        UserError: there is no such transcript, or there are not enough different words in them.
    """
    trainer = _sentencepiece().SentencePieceTrainer
    characters = Characters(symbols, lowercase, drop)
    known, words = set(characters.symbols), Counter[str]()
    for text in map(characters.normalise, transcripts):
        if known.issuperset(text):
            words.update(text.split())
    if not words:
        raise UserError(
            f"there is no transcript of the characters {symbols!r} to learn word pieces from: name others in "
            "vocabulary.symbols, or in vocabulary.drop what is not spoken"
        )
    model = io.BytesIO()
    try:
        trainer.train(
            sentence_iterator=(f"{word}\t{count}" for word, count in sorted(words.items())),
            input_format="tsv",
            model_writer=model,
            model_type="bpe",
            vocab_size=size + 1,  # with <unk>, which it cannot do without
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            normalization_rule_name="identity",
            character_coverage=1.0,
            required_chars=characters.symbols.replace(" ", ""),
            num_threads=1,
            minloglevel=2,  # errors, which it also raises
        )
    except RuntimeError as error:
        most = re.search(r"too high .* value <= (\d+)", str(error))
        reason = f"they give at most {int(most[1]) - 1}" if most else _first_line(error)
        raise UserError(
            f"vocabulary.size = {size} pieces cannot be learnt of {len(words):,} different words ({reason}): lower it, "
            "or add transcripts"
        ) from None
    return model.getvalue()


def _read_model(model: bytes) -> Any:
    if not model:  # of which sentencepiece makes a processor that is not ready
        raise ValueError("it is empty")
    try:
        return _sentencepiece().SentencePieceProcessor(model_proto=model)
    except RuntimeError as error:
        raise ValueError(f"it is no model of sentencepiece: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return printable(str(error).strip().partition("\n")[0])


def _sentencepiece() -> Any:
    try:
        import sentencepiece
    except ImportError:
        raise UserError(
            "vocabulary.kind = pieces needs the package sentencepiece: install it with pip install -e '.[pieces]'"
        ) from None
    return sentencepiece
