"""Word pieces against sentencepiece itself: classes, texts and what decoders make of them; how they are learnt."""

import base64
import itertools
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import groupby

import pytest
import sentencepiece
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddp_asr import config
from ddp_asr.decoding import make_decoder
from ddp_asr.decoding.align import align_text
from ddp_asr.decoding.ngram import read_arpa
from ddp_asr.errors import UserError
from ddp_asr.text import make_tokeniser, pieces
from tests.back_off import BackOff
from tests.test_bonuses import occurrences

SYMBOLS = " ab'"
SETTINGS = config.Pieces(size=9, symbols=SYMBOLS, drop=".")
TRANSCRIPTS = ["ab a bab", "Ab ab. aab", "bab a b'a", "a a", "ab 9", ""]
LETTERS = st.text(SYMBOLS, max_size=30)


@cache
def tokeniser_of(size=SETTINGS.size):
    return make_tokeniser(replace(SETTINGS, size=size), TRANSCRIPTS)


def theirs(tokeniser):
    """sentencepiece with the same model; its first number is <unk>."""
    return sentencepiece.SentencePieceProcessor(model_proto=base64.b64decode(tokeniser.state()["model"]))


# ---- the tokeniser -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 9, 12])
@given(text=LETTERS)
def test_classes_and_texts_are_those_of_sentencepiece(size, text):
    ours, oracle = tokeniser_of(size), theirs(tokeniser_of(size))
    numbers = oracle.encode(ours.normalise(text))
    assert ours.encode(text).tolist() == [number - 1 for number in numbers]
    assert ours.decode(ours.encode(text)) == oracle.decode(numbers) == " ".join(text.split())


@given(st.lists(st.integers(0, SETTINGS.size - 1), max_size=8))
def test_any_classes_are_the_words_that_sentencepiece_makes_of_them(classes):
    ours = tokeniser_of()
    assert ours.decode(classes).split() == theirs(ours).decode([number + 1 for number in classes]).split()


def test_pieces_begin_words_or_go_on_with_them_and_every_character_is_one():
    symbols = tokeniser_of().symbols
    assert len(symbols) == SETTINGS.size == len(set(symbols))
    assert all(" " not in symbol[1:] for symbol in symbols) and set(SYMBOLS) <= set(symbols)
    assert " ab" in symbols and " a" in symbols


def test_equal_neighbours_are_counted_in_pieces():
    ours = tokeniser_of()
    assert [ours.symbols[number] for number in ours.encode("a a aab")] == [" a", " a", " a", "ab"]
    counts = ours.count(["a a aab", "aa", ""])
    assert (counts.length.tolist(), counts.repeats.tolist()) == ([4, 2, 0], [2, 0, 0])


def test_foreign_characters_leave_no_gap():
    ours = tokeniser_of()
    for text in ("a 9 b", "9a b9", "a \N{LOWER ONE EIGHTH BLOCK}b"):
        assert ours.decode(ours.encode(text, skip_foreign=True)) == "a b"
    assert ours.count(["\N{LOWER ONE EIGHTH BLOCK}"]).foreign == ["\N{LOWER ONE EIGHTH BLOCK}"]


# ---- how they are learnt -------------------------------------------------------------------------------------------

LEARN = """
import hashlib, sys
from ddp_asr.text.pieces import learn
print(hashlib.sha256(learn(sys.argv[1].split("|"), 9, " ab'")).hexdigest())
"""


