"""What a run shows to people: a live line on a terminal or plain lines in a log, and curves.png.

    metrics.jsonl's lines, as they are written --Display--> terminal or log
    metrics.jsonl, whole --draw_curves--> curves.png

Only rank 0 has a `Display`. matplotlib is imported when curves are drawn and not before.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

PLAIN_EVERY_S = 30.0  # between two plain lines; a live display shows every step
RATE_WINDOW = 200  # steps from which the time left is reckoned
SMOOTHING_SHARE = 0.02  # of all steps: the width of the smoothed curves


def duration(seconds: float) -> str:
    """`7 s`, `4 min 10 s`, `3 h 05 min` or `2 d 04 h`: as exact as it is worth reading."""
    whole = round(max(seconds, 0.0))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


class Display:
    """Shows the progress of a run: `train` after each step, `test` after each evaluation, `message` in between."""

    def __init__(
        self,
        total_steps: int,
        epochs: int,
        steps_per_epoch: int,
        *,
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_steps = total_steps
        self.epochs = epochs
        self.steps_per_epoch = steps_per_epoch
        self.last_wer: float | None = None
        self._stream = stream or sys.stdout
        self._clock = clock
        self._steps: deque[tuple[int, float]] = deque(maxlen=RATE_WINDOW)
        self._plain_at = -math.inf
        animated = self._stream.isatty() and os.environ.get("TERM") not in (None, "", "dumb", "unknown")
        self._live = _Live(total_steps, self._stream) if animated else None

    def train(self, line: dict[str, Any]) -> None:
        """Takes a step's line of metrics.jsonl."""
        self._steps.append((line["step"], self._clock()))
        if self._live:
            self._live.update(line, epochs=self.epochs, left=self.time_left(), wer=percent(self.last_wer))
        elif self._clock() - self._plain_at >= PLAIN_EVERY_S or line["step"] >= self.total_steps:
            self._plain_at = self._clock()
            self._print(self._plain(line))

    def test(self, line: dict[str, Any]) -> None:
        """Takes an evaluation's line of metrics.jsonl."""
        self.last_wer = line.get("wer")
        self._print(
            f"epoch {line['epoch']}/{self.epochs}  step {line['step']}/{self.total_steps}"
            f"  test loss {number(line.get('loss'))}  WER {percent(line.get('wer'))}  CER {percent(line.get('cer'))}"
        )

    def message(self, text: str) -> None:
        """Shows a sentence, above the live line where there is one."""
        self._print(text)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._live:
            self._live.stop()
            self._live = None

    def time_left(self) -> str:
        """From the pace of the last steps; evaluations between them are part of it."""
        if len(self._steps) < 2:
            return "-"
        (first, began), (last, now) = self._steps[0], self._steps[-1]
        if last <= first:
            return "-"
        return duration((self.total_steps - last) * (now - began) / (last - first))

    def _plain(self, line: dict[str, Any]) -> str:
        speed = line.get("audio_s_per_s")
        return (
            f"epoch {line['epoch']}/{self.epochs}  step {line['step']}/{self.total_steps}  loss {number(line['loss'])}"
            f"  rate {line['learning_rate']:.2e}  {number(speed, 0)} audio-s/s  left {self.time_left()}"
            f"  last WER {percent(self.last_wer)}"
        )

    def _print(self, text: str) -> None:
        if self._live:
            self._live.print(text)
        else:
            print(text, file=self._stream, flush=True)


