"""Counter-based random numbers: every draw is a function of (seed, counters), not of a state.

The definition is short enough to repeat in any language. With all arithmetic modulo 2^64:

    mix(z):  z ^= z >> 30;  z *= 0xBF58476D1CE4E5B9
             z ^= z >> 27;  z *= 0x94D049BB133111EB
             z ^= z >> 31
    step(state, k) = mix(state + (k + 1) * 0x9E3779B97F4A7C15)
    counter_hash(seed, c1, ..., cm) = step(... step(step(seed, 0), c1) ..., cm)

so `step(state, k)` is the k-th output of SplitMix64 started at `state`, and every counter
opens its own stream below the previous one. Changing this changes every split, order and
augmentation ever recorded: a test freezes its values.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]

_MASK = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)

# First counter of every use, so that order, views and splits of one seed are unrelated.
STREAM_ORDER = 1
STREAM_VIEW = 2
STREAM_SPLIT = 3
STREAM_SUBSET = 4
STREAM_SYNTHETIC = 5
STREAM_STEP = 6
STREAM_STRONG = 7
STREAM_STRONG_ID = 8
STREAM_CROP = 9
STREAM_CLASS = 10
STREAM_DRAWN = 11


def _as_uint64(value: int | npt.ArrayLike) -> UInt64Array:
    """Integers of any sign as uint64 (two's complement, like a C cast)."""
    if isinstance(value, int):
        return np.asarray(value & _MASK, dtype=np.uint64)
    array = np.asarray(value)
    if array.dtype.kind not in "iu":
        raise TypeError(f"counters must be integers, got {array.dtype}")
    return array.astype(np.uint64)


def _step(state: UInt64Array, counter: UInt64Array) -> UInt64Array:
    # Scalars would warn about the wrap-around that is the point here.
    with np.errstate(over="ignore"):
        z = state + (counter + np.uint64(1)) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _MIX_1
        z = (z ^ (z >> np.uint64(27))) * _MIX_2
        return np.asarray(z ^ (z >> np.uint64(31)), dtype=np.uint64)


def counter_hash(seed: int, *counters: int | npt.ArrayLike) -> UInt64Array:
    """64 well-mixed bits for every element of the broadcast `counters`.

    `seed` is any Python int (taken modulo 2^64); each counter is an int or an integer array.
    Returns a uint64 array of the broadcast shape (0-d for scalar counters). Raises TypeError
    for counters that are not integers. The definition stands in the module's docstring.
    """
    state = _step(_as_uint64(int(seed)), np.asarray(0, dtype=np.uint64))
    for counter in counters:
        state = _step(state, _as_uint64(counter))
    return state


def bounded(bits: UInt64Array, bound: int) -> Int64Array:
    """Map 64 random bits to int64 in [0, bound), bound <= 2^32, with bias below bound / 2^32."""
    if not 1 <= bound <= 1 << 32:
        raise ValueError(f"bound must lie in 1..2^32, got {bound}")
    return (((bits >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32)).astype(np.int64)
