"""Evidential losses: logits read as the concentration of a Dirichlet distribution.

Evidential Knowledge Distillation (EKD), ICCV 2025; the cross-entropy and the
regularisation after Sensoy et al., "Evidential deep learning to quantify classification
uncertainty", NeurIPS 2018.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

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
    scalar_like,
    soften,
    times_square,
    without_autocast,
)

# `exp` evidence stops growing here (4.9e8 observations of a class, far beyond any training
# set). The Dirichlet KL grows with the concentration itself: unbounded, exp(z) overflows
# float64 at z = 709, and its terms cancel to nothing long before. At 20 the rounding error
# of 1,000 saturated classes is below 0.01, on values of 1e9 and more; gradients fit float32.
EXP_EVIDENCE_LIMIT = 20.0

# From e^40 on digamma is the logarithm to the last bit of float64 (the next term is 2e-18).
_LOGARITHM_FROM = 40.0

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


def prior_like(log_prior: Scalar, like: Tensor) -> Tensor:
    """`log_prior` as a 0-d tensor of the dtype and device of `like`; raises `ValueError`."""
    if isinstance(log_prior, Tensor):
        if log_prior.dim():
            raise ValueError(f"log_prior must be 0-d, got shape {tuple(log_prior.shape)}")
    elif not math.isfinite(log_prior):
        raise ValueError(f"log_prior must be finite, got {log_prior}")
    return scalar_like(log_prior, like)


@without_autocast
def evidence(logits: Tensor, kind: str) -> Tensor:
    """Non-negative evidence of logits of any shape, element by element, in observations.

    `kind` is a name of `EVIDENCE_FUNCTIONS`, else `UserError` is raised; `exp` saturates at
    z = 20, with zero gradient beyond. Returns float32 (float64 for float64).

    EKD (ICCV 2025), second order: `softplus(z)` in the authors' current release,
    `log1p(softplus(z))` in their first one. Which of them gave a published figure is not known.
    """
    return _evidence(at_least_float32(logits), kind)


def _evidence(logits: Tensor, kind: str) -> Tensor:
    if kind not in EVIDENCE_FUNCTIONS:
        raise unknown_name("evidence function", kind, EVIDENCE_FUNCTIONS)
    return EVIDENCE_FUNCTIONS[kind](logits)


def _float_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if one of them is, else float32."""
    doubles = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if doubles else torch.float32


@without_autocast
def log_concentration(logits: Tensor, log_prior: Scalar, temperature: Scalar = 1.0) -> Tensor:
    """`log(exp(z / T) + e^lambda)`, which no logit can overflow.

    Logits [B, C] give the log of the Dirichlet's concentration, float32 [B, C] (float64 for
    float64). Raises `ValueError` for T <= 0 and a prior that is not finite or not 0-d.
    """
    check_temperature(temperature)
    scaled = soften(logits, temperature)
    return torch.logaddexp(scaled, prior_like(log_prior, scaled))


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
    log_prior_mass = prior_like(log_prior, log_a) + math.log(log_a.shape[1])
    return (log_prior_mass - log_a.logsumexp(dim=1)).exp().clamp(max=1.0)


