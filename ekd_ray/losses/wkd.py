"""Distillation by optimal transport between classes, whose cost is how unlike they are.

Lv et al., "Wasserstein distance rivals Kullback-Leibler divergence for knowledge distillation"
(WKD, its form for logits), NeurIPS 2024.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ekd_ray.config.method_settings import MethodSetting
from ekd_ray.losses.cross_entropy import CROSS_ENTROPY
from ekd_ray.losses.evidential import evidential
from ekd_ray.losses.inputs import Scalar, at_least_float32, checked, soften, without_autocast
from ekd_ray.losses.kd import KD_WEIGHT, TEMPERATURE, WHOLE_CE_WEIGHT, log_masses, softmax_inputs
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

_EPSILON = 1e-8  # as released, of costs and of the denominators


@without_autocast
def class_cosines(prototypes: Tensor) -> Tensor:
    """Cosines [C, C] between the rows of a classifier, `prototypes` [C, D].

    float32 (float64 for float64), without gradient. Raises `ValueError` for another shape.
    """
    if prototypes.dim() != 2 or prototypes.shape[0] < 2 or prototypes.shape[1] < 1:
        shape = tuple(prototypes.shape)
        raise ValueError(f"prototypes must be [C, D] with C >= 2 and D >= 1, got {shape}")
    rows = torch.nn.functional.normalize(at_least_float32(prototypes.detach()), dim=1)
    return rows @ rows.mT


@without_autocast
def class_cost(prototypes: Tensor, *, sharpen: float = 1.0) -> Tensor:
    """`max(1 - exp(-sharpen * (1 - cos)), 0) + 1e-8` between classes, from the teacher's own rows.

    `prototypes` [C, D], C >= 2, are the weights of its last layer, a row a class; `sharpen` > 0.
    Returns [C, C] in (0, 1), float32 (float64 for float64), without gradient. Raises
    `ValueError` for another shape or `sharpen`.

    Lv et al. 2024, cost of the discrete Wasserstein distance.
    """
    if not sharpen > 0:
        raise ValueError(f"sharpen must be > 0, got {sharpen}")
    return _cost(class_cosines(prototypes), sharpen)


def _cost(cosines: Tensor, sharpen: Scalar) -> Tensor:
    return (1 - (-sharpen * (1 - cosines)).exp()).clamp(min=0.0) + _EPSILON


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

    Logits are [B, C], the target is int64 [B] and T > 0; returns 0-d: the first part in nats, the
    second in units of the cost. It is not 0 where the student equals the teacher. Inputs and what
    is raised: `ekd_ray.losses`, and `ValueError` for a cost of another shape, an epsilon <= 0 or
    fewer iterations than 1.

    Lv et al. 2024, WKD-L.
    """
    classes = student_logits.shape[1]
    if tuple(cost.shape) != (classes, classes):
        raise ValueError(f"cost must be [C, C] of the {classes} classes, got {tuple(cost.shape)}")
    if not sinkhorn_epsilon > 0:
        raise ValueError(f"sinkhorn_epsilon must be > 0, got {sinkhorn_epsilon}")
    if sinkhorn_iterations < 1:
        raise ValueError(f"sinkhorn_iterations must be >= 1, got {sinkhorn_iterations}")
    student, teacher = softmax_inputs(student_logits, teacher_logits, standardize=False)
    transport = _transport(
        soften(student, temperature), soften(teacher, temperature), target, cost.to(student),
        sinkhorn_epsilon, sinkhorn_iterations,
    )  # fmt: skip
    return _on_target(student, teacher, target) + weight * transport


def _on_target(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """`-p_t[y] * log p_s[y]` of log-masses [B, C], mean over the batch."""
    column = target[:, None]
    sure = teacher.softmax(dim=1).gather(1, column)
    return -(sure * student.log_softmax(dim=1).gather(1, column)).mean()


def _transport(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    cost: Tensor,
    epsilon: Scalar,
    iterations: int,
) -> Tensor:
    """Sinkhorn's transport of log-masses [B, C] without the target's, mean over the batch.

    With no mass on the target, its row and column of the cost take no part, so that all rows of
    the batch share one kernel [C, C].
    """
    column = target[:, None]
    student, teacher = (
        logs.scatter(1, column, -torch.inf).softmax(dim=1) for logs in (student, teacher)
    )
    kernel = (-cost / epsilon).exp()
    v = u = torch.full_like(student, 1 / (student.shape[1] - 1)).scatter(1, column, 0.0)
    for _ in range(iterations):
        v = teacher / (u @ kernel + _EPSILON)
        u = student / (v @ kernel.mT + _EPSILON)
    return ((u @ (kernel * cost)) * v).sum(dim=1).mean()


def _target_losses(out: Outputs) -> dict[str, Tensor]:
    return {"kd": _on_target(*log_masses(out, 1.0), out.target)}


def _transport_losses(out: Outputs) -> dict[str, Tensor]:
    settings, masses = out.settings, log_masses(out, out.temperature)
    cost = _cost(out.class_cosines, settings.wkd_sharpen)
    epsilon, iterations = settings.wkd_epsilon, settings.wkd_iterations
    return {"transport": _transport(*masses, out.target, cost, epsilon, iterations)}


# The authors' values for resnet32x4 -> resnet8x4.
WKD = register_method(
    "wkd",
    Method(
        doc="optimal transport between alike classes (WKD, NeurIPS 2024)",
        settings=(
            replace(TEMPERATURE, default=8.0),
            WHOLE_CE_WEIGHT,
            replace(KD_WEIGHT, default=1.0, search=None),
            MethodSetting(
                name="wkd_weight", kind=float, default=600.0, low=0,
                doc="WKD: weight of the transport between the classes other than the label",
                search=log_range(10.0, 1000.0),
            ),
            MethodSetting(
                name="wkd_decay", kind=int | None, default=share_of_epochs(150), low=0,
                in_epochs=True,
                doc="WKD: epoch after which wkd_weight falls by a half cosine, to 0 in the last",
            ),
            MethodSetting(
                name="wkd_sharpen", kind=float, default=1.0, low=0.01, high=100,
                doc="WKD: how steeply the cost grows with the angle between two classes",
                search=log_range(0.5, 4.0),
            ),
            MethodSetting(
                name="wkd_epsilon", kind=float, default=0.05, low=0.005, high=10,
                doc="WKD: entropic regularisation of the transport",
            ),
            MethodSetting(
                name="wkd_iterations", kind=int, default=10, low=1, high=1000,
                doc="WKD: iterations of Sinkhorn",
            ),
        ),
        terms=(
            CROSS_ENTROPY,
            Term(names=("kd",), weight="kd_weight", loss=_target_losses),
            Term(
                names=("transport",), weight="wkd_weight", decay="wkd_decay",
                loss=_transport_losses,
            ),
        ),
        class_cosines=True,
    ),
)  # fmt: skip
# No results are published for it: the softmax method's weights with EKD's others.
register_method(
    "wkd+ekd",
    evidential(WKD, kd_weight={"default": 1.0, "search": {"low": 0.0, "high": 3.0, "step": 0.1}}),
)
