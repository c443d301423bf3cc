"""Charts of how close students came to their teacher: correlations of logits, t-SNE.

They are the figures of mdistiller's visualisation notebooks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ekd_ray.engine.measure.predictions import Predictions
from ekd_ray.results.leaderboard import Row
from ekd_ray.results.report.content import Content
from ekd_ray.results.report.parts import (
    CLASS_COLORS,
    SEQUENTIAL,
    Chart,
    esc,
    label,
    thinned,
)

MOST_CLASSES, MOST_EMBEDDED, NAMED_CLASSES = 100, 500, 20
TSNE_STEPS = 600


def correlation_gap(student: torch.Tensor, teacher: torch.Tensor) -> np.ndarray:
    """|corr(student) - corr(teacher)| between the logits of classes, [C, C] in [0, 2].

    Args:
        student, teacher: logits [M, C] of the same images.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        gap = np.abs(_correlations(student) - _correlations(teacher))
    return np.nan_to_num(gap)


def _correlations(logits: torch.Tensor) -> np.ndarray:
    return np.corrcoef(logits.double().numpy(), rowvar=False)


def correlation_gaps(content: Content) -> dict[str, tuple[Row, np.ndarray]]:
    """By row, its first seed's gap to the teacher on the images whose logits were kept."""
    teacher, kept = _teacher(content)
    if teacher is None or len(teacher) < 3:
        return {}
    found = {}
    for row in content.board:
        for p in content.predictions.get(row.name, [])[:1]:
            if torch.equal(p.kept, kept):
                found[row.name] = (row, correlation_gap(p.logits, teacher))
    return found


def _teacher(content: Content) -> tuple[torch.Tensor | None, torch.Tensor]:
    for row in content.board:
        for p in content.predictions.get(row.name, [])[:1]:
            if p.teacher_logits is not None:
                return p.teacher_logits, p.kept
    return None, torch.empty(0)


def correlation_maps(content: Content) -> list[Chart]:
    """A heat map for each row, all on one scale."""
    gaps = correlation_gaps(content)
    if not gaps:
        return []
    names = next(iter(content.predictions.values()))[0].class_names
    shown = thinned(range(len(names)), MOST_CLASSES)
    top = max(float(np.quantile(gap, 0.99)) for _, gap in gaps.values()) or 1.0
    ticks = [esc(names[i]) for i in shown]
    quiet = {"showgrid": False, "zeroline": False, "showticklabels": len(shown) <= NAMED_CLASSES,
             "tickfont": {"size": 10}, "type": "category"}  # fmt: skip
    return [
        Chart(
            name=f"correlation-{index}",
            title=f"{'winner' if row.winner else label(row.name)}: {gap.mean():.3f} in the mean",
            summary="Difference between the correlations of class logits in student and teacher.",
            data=[
                {
                    "type": "heatmap", "z": np.round(gap[np.ix_(shown, shown)], 3).tolist(),
                    "x": ticks, "y": ticks, "zmin": 0, "zmax": top, "colorscale": SEQUENTIAL,
                    "colorbar": {"thickness": 8, "outlinewidth": 0},
                    "hovertemplate": "%{y}, %{x}: %{z}<extra></extra>",
                }
            ],
            layout={"showlegend": False, "xaxis": {**quiet, "tickangle": -60},
                    "yaxis": {**quiet, "autorange": "reversed"}},
            height=330,
        )
        for index, (row, gap) in enumerate(gaps.values())
    ]  # fmt: skip


def embeddings(content: Content) -> list[Chart]:
    """t-SNE of the winner's logits and of its teacher's, on the same images."""
    found = content.predictions.get(content.winner.name, []) if content.winner else []
    if not found or len(found[0].kept) < 12:
        return []
    first = found[0]
    index = torch.tensor(thinned(range(len(first.kept)), MOST_EMBEDDED))
    classes = thinned(range(len(first.class_names)), NAMED_CLASSES)
    labels = first.labels[first.kept][index]
    chosen = torch.isin(labels, torch.tensor(classes))
    if int(chosen.sum()) < 12:
        return []
    sides = [("the winner's logits", first.logits)]
    if first.teacher_logits is not None:
        sides.append(("its teacher's logits", first.teacher_logits))
    return [
        _embedding(
            f"tsne-{n}", title, logits[index][chosen], labels[chosen].numpy(), first, classes
        )
        for n, (title, logits) in enumerate(sides)
    ]


def _embedding(
    name: str, title: str, logits: torch.Tensor, labels: np.ndarray, of: Predictions,
    classes: Sequence[int],
) -> Chart:  # fmt: skip
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(30.0, (len(labels) - 1) / 3)
    machine = TSNE(perplexity=perplexity, init="pca", random_state=0, max_iter=TSNE_STEPS)
    # One thread: others would spin, waiting for each other, wherever a trial has the cores.
    with threadpool_limits(limits=1):
        places = machine.fit_transform(logits.float().numpy())
    hidden = {"showticklabels": False, "showgrid": False, "zeroline": False}
    return Chart(
        name=name, title=f"t-SNE of {title}",
        summary=f"{len(labels)} test images of {len(classes)} classes, seeded.",
        data=[
            {
                "type": "scatter", "mode": "markers", "name": esc(of.class_names[c]),
                "x": np.round(places[labels == c, 0], 2).tolist(),
                "y": np.round(places[labels == c, 1], 2).tolist(),
                "marker": {"size": 5, "color": CLASS_COLORS[i % len(CLASS_COLORS)],
                           "symbol": "circle" if i < len(CLASS_COLORS) else "diamond"},
                "hovertemplate": esc(of.class_names[c]) + "<extra></extra>",
            }
            for i, c in enumerate(classes) if (labels == c).any()
        ],
        layout={"xaxis": hidden, "yaxis": {**hidden, "scaleanchor": "x"},
                "legend": {"orientation": "h", "y": -0.02, "yanchor": "top", "x": 0,
                           "font": {"size": 11}},
                "margin": {"l": 8, "r": 8, "t": 10, "b": 8}},
        height=max(430, 340 + 10 * len(classes)),  # the legend lies below
    )  # fmt: skip
