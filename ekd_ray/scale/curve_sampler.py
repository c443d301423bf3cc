"""Bayesian optimisation that learns from trials of any length.

Optuna's Gaussian process learns from trials of full length alone, of which early stopping leaves
few. Here a stopped trial counts with the final score that its epochs promise, and with how
uncertain that promise is: both from the trials that ran to the end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from ekd_ray.scale.space import Space
from ekd_ray.scale.surrogate import Surrogate, fitted

RANDOM, NEAR = 1024, 512  # candidates anywhere in the space, and close to the best points
CENTRES, REACHES = 8, (0.03, 0.1, 0.25)
# Fitting takes a time that grows with the cube of the trials: of more, the latest.
MOST_TRIALS = 256


def promised(curves: Sequence[Sequence[float]], epochs: int) -> tuple[np.ndarray, np.ndarray]:
    """The final score of each curve, and how uncertain it is.

    Of a curve of `epochs` values that is its last one, with no uncertainty. Of a shorter one, of e
    values, it is what the mean of e values promises, by least squares over the curves of full
    length (with three or fewer: their mean, shifted by as much as the means differ), and the
    spread about that line.

    Args:
        curves: of each trial its value after every epoch, at least one of full length.

    Returns:
        Two arrays [curves].
    """
    whole = np.array([curve for curve in curves if len(curve) == epochs], dtype=float)
    finals = whole[:, -1]
    values, errors = np.empty(len(curves)), np.zeros(len(curves))
    lines: dict[int, tuple[float, float, float]] = {}
    for index, curve in enumerate(curves):
        length = len(curve)
        if length == epochs:
            values[index] = curve[-1]
            continue
        if length not in lines:
            lines[length] = _line(whole[:, :length].mean(axis=1), finals)
        slope, offset, errors[index] = lines[length]
        values[index] = offset + slope * np.mean(curve)
    return values, errors


def _line(means: np.ndarray, finals: np.ndarray) -> tuple[float, float, float]:
    """(slope, offset, spread) of final scores over means of the first epochs."""
    away = means - means.mean()
    slope = 1.0
    if len(means) > 3 and (away**2).sum() > 0:
        # Who does better early does not do worse at the end.
        slope = max(0.0, float((away @ (finals - finals.mean())) / (away**2).sum()))
    offset = float(finals.mean() - slope * means.mean())
    left = finals - offset - slope * means
    freedom = max(1, len(means) - 2)
    return slope, offset, float(np.sqrt((left**2).sum() / freedom))


class CurveSampler(BaseSampler):
    """The point with the largest expected improvement by a Gaussian process over all trials.

    Args:
        space: what is searched, conditions included.
        epochs: of a trial of full length.
        startup: trials drawn at random before the process is asked.

    A failed trial counts as the worst score that there is, a running one as what the process
    expects of it, so that another worker looks elsewhere.
    """

    def __init__(self, space: Space, *, epochs: int, startup: int, seed: int) -> None:
        self._space = space
        self._epochs = epochs
        self._startup = startup
        self._seed = seed
        self._rng = np.random.default_rng(seed)
        self._random = RandomSampler(seed=seed)
        self._before: Surrogate | None = None
        self._points: dict[int, dict[str, Any]] = {}

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        point = self._next_point(study, trial)
        if point is None:
            return {}
        self._points[trial.number] = point
        return {name: self._space.parameters[name].distribution() for name in point}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._points.pop(trial.number, {})

    def sample_independent(
        self, study: Study, trial: FrozenTrial, name: str, distribution: BaseDistribution
    ) -> Any:
        return self._random.sample_independent(study, trial, name, distribution)

    def _next_point(self, study: Study, trial: FrozenTrial) -> dict[str, Any] | None:
        """None as long as too little is known."""
        known = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        ended = [t for t in known if t.state.is_finished() and t.params][-MOST_TRIALS:]
        scored = [t for t in ended if t.state != TrialState.FAIL and t.intermediate_values]
        whole = [t for t in scored if t.state == TrialState.COMPLETE]
        if len(ended) < self._startup or not whole:
            return None
        sign = 1.0 if study.direction == StudyDirection.MAXIMIZE else -1.0
        curves = [self._curve(t, sign) for t in scored]
        values, errors = promised(curves, self._epochs)
        failed = [t for t in ended if t.state == TrialState.FAIL]
        values = np.concatenate([values, np.full(len(failed), values.min())])
        errors = np.concatenate([errors, np.zeros(len(failed))])
        points = self._places([t.params for t in (*scored, *failed)])
        surrogate = fitted(points, values, seed=self._seed, errors=errors, start=self._before)
        if surrogate is None:
            return None
        self._before = surrogate
        means = surrogate.predict(points)[0]
        running = [t.params for t in known if t.state == TrialState.RUNNING and t.params]
        if running:
            guessed = self._places(running)
            surrogate = surrogate.believing(points, values, errors, guessed)
        tried = [t.params for t in known if t.params]
        best = [(*scored, *failed)[index].params for index in np.argsort(-means)[:CENTRES]]
        candidates = [point for point in self._candidates(best) if point not in tried]
        if not candidates:
            return None
        gains = surrogate.expected_improvement(self._places(candidates), float(means.max()))
        return candidates[int(np.argmax(gains))]

    def _curve(self, trial: FrozenTrial, sign: float) -> list[float]:
        values = [sign * value for _, value in sorted(trial.intermediate_values.items())]
        return values[: self._epochs]

    def _places(self, points: Sequence[Mapping[str, Any]]) -> np.ndarray:
        return np.array([self._space.unit(point) for point in points])

    def _candidates(self, best: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        found = [self._draw() for _ in range(RANDOM)]
        for index in range(NEAR):
            centre = best[index % len(best)]
            found.append(self._near(centre, REACHES[index // len(best) % len(REACHES)]))
        return found

    def _draw(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for name, parameter in self._space.parameters.items():
            if parameter.applies(values):
                values[name] = parameter.at(self._rng.random())
        return values

    def _near(self, point: Mapping[str, Any], reach: float) -> dict[str, Any]:
        """Numbers moved by a normal draw of `reach` of their range, choices mostly kept, what
        their conditions newly ask for drawn."""
        values: dict[str, Any] = {}
        for name, parameter in self._space.parameters.items():
            if not parameter.applies(values):
                continue
            known = point.get(name)
            if name not in point or (parameter.choices is not None and self._rng.random() < reach):
                values[name] = parameter.at(self._rng.random())
            elif parameter.choices is not None:
                values[name] = known
            else:
                place = parameter.place(point[name]) + self._rng.normal(0.0, reach)
                values[name] = parameter.at(min(max(place, 0.0), 1.0))
        return values
