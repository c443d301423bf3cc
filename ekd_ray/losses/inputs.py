"""Checks and conversions that every loss applies to its inputs."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeAlias, TypeVar

from ekd_ray.losses.late_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

# A scalar setting: a number, or a 0-d tensor when it is learned.
Scalar: TypeAlias = "float | Tensor"

P = ParamSpec("P")
R = TypeVar("R")


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or unchanged when it is float64 already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Switch autocast off inside `function`, on the device of its first tensor."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        values: Iterable[object] = (*args, *kwargs.values())
        device = next((v.device.type for v in values if isinstance(v, torch.Tensor)), "cpu")
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapper


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Check the logits, `target` and `temperature` of a loss before it runs, without autocast.

    Logits are all parameters that are annotated `Tensor` but `target` and `cost`: floating [B, C]
    of one shape, as the functions below ask for them.
    """
    parameters = inspect.signature(function).parameters
    names = [
        name
        for name, parameter in parameters.items()
        if "Tensor" in (kind := parameter.annotation, getattr(kind, "__name__", None))
        and name not in ("target", "cost")
    ]
    positions = tuple(parameters)

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        given: dict[str, Any] = {**dict(zip(positions, args, strict=False)), **kwargs}
        if not given.keys() >= {*names}:
            return function(*args, **kwargs)  # which says what is missing
        logits = {name: given[name] for name in names}
        check_logits(**logits)
        if "target" in given:
            check_target(given["target"], logits[names[0]])
        if "temperature" in given:
            check_temperature(given["temperature"])
        return function(*args, **kwargs)

    return without_autocast(wrapper)


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


def check_temperature(temperature: Scalar, name: str = "temperature") -> None:
    """Raise `ValueError` unless it is a finite number > 0, or a 0-d tensor (value not read)."""
    if isinstance(temperature, torch.Tensor):
        if temperature.dim():
            raise ValueError(f"{name} must be 0-d, got shape {tuple(temperature.shape)}")
    elif not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"{name} must be finite and > 0, got {temperature}")


def scalar_like(value: Scalar, like: Tensor) -> Tensor:
    """A scalar as a 0-d tensor of the dtype and device of `like`; a number is not copied there."""
    return value.to(like) if isinstance(value, torch.Tensor) else like.new_full((), value)


def soften(logits: Tensor, temperature: Scalar) -> Tensor:
    """`z / T`, in at least float32; without the division, a launch, for the number 1."""
    logits = at_least_float32(logits)
    return logits if is_one(temperature) else logits / temperature


def times_square(loss: Tensor, temperature: Scalar) -> Tensor:
    """`T^2 * loss`; as `soften`, the loss itself for the number 1."""
    return loss if is_one(temperature) else temperature**2 * loss


def is_one(temperature: Scalar) -> bool:
    """Whether it is the number 1; a tensor's value is not read."""
    return not isinstance(temperature, torch.Tensor) and temperature == 1


def categorical_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`KL(p || q)` of normalised log-probabilities [..., C]; returns [...], nats."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def softened_kl(student: Tensor, teacher: Tensor, temperature: Scalar) -> Tensor:
    """`T^2 * KL`, teacher first, of log-masses [B, C] that are softened already; batch mean.

    A log-mass is the log of a probability without its norm: a logit, or the log of a Dirichlet's
    concentration.
    """
    log_p_teacher, log_p_student = (
        torch.nn.functional.log_softmax(logs, dim=1) for logs in (teacher, student)
    )
    return times_square(categorical_kl(log_p_teacher, log_p_student).mean(), temperature)
