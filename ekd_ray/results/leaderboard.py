"""Confirmed configurations side by side, and which of them has won."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.targets import COSTS, DIRECTIONS, total_violation

TESTED = ("test_top1", "test_nll", "test_ece")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the leaderboard: a configuration and its confirmed figures.

    `val` and `test` hold the metric's values over seeds; empty where that stage did not run
    it. `val_metrics` and `test_metrics` hold all figures of each seed, `costs` what the
    student costs, where the study asked for it. `failed` is the reason if a run of it failed.
    """

    name: str
    config: DistillConfig
    val: tuple[float, ...] = ()
    val_metrics: tuple[dict[str, float], ...] = ()
    test: tuple[float, ...] = ()
    test_metrics: tuple[dict[str, float], ...] = ()
    costs: dict[str, float] = field(default_factory=dict)
    winner: bool = False
    failed: str | None = None

    def figures(self, name: str) -> tuple[float, ...]:
        """The values of a validation metric over the seeds, or of a cost."""
        if name in self.costs:
            return (self.costs[name],)
        return tuple(found[name] for found in self.val_metrics if name in found)

    def means(self) -> dict[str, float | None]:
        """The mean of every metric and cost over the seeds; None where there is none."""
        found = {name: self.figures(name) for name in DIRECTIONS}
        return {name: statistics.fmean(v) if v else None for name, v in found.items()}


def mean_sd(values: Iterable[float]) -> tuple[float, float, int]:
    """Mean, sample standard deviation (0 for one value) and n."""
    values = list(values)
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), deviation, len(values)


def leaderboard_rows(runs: Sequence[dict[str, Any]], config: StudyConfig) -> list[Row]:
    """The rows of `confirm.parquet`, or of a part of it, in the order of their first run."""
    rows: dict[str, Row] = {}
    # A finalist that failed under one seed has no mean over the seeds, and cannot win.
    out = {run["name"] for run in runs if run["stage"] == "select" and run.get("reason")}
    for run in runs:
        shared = DistillConfig.from_dict(json.loads(run["config"]))
        row = rows.setdefault(run["name"], Row(name=run["name"], config=shared))
        if run.get("reason"):
            row = replace(row, failed=run["reason"])
        elif run["stage"] == "select":
            if run["name"] not in out:
                figures = _named(run, "val_")
                row = replace(
                    row, val=(*row.val, run[config.metric]),
                    val_metrics=(*row.val_metrics, figures), costs=_costs(run),
                )  # fmt: skip
        else:
            row = replace(
                row, test=(*row.test, run["test_top1"]),
                test_metrics=(*row.test_metrics, _named(run, "test_")), costs=_costs(run),
            )  # fmt: skip
        rows[run["name"]] = row
    return list(rows.values())


def winner_of(rows: Sequence[Row], config: StudyConfig) -> Row | None:
    """The finalist with the best mean of the metric over the confirm seeds; None without one.

    Those that were given fewer seeds than others were out of the race. One that keeps the
    constraints goes before any that does not; if none does, the nearest.
    """
    seeds = max((len(row.val) for row in rows), default=0)
    finalists = [row for row in rows if seeds and len(row.val) == seeds]
    sign = -1 if config.mode == "max" else 1

    def rank(row: Row) -> tuple[float, float]:
        return total_violation(config.bounds, row.means()), sign * mean_sd(row.val)[0]

    return min(finalists, key=rank, default=None)


def ordered(rows: Sequence[Row], config: StudyConfig) -> list[Row]:
    """The winner first and marked, then what has test figures by these, then the finalists."""
    best = winner_of(rows, config)
    sign = -1 if config.mode == "max" else 1
    marked = [replace(row, winner=best is not None and row.name == best.name) for row in rows]
    return sorted(
        marked,
        key=lambda r: (
            not r.winner,
            not r.test,
            -mean_sd(r.test)[0] if r.test else sign * mean_sd(r.val or (0.0,))[0],
        ),
    )


def _named(run: dict[str, Any], prefix: str) -> dict[str, float]:
    return {k: v for k, v in run.items() if k.startswith(prefix) and v is not None}


def _costs(run: dict[str, Any]) -> dict[str, float]:
    return {name: run[name] for name in COSTS if run.get(name) is not None}


def leaderboard_table(board: Sequence[Row], config: StudyConfig) -> pa.Table:
    """One row per configuration, the winner first.

    Returns:
        Columns `name` (of the row: `trial 7`, `none`, ...), `winner`, `failed` (the reason or
        null), for each watched metric and for `test_top1`, `test_nll`, `test_ece` the columns
        `<metric>_mean`, `<metric>_sd` and `<metric>_n` (null, null and 0 where it was not
        measured), and the searched settings as `param_<name>`.
    """
    metrics = dict.fromkeys((*config.watched, *TESTED))
    rows = [
        {
            "name": row.name, "winner": row.winner, "failed": row.failed,
            **_figures(row, metrics, config.metric),
            **{f"param_{name}": _plain(getattr(row.config, name)) for name in config.space or {}},
        }
        for row in board
    ]  # fmt: skip
    return pa.Table.from_pylist(rows)


def _figures(row: Row, metrics: dict[str, None], metric: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in metrics:
        values = [v[name] for v in row.test_metrics if name in v]
        if not name.startswith("test_"):
            values = list(row.val if name == metric else row.figures(name))
        mean, deviation, count = mean_sd(values) if values else (None, None, 0)
        found |= {f"{name}_mean": mean, f"{name}_sd": deviation, f"{name}_n": count}
    return found


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
