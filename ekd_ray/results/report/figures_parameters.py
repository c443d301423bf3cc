"""Charts of the searched parameters: importance, parallel coordinates, slices, contour."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ekd_ray.config.targets import DIRECTIONS
from ekd_ray.results.importance import coordinate, judged_epoch, score_at
from ekd_ray.results.records import RunRecord
from ekd_ray.results.report.content import Content
from ekd_ray.results.report.parts import (
    DASH,
    FAINT,
    FINALIST,
    KD,
    SEQUENTIAL,
    WINNER,
    Chart,
    axis,
    esc,
    figure_text,
    is_share,
    metric_name,
    thinned,
    value_text,
)

MOST_POINTS, MOST_ROWS = 1000, 200


def importance(content: Content) -> Chart | None:
    """Both importances of each parameter, as bars."""
    rows = content.importance.to_pylist()
    if not rows:
        return None
    names = [esc(row["parameter"]) for row in rows]
    bars = [
        {
            "type": "bar", "orientation": "h", "name": name, "y": names[::-1],
            "x": [row[key] for row in rows][::-1], "marker": {"color": color},
            "hovertemplate": "%{y}: %{x:.0%} by " + name + "<extra></extra>",
        }
        for key, name, color in (("ped_anova", "PED-ANOVA", FAINT), ("fanova", "fANOVA", WINNER))
    ]  # fmt: skip
    at = f"after epoch {rows[0]['epoch']}, which {rows[0]['trials']} trials reached"
    return Chart(
        name="importance",
        title=f"Importance for {metric_name(content.config.metric)} {at}",
        summary="; ".join(f"{r['parameter']} {_percent(r['fanova'])} by fANOVA" for r in rows),
        data=bars,
        layout={
            "barmode": "group", "bargap": 0.35,
            "xaxis": {"tickformat": ".0%", "rangemode": "tozero"},
            "legend": {"traceorder": "reversed", "orientation": "h", "x": 0, "xanchor": "left",
                       "y": 1.02, "yanchor": "bottom"},
        },
        height=130 + 44 * len(rows), columns=("parameter", "fANOVA", "PED-ANOVA"),
        rows=[[r["parameter"], _percent(r["fanova"]), _percent(r["ped_anova"])] for r in rows],
    )  # fmt: skip


def _percent(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.0f} %"


def judged(content: Content) -> tuple[int, list[tuple[RunRecord, float]]]:
    """(the epoch, trials with their metric after it): what parameters are judged by."""
    metric = content.config.metric
    epoch = judged_epoch(content.ended, content.config, metric)
    scored = [
        (record, score)
        for record in content.ended
        if (score := score_at(record, metric, epoch)) is not None and record.params
    ]
    return epoch, thinned(scored, MOST_POINTS)


def _ordered_parameters(content: Content) -> list[str]:
    ranked = content.importance.column("parameter").to_pylist()
    return [*ranked, *(name for name in content.config.space or {} if name not in ranked)]


def value_axis(entry: dict[str, Any]) -> dict[str, Any]:
    """The axis of a parameter, over its whole range."""
    if "choices" in entry:
        return {"type": "category"}
    low, high = coordinate(entry["low"], entry), coordinate(entry["high"], entry)
    edge = 0.02 * (high - low)
    shown = {"range": [low - edge, high + edge], "zeroline": False}
    if not entry.get("log"):
        return {"type": "linear", "nticks": 6, **shown}
    if high - low > 1.5:
        return {"type": "log", "dtick": 1, **shown}
    ticks = _short_log_ticks(entry["low"], entry["high"])
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{t:g}" for t in ticks], **shown}


def _short_log_ticks(low: float, high: float) -> list[float]:
    """Round numbers within a logarithmic range of no more than some 1.5 decades."""
    steps = (1, 2, 5) if high > 5 * low else (1, 1.5, 2, 3, 4, 5, 6, 8)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{step}e{power}") for power in powers for step in steps]
    return [tick for tick in ticks if low <= tick <= high]


def _place(value: Any, entry: dict[str, Any]) -> float:
    """Where a value lies on its axis, from 0 to 1."""
    if "choices" in entry:
        choices = [str(choice) for choice in entry["choices"]]
        index = choices.index(str(value)) if str(value) in choices else 0
        return index / (len(choices) - 1) if len(choices) > 1 else 0.5
    low, high = coordinate(entry["low"], entry), coordinate(entry["high"], entry)
    return (coordinate(value, entry) - low) / (high - low) if high > low else 0.5


def parallel(content: Content) -> Chart | None:
    """A line through all parameters for each trial, the better the stronger its colour."""
    space, (epoch, scored) = content.config.space or {}, judged(content)
    names = [n for n in _ordered_parameters(content) if any(n in r.params for r, _ in scored)]
    if len(names) < 2 or len(scored) < 2:
        return None
    metric = content.config.metric
    sign = 1 if DIRECTIONS[metric] == "max" else -1
    ranked = sorted(scored, key=lambda pair: sign * pair[1])
    bands = [list(band) for band in np.array_split(np.arange(len(ranked)), min(4, len(ranked)))]
    looks = [("rgba(125,138,153,.28)", 1.0), ("rgba(125,138,153,.45)", 1.0), (FINALIST, 1.4),
             (WINNER, 2.2)][-len(bands) :]  # fmt: skip
    titles = ["worst quarter", "third quarter", "second quarter", "best quarter"][-len(bands) :]
    data = []
    for band, (color, width), title in zip(bands, looks, titles, strict=True):
        x: list[float | None] = []
        y: list[float | None] = []
        text: list[str] = []
        for record, score in (ranked[index] for index in band):
            known = [n for n in names if n in record.params]
            x += [*(names.index(n) for n in known), None]
            y += [*(_place(record.params[n], space[n]) for n in known), None]
            about = f"trial {record.number}: {figure_text(metric, score)}"
            text += [f"{esc(n)} {esc(value_text(record.params[n]))}<br>{about}" for n in known]
            text.append("")
        data.append(
            {"type": "scatter", "mode": "lines+markers", "name": title, "x": x, "y": y,
             "text": text, "line": {"color": color, "width": width},
             "marker": {"size": 4, "color": color}, "hovertemplate": "%{text}<extra></extra>"}
        )  # fmt: skip
    notes = []
    for index, name in enumerate(names):
        low, high = _ends(space[name])
        notes += [
            {"x": index, "y": y, "text": esc(text), "yanchor": anchor, "font": {"size": 11}}
            for y, text, anchor in ((-0.03, low, "top"), (1.03, high, "bottom"))
        ]
    return Chart(
        name="parallel", title=f"Every trial through all parameters, by its score after epoch "
        f"{epoch}", summary=f"{len(scored)} trials, {len(names)} parameters.", data=data,
        layout={
            "xaxis": {"tickvals": list(range(len(names))), "ticktext": [esc(n) for n in names],
                      "range": [-0.35, len(names) - 0.65], "showgrid": True,
                      "autotickangles": [0, -40, -90]},
            "yaxis": {"showticklabels": False, "range": [-0.14, 1.14], "showgrid": False,
                      "zeroline": False},
            "annotations": notes,
        },
        height=430, columns=("trial", metric_name(metric), *names),
        rows=[
            [r.number, figure_text(metric, s), *(value_text(r.params.get(n)) for n in names)]
            for r, s in ranked[::-1][:MOST_ROWS]
        ],
    )  # fmt: skip


def _ends(entry: dict[str, Any]) -> tuple[str, str]:
    if "choices" in entry:
        return value_text(entry["choices"][0]), value_text(entry["choices"][-1])
    return value_text(float(entry["low"])), value_text(float(entry["high"]))


def slices(content: Content) -> list[Chart]:
    """The metric over each parameter."""
    metric, space = content.config.metric, content.config.space or {}
    epoch, scored = judged(content)
    charts = []
    for index, name in enumerate(_ordered_parameters(content)):
        known = [(r, s) for r, s in scored if name in r.params]
        if not known:
            continue
        entry, best = space[name], content.winner_number
        categorical = "choices" in entry
        values = [r.params[name] for r, _ in known]
        charts.append(
            Chart(
                name=f"slice-{index}",
                title=name,
                summary=f"{metric_name(metric)} after epoch {epoch} over {name}, "
                f"{len(known)} trials.",
                data=[
                    {
                        "type": "scatter", "mode": "markers", "showlegend": False,
                        "x": [esc(value_text(v)) if categorical else v for v in values],
                        "y": [s for _, s in known],
                        "text": [f"trial {r.number}" for r, _ in known],
                        "marker": {
                            "color": [WINNER if r.number == best else FINALIST for r, _ in known],
                            "size": [11 if r.number == best else 7 for r, _ in known],
                            "opacity": 0.85, "line": {"width": 0},
                        },
                        "hovertemplate": "%{text}: %{y} at %{x}<extra></extra>",
                    }
                ],
                layout={"showlegend": False, "yaxis": {**axis(metric), "title": {"text": ""}},
                        "xaxis": value_axis(entry)},
                height=230,
            )
        )  # fmt: skip
    return charts


def contour(content: Content) -> Chart | None:
    """The metric over the two most important numbers, by a Gaussian process in the two."""
    space, (_, scored) = content.config.space or {}, judged(content)
    numeric = [
        n
        for n in _ordered_parameters(content)
        if "choices" not in space[n] and space[n]["low"] < space[n]["high"]
    ][:2]
    known = [(r, s) for r, s in scored if all(n in r.params for n in numeric)]
    if len(numeric) < 2 or len(known) < 6:
        return None
    fitted = thinned(known, 200)
    places = np.array([[_place(r.params[n], space[n]) for n in numeric] for r, _ in fitted])
    grid = np.linspace(0, 1, 40)
    surface, spread = _surface(places, np.array([s for _, s in fitted]), grid)
    metric, best = content.config.metric, content.winner_number
    axes = [_grid_values(space[n], grid) for n in numeric]
    kinds = [{**value_axis(space[n]), "title": {"text": esc(n)}} for n in numeric]
    return Chart(
        name="contour",
        title=f"{metric_name(metric).capitalize()} over the two most important numbers",
        summary=f"{numeric[0]} and {numeric[1]}; the fit explains {100 * spread:.0f} % of the "
        "variance between the trials.",
        data=[
            {
                "type": "contour", "x": axes[0], "y": axes[1], "z": surface, "ncontours": 14,
                "colorscale": SEQUENTIAL, "reversescale": DIRECTIONS[metric] == "min",
                "line": {"width": 0.5, "color": "rgba(255,255,255,.6)"},
                "colorbar": {"thickness": 10, "outlinewidth": 0,
                             **({"tickformat": ".1~%"} if is_share(metric) else {})},
                "hovertemplate": "%{z}<extra></extra>",
            },
            {
                "type": "scatter", "mode": "markers", "showlegend": False,
                "x": [r.params[numeric[0]] for r, _ in known],
                "y": [r.params[numeric[1]] for r, _ in known],
                "text": [f"trial {r.number}: {figure_text(metric, s)}" for r, s in known],
                "marker": {
                    "color": ["#ffffff" if r.number != best else KD for r, _ in known],
                    "size": [7 if r.number != best else 12 for r, _ in known],
                    "line": {"color": "#12161c", "width": 1},
                },
                "hovertemplate": "%{text}<extra></extra>",
            },
        ],
        layout={"showlegend": False, "xaxis": {**kinds[0], "showgrid": False},
                "yaxis": {**kinds[1], "showgrid": False}},
        height=430,
    )  # fmt: skip


def _grid_values(entry: dict[str, Any], grid: np.ndarray) -> list[float]:
    low, high = coordinate(entry["low"], entry), coordinate(entry["high"], entry)
    values = low + grid * (high - low)
    return [float(v) for v in (10**values if entry.get("log") else values)]


def _surface(
    places: np.ndarray, scores: np.ndarray, grid: np.ndarray
) -> tuple[list[list[float]], float]:
    """(predicted mean [y, x], share of the variance explained, each trial by the others). What
    the other parameters do is noise to it."""
    import warnings

    from scipy.linalg import cho_solve
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    kernel = ConstantKernel(1.0) * RBF([0.3, 0.3], (0.1, 10)) + WhiteKernel(0.2, (1e-3, 2))
    process = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)
    with warnings.catch_warnings():  # a bound of the kernel that was reached is no mistake
        warnings.simplefilter("ignore", ConvergenceWarning)
        process.fit(places, scores)
    x, y = np.meshgrid(grid, grid)
    surface = process.predict(np.column_stack([x.ravel(), y.ravel()])).reshape(x.shape)
    # Leave-one-out residuals in closed form, in units of the standard deviation.
    inverse = cho_solve((process.L_, True), np.eye(len(scores)))
    residuals = process.alpha_.ravel() / np.diag(inverse)
    return surface.tolist(), max(0.0, 1 - float(np.mean(residuals**2)))
