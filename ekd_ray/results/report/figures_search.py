"""Charts of the search: learning curves, trade-offs, time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ekd_ray.config.targets import DIRECTIONS, pareto_front
from ekd_ray.results.records import RunRecord, milestone_epochs
from ekd_ray.results.report.content import Content
from ekd_ray.results.report.parts import (
    FAILED,
    FAINT,
    FINALIST,
    KD,
    WINNER,
    Chart,
    axis,
    duration,
    figure_text,
    metric_name,
    thinned,
)

MOST_CURVES, MOST_EPOCHS, MOST_POINTS, MOST_ROWS = 300, 120, 1000, 200
STATUS = {
    "complete": ("full length", FINALIST),
    "pruned": ("stopped early", FAINT),
    "failed": ("failed", FAILED),
    "running": ("running", KD),
}


def learning_curves(content: Content) -> Chart | None:
    """The metric by epochs, one line a trial; where trials are compared, a dotted line."""
    metric, best = content.config.metric, content.winner_number
    groups: dict[str, list[RunRecord]] = {}
    for record in thinned([*content.ended, *content.running], MOST_CURVES):
        if any(metric in row for row in record.history):
            name = "best" if record.number == best else record.status
            groups.setdefault(name, []).append(record)
    if not groups:
        return None
    data = []
    order = [name for name in ("pruned", "failed", "running", "complete", "best") if name in groups]
    for name in order:
        text, color = STATUS.get(name, (f"trial {best} (winner)", WINNER))
        if name == "best" and not content.winner:
            text = f"trial {best} (best so far)"
        data.append(_curves(groups[name], metric, text, color, bold=name == "best"))
    rungs = milestone_epochs(content.config)[:-1]
    shapes = [
        {"type": "line", "x0": epoch, "x1": epoch, "yref": "paper", "y0": 0, "y1": 1,
         "line": {"color": "rgba(125,138,153,.7)", "width": 1, "dash": "dot"}, "layer": "below"}
        for epoch in rungs
    ]  # fmt: skip
    notes = [
        # Each a line lower: on a phone they would lie on each other.
        {"x": epoch, "y": 1 - 0.06 * index, "yref": "paper", "yanchor": "top", "xanchor": "left",
         "text": f" {reached} came to epoch {epoch}" if index == 0 else f" {reached} to {epoch}"}
        for index, epoch in enumerate(rungs)
        if (reached := sum(len(r.history) >= epoch for r in content.ended))
    ]  # fmt: skip
    rows = [
        [r.number, STATUS[r.status][0], len(r.history), figure_text(metric, r.value(metric))]
        for r in [*content.ended, *content.running][:MOST_ROWS]
    ]
    return Chart(
        name="curves",
        title=f"{metric_name(metric).capitalize()} by epoch, one line a trial",
        summary=f"{len(content.ended)} ended trials; rungs at epochs {rungs or 'none'}.",
        data=data,
        layout={
            "xaxis": {"title": {"text": "epoch"}, "rangemode": "tozero"},
            "yaxis": axis(metric), "shapes": shapes, "annotations": notes,
        },
        height=430, columns=("trial", "how it ended", "epochs", metric_name(metric)), rows=rows,
    )  # fmt: skip


def _curves(
    records: Sequence[RunRecord], metric: str, name: str, color: str, *, bold: bool
) -> dict[str, Any]:
    """All lines of a group as one trace with gaps: one entry of the legend, and little to draw."""
    x: list[float | None] = []
    y: list[float | None] = []
    text: list[str] = []
    for record in records:
        rows = thinned([row for row in record.history if metric in row], MOST_EPOCHS)
        x += [*(row["epoch"] for row in rows), None]
        y += [*(row[metric] for row in rows), None]
        text += [f"trial {record.number}"] * (len(rows) + 1)
    return {
        "type": "scatter", "mode": "lines+markers", "name": name, "x": x, "y": y, "text": text,
        "line": {"color": color, "width": 3 if bold else 1.3},
        "marker": {"size": 6 if bold else 3.5, "color": color},
        "hovertemplate": "%{text}, epoch %{x}: %{y}<extra></extra>", "connectgaps": False,
    }  # fmt: skip


def trade_off(content: Content) -> Chart | None:
    """The Pareto front of the objectives; with one objective, the metric against its cost."""
    config = content.config
    further = list(config.objectives[:1])
    records = [r for r in content.ended if r.history and r.value(config.metric) is not None]
    if further:
        records = [r for r in records if r.status == "complete" and further[0] in r.last]
    if not records:
        return None
    records = thinned(records, MOST_POINTS)
    names = (config.metric, further[0]) if further else (config.metric, "seconds")
    rows = [{**r.last, "seconds": r.seconds} for r in records]
    front = set(_front(rows, names))
    x_axis: dict[str, Any] = (
        axis(further[0]) if further else {"title": {"text": "seconds of training"}}
    )
    spread = [row[names[1]] for row in rows]
    if min(spread) > 0 and max(spread) > 20 * min(spread):
        x_axis |= {"type": "log", "dtick": "D2"}
    line = sorted(front, key=lambda index: rows[index][names[1]])
    data: list[dict[str, Any]] = [
        {
            "type": "scatter", "mode": "lines", "name": "Pareto front",
            "x": [rows[i][names[1]] for i in line], "y": [rows[i][names[0]] for i in line],
            "line": {"color": WINNER, "width": 1.5, "shape": "hv"}, "hoverinfo": "skip",
        }
    ]  # fmt: skip
    for status, (title, color) in STATUS.items():
        members = [i for i, r in enumerate(records) if r.status == status]
        if members:
            data.append(
                {
                    "type": "scatter", "mode": "markers", "name": title,
                    "x": [rows[i][names[1]] for i in members],
                    "y": [rows[i][names[0]] for i in members],
                    "text": [f"trial {records[i].number}" for i in members],
                    "marker": {
                        "color": [WINNER if i in front else color for i in members],
                        "size": [9 if i in front else 7 for i in members],
                        "line": {"width": 0},
                    },
                    "hovertemplate": "%{text}: %{y} at %{x}<extra></extra>",
                }
            )  # fmt: skip
    against = metric_name(further[0]) if further else "seconds of training"
    return Chart(
        name="front",
        title=f"{metric_name(config.metric).capitalize()} against {against}",
        summary=f"{len(front)} of {len(records)} trials are on the Pareto front.",
        data=data,
        layout={"xaxis": x_axis, "yaxis": axis(config.metric)},
        height=400, columns=("trial", *(metric_name(n) for n in names)),
        rows=[
            [records[i].number, figure_text(names[0], rows[i][names[0]]),
             f"{rows[i][names[1]]:,.0f}" if names[1] == "seconds" else
             figure_text(names[1], rows[i][names[1]])]
            for i in line[:MOST_ROWS]
        ],
    )  # fmt: skip


def _front(rows: Sequence[dict[str, Any]], names: tuple[str, str]) -> list[int]:
    if names[1] in DIRECTIONS:
        return pareto_front(rows, names)
    # Seconds are no objective: less is better, as with the parameters whose place they take.
    return pareto_front([{**row, "parameters": row[names[1]]} for row in rows],
                        (names[0], "parameters"))  # fmt: skip


def time_chart(content: Content) -> Chart | None:
    """Hours by stage, and what was saved, hatched."""
    rows = [row for row in content.time.to_pylist() if row["hours"] > 0]
    if not rows:
        return None
    saved = content.saved
    spared = [("saved by early stops", saved.stopped_hours)]
    if saved.cache_hours is not None:
        spared.append(("saved by the teacher's cache", saved.cache_hours))
    spared = [(name, hours) for name, hours in spared if hours > 0]
    names = [*(row["stage"] for row in rows), *(name for name, _ in spared)]
    hours = [*(row["hours"] for row in rows), *(value for _, value in spared)]
    biggest = max(hours)
    unit, factor = ("hours", 1) if biggest >= 2 else ("minutes", 60)
    return Chart(
        name="time",
        title=f"Training and validation time by stage, in {unit}, all runs together",
        summary="; ".join(f"{n} {duration(h)}" for n, h in zip(names, hours, strict=True)),
        data=[
            {
                "type": "bar", "orientation": "h", "y": names[::-1],
                "x": [factor * h for h in hours][::-1], "showlegend": False,
                "marker": {
                    "color": [FAINT] * len(spared) + [WINNER] * len(rows),
                    "pattern": {"shape": ["/"] * len(spared) + [""] * len(rows)},
                },
                "text": [duration(h) for h in hours][::-1], "textposition": "auto",
                "textangle": 0, "cliponaxis": False,
                "hovertemplate": "%{y}: %{text}<extra></extra>",
            }
        ],
        layout={"showlegend": False, "bargap": 0.3,
                "xaxis": {"title": {"text": unit}, "range": [0, 1.15 * factor * biggest]}},
        height=100 + 36 * len(names), columns=("stage", "runs", "epochs", "time"),
        rows=[
            *([r["stage"], r["runs"], r["epochs"], duration(r["hours"])] for r in rows),
            *([name, None, None, duration(h)] for name, h in spared),
        ],
    )  # fmt: skip
