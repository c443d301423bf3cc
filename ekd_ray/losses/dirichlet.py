"""Evidential losses: logits read as the concentration of a Dirichlet distribution.

Evidential Knowledge Distillation (EKD), ICCV 2025; the cross-entropy and the
regularisation after Sensoy et al., "Evidential deep learning to quantify classification
uncertainty", NeurIPS 2018.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from ekd_ray.errors import unknown_name
from ekd_ray.losses.inputs import (
    Scalar,
    at_least_float32,
    check_temperature,
    checked,
    scalar_like,
    soften,
    softened_kl,
    times_square,
    without_autocast,
)
from ekd_ray.losses.late_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

# `exp` evidence stops growing here (4.9e8 observations of a class, far beyond any training
# set). The Dirichlet KL grows with the concentration itself: unbounded, exp(z) overflows
# float64 at z = 709, and its terms cancel to nothing long before. At 20 the rounding error
# of 1,000 saturated classes is below 0.01, on values of 1e9 and more; gradients fit float32.
EXP_EVIDENCE_LIMIT = 20.0

EVIDENCE_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus": lambda logits: torch.nn.functional.softplus(logits),  # EKD, current release
    # EKD, first release
    "log1p_softplus": lambda logits: torch.nn.functional.softplus(logits).log1p(),
    "exp": lambda logits: logits.clamp(max=EXP_EVIDENCE_LIMIT).exp(),
    "relu": lambda logits: torch.nn.functional.relu(logits),
}


def teacher_prior(log_prior: Scalar, teacher_log_prior: Scalar | None) -> Scalar:
    """The teacher side's lambda, without gradient: its own, or else the student's."""
    prior = log_prior if teacher_log_prior is None else teacher_log_prior
    return prior.detach() if isinstance(prior, torch.Tensor) else prior


def is_concentration(teacher_log_prior: Scalar | None) -> bool:
    """Whether it says that the teacher's logits are the log of its concentration: minus infinity.

    The number, that is: no tensor's value is read.
    """
    return not isinstance(teacher_log_prior, torch.Tensor) and teacher_log_prior == -math.inf


def prior_like(log_prior: Scalar, like: Tensor) -> Tensor:
    """`log_prior` as a 0-d tensor of the dtype and device of `like`; raises `ValueError`.

    Minus infinity is no prior mass: the logits are the log of the concentration itself.
    """
    if isinstance(log_prior, torch.Tensor):
        if log_prior.dim():
            raise ValueError(f"log_prior must be 0-d, got shape {tuple(log_prior.shape)}")
    elif not log_prior < math.inf:
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
    return torch.nn.functional.log_softmax(log_concentration(logits, log_prior, temperature), dim=1)


@without_autocast
def vacuity(logits: Tensor, log_prior: Scalar) -> Tensor:
    """`C * e^lambda / S`, the share of the prior in the total concentration, at T = 1.

    Args and raises as `log_concentration`. Returns [B] in [0, 1]: 1 is no evidence at all.
    Sensoy et al. 2018, eq. 1 (there with a prior mass of 1).
    """
    log_a = log_concentration(logits, log_prior)
    log_prior_mass = prior_like(log_prior, log_a) + math.log(log_a.shape[1])
    return (log_prior_mass - log_a.logsumexp(dim=1)).exp().clamp(max=1.0)


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
    from ekd_ray.losses.gradients import ExpectedCrossEntropy  # made of torch's classes

    mean: Tensor = ExpectedCrossEntropy.apply(log_a, target)
    return mean


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
    student = log_concentration(student_logits, log_prior, temperature)
    return softened_kl(student, teacher, temperature)


def _dirichlet_kl(p: Tensor, q: Tensor) -> Tensor:
    from ekd_ray.losses.gradients import DirichletKL  # made of torch's classes

    kl: Tensor = DirichletKL.apply(p, q)
    return kl


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
    kl = _dirichlet_kl(concentration_p.double(), concentration_q.double())
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
    float64. Inputs and what is raised: `ekd_ray.losses`. With the number `-inf` as
    `teacher_log_prior` the teacher's logits are the log of its concentration, which is taken as it
    is, whatever T and `evidence` (up to e^20): those of `ensemble_log_concentration`.

    EKD (ICCV 2025), second order: in the authors' current release T = 1 and `softplus`, in their
    first one the T of the first order and `log1p_softplus`.
    """
    student, teacher = (
        soften(logits.double(), temperature) for logits in (student_logits, teacher_logits.detach())
    )
    prior = prior_like(log_prior, student).exp()
    if is_concentration(teacher_log_prior):
        target = EVIDENCE_FUNCTIONS["exp"](teacher_logits.detach().double())
    elif teacher_log_prior is None:
        target = _evidence(teacher, evidence) + prior.detach()
    else:
        own = prior_like(teacher_log_prior, teacher).exp().detach()
        target = _evidence(teacher, evidence) + own
    kl = _dirichlet_kl(target, _evidence(student, evidence) + prior)
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
    return wrong_evidence_kl(logits, target, log_prior, evidence)


def wrong_evidence_kl(logits: Tensor, target: Tensor, log_prior: Scalar, evidence: str) -> Tensor:
    """`prior_kl_loss`, unchecked; the target may be shares of the classes [B, C]."""
    z = logits.double()
    prior = prior_like(log_prior, z).exp()
    found = _evidence(z, evidence)
    wrong = found * (1 - target) if target.dim() == 2 else found.scatter(1, target[:, None], 0.0)
    kl = _dirichlet_kl(wrong + prior, prior.expand_as(z))
    return kl.mean().to(_float_dtype(logits))
