"""A sampler that proposes by a surrogate of the space, and learns from other studies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import norm

from ekd_ray.config import StudyConfig
from ekd_ray.config.targets import as_loss
from ekd_ray.results.study_model import (
    MOST_TRIALS,
    Outcome,
    encode_points,
    fit_model,
    is_divergence,
    known_basis,
    thin_out,
    trial_outcome,
)
from ekd_ray.results.surrogate import Array, Basis, Observations, Surrogate
from ekd_ray.scale.prior import begins_by_prior, fade
from ekd_ray.scale.space import Parameter, Space

ANYWHERE, NEAR, TOP = 1500, 60, 5  # candidates: of the whole space, and around each of the best
# Before anything is known here the best of so few by what others know, so that many trials that
# begin at once are not all sent to one place.
FEW = 64
STEP = 0.1  # of the ones around, in coordinates of [0, 1]
APART = 0.25  # distance of the first points of a warm start
DRAWN = 20_000  # points of which these are the best
COSTLY = ("student", "epochs", "image_size")  # where these are searched, trials cost differently
SECONDS = "seconds per epoch"  # attribute of a trial of such a study that has ended
LEAST_TIMED = 4  # trials, for a model of what others cost
# Trials, up to which the hyperparameters are fitted for every draw: with fewer fits a search of 70
# was a little worse in the race. Later on, once so many times as many have ended.
ALWAYS_FITTED, REFIT = 100, 1.1


def costs_differ(config: StudyConfig) -> bool:
    """Whether some trials of a study take longer than others by what is searched."""
    return any(name in COSTLY for name in config.space or {})


class ModelSampler(BaseSampler):
    """Expected improvement over the best posterior mean, of a model at all rungs.

    A point is drawn as a whole when the first of its parameters is asked for. Trials that run
    lower the uncertainty around them, so that others are not sent there. Where `costs_differ`,
    what is compared is the improvement per second.

    Args:
        config: the study. Where it knows no other studies the first `n_startup_trials` are drawn
            at random.
    """

    def __init__(self, config: StudyConfig, *, seed: int, n_startup_trials: int) -> None:
        self._config = config
        self._entries: Mapping[str, Any] = config.space or {}
        self._startup = n_startup_trials
        self._rng = np.random.default_rng(seed)
        self._random = RandomSampler(seed=seed)
        self._drawn: int | None = None
        self._point: dict[str, Any] = {}
        self._outcomes: dict[int, Outcome] = {}  # of the trials that have ended, by number
        self._fitted: Surrogate | None = None  # the last one whose hyperparameters were fitted
        self._fitted_to = 0  # trials

    @cached_property
    def _coordinates(self) -> Coordinates:
        return Coordinates(Space(self._config.space))

    @cached_property
    def _basis(self) -> Basis | None:
        """The expectation of other studies, fitted when the first point is drawn: a finished study
        that is opened again draws none."""
        return known_basis(self._config)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:  # fmt: skip
        if trial.number != self._drawn:
            self._point, self._drawn = self._propose(study, trial.number), trial.number
        if param_name in self._point:
            return self._point[param_name]
        # A first point fixes some parameters, and this one may exist only under these.
        return self._random.sample_independent(study, trial, param_name, param_distribution)

    def _propose(self, study: optuna.Study, number: int) -> dict[str, Any]:
        running, tried = [], []
        for trial in study.get_trials(deepcopy=False):
            if trial.state == TrialState.RUNNING and trial.number != number:
                running.append(trial.params)
            elif trial.state.is_finished() and trial.number not in self._outcomes:
                self._outcomes[trial.number] = frozen_outcome(trial, self._config)
            tried.append(trial.params)
        ended = [*self._outcomes.values()]
        begins = self._basis is None and len(ended) < self._startup
        model = None if begins else self._model(ended)
        if model is None:
            rows = self._coordinates.draw(
                self._rng, 1 if self._basis is None else FEW, believed=begins_by_prior(number)
            )
            worth = np.zeros(1)
            if self._basis is not None:
                worth = self._basis(rows) + fade(len(ended)) * self._coordinates.log_prior(rows)
            return self._coordinates.point(rows[int(np.argmax(worth))])
        weight = fade(len(ended))
        rows, worth = expected_improvements(
            model, self._encode([outcome.params for outcome in thin_out(ended, MOST_TRIALS)]),
            self._coordinates, self._rng, pending=self._encode(running) if running else None,
        )  # fmt: skip
        worth += weight * self._coordinates.log_prior(rows)
        if costs_differ(self._config):
            worth -= self._log_seconds(study, rows)
        return self._first_new(rows[np.argsort(-worth, kind="stable")], tried)

    def _model(self, ended: Sequence[Outcome]) -> Surrogate | None:
        """The model of the trials that have ended; of many with the hyperparameters of the last fit
        until some more have."""
        count = len(ended)
        kept = ALWAYS_FITTED < count < REFIT * self._fitted_to
        like = self._fitted if kept else None
        model = fit_model(ended, self._entries, basis=self._basis, like=like)
        if like is None:
            self._fitted, self._fitted_to = model, count
        return model

    def _first_new(self, rows: Array, tried: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The first point of rows that is none of those that were tried, because a run that comes
        again tells nothing and a corner of the space may be the best for ever; else the first."""
        points = (self._coordinates.point(row) for row in rows)
        new = next((point for point in points if point not in tried), None)
        return self._coordinates.point(rows[0]) if new is None else new

    def _log_seconds(self, study: optuna.Study, rows: Array) -> Array:
        """The expected log of the seconds of full length at rows, [N]; 0 while too little is
        known."""
        trials = [t for t in study.get_trials(deepcopy=False) if SECONDS in t.user_attrs]
        if len(trials) < LEAST_TIMED:
            return np.zeros(len(rows))
        points = [trial.params for trial in trials[-MOST_TRIALS:]]
        own = self._config.distill.epochs
        seconds = [
            trial.user_attrs[SECONDS] * trial.params.get("epochs", own)
            for trial in trials[-MOST_TRIALS:]
        ]
        seen = Observations(self._encode(points), np.zeros(len(points), int), np.log(seconds))
        return Surrogate(seen, winsorised=False).mean(rows)

    def _encode(self, points: Sequence[Mapping[str, Any]]) -> Array:
        return encode_points(points, self._entries)


