"""The figures of the report: plots of Optuna where it has them, own ones where not."""

from __future__ import annotations

import html
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch

from ekd_ray.config.phrases import joined, several
from ekd_ray.config.targets import (
    DIRECTIONS,
    as_loss,
    evenly_spaced,
    pareto_front,
    total_violation,
)
from ekd_ray.engine.measure.predictions import Predictions
from ekd_ray.engine.measure.shift import METRICS
from ekd_ray.engine.pictures import confusion, reliability_bins
from ekd_ray.results.importance import LEAST_TRIALS, describe_error, judged_trials, thin_out
from ekd_ray.results.leaderboard import Row, mean_sd
from ekd_ray.results.model_figures import StudyModel, value_at
from ekd_ray.results.optuna_study import build_study, coordinate, draw_plot
from ekd_ray.results.paired import Paired, share_interval
from ekd_ray.results.records import RunRecord, milestone_epochs
from ekd_ray.results.report.content import (
    Content,
    count_confusions,
    measure_correlation_gaps,
    row_label,
    select_compared_trials,
)
from ekd_ray.results.report.measures import (
    embed,
    risk_over_coverage,
    wilson_interval,
)
from ekd_ray.results.row_names import label
from ekd_ray.results.words import (
    DASH,
    duration,
    figure_text,
    is_share,
    metric_name,
    percent,
    points,
    value_text,
)

# One colour per role on the whole page, readable on white and on near-black.
WINNER, KD, ALONE = "#2f6bde", "#d9820f", "#7d8a99"
AUTHORS, DEFAULTS, BROUGHT = "#8a63c9", "#2a9d6f", "#d46aa7"
NAME_COLORS = {"kd": KD, "authors' values": AUTHORS, "defaults": DEFAULTS, "none": ALONE}
FINALIST, FAILED = "#86a9ea", "#c8452d"
FAINT, LINE = "rgba(125,138,153,.38)", "rgba(125,138,153,.8)"
SEQUENTIAL = [[0, "#e8eefa"], [0.35, "#a9c3f2"], [0.7, "#4a7fe0"], [1, "#153a86"]]
# Twenty classes can be told apart, ten hues in two shapes each.
CLASS_COLORS = (
    "#2f6bde", "#d9820f", "#2a9d6f", "#c8452d", "#8a63c9",
    "#8f6b4f", "#d46aa7", "#7d8a99", "#a3a51f", "#29a9bd",
)  # fmt: skip
STATUS = {
    "complete": ("full length", FINALIST),
    "pruned": ("stopped early", FAINT),
    "failed": ("failed", FAILED),
    "running": ("running", KD),
}
MOST_CURVES, MOST_EPOCHS, MOST_POINTS, MOST_ROWS = 300, 120, 500, 200
MOST_LINES, MOST_DOTS = 300, 250
GRID = 40  # values of a parameter that the model is asked for
MOST_CLASSES, MOST_EMBEDDED, NAMED_CLASSES = 100, 500, 20
MOST_PAIRS, MOST_BARS = 30, 40
LEAST_IN_BIN = 10  # a bin of fewer predictions is noise to the eye; the table has it


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


def draw_figures(content: Content) -> dict[str, list[Chart]]:
    """The figures by the section that they stand in; sections without any are left out."""
    drawers: dict[str, list[Callable[[Content], Iterator[Chart]]]] = {
        "certainty": [draw_differences],
        "leaderboard": [draw_leaderboard],
        "curves-section": [draw_learning_curves],
        "parameters": [draw_importance, draw_parallel, draw_contour, draw_slices],
        "trade-off": [draw_trade_off],
        "errors": [draw_confusion, draw_class_accuracy],
        "calibration": [draw_reliability, draw_risk_coverage, draw_shift],
        "teacher": [draw_inherited, draw_correlation_maps, draw_embeddings],
        "time-section": [draw_time],
    }
    drawn = {
        section: [chart for draw in functions for chart in draw(content)]
        for section, functions in drawers.items()
    }
    return {section: charts for section, charts in drawn.items() if charts}


def _axis(name: str, **more: Any) -> dict[str, Any]:
    """A plotly axis of a metric."""
    shown = {"tickformat": ".1~%"} if is_share(name) else {}
    return {"title": {"text": metric_name(name)}, **shown, **more}