class _Live:
    """Two lines that are drawn again in place; what is printed scrolls past above them."""

    def __init__(self, total_steps: int, stream: IO[str]) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        console = Console(file=stream, highlight=False)
        columns = (
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("left {task.fields[left]}"),
        )
        self._progress = Progress(*columns, console=console, expand=True)
        self._task = self._progress.add_task("train", total=total_steps, epoch="-", left="-")
        self._live = Live(self._progress, console=console, refresh_per_second=4)
        self._live.start()

    def update(self, line: dict[str, Any], *, epochs: int, left: str, wer: str) -> None:
        from rich.console import Group
        from rich.text import Text

        epoch = f"{line['epoch']}/{epochs}"
        self._progress.update(self._task, completed=line["step"], epoch=epoch, left=left)
        numbers = Text.from_markup(
            f"loss [bold]{number(line['loss'])}[/]   rate {line['learning_rate']:.2e}"
            f"   [cyan]{number(line.get('audio_s_per_s'), 0)}[/] audio-s/s   last WER [bold green]{wer}[/]"
        )
        self._live.update(Group(self._progress, numbers))

    def print(self, text: str) -> None:
        self._live.console.print(text, markup=False)

    def stop(self) -> None:
        self._live.stop()


# ---- curves.png ----------------------------------------------------------------------------------------------------

BLUE, ORANGE, GREEN, GREY = "#2b6cb0", "#dd6b20", "#2f855a", "#718096"


def read_metrics(run_directory: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the train and the test lines of metrics.jsonl; a torn last line is passed over."""
    lines: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    path = run_directory / "metrics.jsonl"
    for text in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            line = json.loads(text)
            lines[line["kind"]].append(line)
    return lines["train"], lines["test"]


def column(lines: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Returns steps and values of one metric, only where it is a finite number (a skipped step has none)."""
    points = [(line["step"], line.get(name)) for line in lines]
    finite = [
        (step, float(value)) for step, value in points if isinstance(value, (int, float)) and math.isfinite(value)
    ]
    return [step for step, _ in finite], [value for _, value in finite]


def smooth(values: list[float], width: int) -> list[float]:
    """Returns the centred moving mean over `width` values, over fewer at both ends; it does not lag."""
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
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    run_directory = Path(run_directory)
    train, test = read_metrics(run_directory)
    with matplotlib.rc_context(_look()):
        figure = Figure(figsize=(12, 7.5), layout="constrained")
        FigureCanvasAgg(figure)
        (loss, errors), (rate, speed) = figure.subplots(2, 2, sharex=True)
        _draw_loss(loss, train, test)
        _draw_errors(errors, test)
        _draw_one(rate, train, "learning_rate", "learning rate", GREY, width=1)
        _draw_one(speed, train, "audio_s_per_s", "speed (seconds of audio a second)", GREEN, width=_width(train))
        for axis in (rate, speed):
            axis.set_xlabel("step")
        figure.suptitle(run_directory.resolve().name, fontsize=14, fontweight="bold")
        return _save(figure, run_directory / "curves.png")


def draw_spectrogram(run_directory: Path, key: str, before: Any, after: Any) -> Path:
    """Draws spectrogram.png: one utterance's features (T, F) as the model would see them without masks, and with."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**_look(), "axes.grid": False}):
        figure = Figure(figsize=(10, 6), layout="constrained")
        FigureCanvasAgg(figure)
        for axis, features, title in zip(
            figure.subplots(2, 1, sharex=True), (before, after), ("before SpecAugment", "after"), strict=True
        ):
            image = axis.imshow(features.T, origin="lower", aspect="auto", cmap="magma", vmin=-2.5, vmax=2.5)
            axis.set_title(title)
            axis.set_ylabel("mel band")
            figure.colorbar(image, ax=axis, label="deviations from the band's mean")
        axis.set_xlabel("frame")
        figure.suptitle(key)
        return _save(figure, run_directory / "spectrogram.png")


def _save(figure: Any, path: Path) -> Path:
    """Writes the picture aside and renames it, so that a reader never sees half of it."""
    aside = path.with_name(f".{path.stem}.{os.getpid()}.png")
    figure.savefig(aside, dpi=120)
    os.replace(aside, path)
    return path


def _look() -> Any:  # matplotlib types its own keys, which is 300 names
    return {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "axes.titlelocation": "left",
        "axes.titlesize": 11,
        "legend.frameon": False,
        "font.size": 10,
    }


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
