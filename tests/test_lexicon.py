"""The lexicon decoder against an enumeration of all CTC paths, and what it says of files that it cannot use.

The promises of every decoder are in test_decoders.py.
"""

import gzip
import itertools
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddp_asr import config
from ddp_asr.decoding.kneser_ney import estimate
from ddp_asr.decoding.lexicon import Lexicon
from ddp_asr.decoding.ngram import END, START, NGramModel, read_arpa, write_arpa
from ddp_asr.errors import UserError
from ddp_asr.text.characters import Characters
from tests.back_off import BackOff

pytest.importorskip("flashlight")

SYMBOLS = " ab"
TOKENISER = Characters(SYMBOLS)
BLANK = len(SYMBOLS)
WORDS = ["a", "ab", "bb"]  # one is the beginning of another; one needs a blank between equal symbols
SENTENCES = [["a", "ab"], ["ab", "a", "bb"], ["a"], ["bb", "ab"], ["a", "a", "ab"]]
WEIGHT, WORD_BONUS = 0.7, -0.4
ALL = {"size": 10_000, "threshold": 1e6, "n_best": 10_000}
CASES = 12


def word_model(sentences: list[list[str]], order: int = 2) -> NGramModel:
    words = sorted({word for sentence in sentences for word in sentence})
    numbers = [words.index(word) for sentence in sentences for word in sentence]
    return estimate(np.array(numbers), np.array([len(sentence) for sentence in sentences]), words, order)[0]


