"""Every use of what Optuna does not promise to keep, read in Optuna 5.0.0.

Each function says what it is for; `tests/scale/test_private_api.py` fails when its part of
Optuna has gone. Nothing else in the package names a private part of Optuna.
"""

from __future__ import annotations

import copy
import math
from bisect import insort
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution
from optuna.samplers import GPSampler, TPESampler
from optuna.samplers._tpe.sampler import (
    _split_trials,
    default_gamma,
    default_gamma_multiobjective,
)
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from ekd_ray.config.targets import evenly_spaced
from ekd_ray.results.records import JOURNAL_LOCKS
from ekd_ray.scale.prior import begins_by_prior, fade
from ekd_ray.scale.space import Parameter

MOST_TRIALS = 500  # that a model of the objective is built from


def storage_of(study: optuna.Study) -> BaseStorage:
    """The storage that a study was opened with."""
    return study._storage


def reopen_trial(study: optuna.Study, number: int) -> optuna.Trial:
    """A trial that was begun and has not ended, to be continued under its number.

    What it had been suggested is suggested again.
    """
    trial_id = study._storage.get_trial_id_from_study_id_trial_number(study._study_id, number)
    return optuna.Trial(study, trial_id)


def stored_trial(study: optuna.Study, number: int) -> FrozenTrial:
    """A trial as it is stored, not to be changed; `get_trials` would make a list of all."""
    storage = study._storage
    return storage.get_trial(
        storage.get_trial_id_from_study_id_trial_number(study._study_id, number)
    )


