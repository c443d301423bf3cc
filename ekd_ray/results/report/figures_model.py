"""Charts of the final models: comparison, calibration, uncertainty, closeness to the teacher.

What they show of images is what was kept when the test split was read for the final figures;
nothing is read again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats

from ekd_ray.engine.measure.predictions import Predictions
from ekd_ray.engine.pictures import reliability_bins
from ekd_ray.results.leaderboard import Row, mean_sd
from ekd_ray.results.paired import LEAST_SEEDS, LEVEL
from ekd_ray.results.report.content import Content
from ekd_ray.results.report.parts import (
    ALONE,
    DASH,
    FAINT,
    FINALIST,
    ROLE_COLORS,
    WINNER,
    Chart,
    esc,
    label,
    points,
)

LEAST_IN_BIN = 10  # a bin of fewer predictions is noise to the eye; the table has it


def color_of(row: Row) -> str:
    """The colour of a leaderboard row's role."""
    return WINNER if row.winner else ROLE_COLORS.get(row.name, FINALIST)


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean by Student's t, None with fewer than three values."""
    mean, deviation, n = mean_sd(values)
    if n < LEAST_SEEDS:
        return None
    reach = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * deviation / n**0.5
    return mean - reach, mean + reach


def differences(content: Content) -> Chart | None:
    """Winner minus each baseline with its interval, against zero."""
    found = content.differences
    if not found:
        return None
    names = list(found)[::-1]
    data = []
    for name in names:
        paired = found[name]
        reach = None if paired.high is None else paired.high - paired.mean
        data.append(
            {
                "type": "scatter", "mode": "markers", "x": [100 * paired.mean],
                "y": [esc(label(name))], "showlegend": False,
                "marker": {"size": 11, "color": ROLE_COLORS.get(name, ALONE)},
                "error_x": {"type": "data", "array": [100 * (reach or 0.0)], "thickness": 2,
                            "width": 6, "visible": reach is not None},
                "hovertemplate": "%{y}: %{x:+.2f} points<extra></extra>",
            }
        )  # fmt: skip
    rows = [
        [
            label(name), points(d.mean), DASH if d.low is None else points(d.low),
            DASH if d.high is None else points(d.high), d.n,
        ]
        for name, d in found.items()
    ]  # fmt: skip
    return Chart(
        name="differences",
        title="Winner minus baseline, test accuracy in points"
        + (", with 95 % interval" if any(d.low is not None for d in found.values()) else ""),
        summary="; ".join(f"{row[0]} {row[1]} ({row[2]} to {row[3]})" for row in rows),
        data=data,
        layout={
            "showlegend": False,
            "xaxis": {"title": {"text": "worse  ←  points of top-1  →  better"}, "zeroline": False},
            "yaxis": {"type": "category", "range": [-0.6, len(names) - 0.4]},
            "shapes": [{"type": "line", "x0": 0, "x1": 0, "yref": "paper", "y0": 0, "y1": 1,
                        "line": {"color": "rgba(125,138,153,.9)", "width": 1.5}}],
        },
        height=110 + 46 * len(names),
        columns=("winner minus", "mean", "low", "high", "seeds"), rows=rows,
    )  # fmt: skip


def leaderboard(content: Content) -> Chart | None:
    """Test accuracy of each final configuration: every seed, the mean and its interval."""
    rows = [row for row in content.board if row.test][::-1]
    if not rows:
        return None
    data: list[dict[str, Any]] = []
    for row in rows:
        name = _board_label(row)
        mean, _, n = mean_sd(row.test)
        bounds = interval(row.test)
        data += [
            {
                "type": "scatter", "mode": "markers", "x": list(row.test), "y": [name] * n,
                "marker": {"color": color_of(row), "size": 8, "opacity": 0.4},
                "hovertemplate": "one seed: %{x:.2%}<extra></extra>",
            },
            {
                "type": "scatter", "mode": "markers", "x": [mean], "y": [name],
                "marker": {"color": color_of(row), "size": 13, "symbol": "line-ns",
                           "line": {"color": color_of(row), "width": 4}},
                "error_x": {"type": "data", "array": [bounds[1] - mean if bounds else 0],
                            "visible": bounds is not None, "color": color_of(row),
                            "thickness": 2, "width": 0},
                "hovertemplate": "mean: %{x:.2%}<extra></extra>",
            },
        ]  # fmt: skip
    return Chart(
        name="board",
        title="Test accuracy: every seed, the mean, and its 95 % interval"
        if any(interval(row.test) for row in rows) else "Test accuracy: every seed and the mean",
        summary="; ".join(f"{_board_label(r)} {mean_sd(r.test)[0]:.2%}" for r in rows[::-1]),
        data=data,
        layout={"showlegend": False, "xaxis": {"tickformat": ".1~%"},
                "yaxis": {"type": "category", "range": [-0.6, len(rows) - 0.4]}},
        height=100 + 48 * len(rows),
    )  # fmt: skip


