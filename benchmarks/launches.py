"""Operations of a step's loss, method by method: what binds small students on a GPU.

Every operation that torch runs, forward and backward, is a kernel that a GPU launches: 5 to 10
microseconds for the host, whatever its size. Views and allocations launch none and are left out.
The count is the same on every machine.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ekd_ray.config import DistillConfig
from ekd_ray.losses import METHODS, Objective, resolve_method

# What the backward pass and torch itself allocate, by the name of the operation.
_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
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
        if not func.is_view and name not in (*_ALLOCATIONS, "detach"):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def count_launches(method: str) -> Counter[str]:
    """The operations of a method's loss at its defaults, forward and backward, by name."""
    objective = Objective(resolve_method(DistillConfig(method=method)))
    logits = [torch.randn(_BATCH, _CLASSES, requires_grad=True) for _ in range(2)]
    teachers = [torch.randn(_BATCH, _CLASSES) for _ in range(2)]
    target = torch.randint(_CLASSES, (_BATCH,))
    factors = objective.factors(1)
    with LaunchCounter() as counter:
        total, _ = objective(
            logits[0], teachers[0], target, factors,
            student_strong=logits[1], teacher_strong=teachers[1],
        )  # fmt: skip
        total.backward()
    return counter.counts


def count_all() -> dict[str, int]:
    """The number of operations of every method's loss, by method."""
    return {method: count_launches(method).total() for method in METHODS}


if __name__ == "__main__":
    import sys

    for method in METHODS:
        if len(sys.argv) < 2 or method in sys.argv[1:]:
            counts = count_launches(method)
            print(method, counts.total(), dict(counts.most_common()) if len(sys.argv) > 1 else "")
