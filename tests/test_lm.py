"""`ddp-asr lm`: text, shards and the transcripts of a run to an ARPA file whose symbols are the recogniser's."""

import gzip
import math

import pytest

from ddp_asr import cli, lm
from ddp_asr.config import load_config
from ddp_asr.data.index import read_index
from ddp_asr.decoding.ngram import END, START, UNKNOWN, read_arpa
from ddp_asr.errors import UserError
from ddp_asr.settings import describe
from tests.back_off import BackOff

SPECIAL = {UNKNOWN, START, END}
TEXT = "The cat  sat\non a mat\n\n \tthe CAT's hat\n"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def run(tiny_corpus, tmp_path):
    """A run directory, of which only the settings are read."""
    directory = tmp_path / "run"
    directory.mkdir()
    config = load_config(tiny_corpus.directory / "tiny.yaml", [f"--data.train={tiny_corpus.train}"])
    (directory / "config.yaml").write_text(describe(config), encoding="utf-8")
    return directory


def make(*arguments):
    assert cli.main(["lm", *map(str, arguments)]) == 0


def probability(model, sentence):
    """Its base-10 logarithm."""
    symbols, log10_p = [START, *sentence, END], BackOff(model)
    return math.fsum(log10_p(symbols[:place], symbols[place]) for place in range(1, len(symbols)))


def test_characters_of_a_text_are_those_that_the_recogniser_writes(text, tmp_path, capsys):
    out = tmp_path / "lm.arpa"
    make(text, "--order", 4, "--out", out)
    model = read_arpa(out)
    assert set(model.symbols) == SPECIAL | set("the cat sat on a mat's")
    assert model.order == 4
    assert probability(model, "the cat sat") > probability(model, "tac eht sat") + 2
    said = capsys.readouterr().out
    assert "3 sentences, 32 symbols (--unit char)\n" in said and f"{out}: 0.0 MB\n" in said
    assert f"in a search: {model.arcs(lm_symbols()).summary}" in said and "states x 28 symbols, 0.0 MB" in said


def test_a_byte_order_mark_is_no_symbol(text, tmp_path):
    make(text, "--out", tmp_path / "lm.arpa")
    text.write_text(TEXT.replace("\n", "\r\n"), encoding="utf-8-sig", newline="")
    make(text, "--out", tmp_path / "marked.arpa")
    assert (tmp_path / "marked.arpa").read_bytes() == (tmp_path / "lm.arpa").read_bytes()


def lm_symbols():
    return list(load_config(None).vocabulary.symbols)


def test_words(text, tmp_path, capsys):
    make(text, "--out", tmp_path / "lm.arpa", "--unit=word", "--order=2")
    model = read_arpa(tmp_path / "lm.arpa")
    assert set(model.symbols) == SPECIAL | {"the", "cat", "sat", "on", "a", "mat", "cat's", "hat"}
    assert "2-grams" in capsys.readouterr().out
    assert [model.order, lm.DEFAULT_ORDER["word"]] == [2, 3]


def test_text_is_read_compressed_and_written_compressed_and_always_the_same(text, tmp_path):
    first, rest = TEXT.split("\n", 1)
    (tmp_path / "first.gz").write_bytes(gzip.compress(first.encode()))
    (tmp_path / "rest.txt").write_text(rest)
    make(text, "--out", tmp_path / "one.arpa.gz")
    make(tmp_path / "first.gz", tmp_path / "rest.txt", "--out", tmp_path / "two.arpa.gz")
    one = (tmp_path / "one.arpa.gz").read_bytes()
    assert gzip.decompress(one).startswith(b"\\data\\\nngram 1=")
    assert one == (tmp_path / "two.arpa.gz").read_bytes()
    assert read_arpa(tmp_path / "one.arpa.gz").order == lm.DEFAULT_ORDER["char"]


