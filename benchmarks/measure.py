"""Medians, spreads and ratios of timings taken side by side, and what they were taken on."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ekd_ray.engine.environment import environment
from ekd_ray.engine.precision import pick_device, resolve_precision


def spread(values: Sequence[float]) -> dict[str, float]:
    """`n`, `median`, and the quartiles `low` and `high`."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"n": len(values), "median": median, "low": low, "high": high}


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Spread of the ratios of timings that were taken in the same rounds."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def geometric_mean(values: Sequence[float]) -> float:
    """Positive numbers only."""
    return math.exp(sum(math.log(value) for value in values) / len(values))


def machine(threads: int) -> dict[str, Any]:
    """The conditions of a result: processor, versions, arithmetic, threads, load at the start."""
    return {
        **environment(),
        "threads": threads,
        "precision": resolve_precision("auto", pick_device()),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": os.getloadavg()[0],
    }