def test_the_same_words_give_the_same_bytes_in_any_order_and_process():
    texts = [" ".join(each) for each in itertools.product(["ab", "bab", "a"], repeat=3)]
    orders = [texts, texts[::-1], [" ".join(texts)]]
    found = {
        subprocess.run(
            [sys.executable, "-c", LEARN, "|".join(order)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for order, seed in zip(orders, "012", strict=True)
    }
    assert len(found) == 1


def test_what_cannot_be_written_is_not_learnt_from():
    with_more = make_tokeniser(SETTINGS, [*TRANSCRIPTS, *["bbbb bbbb 1"] * 100])
    assert with_more.state() == tokeniser_of().state()


@pytest.mark.parametrize(
    ("transcripts", "said"),
    [
        (["ab ab", "ba"], r"size = 20 pieces cannot be learnt of 2 different words \(they give at most \d+\): lower"),
        ([], 'there is no transcript of the characters " ab\'" to learn word pieces from'),
        (["19", ". "], "there is no transcript of the characters"),
    ],
)
def test_too_little_text_is_one_sentence(transcripts, said):
    with pytest.raises(UserError, match=said) as refused:
        make_tokeniser(replace(SETTINGS, size=20), transcripts)
    assert "\n" not in str(refused.value)


def test_the_largest_size_that_is_named_is_possible():
    with pytest.raises(UserError) as refused:
        make_tokeniser(replace(SETTINGS, size=20), ["ab ab", "ba"])
    most = int(str(refused.value).split("at most ")[1].split(")")[0])
    assert len(make_tokeniser(replace(SETTINGS, size=most), ["ab ab", "ba"]).symbols) == most


def test_a_file_gives_the_same_tokeniser_and_another_one_is_refused(tmp_path):
    path = tmp_path / "pieces.model"
    path.write_bytes(tokeniser_of().files()["pieces.model"])
    named = replace(SETTINGS, model=str(path))
    assert make_tokeniser(named).state() == tokeniser_of().state()
    for settings, said in (
        (replace(named, size=12), "has 9 pieces and vocabulary.size is 12: set --vocabulary.size=9$"),
        (replace(named, symbols=" abc"), "the characters of its pieces are \" 'ab\", not those of ' abc'"),
        (replace(named, model=str(tmp_path)), "cannot be read .Is a directory"),
        (replace(named, model=str(tmp_path / "none")), "cannot be read .No such file"),
        (replace(named, model=__file__), "it is no model of sentencepiece"),
        (replace(named, model=os.devnull), "vocabulary.model = /dev/null"),
    ):
        with pytest.raises(UserError, match=said) as refused:
            make_tokeniser(settings)
        assert "\n" not in str(refused.value)


def test_a_model_of_another_program_has_no_classes_for_beginning_and_end(tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(["ab a bab", "ab ab aab", "bab a b'a"]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(lines), model_prefix=str(tmp_path / "bpe"), model_type="bpe", vocab_size=12, num_threads=1,
        pad_id=3, minloglevel=2,
    )  # fmt: skip
    ours = make_tokeniser(replace(SETTINGS, size=8, model=str(tmp_path / "bpe.model")))
    assert not {"<s>", "</s>", "<unk>", "<pad>"} & set(ours.symbols) and ours.blank == 8
    assert ours.decode(ours.encode("bab b'a")) == "bab b'a"


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match=r"needs the package sentencepiece: install it with .*'\.\[pieces\]'"):
        pieces.learn(["ab"], 9, SYMBOLS)


# ---- decoding ------------------------------------------------------------------------------------------------------


def logits_of(ours, path):
    logits = torch.zeros(1, len(path), ours.size)
    logits[0, range(len(path)), path] = 9.0
    return logits, torch.tensor([len(path)])


@given(st.lists(st.integers(0, SETTINGS.size), max_size=10))
def test_greedy_is_the_collapsed_path_by_sentencepiece(path):
    ours = tokeniser_of()
    (found,) = make_decoder(config.Greedy(), ours, 0.5)(*logits_of(ours, path))
    collapsed = [number for number, _ in groupby(path) if number != ours.blank]
    assert found.text == " ".join(theirs(ours).decode([number + 1 for number in collapsed]).split())


@pytest.mark.parametrize("kind", ["greedy", "beam"])
def test_words_are_timed_from_their_first_piece_to_their_last(kind):
    ours = tokeniser_of()
    classes = {symbol: number for number, symbol in enumerate(ours.symbols)} | {"": ours.blank}
    path = [classes[symbol] for symbol in ("", " a", " a", "", "b", " ", " ", "b", "ab", "", " ab", "")]
    settings = config.Greedy() if kind == "greedy" else config.Beam()
    (found,) = make_decoder(settings, ours, 0.5)(*logits_of(ours, path))
    assert [(word.text, word.start_s, word.end_s) for word in found.words] == [
        ("ab", 0.5, 2.5),
        ("bab", 3.5, 4.5),
        ("ab", 5.0, 5.5),
    ]
    assert all(0.99 < word.confidence <= 1 for word in found.words)


def test_confidence_is_the_mean_over_the_pieces_of_the_word():
    ours = tokeniser_of()
    logits, frames = logits_of(ours, [ours.symbols.index(" a"), ours.symbols.index("b")])
    logits[0, 1] /= 3
    (found,) = make_decoder(config.Greedy(), ours, 0.5)(logits, frames)
    first, second = logits[0].softmax(-1).max(-1).values.tolist()
    assert [word.text for word in found.words] == ["ab"]
    assert found.words[0].confidence == pytest.approx(math.sqrt(first * second), rel=1e-5)


def test_alignment_gives_every_word_of_the_text():
    ours = tokeniser_of()
    log_p = torch.randn(20, ours.size, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    times = torch.arange(21).numpy() * 0.5
    words, score = align_text(log_p, "Bab. a ab b'a", ours, times[:-1], times[1:])
    assert [word.text for word in words] == ["bab", "a", "ab", "b'a"] and 0 < score < 1
    edges = [edge for word in words for edge in (word.start_s, word.end_s)]
    assert edges == sorted(edges)


@pytest.fixture
def lm(tmp_path):
    """A language model of the pieces of a text, made by the command for a run of them."""
    from ddp_asr import cli

    (tmp_path / "text.txt").write_text("ab a bab\nab aab\nb'a ab\n")
    (tmp_path / "pieces.model").write_bytes(tokeniser_of().files()["pieces.model"])
    tree = {"kind": "pieces", "size": SETTINGS.size, "symbols": SYMBOLS, "drop": "."}
    (tmp_path / "config.yaml").write_text(json.dumps({"vocabulary": tree}))
    out = tmp_path / "lm.arpa"
    assert cli.main(["lm", str(tmp_path / "text.txt"), "--run", str(tmp_path), "--order=3", "--out", str(out)]) == 0
    return out


def test_a_language_model_is_of_the_runs_pieces(lm, tmp_path, capsys):
    text = lm.read_text(encoding="utf8")
    assert "\t\N{LOWER ONE EIGHTH BLOCK}ab\t" in text and "<space>ab" not in text
    model = read_arpa(lm)
    assert {" ab", " a", "ab"} <= set(model.symbols) - {"<s>", "</s>", "<unk>"} <= set(tokeniser_of().symbols)
    from ddp_asr import cli

    for unit, said in (("char", "--unit char does not suit a recogniser that writes word pieces"), ("word", None)):
        command = ["lm", str(tmp_path / "text.txt"), "--run", str(tmp_path), f"--unit={unit}", "--out", str(lm)]
        if said is None:
            assert cli.main(command) == 0 and "--unit word" in capsys.readouterr().out
        else:
            with pytest.raises(UserError, match=said):
                cli.main(command)


def enumerated(log_p):
    """{text as classes: log-probability of all its paths}"""
    frames, classes = log_p.shape
    of_text: dict[tuple[int, ...], list[float]] = {}
    for path in itertools.product(range(classes), repeat=frames):
        text = tuple(number for number, _ in groupby(path) if number != classes - 1)
        of_text.setdefault(text, []).append(math.exp(sum(float(log_p[f, n]) for f, n in enumerate(path))))
    return {text: math.log(math.fsum(paths)) for text, paths in of_text.items()}


def test_the_beam_finds_what_the_enumeration_of_all_paths_does(lm, tmp_path):
    """With a language model of pieces, hot words and all bonuses."""
    ours, symbols, log10_p = tokeniser_of(), tokeniser_of().symbols, BackOff(read_arpa(lm))
    (tmp_path / "hot.txt").write_text("ab\nb a\n")
    bonuses = config.Beam(symbol_bonus=0.2, word_bonus=-0.4, hot_words=str(tmp_path / "hot.txt"), hot_word_bonus=1.1)
    settings = replace(bonuses, size=1_500, lm=str(lm), lm_weight=0.7, n_best=30)
    log_p = 2 * torch.randn(3, ours.size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    log_p = log_p.log_softmax(-1)
    (found,) = make_decoder(settings, ours, 0.5)(log_p[None], torch.tensor([3]))

    def prior(text):
        spelled = ["<s>", *(symbols[number] for number in text), "</s>"]
        of_lm = sum(log10_p(spelled[:place], spelled[place]) for place in range(1, len(spelled)))
        written = "".join(spelled[1:-1])
        added = 0.2 * len(text) - 0.4 * len(written.split()) + 1.1 * occurrences(written, ["ab", "b a"], True)
        return added + 0.7 * math.log(10) * of_lm

    expected: dict[str, float] = {}
    for text, score in enumerated(log_p).items():
        written = " ".join("".join(symbols[number] for number in text).split())
        expected[written] = max(score + prior(text), expected.get(written, -math.inf))
    best = sorted(expected.items(), key=lambda item: -item[1])[:30]
    assert [(found.text, pytest.approx(found.score, rel=1e-5)), *found.others] == [
        (text, pytest.approx(score, rel=1e-5)) for text, score in best
    ]


def test_the_lexicon_refuses_them_in_a_sentence(tmp_path):
    pytest.importorskip("flashlight")
    (tmp_path / "words.txt").write_text("ab\n")
    with pytest.raises(UserError, match=r"lexicon needs a vocabulary of characters.*set decoder.kind to beam"):
        make_decoder(config.Lexicon(lexicon=str(tmp_path / "words.txt")), tokeniser_of(), 0.5)