def _board_label(row: Row) -> str:
    return esc(f"{label(row.name)} (winner)" if row.winner else label(row.name))


def _pooled(content: Content) -> list[tuple[Row, list[Predictions]]]:
    """Rows with the predictions of all of their seeds, the winner last: drawn on top."""
    rows = [row for row in content.board if row.name in content.predictions]
    return [(row, content.predictions[row.name]) for row in rows][::-1]


def reliability(content: Content) -> Chart | None:
    """Accuracy over confidence, all seeds of a row together."""
    found = _pooled(content)
    if not found:
        return None
    data: list[dict[str, Any]] = [
        {"type": "scatter", "mode": "lines", "name": "calibrated", "x": [0, 1], "y": [0, 1],
         "line": {"color": FAINT, "dash": "dash", "width": 1.5}, "hoverinfo": "skip"}
    ]  # fmt: skip
    table = []
    for row, seeds in found:
        confidence = np.concatenate([p.confidence.numpy() for p in seeds])
        correct = np.concatenate([(p.predicted == p.labels).numpy() for p in seeds])
        count, mean, accuracy = reliability_bins(confidence, correct)
        used = count > 0
        table += [
            [label(row.name), f"{m:.3f}", f"{a:.3f}", int(n)]
            for m, a, n in zip(mean[used], accuracy[used], count[used], strict=True)
        ]
        used = count >= min(LEAST_IN_BIN, count.max())
        share = np.sqrt(count[used] / count.max())
        data.append(
            {
                "type": "scatter", "mode": "lines+markers", "name": _board_label(row),
                "x": mean[used].tolist(), "y": accuracy[used].tolist(),
                "line": {"color": color_of(row), "width": 2.5 if row.winner else 1.5},
                "marker": {"color": color_of(row), "size": (4 + 9 * share).tolist()},
                "text": [f"{n:,} predictions" for n in count[used]],
                "hovertemplate": "confidence %{x:.2f}, accuracy %{y:.2f}<br>%{text}"
                "<extra></extra>",
            }
        )  # fmt: skip
    axis = {"range": [0, 1.02], "tickformat": ".0%"}
    return Chart(
        name="reliability",
        title="Reliability: accuracy of predictions by their confidence",
        summary="Below the diagonal a model claims more than it knows. Larger dots stand for more "
        f"images; bins of fewer than {LEAST_IN_BIN} are in the table only.",
        data=data,
        layout={"xaxis": {**axis, "title": {"text": "confidence"}},
                "yaxis": {**axis, "title": {"text": "accuracy"}}},
        height=430, columns=("configuration", "confidence", "accuracy", "predictions"),
        rows=table,
    )  # fmt: skip


def risk_coverage(content: Content) -> Chart | None:
    """Error among the most certain images, over their share."""
    found = _pooled(content)
    if not found:
        return None
    data, table = [], []
    for row, seeds in found:
        curves = [risk_over_coverage(p) for p in seeds]
        coverage = np.linspace(0.01, 1, 100)
        risk = np.mean([np.interp(coverage, *curve) for curve in curves], axis=0)
        table += [
            [label(row.name), f"{coverage[i]:.0%}", f"{risk[i]:.3f}"] for i in range(9, 100, 10)
        ]
        data.append(
            {
                "type": "scatter", "mode": "lines", "name": _board_label(row),
                "x": coverage.tolist(), "y": risk.tolist(),
                "line": {"color": color_of(row), "width": 3 if row.winner else 1.6},
                "hovertemplate": "the most certain %{x:.0%}: %{y:.1%} wrong<extra></extra>",
            }
        )  # fmt: skip
    return Chart(
        name="risk",
        title="Uncertainty against error: what is wrong among the most certain images",
        summary="A useful uncertainty makes the curve rise from left to right.",
        data=data,
        layout={"xaxis": {"title": {"text": "share of images kept, most certain first"},
                          "tickformat": ".0%", "range": [0, 1.01]},
                "yaxis": {"title": {"text": "error"}, "tickformat": ".0%",
                          "rangemode": "tozero"}},
        height=430, columns=("configuration", "images kept", "error"), rows=table,
    )  # fmt: skip


def risk_over_coverage(predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """(coverage, error rate among the k most certain) for k = 1 to N, [N] each."""
    order = torch.argsort(predictions.uncertainty, stable=True)
    wrong = (predictions.predicted != predictions.labels)[order].double().cumsum(dim=0)
    k = torch.arange(1, len(order) + 1)
    return (k / len(order)).numpy(), (wrong / k).numpy()
