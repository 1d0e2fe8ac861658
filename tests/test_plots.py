"""The picture of a run's curves."""

import json
import math
import os

import matplotlib.image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddp_asr.runs.plots import column, draw_curves, read_metrics, smooth


@given(st.lists(st.floats(-1e3, 1e3), max_size=40), st.integers(1, 60))
def test_smoothing_is_the_mean_of_the_neighbours(values, width):
    half = width // 2
    expected = [
        math.fsum(part) / len(part)
        for part in (values[max(0, place - half) : place + half + 1] for place in range(len(values)))
    ]
    assert smooth(values, width) == pytest.approx(expected, abs=1e-7)


def write_metrics(run, steps):
    with (run / "metrics.jsonl").open("w") as file:
        for step in range(1, steps + 1):
            loss = {13: None, 14: math.nan}.get(step, 3.0 / step)
            line = {"kind": "train", "step": step, "loss": loss, "learning_rate": 5e-4, "audio_s_per_s": 312.4}
            file.write(json.dumps(line) + "\n")
            if step % 50 == 0:
                line = {"kind": "test", "step": step, "loss": 0.5, "wer": 10 / step, "cer": 3 / step}
                file.write(json.dumps(line) + "\n")


def test_metrics_are_read_around_what_is_torn_or_not_a_number(tmp_path):
    write_metrics(tmp_path, 100)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'7\n{"kind": "note"}\n{"kind": "test", "step": 7, "wer": 1' + 400 * b"0" + b"}\n")
        file.write(b'{"kind": "train", "lo\xff')
    train, test = read_metrics(tmp_path)
    assert (len(train), len(column(test, "wer")[0])) == (100, 2)
    steps, values = column(train, "loss")
    assert 13 not in steps and 14 not in steps and len(values) == 98


@pytest.mark.parametrize("steps", [0, 1, 120])
def test_curves_are_drawn_and_replace_the_ones_before(tmp_path, steps):
    write_metrics(tmp_path, steps)
    (tmp_path / "curves.png").write_bytes(b"an old picture")
    assert draw_curves(tmp_path) == tmp_path / "curves.png"
    picture = matplotlib.image.imread(tmp_path / "curves.png")
    assert picture.shape[:2] == (900, 1440)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]
    blue, orange = (ink(picture, colour) for colour in ("#2b6cb0", "#dd6b20"))
    assert blue > 0 and orange > 0  # the legend at least
    if steps > 100:
        tmp_path.joinpath("metrics.jsonl").write_text("")
        draw_curves(tmp_path)
        empty = matplotlib.image.imread(tmp_path / "curves.png")
        assert blue > 2 * ink(empty, "#2b6cb0") and orange > 2 * ink(empty, "#dd6b20")


def ink(picture, colour):
    """Returns how many pixels of a picture have a colour."""
    wanted = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    return int((abs(picture[..., :3] - wanted) < 0.01).all(axis=-1).sum())


def test_a_failed_drawing_leaves_the_old_picture(tmp_path, monkeypatch):
    write_metrics(tmp_path, 10)
    (tmp_path / "curves.png").write_bytes(b"an old picture")

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        draw_curves(tmp_path)
    assert (tmp_path / "curves.png").read_bytes() == b"an old picture"
