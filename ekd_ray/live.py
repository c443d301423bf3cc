"""Pieces of the live view: progress line, rung occupancy, durations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

# Below this width settings would be broken into single letters.
WIDE = 72


def progress_line(title: str, share: float, text: str, *, width: int) -> Table:
    """Title, a bar filled to `share` in [0, 1], and what there is to say, in `width` columns."""
    bar = 24 if width >= WIDE else 10
    line = Table.grid(padding=(0, 1))
    line.add_column(no_wrap=True)
    line.add_column(width=bar)
    line.add_column(overflow="fold")
    line.add_row(title, ProgressBar(total=1.0, completed=share, width=bar), Text(text))
    return line


def folded(text: str) -> Table:
    """Text that goes on in the next line where the terminal ends."""
    line = Table.grid()
    line.add_column(overflow="fold")
    line.add_row(Text(text))
    return line


def rung_occupancy(rungs: Sequence[int], runs: Iterable[tuple[int, bool]]) -> str:
    """How many runs have reached each rung, and how many of them are running.

    Args:
        rungs: epochs at which trials are compared, ascending; runs: (epochs done, whether it
            is running) of each.

    Returns:
        "rungs: epoch 1: 9 (2 running), epoch 3: 4, epoch 9: 1"; a running one is counted as
        such at the last rung that it has reached.
    """
    parts = []
    runs = list(runs)
    for rung, following in zip(rungs, [*rungs[1:], None], strict=True):
        reached = [(done, running) for done, running in runs if done >= rung]
        here = sum(running and (following is None or done < following) for done, running in reached)
        parts.append(f"epoch {rung}: {len(reached)}" + (f" ({here} running)" if here else ""))
    return f"rungs: {', '.join(parts)}" if parts else ""


def latest(runs: dict[int, Any], count: int) -> list[Any]:
    """At most `count` runs, in order: all that are running, and of the others the last."""
    running = [number for number, run in runs.items() if run.state == "running"]
    ended = [number for number in runs if number not in set(running)]
    room = max(0, count - len(running))
    chosen = {*running[-count:], *(ended[-room:] if room else ())}
    return [run for number, run in runs.items() if number in chosen]


def duration(seconds: float) -> str:
    """`2 h 5 min`, `3 min 10 s` or `12 s`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
