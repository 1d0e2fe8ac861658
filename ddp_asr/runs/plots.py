"""The pictures of a run, curves.png and spectrogram.png, and that of a corpus.

    metrics.jsonl, whole --draw_curves--> curves.png
    features of one utterance --draw_spectrogram--> spectrogram.png
    lengths of utterances --draw_lengths--> a file that the user names

matplotlib is imported when a picture is drawn and not before: it takes a second.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddp_asr.files import is_number, writing_aside
from ddp_asr.runs.directory import read_lines

SMOOTHING_SHARE = 0.02  # of all steps: the width of the smoothed curves
BLUE, ORANGE, GREEN, GREY = "#2b6cb0", "#dd6b20", "#2f855a", "#718096"


def read_metrics(run_directory: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the train and the test lines of metrics.jsonl."""
    lines: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for line in read_lines(run_directory / "metrics.jsonl"):
        if line.get("kind") in lines:
            lines[line["kind"]].append(line)
    return lines["train"], lines["test"]


def column(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Returns steps and values of one metric, only where it is a finite number (a skipped step has none)."""
    points = [(line["step"], line.get(name)) for line in lines]
    finite = [(step, float(value)) for step, value in points if is_number(value)]
    return [step for step, _ in finite], [value for _, value in finite]


def smooth(values: list[float], width: int) -> list[float]:
    """Returns the centred moving mean over `width` values, over fewer at both ends."""
    import numpy as np

    half = width // 2
    if half == 0 or not values:
        return list(values)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(len(values)) - half, 0)
    end = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return [float(mean) for mean in (sums[end] - sums[first]) / (end - first)]


def draw_curves(run_directory: Path) -> Path:
    """Draws curves.png from metrics.jsonl: loss, error rates, learning rate, speed. Returns its path."""
    train, test = read_metrics(run_directory)
    path = run_directory / "curves.png"
    with _picture(path, (12, 7.5)) as figure:
        (loss, errors), (rate, speed) = figure.subplots(2, 2, sharex=True)
        _draw_loss(loss, train, test)
        _draw_errors(errors, test)
        _draw_one(rate, train, "learning_rate", "learning rate", GREY, width=1)
        _draw_one(speed, train, "audio_s_per_s", "speed (seconds of audio a second)", GREEN, width=_width(train))
        for axis in (rate, speed):
            axis.set_xlabel("step")
        figure.suptitle(run_directory.resolve().name, fontsize=14, fontweight="bold")
    return path


def draw_spectrogram(run_directory: Path, key: str, before: Any, after: Any) -> Path:
    """Draws spectrogram.png: one utterance's features (T, F) without masks and with them."""
    path = run_directory / "spectrogram.png"
    with _picture(path, (10, 6)) as figure:
        for axis, features, title in zip(
            figure.subplots(2, 1, sharex=True), (before, after), ("before SpecAugment", "after"), strict=True
        ):
            image = axis.imshow(features.T, origin="lower", aspect="auto", cmap="magma", vmin=-2.5, vmax=2.5)
            axis.set_title(title)
            axis.set_ylabel("mel band")
            axis.grid(False)
            figure.colorbar(image, ax=axis, label="deviations from the band's mean")
        axis.set_xlabel("frame")
        figure.suptitle(key)
    return path


def draw_lengths(path: Path, seconds: Any, title: str) -> None:
    """Draws a histogram of the lengths of utterances, and the audio that those up to each length have."""
    import numpy as np

    with _picture(path, (8, 4.5)) as figure:
        axis = figure.subplots()
        axis.hist(seconds, bins=50, color=BLUE)
        axis.set_xlabel("length (s)")
        axis.set_ylabel("utterances", color=BLUE)
        share = axis.twinx()
        ordered = np.sort(seconds)
        share.plot(ordered, 100 * np.cumsum(ordered) / ordered.sum(), color=ORANGE, linewidth=1.8)
        share.set_ylabel("audio up to this length (%)", color=ORANGE)
        share.set_ylim(0, 102)
        share.grid(False)
        axis.set_title(f"{len(ordered):,} utterances, {ordered.sum() / 3600:.2f} h")
        figure.suptitle(title if len(title) <= 60 else f"{title[:57]}...")


@contextlib.contextmanager
def _picture(path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """A matplotlib figure to draw on, which is saved at the end."""
    import matplotlib
    from matplotlib.figure import Figure

    look: Any = {  # matplotlib types its own keys, which is 300 names
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "legend.frameon": False,
        "font.size": 10,
    }
    with matplotlib.rc_context(look):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        with writing_aside(path) as file:
            figure.savefig(file, dpi=120, format="png")


def _width(lines: list[dict[str, Any]]) -> int:
    return max(1, round(SMOOTHING_SHARE * len(lines)))


def _draw_loss(axis: Any, train: list[dict[str, Any]], test: list[dict[str, Any]]) -> None:
    steps, values = column(train, "loss")
    _draw_smoothed(axis, steps, values, BLUE, _width(train), "train, smoothed")
    axis.plot(*column(test, "loss"), color=ORANGE, linewidth=1.8, marker="o", markersize=4, label="test")
    axis.set_title("loss (CTC, per target symbol)")
    if values:
        # The first steps' losses are many times the rest: cut there, or everything after them is a flat line.
        later = sorted(values[len(values) // 20 :])
        axis.set_ylim(0, 1.15 * max(later[int(0.98 * (len(later) - 1))], *column(test, "loss")[1], 1e-6))
    axis.legend(loc="upper right")


def _draw_errors(axis: Any, test: list[dict[str, Any]]) -> None:
    for name, color in (("wer", ORANGE), ("cer", BLUE)):
        steps, values = column(test, name)
        shares = [100 * value for value in values]
        axis.plot(steps, shares, color=color, linewidth=1.8, marker="o", markersize=4, label=name.upper())
        if shares:
            axis.annotate(
                f"{shares[-1]:.1f} %", (steps[-1], shares[-1]), (6, 6), textcoords="offset points", color=color
            )
            axis.margins(y=0.1)
    axis.set_title("errors on the test set (%)")
    axis.set_ylim(bottom=0)
    axis.legend()


def _draw_one(axis: Any, lines: list[dict[str, Any]], name: str, title: str, color: str, width: int) -> None:
    steps, values = column(lines, name)
    _draw_smoothed(axis, steps, values, color, width)
    axis.set_title(title)
    axis.set_ylim(bottom=0)


def _draw_smoothed(axis: Any, steps: list[int], values: list[float], color: str, width: int, label: str = "") -> None:
    """Draws the values pale and their moving mean on top, each with no more points than a picture can show."""
    thin = slice(None, None, max(1, len(steps) // 3000))
    if width > 1:
        axis.plot(steps[thin], values[thin], color=color, alpha=0.2, linewidth=0.8)
    axis.plot(steps[thin], smooth(values, width)[thin], color=color, linewidth=1.8, label=label)