def _whole_ticks(reach: float) -> dict[str, Any]:
    """Ticks of an axis at whole numbers only, about ten over `reach`."""
    steps = (factor * 10**power for power in itertools.count() for factor in (1, 2, 5))
    return {"tick0": 0, "dtick": next(step for step in steps if reach <= 10 * step)}


def _color_of(row: Row) -> str:
    other = BROUGHT if row.entered_as == "champion" else FINALIST
    return WINNER if row.winner else NAME_COLORS.get(row.name, other)


# The final models


def draw_differences(content: Content) -> Iterator[Chart]:
    """The winner on validation, by which it was chosen, and on the test split."""
    metric = content.config.metric
    if found := content.validation_differences:
        yield _draw_paired(found, metric, "validation-differences", "Winner minus champion")
    if found := content.differences:
        yield _draw_paired(
            found, "test_top1", "differences", "Winner minus champions and baselines"
        )


def _draw_paired(found: Mapping[str, Paired], metric: str, name: str, subject: str) -> Chart:
    """Mean differences of a metric with their intervals, against zero."""
    scale, unit = (100, "points of ") if is_share(metric) else (1, "")
    sides = ["worse", "better"] if DIRECTIONS.get(metric, "max") == "max" else ["better", "worse"]

    def text(value: float | None) -> str:
        if value is None:
            return DASH
        return points(value) if is_share(metric) else f"{value:+.4f}"

    figure = go.Figure(
        [
            go.Scatter(
                x=[scale * paired.mean], y=[label(other)], mode="markers",
                marker={"size": 11, "color": NAME_COLORS.get(other, BROUGHT)},
                error_x={"array": [0 if paired.high is None else
                                   scale * (paired.high - paired.mean)],
                         "thickness": 2, "width": 6, "visible": paired.high is not None},
                hovertemplate=f"%{{y}}: %{{x:+.4~f}} {unit}<extra></extra>",
            )
            for other, paired in reversed([*found.items()])
        ],
        {
            "showlegend": False,
            "xaxis": {"zeroline": False, "title": {
                "text": f"{sides[0]}  ←  {unit}{metric_name(metric)}  →  {sides[1]}"}},
            "yaxis": {"type": "category", "range": [-0.6, len(found) - 0.4]},
        },
    )  # fmt: skip
    figure.add_vline(0, line={"color": LINE, "width": 1.5})
    rows = [[label(other), *map(text, (d.mean, d.low, d.high)), d.n] for other, d in found.items()]
    bounded = any(d.low is not None for d in found.values())
    return Chart(
        name=name,
        title=f"{subject}: {metric_name(metric)}" + (", with 95 % interval" if bounded else ""),
        summary="; ".join(f"{row[0]} {row[1]} ({row[2]} to {row[3]})" for row in rows),
        figure=figure, height=110 + 46 * len(found),
        columns=("winner minus", "mean", "low", "high", "seeds"), rows=rows,
    )  # fmt: skip


def draw_leaderboard(content: Content) -> Iterator[Chart]:
    """Test accuracy of each final configuration: every seed, the mean and its interval."""
    rows = [row for row in content.board if row.test]
    if not rows:
        return
    intervals = {row.name: share_interval(row.test) for row in rows}
    figure = go.Figure(
        layout={"showlegend": False, "xaxis": {"tickformat": ".1~%"},
                "yaxis": {"type": "category", "range": [-0.6, len(rows) - 0.4]}}
    )  # fmt: skip
    for row in reversed(rows):
        name, color, (mean, _, n) = row_label(row), _color_of(row), mean_sd(row.test)
        bounds = intervals[row.name]
        figure.add_scatter(
            x=row.test, y=[name] * n, mode="markers",
            marker={"color": color, "size": 8, "opacity": 0.4},
            hovertemplate="one seed: %{x:.2%}<extra></extra>",
        )  # fmt: skip
        figure.add_scatter(
            x=[mean], y=[name], mode="markers",
            marker={"color": color, "size": 13, "symbol": "line-ns",
                    "line": {"color": color, "width": 4}},
            error_x={"array": [bounds[1] - mean if bounds else 0],
                     "arrayminus": [mean - bounds[0] if bounds else 0],
                     "symmetric": False, "visible": bounds is not None,
                     "color": color, "thickness": 2, "width": 0},
            hovertemplate="mean: %{x:.2%}<extra></extra>",
        )  # fmt: skip
    yield Chart(
        name="board",
        title="Test accuracy: every seed, the mean, and its 95 % interval"
        if any(intervals.values()) else "Test accuracy: every seed and the mean",
        summary="; ".join(f"{row_label(r)} {mean_sd(r.test)[0]:.2%}" for r in rows),
        figure=figure, height=100 + 48 * len(rows),
    )  # fmt: skip


