"""Targets of a study: its metric, further objectives, constraints, and their trade-off."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ekd_ray.config.settings import MOST_EPOCHS
from ekd_ray.errors import UserError, shorten, unknown_name

# What the rows of a trial's epochs carry, and which way each is better.
DIRECTIONS = {
    "val_top1": "max",
    "val_balanced_top1": "max",
    "val_worst_recall": "max",
    "val_nll": "min",
    "val_ece": "min",
    "val_aurc": "min",
    "val_ood_auroc": "max",
    "val_mi_auroc": "max",
    "val_vacuity_corr": "max",
    "parameters": "min",
    "flops": "min",
    "latency_ms": "min",
}
METRICS = tuple(name for name in DIRECTIONS if name.startswith("val_"))
OF_OTHERS = ("val_ood_auroc", "val_mi_auroc")  # of images of a second data set
OF_CLASSES = ("val_balanced_top1", "val_worst_recall")  # made of the recall of each class
COSTS = tuple(name for name in DIRECTIONS if name not in METRICS)  # of the student alone
# Validation images: of fewer the 95 % interval of an accuracy is wider than 10 points to each side.
LEAST_HELD_OUT = 100
MOST_FIGURE = 1e100  # of what is recorded, either sign: squares and sums of it are finite
_MOST_SECONDS = 1e10
# Metrics of any split that are from 0 to 1.
_SHARES = ("top1", "top5", "ece", "aurc", "auroc", "recall")

T = TypeVar("T")
_CONSTRAINT = re.compile(r"\s*(\w+)\s*(<=|>=)\s*(\S+)\s*$")


@dataclass(frozen=True, kw_only=True)
class PictureCounts:
    """How many pictures of a study's data there are to judge by; None where that is not known.

    Attributes:
        validation_images: on which trials are compared.
        smallest_class_images: those of the class that has the fewest of them.
        test_images: of the test split.
    """

    validation_images: int | None = None
    smallest_class_images: int | None = None
    test_images: int | None = None


def figure_limits(name: str) -> tuple[float, float]:
    """The least and the largest value that a figure of an epoch can have."""
    if name == "epoch":
        return 1, MOST_EPOCHS
    if name.startswith(("train_", "val_", "test_")) and name.endswith(_SHARES):
        return -1e-6, 1 + 1e-6  # a mean of floats may be beside its bound
    if name == "seconds":
        return 0, _MOST_SECONDS
    return (0 if name in COSTS else -MOST_FIGURE), MOST_FIGURE


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """A bound that a configuration has to keep: `metric` <= or >= `bound`."""

    metric: str
    sense: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Constraint:
        """From `METRIC<=NUMBER` or `METRIC>=NUMBER`; raises `UserError` for anything else."""
        match = _CONSTRAINT.match(text)
        try:
            bound = float(match[3]) if match else float("nan")
        except ValueError:
            bound = float("nan")
        if not match or not abs(bound) < float("inf"):
            raise UserError(
                f"a constraint must be METRIC<=NUMBER or METRIC>=NUMBER, got {shorten(text)}.",
                keys=(),
            )
        if match[1] not in DIRECTIONS:
            raise unknown_name("metric in a constraint:", match[1], DIRECTIONS, keys=())
        return cls(metric=match[1], sense=match[2], bound=bound)

    @property
    def text(self) -> str:
        """`METRIC<=NUMBER`, as `parse` takes it."""
        return f"{self.metric}{self.sense}{repr(self.bound).removesuffix('.0')}"

    def violation(self, row: Mapping[str, float | None]) -> float:
        """By how much a row breaks it: <= 0 if it keeps it, infinite if the metric is missing."""
        value = row.get(self.metric)
        if value is None:
            return float("inf")
        return value - self.bound if self.sense == "<=" else self.bound - value


def total_violation(constraints: Sequence[Constraint], row: Mapping[str, float | None]) -> float:
    """How far a row is from keeping all constraints, in parts of each bound; 0 if it does."""
    return sum(max(0.0, c.violation(row)) / (abs(c.bound) or 1.0) for c in constraints)


def pareto_front(
    rows: Sequence[Mapping[str, float | None]], objectives: Sequence[str]
) -> list[int]:
    """Indices of the rows that no other row is at least as good as in all and better in one.

    Rows that lack an objective are on no front. Equal rows are on it together.
    """
    points = {
        index: [as_loss(row[name], name) for name in objectives]  # type: ignore[arg-type]
        for index, row in enumerate(rows)
        if all(row.get(name) is not None for name in objectives)
    }
    front: list[int] = []
    # What dominates a point comes before it in this order, and so does one of the front that does.
    for index in sorted(points, key=points.__getitem__):
        if not any(_dominates(points[other], points[index]) for other in front):
            front.append(index)
    return sorted(front)


def largest_is_best(name: str) -> bool:
    """Whether a metric, of whichever split, is the better the larger."""
    return DIRECTIONS.get(name.replace("test_", "val_", 1), "max") == "max"


def as_loss(value: float, name: str) -> float:
    """A metric's value, or its negative where larger is better: the smaller the better."""
    return -value if DIRECTIONS[name] == "max" else value


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)


def evenly_spaced(front: Sequence[T], count: int) -> list[T]:
    """At most `count` of a front's members (sorted by an objective), evenly, both ends included."""
    if count >= len(front):
        return list(front)
    if count == 1:
        return [front[0]]
    step = (len(front) - 1) / (count - 1)
    return [front[round(index * step)] for index in range(count)]
