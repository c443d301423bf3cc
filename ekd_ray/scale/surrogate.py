"""A Gaussian process over a search space: what noisy single scores say together."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """Made by `fitted`; in the units of the values that it was fitted to, larger is better."""

    process: Any
    centre: float
    spread: float

    def predict(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of the value itself, noise left out.

        Args:
            points: float [N, D] in [0, 1].

        Returns:
            Two arrays [N].
        """
        mean, deviation = self.process.predict(points, return_std=True)
        # What one more score would add by chance is no property of the point.
        known = np.maximum(deviation**2 - self.process.kernel_.k2.noise_level, 1e-12)
        return self.centre + self.spread * mean, self.spread * np.sqrt(known)

    def expected_improvement(self, candidates: np.ndarray, over: float) -> np.ndarray:
        """How much each candidate [N, D] can be expected to be better than `over`, or 0.

        Jones et al. 1998, equation 15.
        """
        mean, deviation = self.predict(candidates)
        gain = mean - over
        z = gain / deviation
        return gain * stats.norm.cdf(z) + deviation * stats.norm.pdf(z)

    def believing(
        self, points: np.ndarray, values: np.ndarray, errors: np.ndarray, guessed: np.ndarray
    ) -> Surrogate:
        """The same, as if its expectation had been observed at `guessed` [M, D] as well.

        Args:
            points, values, errors: what it was fitted to.
        """
        expected = (self.predict(guessed)[0] - self.centre) / self.spread
        from sklearn.base import clone

        process = clone(self.process)
        process.set_params(
            kernel=self.process.kernel_,
            optimizer=None,
            alpha=np.concatenate([(errors / self.spread) ** 2, np.zeros(len(guessed))]) + 1e-10,
        )
        known = (values - self.centre) / self.spread
        process.fit(np.vstack([points, guessed]), np.concatenate([known, expected]))
        return Surrogate(process=process, centre=self.centre, spread=self.spread)


def fitted(
    points: np.ndarray,
    values: np.ndarray,
    *,
    seed: int,
    errors: np.ndarray | None = None,
    start: Surrogate | None = None,
) -> Surrogate | None:
    """A process with a Matern 5/2 kernel of a length per dimension, and noise.

    Args:
        points: float [N, D] in [0, 1]; values: float [N].
        errors: standard deviations [N] of what is uncertain of each value besides the noise
            that all have.
        start: one of nearly the same values, to begin at its lengths (without it: at three
            places).

    Returns:
        None if all values are equal.
    """
    # It takes seconds to import, which most searches need not wait for.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    centre, spread = float(values.mean()), float(values.std())
    if spread == 0.0:
        return None
    kernel = ConstantKernel(1.0, (1e-2, 1e2)) * Matern(
        np.full(points.shape[1], 0.5), (0.05, 20.0), nu=2.5
    ) + WhiteKernel(0.1, (1e-4, 1.0))
    if start is not None:
        kernel = start.process.kernel_
    own = np.zeros(len(values)) if errors is None else (errors / spread) ** 2
    process = GaussianProcessRegressor(
        kernel,
        alpha=own + 1e-10,
        n_restarts_optimizer=0 if start else 2,
        random_state=seed % 2**32,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a length at its bound
        process.fit(points, (values - centre) / spread)
    return Surrogate(process=process, centre=centre, spread=spread)
