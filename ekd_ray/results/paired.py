"""The difference between two configurations that ran under the same seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

LEVEL = 0.95
# Two differences of a split of a few hundred images are often equal to the last digit: their
# interval would have no width.
LEAST_SEEDS = 3


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Mean difference over `n` seeds with its 95 % interval, None where n < LEAST_SEEDS."""

    mean: float
    low: float | None
    high: float | None
    n: int


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Paired:
    """`first - second`, seed by seed: mean and Student's t interval.

    A seed decides the weights, the order and the views of both runs, so what they share drops
    out of the difference. The interval takes the differences to be normal; with few seeds it is
    wide, as it should be.

    Raises:
        ValueError: different numbers of values, or none.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"need as many values on both sides, got {len(first)} and {len(second)}")
    differences = [a - b for a, b in zip(first, second, strict=True)]
    mean, n = statistics.fmean(differences), len(differences)
    if n < LEAST_SEEDS:
        return Paired(mean=mean, low=None, high=None, n=n)
    reach = stats.t.ppf((1 + LEVEL) / 2, n - 1) * statistics.stdev(differences) / n**0.5
    return Paired(mean=mean, low=mean - float(reach), high=mean + float(reach), n=n)
