"""Where a number lies in the range of a searched setting."""

from __future__ import annotations

import math


def place_in_range(value: float, low: float, high: float, *, log: bool) -> float:
    """The place of a number along a range, or along its logarithm: 0 at `low`, 1 at `high`, and
    in the middle of a range that holds one number."""
    low, high, value = float(low), float(high), float(value)
    if low == high:
        return 0.5
    if log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low)
