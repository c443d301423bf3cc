"""Whether a winner's test accuracy may be that of naming one class for every picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ekd_ray.config.phrases import several
from ekd_ray.engine.measure.near_chance import is_near_chance


def warn_of_chance(metrics: Mapping[str, Any]) -> str:
    """A sentence where the accuracy is near that of one class alone, else empty.

    Args:
        metrics: the content of `metrics.json`; raises LookupError, TypeError, ValueError or
            ArithmeticError where it is damaged.
    """
    counts = [entry["images"] for entry in metrics["classes"]]
    if not counts:
        return ""
    images, top1 = sum(counts), metrics["test"]["test_top1"]["mean"]
    chance = max(counts) / images
    if not is_near_chance(top1, chance, images):
        return ""
    return (
        f"the winner may be no better than chance: it names {top1:.1%} of "
        f"{several(images, 'test picture')} rightly, and one class alone gives {chance:.1%}"
    )
