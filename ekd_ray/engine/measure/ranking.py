"""How well an uncertainty ranks: errors after right predictions, strange images after known ones.

Of scores [N] of which more is less certain; `ekd_ray.engine.measure.uncertainty` makes them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _check_scores(**scores: Tensor) -> None:
    for name, tensor in scores.items():
        if tensor.dim() != 1 or not len(tensor):
            raise ValueError(f"{name} must be [N] with N >= 1, got {tuple(tensor.shape)}")


def _ranks(scores: Tensor) -> Tensor | None:
    """[N] int64 on the CPU: dense ranks from 0, equal for equal scores; None if any is NaN."""
    scores = scores.detach().cpu().double()
    return None if scores.isnan().any() else torch.unique(scores, return_inverse=True)[1]


def aurc(uncertainty: Tensor, wrong: Tensor) -> float:
    """Area under the risk-coverage curve: the error rate when the uncertain are left out.

    `1 / N * sum_k (errors among the k most certain) / k`. Within a group of equal uncertainties
    it is the expected value over all orders of the group, so the order given does not matter.

    Args:
        uncertainty: [N], any float dtype; infinities are legal.
        wrong: [N] bool, whether the prediction is an error.

    Returns:
        In [0, 1], less is better; the error rate if all uncertainties are equal; NaN if one of
        them is NaN.

    Raises:
        ValueError: other shapes or dtypes, or N = 0.

    Geifman and El-Yaniv, "Selective classification for deep neural networks", NeurIPS 2017.
    """
    _check_scores(uncertainty=uncertainty)
    if wrong.dtype != torch.bool or wrong.shape != uncertainty.shape:
        raise ValueError(
            f"wrong must be bool {tuple(uncertainty.shape)}, got {wrong.dtype} {tuple(wrong.shape)}"
        )
    ranks = _ranks(uncertainty)
    if ranks is None:
        return math.nan
    order = ranks.argsort()
    # A member of a group of m with w errors is wrong w / m times on average over its orders.
    size = torch.bincount(ranks).double()
    errors = torch.bincount(ranks, weights=wrong.cpu().double())
    expected = (errors / size)[ranks[order]].cumsum(dim=0)
    return float((expected / torch.arange(1, len(ranks) + 1)).mean())


def auroc(certain: Tensor, uncertain: Tensor) -> float:
    """Probability that an image that should be uncertain is so, more than one that should not.

    Equal scores count half. The images that should be are errors, or come from outside of the
    data set.

    Args:
        certain: [N], any float dtype; infinities are legal.
        uncertain: [M].

    Returns:
        Area under the ROC curve in [0, 1], 0.5 is chance; NaN if a score is NaN.

    Raises:
        ValueError: either is not one-dimensional or is empty.

    Hendrycks and Gimpel, ICLR 2017.
    """
    _check_scores(certain=certain, uncertain=uncertain)
    ranks = _ranks(torch.cat((certain, uncertain)))
    if ranks is None:
        return math.nan
    # By ranks, in a few lines: what scikit-learn costs to import, every process of trials pays.
    size = int(ranks.max()) + 1
    below, above = (
        torch.bincount(part, minlength=size).double()
        for part in ranks.split([len(certain), len(uncertain)])
    )
    won = above @ (below.cumsum(dim=0) - below / 2)  # against equals, half of the pairs
    return float(won / (above.sum() * below.sum()))
