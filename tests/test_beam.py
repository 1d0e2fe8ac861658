"""Beam search against an enumeration of all CTC paths, with and without language model and bonuses.

The promises of every decoder are in test_decoders.py.
"""

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ddp_asr import config
from ddp_asr.decoding import beam, ngram
from ddp_asr.decoding.automaton import Arcs, Table
from ddp_asr.decoding.beam import Beam, log_probabilities, make_text_model, search
from ddp_asr.decoding.bonuses import make_bonuses
from ddp_asr.errors import UserError
from ddp_asr.text.characters import Characters
from ddp_asr.text.score import Counts, count_each
from tests.test_bonuses import occurrences
from tests.test_kneser_ney import model_of

SYMBOLS = ["a", " ", "b"]
TOKENISER = Characters("".join(SYMBOLS))
BLANK = len(SYMBOLS)
WEIGHT = 0.7
BONUSES: dict[str, Any] = {
    "symbol_bonus": 0.3,
    "word_bonus": -0.4,
    "hot_words": ["a", "a b", "ba"],
    "hot_word_bonus": 1.1,
}
HOT_WORDS, HOT_WORD_BONUS = ["a", "ba", "a b"], 1.1
CASES = 60  # each with and without a language model
LARGE = 400  # as many texts as 5 frames of 4 classes can spell


def random_log_p(case: int) -> torch.Tensor:
    """Log-probabilities (T', V) of up to 5 frames and 2 to 4 classes; a class is impossible now and then."""
    random = torch.Generator().manual_seed(case)
    classes = 2 + case % 3
    logits = 2 * torch.randn(case % 6, classes, generator=random, dtype=torch.float64)
    impossible = torch.rand(logits.shape, generator=random) < 0.1 * (case % 2)
    impossible[:, case % classes] = False
    return logits.masked_fill(impossible, -math.inf).log_softmax(-1)


def random_table(case: int, symbols: int, states: int = 4) -> Table:
    random = torch.Generator().manual_seed(1_000 + case)
    log_p = torch.randn(states, symbols + 1, generator=random, dtype=torch.float64).log_softmax(-1)
    next_state = torch.randint(states, (states, symbols), generator=random)
    if case % 5 == 0:  # the model refuses a symbol
        log_p[0, 0] = -math.inf
    return Table(log_p[:, :-1], next_state, log_p[:, -1], start=case % states)


def prior(text: tuple[int, ...], table: Table | None, bonuses: dict, has_space: bool) -> float:
    """What a text adds to its score apart from the audio."""
    written, added = "".join(SYMBOLS[symbol] for symbol in text), 0.0
    if bonuses:
        added = bonuses["symbol_bonus"] * len(text) + bonuses["word_bonus"] * len(written.split())
        added += bonuses["hot_word_bonus"] * occurrences(written, bonuses["hot_words"], has_space)
    if table is not None:
        state = table.start
        for symbol in text:
            added += WEIGHT * float(table.log_p[state, symbol])
            state = int(table.next_state[state, symbol])
        added += WEIGHT * float(table.end[state])
    return added


def enumerated(log_p: torch.Tensor, *of_the_text) -> dict[tuple[int, ...], float]:
    """The score of every text that has a probability, from all paths."""
    frames, classes = log_p.shape
    p = log_p.exp().tolist()
    of_text: dict[tuple[int, ...], list[float]] = {}
    for path in itertools.product(range(classes), repeat=frames):
        text = tuple(symbol for symbol, _ in itertools.groupby(path) if symbol != classes - 1)
        of_text.setdefault(text, []).append(math.prod(p[frame][symbol] for frame, symbol in enumerate(path)))
    scores = {
        text: math.log(math.fsum(paths)) + prior(text, *of_the_text)
        for text, paths in of_text.items()
        if math.fsum(paths)
    }
    return {text: score for text, score in scores.items() if score > -math.inf}


def case_of(number: int, with_table: bool):
    """(log-probabilities, text model, the true score of each text)."""
    log_p = random_log_p(number)
    symbols = log_p.shape[1] - 1
    table = random_table(number, symbols) if with_table else None
    bonuses = BONUSES if number % 4 else {}
    model = make_text_model(make_bonuses(SYMBOLS[:symbols], **bonuses), table, WEIGHT).to(log_p.device, log_p.dtype)
    return log_p, model, enumerated(log_p, table, bonuses, " " in SYMBOLS[:symbols])


