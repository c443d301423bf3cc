"""The epochs of a run as they lie on disk: one JSON line each."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ekd_ray.files import parse_json, read_bytes

HISTORY = "history.jsonl"


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The epochs recorded in a run's folder, oldest first, up to the first line that is torn."""
    return list(itertools.takewhile(is_epoch, read_rows(folder / HISTORY)))


def are_epochs(rows: list[Any]) -> bool:
    """Whether all are rows of epochs, each of a later one: see `is_epoch`."""
    epochs: list[Any] = [
        row["epoch"] if isinstance(row, dict) and "epoch" in row else None for row in rows
    ]
    if {*map(type, epochs)} - {int} or epochs != sorted({*epochs}):
        return False
    # All numbers at once, as thousands of histories are read: a sum that is finite has none that
    # is not.
    return _are_finite([value for row in rows for value in row.values()]) or all(
        map(is_epoch, rows)
    )


def is_epoch(row: Any) -> bool:
    """Whether a value is the row of an epoch, which has finite numbers, or null, by name."""
    if not isinstance(row, dict) or type(row.get("epoch")) is not int:
        return False
    return _are_finite(row.values())


def _are_finite(values: Iterable[Any]) -> bool:
    values = [value for value in values if value is not None]
    try:
        return {*map(type, values)} <= {int, float} and math.isfinite(math.fsum(values))
    except (OverflowError, ValueError):  # too large, or two infinities
        return False


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that is appended to, up to the first torn one; none without a file."""
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    with contextlib.suppress(ValueError):
        for line in read_bytes(path).splitlines():
            rows.append(parse_json(line))
    return list(itertools.takewhile(lambda row: isinstance(row, dict), rows))