@pytest.fixture(scope="module")
def lm(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("lm") / "words.arpa"
    write_arpa(word_model(SENTENCES), path)
    return str(path)


def decoder(**settings) -> Lexicon:
    return Lexicon(replace(config.Lexicon(), **settings), TOKENISER, 0.5)


def random_logits(case: int, frames: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(case)
    logits = 2 * torch.randn(frames, BLANK + 1, generator=random)
    impossible = torch.rand(logits.shape, generator=random) < 0.1 * (case % 2)
    impossible[:, case % (BLANK + 1)] = False
    return logits.masked_fill(impossible, -math.inf)


def enumerated(log_p: torch.Tensor, model: NGramModel | None, spelled: dict[str, str]) -> dict[str, float]:
    """The score of every text of these words that has a probability, from all paths; `spelled`: spelling -> word."""
    p = log_p.double().exp().tolist()
    of_text: dict[str, list[float]] = {}
    for path in itertools.product(range(BLANK + 1), repeat=len(p)):
        symbols = [symbol for symbol, _ in itertools.groupby(path) if symbol != BLANK]
        spellings = "".join(SYMBOLS[symbol] for symbol in symbols).split()
        if all(spelling in spelled for spelling in spellings):
            text = " ".join(spelled[spelling] for spelling in spellings)
            of_text.setdefault(text, []).append(math.prod(p[frame][symbol] for frame, symbol in enumerate(path)))
    log10_p = BackOff(model) if model else lambda context, word: 0.0
    scores = {}
    for text, paths in of_text.items():
        sentence = [START, *text.split(), END]
        log10_lm = sum(log10_p(sentence[:place], sentence[place]) for place in range(1, len(sentence)))
        if p_audio := math.fsum(paths):
            words = len(sentence) - 2
            scores[text] = math.log(p_audio) + WEIGHT * math.log(10) * log10_lm + WORD_BONUS * words
    return scores


def texts_of(hypothesis) -> dict[str, float]:
    return {hypothesis.text: hypothesis.score, **dict(hypothesis.others)}


def assert_equal_scores(found: dict[str, float], expected: dict[str, float]) -> None:
    possible = {text: score for text, score in found.items() if score > -1000}  # without paths that have no probability
    assert possible == pytest.approx(expected, abs=1e-4)
    assert list(possible) == sorted(possible, key=possible.__getitem__, reverse=True)
    assert next(iter(found)) == max(expected, key=expected.__getitem__)


@pytest.mark.parametrize("with_lm", [False, True])
def test_a_beam_that_holds_every_text_finds_what_the_enumeration_does(with_lm, lm, tmp_path):
    (tmp_path / "lexicon.txt").write_text("\n".join(WORDS))
    files = {"lm": lm} if with_lm else {"lexicon": str(tmp_path / "lexicon.txt")}
    search = decoder(**files, lm_weight=WEIGHT, word_bonus=WORD_BONUS, **ALL)
    model = read_arpa(Path(lm)) if with_lm else None
    for case in range(CASES):
        logits = random_logits(case, frames=case % 6 + 1)
        expected = enumerated(logits.log_softmax(-1), model, {word: word for word in WORDS})
        (hypothesis,) = search(logits[None], torch.tensor([len(logits)]))
        assert_equal_scores(texts_of(hypothesis), expected)


def test_a_word_is_found_by_any_of_its_spellings_and_written_as_itself(tmp_path):
    """Each spelling is of one word here, so that the oracle can tell the words from the spellings."""
    (tmp_path / "lexicon.txt").write_text("Ba\ta\n\nba\tAB\nba\tbb\nba\tbb\n", encoding="utf-8-sig")
    search = decoder(lexicon=str(tmp_path / "lexicon.txt"), word_bonus=WORD_BONUS, **ALL)
    logits = random_logits(4, frames=5)
    # "Ba" and "ba" are written alike: the better of both counts.
    expected = enumerated(logits.log_softmax(-1), None, {"a": "Ba", "ab": "ba", "bb": "ba"})
    alike: dict[str, float] = {}
    for text, score in sorted(expected.items(), key=lambda item: -item[1]):
        alike.setdefault(text.lower(), score)
    assert_equal_scores(texts_of(search(logits[None], torch.tensor([5]))[0]), alike)


def logits_of(*paths: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are nearly sure of these paths; '-' is the blank."""
    frames = torch.tensor([len(path) for path in paths])
    logits = torch.zeros(len(paths), int(frames.max()), BLANK + 1)
    for row, path in enumerate(paths):
        for frame, symbol in enumerate(path):
            logits[row, frame, (SYMBOLS + "-").index(symbol)] = 12
    return logits, frames


@pytest.fixture(scope="module")
def lexicon(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("lexicon") / "lexicon.txt"
    path.write_text("a\nab\nbb\nbbb\tba\n")
    return str(path)


def test_sure_logits_give_words_of_the_lexicon_with_their_times(lexicon):
    paths = ["---", "", "-aa-", "ab a", "ab  - bb-", "b-b", " a-", "a- -a", "-ba-"]
    texts = [each.text for each in decoder(lexicon=lexicon)(*logits_of(*paths))]
    assert texts == ["", "", "a", "ab a", "ab ab", "bb", "a", "a a", "bbb"]  # "bb" needs a blank within
    hypothesis = decoder(lexicon=lexicon)(*logits_of("-aa-b- -ba-"))[0]
    assert [(word.text, word.start_s, word.end_s) for word in hypothesis.words] == [("ab", 0.5, 2.5), ("bbb", 4.0, 5.0)]
    assert [word.confidence for word in hypothesis.words] == pytest.approx([1, 1], abs=1e-3)


def test_letters_in_no_word_are_not_written(lexicon):
    """One hypothesis, of letters that begin a word and do not end one: what precedes them is the text."""
    logits, frames = logits_of("a bbb")
    (hypothesis,) = decoder(lexicon=lexicon, size=1)(logits, frames)
    assert (hypothesis.text, [word.text for word in hypothesis.words]) == ("a", ["a"])
    assert hypothesis.score < -1000
    (hypothesis,) = decoder(lexicon=lexicon)(logits, frames)
    assert set(hypothesis.text.split()) <= {"a", "ab", "bb", "bbb"} and hypothesis.score > -1000


def test_neighbours_padding_and_types_change_nothing(lm):
    torch.manual_seed(0)
    logits, frames = 2 * torch.randn(6, 12, BLANK + 1), torch.tensor([12, 0, 5, 1, 9, 12])
    search = decoder(lm=lm, n_best=4)
    together = search(logits, frames)
    for row, length in enumerate(frames.tolist()):
        (alone,) = search(logits[row : row + 1, :length].double(), frames[row : row + 1])
        assert alone.text == together[row].text
        assert texts_of(alone) == pytest.approx(texts_of(together[row]), rel=1e-5)
        assert [word.start_s for word in alone.words] == [word.start_s for word in together[row].words]
    broken = search(torch.full((1, 12, BLANK + 1), math.nan), frames[:1])
    assert len(broken) == 1


def test_of_many_words_with_one_spelling_the_most_probable_are_kept(tmp_path):
    words = ["b" * length for length in range(1, 10)]
    (tmp_path / "lexicon.txt").write_text("".join(f"{word}\ta\n" for word in words))
    sentences = [[other, word] for word in words for other in words[: len(word)]]  # longer words follow more words
    write_arpa(word_model(sentences), tmp_path / "lm.arpa")
    search = decoder(lexicon=str(tmp_path / "lexicon.txt"), lm=str(tmp_path / "lm.arpa"), n_best=50)
    texts = texts_of(search(*logits_of("-a-"))[0])
    assert {text for text in texts if len(text.split()) == 1} == set(words[-6:])


def test_a_compressed_language_model_of_capitals_is_read(tmp_path):
    """Words are spelled, and written, as the tokeniser normalises them."""
    write_arpa(word_model([[word.upper() for word in sentence] for sentence in SENTENCES]), tmp_path / "lm.arpa.gz")
    (hypothesis,) = decoder(lm=str(tmp_path / "lm.arpa.gz"))(*logits_of("ab b-b"))
    assert hypothesis.text == "ab bb"


def test_words_of_the_language_model_that_cannot_be_spelled_are_named_and_left_out(tmp_path, capsys):
    write_arpa(word_model([*SENTENCES, ["cab", "a"]]), tmp_path / "lm.arpa")
    assert decoder(lm=str(tmp_path / "lm.arpa"))(*logits_of("ab"))[0].text == "ab"
    assert "1 of 4 words of" in (said := capsys.readouterr().err) and "are left out: 'cab'\n" in said


def refusal(tmp_path, lexicon: bytes | None = None, lm: bytes | None = None, tokeniser=TOKENISER) -> str:
    """What is said of a lexicon and a language model of this content."""
    files: dict[str, Any] = {}
    for name, content in (("lexicon", lexicon), ("lm", lm)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
            files[name] = str(tmp_path / name)
    with pytest.raises(UserError) as refused:
        Lexicon(replace(config.Lexicon(), **files), tokeniser, 0.5)
    assert "\n" not in str(refused.value)
    return str(refused.value).replace(f"{tmp_path}/", "")


def test_lexicons_that_cannot_be_used(tmp_path):
    spelled = "lexicon, line 2: {!r} cannot be spelled with the run's symbols, because {}: take it out"
    for text, word, reason in [
        ("a\nabc\n", "abc", "the model cannot write 'c'"),
        ("\na b\n", "a b", "it or its spelling is not a single word"),
        ("\na\ta b\n", "a", "it or its spelling is not a single word"),
        ("a\r\nc\tc\r\n", "c", "the model cannot write 'c'"),
    ]:
        assert refusal(tmp_path, text.encode()).startswith(spelled.format(word, reason))
    dropping = Characters(SYMBOLS, drop=".")
    assert "is not a single word" in refusal(tmp_path, b"...", tokeniser=dropping)
    assert refusal(tmp_path, b"\n \n") == "lexicon has no word for the lexicon: name a file with words"
    assert refusal(tmp_path, b"\xff\xfe").startswith("lexicon is not UTF-8")
    assert refusal(tmp_path, gzip.compress(b"a\n")[:-9]).startswith("lexicon is damaged or was cut")
    assert refusal(tmp_path).startswith("decoder.kind = lexicon needs words: name")
    assert "needs the space among vocabulary.symbols" in refusal(tmp_path, b"a", tokeniser=Characters("ab"))
    with pytest.raises(UserError, match=r"none cannot be read \(No such file or directory\)"):
        decoder(lexicon=str(tmp_path / "none"))


def test_language_models_that_cannot_be_used(lm, tmp_path):
    arpa = Path(lm).read_bytes()
    characters = arpa.replace(b"bb", b"<space>").replace(b"ab", b"b")
    assert refusal(tmp_path, b"a", characters).startswith("the language model lm is one of characters")
    assert refusal(tmp_path, b"aa\nba", arpa).startswith(
        "the language model lm has none of the 2 words of lexicon, such"
    )
    for cut in (len(arpa) // 2, len(arpa) - 6):
        assert refusal(tmp_path, lm=arpa[:cut]).startswith("KenLM cannot read lm (End of file")
    assert refusal(tmp_path, lm=b"nothing\n").startswith('KenLM cannot read lm (first non-empty line was "nothing"')
    quoted = arpa.replace(b"2-grams:\n", b"2-grams:\n\x8a")  # which is not among the words that are read before
    assert refusal(tmp_path, b"ab", quoted).startswith("KenLM cannot read lm (")
    assert "\t" not in refusal(tmp_path, lm=arpa.replace(b"\\data\\\n", b"\\data\\\tx\n"))
    assert refusal(tmp_path, lm=gzip.compress(arpa)[:-20]).startswith("KenLM cannot read lm (zlib encountered an error")
    assert refusal(tmp_path, lm=gzip.compress(arpa)[:30]).startswith("lm is damaged or was cut")
    write_arpa(word_model(SENTENCES, order=1), tmp_path / "lm")
    assert "at least a bigram model" in refusal(tmp_path, lm=(tmp_path / "lm").read_bytes())
    foreign = arpa.replace(b"bb", b"cc").replace(b"ab", b"d").replace(b"\ta\t", b"\te\t")
    foreign = foreign.replace(b" a\t", b" e\t").replace(b"\ta ", b"\te ").replace(b" a\n", b" e\n")
    assert refusal(tmp_path, lm=foreign) == "lm has no word for the lexicon: name a file with words"
    with pytest.raises(UserError, match=r"none\.arpa cannot be read \(No such file or directory\)"):
        decoder(lm=str(tmp_path / "none.arpa"))


def test_a_missing_package_is_named(lexicon, monkeypatch):
    monkeypatch.setitem(sys.modules, "flashlight.lib.text", None)
    with pytest.raises(UserError, match=r"needs the package flashlight-text: install it with pip install -e '\.\[lexi"):
        decoder(lexicon=lexicon)