def searched(log_p, model, size, symbols_per_frame=0) -> dict[tuple[int, ...], float]:
    """The score of each text that the search finds; no text may come twice."""
    found, scores = search(log_p[None], model, size, symbols_per_frame)
    blank = log_p.shape[1] - 1
    texts = [tuple(symbol for symbol in row if symbol != blank) for row in found[0].tolist()]
    alive = {text: score for text, score in zip(texts, scores[0].tolist(), strict=True) if score > -math.inf}
    assert len(alive) == (scores > -math.inf).sum()
    assert scores[0].tolist() == sorted(scores[0].tolist(), reverse=True)
    return alive


@pytest.mark.parametrize("with_table", [False, True])
def test_a_beam_that_holds_every_text_finds_what_the_enumeration_does(with_table):
    for number in range(CASES):
        log_p, model, expected = case_of(number, with_table)
        found = searched(log_p, model, LARGE)
        assert found.keys() == expected.keys()
        for text, score in found.items():
            assert score == pytest.approx(expected[text], abs=1e-9)


@pytest.mark.parametrize("with_table", [False, True])
def test_no_beam_counts_a_path_twice_and_none_beats_a_larger_one(with_table):
    """Where dead places of the beam took part, texts would get more than their paths are worth."""
    for number in range(CASES):
        log_p, model, expected = case_of(number, with_table)
        best = [-math.inf]
        for size in (1, 2, 4, 8, LARGE):
            found = searched(log_p, model, size)
            assert all(score <= expected[text] + 1e-9 for text, score in found.items())
            best.append(max(found.values()))
        assert max(best) == pytest.approx(best[-1], abs=1e-9)  # what holds every text is the best


def test_larger_beams_find_better_texts():
    """Single small beams may be lucky; over many utterances the true score of the found text rises with the beam."""
    means = []
    for size in (1, 2, 4, 8):
        scores = []
        for number in range(CASES):
            log_p, model, expected = case_of(number, True)
            found = searched(log_p, model, size)
            scores.append(expected[max(found, key=found.__getitem__)])
        means.append(np.mean(scores))
    assert means == sorted(means) and means[0] < means[-1]