class KnownTrials:
    """The trials that a model learns from, at most `MOST_TRIALS` that have ended, kept up to date.

    Attributes:
        ended: numbers of all trials that ended with a value, ascending.
        ranked: of one objective, (rank, number) of these, the best first: in the order in which
            `TPESampler` takes them.
        front: of several, the numbers and values of those that no other is better than.
    """

    def __init__(self) -> None:
        self.ended: list[int] = []
        self.ranked: list[tuple[tuple[float, ...], int]] = []
        self.front: list[tuple[int, list[float]]] = []
        self._open: set[int] = set()
        self.trials: list[FrozenTrial] = []

    def update(self, study: optuna.Study) -> None:
        """Look at the trials that were not over at the last time, and at new ones."""
        signs = [-1.0 if d == StudyDirection.MAXIMIZE else 1.0 for d in study.directions]
        begun, self.trials = len(self.trials), study.get_trials(deepcopy=False)
        self._open |= {*range(begun, len(self.trials))}
        for number in sorted(self._open):
            trial = self.trials[number]
            if not trial.state.is_finished():
                continue
            self._open.remove(number)
            if trial.state == TrialState.FAIL:
                continue
            insort(self.ended, number)
            if len(signs) == 1:
                insort(self.ranked, (_rank(trial, signs[0]), number))
            elif not _violation(trial):
                losses = [s * v for s, v in zip(signs, trial.values, strict=True)]
                self._extend_front(number, losses)

    def _extend_front(self, number: int, losses: list[float]) -> None:
        def dominates(one: list[float], other: list[float]) -> bool:
            return all(a <= b for a, b in zip(one, other, strict=True)) and one != other

        if not any(dominates(known, losses) for _, known in self.front):
            self.front = [pair for pair in self.front if not dominates(losses, pair[1])]
            self.front.append((number, losses))

    def running(self) -> list[int]:
        """Numbers of the trials that run."""
        return [n for n in sorted(self._open) if self.trials[n].state == TrialState.RUNNING]

    def choose(self, best: int) -> tuple[list[int], list[int]]:
        """(the `best` ones, of several objectives the front; the others), ascending by number.

        Of more than `MOST_TRIALS` in all, the others are spread evenly over the study.
        """
        ranked = [number for _, number in self.ranked[:best]]
        chosen = ranked or evenly_spaced([number for number, _ in self.front], MOST_TRIALS // 2)
        good = {*chosen}
        others = [number for number in self.ended if number not in good]
        return sorted(chosen), evenly_spaced(others, MOST_TRIALS - len(chosen))


def _violation(trial: FrozenTrial) -> float:
    return sum(value for value in trial.constraints.values() if value > 0)


def _rank(trial: FrozenTrial, sign: float) -> tuple[float, ...]:
    """The smaller the better: complete trials, then stopped ones, then those that break bounds."""
    if broken := _violation(trial):
        return 2, broken
    if trial.state == TrialState.COMPLETE:
        return 0, sign * trial.values[0]
    if not trial.intermediate_values:
        return 1, 1, 0.0
    step, value = max(trial.intermediate_values.items())
    return 1, -step, math.inf if math.isnan(value) else sign * value


class BoundedTPE(TPESampler):
    """TPE of each parameter by itself, at a cost that does not grow with the study.

    Up to `MOST_TRIALS` ended trials it draws what `TPESampler` draws, bit for bit: that splits the
    trials into good and other ones, and converts all of their values, anew for each parameter;
    here this is done once. Of more trials the good ones are those of all, and of the others some
    stand for the rest (`KnownTrials.choose`).

    Args:
        believed: parameters with a prior, by which some of the start-up trials are drawn.
    """

    def __init__(self, believed: Mapping[str, Parameter] | None = None, **options: Any) -> None:
        super().__init__(multivariate=False, constant_liar=True, **options)
        self._believed = believed or {}
        self._known = KnownTrials()
        self._drawn: int | None = None
        self._split: tuple[list[FrozenTrial], list[FrozenTrial]] = [], []
        self._numbers: list[NDArray[np.int64]] = []  # of the trials in `_split`
        # Values by parameter and number of trial, NaN where none is known.
        self._internal: dict[str, NDArray[np.float64]] = {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:  # fmt: skip
        if trial.number != self._drawn:  # the parameters of a trial are drawn one after the other
            self._known.update(study)
            self._split = self._split_known(study, trial.number)
            self._numbers = [np.array([t.number for t in part], int) for part in self._split]
            self._drawn = trial.number
        if len(self._known.ended) < self._n_startup_trials:
            parameter = self._believed.get(param_name)
            if parameter is not None and parameter.prior and begins_by_prior(trial.number):
                return parameter.value_at(parameter.prior.draw(self._rng.rng))
            return self._random_sampler.sample_independent(
                study, trial, param_name, param_distribution
            )
        return self._sample(study, trial, {param_name: param_distribution})[param_name]

    def _split_known(
        self, study: optuna.Study, drawn: int
    ) -> tuple[list[FrozenTrial], list[FrozenTrial]]:
        known = self._known
        running = [number for number in known.running() if number != drawn]
        good, others = known.choose(default_gamma(len(known.ended)))
        trials = known.trials
        if len(study.directions) == 1:
            return [trials[n] for n in good], [trials[n] for n in sorted([*others, *running])]
        ended = [trials[n] for n in sorted([*good, *others])]
        together = sorted([*ended, *(trials[n] for n in running)], key=lambda t: t.number)
        return _split_trials(study, together, default_gamma_multiobjective(len(ended)))

    def _sample(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        good, others = (
            self._build_parzen_estimator(study, search_space, trials, handle_below=is_good)
            for trials, is_good in zip(self._split, (True, False), strict=True)
        )
        samples = good.sample(self._rng.rng, self._n_ei_candidates)
        worth = self._compute_acquisition_func(samples, good, others)
        for name, values in samples.items():
            parameter = self._believed.get(name)
            if parameter is not None and parameter.prior:
                # Optuna has a choice by its number.
                of_range = parameter.choices is None
                places = [parameter.place(value) if of_range else value for value in values]
                density = parameter.prior.log_density(np.array(places))
                worth = worth + fade(len(self._known.ended)) * density
        best = self._compare(samples, worth)
        return {name: kind.to_external_repr(best[name]) for name, kind in search_space.items()}

    def _get_internal_repr(
        self, trials: list[FrozenTrial], search_space: dict[str, BaseDistribution],
        study: optuna.Study,
    ) -> dict[str, Any]:  # fmt: skip
        ((name, kind),) = search_space.items()
        numbers = self._numbers[0 if trials is self._split[0] else 1]
        values = self._internal.get(name, np.empty(0))
        values = np.append(values, np.full(len(self._known.trials) - len(values), np.nan))
        for number in numbers[np.isnan(values[numbers])]:
            params = self._known.trials[number].params
            if name in params:
                values[number] = kind.to_internal_repr(params[name])
        self._internal[name], chosen = values, values[numbers]
        return {name: chosen[~np.isnan(chosen)]}


class BoundedGP(GPSampler):
    """A Gaussian process of at most `MOST_TRIALS` trials, because its cost is their third power.

    Of more, the best tenth of these and others that are spread evenly over the study.
    """

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        trials = study.get_trials(deepcopy=False)
        if sum(t.state == TrialState.COMPLETE for t in trials) > MOST_TRIALS:
            known = KnownTrials()
            known.update(study)
            good, others = known.choose(MOST_TRIALS // 10)
            chosen = {*good, *others, *known.running()}
            study = _study_showing(study, [t for t in trials if t.number in chosen])
        return super().sample_relative(study, trial, search_space)


def _study_showing(study: optuna.Study, trials: list[FrozenTrial]) -> optuna.Study:
    """The study as a sampler sees it that is to know these trials alone."""

    def get_trials(
        deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        return [trial for trial in trials if states is None or trial.state in states]

    shown = copy.copy(study)
    shown._get_trials = get_trials  # type: ignore[method-assign]
    return shown


def lock_files(journal: Path) -> list[Path]:
    """Locks of a journal file, under the names that `JournalFileSymlinkLock` gives them."""
    return list(journal.parent.glob(JOURNAL_LOCKS))
