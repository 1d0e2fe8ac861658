"""`ddp-asr vocabulary`: text and shards to a file of word pieces, and what it says of them."""

import gzip

import pytest
import sentencepiece

from ddp_asr import cli
from ddp_asr.config import Pieces
from ddp_asr.data.index import read_index
from ddp_asr.errors import UserError
from ddp_asr.text import make_tokeniser

TEXT = "The cat sat on the mat\nthe other hat, the rat\n\nat 9\nThat cat\n"


def make(*arguments):
    assert cli.main(["vocabulary", *map(str, arguments)]) == 0


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_the_file_is_what_a_run_of_these_transcripts_would_learn(text, tmp_path, capsys):
    make(text, "--size", 40, "--vocabulary.drop=,", "--out", tmp_path / "pieces.model")
    settings = Pieces(size=40, drop=",", model=str(tmp_path / "pieces.model"))
    learnt = make_tokeniser(Pieces(size=40, drop=","), TEXT.splitlines())
    assert make_tokeniser(settings).state() == learnt.state()
    said = capsys.readouterr().out
    assert "3 sentences, 13 words\n" in said and "40 pieces, the first: at" in said
    assert "left out: 1 sentences with characters that no piece has: '9'\n" in said
    count = int(learnt.count(["the cat sat on the mat", "the other hat the rat", "that cat"]).length.sum())
    assert f"pieces a word: {count / 13:.2f}; " in said
    divided = sentencepiece.SentencePieceProcessor(model_file=settings.model).encode("that cat", out_type=str)
    assert "  " + " ".join(divided).replace("\N{LOWER ONE EIGHTH BLOCK}", "_") in said
    assert f"a run takes it with --vocabulary.kind=pieces --vocabulary.size=40 --vocabulary.model={tmp_path}" in said


def test_shards_and_compressed_text_are_read(tiny_corpus, tmp_path):
    texts = read_index([tiny_corpus.train]).texts.to_pylist()
    (tmp_path / "text.gz").write_bytes(gzip.compress("\n".join(texts).encode()))
    symbols = "--vocabulary.symbols= ab'"
    make(tiny_corpus.train, "--size=9", symbols, "--out", tmp_path / "one.model")
    make(tmp_path / "text.gz", "--size=9", symbols, "--out", tmp_path / "two.model")
    assert (tmp_path / "one.model").read_bytes() == (tmp_path / "two.model").read_bytes()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--size=5000"], r"size = 5000 pieces cannot be learnt of 6 different words \(they give at most \d+\): lower"),
        (["--size=10"], "vocabulary.size = 10 is below the 28 characters"),
        (["--vocabulary.symbols=xyz"], "there is no transcript of the characters 'xyz'"),
        (["--out=none/pieces.model"], "--out none/pieces.model cannot be written: No such file"),
        (["--vocabulary.sise=3"], "vocabulary.sise"),
    ],
)
def test_a_mistake_is_one_sentence(text, tmp_path, options, expected):
    with pytest.raises(UserError, match=expected) as error:
        make(text, f"--out={tmp_path / 'pieces.model'}", *options)
    assert "\n" not in str(error.value) and not (tmp_path / "pieces.model").exists()
