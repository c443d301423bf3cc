"""Stratified splits and subsets, drawn from the seed alone."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import numpy.typing as npt

from ekd_ray.config.targets import LEAST_HELD_OUT
from ekd_ray.data.counter import STREAM_SPLIT, STREAM_SUBSET, Int64Array, counter_hash
from ekd_ray.errors import UserError

SHARE = 0.2


def held_out_size(count: int, fraction: float) -> int:
    """How many of `count` samples `stratified_split` holds out: the one rounding there is."""
    return round(count * fraction)


def fitted_held_out(count: int, classes: int) -> int:
    """How many of `count` samples are to validate: a fifth, at least 100, at most a third, and
    one of each class in any case."""
    return max(round(max(SHARE * count, min(LEAST_HELD_OUT, count / 3))), classes)


def stratified_split(
    labels: npt.ArrayLike, fraction: float, seed: int
) -> tuple[Int64Array, Int64Array]:
    """Split positions 0..N-1 into (train, validation), each class in proportion.

    `labels` is an integer array [N]; the validation side gets exactly
    `held_out_size(N, fraction)` samples, shared among the classes by largest remainder. A class
    with two or more samples keeps at least one on each side (when fraction > 0); a class with
    one stays in train. Returns two sorted int64 arrays that together hold every position once;
    fraction 0 gives an empty validation side. The draw depends on `seed` and the labels only.

    Raises UserError if the fraction lies outside [0, 1) or is too small or too large for
    every class to be on both sides.
    """
    values = _label_array(labels)
    if not 0.0 <= fraction < 1.0:
        raise UserError(f"the validation fraction must lie in [0, 1), got {fraction!r}.")
    n = len(values)
    if fraction == 0.0 or n == 0:
        return np.arange(n, dtype=np.int64), np.empty(0, dtype=np.int64)
    _, codes, sizes = np.unique(values, return_inverse=True, return_counts=True)
    several = sizes >= 2
    low = np.where(several, 1, 0)
    high = np.where(several, sizes - 1, 0)
    total = held_out_size(n, fraction)
    if not low.sum() <= total <= high.sum():
        raise UserError(
            f"a validation fraction of {fraction!r} puts {total} of {n} samples aside, but with "
            f"{len(sizes)} classes on both sides it must be {low.sum()} to {high.sum()}; "
            "choose another fraction."
        )
    counts = _apportion(sizes, Fraction(fraction), total, low, high)
    chosen = _draw(codes, counts, counter_hash(seed, STREAM_SPLIT, np.arange(n)))
    return np.flatnonzero(~chosen).astype(np.int64), np.flatnonzero(chosen).astype(np.int64)


def stratified_subset(labels: npt.ArrayLike, size: int, seed: int) -> Int64Array:
    """Exactly `size` positions of `labels` ([N], integers), each class in proportion.

    Every class that occurs keeps at least one sample. Returns a sorted int64 array.
    Raises UserError if `size` exceeds N or is smaller than the number of classes.
    """
    values = _label_array(labels)
    n = len(values)
    _, codes, sizes = np.unique(values, return_inverse=True, return_counts=True)
    if size > n:
        raise UserError(f"a subset of {size} samples was asked for, but there are only {n}.")
    if size < max(len(sizes), 1):
        raise UserError(
            f"a subset needs one sample or more of each of the {len(sizes)} classes, got size "
            f"{size}; choose {max(len(sizes), 1)} to {n}."
        )
    counts = _apportion(sizes, Fraction(size, n), size, np.ones_like(sizes), sizes)
    chosen = _draw(codes, counts, counter_hash(seed, STREAM_SUBSET, np.arange(n)))
    return np.flatnonzero(chosen).astype(np.int64)


def _label_array(labels: npt.ArrayLike) -> npt.NDArray[np.integer]:
    values = np.asarray(labels)
    if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
        raise ValueError(f"labels must be integers [N], got {values.dtype} {values.shape}")
    return values


def _apportion(
    sizes: npt.NDArray[np.integer],
    share: Fraction,
    total: int,
    low: npt.NDArray[np.integer],
    high: npt.NDArray[np.integer],
) -> list[int]:
    """Largest remainder within bounds: integer counts near sizes * share that sum to `total`."""
    # Fractions, because 100 * 0.29 is 28.999999999999996 and would lose a sample.
    quotas = [int(size) * share for size in sizes]
    bounds = list(zip(low.tolist(), high.tolist(), strict=True))
    counts = [min(max(int(q), a), b) for q, (a, b) in zip(quotas, bounds, strict=True)]
    missing = total - sum(counts)
    step = 1 if missing > 0 else -1
    for _ in range(abs(missing)):
        # The class furthest from its quota that still may move; the lowest class on a tie.
        movable = [c for c, (a, b) in enumerate(bounds) if a <= counts[c] + step <= b]
        best = max(movable, key=lambda c: (step * (quotas[c] - counts[c]), -c))
        counts[best] += step
    return counts


def _draw(
    codes: npt.NDArray[np.integer], counts: list[int], bits: npt.NDArray[np.uint64]
) -> npt.NDArray[np.bool_]:
    """Mask [N]: for class c the counts[c] samples with the smallest random bits."""
    chosen = np.zeros(len(codes), dtype=bool)
    for code, count in enumerate(counts):
        members = np.flatnonzero(codes == code)
        chosen[members[np.argsort(bits[members], kind="stable")[:count]]] = True
    return chosen
