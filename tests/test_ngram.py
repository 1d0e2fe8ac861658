"""ARPA files in and out, and the arcs of a search, and their table, against the recursion of back-off."""

import gzip
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddp_asr.decoding import automaton
from ddp_asr.decoding.ngram import END, START, UNKNOWN, NGramModel, NGrams, read_arpa, write_arpa
from ddp_asr.errors import UserError
from tests.back_off import BackOff, by_symbols
from tests.test_kneser_ney import model_of

SYMBOLS = ["b", " ", "a", "c"]  # in another order than in the models
texts = st.lists(st.lists(st.sampled_from(" abc"), max_size=8), min_size=1, max_size=10)

# As other programs write it: no order of the n-grams, -99, no back-off where it is 1, several spaces, <UNK>.
FOREIGN = """\
made by hand

\\data\\
ngram 1=6
ngram 2=5
ngram  3 = 2

\\1-grams:
-1.0  b -0.25
-99\t<s>\t-0.5
-0.7\t</s>
-0.5\ta\t-0.1
-1.5\t<UNK>
-0.8\t<space>

\\2-grams:
-0.2\t<s> b
-0.3\ta b\t-0.4
-0.6\tb <space>
-0.4\tb a
-0.1\ta </s>

\\3-grams:
-0.05\ta b <space>
-0.15\t<s> b a

\\end\\
"""


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def pruned(model: NGramModel, chance: list[bool]) -> NGramModel:
    """The model without some of its n-grams that no longer one begins with; back-off weights stay."""
    orders, places = list(model.orders), iter(chance)
    for length in range(model.order, 1, -1):
        ngrams = orders[length - 1]
        keep = np.array([next(places, True) for _ in range(len(ngrams))], bool)
        if length < model.order:
            keep[orders[length].prefix] = True
            renumbered = np.cumsum(keep) - 1
            longer = orders[length]
            orders[length] = NGrams(renumbered[longer.prefix], longer.symbol, longer.log10_p, longer.log10_back_off)
        orders[length - 1] = NGrams(
            *(column[keep] for column in (ngrams.prefix, ngrams.symbol, ngrams.log10_p, ngrams.log10_back_off))
        )
    return NGramModel(model.symbols, tuple(orders))


def walk(states, symbols, history):
    state = torch.tensor(states.start)
    for symbol in history:
        state = states.step(state, torch.tensor(symbols.index(symbol)))
    return state


def assert_follows_the_model(arcs, symbols, model, histories):
    """Along each history the state gives what the recursion of back-off does; a table gives the same bits as arcs."""
    log10_p, table, each_symbol = BackOff(model), arcs.table(), torch.arange(len(symbols))
    for history in histories:
        state = walk(arcs, symbols, history)
        assert state == walk(table, symbols, history)
        context = (START, *history)
        expected = [log10_p(context, symbol) * math.log(10) for symbol in symbols]
        assert arcs.gain(state, each_symbol).tolist() == pytest.approx(expected, abs=1e-5), history
        assert torch.equal(arcs.gain(state, each_symbol), table.gain(state, each_symbol))
        assert float(arcs.end[state]) == pytest.approx(log10_p(context, END) * math.log(10), abs=1e-5)


# ---- files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lm.arpa", "lm.arpa.gz"])
@given(lines=texts, order=st.integers(1, 4))
def test_what_is_written_is_read_back(tmp_path_factory, name, lines, order):
    path = tmp_path_factory.mktemp("arpa") / name
    model, _ = model_of(lines, order)
    write_arpa(model, path)
    again = read_arpa(path)
    assert again.symbols == model.symbols and again.order == order
    for length in range(1, order + 1):
        written, read = by_symbols(model, length), by_symbols(again, length)
        assert list(written) == list(read)
        assert np.allclose(list(written.values()), list(read.values()), rtol=1e-7, atol=0)
    content = path.read_bytes()
    write_arpa(again, path)
    assert path.read_bytes() == content


def test_a_file_of_another_program_is_read(tmp_path):
    model = read_arpa(write(tmp_path / "lm", gzip.compress(FOREIGN.encode())))  # whatever its name
    assert model.symbols == ("b", START, END, "a", UNKNOWN, " ")
    assert [len(ngrams) for ngrams in model.orders] == [6, 5, 2]
    log10_p = BackOff(model)
    assert log10_p(("a", "b"), " ") == -0.05
    assert log10_p(("b", "b"), " ") == -0.6  # "b b" is no context
    assert log10_p((START, "b"), " ") == -0.6  # "<s> b" is one, with a weight of 1
    assert log10_p(("a", "b"), "b") == pytest.approx(-0.4 - 0.25 - 1.0)
    assert log10_p(("a", "a"), "a") == pytest.approx(-0.1 - 0.5)
    assert log10_p(("a",), "z") == pytest.approx(-0.1 - 1.5)