def frozen_outcome(trial: FrozenTrial, config: StudyConfig) -> Outcome:
    """The outcome of a trial of a study that has ended in Optuna."""
    values = {e: -as_loss(v, config.metric) for e, v in trial.intermediate_values.items()}
    return trial_outcome(
        trial.params, values, config, complete=trial.state == TrialState.COMPLETE,
        diverged=is_divergence(trial.user_attrs.get("reason")),
    )  # fmt: skip


def expected_improvements(
    model: Surrogate, tried: Array, coordinates: Coordinates, rng: np.random.Generator,
    *, pending: Array | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """Candidates, of the whole space and around the best that were tried, and the log of the
    improvement that is expected of each over the best posterior mean of these.

    Args:
        tried: [N, D]; pending: [P, D], see `Surrogate.predict`.

    Returns:
        [M, D] and [M].
    """
    rows = coordinates.draw(rng, ANYWHERE)
    means = model.mean(tried)
    best = tried[np.argsort(-means)[:TOP]]
    rows = np.vstack([rows, coordinates.move(best, rng, NEAR)])
    mean, deviation = model.predict(rows, pending=pending)
    return rows, log_expected_improvement((mean - means.max()) / deviation) + np.log(deviation)


def log_expected_improvement(z: Array) -> Array:
    """log(phi(z) + z Phi(z)), the log of the expected improvement of a normal variable with
    deviation 1 whose mean lies z above the best; far below by its asymptote phi(z) / z^2."""
    near = np.log(np.maximum(norm.pdf(z) + z * norm.cdf(z), 1e-300))
    far = norm.logpdf(z) - 2 * np.log(np.maximum(np.abs(z), 1.0))
    return np.where(z > -6, near, far)


class Coordinates:
    """The points of a space as rows of numbers in [0, 1], as `encode_points` has them."""

    def __init__(self, space: Space) -> None:
        self._parameters = space.parameters
        self._columns: dict[str, slice] = {}
        self.count = 0
        for name, parameter in space.parameters.items():
            width = 1 if parameter.choices is None else len(parameter.choices)
            self._columns[name] = slice(self.count, self.count + width)
            self.count += width
        self._priors = {n: p.prior for n, p in self._parameters.items() if p.prior}

    def draw(self, rng: np.random.Generator, count: int, *, believed: bool = False) -> Array:
        """Rows drawn evenly, or if `believed` by the priors that there are [count, D]."""
        rows = rng.random((count, self.count))
        for name, prior in self._priors.items() if believed else ():
            places = np.array([prior.draw(rng) for _ in rows])
            own = self._columns[name]
            of_choices = places[:, None] == np.arange(own.stop - own.start)
            rows[:, own] = places[:, None] if prior.choices is None else of_choices
        return self._settle(rows)

    def log_prior(self, rows: Array) -> Array:
        """Log density of the priors at rows, 0 of an even draw, [N]."""
        total = np.zeros(len(rows))
        for name, prior in self._priors.items():
            own = rows[:, self._columns[name]]
            places = own[:, 0] if prior.choices is None else own.argmax(axis=1)
            wanted = self._parameters[name].when
            applies = [not wanted or name in self.point(row) for row in rows]
            total += np.where(applies, prior.log_density(places), 0.0)
        return total

    def move(self, rows: Array, rng: np.random.Generator, count: int) -> Array:
        """Rows near each given one [count * N, D]: numbers moved by about `STEP`, a choice kept
        nine times in ten."""
        near = np.repeat(rows, count, axis=0)
        moved = near + STEP * rng.normal(size=near.shape)
        for name, parameter in self._parameters.items():
            if parameter.choices is not None:
                own = self._columns[name]
                again = rng.random(len(near)) < 0.1
                drawn = rng.random((len(near), len(parameter.choices)))
                moved[:, own] = np.where(again[:, None], drawn, near[:, own])
        return self._settle(np.clip(moved, 0.0, 1.0))

    def point(self, row: Array) -> dict[str, Any]:
        """The point of a row, each number the nearest that its range has."""
        point: dict[str, Any] = {}
        for name, parameter in self._parameters.items():
            if parameter.applies(point):
                point[name] = _value_at(parameter, row[self._columns[name]])
        return point

    def _settle(self, rows: Array) -> Array:
        """Rows with one value of each choice, and in the middle what has no value."""
        for name, parameter in self._parameters.items():
            own = self._columns[name]
            if parameter.choices is not None:
                rows[:, own] = np.eye(len(parameter.choices))[rows[:, own].argmax(axis=1)]
            if parameter.when:
                applies = [parameter.applies(self._point_before(row, name)) for row in rows]
                absent = 0.5 if parameter.choices is None else 0.0
                rows[:, own] = np.where(np.array(applies)[:, None], rows[:, own], absent)
        return rows

    def _point_before(self, row: Array, name: str) -> dict[str, Any]:
        """The values of a row that the condition of a parameter is about."""
        wanted = self._parameters[name].when
        return {
            other: _value_at(self._parameters[other], row[self._columns[other]])
            for other in wanted
            if row[self._columns[other]].any() or self._parameters[other].choices is None
        }


def _value_at(parameter: Parameter, coordinates: Array) -> Any:
    chosen = coordinates[0] if parameter.choices is None else coordinates.argmax()
    return parameter.value_at(float(chosen))


def distinct_maxima(
    basis: Basis, space: Space, count: int, *, apart: float = APART
) -> list[dict[str, Any]]:
    """The points of which a basis expects most, at a distance of `apart` or more of each other."""
    coordinates = Coordinates(space)
    rows = coordinates.draw(np.random.default_rng(0), DRAWN)
    chosen: list[int] = []
    for index in np.argsort(-basis(rows), kind="stable"):
        if (np.linalg.norm(rows[chosen] - rows[index], axis=1) >= apart).all():
            chosen.append(int(index))
        if len(chosen) == count:
            break
    return [coordinates.point(rows[index]) for index in chosen]
