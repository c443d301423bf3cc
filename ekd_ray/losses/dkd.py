"""Decoupled distillation, on softmax statistics and on Dirichlet expectations.

Zhao et al., "Decoupled knowledge distillation", CVPR 2022; with EKD (ICCV 2025).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ekd_ray.config.method_settings import MethodSetting
from ekd_ray.losses.cross_entropy import CROSS_ENTROPY
from ekd_ray.losses.dirichlet import log_concentration, teacher_prior
from ekd_ray.losses.evidential import evidential
from ekd_ray.losses.inputs import (
    Scalar,
    categorical_kl,
    checked,
    is_one,
    soften,
    times_square,
)
from ekd_ray.losses.kd import (
    KD_WEIGHT,
    STANDARDIZE,
    TEMPERATURE,
    WHOLE_CE_WEIGHT,
    log_masses,
    softmax_inputs,
)
from ekd_ray.losses.late_torch import torch
from ekd_ray.losses.methods import (
    Method,
    Outputs,
    Term,
    log_range,
    register_method,
    share_of_epochs,
)

if TYPE_CHECKING:
    from torch import Tensor


def _decoupled_kl(
    student: Tensor, teacher: Tensor, target: Tensor, alpha: Scalar, beta: Scalar
) -> Tensor:
    """`alpha * TCKD + beta * NCKD` of two unnormalised log distributions [B, C], batch mean.

    The published code subtracts 1000 from the target's column before the softmax over the rest,
    which fails once logits differ by 1000. Here it gets the lowest number whose differences are
    finite: its probability is 0 and it adds nothing.
    """
    logs = torch.stack([teacher, student])
    column = target[None, :, None].expand(2, -1, -1)
    rest = logs.scatter(2, column, torch.finfo(logs.dtype).min / 2)
    log_rest = rest.logsumexp(dim=2, keepdim=True)
    pair = torch.cat([logs.gather(2, column), log_rest], dim=2)
    tckd = categorical_kl(*pair.log_softmax(dim=2))
    nckd = categorical_kl(*(rest - log_rest))
    return ((tckd if is_one(alpha) else alpha * tckd) + beta * nckd).mean()


@checked
def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    temperature: Scalar,
    *,
    alpha: Scalar = 1.0,
    beta: Scalar = 8.0,
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
    student, teacher = soften(student, temperature), soften(teacher, temperature)
    return times_square(_decoupled_kl(student, teacher, target, alpha, beta), temperature)


@checked
def expectation_dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    temperature: Scalar,
    *,
    log_prior: Scalar,
    teacher_log_prior: Scalar | None = None,
    alpha: Scalar = 1.0,
    beta: Scalar = 8.0,
) -> Tensor:
    """`dkd_loss` on the Dirichlet expectations `a / S`, `a = exp(z / T) + e^lambda` (DKD+EKD).

    Logits are [B, C], the target is int64 [B], T > 0 and lambda the `log_prior`; returns 0-d,
    nats. Inputs and what is raised: `ekd_ray.losses`.

    EKD (ICCV 2025), first order, in Zhao et al. 2022, eq. 7.
    """
    prior = teacher_prior(log_prior, teacher_log_prior)
    student = log_concentration(student_logits, log_prior, temperature)
    teacher = log_concentration(teacher_logits.detach(), prior, temperature)
    return times_square(_decoupled_kl(student, teacher, target, alpha, beta), temperature)


def _losses(out: Outputs) -> dict[str, Tensor]:
    alpha, beta = out.settings.dkd_alpha, out.settings.dkd_beta
    kl = _decoupled_kl(*log_masses(out, out.temperature), out.target, alpha, beta)
    return {"kd": times_square(kl, out.temperature)}


KD_WARMUP = MethodSetting(
    name="kd_warmup", kind=int | None, default=share_of_epochs(20), low=0, in_epochs=True,
    neutral=False, doc="epochs over which kd_weight ramps up linearly",
)  # fmt: skip
DKD = register_method(
    "dkd",
    Method(
        doc="the label and the other classes apart (DKD, CVPR 2022)",
        settings=(
            TEMPERATURE,
            WHOLE_CE_WEIGHT,
            replace(KD_WEIGHT, default=1.0, search=log_range(0.1, 5.0)),
            KD_WARMUP,
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
            Term(
                names=("kd",), weight="kd_weight", warmup="kd_warmup", loss=_losses,
                is_divergence=True,
            ),
        ),
    ),
)  # fmt: skip
register_method(
    "dkd+ekd",
    evidential(DKD, kd_weight={"default": 0.5, "search": {"low": 0.0, "high": 3.0, "step": 0.1}}),
)
