"""Refined logit distillation: the teacher's confidence, and its order among the classes that it
ranks below the label.

"Knowledge distillation with refined logits" (RLD), ICCV 2025.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ekd_ray.losses.inputs import Scalar, categorical_kl, checked, soften, times_square
from ekd_ray.losses.kd import softmax_inputs
from ekd_ray.losses.late_torch import torch

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
    teacher. Inputs and what is raised: `ekd_ray.losses`.

    RLD (ICCV 2025), sample confidence and masked correlation distillation.
    """
    student, teacher = softmax_inputs(student_logits, teacher_logits, standardize)
    confidence = _confidence_kl(
        soften(student, confidence_temperature), soften(teacher, confidence_temperature), target
    )
    below = teacher < teacher.gather(1, target[:, None])
    correlation = _masked_kl(soften(student, temperature), soften(teacher, temperature), below)
    return alpha * times_square(confidence.mean(), confidence_temperature) + beta * times_square(
        correlation.mean(), temperature
    )
