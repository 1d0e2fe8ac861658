"""The progress of a run on a terminal, where two lines are drawn again in place, or in a log, where lines are rare.

    lines of metrics.jsonl, as they are written --Display--> terminal or log

Only rank 0 has a `Display`. `duration`, `percent` and `number` format what the launchers' tables show, too.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import IO, Any

PLAIN_EVERY_S = 30.0  # between two plain lines; a live display shows every step
RATE_WINDOW = 200  # steps from which the time left is estimated


def duration(seconds: float) -> str:
    """`7 s`, `4 min 10 s`, `3 h 05 min` or `2 d 04 h`."""
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


def describe_epoch(line: dict[str, Any]) -> list[str]:
    """What the augmentations did in an epoch, and a warning for each that did nothing."""
    epoch, utterances, fired = line["epoch"], f"{line['utterances']:,} utterances", line["fired"]
    shares = ", ".join(f"{name} in {percent(count / max(line['utterances'], 1))}" for name, count in fired.items())
    summary = f"epoch {epoch}: {shares} of {utterances}"
    if not fired:
        summary = f"epoch {epoch}: {utterances}, and no augmentation is turned on"
    warnings = [
        f"warning: {name} changed none of the {utterances} of epoch {epoch}, although it is turned on: check the "
        "settings of augment"
        for name, count in fired.items()
        if not count
    ]
    return [summary, *warnings]


def memory(line: dict[str, Any]) -> str:
    """The peak of the GPU where there is one, else of the host."""
    held_gb = line.get("gpu_memory_gb") or line.get("host_memory_gb")
    return "-" if held_gb is None else f"{held_gb:.1f} GB"


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
            self.message(self._plain(line))

    def test(self, line: dict[str, Any]) -> None:
        """Takes an evaluation's line of metrics.jsonl."""
        self.last_wer = line.get("wer")
        self.message(
            f"epoch {line['epoch']}/{self.epochs}  step {line['step']}/{self.total_steps}"
            f"  test loss {number(line.get('loss'))}  WER {percent(line.get('wer'))}  CER {percent(line.get('cer'))}"
        )

    def message(self, text: str) -> None:
        """Shows a sentence, above the live line where there is one."""
        if self._live:
            self._live.print(text)
        else:
            print(text, file=self._stream, flush=True)

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
        return duration((self.total_steps - last) * (now - began) / (last - first))

    def _plain(self, line: dict[str, Any]) -> str:
        return (
            f"epoch {line['epoch']}/{self.epochs}  step {line['step']}/{self.total_steps}  loss {number(line['loss'])}"
            f"  rate {line['learning_rate']:.2e}  {number(line.get('audio_s_per_s'), 0)} audio-s/s"
            f" ({number(line.get('process_audio_s_per_s'), 0)} a process)"
            f"  waited {percent(line.get('data_wait'))} for data, {percent(line.get('rank_wait'))} for ranks"
            f"  peak {memory(line)}  left {self.time_left()}  last WER {percent(self.last_wer)}"
        )


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
            f"   [cyan]{number(line.get('audio_s_per_s'), 0)}[/] audio-s/s   waited {percent(line.get('data_wait'))}"
            f" for data, {percent(line.get('rank_wait'))} for ranks   peak {memory(line)}"
            f"   last WER [bold green]{wer}[/]"
        )
        self._live.update(Group(self._progress, numbers))

    def print(self, text: str) -> None:
        self._live.console.print(text, markup=False)

    def stop(self) -> None:
        self._live.stop()
