"""Distillation of relations: correlations between predictions in place of their divergence.

Huang et al., "Knowledge distillation from a stronger teacher" (DIST), NeurIPS 2022.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ekd_ray.losses.inputs import Scalar, checked, soften, times_square
from ekd_ray.losses.kd import softmax_inputs
from ekd_ray.losses.late_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

# As released: rows without variance have a correlation of 0.
_EPSILON = 1e-8


def _mean_correlation(student: Tensor, teacher: Tensor) -> Tensor:
    """Pearson's correlation of the rows of two [N, M], 0-d mean over the rows."""
    student, teacher = (rows - rows.mean(dim=1, keepdim=True) for rows in (student, teacher))
    norms = torch.linalg.vector_norm(student, dim=1) * torch.linalg.vector_norm(teacher, dim=1)
    return ((student * teacher).sum(dim=1) / (norms + _EPSILON)).mean()


@checked
def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: Scalar,
    *,
    inter: Scalar = 1.0,
    intra: Scalar = 1.0,
) -> Tensor:
    """`T^2 * (inter * (1 - mean r over classes) + intra * (1 - mean r over samples))`.

    r is Pearson's correlation of `softmax(z_s / T)` and `softmax(z_t / T)`: for `inter` that of
    each sample's row, mean over the samples, for `intra` that of each class's column, mean over
    the classes. The latter compares the samples of a batch with each other.

    Logits are [B, C] and T > 0; returns 0-d, no unit. Inputs and what is raised:
    `ekd_ray.losses`.

    Huang et al. 2022, eq. 9 to 11.
    """
    student, teacher = softmax_inputs(student_logits, teacher_logits, standardize=False)
    p_student, p_teacher = (
        soften(logits, temperature).softmax(dim=1) for logits in (student, teacher)
    )
    rows = inter * (1 - _mean_correlation(p_student, p_teacher))
    columns = intra * (1 - _mean_correlation(p_student.mT, p_teacher.mT))
    return times_square(rows + columns, temperature)
