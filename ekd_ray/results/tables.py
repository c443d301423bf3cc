"""The leaderboard as a table of plain columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from ekd_ray.config import StudyConfig
from ekd_ray.results.leaderboard import Row, mean_sd

TESTED = ("test_top1", "test_nll", "test_ece")


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
