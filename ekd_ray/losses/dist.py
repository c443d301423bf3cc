"""Distillation of relations: correlations between predictions in place of their divergence.

Huang et al., "Knowledge distillation from a stronger teacher" (DIST), NeurIPS 2022.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ekd_ray.config.method_settings import MethodSetting
from ekd_ray.losses.cross_entropy import CROSS_ENTROPY
from ekd_ray.losses.evidential import evidential
from ekd_ray.losses.inputs import Scalar, checked, soften, times_square
from ekd_ray.losses.kd import KD_WEIGHT, TEMPERATURE, WHOLE_CE_WEIGHT, log_masses, softmax_inputs
from ekd_ray.losses.late_torch import torch
from ekd_ray.losses.methods import Method, Outputs, Term, log_range, register_method

if TYPE_CHECKING:
    from torch import Tensor

# Rows without variance have a correlation of 0. The released code adds it to the norms, by which
# equal rows would not have 1.
_EPSILON = 1e-8


def _mean_correlation(student: Tensor, teacher: Tensor) -> Tensor:
    """Pearson's correlation of the rows of two [N, M], 0-d mean over the rows."""
    student, teacher = (rows - rows.mean(dim=1, keepdim=True) for rows in (student, teacher))
    norms = torch.linalg.vector_norm(student, dim=1) * torch.linalg.vector_norm(teacher, dim=1)
    return ((student * teacher).sum(dim=1) / norms.clamp(min=_EPSILON)).mean()


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
    return _unlikeness(
        soften(student, temperature), soften(teacher, temperature), temperature, inter, intra
    )


def _unlikeness(
    student: Tensor, teacher: Tensor, temperature: Scalar, inter: Scalar, intra: Scalar
) -> Tensor:
    """`dist_loss` of log-masses [B, C] that are softened already."""
    p_student, p_teacher = student.softmax(dim=1), teacher.softmax(dim=1)
    rows = inter * (1 - _mean_correlation(p_student, p_teacher))
    columns = intra * (1 - _mean_correlation(p_student.mT, p_teacher.mT))
    return times_square(rows + columns, temperature)


def _losses(out: Outputs) -> dict[str, Tensor]:
    masses, settings = log_masses(out, out.temperature), out.settings
    value = _unlikeness(*masses, out.temperature, settings.dist_inter, settings.dist_intra)
    return {"kd": value}


# The authors' values for CIFAR-100; for ImageNet they have 1, 1 and T = 1.
DIST = register_method(
    "dist",
    Method(
        doc="correlations within samples and within classes (DIST, NeurIPS 2022)",
        settings=(
            TEMPERATURE,
            WHOLE_CE_WEIGHT,
            replace(KD_WEIGHT, default=1.0, search=log_range(0.1, 5.0)),
            MethodSetting(
                name="dist_inter", kind=float, default=2.0, low=0,
                doc="DIST: weight of the correlation between the classes of a sample",
            ),
            MethodSetting(
                name="dist_intra", kind=float, default=2.0, low=0,
                doc="DIST: weight of the correlation between the samples of a class",
                search=log_range(0.2, 10.0),
            ),
        ),
        terms=(
            CROSS_ENTROPY,
            Term(
                names=("kd",), weight="kd_weight", loss=_losses, is_divergence=True,
                couples_samples=True,
            ),
        ),
    ),
)  # fmt: skip
# No results are published for it: the softmax method's weight with EKD's others.
register_method(
    "dist+ekd",
    evidential(DIST, kd_weight={"default": 1.0, "search": {"low": 0.0, "high": 5.0, "step": 0.1}}),
)
