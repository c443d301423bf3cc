"""Decoupled distillation, on softmax statistics and on Dirichlet expectations.

Zhao et al., "Decoupled knowledge distillation", CVPR 2022; with EKD (ICCV 2025).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from ekd_ray.config.method_settings import MethodSetting
from ekd_ray.losses.cross_entropy import CE_WEIGHT, CROSS_ENTROPY
from ekd_ray.losses.dirichlet import log_concentration, teacher_prior
from ekd_ray.losses.evidential import evidential
from ekd_ray.losses.inputs import (
    Scalar,
    categorical_kl,
    checked,
)
from ekd_ray.losses.kd import KD_WEIGHT, STANDARDIZE, TEMPERATURE, softmax_inputs
from ekd_ray.losses.methods import (
    Method,
    Outputs,
    Term,
    log_range,
    register_method,
    share_of_epochs,
)


def _split(log_mass: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B, 2] of (target, rest), and [B, C - 1] among the rest.

    The published code keeps the target's column and subtracts 1000 from it before the
    softmax, which fails once logits differ by 1000. Leaving the column out is what that
    approximates, and is exact; indices instead of a mask keep the shape known (no sync).
    """
    columns = torch.arange(log_mass.shape[1] - 1, device=log_mass.device)
    columns = columns + (columns >= target[:, None]).long()
    rest = log_mass.gather(1, columns)
    pair = torch.cat([log_mass.gather(1, target[:, None]), rest.logsumexp(1, keepdim=True)], 1)
    return functional.log_softmax(pair, dim=1), functional.log_softmax(rest, dim=1)


def _decoupled_kl(
    student: Tensor, teacher: Tensor, target: Tensor, alpha: float, beta: float
) -> Tensor:
    """`alpha * TCKD + beta * NCKD` of two unnormalised log distributions [B, C], batch mean."""
    student_pair, student_rest = _split(student, target)
    teacher_pair, teacher_rest = _split(teacher, target)
    tckd = categorical_kl(teacher_pair, student_pair)
    nckd = categorical_kl(teacher_rest, student_rest)
    return (alpha * tckd + beta * nckd).mean()


@checked
def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    temperature: Scalar,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    standardize: bool = False,
) -> Tensor:
    """`T^2 * (alpha * TCKD + beta * NCKD)`, mean over the batch.

    TCKD is the KL, teacher first, of (target, all the rest); NCKD that of the softmax over
    the classes other than the target.

    Logits are [B, C], the target is int64 [B] and T > 0; returns 0-d, nats. `standardize`
    standardises both sides first (CVPR 2024). Inputs and what is raised: `ekd_ray.losses`.

    Zhao et al. 2022, eq. 7.
    """
    student, teacher = softmax_inputs(student_logits, teacher_logits, standardize)
    kl = _decoupled_kl(student / temperature, teacher / temperature, target, alpha, beta)
    return temperature**2 * kl


@checked
def expectation_dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    temperature: Scalar,
    *,
    log_prior: Scalar,
    teacher_log_prior: Scalar | None = None,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """`dkd_loss` on the Dirichlet expectations `a / S`, `a = exp(z / T) + e^lambda` (DKD+EKD).

    Logits are [B, C], the target is int64 [B], T > 0 and lambda the `log_prior`; returns 0-d,
    nats. Inputs and what is raised: `ekd_ray.losses`.

    EKD (ICCV 2025), first order, in Zhao et al. 2022, eq. 7.
    """
    prior = teacher_prior(log_prior, teacher_log_prior)
    student = log_concentration(student_logits, log_prior, temperature)
    teacher = log_concentration(teacher_logits.detach(), prior, temperature)
    return temperature**2 * _decoupled_kl(student, teacher, target, alpha, beta)


def _losses(out: Outputs) -> dict[str, Tensor]:
    loss = expectation_dkd_loss if out.method.evidential else dkd_loss
    value = loss(
        out.student,
        out.teacher,
        out.target,
        out.temperature,
        alpha=out.settings.dkd_alpha,
        beta=out.settings.dkd_beta,
        **out.statistics,
    )
    return {"kd": value}


DKD = register_method(
    "dkd",
    Method(
        settings=(
            TEMPERATURE,
            replace(CE_WEIGHT, search=log_range(0.1, 5.0)),
            replace(KD_WEIGHT, default=1.0, search=log_range(0.1, 5.0)),
            MethodSetting(
                name="kd_warmup", kind=int | None, default=share_of_epochs(20), low=0,
                in_epochs=True, neutral=False, doc="epochs over which DKD's kd_weight ramps up",
            ),
            MethodSetting(
                name="dkd_alpha", kind=float, default=1.0, low=0, neutral=False,
                doc="DKD: weight of the (target, rest) part",
            ),
            MethodSetting(
                name="dkd_beta", kind=float, default=8.0, low=0, neutral=False,
                doc="DKD: weight of the part among the other classes",
                search=log_range(0.5, 16.0),
            ),
            STANDARDIZE,
        ),
        terms=(
            CROSS_ENTROPY,
            Term(names=("kd",), weight="kd_weight", warmup="kd_warmup", loss=_losses),
        ),
    ),
)  # fmt: skip
register_method(
    "dkd+ekd",
    evidential(DKD, kd_weight={"default": 0.5, "search": {"low": 0.0, "high": 3.0, "step": 0.1}}),
)
