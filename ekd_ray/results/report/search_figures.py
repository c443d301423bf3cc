"""Figures of the search: its trials, its model, its time; plots of Optuna where it has them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from ekd_ray.config.phrases import joined, several
from ekd_ray.config.targets import DIRECTIONS, as_loss, evenly_spaced, pareto_front, total_violation
from ekd_ray.results.importance import LEAST_TRIALS, describe_error, judged_trials, thin_out
from ekd_ray.results.model_figures import StudyModel, value_at
from ekd_ray.results.optuna_study import build_study, coordinate, draw_plot
from ekd_ray.results.records import RunRecord, milestone_epochs
from ekd_ray.results.report.chart import (
    FAILED,
    FAINT,
    FINALIST,
    KD,
    LINE,
    MOST_ROWS,
    SEQUENTIAL,
    WINNER,
    Chart,
    axis,
    whole_ticks,
)
from ekd_ray.results.report.content import Content, select_compared_trials
from ekd_ray.results.words import duration, figure_text, is_share, metric_name, percent, value_text

STATUS = {
    "complete": ("full length", FINALIST),
    "pruned": ("stopped early", FAINT),
    "failed": ("failed", FAILED),
    "running": ("running", KD),
}
MOST_CURVES, MOST_EPOCHS, MOST_POINTS = 300, 120, 500
MOST_LINES, MOST_DOTS = 300, 250
GRID = 40  # values of a parameter that the model is asked for


def draw_history(content: Content) -> Iterator[Chart]:
    """The metric of every trial by number, and the best of full length so far; not in the report,
    where the learning curves say more."""
    metric = content.config.metric
    found = [(r, v) for r in content.ended if (v := r.value(metric)) is not None]
    if not found:
        return
    figure = go.Figure(
        layout={"xaxis": {"title": {"text": "trial"}, "rangemode": "tozero"},
                "yaxis": axis(metric)}
    )  # fmt: skip
    for status, (title, color) in STATUS.items():
        x = [r.number for r, _ in found if r.status == status]
        y = [value for r, value in found if r.status == status]
        if x:
            figure.add_scatter(
                x=x, y=y, mode="markers", name=title, marker={"color": color, "size": 8},
                hovertemplate="trial %{x}: %{y}<extra></extra>",
            )  # fmt: skip
    full = [(r.number, value) for r, value in found if r.status == "complete"]
    better = max if DIRECTIONS[metric] == "max" else min
    best = list(itertools.accumulate((value for _, value in full), better))
    figure.add_scatter(
        x=[number for number, _ in full], y=best, mode="lines", name="best so far",
        line={"color": WINNER, "shape": "hv"}, hoverinfo="skip",
    )  # fmt: skip
    yield Chart(
        name="history",
        title=f"{metric_name(metric).capitalize()} by trial",
        summary=f"{several(len(found), 'ended trial')}, {len(full)} of full length.",
        figure=figure,
    )


def draw_learning_curves(content: Content) -> Iterator[Chart]:
    """The metric by epochs, one line a trial; where trials are compared, a dotted line."""
    metric, best = content.config.metric, content.winner_number
    trials = [*content.ended, *content.running]
    groups: dict[str, list[RunRecord]] = {}
    for record in evenly_spaced(trials, MOST_CURVES):
        if any(metric in row for row in record.history):
            name = "best" if record.number == best else record.status
            groups.setdefault(name, []).append(record)
    if not groups:
        return
    figure = go.Figure(
        layout={"xaxis": {"title": {"text": "epoch"}, "rangemode": "tozero",
                          **whole_ticks(max(len(record.history) for record in trials))},
                "yaxis": axis(metric)}
    )  # fmt: skip
    crown = f"trial {best} (winner)" if content.winner else f"trial {best} (best so far)"
    for name in ("pruned", "failed", "running", "complete", "best"):
        if name in groups:
            text, color = STATUS.get(name, (crown, WINNER))
            figure.add_trace(_join_curves(groups[name], metric, text, color, bold=name == "best"))
    rungs = milestone_epochs(content.config)[:-1]
    for index, epoch in enumerate(rungs):
        reached = sum(len(record.history) >= epoch for record in content.ended)
        figure.add_vline(epoch, line={"color": LINE, "width": 1, "dash": "dot"}, layer="below")
        if reached:  # each a line lower: on a phone they would lie on each other
            figure.add_annotation(
                x=epoch, y=1 - 0.06 * index, yref="paper", yanchor="top", xanchor="left",
                text=f" {reached} came to epoch {epoch}",
            )  # fmt: skip
    where = "no rungs"
    if rungs:
        where = f"{'rung' if len(rungs) == 1 else 'rungs'} at epoch {joined([*map(str, rungs)])}"
    yield Chart(
        name="curves",
        title=f"{metric_name(metric).capitalize()} by epoch, one line a trial",
        summary=f"{several(len(content.ended), 'ended trial')}; {where}.",
        figure=figure,
        columns=("trial", "how it ended", "epochs", metric_name(metric)),
        rows=[
            [r.number, STATUS[r.status][0], len(r.history), figure_text(metric, r.value(metric))]
            for r in trials[:MOST_ROWS]
        ],
    )


def _join_curves(
    records: Sequence[RunRecord], metric: str, name: str, color: str, *, bold: bool
) -> go.Scatter:
    """All lines of a group as one trace with gaps: one entry of the legend, and little to draw."""
    x: list[float | None] = []
    y: list[float | None] = []
    text: list[str] = []
    for record in records:
        rows = evenly_spaced([row for row in record.history if metric in row], MOST_EPOCHS)
        x += [*(row["epoch"] for row in rows), None]
        y += [*(row[metric] for row in rows), None]
        text += [f"trial {record.number}"] * (len(rows) + 1)
    return go.Scatter(
        mode="lines+markers", name=name, x=x, y=y, text=text, connectgaps=False,
        line={"color": color, "width": 3 if bold else 1.3}, marker={"size": 6 if bold else 3.5},
        hovertemplate="%{text}, epoch %{x}: %{y}<extra></extra>",
    )  # fmt: skip


def draw_importance(content: Content) -> Iterator[Chart]:
    """The effects of each parameter, alone and together with others, as bars."""
    found = content.findings
    if found is None:
        return
    names = [effect.parameter for effect in reversed(found.effects)]
    figure = go.Figure(
        layout={"barmode": "group", "bargap": 0.35,
                "xaxis": {"tickformat": ".0%", "rangemode": "tozero"},
                "legend": {"traceorder": "reversed", "orientation": "h", "x": 0,
                           "xanchor": "left", "y": 1.02, "yanchor": "bottom"}}
    )  # fmt: skip
    for key, name, color in (("total", "with others", FAINT), ("main", "alone", WINNER)):
        figure.add_bar(
            x=[getattr(effect, key) for effect in reversed(found.effects)], y=names, name=name,
            orientation="h", marker={"color": color},
            hovertemplate="%{y}: %{x:.0%} " + name + "<extra></extra>",
        )  # fmt: skip
    rows = [[e.parameter, percent(e.main), percent(e.total)] for e in found.effects]
    yield Chart(
        name="importance",
        title=f"Importance for {metric_name(found.metric)}: shares of the variance that the model "
        "expects",
        summary=f"{'; '.join(f'{name} {main} alone' for name, main, _ in rows)}. "
        f"{describe_error(found)}",
        figure=figure,
        height=130 + 44 * len(rows),
        columns=("parameter", "alone", "with others"),
        rows=rows,
    )


def _judge_trials(content: Content, most: int = MOST_DOTS) -> list[Any]:
    """At most so many trials of full length, with their metric: see `judged_trials`."""
    return thin_out(judged_trials(content.ended, content.config.metric), most)


def _ordered_parameters(content: Content, scored: Sequence[Any]) -> list[str]:
    """The parameters that any of the trials has, the most important first."""
    ranked = [e.parameter for e in content.findings.effects] if content.findings else []
    names = dict.fromkeys([*ranked, *(content.config.space or {})])
    return [name for name in names if any(name in record.params for record, _ in scored)]


def draw_parallel(content: Content) -> Iterator[Chart]:
    """A line through all parameters for each trial, the better the stronger."""
    metric, scored = content.config.metric, _judge_trials(content, MOST_LINES)
    names = _ordered_parameters(content, scored)
    if len(names) < 2 or len(scored) < LEAST_TRIALS:
        return
    study = build_study(scored, content.config.space or {}, DIRECTIONS[metric])
    figure = draw_plot("parallel_coordinate", study, names, metric_name(metric))
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    # The first axis is the metric's. One colour, so that the best are strong on black too.
    for rank, line in enumerate(sorted(lines, key=lambda line: -as_loss(line.y[0], metric))):
        share = rank / max(1, len(lines) - 1)
        line.update(opacity=0.15 + 0.85 * share**3, line={"color": WINNER, "width": 1 + share**3})
    figure.data = sorted(lines, key=lambda line: line.opacity)
    figure.update_annotations(font={"color": None, "size": 11})
    ranked = sorted(scored, key=lambda pair: as_loss(pair[1], metric))
    yield Chart(
        name="parallel",
        title="Every trial of full length through all parameters, the better its score the "
        "stronger",
        summary=f"{len(scored)} trials, {len(names)} parameters.",
        figure=figure,
        columns=("trial", metric_name(metric), *names),
        rows=[
            [r.number, figure_text(metric, s), *(value_text(r.params.get(n)) for n in names)]
            for r, s in ranked[:MOST_ROWS]
        ],
    )


def draw_contour(content: Content) -> Iterator[Chart]:
    """The expectation of the model over the two most important numbers, the others as in the best
    trial."""
    space, scored, best = content.config.space or {}, _judge_trials(content), content.best_trial
    if content.model is None or content.findings is None or best is None:
        return
    names = [
        name
        for name in _ordered_parameters(content, scored)
        if "choices" not in space[name]
        and space[name]["low"] < space[name]["high"]
        and name in best.params
    ][:2]
    if len(names) < 2:
        return
    known = [(r, s) for r, s in scored if all(n in r.params for n in names)]
    x, y = (_grid_values(name, space) for name in names)
    points = [{**best.params, names[0]: one, names[1]: other} for other in y for one in x]
    surface = content.model.expect(points)[0].reshape(len(y), len(x))
    metric = content.config.metric
    axes = [{**_value_axis(space[n]), "title": {"text": n}, "showgrid": False} for n in names]
    figure = go.Figure(layout={"showlegend": False, "xaxis": axes[0], "yaxis": axes[1]})
    figure.add_contour(
        x=x, y=y, z=surface.tolist(), ncontours=14, colorscale=SEQUENTIAL,
        reversescale=DIRECTIONS[metric] == "min", hovertemplate="%{z}<extra></extra>",
        line={"width": 0.5, "color": "rgba(255,255,255,.6)"},
        colorbar={"thickness": 10, "outlinewidth": 0,
                  "tickformat": ".1~%" if is_share(metric) else None},
    )  # fmt: skip
    figure.add_scatter(
        x=[r.params[names[0]] for r, _ in known], y=[r.params[names[1]] for r, _ in known],
        mode="markers", hovertemplate="%{text}<extra></extra>",
        text=[f"trial {r.number}: {figure_text(metric, s)}" for r, s in known],
        marker={"color": [KD if r.number == best.number else "#ffffff" for r, _ in known],
                "size": [12 if r.number == best.number else 7 for r, _ in known],
                "line": {"color": "#12161c", "width": 1}},
    )  # fmt: skip
    yield Chart(
        name="contour",
        title=f"{metric_name(metric).capitalize()} that the model expects over the two most "
        "important numbers",
        summary=f"The contour is what the study's model expects of {names[0]} and {names[1]}, the "
        f"other settings as in {best.name}; the dots are all trials.",
        figure=figure,
    )


def _grid_values(name: str, space: Mapping[str, Any]) -> list[Any]:
    """The values of a choice, or some along a range."""
    count = len(space[name].get("choices", ())) or GRID
    places = np.linspace(0, 1, count)
    return [*dict.fromkeys(value_at(name, space[name], float(place)) for place in places)]


def draw_slices(content: Content) -> Iterator[Chart]:
    """The metric of the trials over each parameter, and what the model expects there of the best
    one with another value."""
    metric, best = content.config.metric, content.best_trial
    space, scored = content.config.space or {}, _judge_trials(content)
    if len(scored) < 2:  # a point alone shows nothing
        return
    for index, name in enumerate(_ordered_parameters(content, scored)):
        figure = go.Figure(
            layout={"showlegend": False, "xaxis": _value_axis(space[name]),
                    "yaxis": axis(metric, title=None)}
        )  # fmt: skip
        summary = ""
        if content.model and content.findings and best and name in best.params:
            figure.add_traces(_expected_slice(content.model, best, name))
            summary = (
                f" Line and band: what the model expects of {best.name} with another {name}, with "
                f"its 95 % interval. {describe_error(content.findings)}"
            )
        shown = value_text if "choices" in space[name] else float
        tried = [(record, score) for record, score in scored if name in record.params]
        own = [best is not None and record.number == best.number for record, _ in tried]
        figure.add_scatter(
            x=[shown(r.params[name]) for r, _ in tried], y=[score for _, score in tried],
            name="trials", mode="markers", text=[f"trial {record.number}" for record, _ in tried],
            hovertemplate="%{text}: %{y} at %{x}<extra></extra>",
            marker={"color": [WINNER if one else FINALIST for one in own],
                    "size": [11 if one else 7 for one in own], "opacity": 0.85},
        )  # fmt: skip
        yield Chart(
            name=f"slice-{index}", title=name, figure=figure,
            summary=f"{metric_name(metric)} over {name}, {len(tried)} trials of full length."
            f"{summary}",
            height=230, small=True,
        )  # fmt: skip


def _expected_slice(model: StudyModel, best: RunRecord, name: str) -> list[go.Scatter]:
    """The expectation of a trial with other values of a parameter, with its interval."""
    values = _grid_values(name, model.space)
    found = model.expect([{**best.params, name: value} for value in values])
    mean, low, high = (figures.tolist() for figures in found)
    if "choices" in model.space[name]:
        reach = [above - middle for above, middle in zip(high, mean, strict=True)]
        return [
            go.Scatter(
                x=[*map(value_text, values)], y=mean, mode="markers", hoverinfo="skip",
                marker={"symbol": "line-ew", "size": 16, "line": {"color": KD, "width": 2}},
                error_y={"array": reach, "color": KD, "thickness": 1.5, "width": 6},
            )
        ]  # fmt: skip
    return [
        go.Scatter(x=[*values, *values[::-1]], y=[*low, *high[::-1]], mode="lines", fill="toself",
                   fillcolor="rgba(217,130,15,.18)", line={"width": 0}, hoverinfo="skip"),
        go.Scatter(x=values, y=mean, mode="lines", line={"color": KD, "width": 2},
                   hovertemplate="expected: %{y} at %{x}<extra></extra>"),
    ]  # fmt: skip


def _value_axis(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The axis of a parameter, over its whole range."""
    if "choices" in entry:
        names = [value_text(choice) for choice in entry["choices"]]
        return {"type": "category", "categoryorder": "array", "categoryarray": names}
    low, high = coordinate(entry["low"], entry), coordinate(entry["high"], entry)
    edge = 0.02 * (high - low)
    shown = {"range": [low - edge, high + edge], "zeroline": False}
    if not entry.get("log"):
        whole = isinstance(entry["low"], int) and isinstance(entry["high"], int)
        ticks = whole_ticks(2 * (high - low)) if whole else {"nticks": 6}
        return {"type": "linear", **ticks, **shown}
    # 1, 2 and 5 of each decade, or powers of ten alone where there are many.
    step = 1 if high - low > 1.5 else "D2" if entry["high"] > 5 * entry["low"] else "D1"
    return {"type": "log", "dtick": step, "tickformat": "~g", **shown}


