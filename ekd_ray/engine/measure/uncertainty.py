"""How uncertain a classifier is, and whether that uncertainty finds its errors.

Two kinds of functions of the logits [N, C] of N images:

- what an evidential network's Dirichlet says of each image, `a = exp(z) + e^lambda` with z the
  logits and lambda the `log_prior`, `S = sum_k a_k`: dissonance, aleatoric and epistemic
  entropy (vacuity is `ekd_ray.losses.vacuity`);
- how well an uncertainty ranks: area under the risk-coverage curve, AUROC of errors and of
  out-of-distribution images.

Computed in float64 and from logarithms, so that logits of +-1e4 neither overflow nor tie, and
in pieces of rows, so that the memory needed does not grow with N. No gradient flows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ekd_ray.losses.dirichlet import log_concentration, vacuity
from ekd_ray.losses.inputs import check_logits, check_target

# Logits per piece. A piece of float64 is 1 MiB; about ten of its size live at a time.
PIECE = 2**17

# The mean dissonance of a split: all rows up to this many classes, above it as many rows as
# this many elementary operations allow, at five for each of the C^2 / 2 pairs of classes.
ALL_ROWS_CLASSES = 64
DISSONANCE_OPERATIONS = 4e8
OPERATIONS_PER_PAIR = 5

# From x = 16 on, five terms after 1 / (2x) leave a relative error of 3e-15.
_SERIES_FROM = math.log(16.0)

_TINY = torch.finfo(torch.float64).tiny


def _by_rows(function: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """`function` of the logits in float64, piece by piece along the rows, joined again."""
    check_logits(logits=logits)
    rows = max(1, PIECE // logits.shape[1])
    return torch.cat([function(piece.double()) for piece in logits.detach().split(rows)])


def dissonance(logits: Tensor, log_prior: float) -> Tensor:
    """Conflict between the beliefs of a Dirichlet: much evidence for several classes.

    `sum_k b_k * (sum_{j != k} b_j Bal(j, k)) / (sum_{j != k} b_j)` with the belief
    `b_k = (a_k - e^lambda) / S = exp(z_k) / S` and the balance
    `Bal(j, k) = 1 - |b_j - b_k| / (b_j + b_k)`, 0 where both beliefs are 0.

    O(C^2) operations a row, less than 64 MB of memory.

    Args:
        logits: [N, C], any float dtype.
        log_prior: lambda, log of the prior mass per class.

    Returns:
        [N] float64 in [0, 1 - vacuity]. 0 is no evidence, or all of it for one class; C equal
        beliefs have 1 - vacuity.

    Raises:
        ValueError: logits that are not a floating [N, C] with N >= 1 and C >= 2; a prior that
            is not finite.

    Josang, Cho and Chen, "Uncertainty characteristics of subjective opinions", FUSION 2018.
    """
    return _by_rows(lambda z: _dissonance(z, log_prior), logits)


def _dissonance(z: Tensor, log_prior: float) -> Tensor:
    log_total = log_concentration(z, log_prior).logsumexp(dim=1)
    # Largest belief first: of any pair the later is the smaller, which is what Bal needs. One
    # row a class, so that the loop's slices are contiguous.
    z = z.sort(dim=1, descending=True).values.t().contiguous()
    belief = (z - z[0]).exp()  # as a share of the largest: that one is 1
    others = belief.sum(dim=0) - belief
    others[0] = belief[1:].sum(dim=0)  # the only difference that would cancel
    # Beliefs that underflow belong to terms that vanish; the floors keep 0 / 0 out of them.
    share = others.clamp(min=_TINY).reciprocal()
    floored = belief.clamp(min=_TINY)
    twice_square = 2 * belief.square()
    result = torch.zeros_like(z[0])
    for k in range(len(z) - 1):
        # b_j Bal(j, k) of all smaller j: it counts once for k and once, times b_k / b_j, for j.
        balanced = twice_square[k + 1 :] / (belief[k + 1 :] + floored[k])
        for_k = balanced.sum(dim=0) * share[k]
        for_others = balanced.mul_(share[k + 1 :]).sum(dim=0)
        result += belief[k] * (for_k + for_others)
    return ((z[0] - log_total).exp() * result).clamp(max=1.0)


def entropies(logits: Tensor, log_prior: float) -> tuple[Tensor, Tensor]:
    """Aleatoric and epistemic entropy: noise in the data, and what more evidence would remove.

    Aleatoric is the expected entropy of the class probabilities under the Dirichlet,
    `-sum_k a_k / S * (psi(a_k + 1) - psi(S + 1))`. Epistemic is the mutual information of class
    and class probabilities: the entropy of the Dirichlet's mean minus the aleatoric one. It
    falls as (C - 1) / (2 S) and keeps its digits there, because nothing of the size of the
    entropies is subtracted.

    Args and raises as `dissonance`. Returns two [N] float64, nats, in [0, log C].

    Malinin and Gales, "Predictive uncertainty estimation via prior networks", NeurIPS 2018
    (expected data uncertainty, mutual information).
    """
    aleatoric, epistemic = _by_rows(lambda z: _entropies(z, log_prior), logits).unbind(1)
    return aleatoric, epistemic


def _entropies(z: Tensor, log_prior: float) -> Tensor:
    """[N, 2]. With `g(x) = psi(x + 1) - log(x)` and `p = a / S`, the digammas' logarithms give
    the entropy of p, and what is left of them, `sum_k p_k g(a_k) - g(S)`, is the epistemic part.
    """
    log_a = log_concentration(z, log_prior)
    top = log_a.max(dim=1, keepdim=True)
    relative = log_a - top.values
    # log1p keeps the entropy of a row with one dominant class, which log_softmax rounds away.
    log_total = relative.exp().scatter(1, top.indices, 0.0).sum(dim=1, keepdim=True).log1p()
    log_p = relative - log_total
    g_classes, g_total = _digamma_rest(log_a), _digamma_rest(top.values + log_total)
    p = log_p.exp()
    aleatoric = (p * (g_total - g_classes - log_p)).sum(dim=1)
    epistemic = (p * g_classes).sum(dim=1) - g_total.squeeze(1)
    return torch.stack((aleatoric, epistemic), dim=1).clamp(min=0.0)


def _digamma_rest(log_x: Tensor) -> Tensor:
    """`psi(x + 1) - log(x)` from log(x): about 1 / (2x) for large x, where both are large."""
    # Each side is infinite or NaN in the other's range, where it is not taken.
    inverse = (-log_x).exp()
    y = inverse.square()
    tail = 1 / 12 - y * (1 / 120 - y * (1 / 252 - y * (1 / 240 - y / 132)))
    exact = torch.digamma(log_x.exp() + 1) - log_x
    return torch.where(log_x < _SERIES_FROM, exact, inverse / 2 - y * tail)


def uncertainty(logits: Tensor, log_prior: float | None) -> Tensor:
    """The score that ranks predictions from certain to uncertain, as log-odds.

    An evidential network's is its vacuity `v = C e^lambda / S`, a softmax one's is
    `v = 1 - max_k p_k` (Hendrycks and Gimpel, "A baseline for detecting misclassified and
    out-of-distribution examples", ICLR 2017). Both are returned as `log(v / (1 - v))`, which
    ranks alike (sigmoid gives v back) and ties nowhere by saturation at 0 or at 1. For the
    evidential network that is `lambda + log C - logsumexp(z)`, the ranking of the energy score
    (Liu et al., NeurIPS 2020).

    Logits and what is raised as in `dissonance`; `log_prior` is None for a softmax network.
    Returns [N] float64, more is less certain.
    """
    if log_prior is None:
        return _by_rows(_log_odds_of_an_error, logits)
    prior_mass = log_prior + math.log(logits.shape[-1])
    return _by_rows(lambda z: prior_mass - z.logsumexp(dim=1), logits)


def _log_odds_of_an_error(z: Tensor) -> Tensor:
    top = z.max(dim=1, keepdim=True)
    rest = z.scatter(1, top.indices, -math.inf)
    return rest.logsumexp(dim=1) - top.values.squeeze(1)


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


def uncertainty_metrics(
    logits: Tensor,
    target: Tensor,
    *,
    log_prior: float | None,
    ood_logits: Tensor | None = None,
) -> dict[str, float]:
    """Uncertainty of one split, from the logits of all of its images.

    The prediction is the largest logit, which is the most probable class of a softmax and of a
    Dirichlet's mean alike.

    Args:
        logits: [N, C], any float dtype; target: [N] int64.
        log_prior: lambda of an evidential network, log of the prior mass per class; None for a
            softmax one.
        ood_logits: [M, C], any float dtype, of images from outside the data set.

    Returns:
        `aurc` of `uncertainty`, `error_auroc` (how `auroc` tells errors from right predictions,
        left out if all are right or all wrong), and for an evidential network the means over the
        images of `vacuity`, `dissonance` (both in [0, 1]), `aleatoric_entropy` and
        `epistemic_entropy` (nats). With more than 64 classes the mean dissonance is that of
        evenly spaced rows, as many as 4e8 elementary operations allow (at least one): 16,000 at
        C = 100, 160 at C = 1,000. `ood_auroc` with `ood_logits`.

    Raises:
        ValueError: logits that are not a floating [N, C] with N >= 1 and C >= 2, or that differ
            in C; a target that is not int64 [N]; a prior that is not finite.
    """
    # Ranked on the host, where shapes may depend on values.
    scores = uncertainty(logits, log_prior).cpu()
    check_target(target, logits)
    wrong = (logits.argmax(dim=1) != target).cpu()
    values = {"aurc": aurc(scores, wrong)}
    if wrong.any() and not wrong.all():
        values["error_auroc"] = auroc(scores[~wrong], scores[wrong])
    if log_prior is not None:
        aleatoric, epistemic = entropies(logits, log_prior)
        means = {
            "vacuity": _by_rows(lambda z: vacuity(z, log_prior), logits),
            "dissonance": dissonance(_dissonance_sample(logits), log_prior),
            "aleatoric_entropy": aleatoric,
            "epistemic_entropy": epistemic,
        }
        values |= {name: float(value.mean()) for name, value in means.items()}
    if ood_logits is not None:
        expected, got = logits.shape[-1], ood_logits.shape[-1]
        if got != expected:
            raise ValueError(f"ood_logits must have C = {expected} like logits, got {got}")
        values["ood_auroc"] = auroc(scores, uncertainty(ood_logits, log_prior).cpu())
    return values


def _dissonance_sample(logits: Tensor) -> Tensor:
    """Evenly spaced rows of the logits, as many as the operations allow."""
    count, classes = logits.shape
    rows = int(DISSONANCE_OPERATIONS / (OPERATIONS_PER_PAIR * classes**2 / 2))
    if classes <= ALL_ROWS_CLASSES or rows >= count:
        return logits
    rows = max(1, rows)
    return logits[torch.arange(rows, device=logits.device) * count // rows]