def test_a_run_gives_its_symbols_and_its_training_transcripts(run, tiny_corpus, tmp_path, capsys):
    make("--run", run, "--out", tmp_path / "of-run.arpa")
    make(tiny_corpus.train, "--config", tiny_corpus.directory / "tiny.yaml", "--out", tmp_path / "of-shards.arpa")
    assert (tmp_path / "of-run.arpa").read_bytes() == (tmp_path / "of-shards.arpa").read_bytes()
    texts = read_index([tiny_corpus.train]).texts.to_pylist()
    transcripts = tmp_path / "transcripts.txt"
    transcripts.write_text("\n".join(texts))
    make(transcripts, "--run", run, "--out", tmp_path / "of-text.arpa")
    assert (tmp_path / "of-text.arpa").read_bytes() == (tmp_path / "of-run.arpa").read_bytes()
    assert set(read_arpa(tmp_path / "of-run.arpa").symbols) <= SPECIAL | set(" ab'")
    assert f"{len(texts)} sentences, " in capsys.readouterr().out


def test_sentences_that_the_recogniser_cannot_write_are_left_out_and_counted(tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text("a cab\nat 9, or 19\nbad, cab\n1\nno!\n")
    make(path, "--out", tmp_path / "lm.arpa")
    said = capsys.readouterr().out
    assert "1 sentences, 5 symbols" in said
    assert "cannot write: 4 sentences (',' in 2, '1' in 2, '!' in 1, '9' in 1)" in said
    make(path, "--out", tmp_path / "lm.arpa", "--vocabulary.drop=,!")
    said = capsys.readouterr().out
    assert "3 sentences, 14 symbols" in said and "2 sentences ('1' in 2, '9' in 1)" in said


def test_fallback_discounts_are_said(text, tmp_path, capsys):
    make(text, "--out", tmp_path / "lm.arpa", "--order=3")
    assert "discounts of 1-grams, 2-grams: 0.5, 1 and 1.5, because the text is too small" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "options", "expected"),
    [
        (b"", [], "there is no sentence in .*text.txt: name a text that is not empty"),
        (b" \n\n", [], "there is no sentence in"),
        (
            b"19\n2.5\n",
            [],
            r"each of the 2 sentences has a character that the recogniser cannot write \('\.' in 1, '1'",
        ),
        (b"caf\xe9\n", [], "text.txt is not UTF-8 .*: convert it, as with iconv"),
        (gzip.compress(TEXT.encode(), mtime=0)[:-9], [], "text.txt is damaged or was cut"),
        pytest.param(
            gzip.compress(bytes(40 << 20), mtime=0), [], "text.txt has a line of more than 16 MB", id="a bomb"
        ),
        (
            b"a <s> b",
            ["--unit=word", "--vocabulary.symbols= ab<s>"],
            "the text has the word '<s>', which has a meaning",
        ),
        (b"a cab", ["--vocabulary.dorp=x"], "vocabulary.dorp"),
        (b"a cab", ["--run=none"], "none is not a run: it has no config.yaml; give a directory such as runs/an4"),
        (b"a cab", ["--config=none.yaml"], "none.yaml"),
        (b"a cab", ["--out=."], "--out . is a directory: name a file in it"),
        (b"a cab", ["--out=none/lm.arpa"], "--out none/lm.arpa cannot be written: No such file or directory"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, content, options, expected):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=expected) as error:
        make(path, f"--out={tmp_path / 'lm.arpa'}", *options)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "lm.arpa").exists()


def test_no_text_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="there is no text: name text files or shard directories, or --run"):
        make("--out", tmp_path / "lm.arpa")
    with pytest.raises(UserError, match=r"none.txt cannot be read .No such file"):
        make("none.txt", "--out", tmp_path / "lm.arpa")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--order=0"], "--order is 0; it must be 1 to 20"),
        (["--order=21"], "--order is 21"),
        (
            ["--train.epochs=3"],
            "unrecognized arguments: --train.epochs=3",
        ),
        (["--vocabulary.drop", "x"], "--vocabulary.drop has no value: write --vocabulary.drop=VALUE"),
        (["--run=a", "--config=b"], "not allowed with argument"),
        (["--unit=bits"], "invalid choice"),
    ],
)
def test_a_wrong_option_is_refused(text, tmp_path, capsys, options, expected):
    with pytest.raises(SystemExit):
        make(text, "--out", tmp_path / "lm.arpa", *options)
    assert expected in capsys.readouterr().err
