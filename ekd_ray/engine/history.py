"""The epochs of a run as they lie on disk: one JSON line each."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import operator
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ekd_ray.config.targets import figure_limits
from ekd_ray.files import parse_json, read_bytes

HISTORY = "history.jsonl"


def read_history(folder: Path, needed: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The epochs recorded in a run's folder, as far as `leading_epochs` has it."""
    return leading_epochs(read_rows(folder / HISTORY), needed)


def leading_epochs(rows: Iterable[Any], needed: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The rows up to the first that is torn, or no later epoch than those before it.

    Args:
        needed: metrics that each of them has.
    """
    rows, needed = list(rows), tuple(needed)
    if _are_alike(rows, needed):
        return rows
    found: list[dict[str, Any]] = []
    for row in rows:
        if not is_epoch(row) or (found and row["epoch"] <= found[-1]["epoch"]):
            break
        if any(row.get(name) is None for name in needed):
            break
        found.append(row)
    return found


def _are_alike(rows: list[Any], needed: tuple[str, ...]) -> bool:
    """Whether all rows are `leading_epochs` with the same figures, looked at by column: thousands
    of histories are read."""
    names = tuple(rows[0]) if rows and isinstance(rows[0], dict) else ()
    if not {"epoch", *needed} <= {*names} or {*map(type, rows)} != {dict}:
        return False
    if {*map(tuple, rows)} != {names}:
        return False
    columns = [*zip(*map(dict.values, rows), strict=True)]
    epochs = columns[names.index("epoch")]
    kinds = {*map(type, itertools.chain.from_iterable(columns))}
    if not kinds <= {int, float} or {*map(type, epochs)} != {int}:
        return False
    for column, (low, high) in zip(columns, _limits_of(names), strict=True):
        # A sum is NaN where one of its numbers is.
        if not low <= min(column) <= max(column) <= high or math.isnan(sum(column)):
            return False
    return all(map(operator.lt, epochs, epochs[1:]))


def is_epoch(row: Any) -> bool:
    """Whether a value is the row of an epoch, which has numbers that can be, or null, by name."""
    if not isinstance(row, dict) or type(row.get("epoch")) is not int:
        return False
    kinds = {*map(type, row.values())}
    if not kinds <= {int, float, types.NoneType} or row.get("seconds", 0) is None:
        return False
    limits = zip(row.values(), _limits_of(tuple(row)), strict=True)
    return all(value is None or low <= value <= high for value, (low, high) in limits)


@functools.lru_cache(maxsize=64)
def _limits_of(names: tuple[str, ...]) -> tuple[tuple[float, float], ...]:
    return tuple(map(figure_limits, names))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a file that is appended to, up to the first torn one; none without a file."""
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    with contextlib.suppress(ValueError):
        for line in read_bytes(path).splitlines():
            rows.append(parse_json(line))
    return list(itertools.takewhile(lambda row: isinstance(row, dict), rows))
