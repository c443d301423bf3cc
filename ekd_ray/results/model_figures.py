"""The answers of a study's model on its space: importance, slices, the best trial, its own error.

The model is the one that the search proposes by and finalists are chosen by (`study_model`).
"""

from __future__ import annotations

import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import qmc
from threadpoolctl import threadpool_limits

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.ranges import reach_tried
from ekd_ray.config.settings import hints_of
from ekd_ray.config.targets import DIRECTIONS
from ekd_ray.results.importance import (
    Effect,
    Findings,
    check_metric,
    has_enough,
    judged_trials,
)
from ekd_ray.results.records import RunRecord
from ekd_ray.results.study_model import (
    REACH,
    Entries,
    encode_points,
    fit_model,
    known_basis,
    record_outcome,
    validate_model,
)
from ekd_ray.results.surrogate import Array, Surrogate

DRAWN = 1024  # points of the space that effects are computed from, a power of two
RIVALS, DRAWS = 400, 200  # points that may be better than a trial, and draws of what all are worth


@dataclass(frozen=True, kw_only=True)
class StudyModel:
    """The model of a study for one of its metrics, in the unit of the metric."""

    surrogate: Surrogate
    space: Entries
    metric: str

    @property
    def _sign(self) -> int:
        return 1 if DIRECTIONS[self.metric] == "max" else -1

    def expect(self, points: Sequence[Mapping[str, Any]]) -> tuple[Array, Array, Array]:
        """The metric that is expected of points at full length, and the ends of its 95 % interval,
        without the noise of a single run, [N] each."""
        mean, deviation = self.surrogate.predict(encode_points(points, self.space))
        mean = self._sign * mean
        return mean, mean - REACH * deviation, mean + REACH * deviation

    def find(self, best: RunRecord | None) -> Findings:
        """All that is said in words; of `best`, a trial, what is expected of it."""
        with threadpool_limits(limits=1):
            return self._find(best)

    def _find(self, best: RunRecord | None) -> Findings:
        expected = low = high = regret = None
        if best is not None:
            expected, low, high = (float(found[0]) for found in self.expect([best.params]))
            regret = self._expect_regret(best)
        return Findings(
            metric=self.metric, **asdict(validate_model(self.surrogate)), effects=self.effects(),
            best=None if best is None else best.number, expected=expected, low=low, high=high,
            regret=regret,
        )  # fmt: skip

    def effects(self) -> list[Effect]:
        """The effects of all parameters, the largest first."""
        found = find_effects(self._mean, self.space)
        return sorted(found, key=lambda effect: (-effect.main, -effect.total, effect.parameter))

    def _mean(self, points: Sequence[Mapping[str, Any]]) -> Array:
        return self.surrogate.mean(encode_points(points, self.space))

    def _expect_regret(self, best: RunRecord) -> float:
        """By how much the best point is expected to be better than a trial."""
        places = qmc.Sobol(len(self.space), seed=0).random(2 * DRAWN)
        points = [point_at(row, self.space) for row in places]
        rivals = np.argsort(-self._mean(points), kind="stable")[: RIVALS // 2]
        chosen = [best.params, *(points[index] for index in rivals), *points[: RIVALS // 2]]
        inputs = encode_points(chosen, self.space)
        drawn = self.surrogate.draw(inputs, DRAWS, np.random.default_rng(0))
        return float((drawn.max(axis=1) - drawn[:, 0]).mean())


def fit_study_model(
    records: Sequence[RunRecord], config: StudyConfig, metric: str | None = None
) -> StudyModel | None:
    """The model of a study's trials, by its own metric or another one; None where there are too
    few of full length, or all scored the same. Raises `UserError` for an unknown metric."""
    metric = metric or config.metric
    check_metric(metric)
    if not has_enough(judged_trials(records, metric)):
        return None
    space = reach_tried(config.space, [record.params for record in records])
    config = config.replace(space=space)
    # What other studies have found is of the study's own metric.
    basis = known_basis(config) if metric == config.metric else None
    outcomes = [record_outcome(record, config, metric) for record in records if record.params]
    # One thread, as in `find`: others would spin, waiting for each other, beside a trial.
    with threadpool_limits(limits=1):
        surrogate = fit_model(outcomes, space, basis=basis)
    if surrogate is None:  # nothing is searched
        return None
    return StudyModel(surrogate=surrogate, space=space, metric=metric)


def find_effects(
    score: Callable[[Sequence[Mapping[str, Any]]], Array], space: Entries
) -> list[Effect]:
    """The variance of a score over a space, by parameter: functional ANOVA by Sobol's indices.

    Of points drawn evenly, each parameter in turn is exchanged for another draw's (Jansen,
    Analysis of variance designs for model output, 1999). A parameter whose condition does not hold
    at a point has no effect there.

    Args:
        score: of N points, [N].
    """
    count = len(space)
    places = qmc.Sobol(2 * count, seed=0).random(DRAWN)
    first, second = places[:, :count], places[:, count:]

    def score_at(rows: Array) -> Array:
        return score([point_at(row, space) for row in rows])

    one, other = score_at(first), score_at(second)
    variance = float(np.concatenate([one, other]).var())
    found = []
    for index, name in enumerate(space):
        mixed = first.copy()
        mixed[:, index] = second[:, index]
        between = score_at(mixed)
        main = variance - float(((other - between) ** 2).mean()) / 2
        total = float(((one - between) ** 2).mean()) / 2
        main, total = (
            min(max(part / variance, 0.0), 1.0) if variance else 0.0 for part in (main, total)
        )
        found.append(Effect(parameter=name, main=main, total=max(main, total)))
    return found


def point_at(places: Sequence[float] | Array, space: Entries) -> dict[str, Any]:
    """The point of a space at a place in [0, 1] along each of its parameters."""
    point: dict[str, Any] = {}
    for (name, entry), place in zip(space.items(), places, strict=True):
        wanted = entry.get("when") or {}
        if all(point.get(other) in legal for other, legal in wanted.items()):
            point[name] = value_at(name, entry, float(place))
    return point


def value_at(name: str, entry: Mapping[str, Any], place: float) -> Any:
    """The value of a parameter at a place in [0, 1] along its choices or its range."""
    if choices := entry.get("choices"):
        return choices[min(int(place * len(choices)), len(choices) - 1)]
    low, high, step = float(entry["low"]), float(entry["high"]), entry.get("step")
    if entry.get("log"):
        low, high = math.log(low), math.log(high)
    value = low + place * (high - low)
    value = math.exp(value) if entry.get("log") else value
    kind = hints_of(DistillConfig)[name]
    if step is None and float not in (typing.get_args(kind) or (kind,)):
        step = 1
    return float(entry["low"]) + step * round((value - entry["low"]) / step) if step else value
