"""Random resized crops as a seeded pool: view v of sample i is one rectangle and one coin.

The rule is that of Szegedy et al., "Going Deeper with Convolutions" (CVPR 2015), as
torchvision's RandomResizedCrop states it: an area of 8 % to 100 % of the picture, an aspect
ratio of 3/4 to 4/3 (uniform in its logarithm), ten tries to fit it in, and else the largest
legal rectangle in the centre. Mirrored left to right with probability 1/2.

With u(k) the k-th uniform number of `counter_hash(seed, STREAM_CROP, sample id, view id, k)`,
try t draws area, aspect ratio, top and left from k = 4t ... 4t + 3; k = 40 is the coin.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ekd_ray.data.counter import STREAM_CROP, UInt64Array, counter_hash

SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
_TRIES = 10
_COIN = 4 * _TRIES


class Box(NamedTuple):
    """A rectangle of whole pixels."""

    left: int
    top: int
    width: int
    height: int


class Region(NamedTuple):
    """The rectangle between two corners, in pixels that may be fractions."""

    left: float
    top: float
    right: float
    bottom: float


def crop_bits(sample_ids: npt.ArrayLike, view_ids: npt.ArrayLike, seed: int) -> UInt64Array:
    """The random bits of views `view_ids` [B] of samples `sample_ids` [B]: uint64 [B, 41]."""
    samples, views = np.asarray(sample_ids), np.asarray(view_ids)
    return counter_hash(seed, STREAM_CROP, samples[:, None], views[:, None], np.arange(_COIN + 1))


def crop_box(width: int, height: int, bits: UInt64Array) -> Box:
    """Which rectangle of a picture of `width` x `height` pixels a row of `crop_bits` names."""
    log_ratio = (math.log(RATIO[0]), math.log(RATIO[1]))
    # As Python integers: numpy's scalars make the loop five times slower.
    draws = bits.tolist()
    for first in range(0, _COIN, 4):
        area = width * height * _uniform(draws[first], *SCALE)
        ratio = math.exp(_uniform(draws[first + 1], *log_ratio))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = _below(draws[first + 2], height - h + 1)
            return Box(_below(draws[first + 3], width - w + 1), top, w, h)
    return _central_box(width, height)


def crop_flips(bits: UInt64Array) -> bool:
    """Whether a row of `crop_bits` mirrors its picture."""
    return bool(bits[_COIN] >> np.uint64(63))


def evaluation_region(width: int, height: int, size: int) -> Region:
    """The part of a picture that evaluation at `size` pixels a side looks at.

    That is the centre crop of `size` after the short side was resized to size * 256 / 224, with
    torchvision's rounding, expressed in the pixels of the original.
    """
    short = round(size * 256 / 224)
    if width <= height:
        wide, high = short, int(short * height / width)
    else:
        wide, high = int(short * width / height), short
    left, top = round((wide - size) / 2), round((high - size) / 2)
    return Region(
        left * width / wide,
        top * height / high,
        min((left + size) * width / wide, width),
        min((top + size) * height / high, height),
    )


def _central_box(width: int, height: int) -> Box:
    w, h = width, height
    if width / height < RATIO[0]:
        h = round(w / RATIO[0])
    elif width / height > RATIO[1]:
        w = round(h * RATIO[1])
    return Box((width - w) // 2, (height - h) // 2, w, h)


def _uniform(draw: int, low: float, high: float) -> float:
    return low + (high - low) * ((draw >> 11) * 2.0**-53)


def _below(draw: int, bound: int) -> int:
    """As `counter.bounded`, of one number."""
    return ((draw >> 32) * bound) >> 32