def draw_trade_off(content: Content) -> Iterator[Chart]:
    """The Pareto front of the objectives; with one objective, the metric against its cost."""
    config = content.config
    cost, records = select_compared_trials(content)
    records = evenly_spaced(records, MOST_POINTS)
    if not records:
        return
    rows = [{**r.last, "seconds": r.seconds} for r in records]
    names = (config.metric, cost)
    if config.objectives:
        best = {trial.number for trial in content.front}
        front = {i for i, r in enumerate(records) if r.number in best}
    else:
        # Seconds are no objective: less is better, as with the parameters whose place they take.
        # A trial that was stopped has a score of fewer epochs, and nothing to export.
        full = [i for i, r in enumerate(records) if r.status == "complete"]
        timed = [{**rows[i], "parameters": rows[i]["seconds"]} for i in full]
        front = {full[i] for i in pareto_front(timed, (config.metric, "parameters"))}
    line = sorted(front, key=lambda index: rows[index][cost])
    costs = [row[cost] for row in rows]
    wide = {"type": "log", "dtick": "D2"} if 0 < 20 * min(costs) < max(costs) else {}
    figure = go.Figure(layout={"xaxis": {**axis(cost), **wide}, "yaxis": axis(config.metric)})
    figure.add_scatter(
        x=[rows[i][cost] for i in line], y=[rows[i][config.metric] for i in line], mode="lines",
        name="Pareto front", line={"color": WINNER, "width": 1.5, "shape": "hv"},
        hoverinfo="skip", showlegend=len(line) > 1,
    )  # fmt: skip
    for status, (title, color) in STATUS.items():
        members = [i for i, r in enumerate(records) if r.status == status]
        if members:
            broken = [total_violation(config.bounds, rows[i]) > 0 for i in members]
            figure.add_scatter(
                x=[costs[i] for i in members], y=[rows[i][config.metric] for i in members],
                mode="markers", name=title, text=[f"trial {records[i].number}" for i in members],
                # One colour for how it ended, as the legend says: the front is the line.
                marker={"color": color, "size": [10 if i in front else 7 for i in members],
                        "symbol": ["x" if b else "circle" for b in broken],
                        "line": {"width": [2 if i in front else 0 for i in members],
                                 "color": WINNER}},
                hovertemplate="%{text}: %{y} at %{x}<extra></extra>",
            )  # fmt: skip
    yield Chart(
        name="front",
        title=f"{metric_name(config.metric).capitalize()} against {metric_name(cost)}",
        summary=f"{len(front)} of {several(len(records), 'trial')} are on the Pareto front.",
        figure=figure, height=400, columns=("trial", *map(metric_name, names)),
        rows=[[records[i].number, *(figure_text(n, rows[i][n]) for n in names)]
              for i in line[:MOST_ROWS]],
    )  # fmt: skip