def _predicted_rows(content: Content) -> list[tuple[Row, list[Predictions]]]:
    """Rows with the predictions of all of their seeds, the winner last: drawn on top."""
    rows = [row for row in content.board if row.name in content.predictions]
    return [(row, content.predictions[row.name]) for row in reversed(rows)]


def draw_reliability(content: Content) -> Iterator[Chart]:
    """Accuracy over confidence, all seeds of a row together."""
    found = _predicted_rows(content)
    if not found:
        return
    shown = {"range": [0, 1.02], "tickformat": ".0%"}
    figure = go.Figure(
        layout={"xaxis": {**shown, "title": {"text": "confidence"}},
                "yaxis": {**shown, "title": {"text": "accuracy"}}}
    )  # fmt: skip
    figure.add_scatter(
        x=[0, 1], y=[0, 1], mode="lines", name="calibrated", hoverinfo="skip",
        line={"color": FAINT, "dash": "dash", "width": 1.5},
    )  # fmt: skip
    table = []
    for row, seeds in found:
        confidence = np.concatenate([p.confidence.numpy() for p in seeds])
        correct = np.concatenate([(p.predicted == p.labels).numpy() for p in seeds])
        count, mean, accuracy = reliability_bins(confidence, correct)
        table += [
            [label(row.name), f"{m:.3f}", f"{a:.3f}", int(n)]
            for m, a, n in zip(mean, accuracy, count, strict=True) if n
        ]  # fmt: skip
        used = count >= min(LEAST_IN_BIN, count.max())
        figure.add_scatter(
            x=mean[used].tolist(), y=accuracy[used].tolist(), mode="lines+markers",
            name=row_label(row), text=[f"{n:,} predictions" for n in count[used]],
            line={"color": _color_of(row), "width": 2.5 if row.winner else 1.5},
            marker={"size": (4 + 9 * np.sqrt(count[used] / count.max())).tolist()},
            hovertemplate="confidence %{x:.2f}, accuracy %{y:.2f}<br>%{text}<extra></extra>",
        )  # fmt: skip
    yield Chart(
        name="reliability",
        title="Reliability: accuracy by confidence",
        summary="Below the diagonal a model claims more than it knows. Larger dots stand for more "
        f"images; bins of fewer than {LEAST_IN_BIN} are in the table only.",
        figure=figure, columns=("configuration", "confidence", "accuracy", "predictions"),
        rows=table, small=True,
    )  # fmt: skip


def draw_risk_coverage(content: Content) -> Iterator[Chart]:
    """Error among the most certain images, over their share; the mean over the seeds."""
    found = _predicted_rows(content)
    if not found:
        return
    kept = {"title": {"text": "share of images kept, most certain first"}, "range": [0, 1.01]}
    error = {"title": {"text": "error"}, "rangemode": "tozero"}
    shown = {"tickformat": ".0%"}
    figure = go.Figure(layout={"xaxis": {**kept, **shown}, "yaxis": {**error, **shown}})
    table = []
    coverage = np.linspace(0.01, 1, 100)
    for row, seeds in found:
        risk = np.mean([np.interp(coverage, *risk_over_coverage(p)) for p in seeds], axis=0)
        table += [
            [label(row.name), f"{coverage[i]:.0%}", f"{risk[i]:.3f}"] for i in range(9, 100, 10)
        ]
        figure.add_scatter(
            x=coverage.tolist(), y=risk.tolist(), mode="lines", name=row_label(row),
            line={"color": _color_of(row), "width": 3 if row.winner else 1.6},
            hovertemplate="the most certain %{x:.0%}: %{y:.1%} wrong<extra></extra>",
        )  # fmt: skip
    yield Chart(
        name="risk",
        title="Risk over coverage: error among the most certain",
        summary="A useful uncertainty makes the curve rise from left to right.",
        figure=figure, columns=("configuration", "images kept", "error"), rows=table,
        small=True,
    )  # fmt: skip


