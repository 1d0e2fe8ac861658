"""The display in a log and on a real terminal."""

import io
import os
import pty
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ddp_asr.runs.display import PLAIN_EVERY_S, Display, describe_epoch, duration, memory
from tests.run_files import read_to_end

REPOSITORY = Path(__file__).resolve().parent.parent


def train_line(step, **changes):
    line = {"kind": "train", "step": step, "epoch": 1 + (step - 1) // 50, "loss": 3.0 / step, "learning_rate": 5e-4}
    return (
        line
        | {"gradient_norm": 1.0, "audio_s_per_s": 312.4, "process_audio_s_per_s": 156.2, "padding": 0.0, "skipped": 0}
        | {"data_wait": 0.01, "rank_wait": 0.2, "gpu_memory_gb": None, "host_memory_gb": 2.04}
        | changes
    )


def test_line(step, **changes):
    return {"kind": "test", "step": step, "epoch": 1, "loss": 0.5, "wer": 0.1234, "cer": 0.0456} | changes


test_line.__test__ = False  # type: ignore[attr-defined]


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def log(clock):
    stream = io.StringIO()
    display = Display(200, 4, 50, stream=stream, clock=clock)
    return display, stream


def lines_of(stream):
    return stream.getvalue().splitlines()


def test_log_shows_the_first_step_and_then_one_in_half_a_minute(log, clock):
    display, stream = log
    for step in range(1, 101):
        display.train(train_line(step))
        clock.now += 1.0
    assert PLAIN_EVERY_S == 30.0
    shown = lines_of(stream)
    assert [line.split("step ")[1].split("/")[0] for line in shown] == ["1", "31", "61", "91"]
    assert shown[0] == (
        "epoch 1/4  step 1/200  loss 3.000  rate 5.00e-04  312 audio-s/s (156 a process)  "
        "waited 1.0 % for data, 20.0 % for ranks  peak 2.0 GB  left -  last WER -"
    )
    assert "left 1 min 49 s" in shown[-1]  # 109 steps at one a second


def test_the_peak_shown_is_that_of_the_gpu_where_there_is_one():
    assert memory(train_line(1, gpu_memory_gb=61.26)) == "61.3 GB" and memory({}) == "-"


def test_an_epoch_says_what_its_augmentations_did_and_warns_of_one_that_did_nothing():
    line = {"epoch": 3, "utterances": 28_539, "fired": {"speed 0.9": 9_500, "noise": 0}}
    assert describe_epoch(line) == [
        "epoch 3: speed 0.9 in 33.3 %, noise in 0.0 % of 28,539 utterances",
        "warning: noise changed none of the 28,539 utterances of epoch 3, although it is turned on: check the settings "
        "of augment",
    ]
    none = {"epoch": 1, "utterances": 7, "fired": {}}
    assert describe_epoch(none) == ["epoch 1: 7 utterances, and no augmentation is turned on"]


def test_log_shows_every_evaluation_and_the_last_step(log):
    display, stream = log
    display.train(train_line(1))
    display.test(test_line(50))
    display.train(train_line(199))
    display.train(train_line(200))
    shown = lines_of(stream)
    assert shown[1] == "epoch 1/4  step 50/200  test loss 0.500  WER 12.3 %  CER 4.6 %"
    assert len(shown) == 3 and "step 200/200" in shown[2] and "last WER 12.3 %" in shown[2]


def test_time_left_follows_the_recent_pace_of_a_resumed_run(log, clock):
    display, _ = log
    for step in range(101, 111):
        display.train(train_line(step))
        clock.now += 2.0
    assert display.time_left() == "3 min 00 s"


def test_a_skipped_step_has_no_loss_and_is_shown(log):
    display, stream = log
    display.train(train_line(1, loss=None, audio_s_per_s=None))
    display.test(test_line(1, loss=None, wer=None, cer=None))
    assert "loss -" in lines_of(stream)[0] and "WER -" in lines_of(stream)[1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (61, "1 min 01 s"),
        (3 * 3600 + 300, "3 h 05 min"),
        (2 * 86400 + 4 * 3600, "2 d 04 h"),
    ],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


SHOW = """
    from ddp_asr.runs.display import Display
    display = Display(200, 4, 50)
    line = {"step": 7, "epoch": 1, "loss": 1.25, "learning_rate": 5e-4, "audio_s_per_s": 312.0}
    display.train(line)
    display.message("left out: [3] utterances")
    display.test({"step": 7, "epoch": 1, "loss": 0.5, "wer": 0.1234, "cer": 0.05})
    display.train(line | {"step": 8})
    display.close()
"""


def on_a_terminal(term):
    """Returns what a program that shows a few steps writes to a terminal."""
    reader, writer = pty.openpty()
    command = [sys.executable, "-c", textwrap.dedent(SHOW)]
    environment = {**os.environ, "TERM": term, "COLUMNS": "80"}
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=writer, stderr=writer) as process:
        os.close(writer)
        written = read_to_end(reader).decode()
    assert process.returncode == 0, written
    return written


def test_a_terminal_gets_a_live_display_and_is_given_back(tmp_path):
    text = on_a_terminal("xterm-256color")
    assert "\x1b[?25l" in text and text.rstrip().endswith("\x1b[?25h")  # the cursor is hidden and comes back
    for shown in ("1/4", "8/200", "5.00e-04", "312", "audio-s/s", "left out: [3] utterances", "WER 12.3 %"):
        assert shown in text
    assert "…" not in text  # it fits 80 columns


def test_a_dumb_terminal_gets_plain_lines():
    text = on_a_terminal("dumb")
    assert "\x1b" not in text
    assert "epoch 1/4  step 7/200  loss 1.250" in text


def test_a_display_needs_no_matplotlib():
    code = (
        "import sys; from ddp_asr.runs.display import Display; Display(1, 1, 1).message('x');"
        "assert not {'matplotlib', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
