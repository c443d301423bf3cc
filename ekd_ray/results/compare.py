"""Two studies side by side: what was reached, at what cost, and what was set otherwise."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from scipy import stats

from ekd_ray.errors import UserError
from ekd_ray.results.leaderboard import Row
from ekd_ray.results.paired import LEAST_SEEDS, LEVEL

if TYPE_CHECKING:
    from ekd_ray.results.study import Study

SCHEMA = pa.schema(
    [
        ("kind", pa.string()),
        ("name", pa.string()),
        ("figure", pa.string()),
        ("this", pa.float64()),
        ("other", pa.float64()),
        ("difference", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("this_n", pa.int64()),
        ("other_n", pa.int64()),
        ("this_value", pa.string()),
        ("other_value", pa.string()),
    ]
)
TEST_FIGURES = ("test_top1", "test_nll", "test_ece")


def compare_studies(this: Study, other: Study) -> pa.Table:
    """One table of three kinds of rows.

    `result`: a leaderboard row of both (`name` winner, none, kd or authors) and a `figure`: the
    means over the seeds, their `difference` (this minus other) and its 95 % interval by Welch's
    t (null with fewer than three seeds on a side). `cost`: trials, epochs and hours of the
    searches. `setting`: a setting that differs, in `this_value` and `other_value` as JSON.

    Raises:
        UserError: the studies are of different data sets, whose figures say nothing about each
            other.
    """
    ours, theirs = this.config.distill.dataset, other.config.distill.dataset
    if ours != theirs:
        raise UserError(
            f"{this.path} is of {ours} and {other.path} of {theirs}: only studies of the same "
            "data set can be compared."
        )
    rows = [*_results(this, other), *_costs(this, other), *_settings(this, other)]
    names = SCHEMA.names
    return pa.Table.from_pylist([{n: row.get(n) for n in names} for row in rows], schema=SCHEMA)


def welch(first: Sequence[float], second: Sequence[float]) -> tuple[float | None, float | None]:
    """The 95 % interval of mean(first) - mean(second), of independent samples; None with few."""
    if min(len(first), len(second)) < LEAST_SEEDS:
        return None, None
    if statistics.pstdev(first) == statistics.pstdev(second) == 0:
        return None, None
    found = stats.ttest_ind(first, second, equal_var=False).confidence_interval(LEVEL)
    return float(found.low), float(found.high)


def _named(study: Study) -> dict[str, Row]:
    """Rows of the leaderboard by what they are: the trial's number says nothing elsewhere."""
    board = study.leaderboard()
    named = {row.name: row for row in board if row.name in study.config.baselines}
    return {"winner": board[0], **named} if board and board[0].winner else named


def _results(this: Study, other: Study) -> list[dict[str, Any]]:
    ours, theirs = _named(this), _named(other)
    rows = []
    for name in ours.keys() & theirs.keys():
        for figure in (*dict.fromkeys((*this.config.watched, "val_top1")), *TEST_FIGURES):
            first, second = _values(ours[name], figure), _values(theirs[name], figure)
            if first and second:
                rows.append(_figure_row(name, figure, first, second))
    order = ("winner", *this.config.baselines)
    return sorted(rows, key=lambda row: order.index(row["name"]))


def _values(row: Row, figure: str) -> list[float]:
    if figure.startswith("test_"):
        return [found[figure] for found in row.test_metrics if figure in found]
    return list(row.figures(figure))


def _figure_row(
    name: str, figure: str, first: Sequence[float], second: Sequence[float]
) -> dict[str, Any]:
    low, high = welch(first, second)
    ours, theirs = statistics.fmean(first), statistics.fmean(second)
    return {
        "kind": "result", "name": name, "figure": figure, "this": ours, "other": theirs,
        "difference": ours - theirs, "low": low, "high": high,
        "this_n": len(first), "other_n": len(second),
    }  # fmt: skip


def _costs(this: Study, other: Study) -> list[dict[str, Any]]:
    found = []
    for study in (this, other):
        records = study.records()
        found.append(
            {
                "trials": float(len(records)),
                "epochs": float(sum(len(record.history) for record in records)),
                "hours": sum(record.seconds for record in records) / 3600,
            }
        )
    first, second = found
    return [
        {
            "kind": "cost", "name": "search", "figure": figure, "this": first[figure],
            "other": second[figure], "difference": first[figure] - second[figure],
        }
        for figure in first
    ]  # fmt: skip


def _settings(this: Study, other: Study) -> list[dict[str, Any]]:
    ours, theirs = (_flat(study.config.to_dict()) for study in (this, other))
    return [
        {
            "kind": "setting", "name": name,
            "this_value": json.dumps(ours.get(name)), "other_value": json.dumps(theirs.get(name)),
        }
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]  # fmt: skip


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Settings of the runs and ranges of the space by dotted names."""
    inner = {
        f"{group}.{name}": value
        for group in ("distill", "space", "authors")
        for name, value in (values.get(group) or {}).items()
    }
    rest = {k: v for k, v in values.items() if k not in ("distill", "space", "authors")}
    return {**rest, **inner}
