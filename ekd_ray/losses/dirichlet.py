"""Evidential losses: logits read as the concentration of a Dirichlet distribution.

Evidential Knowledge Distillation (EKD), ICCV 2025; the cross-entropy and the
regularisation after Sensoy et al., "Evidential deep learning to quantify classification
uncertainty", NeurIPS 2018.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ekd_ray.errors import unknown_name
from ekd_ray.losses.inputs import (
    Scalar,
    at_least_float32,
    categorical_kl,
    check_temperature,
    checked,
    without_autocast,
)

# `exp` evidence stops growing here (4.9e8 observations of a class, far beyond any training
# set). The Dirichlet KL grows with the concentration itself: unbounded, exp(z) overflows
# float64 at z = 709, and its terms cancel to nothing long before. At 20 the rounding error
# of 1,000 saturated classes is below 0.01, on values of 1e9 and more; gradients fit float32.
EXP_EVIDENCE_LIMIT = 20.0

# Above e^10 the two-term series of digamma is exact in float64 (next term 3e-20).
_SERIES_FROM = 10.0

EVIDENCE_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus": functional.softplus,  # EKD, current release
    "log1p_softplus": lambda logits: functional.softplus(logits).log1p(),  # EKD, first release
    "exp": lambda logits: logits.clamp(max=EXP_EVIDENCE_LIMIT).exp(),
    "relu": functional.relu,
}


def teacher_prior(log_prior: Scalar, teacher_log_prior: Scalar | None) -> Scalar:
    """The teacher side's lambda, without gradient: its own, or else the student's."""
    prior = log_prior if teacher_log_prior is None else teacher_log_prior
    return prior.detach() if isinstance(prior, Tensor) else prior


def _prior_like(log_prior: Scalar, like: Tensor) -> Tensor:
    """`log_prior` as a 0-d tensor of the dtype and device of `like`."""
    if isinstance(log_prior, Tensor):
        if log_prior.dim():
            raise ValueError(f"log_prior must be 0-d, got shape {tuple(log_prior.shape)}")
        return log_prior.to(like)
    if not math.isfinite(log_prior):
        raise ValueError(f"log_prior must be finite, got {log_prior}")
    return like.new_full((), log_prior)


@without_autocast
def evidence(logits: Tensor, kind: str) -> Tensor:
    """Non-negative evidence of logits of any shape, element by element, in observations.

    `kind` is a name of `EVIDENCE_FUNCTIONS`, else `UserError` is raised; `exp` saturates at
    z = 20, with zero gradient beyond. Returns float32 (float64 for float64).

    EKD (ICCV 2025), second order: `softplus(z)` in the authors' current release,
    `log1p(softplus(z))` in their first one. Which of them gave a published figure is not known.
    """
    if kind not in EVIDENCE_FUNCTIONS:
        raise unknown_name("evidence function", kind, EVIDENCE_FUNCTIONS)
    return EVIDENCE_FUNCTIONS[kind](at_least_float32(logits))


@without_autocast
def log_concentration(logits: Tensor, log_prior: Scalar, temperature: Scalar = 1.0) -> Tensor:
    """`log(exp(z / T) + e^lambda)`, which no logit can overflow.

    Logits [B, C] give the log of the Dirichlet's concentration, float32 [B, C] (float64 for
    float64). Raises `ValueError` for T <= 0 and a prior that is not finite or not 0-d.
    """
    check_temperature(temperature)
    scaled = at_least_float32(logits) / temperature
    return torch.logaddexp(scaled, _prior_like(log_prior, scaled))


@without_autocast
def log_expectation(logits: Tensor, temperature: Scalar, log_prior: Scalar) -> Tensor:
    """`log(a / S)`, `a = exp(z / T) + e^lambda`: log of the Dirichlet's mean.

    Args and raises as `log_concentration`. Returns [B, C] log-probabilities, nats.
    """
    return functional.log_softmax(log_concentration(logits, log_prior, temperature), dim=1)


@without_autocast
def vacuity(logits: Tensor, log_prior: Scalar) -> Tensor:
    """`C * e^lambda / S`, the share of the prior in the total concentration, at T = 1.

    Args and raises as `log_concentration`. Returns [B] in [0, 1]: 1 is no evidence at all.
    Sensoy et al. 2018, eq. 1 (there with a prior mass of 1).
    """
    log_a = log_concentration(logits, log_prior)
    log_prior_mass = _prior_like(log_prior, log_a) + math.log(log_a.shape[1])
    return (log_prior_mass - log_a.logsumexp(dim=1)).exp().clamp(max=1.0)


def _digamma_exp(log_x: Tensor) -> Tensor:
    """`psi(exp(l))` of a float64 tensor, finite in value and gradient for large l.

    Each branch is clamped to its own side: `where` passes a zero gradient to the side not
    taken, and zero times an infinite derivative would be NaN.
    """
    small, large = log_x.clamp(max=_SERIES_FROM), log_x.clamp(min=_SERIES_FROM)
    series = large - (-large).exp() / 2 - (-2 * large).exp() / 12
    return torch.where(log_x < _SERIES_FROM, torch.digamma(small.exp()), series)


@checked
def evidential_cross_entropy(logits: Tensor, target: Tensor, log_prior: Scalar) -> Tensor:
    """`psi(S) - psi(a_y)` with `a = exp(z) + e^lambda`, mean over the batch.

    It is the expected cross-entropy under Dir(a), from logits [B, C] and target int64 [B]: 0-d,
    nats. Inputs and what is raised: `ekd_ray.losses`.

    EKD (ICCV 2025), evidential cross-entropy; Sensoy et al. 2018, eq. 4.
    """
    log_a = log_concentration(logits, log_prior)
    # Only [B] values reach digamma. In float64 because trigamma, its derivative, is 1 / x^2
    # near zero, which a small prior takes out of float32's range.
    log_target = log_a.gather(1, target[:, None]).squeeze(1).double()
    log_total = log_a.logsumexp(dim=1).double()
    return (_digamma_exp(log_total) - _digamma_exp(log_target)).mean().to(log_a.dtype)


@checked
def expectation_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: Scalar,
    *,
    log_prior: Scalar,
    teacher_log_prior: Scalar | None = None,
) -> Tensor:
    """`T^2 * KL(p_t || p_s)` of the Dirichlets' means, mean over the batch (first order).

    `p = a / S` with `a = exp(z / T) + e^lambda`, from logits [B, C] and T > 0: 0-d, nats. Inputs
    and what is raised: `ekd_ray.losses`.

    EKD (ICCV 2025), first order.
    """
    prior = teacher_prior(log_prior, teacher_log_prior)
    log_p_teacher = log_expectation(teacher_logits.detach(), temperature, prior)
    log_p_student = log_expectation(student_logits, temperature, log_prior)
    return temperature**2 * categorical_kl(log_p_teacher, log_p_student).mean()


@checked
def dirichlet_kl(concentration_p: Tensor, concentration_q: Tensor) -> Tensor:
    """`KL(Dir(p) || Dir(q))` of each row.

    Args:
        concentration_p: [B, C] > 0 (not checked), any float dtype.
        concentration_q: the same shape, > 0.

    Returns:
        [B], nats, in the inputs' dtype but at least float32. Equal rows give exactly 0; rounding
        can put nearly equal ones below 0, by about 1e-16 * S * log(S).

    Raises:
        ValueError: shapes that differ or are not a floating [B, C] with B >= 1, C >= 2.
    """
    dtype = torch.promote_types(
        at_least_float32(concentration_p).dtype, at_least_float32(concentration_q).dtype
    )
    # lnG(S) reaches 1e8 where the divergence itself may be 1: float32 keeps no digit of it.
    p, q = concentration_p.double(), concentration_q.double()
    p_total, q_total = p.sum(dim=1, keepdim=True), q.sum(dim=1, keepdim=True)
    totals = torch.lgamma(p_total) - torch.lgamma(q_total)
    expected_log = torch.digamma(p) - torch.digamma(p_total)
    classes = (p - q) * expected_log - (torch.lgamma(p) - torch.lgamma(q))
    return (totals.squeeze(1) + classes.sum(dim=1)).to(dtype)


@checked
def distribution_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: Scalar,
    *,
    log_prior: Scalar,
    teacher_log_prior: Scalar | None = None,
    evidence: str = "softplus",
) -> Tensor:
    """`T^2 * KL(Dir(a_t) || Dir(a_s))`, teacher first, mean over the batch (second order).

    `a = evidence(z / T) + e^lambda`, from logits [B, C], T > 0 and a name of
    `EVIDENCE_FUNCTIONS`: 0-d, nats, computed in float64, returned in float32 unless an input is
    float64. Inputs and what is raised: `ekd_ray.losses`.

    EKD (ICCV 2025), second order: in the authors' current release T = 1 and `softplus`, in their
    first one the T of the first order and `log1p_softplus`.
    """
    dtype = torch.promote_types(
        at_least_float32(student_logits).dtype, at_least_float32(teacher_logits).dtype
    )
    prior = teacher_prior(log_prior, teacher_log_prior)
    teacher = _concentration(teacher_logits.detach().double() / temperature, prior, evidence)
    student = _concentration(student_logits.double() / temperature, log_prior, evidence)
    return (temperature**2 * dirichlet_kl(teacher, student).mean()).to(dtype)


@checked
def prior_kl_loss(
    logits: Tensor, target: Tensor, log_prior: Scalar, *, evidence: str = "softplus"
) -> Tensor:
    """`KL(Dir(a~) || Dir(e^lambda))`, mean over the batch: pulls wrong evidence to the prior.

    `a~ = evidence(z) * (1 - onehot(y)) + e^lambda`: the target's own evidence is left alone.

    From logits [B, C] and target int64 [B]: 0-d, nats, computed in float64, returned in float32
    unless the logits are float64. Inputs and what is raised: `ekd_ray.losses`.

    Sensoy et al. 2018, section 4 (there with a prior mass of 1).
    """
    z = logits.double()
    wrong = torch.ones_like(z).scatter(1, target[:, None], 0.0)
    concentration = _concentration(z, log_prior, evidence, keep=wrong)
    prior = _prior_like(log_prior, z).exp().expand_as(z)
    return dirichlet_kl(concentration, prior).mean().to(at_least_float32(logits).dtype)


def _concentration(
    logits: Tensor, log_prior: Scalar, kind: str, keep: Tensor | None = None
) -> Tensor:
    """`evidence(z) * keep + e^lambda`, [B, C]."""
    amount = evidence(logits, kind)
    if keep is not None:
        amount = amount * keep
    return amount + _prior_like(log_prior, logits).exp()
