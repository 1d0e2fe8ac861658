"""The characters of transcripts, and a section `vocabulary` of the settings that leaves out none of their speech.

    transcripts --Alphabet.add--> counts of characters and words --propose--> symbols, lowercase, drop, and why

Letters, digits and signs that are read aloud become symbols. Punctuation and invisible characters are dropped, except
for marks that mostly stand inside words, such as the apostrophe of "don't": without them words would be joined.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

# Signs, beside those of currencies, that are read aloud.
READ_ALOUD = "%‰&@#°§+=×÷±"  # noqa: RUF001
# Characters that look like others, each above the one that keyboards write.
_LOOK_ALIKE = str.maketrans(
    "’‘ʼ`´′“”„–—‐‑−аеорсухіјѕАВЕКМНОРСТХοΑΒΕΖΗΙΚΜΝΟΡΤΥΧ",  # noqa: RUF001
    "''''''\"\"\"-----aeopcyxijsABEKMHOPCTXoABEZHIKMNOPTYX",
)
_ANNOTATION = re.compile(r"[<\[({].*[>\])}]")


def describe(character: str) -> str:
    """The character as it can be printed anywhere, with its code point."""
    shown = f"{character!r} " if character.isprintable() and not unicodedata.combining(character) else ""
    return f"{shown}U+{ord(character):04X}"


@dataclass
class Alphabet:
    """Counts over transcripts; characters as they are written, words after NFC and in lower case."""

    texts: int = 0
    not_nfc: int = 0  # texts that NFC changes
    characters: Counter[str] = field(default_factory=Counter)
    texts_with: Counter[str] = field(default_factory=Counter)  # texts that have the character
    first: dict[str, int] = field(default_factory=dict)  # character -> number of the first text that has it
    joined: Counter[str] = field(default_factory=Counter)  # how many of the character NFC puts into another one
    words: Counter[str] = field(default_factory=Counter)

    def add(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.characters.update(text)
            different = set(text)
            self.texts_with.update(different)
            for character in different - self.first.keys():
                self.first[character] = self.texts
            composed = text if text.isascii() else unicodedata.normalize("NFC", text)
            if composed != text:
                self.not_nfc += 1
                self.joined.update(text)
                self.joined.subtract(composed)
            self.words.update(composed.lower().split())
            self.texts += 1

    def note(self, character: str) -> str:
        """What is unusual about a character; "" for most."""
        if character.isspace():
            return "" if character == " " else "white space: becomes a space"
        if unicodedata.category(character) in ("Cc", "Cs"):
            return "control character: no setting can name it, so remove it from the transcripts"
        if unicodedata.category(character) == "Cf":
            return "invisible"
        replaced = self.joined[character]
        single = unicodedata.normalize("NFC", character) != character
        if replaced > 0 and (single or unicodedata.combining(character)):
            return f"normalisation (NFC) joins or replaces {replaced:,} of them"
        plain = unicodedata.normalize("NFKC", character)
        if plain != character:
            return f"a variant of {plain!r}, but a symbol of its own"
        twin = character.translate(_LOOK_ALIKE)
        if twin != character and twin in self.characters:
            return f"looks like {describe(twin)}, which is there, too"
        return ""

    def spoken_words(self, drop: str) -> Counter[str]:
        """The words without the characters to drop."""
        dropped, words = dict.fromkeys(map(ord, drop)), Counter[str]()
        for word, count in self.words.items():
            words[word.translate(dropped)] += count
        words.pop("", None)
        return words


def propose(alphabet: Alphabet) -> tuple[dict[str, Any], list[str]]:
    """A section of kind `characters` that can write every transcript, but for what is not spoken; and why it is so."""
    counts, inside, example = _in_words(alphabet.words)
    symbols, drop, unnameable = set[str](), set[str](), set[str]()
    for character, count in counts.items():
        category = unicodedata.category(character)
        if category in ("Cc", "Cs"):
            unnameable.add(character)
        elif category == "Cf":
            drop.add(character)
        elif category[0] not in "PS" or category == "Sc" or character in READ_ALOUD:
            symbols.add(character)
        else:
            (symbols if 2 * inside[character] >= count else drop).add(character)
    letters, digits = symbols & set(string.ascii_lowercase), symbols & set(string.digits)
    if 2 * len(letters) > len(string.ascii_lowercase):
        symbols.update(string.ascii_lowercase)
    if digits:
        symbols.update(string.digits)
    if alphabet.words.total() > alphabet.texts:
        symbols.add(" ")
    capitals = sum(character != character.lower() for character in alphabet.characters)
    reasons = [f"{len(symbols)} symbols; {capitals} capital letters are written in lower case"] if symbols else []
    if added := symbols - set(counts) - {" "}:
        reasons.append(f"{_joined(added)}: not in these transcripts, but likely in others")
    if digits:
        reasons.append("digits are symbols; models learn numbers better if they are written as words")
    if drop:
        reasons.append(f"drop: punctuation and invisible characters ({' '.join(map(describe, sorted(drop)))})")
    if joining := [example[mark] for mark in sorted(drop) if mark in example and mark.isprintable()]:
        reasons.append(f"drop joins the parts of words such as {', '.join(joining[:3])}")
    if marks := [word for word, _ in alphabet.words.most_common() if _ANNOTATION.fullmatch(word)]:
        reasons.append(f"{', '.join(marks[:5])}: if these are not spoken, remove them from the transcripts")
    if unnameable:
        shown = " ".join(map(describe, sorted(unnameable)))
        reasons.append(f"no setting can name {shown}: transcripts with these characters stay left out")
    section = {"kind": "characters", "symbols": _joined(symbols), "lowercase": True, "drop": _joined(drop)}
    return section, ["".join(c if c.isprintable() else "?" for c in reason) for reason in reasons]


def _in_words(words: Counter[str]) -> tuple[Counter[str], Counter[str], dict[str, str]]:
    """How often each character occurs, how often between two letters or digits, and a word where it does."""
    counts, inside, example = Counter[str](), Counter[str](), dict[str, str]()
    for word, count in words.items():
        for character in word:
            counts[character] += count
        if word.isalnum():
            continue
        for before, character, after in zip(word, word[1:], word[2:], strict=False):
            if _belongs_to_a_word(before) and _belongs_to_a_word(after):
                inside[character] += count
                example.setdefault(character, word)
    return counts, inside, example


def _belongs_to_a_word(character: str) -> bool:
    """A letter, its mark or a digit, but not of Chinese or Japanese, whose words have no spaces between them."""
    return unicodedata.category(character)[0] in "LMN" and unicodedata.east_asian_width(character) != "W"


def _joined(characters: set[str]) -> str:
    """All of them in the order of their code points, except where NFC would join two neighbours."""
    text = ""
    for character in sorted(characters):
        after = text + character
        text = after if unicodedata.normalize("NFC", after) == after else character + text
    return text
