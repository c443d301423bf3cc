"""Distillation from a teacher whose probabilities are raised to a power, plain and weighted.

Zheng and Yang, "Knowledge distillation based on transformed teacher matching" (TTM and WTTM),
ICLR 2024.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ekd_ray.losses.inputs import Scalar, categorical_kl, checked
from ekd_ray.losses.kd import softmax_inputs

if TYPE_CHECKING:
    from torch import Tensor


@checked
def wttm_loss(
    student_logits: Tensor, teacher_logits: Tensor, exponent: Scalar, *, weighted: bool = True
) -> Tensor:
    """`n * KL(p^g / n || softmax(z_s))`, `p = softmax(z_t)`, `n = sum(p^g)`; mean over the batch.

    g is the `exponent` > 0; the student has no temperature. Without `weighted` (TTM) no row is
    multiplied by its n, which is the larger the less sure the teacher is.

    Logits are [B, C]; returns 0-d, nats. It is not 0 where the student equals the teacher, but
    for g = 1. Inputs and what is raised: `ekd_ray.losses`, and `ValueError` for g <= 0.

    Zheng and Yang, ICLR 2024: the power transform and the sample-adaptive weight.
    """
    if isinstance(exponent, int | float) and not exponent > 0:
        raise ValueError(f"exponent must be > 0, got {exponent}")
    student, teacher = softmax_inputs(student_logits, teacher_logits, standardize=False)
    powers = exponent * teacher.log_softmax(dim=1)
    log_n = powers.logsumexp(dim=1, keepdim=True)
    kl = categorical_kl(powers - log_n, student.log_softmax(dim=1))
    return (log_n[:, 0].exp() * kl if weighted else kl).mean()
