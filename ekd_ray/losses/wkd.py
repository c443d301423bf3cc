"""Distillation by optimal transport between classes, whose cost is how unlike they are.

Lv et al., "Wasserstein distance rivals Kullback-Leibler divergence for knowledge distillation"
(WKD, its form for logits), NeurIPS 2024.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ekd_ray.losses.inputs import Scalar, at_least_float32, checked, soften, without_autocast
from ekd_ray.losses.kd import softmax_inputs
from ekd_ray.losses.late_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

_EPSILON = 1e-8  # as released, of costs and of the denominators


@without_autocast
def class_cost(prototypes: Tensor, *, sharpen: float = 1.0) -> Tensor:
    """`max(1 - exp(-sharpen * (1 - cos)), 0) + 1e-8` between classes, from the teacher's own rows.

    `prototypes` [C, D], C >= 2, are the weights of its last layer, a row a class; `sharpen` > 0.
    Returns [C, C] in (0, 1), float32 (float64 for float64), without gradient. Raises
    `ValueError` for another shape or `sharpen`.

    Lv et al. 2024, cost of the discrete Wasserstein distance.
    """
    if prototypes.dim() != 2 or prototypes.shape[0] < 2 or prototypes.shape[1] < 1:
        shape = tuple(prototypes.shape)
        raise ValueError(f"prototypes must be [C, D] with C >= 2 and D >= 1, got {shape}")
    if not sharpen > 0:
        raise ValueError(f"sharpen must be > 0, got {sharpen}")
    rows = torch.nn.functional.normalize(at_least_float32(prototypes.detach()), dim=1)
    return (1 - (-sharpen * (1 - rows @ rows.mT)).exp()).clamp(min=0.0) + _EPSILON


@checked
def wasserstein_kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    temperature: Scalar,
    *,
    cost: Tensor,
    weight: Scalar = 1.0,
    sinkhorn_epsilon: float = 0.05,
    sinkhorn_iterations: int = 10,
) -> Tensor:
    """`-softmax(z_t)[y] * log_softmax(z_s)[y] + weight * W`, mean over the batch.

    W is the transport between `softmax(z_s / T)` and `softmax(z_t / T)` of the classes other than
    the target, at `cost` [C, C] (`class_cost`), by Sinkhorn's iterations: `K = exp(-cost / eps)`,
    `v = p_t / (K'u + 1e-8)` and `u = p_s / (K v + 1e-8)`, from `u = 1 / (C - 1)`.

    Logits are [B, C] with C >= 3, the target is int64 [B] and T > 0; returns 0-d: the first part
    in nats, the second in units of the cost. It is not 0 where the student equals the teacher.
    Inputs and what is raised: `ekd_ray.losses`, and `ValueError` for a cost of another shape, an
    epsilon <= 0 or fewer iterations than 1.

    Lv et al. 2024, WKD-L.
    """
    classes = student_logits.shape[1]
    if tuple(cost.shape) != (classes, classes) or classes < 3:
        raise ValueError(
            f"cost must be [C, C] of the {classes} classes, C >= 3, got {tuple(cost.shape)}"
        )
    if not sinkhorn_epsilon > 0:
        raise ValueError(f"sinkhorn_epsilon must be > 0, got {sinkhorn_epsilon}")
    if sinkhorn_iterations < 1:
        raise ValueError(f"sinkhorn_iterations must be >= 1, got {sinkhorn_iterations}")
    student, teacher = softmax_inputs(student_logits, teacher_logits, standardize=False)
    column = target[:, None]
    sure = teacher.softmax(dim=1).gather(1, column)
    on_target = -(sure * student.log_softmax(dim=1).gather(1, column)).mean()
    p_student, p_teacher = (
        soften(logits, temperature).scatter(1, column, -torch.inf).softmax(dim=1)
        for logits in (student, teacher)
    )
    transport = _transport(
        p_student, p_teacher, column, cost.to(student), sinkhorn_epsilon, sinkhorn_iterations
    )
    return on_target + weight * transport.mean()


def _transport(
    student: Tensor,
    teacher: Tensor,
    left_out: Tensor,
    cost: Tensor,
    epsilon: float,
    iterations: int,
) -> Tensor:
    """Sinkhorn's transport [B] between rows [B, C], which are 0 at the class `left_out` [B, 1].

    With no mass there, its row and column of the cost take no part, so that all rows share one
    kernel [C, C].
    """
    kernel = (-cost / epsilon).exp()
    classes = student.shape[1]
    u = torch.full_like(student, 1 / (classes - 1)).scatter(1, left_out, 0.0)
    v = u
    for _ in range(iterations):
        v = teacher / (u @ kernel + _EPSILON)
        u = student / (v @ kernel.mT + _EPSILON)
    return ((u @ (kernel * cost)) * v).sum(dim=1)