def draw_shift(content: Content) -> Iterator[Chart]:
    """Accuracy, calibration and risk by the severity of corruptions, where they were measured."""
    found = content.shift
    if found is None:
        return
    shown = {"range": [0, 1.02], "tickformat": ".0%"}
    figure = go.Figure(
        layout={"xaxis": {"title": {"text": "severity (0: clean)"}, "dtick": 1},
                "yaxis": {**shown, "title": {"text": "mean over the corruptions"}}}
    )  # fmt: skip
    names = {"top1": "accuracy", "ece": "calibration error (ECE)", "aurc": "area under risk (AURC)"}
    by_severity = {metric: found.by_severity(metric) for metric in METRICS}
    for (metric, name), dash in zip(names.items(), ("solid", "dash", "dot"), strict=True):
        figure.add_scatter(
            x=[*range(6)], y=by_severity[metric], mode="lines+markers", name=name,
            line={"color": WINNER, "dash": dash, "width": 2},
            hovertemplate=f"severity %{{x}}: {name} %{{y:.3f}}<extra></extra>",
        )  # fmt: skip
    errors = sorted(found.corruption_errors.items(), key=lambda entry: -entry[1])
    worst = ", ".join(f"{name.replace('_', ' ')} ({error:.0%})" for name, error in errors[:3])
    made = (
        "the published files" if found.seed is None else f"pictures made here (seed {found.seed})"
    )
    yield Chart(
        name="shift",
        title="Under corruptions: accuracy and calibration by severity",
        summary=f"The exported weights on {found.images:,} test images and on {len(errors)} "
        f"corruptions of them, {made}. Mean corruption error {found.mean_corruption_error:.1%} (a "
        f"plain mean, against no baseline); the worst are {worst}. A calibrated model is less "
        "confident where it is less often right: its calibration error stays low.",
        figure=figure, columns=("severity", "accuracy", "NLL", "ECE", "AURC"),
        rows=[
            [at, *(f"{by_severity[metric][at]:.3f}" for metric in METRICS)] for at in range(6)
        ],
        small=True,
    )  # fmt: skip


def draw_confusion(content: Content) -> Iterator[Chart]:
    """Labels against predictions of the exported weights: images, coloured by the share of each
    label."""
    if content.exported is None:
        return
    found = content.exported[0]
    counts = confusion(found)
    names, shown = found.class_names, np.arange(len(counts))
    if len(counts) > MOST_CLASSES:
        errors = counts.sum(axis=0) + counts.sum(axis=1) - 2 * counts.diagonal()
        shown = np.sort(np.argsort(-errors, kind="stable")[:MOST_CLASSES])
    rates = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    part = np.ix_(shown, shown)
    ticks = [names[i] for i in shown]
    few = len(shown) <= NAMED_CLASSES
    named = {"showticklabels": few, "type": "category", "showgrid": False,
             "zeroline": False}  # fmt: skip
    figure = go.Figure(
        go.Heatmap(
            z=np.round(rates[part], 4).tolist(), customdata=counts[part].tolist(), x=ticks,
            y=ticks, zmin=0, zmax=1, colorscale=SEQUENTIAL,
            colorbar={"thickness": 10, "outlinewidth": 0, "tickformat": ".0%"},
            text=[[str(n) if n else "" for n in line] for line in counts[part]] if few else None,
            texttemplate="%{text}" if few else None,
            hovertemplate="%{y}, taken for %{x}: %{customdata} images, %{z:.1%}<extra></extra>",
        ),
        {"showlegend": False,
         "xaxis": {**named, "title": {"text": "prediction"}},
         "yaxis": {**named, "title": {"text": "label"}, "autorange": "reversed"}},
    )  # fmt: skip
    some = f"the {len(shown)} classes with most errors of {len(names)}, " * (
        len(shown) < len(names)
    )
    pairs = count_confusions(found)[:MOST_PAIRS]
    yield Chart(
        name="confusion",
        title=f"Confusion matrix of the exported weights: {some}images of each label",
        summary="; ".join(f"{names[i]} taken for {names[j]} {n} times" for n, i, j in pairs[:3]),
        figure=figure, height=520,
        columns=("label", "taken for", "images", "share of the label"),
        rows=[[names[i], names[j], n, f"{rates[i, j]:.1%}"] for n, i, j in pairs],
    )  # fmt: skip


