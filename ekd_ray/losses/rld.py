"""Refined logit distillation: the teacher's confidence, and its order among the classes that it
ranks below the label.

"Knowledge distillation with refined logits" (RLD), ICCV 2025.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ekd_ray.config.method_settings import MethodSetting
from ekd_ray.losses.cross_entropy import CROSS_ENTROPY
from ekd_ray.losses.dkd import KD_WARMUP
from ekd_ray.losses.evidential import evidential
from ekd_ray.losses.inputs import (
    Scalar,
    categorical_kl,
    check_temperature,
    checked,
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
from ekd_ray.losses.methods import Method, Outputs, Term, log_range, register_method

if TYPE_CHECKING:
    from torch import Tensor


def _split_off(logs: Tensor, index: Tensor) -> Tensor:
    """Log-probabilities [B, 2] of (one class, all others) from unnormalised ones [B, C].

    `index` [B] int64 names that class of each row.
    """
    column = index[:, None]
    others = logs.scatter(1, column, torch.finfo(logs.dtype).min / 2)
    pair = torch.cat([logs.gather(1, column), others.logsumexp(dim=1, keepdim=True)], dim=1)
    return pair.log_softmax(dim=1)


def _confidence_kl(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """SCD: KL of (the teacher's top class, the rest) from (the student's target, the rest).

    Unnormalised log-probabilities [B, C] and target int64 [B] give [B], nats.
    """
    return categorical_kl(_split_off(teacher, teacher.argmax(dim=1)), _split_off(student, target))


def _masked_kl(student: Tensor, teacher: Tensor, below: Tensor) -> Tensor:
    """MCD: KL, teacher first, over the classes that `below` [B, C] keeps.

    Unnormalised log-probabilities [B, C] give [B], nats; 0 for a row that keeps none.
    """
    # Two of the lowest numbers still have a finite difference: what is masked adds exactly 0.
    lowest = torch.finfo(student.dtype).min / 2
    return categorical_kl(
        *(logs.masked_fill(~below, lowest).log_softmax(dim=1) for logs in (teacher, student))
    )


def _ranked_below(teacher_logits: Tensor, target: Tensor) -> Tensor:
    """Bool [B, C], the classes that the teacher has below the label; of the logits as they are,
    because a large prior makes small concentrations equal."""
    return teacher_logits < teacher_logits.gather(1, target[:, None])


@checked
def rld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    temperature: Scalar,
    *,
    confidence_temperature: Scalar = 1.0,
    alpha: Scalar = 1.0,
    beta: Scalar = 8.0,
    standardize: bool = False,
) -> Tensor:
    """`alpha * SCD + beta * MCD`, mean over the batch.

    With A the `confidence_temperature`, SCD is `A^2 * KL((p_t, 1 - p_t) || (p_s, 1 - p_s))` of
    `p_t = max softmax(z_t / A)` and `p_s = softmax(z_s / A)[y]`: the student is to be as sure of
    the label as the teacher is of its own answer. MCD is `T^2 * KL(softmax(z_t / T) ||
    softmax(z_s / T))` over the classes with `z_t < z_t[y]`; a row without one adds 0.

    Logits are [B, C], the target is int64 [B], T and A > 0; returns 0-d, nats. `standardize`
    standardises both sides first (CVPR 2024). It need not be 0 where the student equals the
    teacher. Inputs and what is raised: `ekd_ray.losses`; A as T.

    RLD (ICCV 2025), sample confidence and masked correlation distillation.
    """
    check_temperature(confidence_temperature, "confidence_temperature")
    both = softmax_inputs(student_logits, teacher_logits, standardize)
    student, teacher = (soften(logits, confidence_temperature) for logits in both)
    confidence = _confidence_kl(student, teacher, target).mean()
    student, teacher = (soften(logits, temperature) for logits in both)
    correlation = _masked_kl(student, teacher, _ranked_below(teacher_logits, target)).mean()
    return alpha * times_square(confidence, confidence_temperature) + beta * times_square(
        correlation, temperature
    )


def _losses(out: Outputs) -> dict[str, Tensor]:
    settings, own = out.settings, out.settings.rld_confidence_temperature
    confidence = _confidence_kl(*log_masses(out, own), out.target).mean()
    below = _ranked_below(out.teacher, out.target)
    correlation = _masked_kl(*log_masses(out, out.temperature), below).mean()
    return {
        "kd": settings.rld_alpha * times_square(confidence, own)
        + settings.rld_beta * times_square(correlation, out.temperature)
    }


RLD = register_method(
    "rld",
    Method(
        doc="the teacher's confidence, and its order below the label (RLD, ICCV 2025)",
        settings=(
            TEMPERATURE,
            WHOLE_CE_WEIGHT,
            replace(KD_WEIGHT, default=1.0, search=log_range(0.1, 5.0)),
            KD_WARMUP,
            MethodSetting(
                name="rld_alpha", kind=float, default=1.0, low=0,
                doc="RLD: weight of the teacher's confidence",
            ),
            MethodSetting(
                name="rld_beta", kind=float, default=8.0, low=0,
                doc="RLD: weight of the part among the classes that the teacher ranks below the "
                "label",
                search=log_range(0.5, 16.0),
            ),
            MethodSetting(
                name="rld_confidence_temperature", kind=float, default=1.0, low=0.01, high=100,
                doc="RLD: softening T of the teacher's confidence",
            ),
            STANDARDIZE,
        ),
        terms=(
            CROSS_ENTROPY,
            Term(names=("kd",), weight="kd_weight", warmup="kd_warmup", loss=_losses),
        ),
    ),
)  # fmt: skip
# No results are published for it: the softmax method's weight with EKD's others.
register_method(
    "rld+ekd",
    evidential(RLD, kd_weight={"default": 1.0, "search": {"low": 0.0, "high": 3.0, "step": 0.1}}),
)