class _ExpectedCrossEntropy(torch.autograd.Function):
    """`psi(S) - psi(a_y)` of `log a` [B, C], mean over the batch, finite for every finite log.

    Only [B, 2] values reach digamma, in float64 because trigamma, its derivative, is 1 / x^2 near
    zero, which a small prior takes out of float32's range.
    """

    @staticmethod
    def forward(ctx: Any, log_a: Tensor, target: Tensor) -> Tensor:
        log_total = log_a.logsumexp(dim=1, keepdim=True)
        logs = torch.cat([log_a.gather(1, target[:, None]), log_total], dim=1).double()
        near = logs.clamp(max=_LOGARITHM_FROM)
        x = near.exp()
        ctx.save_for_backward(log_a, target, log_total, x)
        digamma = torch.digamma(x) + (logs - near)
        return (digamma[:, 1] - digamma[:, 0]).mean().to(log_a.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        log_a, target, log_total, x = ctx.saved_tensors
        # By the logs: x psi'(x), which is 1 where the logarithm has taken over.
        slopes = (x * torch.polygamma(1, x)).to(log_a.dtype) * (gradients[0] / len(x))
        of_total = (log_a - log_total).exp() * slopes[:, 1:]
        return of_total.scatter_add(1, target[:, None], -slopes[:, :1]), None


@checked
def evidential_cross_entropy(logits: Tensor, target: Tensor, log_prior: Scalar) -> Tensor:
    """`psi(S) - psi(a_y)` with `a = exp(z) + e^lambda`, mean over the batch.

    It is the expected cross-entropy under Dir(a), from logits [B, C] and target int64 [B]: 0-d,
    nats. Inputs and what is raised: `ekd_ray.losses`.

    EKD (ICCV 2025), evidential cross-entropy; Sensoy et al. 2018, eq. 4.
    """
    return expected_cross_entropy(log_concentration(logits, log_prior), target)


def expected_cross_entropy(log_a: Tensor, target: Tensor) -> Tensor:
    """`evidential_cross_entropy` of the log of a concentration [B, C], unchecked."""
    return cast(Tensor, _ExpectedCrossEntropy.apply(log_a, target))


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
    teacher = log_concentration(teacher_logits.detach(), prior, temperature)
    return expectation_kd(
        log_concentration(student_logits, log_prior, temperature), teacher, temperature
    )


def expectation_kd(student: Tensor, teacher: Tensor, temperature: Scalar) -> Tensor:
    """`expectation_kd_loss` of the logs of two concentrations [B, C], unchecked."""
    log_p_teacher, log_p_student = (
        functional.log_softmax(log_a, dim=1) for log_a in (teacher, student)
    )
    return times_square(categorical_kl(log_p_teacher, log_p_student).mean(), temperature)


class _DirichletKL(torch.autograd.Function):
    """`KL(Dir(p) || Dir(q))` [B] of float64 [B, C], as a sum of Bregman divergences of lgamma.

    The row's total is one more column, so that every special function is called once.
    """

    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor) -> Tensor:
        p, q = (torch.cat([a, a.sum(dim=1, keepdim=True)], dim=1) for a in (p, q))
        digamma = torch.digamma(p)
        ctx.save_for_backward(p, q, digamma)
        columns = torch.lgamma(p) - torch.lgamma(q) - (p - q) * digamma
        return columns[:, -1] - columns[:, :-1].sum(dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        p, q, digamma = ctx.saved_tensors
        by_p, by_q = ctx.needs_input_grad
        gradient = gradients[0][:, None]
        return (
            gradient * _less_the_total((p - q) * torch.polygamma(1, p)) if by_p else None,
            gradient * _less_the_total(torch.digamma(q) - digamma) if by_q else None,
        )


def _less_the_total(columns: Tensor) -> Tensor:
    """Each of C columns minus the last one: [B, C + 1] -> [B, C]."""
    return columns[:, :-1] - columns[:, -1:]


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
    dtype = _float_dtype(concentration_p, concentration_q)
    # lnG(S) reaches 1e8 where the divergence itself may be 1: float32 keeps no digit of it.
    kl: Tensor = _DirichletKL.apply(concentration_p.double(), concentration_q.double())
    return kl.to(dtype)


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
    student, teacher = (
        soften(logits.double(), temperature) for logits in (student_logits, teacher_logits.detach())
    )
    prior = prior_like(log_prior, student).exp()
    teacher_prior = prior.detach()
    if teacher_log_prior is not None:
        teacher_prior = prior_like(teacher_log_prior, teacher).exp().detach()
    kl: Tensor = _DirichletKL.apply(
        _evidence(teacher, evidence) + teacher_prior, _evidence(student, evidence) + prior
    )
    return times_square(kl.mean(), temperature).to(_float_dtype(student_logits, teacher_logits))


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
    prior = prior_like(log_prior, z).exp()
    wrong = _evidence(z, evidence).scatter(1, target[:, None], 0.0)
    kl: Tensor = _DirichletKL.apply(wrong + prior, prior.expand_as(z))
    return kl.mean().to(_float_dtype(logits))