SECTION_2 = FOREIGN[FOREIGN.index("-0.2\t<s>") : FOREIGN.index("\\3-grams")]
BROKEN = {  # how -> (text, what the error says)
    "empty": ("", r"is no ARPA file, since no line of it is \\data\\"),
    "binary": (b"\x00\xff" * 40, r"is no ARPA file"),
    "cut in the head": (FOREIGN[:40], r"line 5: the file ends in its head, so it was cut; copy"),
    "cut in a section": (FOREIGN[: FOREIGN.index("-0.8")], r"the file ends within its 1-grams, so it was cut"),
    "cut between sections": (FOREIGN[: FOREIGN.index("\\3-gr")], r"the file ends before \\3-grams:, so it was cut"),
    "cut before the end": (FOREIGN[: FOREIGN.index("\\end")], r"the file ends before \\end\\, so it was cut"),
    "cut and compressed": (gzip.compress(FOREIGN.encode(), mtime=0)[:-30], r"lm is damaged or was cut"),
    "fewer n-grams": (FOREIGN.replace("2=5", "2=6"), r"there are 5 2-grams, and the head says 6"),
    "more n-grams": (
        FOREIGN.replace("2=5", "2=4"),
        r"as many 2-grams as the head says must stand \\3-grams:, not '-0.1",
    ),
    "no count": (FOREIGN.replace("ngram 2=5\n", ""), r"line 5: .* must stand 'ngram 2=' with a number, not 'ngram  3"),
    "no number": (FOREIGN.replace("1=6", "1=many"), r"line 4: .*'ngram 1=' with a number, not 'ngram 1=many'"),
    "a count of 5,000 digits": (
        FOREIGN.replace("ngram 1=", "ngram 1=" + "9" * 5000),
        r"line 4: .* must stand 'ngram 1=",
    ),
    "no counts": (FOREIGN[FOREIGN.index("\\1-") :].replace("\\1", "\\data\\\n\\1"), r"must stand the counts and then"),
    "too few parts": (FOREIGN.replace("-0.4\tb a", "-0.4\tb"), r"line 20: .* has other parts than .*: '-0.4\\tb'"),
    "no probability": (FOREIGN.replace("-0.4\tb a", "b a"), r"line 20: one of the 2-grams has other parts"),
    "a word for it": (FOREIGN.replace("-0.4\tb a", "x\tb a"), r"line 20: one of the 2-grams has other parts"),
    "above 1": (
        FOREIGN.replace("-0.4\tb a", "0.4\tb a"),
        r"above stands one of the 2-grams whose probability is above 1",
    ),
    "infinite in float32": (FOREIGN.replace("-0.25", "1e308"), r"or no number, or whose back-off weight is"),
    "nan": (FOREIGN.replace("-0.4\tb a", "nan\tb a"), r"whose probability is above 1 or no number"),
    "other symbols": (FOREIGN.replace("-0.4\tb a", "-0.4\tb z"), r"line 20: 'z' is not among the 1-grams"),
    "one twice": (FOREIGN.replace("-0.4\tb a", "-0.4\tb <space>"), r"a 2-gram is there twice"),
    "a symbol twice": (FOREIGN.replace("-1.0  b", "-1.0  a"), r"a 1-gram is there twice"),
    "no end of sentence": (FOREIGN.replace("</s>", "end"), r"there is no </s> among the 1-grams"),
    "no prefix": (
        FOREIGN.replace("a b <space>\n", "a a b\n"),
        r"one of the 3-grams whose first 2 symbols are no 2-gram",
    ),
    "no 2-grams": (FOREIGN.replace("2=5", "2=0").replace(SECTION_2, ""), r"whose first 2 symbols are no 2-gram"),
    "latin 1": (
        FOREIGN.replace("\ta", "\t\xe9").replace(" a", " \xe9").replace("a ", "\xe9 ").encode("latin-1"),
        "not UTF-8",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_file_that_is_cut_or_wrong_is_one_sentence(tmp_path, how):
    text, expected = BROKEN[how]
    with pytest.raises(UserError, match=expected) as error:
        read_arpa(write(tmp_path / "lm", text))
    assert "\n" not in str(error.value) and str(tmp_path / "lm") in str(error.value)


def test_no_file_and_a_directory_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"none.arpa cannot be read .No such file"):
        read_arpa(tmp_path / "none.arpa")
    with pytest.raises(UserError, match=r"cannot be read .Is a directory"):
        read_arpa(tmp_path)


# ---- arcs and table ------------------------------------------------------------------------------------------------


@given(
    lines=texts,
    order=st.integers(1, 4),
    chance=st.lists(st.booleans(), max_size=60),
    histories=st.lists(st.lists(st.sampled_from(SYMBOLS), max_size=7), min_size=1, max_size=8),
)
def test_arcs_and_table_are_the_model(lines, order, chance, histories):
    model = pruned(model_of([*lines, SYMBOLS], order)[0], chance)
    arcs = model.arcs(SYMBOLS)
    table = arcs.table()
    assert table.log_p.shape == table.next_state.shape == (len(arcs.end), len(SYMBOLS))
    assert table.log_p.dtype == table.end.dtype == torch.float32 and table.next_state.dtype == torch.int64
    assert table.log_p.isfinite().all() and table.end.isfinite().all()
    assert_follows_the_model(arcs, SYMBOLS, model, histories)


@given(lines=texts, order=st.integers(1, 4))
def test_each_row_of_the_table_sums_to_one_with_the_end_and_unk(lines, order):
    table = model_of([*lines, SYMBOLS], order)[0].arcs([*SYMBOLS, "z"]).table()  # "z" is <unk>
    assert torch.allclose(table.log_p.exp().sum(1) + table.end.exp(), torch.ones(len(table.end)), atol=1e-5)


def test_a_file_of_another_program_as_a_table(tmp_path):
    model = read_arpa(write(tmp_path / "lm", FOREIGN))
    symbols = ["a", "b", " "]
    histories = [[], ["b"], ["b", "a"], ["a", "b"], ["a", "b", " "], ["b", "b", "a", "b"], ["a", "a"]]
    assert_follows_the_model(model.arcs(symbols), symbols, model, histories)


def test_symbols_that_the_model_does_not_have_are_unk():
    model, _ = model_of([list("a cab"), list("abba")], 3)
    symbols = ["a", "x", "b", " ", "y", "c"]
    arcs = model.arcs(symbols)
    assert_follows_the_model(arcs, symbols, model, [[], ["a", "x"], ["x", "y", "a"], ["a", "b", "b", "a"]])
    table = arcs.table()
    assert torch.equal(table.log_p[:, 1], table.log_p[:, 4])


def test_symbols_that_the_recogniser_does_not_have_take_no_states():
    model, _ = model_of([list("a cab"), list("abba 1900"), list("ab19")], 3)
    symbols = list(" abc")
    arcs, with_digits = model.arcs(symbols), model.arcs([*symbols, "0", "1", "9"])
    assert len(arcs.end) < len(with_digits.end) and len(arcs.key) < len(with_digits.key)
    assert_follows_the_model(arcs, symbols, model, [[], ["a", " "], ["a", "b", "b", "a", " "]])


@pytest.mark.parametrize(
    ("line", "symbols", "expected"),
    [
        (["a", "cab", "ran"], " abc", "not have the recogniser's ' ', 'b', 'c' and has 'cab', 'ran', which the"),
        (list("A CAB"), " abc", "not have the recogniser's 'a', 'b', 'c' and has 'A', 'B', 'C', which the recogniser"),
        (list("a|cab"), " abc", "not have the recogniser's ' ' and has '|', which"),
        (list("0123456789a"), "abc", "and has '0', '1', '2', '3', '4' and 5 more, which"),
    ],
)
def test_a_model_of_other_symbols_is_refused(line, symbols, expected):
    with pytest.raises(UserError) as error:
        model_of([line], 2)[0].arcs(list(symbols))
    assert expected in str(error.value) and "python -m ddp_asr.lm TEXT --run RUN" in str(error.value)


def test_a_symbol_that_is_missing_in_a_model_without_unk_is_refused(tmp_path):
    text = FOREIGN.replace("-1.5\t<UNK>\n", "").replace("1=6", "1=5")
    model = read_arpa(write(tmp_path / "lm", text))
    assert model.arcs(["a", "b", " "]).start > 0
    with pytest.raises(UserError, match="does not have the recogniser's 'c' or <unk>: it is one of other symbols"):
        model.arcs(["a", "b", "c", " "])


def test_the_memory_of_each_form_is_said(monkeypatch):
    arcs = model_of([list("a cab"), list("abba")], 3)[0].arcs(list(" abc"))
    table = arcs.table()
    tensors = [table.log_p, table.next_state, table.end]
    assert arcs.table_mb == sum(tensor.nbytes for tensor in tensors) / 1e6
    assert arcs.summary == f"a table of {len(arcs.end)} states x 4 symbols, 0.0 MB"
    monkeypatch.setattr(automaton, "TABLE_LIMIT_MB", 0.0)
    assert arcs.summary == f"{len(arcs.key) - 1} arcs of {len(arcs.end)} states x 4 symbols, 0.0 MB"
