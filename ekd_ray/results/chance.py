"""Whether a winner's test accuracy may be that of naming one class for every picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ekd_ray.config.phrases import several

DEVIATIONS = 1.96


def warn_of_chance(metrics: Mapping[str, Any]) -> str:
    """A sentence where the accuracy is within the 95 % interval of one class alone, else empty.

    Args:
        metrics: the content of `metrics.json`; raises LookupError, TypeError, ValueError or
            ArithmeticError where it is damaged.
    """
    counts = [entry["images"] for entry in metrics["classes"]]
    if not counts:
        return ""
    images, top1 = sum(counts), metrics["test"]["test_top1"]["mean"]
    chance = max(counts) / images
    if top1 > chance + DEVIATIONS * math.sqrt(chance * (1 - chance) / images):
        return ""
    return (
        f"the winner may be no better than chance: it names {top1:.1%} of "
        f"{several(images, 'test picture')} rightly, and one class alone gives {chance:.1%}"
    )
