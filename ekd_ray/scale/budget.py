"""When a search starts no further trial: epochs, hours, GPU-hours, nothing left to gain."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState
from scipy import stats

from ekd_ray.config import StudyConfig
from ekd_ray.errors import UserError
from ekd_ray.scale.space import Space

LEAST_TRIALS = 10  # of full length, before a model of the metric is believed
_CANDIDATES = 4096


class Budget:
    """What the trials of a search have used, against what they may.

    Hours count from construction; epochs and GPU-hours are those of all trials of the study,
    also before it was interrupted.
    """

    def __init__(self, config: StudyConfig, space: Space) -> None:
        self._config = config
        self._space = space
        self._began = time.monotonic()
        self._used: dict[int, tuple[int, float]] = {}
        self._judged = (0, False)

    def record(self, number: int, history: Sequence[dict[str, Any]]) -> None:
        """A trial has these epochs."""
        seconds = sum(row.get("seconds", 0.0) for row in history)
        self._used[number] = (len(history), seconds)

    def add(self, number: int, row: dict[str, Any]) -> None:
        """A trial has one epoch more."""
        epochs, seconds = self._used.get(number, (0, 0.0))
        self._used[number] = (epochs + 1, seconds + row.get("seconds", 0.0))

    def spent(self, trials: Sequence[FrozenTrial]) -> bool:
        """Whether no further trial should start, given those of the study so far."""
        config = self._config
        epochs = sum(epochs for epochs, _ in self._used.values())
        hours = sum(seconds for _, seconds in self._used.values()) / 3600
        limits = (
            (config.budget_epochs, epochs),
            (config.budget_hours, (time.monotonic() - self._began) / 3600),
            (config.budget_gpu_hours, hours * config.gpus_per_trial * config.workers_per_trial),
        )
        if any(limit is not None and used >= limit for limit, used in limits):
            return True
        return config.stop_below is not None and self._exhausted(trials, config.stop_below)

    def _exhausted(self, trials: Sequence[FrozenTrial], bound: float) -> bool:
        complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
        if len(complete) < LEAST_TRIALS:
            return False
        if len(complete) != self._judged[0]:
            points = np.array([self._space.unit(trial.params) for trial in complete])
            sign = 1.0 if self._config.mode == "max" else -1.0
            values = sign * np.array([trial.value for trial in complete], dtype=float)
            best = expected_improvement(points, values, seed=self._config.seed)
            self._judged = (len(complete), best < bound)
        return self._judged[1]


def expected_improvement(points: np.ndarray, values: np.ndarray, *, seed: int) -> float:
    """The largest improvement that can be expected of one more point.

    A Gaussian process with a Matern 5/2 kernel and noise is fitted to the points; the
    improvement is over its own mean at the best of them, for single scores are noisy
    (Jones et al. 1998, equation 15, with the plug-in incumbent).

    Args:
        points: float [N, D] in [0, 1]; values: float [N], larger is better.

    Returns:
        The maximum over a few thousand random points, in units of `values`.
    """
    # It takes seconds to import, which searches without such a bound need not wait for.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    spread = float(values.std())
    if spread == 0.0:
        return 0.0
    scaled = (values - values.mean()) / spread
    dimensions = points.shape[1]
    kernel = ConstantKernel(1.0, (1e-2, 1e2)) * Matern(
        np.full(dimensions, 0.5), (0.05, 20.0), nu=2.5
    ) + WhiteKernel(0.1, (1e-4, 1.0))
    process = GaussianProcessRegressor(kernel, n_restarts_optimizer=2, random_state=seed % 2**32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a length at its bound
        process.fit(points, scaled)
    incumbent = float(process.predict(points).max())
    candidates = np.random.default_rng(seed).random((_CANDIDATES, dimensions))
    mean, deviation = process.predict(candidates, return_std=True)
    noise = float(process.kernel_.k2.noise_level)
    # What the mean can gain; the noise of one more score is no improvement.
    deviation = np.sqrt(np.maximum(deviation**2 - noise, 1e-12))
    gain = mean - incumbent
    z = gain / deviation
    return spread * float((gain * stats.norm.cdf(z) + deviation * stats.norm.pdf(z)).max())


def check_budget(config: StudyConfig) -> None:
    """Raises `UserError` for a limit that this study cannot have."""
    if config.budget_gpu_hours is not None and not config.gpus_per_trial:
        raise UserError(
            "budget_gpu_hours needs trials with a GPU, got gpus_per_trial 0: give "
            "--gpus-per-trial, or --budget-hours instead."
        )
    if config.stop_below is not None and config.objectives:
        raise UserError(
            "stop_below is an improvement of one metric, and this study has "
            f"{len(config.all_objectives)} objectives: drop one of them."
        )
