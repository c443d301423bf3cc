"""A Gaussian process over the settings of a space, at the fidelities of a study.

A trial that was stopped at a rung says something of what it would have scored at full length:
with `f(x)` the score there, the score at a rung is `rho f(x) + g(x)`, the autoregressive model of
Kennedy and O'Hagan (Predicting the output from a complex computer code when fast approximations
are available, 2000, equation 1) read from the dear level. `f` and each `g` have Matern 5/2 kernels
with one length per dimension (ARD). What other studies have found, `m(x)`, is one linear term:
`f(x) = beta m(x) + h(x)` with `beta ~ N(1/2, 4)`, which data can turn off or around. It is as wide
as that because others may mislead (docs/search.md, What was tried).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve, solve_triangular
from scipy.linalg.lapack import dpotri
from scipy.optimize import minimize

Array = NDArray[np.float64]
Basis = Callable[[Array], Array]

BETA_MEAN, BETA_VARIANCE = 0.5, 4.0
LEVEL_VARIANCE = 1.0  # of the mean of each level, in standardised scores
WINSORISED = 2.0  # interquartile ranges below the median, below which a score counts as that
JITTER = 1e-6  # added to all variances of noise, which keeps the kernel positive
STEPS = 60  # of the search for the hyperparameters
LEAST_GAIN = 1e-5  # of their density by a step, relative: a smaller one ends the search
REACH = 3.5  # standard deviations of their priors, within which they are looked for
_ROOT5 = math.sqrt(5)


@dataclass(frozen=True)
class Observations:
    """Scores of trials, larger is better.

    Attributes:
        inputs: [N, D] in [0, 1].
        levels: [N], 0 for full length, k for the k-th rung below it.
        scores: [N]; -inf for a trial that diverged.
    """

    inputs: Array
    levels: NDArray[np.int64]
    scores: Array


@dataclass(frozen=True)
class _Hyper:
    """The hyperparameters; lengths and variances by their logarithms."""

    lengths: Array  # [D]
    scale: Array  # [1], variance of h
    rho: Array  # [rungs]
    gap: Array  # [rungs], variance of each g
    noise: Array  # [1 + rungs]

    def to_vector(self) -> Array:
        return np.concatenate([self.lengths, self.scale, self.rho, self.gap, self.noise])

    @classmethod
    def from_vector(cls, vector: Array, dims: int, rungs: int) -> _Hyper:
        return cls(*np.split(vector, np.cumsum([dims, 1, rungs, rungs])))


def _priors(dims: int, rungs: int) -> tuple[Array, Array]:
    """Means and standard deviations of the normal priors of the hyperparameters."""
    mean = _Hyper(
        lengths=np.full(dims, math.log(0.5 * math.sqrt(dims))), scale=np.zeros(1),
        rho=np.full(rungs, 0.7), gap=np.full(rungs, math.log(0.3)),
        noise=np.full(1 + rungs, math.log(0.1)),
    )  # fmt: skip
    spread = _Hyper(
        lengths=np.full(dims, 0.8), scale=np.full(1, 0.7), rho=np.full(rungs, 0.4),
        gap=np.ones(rungs), noise=np.full(1 + rungs, 1.2),
    )  # fmt: skip
    return mean.to_vector(), spread.to_vector()


class Surrogate:
    """The posterior of the score at full length, given observations.

    Args:
        seen: at least one of them.
        basis: `m`, from inputs [N, D] to [N], with mean 0 and variance 1 over the space; None
            without other studies.
        winsorised: what lies far below the others counts as less far.
        like: a surrogate of earlier observations whose hyperparameters are kept, because their fit
            is nearly all of the cost; they are fitted anew where it knew other rungs.
    """

    def __init__(
        self, seen: Observations, *, basis: Basis | None = None, winsorised: bool = True,
        like: Surrogate | None = None,
    ) -> None:  # fmt: skip
        self._basis = basis or (lambda inputs: np.zeros(len(inputs)))
        self._inputs, self._levels, self._scores = seen.inputs, seen.levels, seen.scores
        self._dims, self._rungs = seen.inputs.shape[1], int(seen.levels.max())
        self._targets, self._center, self._spread = _standardise(seen, winsorised)
        self._m = self._basis(self._inputs)
        self._same = self._levels[:, None] == self._levels[None, :]
        kept = like is not None and like._rungs == self._rungs
        self._hyper: _Hyper = like._hyper if like is not None and kept else self._fit()
        kernel = self._kernel(self._hyper, self._matern(self._hyper, self._inputs, self._inputs))
        self._factor = cho_factor(kernel, lower=True)
        self._weights = cho_solve(self._factor, self._away(self._hyper))

    def _fit(self) -> _Hyper:
        """The hyperparameters of largest posterior density."""
        mean, spread = _priors(self._dims, self._rungs)
        squares = (self._inputs[:, None, :] - self._inputs[None, :, :]) ** 2
        squares = squares.reshape(-1, self._dims)

        def loss(vector: Array) -> tuple[float, Array]:
            hyper = _Hyper.from_vector(vector, self._dims, self._rungs)
            value, gradient = self._negative_log_likelihood(hyper, squares)
            away = (vector - mean) / spread
            return value + 0.5 * float(away @ away), gradient + away / spread

        bounds = list(zip(mean - REACH * spread, mean + REACH * spread, strict=True))
        options = {"maxiter": STEPS, "ftol": LEAST_GAIN}
        found = minimize(loss, mean, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        return _Hyper.from_vector(np.asarray(found.x), self._dims, self._rungs)

    def _negative_log_likelihood(self, hyper: _Hyper, squares: Array) -> tuple[float, Array]:
        """The one of the targets, and its gradient by the vector of hyperparameters.

        Args:
            squares: squared distances of the inputs by dimension [N * N, D].
        """
        distance = _ROOT5 * self._distance(hyper, self._inputs, self._inputs)
        decay = np.exp(-distance)
        matern = _matern(distance, decay)
        factor = cho_factor(self._kernel(hyper, matern), lower=True)
        away = self._away(hyper)
        weights = cho_solve(factor, away)
        value = 0.5 * float(away @ weights) + float(np.log(np.diag(factor[0])).sum())
        # d value / d t = tr((K^-1 - w w^T) dK/dt) / 2 - w^T d mean/dt
        inner = _invert(factor) - np.outer(weights, weights)
        slopes = self._slopes(hyper)
        pairs = np.outer(slopes, slopes)
        own = np.exp(hyper.scale) * matern
        gap = self._gaps(hyper)
        shared = own + BETA_VARIANCE * np.outer(self._m, self._m)
        # Of the Matern correlation by the logarithm of a length, without its square.
        falling = 5 / 3 * (1 + distance) * decay
        by_square = inner * (np.exp(hyper.scale) * pairs + gap) * falling
        by_slope = (inner * shared) @ slopes - BETA_MEAN * weights * self._m
        by_gap = (inner * gap * matern).sum(axis=1)
        by_noise = np.diag(inner) * np.exp(hyper.noise)[self._levels]
        levels = range(self._rungs + 1)
        rungs = [self._levels == level for level in levels]
        gradient = _Hyper(
            lengths=0.5 * (by_square.ravel() @ squares) * np.exp(-2 * hyper.lengths),
            scale=np.array([0.5 * (inner * pairs * own).sum()]),
            rho=np.array([by_slope[at].sum() for at in rungs[1:]]),
            gap=np.array([0.5 * by_gap[at].sum() for at in rungs[1:]]),
            noise=np.array([0.5 * by_noise[at].sum() for at in rungs]),
        )
        return value, gradient.to_vector()

    def _distance(self, hyper: _Hyper, left: Array, right: Array) -> Array:
        """Distances in units of the lengths [N, M]."""
        left, right = left / np.exp(hyper.lengths), right / np.exp(hyper.lengths)
        squares = (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1) - 2 * left @ right.T
        return np.sqrt(np.maximum(squares, 0.0))

    def _matern(self, hyper: _Hyper, left: Array, right: Array) -> Array:
        distance = _ROOT5 * self._distance(hyper, left, right)
        return _matern(distance, np.exp(-distance))

    def _slopes(self, hyper: _Hyper) -> Array:
        return np.concatenate([[1.0], hyper.rho])[self._levels]

    def _gaps(self, hyper: _Hyper) -> Array:
        """Variances of the `g` that two observations of a level share [N, N]."""
        return self._same * np.concatenate([[0.0], np.exp(hyper.gap)])[self._levels]

    def _away(self, hyper: _Hyper) -> Array:
        return self._targets - BETA_MEAN * self._slopes(hyper) * self._m

    def _kernel(self, hyper: _Hyper, matern: Array) -> Array:
        slopes = self._slopes(hyper)
        shared = np.exp(hyper.scale) * matern + BETA_VARIANCE * np.outer(self._m, self._m)
        kernel = np.outer(slopes, slopes) * shared + self._gaps(hyper) * matern
        kernel += LEVEL_VARIANCE * self._same
        kernel[np.diag_indices_from(kernel)] += np.exp(hyper.noise)[self._levels] + JITTER
        return kernel

    def _between(self, left: Array, of_left: Array, right: Array, of_right: Array) -> Array:
        """Prior covariance of `f` at inputs, given their `m`."""
        shared = np.exp(self._hyper.scale) * self._matern(self._hyper, left, right)
        return shared + BETA_VARIANCE * np.outer(of_left, of_right)

    def _cross(self, inputs: Array, m: Array) -> Array:
        """Prior covariance of `f` at inputs with the observations [M, N]."""
        shared = self._between(inputs, m, self._inputs, self._m)
        return shared * self._slopes(self._hyper) + LEVEL_VARIANCE * (self._levels == 0)

    def mean(self, inputs: Array) -> Array:
        """Posterior mean at inputs [M, D], in the unit of the scores, [M]."""
        m = self._basis(inputs)
        found = BETA_MEAN * m + self._cross(inputs, m) @ self._weights
        return np.asarray(self._center + self._spread * found)

    def predict(self, inputs: Array, *, pending: Array | None = None) -> tuple[Array, Array]:
        """Posterior mean and standard deviation, in the unit of the scores, [M] each.

        Args:
            inputs: [M, D].
            pending: [P, D], whose scores are still to come: they lower the deviation as if they
                were known, and leave the mean as it is.
        """
        m = self._basis(inputs)
        cross = self._cross(inputs, m)
        mean = BETA_MEAN * m + cross @ self._weights
        variance = np.exp(self._hyper.scale) + BETA_VARIANCE * m**2 + LEVEL_VARIANCE
        solved = solve_triangular(self._factor[0], cross.T, lower=True)
        variance = variance - (solved**2).sum(axis=0)
        if pending is not None and len(pending):
            of_pending = self._basis(pending)
            other = self._cross(pending, of_pending)
            solved = cho_solve(self._factor, other.T)
            left = self._between(inputs, m, pending, of_pending) + LEVEL_VARIANCE - cross @ solved
            known = self._between(pending, of_pending, pending, of_pending) + LEVEL_VARIANCE
            known = known - other @ solved
            known[np.diag_indices_from(known)] += np.exp(self._hyper.noise[0]) + JITTER
            variance = variance - np.einsum("ij,ji->i", left, np.linalg.solve(known, left.T))
        deviation = np.sqrt(np.maximum(variance, 1e-9))
        return self._center + self._spread * mean, self._spread * deviation

    def draw(self, inputs: Array, count: int, rng: np.random.Generator) -> Array:
        """Draws of the posterior at inputs [M, D] together, in the unit of the scores,
        [count, M]."""
        m = self._basis(inputs)
        cross = self._cross(inputs, m)
        covariance = self._between(inputs, m, inputs, m) + LEVEL_VARIANCE
        covariance = covariance - cross @ cho_solve(self._factor, cross.T)
        mean = BETA_MEAN * m + cross @ self._weights
        # By eigenvalues, because points that lie close together leave no Cholesky factor.
        values, vectors = np.linalg.eigh(covariance)
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        drawn = mean + rng.normal(size=(count, len(mean))) @ root.T
        return self._center + self._spread * drawn

    def leave_one_out(self) -> tuple[Array, Array, Array]:
        """Each score of full length as the others foretell it, in the unit of the scores.

        A point is left out with its rungs, which would tell its end. The hyperparameters stay as
        they are (Rasmussen and Williams, Gaussian processes for machine learning, 2006, equations
        5.10 to 5.12, here of blocks).

        Returns:
            The scores of the F points that did not diverge, the means that are expected without
            them, and the standard deviations with their noise, [F] each.
        """
        inverse = _invert(self._factor)
        points = np.unique(self._inputs, axis=0, return_inverse=True)[1].ravel()
        rows = np.flatnonzero((self._levels == 0) & np.isfinite(self._scores))
        means, variances = np.zeros(len(rows)), np.zeros(len(rows))
        for index, row in enumerate(rows):
            own = np.flatnonzero(points == points[row])
            among = np.linalg.inv(inverse[np.ix_(own, own)])[own == row][0]
            means[index] = self._targets[row] - among @ self._weights[own]
            variances[index] = among[own == row][0]
        means = self._center + self._spread * means
        return self._scores[rows], means, self._spread * np.sqrt(variances)


def _matern(distance: Array, decay: Array) -> Array:
    """The Matern 5/2 correlation at sqrt(5) times a distance, of which `decay` is exp(-)."""
    return (1 + distance + distance**2 / 3) * decay


def _invert(factor: tuple[Array, bool]) -> Array:
    """The inverse of a kernel, from its lower Cholesky factor."""
    lower = np.tril(dpotri(factor[0], lower=True)[0])
    return lower + np.tril(lower, -1).T


def _standardise(seen: Observations, winsorised: bool) -> tuple[Array, float, float]:
    """Scores with median 0 at each level, all by one spread; `winsorised`, see `Surrogate`.

    The spread is the largest of a level, because few trials of full length, which have been
    chosen, say little of it.

    Returns:
        They [N], and the centre and the spread of full length.
    """
    scores, spread = np.zeros(len(seen.scores)), 0.0
    centers: dict[int, float] = {}
    for level in sorted({*seen.levels.tolist()}):
        at = seen.levels == level
        own = seen.scores[at]
        finite = own[np.isfinite(own)] if np.isfinite(own).any() else np.zeros(1)
        low, middle, high = np.quantile(finite, [0.25, 0.5, 0.75])
        if winsorised:
            own = np.maximum(own, middle - WINSORISED * (high - low))
        centers[level], spread = float(middle), max(spread, float(own.std()))
        scores[at] = own - middle
    spread = spread or 1.0
    return scores / spread, centers.get(0, centers[min(centers)]), spread