def noisy_corpus(sentences: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of an alignment of each sentence, one or two frames a symbol, drowned in noise."""
    random = np.random.default_rng(0)
    rows = []
    for sentence in sentences:
        path = []
        for symbol in sentence:
            path += [SYMBOLS.index(symbol)] * int(random.integers(1, 3)) + [BLANK]
        rows.append(3 * np.eye(BLANK + 1)[path] + 1.5 * random.standard_normal((len(path), BLANK + 1)))
    frames = torch.tensor([len(row) for row in rows])
    return torch.nn.utils.rnn.pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True), frames


def test_over_a_corpus_no_larger_beam_finds_less_probable_texts_or_makes_more_word_errors():
    random = np.random.default_rng(1)
    sentences = [" ".join(random.choice(["ab", "ba", "abba", "b", "aab"], size=4)) for _ in range(130)]
    spoken, written = sentences[:30], sentences[30:]
    lm = model_of([list(sentence) for sentence in written], 4)[0].arcs(SYMBOLS).table()
    logits, frames = noisy_corpus(spoken)
    mean_scores, errors = [], []
    for size in (1, 2, 4, 8, 16, 32):
        found = decoder(lm, size=size, lm_weight=0.7, symbol_bonus=0.5)(logits, frames)
        mean_scores.append(np.mean([hypothesis.score for hypothesis in found]))
        errors.append(Counts.from_array(count_each(spoken, [each.text for each in found]).sum(axis=0)).word_errors)
    assert mean_scores == sorted(mean_scores)
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0], errors


def test_of_pruned_symbols_the_probable_ones_remain():
    for number in range(CASES):
        log_p, model, expected = case_of(number, True)
        symbols = log_p.shape[1] - 1
        assert searched(log_p, model, LARGE, symbols) == searched(log_p, model, LARGE)
        for text, score in searched(log_p, model, LARGE, 1).items():
            assert score <= expected[text] + 1e-9


def decoder(table: Table | None = None, **settings) -> Beam:
    return Beam(replace(config.Beam(), **settings), TOKENISER, 0.5, table)


def logits_of(*paths: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are nearly sure of these paths; '-' is the blank."""
    frames = torch.tensor([len(path) for path in paths])
    logits = torch.zeros(len(paths), int(frames.max()), BLANK + 1)
    for row, path in enumerate(paths):
        for frame, symbol in enumerate(path):
            logits[row, frame, ("".join(SYMBOLS) + "-").index(symbol)] = 12
    return logits, frames


def test_sure_logits_give_their_text_and_times():
    paths = ["---", "", "a", "-aa-", "a-a", "ab -b", "a  - b", "  "]
    texts = [each.text for each in decoder()(*logits_of(*paths))]
    assert texts == ["", "", "a", "a", "aa", "ab b", "a b", ""]
    (word,) = decoder()(*logits_of("-aa-b-"))[0].words
    assert (word.text, word.start_s, word.end_s) == ("ab", 0.5, 2.5)
    assert word.confidence == pytest.approx(1, abs=1e-3)


def test_times_are_those_of_the_probable_symbol_and_not_of_its_first_place_in_the_beam():
    logits, frames = logits_of("------a--")
    logits[0, 1, 0] = 3  # enough for a place in the beam
    (hypothesis,) = decoder(size=4)(logits, frames)
    assert [(word.text, word.start_s) for word in hypothesis.words] == [("a", 3.0)]


def test_the_confidence_is_the_geometric_mean_over_the_symbols():
    logits, frames = logits_of("a-b")
    logits[0, 2, 0] = 11.5
    p = logits[0].softmax(-1)
    (hypothesis,) = decoder()(logits, frames)
    assert hypothesis.words[0].confidence == pytest.approx(float((p[0, 0] * p[2, 2]).sqrt()))


def test_neighbours_and_padding_change_nothing():
    torch.manual_seed(0)
    logits, frames = 2 * torch.randn(6, 12, BLANK + 1, dtype=torch.float64), torch.tensor([12, 0, 5, 1, 9, 12])
    table = random_table(0, BLANK)
    together = decoder(table, size=4, n_best=4)(logits, frames)
    for row, length in enumerate(frames.tolist()):
        (alone,) = decoder(table, size=4, n_best=4)(logits[row : row + 1, :length], frames[row : row + 1])
        assert alone.text == together[row].text
        assert alone.score == pytest.approx(together[row].score, rel=1e-10)
        assert [text for text, _ in alone.others] == [text for text, _ in together[row].others]


def test_frames_beyond_a_row_change_no_bit():
    torch.manual_seed(0)
    logits, model = (
        2 * torch.randn(3, 20, BLANK + 1),
        make_text_model(make_bonuses(SYMBOLS), random_table(0, BLANK), 0.5),
    )
    model = model.to(torch.device("cpu"), torch.float32)
    frames = torch.tensor([8, 5, 2])
    short = search(log_probabilities(logits, frames), model, 4)
    frames = torch.tensor([8, 5, 2, 20])
    long = search(log_probabilities(logits[[0, 1, 2, 0]], frames), model, 4)
    assert torch.equal(short[1], long[1][:3])
    assert torch.equal(short[0], long[0][:3, :, :8])


def test_the_n_best_differ_and_fall_in_score():
    torch.manual_seed(0)
    logits, frames = torch.randn(2, 10, BLANK + 1), torch.tensor([10, 1])
    for hypothesis in decoder(size=8, n_best=8)(logits, frames):
        texts = [hypothesis.text, *(text for text, _ in hypothesis.others)]
        scores = [hypothesis.score, *(score for _, score in hypothesis.others)]
        assert 1 < len(set(texts)) == len(texts) <= 8
        assert scores == sorted(scores, reverse=True)
    assert decoder(size=8)(logits, frames)[0].others == []


def test_the_language_model_chooses_between_what_sounds_alike():
    logits, frames = logits_of("a-")
    logits[0, 0, SYMBOLS.index("b")] = 11.9
    log_p = torch.tensor([[0.05, 0.05, 0.8]]).log()
    table = Table(log_p, torch.zeros(1, 3, dtype=torch.int64), torch.tensor([math.log(0.1)]), 0)
    assert decoder()(logits, frames)[0].text == "a"
    assert decoder(table, lm_weight=0.0)(logits, frames)[0].text == "a"
    assert decoder(table, lm_weight=0.5)(logits, frames)[0].text == "b"


def test_a_hot_word_is_found_where_another_text_is_somewhat_more_probable(tmp_path):
    logits, frames = logits_of("a-b a-a ", "aba")
    logits[0, 2, SYMBOLS.index("a")] = 10  # less probable by a factor of e^2
    logits[1, 1, BLANK] = 11.5
    assert [each.text for each in decoder(size=2)(logits, frames)] == ["ab aa", "aba"]
    (tmp_path / "hot.txt").write_text("AA\n")
    hot = {"size": 2, "hot_words": str(tmp_path / "hot.txt")}
    found = decoder(**hot, hot_word_bonus=2.5)(logits, frames)
    assert [each.text for each in found] == ["aa aa", "aa"]
    assert found[0].score == pytest.approx(-2 + 2 * 2.5, abs=0.2)
    assert [each.text for each in decoder(**hot, hot_word_bonus=1.5)(logits, frames)] == ["ab aa", "aa"]
    assert [each.text for each in decoder(**hot, hot_word_bonus=0.2)(logits, frames)] == ["ab aa", "aba"]
    (tmp_path / "hot.txt").write_text("axa\n")
    with pytest.raises(UserError, match=r"hot\.txt, line 1: 'axa' cannot be recognised"):
        decoder(**hot)


ARPA = """\\data\\
ngram 1={count}

\\1-grams:
-1\t<s>
-1\t</s>
{unigrams}

\\end\\
"""


def write_arpa(path, symbols):
    path.write_text(ARPA.format(count=2 + len(symbols), unigrams="\n".join(f"-1\t{symbol}" for symbol in symbols)))
    return str(path)


def test_a_language_model_comes_from_its_file_and_one_of_other_symbols_is_refused(tmp_path):
    logits, frames = logits_of("ab a")
    right = write_arpa(tmp_path / "right.arpa", ["a", "b", "<space>"])
    (hypothesis,) = decoder(lm=right, lm_weight=1.0)(logits, frames)
    assert hypothesis.text == "ab a"
    assert hypothesis.score == pytest.approx(-5 * math.log(10), abs=1e-3)  # four symbols and the end
    with pytest.raises(UserError, match="one of other symbols"):
        decoder(lm=write_arpa(tmp_path / "words.arpa", ["AN", "APPLE"]))
    with pytest.raises(UserError, match=r"none\.arpa"):
        decoder(lm=str(tmp_path / "none.arpa"))


def test_a_large_language_model_finds_the_same_as_arcs_and_its_memory_is_said(tmp_path, monkeypatch, capsys):
    sentences = [list("ab ba"), list("a b"), list("bab a b"), list("aab")]
    ngram.write_arpa(model_of(sentences, 4)[0], tmp_path / "lm.arpa")
    torch.manual_seed(0)
    logits, frames = 2 * torch.randn(4, 20, BLANK + 1), torch.tensor([20, 7, 0, 13])
    settings = {"lm": str(tmp_path / "lm.arpa"), "lm_weight": 0.8, "symbol_bonus": 1.0, "size": 6, "n_best": 6}
    expected = [decoder(**settings, symbols_per_frame=symbols)(logits, frames) for symbols in (0, 2)]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(beam, "TABLE_LIMIT_MB", 0.0)
    monkeypatch.setattr(beam, "SAID_ABOVE_MB", 0.0)
    arcs = beam.read_table(settings["lm"], TOKENISER)
    assert isinstance(arcs, Arcs)
    assert capsys.readouterr().err == f"language model {settings['lm']}: {arcs.summary} in each process\n"
    assert [decoder(**settings, symbols_per_frame=symbols)(logits, frames) for symbols in (0, 2)] == expected
