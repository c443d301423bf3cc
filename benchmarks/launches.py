"""Operations of a training step, method by method: what binds small students on a GPU.

Every operation that torch runs, forward and backward, is a kernel that the host launches, which
takes it some microseconds whatever the size. Views and allocations launch none and are left out.
The counts are the same on every machine.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ekd_ray.config import DistillConfig
from ekd_ray.losses import METHODS, Objective, resolve_method
from ekd_ray.losses.method_checks import draw_cosines
from ekd_ray.models import build_model

STUDENTS = ("resnet8x4", "resnet20", "vgg8", "wrn_16_2")
# What torch does not mark as a view, and allocations.
_FREE = ("detach", "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty",
         "new_empty_strided")  # fmt: skip
_BATCH, _CLASSES = 64, 100


class LaunchCounter(TorchDispatchMode):
    """Counts the operations that compute something, by name, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and name not in _FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def count_loss(method: str, **settings: Any) -> Counter[str]:
    """The operations of a method's loss of one step, forward and backward, by name."""
    objective = Objective(resolve_method(DistillConfig(method=method, **settings)))
    students = [torch.randn(_BATCH, _CLASSES, requires_grad=True) for _ in range(2)]
    teachers = [torch.randn(_BATCH, _CLASSES) for _ in range(2)]
    target, factors = torch.randint(_CLASSES, (_BATCH,)), objective.factors(1)
    cosines = draw_cosines(_CLASSES)
    with LaunchCounter() as counter:
        total, _ = objective(
            students[0], teachers[0], target, factors,
            student_strong=students[1], teacher_strong=teachers[1],
            class_cosines=cosines,
        )  # fmt: skip
        total.backward()
    return counter.counts


def count_network(name: str) -> Counter[str]:
    """The operations of a network on one batch of CIFAR's size, forward and backward, by name."""
    model = build_model(name, _CLASSES)
    with LaunchCounter() as counter:
        model(torch.randn(2, 3, 32, 32)).sum().backward()
    return counter.counts


def measure() -> dict[str, dict[str, int]]:
    """The number of operations of every method's loss and of the students' networks."""
    return {
        "loss": {method: count_loss(method).total() for method in METHODS},
        "network": {name: count_network(name).total() for name in STUDENTS},
    }