def draw_class_accuracy(content: Content) -> Iterator[Chart]:
    """The accuracy of the exported weights on each class, with Wilson's intervals, lowest first."""
    if content.exported is None:
        return
    found = content.exported[0]
    counts = confusion(found)
    right, total = counts.diagonal(), counts.sum(axis=1)
    low, high = wilson_interval(right, total)
    share = right / np.maximum(total, 1)
    order = [int(i) for i in np.argsort(share, kind="stable") if total[i]]
    shown = order[:MOST_BARS][::-1]
    names = found.class_names
    figure = go.Figure(
        go.Scatter(
            x=share[shown].tolist(), y=[names[i] for i in shown], mode="markers",
            marker={"size": 8, "color": WINNER}, customdata=total[shown].tolist(),
            error_x={"type": "data", "symmetric": False, "array": (high - share)[shown].tolist(),
                     "arrayminus": (share - low)[shown].tolist(), "thickness": 1.5, "width": 3},
            hovertemplate="%{y}: %{x:.1%} of %{customdata} images<extra></extra>",
        ),
        {"showlegend": False, "xaxis": {"range": [-0.01, 1.01], "tickformat": ".0%"},
         "yaxis": {"type": "category", "range": [-0.6, len(shown) - 0.4],
                   "tickmode": "linear", "dtick": 1}},
    )  # fmt: skip
    some = f", the {len(shown)} lowest of {len(order)}" if len(shown) < len(order) else ""
    yield Chart(
        name="classes",
        title=f"Accuracy by class{some}, with 95 % interval",
        summary="; ".join(f"{names[i]} {share[i]:.1%}" for i in order[:3]) + " are the lowest.",
        figure=figure, height=100 + 20 * len(shown),
        columns=("class", "images", "accuracy", "low", "high"),
        rows=[[names[i], int(total[i]), *(f"{v[i]:.1%}" for v in (share, low, high))]
              for i in order[:MOST_ROWS]],
    )  # fmt: skip


def draw_correlation_maps(content: Content) -> Iterator[Chart]:
    """A heat map for each row, all on one scale."""
    gaps = measure_correlation_gaps(content)
    if not gaps:
        return
    names = next(iter(content.predictions.values()))[0].class_names
    shown = evenly_spaced(range(len(names)), MOST_CLASSES)
    top = max(float(np.quantile(gap, 0.99)) for _, gap in gaps.values()) or 1.0
    ticks = [names[i] for i in shown]
    quiet = {"showgrid": False, "zeroline": False, "showticklabels": len(shown) <= NAMED_CLASSES,
             "tickfont": {"size": 10}, "type": "category"}  # fmt: skip
    for index, (row, gap) in enumerate(gaps.values()):
        figure = go.Figure(
            go.Heatmap(
                z=np.round(gap[np.ix_(shown, shown)], 3).tolist(), x=ticks, y=ticks, zmin=0,
                zmax=top, colorscale=SEQUENTIAL, colorbar={"thickness": 8, "outlinewidth": 0},
                hovertemplate="%{y}, %{x}: %{z}<extra></extra>",
            ),
            {"xaxis": {**quiet, "tickangle": -60}, "yaxis": {**quiet, "autorange": "reversed"},
             "showlegend": False},
        )  # fmt: skip
        yield Chart(
            name=f"correlation-{index}",
            title=f"{'winner' if row.winner else label(row.name)}: {gap.mean():.3f} in the mean",
            summary="Difference between the correlations of class logits in student and teacher.",
            figure=figure, height=330, small=True,
        )  # fmt: skip