def draw_time(content: Content) -> Iterator[Chart]:
    """Hours by stage, and what was saved, hatched."""
    rows = [row for row in content.time if row["hours"] > 0]
    if not rows:
        return
    spared = {"saved by early stops": content.saved.stopped_hours,
              "saved by the teacher's cache": content.saved.cache_hours}  # fmt: skip
    saved = [{"stage": n, "runs": None, "epochs": None, "hours": h} for n, h in spared.items() if h]
    shown = [*rows, *saved]
    biggest = max(row["hours"] for row in shown)
    units = {"hours": 1, "minutes": 60, "seconds": 3600}
    unit, factor = next(
        ((name, many) for name, many in units.items() if many * biggest >= 2), ("seconds", 3600)
    )
    table = [[r["stage"], r["runs"], r["epochs"], duration(r["hours"])] for r in shown]
    bars = go.Bar(
        x=[factor * row["hours"] for row in reversed(shown)], y=[row[0] for row in table[::-1]],
        orientation="h", text=[row[3] for row in table[::-1]], textposition="outside", textangle=0,
        cliponaxis=False, hovertemplate="%{y}: %{text}<extra></extra>",
        marker={"color": [FAINT] * len(saved) + [WINNER] * len(rows),
                "pattern": {"shape": ["/"] * len(saved) + [""] * len(rows)}},
    )  # fmt: skip
    axis = {"title": {"text": unit}, "range": [0, 1.15 * factor * biggest]}
    yield Chart(
        name="time",
        title=f"Training and validation time by stage, in {unit}, all runs together",
        summary="; ".join(f"{row[0]} {row[3]}" for row in table),
        figure=go.Figure(bars, {"showlegend": False, "bargap": 0.3, "xaxis": axis}),
        height=100 + 36 * len(shown),
        columns=("stage", "runs", "epochs", "time"),
        rows=table,
    )
