"""Where a number lies in the range of a searched setting."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def place_in_range(value: float, low: float, high: float, *, log: bool) -> float:
    """The place of a number along a range, or along its logarithm: 0 at `low`, 1 at `high`, and
    in the middle of a range that holds one number."""
    low, high, value = float(low), float(high), float(value)
    if low == high:
        return 0.5
    if log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low)


def reach_tried(
    space: Mapping[str, Mapping[str, Any]] | None, points: Sequence[Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """A study's space whose ranges with `around_prior` hold what its trials tried.

    The teacher places these ranges once it is there; where, the study's file does not say. Of an
    edited file what is no range is left out.
    """
    wide = {name: entry for name, entry in (space or {}).items() if isinstance(entry, Mapping)}
    for name, entry in wide.items():
        if entry.get("around_prior"):
            tried = [point[name] for point in points if name in point]
            ends = [entry["low"], entry["high"], *tried]
            wide[name] = {**entry, "low": min(ends), "high": max(ends)}
    return wide
