"""Measures that the report draws: of the final models' stored predictions, and of the search."""

from __future__ import annotations

import numpy as np
import torch

from ekd_ray.engine.measure.predictions import Predictions

TSNE_STEPS = 600


def risk_over_coverage(predictions: Predictions) -> tuple[np.ndarray, np.ndarray]:
    """(coverage, error rate among the k most certain) for k = 1 to N, [N] each."""
    order = torch.argsort(predictions.uncertainty, stable=True)
    wrong = (predictions.predicted != predictions.labels)[order].double().cumsum(dim=0)
    k = torch.arange(1, len(order) + 1)
    return (k / len(order)).numpy(), (wrong / k).numpy()


def wilson_interval(
    right: np.ndarray, count: np.ndarray, *, deviations: float = 1.959964
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds (low, high) of shares right / count, at 95 %; 0 and 1 where nothing was counted.

    Wilson's score interval (1927), which stays in [0, 1] and holds for few images too.
    """
    n = np.maximum(count, 1).astype(float)
    share, spare = right / n, deviations**2 / n
    middle = (share + spare / 2) / (1 + spare)
    half = deviations * np.sqrt(share * (1 - share) / n + spare / (4 * n)) / (1 + spare)
    known = count > 0
    low, high = np.maximum(middle - half, 0.0), np.minimum(middle + half, 1.0)  # but for rounding
    return np.where(known, low, 0.0), np.where(known, high, 1.0)


def correlation_gap(student: torch.Tensor, teacher: torch.Tensor) -> np.ndarray:
    """|corr(student) - corr(teacher)| between the logits of classes, [C, C] in [0, 2].

    It is the figure of mdistiller's visualisation notebooks. A class whose logit is constant has
    no correlation and counts as 0.

    Args:
        student, teacher: logits [M, C] of the same images.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        ours, theirs = (
            np.corrcoef(logits.double().numpy(), rowvar=False) for logits in (student, teacher)
        )
    return np.nan_to_num(np.abs(ours - theirs))


def embed(logits: torch.Tensor) -> np.ndarray:
    """t-SNE (van der Maaten and Hinton, 2008) of logits [M, C] in the plane: [M, 2], seeded."""
    from sklearn.manifold import TSNE  # slow to import, and only a finished study needs it
    from threadpoolctl import threadpool_limits

    perplexity = min(30.0, (len(logits) - 1) / 3)
    embedding = TSNE(perplexity=perplexity, init="pca", random_state=0, max_iter=TSNE_STEPS)
    # One thread: others would spin, waiting for each other, wherever a trial has the cores.
    with threadpool_limits(limits=1):
        return embedding.fit_transform(logits.float().numpy())
