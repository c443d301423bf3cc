"""How uncertain a classifier is, and whether that uncertainty finds its errors.

Functions of the logits [N, C] of N images: the scores of `SCORES`, by which images are ranked from
certain to uncertain, and what an evidential network's Dirichlet says of each image besides,
`a = exp(z) + e^lambda` with z the logits and lambda the `log_prior`, `S = sum_k a_k` (vacuity
itself is `ekd_ray.losses.vacuity`).

Computed in float64 and from logarithms, so that logits of +-1e4 neither overflow nor tie, and
in pieces of rows, so that the memory needed does not grow with N. No gradient flows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ekd_ray.engine.measure.ranking import aurc, auroc
from ekd_ray.errors import UserError, unknown_name
from ekd_ray.losses.dirichlet import evidence as evidence_of
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
# Below it 1/x overflows, of which the differential entropy is made.
_LEAST_LOG = -700.0


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
    found = _by_rows(lambda z: _entropies(log_concentration(z, log_prior)), logits)
    aleatoric, epistemic = found.unbind(1)
    return aleatoric, epistemic


def _entropies(log_a: Tensor) -> Tensor:
    """[N, 2]. With `g(x) = psi(x + 1) - log(x)` and `p = a / S`, the digammas' logarithms give
    the entropy of p, and what is left of them, `sum_k p_k g(a_k) - g(S)`, is the epistemic part.
    """
    log_p, log_total = _log_mean(log_a)
    g_classes, g_total = _digamma_rest(log_a), _digamma_rest(log_total)
    p = log_p.exp()
    aleatoric = (p * (g_total - g_classes - log_p)).sum(dim=1)
    epistemic = (p * g_classes).sum(dim=1) - g_total.squeeze(1)
    return torch.stack((aleatoric, epistemic), dim=1).clamp(min=0.0)


def _log_mean(log_a: Tensor) -> tuple[Tensor, Tensor]:
    """log(a / S) [N, C] and log(S) [N, 1].

    log1p keeps the entropy of a row with one dominant class, which log_softmax rounds away.
    """
    top = log_a.max(dim=1, keepdim=True)
    relative = log_a - top.values
    rest = relative.exp().scatter(1, top.indices, 0.0).sum(dim=1, keepdim=True).log1p()
    return relative - rest, top.values + rest


def _digamma_rest(log_x: Tensor) -> Tensor:
    """`psi(x + 1) - log(x)` from log(x): about 1 / (2x) for large x, where both are large."""
    # Each side is infinite or NaN in the other's range, where it is not taken.
    inverse = (-log_x).exp()
    y = inverse.square()
    tail = 1 / 12 - y * (1 / 120 - y * (1 / 252 - y * (1 / 240 - y / 132)))
    exact = torch.digamma(log_x.exp() + 1) - log_x
    return torch.where(log_x < _SERIES_FROM, exact, inverse / 2 - y * tail)


def _entropy(log_a: Tensor) -> Tensor:
    log_p, _ = _log_mean(log_a)
    return -(log_p.exp() * log_p).sum(dim=1).clamp(max=0.0)


def _differential_entropy(log_a: Tensor) -> Tensor:
    """With `r(x) = lnG(x) - (x - 1) psi(x) + x` it is `sum_k r(a_k) - r(S) - (C - 1) psi(S)`, in
    which S and the sum of the a_k, of the size of S log(S), have cancelled."""
    log_a = log_a.clamp(min=_LEAST_LOG)
    log_total = log_a.logsumexp(dim=1)
    digamma = _digamma_rest(log_total) + log_total - (-log_total).exp()
    rest = _log_gamma_rest(log_a).sum(dim=1) - _log_gamma_rest(log_total)
    return rest - (log_a.shape[1] - 1) * digamma


def _log_gamma_rest(log_x: Tensor) -> Tensor:
    """`lnG(x) - (x - 1) psi(x) + x` from log(x): about log(2 pi e x) / 2 for large x."""
    x, inverse = log_x.exp(), (-log_x).exp()
    y = inverse.square()
    # B_2k / 2k * (2k / (2k - 1) - 1/x) / x^(2k - 1) of Stirling's series and of its derivative.
    terms = ((1 / 12, 2), (-1 / 120, 4 / 3), (1 / 252, 6 / 5), (-1 / 240, 8 / 7), (1 / 132, 10 / 9))
    tail = torch.zeros_like(log_x)
    for factor, ratio in reversed(terms):
        tail = tail * y + factor * (ratio - inverse)
    series = (log_x + math.log(2 * math.pi) + 1 - inverse) / 2 + tail * inverse
    exact = torch.lgamma(x) - (x - 1) * torch.digamma(x) + x
    return torch.where(log_x < _SERIES_FROM, exact, series)


def _vacuity(of: Belief) -> Tensor:
    prior = 0.0 if of.log_prior is None else of.log_prior
    return prior + math.log(of.logits.shape[1]) - of.log_evidence.logsumexp(dim=1)


@dataclass(frozen=True, kw_only=True)
class Belief:
    """`logits`, `log_evidence` and `log_concentration` of N images, [N, C] float64, all of which
    are the logits of a softmax network, and the prior, if there is one beside them."""

    logits: Tensor
    log_evidence: Tensor
    log_concentration: Tensor
    log_prior: float | None


@dataclass(frozen=True, kw_only=True)
class Score:
    """A way to rank images: `of` a belief gives [N], more is less certain; `dirichlet` says that a
    softmax network has none."""

    of: Callable[[Belief], Tensor]
    dirichlet: bool = False


SCORES = {
    # As log-odds of 1 - max p. Hendrycks and Gimpel, ICLR 2017.
    "max_probability": Score(of=lambda b: _log_odds_of_an_error(b.log_concentration)),
    "entropy": Score(of=lambda b: _entropy(b.log_concentration)),
    # -logsumexp(z). Liu et al., NeurIPS 2020.
    "energy": Score(of=lambda b: -b.logits.logsumexp(dim=1)),
    # Malinin and Gales, NeurIPS 2018: `entropies`, and the differential entropy, in nats.
    "expected_entropy": Score(of=lambda b: _entropies(b.log_concentration)[:, 0], dirichlet=True),
    "mutual_information": Score(of=lambda b: _entropies(b.log_concentration)[:, 1], dirichlet=True),
    "differential_entropy": Score(
        of=lambda b: _differential_entropy(b.log_concentration), dirichlet=True
    ),
    # The Dirichlet's mass, as log-odds of the vacuity. Sensoy et al., NeurIPS 2018.
    "vacuity": Score(of=_vacuity, dirichlet=True),
}


def score_names(log_prior: float | None) -> list[str]:
    """The scores that a network has: those of a Dirichlet need a prior."""
    return [name for name, kind in SCORES.items() if log_prior is not None or not kind.dirichlet]


def default_score(log_prior: float | None) -> str:
    """The score that ranks where none is chosen: `vacuity` of a Dirichlet, else
    `max_probability`."""
    return "max_probability" if log_prior is None else "vacuity"


def score_images(
    name: str, logits: Tensor, log_prior: float | None, *, evidence: str = "exp"
) -> Tensor:
    """A score of `SCORES` of every image, more is less certain.

    `max_probability` and `vacuity` are log-odds, `log(v / (1 - v))` of v in [0, 1], which rank as
    v does and tie nowhere by saturation; the others are in nats.

    Args:
        name: of `SCORES`.
        logits: [N, C], any float dtype.
        log_prior: lambda of an evidential network; None for a softmax one; -inf where the logits
            are the logarithms of a concentration that has its prior in it, as an ensemble's (their
            vacuity is then against a mass of 1 a class).
        evidence: the form of the evidence, of `EVIDENCE_FUNCTIONS`; `exp` does not saturate here.

    Returns:
        [N] float64.

    Raises:
        UserError: an unknown name, or one that needs a Dirichlet, of a softmax network.
        ValueError: logits that are not a floating [N, C] with N >= 1 and C >= 2; a prior that is
            not finite.
    """
    if name not in SCORES:
        raise unknown_name("score", name, SCORES)
    if name not in score_names(log_prior):
        raise UserError(
            f"the score {name} is of evidential networks, and this is none: give one of "
            f"{', '.join(score_names(log_prior))}."
        )
    return _by_rows(lambda z: SCORES[name].of(_belief(z, log_prior, evidence)), logits)


def _belief(z: Tensor, log_prior: float | None, kind: str) -> Belief:
    if log_prior is None or log_prior == -math.inf:
        return Belief(logits=z, log_evidence=z, log_concentration=z, log_prior=None)
    log_evidence = z if kind == "exp" else evidence_of(z, kind).log()
    return Belief(
        logits=z, log_evidence=log_evidence,
        log_concentration=log_concentration(log_evidence, log_prior), log_prior=log_prior,
    )  # fmt: skip


def uncertainty(logits: Tensor, log_prior: float | None) -> Tensor:
    """The score by which predictions are ranked where none is chosen, see `default_score`.

    An evidential network's is the log-odds of its vacuity `v = C e^lambda / S`, that is
    `lambda + log C - logsumexp(z)`, the ranking of the energy; a softmax one's that of
    `v = 1 - max_k p_k`. Sigmoid gives v back.

    Logits and what is raised as in `dissonance`; `log_prior` is None for a softmax network.
    Returns [N] float64, more is less certain.
    """
    return score_images(default_score(log_prior), logits, log_prior)


def _log_odds_of_an_error(z: Tensor) -> Tensor:
    top = z.max(dim=1, keepdim=True)
    rest = z.scatter(1, top.indices, -math.inf)
    return rest.logsumexp(dim=1) - top.values.squeeze(1)


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
        C = 100, 160 at C = 1,000. `ood_auroc` with `ood_logits`, and for an evidential network
        `mi_auroc`, by the mutual information (the epistemic entropy) in the place of `uncertainty`.

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
        if log_prior is not None:
            values["mi_auroc"] = auroc(epistemic.cpu(), entropies(ood_logits, log_prior)[1].cpu())
    return values


def _dissonance_sample(logits: Tensor) -> Tensor:
    """Evenly spaced rows of the logits, as many as the operations allow."""
    count, classes = logits.shape
    rows = int(DISSONANCE_OPERATIONS / (OPERATIONS_PER_PAIR * classes**2 / 2))
    if classes <= ALL_ROWS_CLASSES or rows >= count:
        return logits
    rows = max(1, rows)
    return logits[torch.arange(rows, device=logits.device) * count // rows]
