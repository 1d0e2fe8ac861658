"""docs/gpu.md from results.jsonl: what has run on a GPU and what has not, each block with its tables."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Mapping
from typing import Any

from benchmarks.gpu import results
from benchmarks.gpu.blocks import BLOCKS, Block
from benchmarks.gpu.job import REPOSITORY
from benchmarks.gpu.results import Result

RESULTS = REPOSITORY / "docs" / "gpu"
PAGE = REPOSITORY / "docs" / "gpu.md"

HEAD = """\
# On a GPU

`make gpu-run` (`python -m benchmarks.gpu`) runs all of this in ten minutes on a machine with one GPU. It needs nothing
there but Python with torch, torchaudio, numpy, pyarrow and pytest; what else is missing travels as wheels (`--wheels`).
This page is not edited by hand: `python -m benchmarks.gpu --report` writes it from the results in docs/gpu.

**Two or more GPUs have never been used, so NCCL between ranks has not been run.** What is known of it comes from its
documentation, and from gloo between processes on CPUs.
"""

ESTIMATES = """\
## Estimates

These are estimates, not measurements. `configs/librispeech_100.yaml` has 32 micro-batches a step, of 3.0 utterances on
average, and the GRUs walk some 590 frames ten times for each. A frame of a direction takes 8 to 12 us forward and 12 to
18 us backward, hardly depending on the number of utterances up to 128. So the time of a step is nearly proportional to
the number of batches in it:

| | audio-h per s, one H100 | audio-h per s, eight |
|---|---|---|
| micro-batches apart | 0.05 to 0.07 | 0.4 to 0.6 |
| a rank's micro-batches fused | 1.1 to 1.4 | 1.4 to 1.9 |

For comparison, MLPerf's RNN-T trains 5.9 h of audio per second and GPU on a machine of eight H100.
"""

NOT_RUN = "not run yet"


def render(found: Mapping[str, Result], blocks: Mapping[str, Block] = BLOCKS) -> str:
    """The page."""
    parts = [HEAD, _overview(found, blocks), ESTIMATES]
    for name, block in blocks.items():
        parts.append(f"## {block.title}\n\n{_wrapped(block.what)}\n")
        parts.append(_block(found[name]) if name in found else f"{NOT_RUN.capitalize()}.\n")
    return "\n".join(parts)


def _overview(found: Mapping[str, Result], blocks: Mapping[str, Block]) -> str:
    """A line for each block, and the machine."""
    lines = ["| block (`--blocks`) | state | limit, s |\n|---|---|---|"]
    for name, block in blocks.items():
        lines.append(
            f"| `{name}`: {block.title} | {_state(found[name]) if name in found else NOT_RUN} | {block.limit_s:g} |"
        )
    return "\n".join(lines) + "\n"


def _state(result: Result) -> str:
    if result.seconds is None:
        return results.KILLED
    reduced = ", reduced form" if result.small else ""
    return f"{result.ended} after {result.seconds:.0f} s{reduced}"


def _block(result: Result) -> str:
    day = time.strftime("%Y-%m-%d", time.gmtime(result.time_s))
    machine = ", ".join(f"{name} {value}" for name, value in result.machine.items() if value is not None)
    state = _state(result)
    parts = [_wrapped(f"{state[0].upper()}{state[1:]}, {day}. {machine}.") + "\n"]
    parts += [f"**{title}**\n\n{_table(rows)}" for title, rows in result.tables.items()]
    parts += [_wrapped(f"- {note}") + "\n" for note in result.notes]
    return "\n".join(parts)


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _table(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [columns, ["---"] * len(columns), *([_text(row.get(name)) for name in columns] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3g}"
    return str(value).replace("|", "\\|")