def draw_inherited(content: Content) -> Iterator[Chart]:
    """The student's vacuity over the teacher's, image by image, for each set of images."""
    found = content.inherited
    if found is None:
        return
    figure = go.Figure(
        layout={"xaxis": {"title": {"text": "teacher: -log total evidence"}},
                "yaxis": {"title": {"text": "student: -log total evidence"}}}
    )  # fmt: skip
    kinds = sorted(found.points, key=lambda of: (of != "test", of))
    for name, color in zip(kinds, itertools.cycle(CLASS_COLORS), strict=False):
        teacher, student = zip(*found.points[name], strict=True)
        figure.add_scatter(
            x=teacher, y=student, mode="markers", name=name,
            marker={"color": color, "size": 5, "opacity": 0.55},
            hovertemplate="teacher %{x:.2f}, student %{y:.2f}<extra></extra>",
        )  # fmt: skip
    names = ("vacuity_corr", "entropy_corr", "teacher_kl")
    cells = {
        of: [f"{values[name]:.3f}" if name in values else DASH for name in names]
        for of in kinds
        for values in (found.figures[of],)
    }
    told = "; ".join(f"{of}: rank correlation {texts[0]}" for of, texts in cells.items())
    yield Chart(
        name="inherited",
        title="What the student inherits: its uncertainty over the teacher's",
        summary=f"Each dot is an image; higher and further right is less certain. {told}.",
        figure=figure,
        columns=("images", "rank correlation of vacuity", "of entropy", "KL to the teacher (nats)"),
        rows=[[of, *texts] for of, texts in cells.items()], small=True,
    )  # fmt: skip


def draw_embeddings(content: Content) -> Iterator[Chart]:
    """t-SNE of the winner's logits and of its teacher's, on the same images."""
    found = content.predictions.get(content.winner.name, []) if content.winner else []
    if not found:
        return
    first = found[0]
    index = torch.tensor(evenly_spaced(range(len(first.kept)), MOST_EMBEDDED))
    classes = evenly_spaced(range(len(first.class_names)), NAMED_CLASSES)
    index = index[torch.isin(first.labels[first.kept][index], torch.tensor(classes))]
    if len(index) < 12:
        return
    labels = first.labels[first.kept][index].numpy()
    hidden = {"showticklabels": False, "showgrid": False, "zeroline": False}
    sides = {"the winner's logits": first.logits, "its teacher's logits": first.teacher_logits}
    for number, (title, logits) in enumerate(sides.items()):
        if logits is None:
            continue
        places = np.round(embed(logits[index]), 2)
        figure = go.Figure(
            layout={"xaxis": hidden, "yaxis": {**hidden, "scaleanchor": "x"},
                    "legend": {"orientation": "h", "y": -0.02, "yanchor": "top", "x": 0,
                               "font": {"size": 11}},
                    "margin": {"l": 8, "r": 8, "t": 10, "b": 8}}
        )  # fmt: skip
        for i, c in enumerate(classes):
            x, y = places[labels == c].T.tolist()
            figure.add_scatter(
                x=x, y=y, mode="markers", name=first.class_names[c], showlegend=bool(x),
                marker={"size": 5, "color": CLASS_COLORS[i % len(CLASS_COLORS)],
                        "symbol": "circle" if i < len(CLASS_COLORS) else "diamond"},
                hovertemplate="%{fullData.name}<extra></extra>",
            )  # fmt: skip
        yield Chart(
            name=f"tsne-{number}", title=f"t-SNE of {title}", figure=figure, small=True,
            summary=f"{len(labels)} test images of {len(classes)} classes, seeded.",
            height=max(430, 340 + 10 * len(classes)),  # the legend lies below
        )  # fmt: skip


# The search


def draw_history(content: Content) -> Iterator[Chart]:
    """The metric of every trial by number, and the best of full length so far; not in the report,
    where the learning curves say more."""
    metric = content.config.metric
    found = [(r, v) for r in content.ended if (v := r.value(metric)) is not None]
    if not found:
        return
    figure = go.Figure(
        layout={"xaxis": {"title": {"text": "trial"}, "rangemode": "tozero"},
                "yaxis": _axis(metric)}
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
                          **_whole_ticks(max(len(record.history) for record in trials))},
                "yaxis": _axis(metric)}
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
                text=f" {reached} {'to' if index else 'came to epoch'} {epoch}",
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
    """What the model expects over the two most important numbers, the others as in the best
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
                    "yaxis": _axis(metric, title=None)}
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
    """What the model expects of a trial with other values of a parameter, with the interval."""
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
        ticks = _whole_ticks(2 * (high - low)) if whole else {"nticks": 6}
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
    figure = go.Figure(layout={"xaxis": {**_axis(cost), **wide}, "yaxis": _axis(config.metric)})
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
