"""How well an uncertainty ranks: errors after right predictions, strange images after known ones.

Of scores [N] of which more is less certain; `ekd_ray.engine.measure.uncertainty` makes them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

KEPT_SHARE = 0.95  # of the own images, where the false positives are counted


def _check_scores(**scores: Tensor) -> None:
    for name, tensor in scores.items():
        if tensor.dim() != 1 or not len(tensor):
            raise ValueError(f"{name} must be [N] with N >= 1, got {tuple(tensor.shape)}")


def dense_ranks(scores: Tensor) -> Tensor | None:
    """[N] int64 on the CPU: ranks from 0, equal for equal scores; None if any is NaN.

    Integers are taken for ranks already, which spares sorting resamples.
    """
    scores = scores.detach().cpu()
    if not scores.is_floating_point():
        return scores
    if scores.isnan().any():
        return None
    return torch.unique(scores.double(), return_inverse=True)[1]


def expected_in_order(ranks: Tensor, values: Tensor) -> Tensor:
    """Values [N] in the order of their ranks [N], float64; of equal ranks each has the mean, so
    that the order given does not matter."""
    size = torch.bincount(ranks)
    mean = torch.bincount(ranks, weights=values.cpu().double()) / size.clamp(min=1)
    return mean.repeat_interleave(size)


def _risks(uncertainty: Tensor, wrong: Tensor) -> Tensor | None:
    """[N]: the expected error rate among the k most certain, for k = 1 to N; None for a NaN."""
    _check_scores(uncertainty=uncertainty)
    if wrong.dtype != torch.bool or wrong.shape != uncertainty.shape:
        raise ValueError(
            f"wrong must be bool {tuple(uncertainty.shape)}, got {wrong.dtype} {tuple(wrong.shape)}"
        )
    ranks = dense_ranks(uncertainty)
    if ranks is None:
        return None
    return expected_in_order(ranks, wrong).cumsum(dim=0) / torch.arange(1, len(ranks) + 1)


def aurc(uncertainty: Tensor, wrong: Tensor) -> float:
    """Area under the risk-coverage curve: the error rate when the uncertain are left out.

    `1 / N * sum_k (errors among the k most certain) / k`. Within a group of equal uncertainties
    it is the expected value over all orders of the group, so the order given does not matter.

    Args:
        uncertainty: [N], any float dtype, infinities are legal; or int64 ranks from 0.
        wrong: [N] bool, whether the prediction is an error.

    Returns:
        In [0, 1], less is better; the error rate if all uncertainties are equal; NaN if one of
        them is NaN.

    Raises:
        ValueError: other shapes or dtypes, or N = 0.

    Geifman and El-Yaniv, "Selective classification for deep neural networks", NeurIPS 2017.
    """
    risks = _risks(uncertainty, wrong)
    return math.nan if risks is None else float(risks.mean())


def excess_aurc(uncertainty: Tensor, wrong: Tensor) -> float:
    """E-AURC: `aurc` above that of the best order, in which all errors come last.

    Args and raises as `aurc`. Returns a number in [0, 1], 0 is the best order, NaN as there.

    Geifman, Uziel and El-Yaniv, "Bias-reduced uncertainty estimation for deep neural
    classifiers", ICLR 2019; with the sum in the place of its integral.
    """
    return aurc(uncertainty, wrong) - aurc(wrong.double(), wrong)


def accuracy_at_coverage(uncertainty: Tensor, wrong: Tensor, coverage: float) -> float:
    """The accuracy on the most certain share of the images, in (0, 1], rounded up to images.

    Args and raises as `aurc`. Returns a number in [0, 1], NaN as there.
    """
    risks = _risks(uncertainty, wrong)
    if risks is None:
        return math.nan
    kept = math.ceil(coverage * len(risks) - 1e-9)  # 0.7 * 10 is above 7
    return 1 - float(risks[max(kept, 1) - 1])


def _count_by_rank(certain: Tensor, uncertain: Tensor) -> tuple[Tensor, Tensor] | None:
    """How many of either side have each rank, float64, from the lowest; None for a NaN."""
    _check_scores(certain=certain, uncertain=uncertain)
    ranks = dense_ranks(torch.cat((certain, uncertain)))
    if ranks is None:
        return None
    size = int(ranks.max()) + 1
    below, above = (
        torch.bincount(part, minlength=size).double()
        for part in ranks.split([len(certain), len(uncertain)])
    )
    return below, above


def auroc(certain: Tensor, uncertain: Tensor) -> float:
    """Probability that an image that should be uncertain is so, more than one that should not.

    Equal scores count half. The images that should be are errors, or come from outside of the
    data set.

    Args:
        certain: [N], any float dtype, infinities are legal; or ranks from 0, as `uncertain`.
        uncertain: [M].

    Returns:
        Area under the ROC curve in [0, 1], 0.5 is chance; NaN if a score is NaN.

    Raises:
        ValueError: either is not one-dimensional or is empty.

    Hendrycks and Gimpel, ICLR 2017.
    """
    # By ranks, in a few lines: what scikit-learn costs to import, every process of trials pays.
    counts = _count_by_rank(certain, uncertain)
    if counts is None:
        return math.nan
    return _share_won(*counts)


def _share_won(below: Tensor, above: Tensor) -> float:
    won = above @ (below.cumsum(dim=0) - below / 2)  # against equals, half of the pairs
    return float(won / (above.sum() * below.sum()))


def separate(certain: Tensor, uncertain: Tensor) -> dict[str, float]:
    """How well a score tells images from outside of the data set (`uncertain`) from its own.

    Args and raises as `auroc`.

    Returns:
        `auroc`; `aupr_in` and `aupr_out`, the average precision where the own images, and those
        from outside, are what is looked for; `fpr95`, the share of those from outside that is
        taken for own at the lowest threshold that keeps 95 % of the own. NaN if a score is NaN.

    Hendrycks and Gimpel, ICLR 2017; Liu et al., NeurIPS 2020 (FPR95).
    """
    counts = _count_by_rank(certain, uncertain)
    if counts is None:
        return dict.fromkeys(("auroc", "aupr_in", "aupr_out", "fpr95"), math.nan)
    below, above = counts
    kept = below.cumsum(dim=0) >= KEPT_SHARE * below.sum() - 1e-9
    return {
        "auroc": _share_won(below, above),
        "aupr_in": _average_precision(below, above),
        "aupr_out": _average_precision(above.flip(0), below.flip(0)),
        "fpr95": float(above[: int(kept.int().argmax()) + 1].sum() / above.sum()),
    }


def _average_precision(wanted: Tensor, others: Tensor) -> float:
    """From the counts at each threshold, the first one first."""
    found = wanted.cumsum(dim=0)
    precision = found / (found + others.cumsum(dim=0)).clamp(min=1)
    return float((wanted * precision).sum() / wanted.sum())
