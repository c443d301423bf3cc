"""When a search ends because its model expects too little of any further trial.

What was found is kept in Optuna's study, so that one that was killed and resumed ends where it
would have ended anyway.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import optuna
from optuna.trial import TrialState
from threadpoolctl import threadpool_limits

from ekd_ray.config import StudyConfig
from ekd_ray.results.study_model import (
    encode_points,
    fit_model,
    known_basis,
    thin_out,
    validate_model,
)
from ekd_ray.results.surrogate import Basis
from ekd_ray.scale.model_sampler import Coordinates, expected_improvements, frozen_outcome
from ekd_ray.scale.space import Space
from ekd_ray.scale.storage import FULL_RUN, REPEATED

LEAST_COMPLETE = 10  # trials of full length, before the model is asked
GROWTH = 1.25  # of the trials that have ended, until it is asked again
MOST_TRIALS = 75  # that it is fitted to: some thirty fits in a search of 5,000 take seconds
# Attributes of the study.
_LOOKED, _GAIN = "trials at the last look", "expected gain"
_WANTED = "trials wanted at the last look"


class StopRule:
    """Looks now and then, as trials end, at how much the best further trial is expected to gain.

    Args:
        config: a study with `stop_below`, one objective and no constraints.
    """

    def __init__(self, config: StudyConfig, study: optuna.Study) -> None:
        self._config, self._study = config, study
        self._coordinates = Coordinates(Space(config.space))

    @cached_property
    def _basis(self) -> Basis | None:
        return known_basis(self._config)

    def holds(self) -> bool:
        """Whether no further trial should start: the study has not been extended since the model
        was asked, because who extends one wants more."""
        if self._study.user_attrs.get(_WANTED) != self._config.trials:
            return False
        gain, bound = self._study.user_attrs.get(_GAIN), self._config.stop_below
        return gain is not None and bound is not None and gain < bound

    def describe(self) -> str:
        """The sentence that is said once it holds."""
        gain, looked = (self._study.user_attrs[name] for name in (_GAIN, _LOOKED))
        return (
            f"the search ends: after {looked} trials the model expects a further one to improve "
            f"{self._config.metric} by {gain:.2g}, less than stop_below {self._config.stop_below:g}"
        )

    def look(self) -> None:
        """Ask the model, if enough trials have ended since it was asked."""
        wanted = math.ceil(GROWTH * self._study.user_attrs.get(_LOOKED, 0))
        trials = self._study.get_trials(deepcopy=False)
        if len(trials) < wanted:
            return
        ended = [
            trial
            for trial in trials
            if trial.state.is_finished() and not trial.user_attrs.keys() & {FULL_RUN, REPEATED}
        ]
        complete = sum(trial.state == TrialState.COMPLETE for trial in ended)
        if complete < LEAST_COMPLETE or len(ended) < wanted:
            return
        with threadpool_limits(limits=1):  # others would spin beside the trials
            gain = self._expected_gain(ended)
        self._study.set_user_attr(_WANTED, self._config.trials)
        self._study.set_user_attr(_GAIN, gain)
        self._study.set_user_attr(_LOOKED, len(ended))

    def _expected_gain(self, ended: list[optuna.trial.FrozenTrial]) -> float | None:
        """The largest expected improvement over the best expected of the trials, in the unit of the
        metric; None of a model that foretells trials no better than their mean."""
        entries = self._config.space or {}
        known = thin_out([frozen_outcome(t, self._config) for t in ended], MOST_TRIALS)
        model = fit_model(known, entries, basis=self._basis)
        if model is None or not validate_model(model).informed:
            return None
        rng = np.random.default_rng([self._config.seed, len(ended)])
        tried = encode_points([outcome.params for outcome in known], entries)
        _, worth = expected_improvements(model, tried, self._coordinates, rng)
        return float(np.exp(worth).max())
