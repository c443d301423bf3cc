"""Differences between configurations that ran under the same seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEVEL = 0.95
SETTLED_LEVEL = 0.9  # at which the winner is told apart from the next best
# Two differences of a split of a few hundred images are often equal to the last digit: their
# interval would have no width.
LEAST_SEEDS = 3
EQUAL = 1e-12  # of the largest value: a spread below this is rounding


@dataclass(frozen=True, kw_only=True)
class Paired:
    """Mean difference over `n` seeds with its interval, None where there is none
    (`mean_interval`)."""

    mean: float
    low: float | None
    high: float | None
    n: int
    level: float = LEVEL

    @property
    def sign(self) -> int | None:
        """1 or -1 where the whole interval is on that side of zero, 0 where it is not; None
        without an interval."""
        if self.low is None or self.high is None:
            return None
        return (self.low > 0) - (self.high < 0)


def paired_difference(
    first: Sequence[float], second: Sequence[float], *, level: float = LEVEL
) -> Paired:
    """`first - second`, seed by seed: mean and Student's t interval (two-sided).

    A seed decides the weights, the order and the views of both runs, so what they share drops
    out of the difference. The interval takes the differences to be normal; with few seeds it is
    wide, as it should be.

    Raises:
        ValueError: different numbers of values, or none.
    """
    if len(first) != len(second) or not first:
        raise ValueError(f"need as many values on both sides, got {len(first)} and {len(second)}")
    differences = [a - b for a, b in zip(first, second, strict=True)]
    low, high = mean_interval(differences, level=level) or (None, None)
    mean = statistics.fmean(differences)
    return Paired(mean=mean, low=low, high=high, n=len(differences), level=level)


def mean_interval(values: Sequence[float], *, level: float = LEVEL) -> tuple[float, float] | None:
    """The interval of the mean by Student's t, None with fewer values than LEAST_SEEDS.

    None also where all values are equal: on a small split they often are, which shows nothing.
    """
    n = len(values)
    if n < LEAST_SEEDS or (deviation := statistics.stdev(values)) <= EQUAL * max(map(abs, values)):
        return None
    mean = statistics.fmean(values)
    reach = _quantile((1 + level) / 2, n - 1) * deviation / n**0.5
    return mean - reach, mean + reach


def share_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % `mean_interval` of shares, cut off where no share lies: below 0 and above 1."""
    bounds = mean_interval(values)
    return bounds and (max(0.0, bounds[0]), min(1.0, bounds[1]))


def _quantile(probability: float, freedom: int) -> float:
    # Inside: a second to import, for every process that trains, which computes none.
    from scipy import stats

    return float(stats.t.ppf(probability, freedom))


def clearly_worse(scores: Mapping[str, Sequence[float]]) -> set[str]:
    """Those whose mean lies below the best one's by more than the seeds explain.

    What a seed adds to all configurations alike is taken out (a two-way table without
    interaction); what is left gives one standard deviation for all, from
    (configurations - 1) x (seeds - 1) degrees of freedom. A configuration is clearly worse
    if the one-sided 95 % bound of its paired difference to the best is below zero.

    Args:
        scores: by configuration, its values under the same seeds; larger is better.

    Raises:
        ValueError: different numbers of values.
    """
    if len(scores) < 2:
        return set()
    import numpy as np  # slow to import, and what shows a study computes none

    table = np.array(list(scores.values()), dtype=float)
    if table.ndim != 2:
        raise ValueError("need as many values of every configuration")
    count, seeds = table.shape
    freedom = (count - 1) * (seeds - 1)
    if freedom < 1:
        return set()
    means = table.mean(axis=1)
    residuals = table - means[:, None] - table.mean(axis=0) + table.mean()
    deviation = float(np.sqrt((residuals**2).sum() / freedom))
    # A split of a few hundred images often gives equal scores, which show nothing.
    if deviation <= EQUAL * max(1.0, float(np.abs(table).max())):
        return set()
    reach = _quantile(LEVEL, freedom) * deviation * np.sqrt(2 / seeds)
    return {name for name, mean in zip(scores, means, strict=True) if means.max() - mean > reach}
