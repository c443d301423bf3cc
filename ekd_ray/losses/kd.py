"""Distillation with softmax statistics, and what every loss of this room does to its inputs.

Hinton et al., "Distilling the knowledge in a neural network", 2015; Sun et al., "Logit
standardization in knowledge distillation", CVPR 2024.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import ParamSpec

import torch
from torch import Tensor
from torch.nn import functional

# A scalar setting: a number, or a 0-d tensor when it is learned.
Scalar = float | Tensor

# Sun et al. 2024, eq. 10 as released: keeps a row of equal logits finite.
STANDARDIZE_EPSILON = 1e-7

P = ParamSpec("P")


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or unchanged when it is float64 already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def without_autocast(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Switch autocast off inside `function`, on the device of its first tensor."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        values: Iterable[object] = (*args, *kwargs.values())
        device = next((v.device.type for v in values if isinstance(v, Tensor)), "cpu")
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapper


def check_logits(**tensors: Tensor) -> None:
    """Raise `ValueError` unless all are floating [B, C], of one shape, with B >= 1 and C >= 2."""
    first = next(iter(tensors))
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if tensor.dim() != 2 or shape[0] < 1 or shape[1] < 2:
            raise ValueError(f"{name} must be [B, C] with B >= 1 and C >= 2, got {shape}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.shape != tensors[first].shape:
            expected = tuple(tensors[first].shape)
            raise ValueError(f"{name} must have the shape of {first}, {expected}, got {shape}")


def check_target(target: Tensor, logits: Tensor) -> None:
    """Raise `ValueError` unless `target` is int64 [B]. Its values are not read: that would sync."""
    expected = tuple(logits.shape[:1])
    if tuple(target.shape) != expected:
        raise ValueError(f"target must have shape {expected}, got {tuple(target.shape)}")
    if target.dtype != torch.int64:
        raise ValueError(f"target must be int64, got {target.dtype}")


def check_temperature(temperature: Scalar) -> None:
    """Raise `ValueError` unless it is a finite number > 0, or a 0-d tensor (value not read)."""
    if isinstance(temperature, Tensor):
        if temperature.dim():
            raise ValueError(f"temperature must be 0-d, got shape {tuple(temperature.shape)}")
    elif not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be finite and > 0, got {temperature}")


def categorical_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`KL(p || q)` of each row, from normalised log-probabilities [B, C]; returns [B], nats."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


@without_autocast
def standardize_logits(logits: Tensor) -> Tensor:
    """`(z - mean(z)) / (1e-7 + std(z))` of each row, sample standard deviation (n - 1).

    Args:
        logits: [B, C], any float dtype.

    Returns:
        [B, C], float32 (float64 for float64), mean 0 and standard deviation 1.

    Raises:
        ValueError: logits that are not a floating [B, C] with B >= 1 and C >= 2.

    Sun et al., CVPR 2024, "Z-score pre-process".
    """
    check_logits(logits=logits)
    logits = at_least_float32(logits)
    # The shift changes nothing mathematically, but makes a row of equal large logits exactly
    # zero: otherwise the rounding of its mean would be divided by 1e-7.
    logits = logits - logits.detach().amax(dim=1, keepdim=True)
    centred = logits - logits.mean(dim=1, keepdim=True)
    return centred / (STANDARDIZE_EPSILON + logits.std(dim=1, keepdim=True))


@without_autocast
def kd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: Scalar,
    *,
    standardize: bool = False,
) -> Tensor:
    """`T^2 * KL(softmax(z_t / T) || softmax(z_s / T))`, mean over the batch.

    Args:
        student_logits: [B, C], any float dtype; computed in float32, in float64 if it is that.
        teacher_logits: [B, C], any float dtype; gets no gradient.
        temperature: T > 0; a 0-d tensor (learned, CTKD) gets its gradient from both sides.
        standardize: standardise both sides first (`standardize_logits`; CVPR 2024).

    Returns:
        0-d, nats, times T^2.

    Raises:
        ValueError: shapes that differ or are not [B, C] with B >= 1, C >= 2; T <= 0.

    Hinton et al. 2015, section 2: T^2 keeps the gradients' size independent of T.
    """
    check_logits(student_logits=student_logits, teacher_logits=teacher_logits)
    check_temperature(temperature)
    student, teacher = softmax_inputs(student_logits, teacher_logits, standardize)
    log_p_teacher = functional.log_softmax(teacher / temperature, dim=1)
    log_p_student = functional.log_softmax(student / temperature, dim=1)
    return temperature**2 * categorical_kl(log_p_teacher, log_p_student).mean()


def softmax_inputs(
    student_logits: Tensor, teacher_logits: Tensor, standardize: bool
) -> tuple[Tensor, Tensor]:
    """Both sides in at least float32, the teacher's detached, standardised if asked for."""
    student, teacher = at_least_float32(student_logits), at_least_float32(teacher_logits.detach())
    if standardize:
        student, teacher = standardize_logits(student), standardize_logits(teacher)
    return student, teacher
