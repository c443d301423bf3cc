"""Figures of the winner beside the other rows of the leaderboard."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import numpy as np
import plotly.graph_objects as go
import torch

from ekd_ray.config.targets import evenly_spaced, largest_is_best
from ekd_ray.engine.measure.predictions import Predictions
from ekd_ray.engine.measure.shift import METRICS
from ekd_ray.engine.pictures import confusion, reliability_bins
from ekd_ray.results.leaderboard import Row, mean_sd
from ekd_ray.results.paired import Paired, share_interval
from ekd_ray.results.report.chart import (
    BROUGHT,
    FAINT,
    INK,
    LINE,
    MOST_ROWS,
    NAME_COLORS,
    PALE,
    SEQUENTIAL,
    WINNER,
    Chart,
    color_of,
)
from ekd_ray.results.report.content import (
    Content,
    count_confusions,
    measure_correlation_gaps,
    row_label,
)
from ekd_ray.results.report.measures import embed, risk_over_coverage, wilson_interval
from ekd_ray.results.row_names import label
from ekd_ray.results.words import DASH, is_share, metric_name, points

# Twenty classes can be told apart, ten hues in two shapes each.
CLASS_COLORS = (
    "#2f6bde", "#d9820f", "#2a9d6f", "#c8452d", "#8a63c9",
    "#8f6b4f", "#d46aa7", "#7d8a99", "#a3a51f", "#29a9bd",
)  # fmt: skip
MOST_CLASSES, MOST_EMBEDDED, NAMED_CLASSES = 100, 500, 20
MOST_PAIRS, MOST_BARS = 30, 40
LEAST_IN_BIN = 10  # a bin of fewer predictions is noise to the eye; the table has it


def draw_differences(content: Content) -> Iterator[Chart]:
    """The winner on validation, by which it was chosen, and on the test split."""
    metric = content.config.metric
    if found := content.validation_differences:
        yield _draw_paired(found, metric, "validation-differences", "Winner minus champion")
    if found := content.differences:
        yield _draw_paired(
            found, content.board.test_metric, "differences", "Winner minus champions and baselines"
        )


def _draw_paired(found: Mapping[str, Paired], metric: str, name: str, subject: str) -> Chart:
    """Mean differences of a metric with their intervals, against zero."""
    scale, unit = (100, "points of ") if is_share(metric) else (1, "")
    sides = ["worse", "better"] if largest_is_best(metric) else ["better", "worse"]

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
        name, color, (mean, _, n) = row_label(row), color_of(row), mean_sd(row.test)
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
            line={"color": color_of(row), "width": 2.5 if row.winner else 1.5},
            marker={"size": (4 + 9 * np.sqrt(count[used] / count.max())).tolist()},
            hovertemplate="confidence %{x:.2f}, accuracy %{y:.2f}<br>%{text}<extra></extra>",
        )  # fmt: skip
    yield Chart(
        name="reliability",
        title=f"Reliability: accuracy by confidence, bins of {LEAST_IN_BIN} images and more",
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
            line={"color": color_of(row), "width": 3 if row.winner else 1.6},
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
            y=ticks, zmin=0, zmax=1, colorscale=PALE,
            colorbar={"thickness": 10, "outlinewidth": 0, "tickformat": ".0%"},
            text=counts[part].tolist() if few else None,
            texttemplate="%{text}" if few else None, textfont={"color": INK},
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
