"""One figure of the report, and what all figures share: colours, bounds, axes."""

from __future__ import annotations

import html
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from ekd_ray.results.leaderboard import Row
from ekd_ray.results.words import is_share, metric_name

# One colour per role on the whole page, readable on white and on near-black.
WINNER, KD, ALONE = "#2f6bde", "#d9820f", "#7d8a99"
AUTHORS, DEFAULTS, BROUGHT = "#8a63c9", "#2a9d6f", "#d46aa7"
NAME_COLORS = {"kd": KD, "authors' values": AUTHORS, "defaults": DEFAULTS, "none": ALONE}
FINALIST, FAILED = "#86a9ea", "#c8452d"
FAINT, LINE = "rgba(125,138,153,.38)", "rgba(125,138,153,.8)"
SEQUENTIAL = [[0, "#e8eefa"], [0.35, "#a9c3f2"], [0.7, "#4a7fe0"], [1, "#153a86"]]
# For cells with figures in them, which are readable on each colour of it.
PALE, INK = [[0, "#e8eefa"], [0.5, "#a9c3f2"], [1, "#5b8be6"]], "#0b0d12"
MOST_ROWS = 200  # of a figure's table


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A plotly figure: `summary` says in words what is seen, `rows` hold the same as a table.

    Small ones stand side by side.
    """

    name: str
    title: str
    summary: str
    figure: go.Figure
    height: int = 430
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()
    small: bool = False

    def payload(self) -> dict[str, Any]:
        """The figure as plain values for plotly's JavaScript, text in it escaped."""
        figure = self.figure.update_layout(height=self.height)
        figure.layout.template = None  # the page has its own
        return _escape(json.loads(figure.to_json()))


def _escape(value: Any, key: str = "") -> Any:
    """Escape all text: plotly's labels are a kind of HTML. Its templates are ours."""
    if isinstance(value, dict):
        return {k: _escape(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [_escape(v, key) for v in value]
    return html.escape(value) if isinstance(value, str) and key != "hovertemplate" else value


def axis(name: str, **more: Any) -> dict[str, Any]:
    """A plotly axis of a metric."""
    shown = {"tickformat": ".1~%"} if is_share(name) else {}
    return {"title": {"text": metric_name(name)}, **shown, **more}


def whole_ticks(reach: float) -> dict[str, Any]:
    """Ticks of an axis at whole numbers only, about ten over `reach`."""
    steps = (factor * 10**power for power in itertools.count() for factor in (1, 2, 5))
    return {"tick0": 0, "dtick": next(step for step in steps if reach <= 10 * step)}


def color_of(row: Row) -> str:
    other = BROUGHT if row.entered_as == "champion" else FINALIST
    return WINNER if row.winner else NAME_COLORS.get(row.name, other)
