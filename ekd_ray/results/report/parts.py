"""Building blocks of the page: charts, tables and sections, and what they look like."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ekd_ray.config.targets import COSTS

DASH = "\N{EN DASH}"  # where there is no value
# One colour per role on the whole page, readable on white and on near-black.
WINNER, KD, AUTHORS, ALONE = "#2f6bde", "#d9820f", "#8a63c9", "#7d8a99"
ROLE_COLORS = {"kd": KD, "authors": AUTHORS, "none": ALONE}
FINALIST, FAILED, FAINT = "#86a9ea", "#c8452d", "rgba(125,138,153,0.38)"
LABELS = {"none": "student alone", "kd": "KD", "authors": "authors' values"}
SEQUENTIAL = [[0, "#e8eefa"], [0.35, "#a9c3f2"], [0.7, "#4a7fe0"], [1, "#153a86"]]
# Twenty classes can be told apart, ten hues in two shapes each.
CLASS_COLORS = (
    "#2f6bde", "#d9820f", "#2a9d6f", "#c8452d", "#8a63c9",
    "#8f6b4f", "#d46aa7", "#7d8a99", "#a3a51f", "#29a9bd",
)  # fmt: skip
METRIC_NAMES = {
    "top1": "accuracy",
    "nll": "negative log-likelihood",
    "ece": "calibration error (ECE)",
    "aurc": "risk over coverage (AURC)",
    "ood_auroc": "out-of-distribution AUROC",
    "parameters": "parameters",
    "flops": "FLOPs of one image",
    "latency_ms": "latency of one image (ms)",
}


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A plotly figure: `summary` says in words what is seen, `rows` hold the same as a table."""

    name: str
    title: str
    summary: str
    data: list[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)
    height: int = 380
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page. `takeaway` is its one sentence; `body` is HTML, already escaped, with
    `charts` below it (`small`: side by side) and `after` below them."""

    name: str
    title: str
    takeaway: str
    body: str = ""
    charts: Sequence[Chart] = ()
    small: Sequence[Chart] = ()
    after: str = ""


def esc(text: Any) -> str:
    """Text for HTML, and for plotly's labels, which are a kind of HTML."""
    return html.escape(str(text), quote=True)


def label(name: str) -> str:
    """A leaderboard row in words: a baseline's, or `trial 7`."""
    return LABELS.get(name, name)


def metric_name(name: str) -> str:
    """`val_top1` -> `validation accuracy`."""
    prefix, _, rest = name.partition("_")
    if name in COSTS or prefix not in ("val", "test"):
        return METRIC_NAMES.get(name, name)
    split = {"val": "validation", "test": "test"}[prefix]
    return f"{split} {METRIC_NAMES.get(rest, rest)}"


def is_share(name: str) -> bool:
    """Whether a metric is an accuracy, shown in percent."""
    return name.endswith(("top1", "top5"))


def figure_text(name: str, value: float | None) -> str:
    """A metric's value as text."""
    if value is None:
        return DASH
    if is_share(name):
        return f"{100 * value:.2f} %"
    if name in ("parameters", "flops"):
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def axis(name: str, **more: Any) -> dict[str, Any]:
    """A plotly axis of a metric."""
    shown = {"tickformat": ".1~%"} if is_share(name) else {}
    return {"title": {"text": esc(metric_name(name))}, **shown, **more}


def points(value: float) -> str:
    """A difference of accuracies in points, with its sign."""
    return f"{100 * value:+.2f}".replace("-", "\N{MINUS SIGN}")


def duration(hours: float) -> str:
    """Hours in words: `2.3 h`, `14 min`, `40 s`."""
    if hours >= 2:
        return f"{hours:.1f} h"
    return f"{hours * 60:.0f} min" if hours * 60 >= 2 else f"{hours * 3600:.0f} s"


def value_text(value: Any) -> str:
    """A setting's value as text."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return DASH if value is None else str(value)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, marked: int = -1) -> str:
    """An HTML table of plain values, escaped; numbers to the right, the row `marked` in bold."""
    lines = []
    for index, row in enumerate(rows):
        cells = "".join(_cell(value) for value in row)
        lines.append(f'<tr class="winner">{cells}</tr>' if index == marked else f"<tr>{cells}</tr>")
    head = "".join(f'<th scope="col">{esc(name)}</th>' for name in columns)
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        value = DASH if math.isnan(value) else f"{value:.4g}"
    text = DASH if value is None else str(value)
    number = text[:1].isdigit() or (text[:1] in "+-\N{MINUS SIGN}" and text[1:2].isdigit())
    return f'<td class="number">{esc(text)}</td>' if number else f"<td>{esc(text)}</td>"


def joined(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def several(count: int, noun: str) -> str:
    """`1 trial`, `2 trials`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def thinned(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of them, evenly spaced, both ends included."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]
