"""How an entry point ends: a user's mistake is one sentence, a defect of ours keeps its traceback."""

import io
import subprocess
import sys

import pytest

from ddp_asr.errors import UserError, counted, run_entry_point
from tests.conftest import REPOSITORY


def ending_in(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize("status", [0, 1, 3])
def test_the_status_is_mains_own(status):
    assert run_entry_point(lambda: status) == status


def test_a_users_mistake_is_one_sentence_and_status_2(capsys):
    assert run_entry_point(ending_in(UserError("train.epochs must be above 0, not 0"))) == 2
    assert capsys.readouterr() == ("", "error: train.epochs must be above 0, not 0\n")


def test_what_the_terminal_cannot_write_is_escaped(monkeypatch):
    for encoding, shown in (("utf-8", "\u00e4 \\ud800"), ("ascii", "\\xe4 \\ud800")):
        written = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
        assert run_entry_point(lambda: print("\u00e4 \ud800") or 0) == 0
        assert written.getvalue().decode(encoding) == f"{shown}\n"


def test_ctrl_c_is_130_without_a_traceback(capsys):
    assert run_entry_point(ending_in(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("error", [ValueError("ours"), SystemExit(5), OSError("ours")])
def test_a_defect_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run_entry_point(ending_in(error))


@pytest.mark.parametrize("lines", [1, 100_000], ids=["seen at the last flush", "seen on the way"])
def test_a_reader_that_has_gone_away_ends_it_silently(lines):
    program = (
        "from ddp_asr.errors import run_entry_point\n"
        "def main():\n"
        "    input()\n"
        f"    for number in range({lines}):\n"
        "        print(number)\n"
        "    return 0\n"
        "raise SystemExit(run_entry_point(main))\n"
    )
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", program], text=True, cwd=REPOSITORY, **pipes) as process:
        process.stdout.close()
        process.stdin.write("go on\n")
        process.stdin.flush()
        assert process.stderr.read() == ""
        assert process.wait() == 141


def test_a_quoted_value_of_any_length_and_content_leaves_a_sentence_that_can_be_read():
    sentence = str(UserError(f"the name is {'x' * 9_000}\x00\x1b[2J\n\x7f, which is no name: name another"))
    assert len(sentence) < 3_000 and sentence.startswith("the name is xxx")
    assert sentence.endswith("x??[2J ?, which is no name: name another")


def test_a_noun_is_in_the_singular_for_one_thing_alone():
    assert [counted(number, "rank") for number in (0, 1, 2)] == ["0 ranks", "1 rank", "2 ranks"]
    assert counted(1000, "process") == "1,000 processes" and counted(3, "epoch") == "3 epochs"
