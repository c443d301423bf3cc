"""How far an accuracy may be from that of one class named for every image, by chance alone."""

from __future__ import annotations

import math

DEVIATIONS = 2.0


def chance_error(top1: float, chance: float, count: int) -> float:
    """Two standard deviations of the share of `count` images that are named rightly.

    Args:
        top1, chance: accuracies that are compared, in [0, 1]; the less sure one decides.
    """
    return DEVIATIONS * math.sqrt(max(top1 * (1 - top1), chance * (1 - chance)) / count)


def is_near_chance(top1: float, chance: float, count: int) -> bool:
    """Whether so many images do not tell an accuracy from that of one class alone."""
    return not top1 > chance + chance_error(top1, chance, count)  # so is NaN
