"""Where a study's hours went, and what early stops and the teacher's cache saved of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ekd_ray.config import DistillConfig
from ekd_ray.data import held_out_size, num_train
from ekd_ray.data import steps_per_epoch as count_steps
from ekd_ray.engine.runlog import read_history
from ekd_ray.errors import UserError
from ekd_ray.losses.methods import method_of
from ekd_ray.results.records import CACHE_COST, TrialRecord
from ekd_ray.results.study import Study

SCHEMA = pa.schema(
    [("stage", pa.string()), ("runs", pa.int64()), ("epochs", pa.int64()), ("hours", pa.float64())]
)
SEARCH_STAGES = {
    "complete": "search: trials of full length",
    "pruned": "search: stopped early",
    "failed": "search: failed",
    "running": "search: running",
}


@dataclass(frozen=True, kw_only=True)
class Savings:
    """What was not computed.

    `stopped_epochs` and `stopped_hours`: what early-stopped trials would still have trained, at
    their own pace. `views`: how often a run needed the teacher's answer; `asked`: how often the
    network was asked instead of the table; `cache_hours`: the rest at the pace at which the table
    was filled, None where no pace was measured, and all three None without a record of a fill.
    """

    stopped_epochs: int
    stopped_hours: float
    views: int | None = None
    asked: int | None = None
    cache_hours: float | None = None


def time_table(study: Study, running: list[TrialRecord] | None = None) -> pa.Table:
    """One row per stage that ran: `stage`, `runs`, `epochs` and `hours` of training and
    validation, all runs together."""
    stages: dict[str, list[list[dict[str, Any]]]] = {"teacher": [], "teacher's cache": []}
    stages["teacher"] = [found] if (found := read_history(study.path / "teacher")) else []
    for status, name in SEARCH_STAGES.items():
        known = [*study.records(), *(running or [])]
        stages[name] = [r.history for r in known if r.status == status and r.history]
    for stage, name in (("select", "confirm: finalists"), ("final", "confirm: final runs")):
        folders = sorted((study.path / "confirm").glob(f"{stage}-*"))
        stages[name] = [rows for folder in folders if (rows := read_history(folder))]
    rows = [
        {
            "stage": name,
            "runs": len(runs),
            "epochs": sum(len(rows) for rows in runs),
            "hours": sum(row.get("seconds", 0.0) for rows in runs for row in rows) / 3600,
        }
        for name, runs in stages.items()
        if runs
    ]
    filled = _fill(study)
    if filled.get("rows"):
        rows.append(
            {"stage": "teacher's cache", "runs": None, "epochs": None,
             "hours": _pace(filled) * filled["rows"] / 3600}
        )  # fmt: skip
    order = list(stages)
    return pa.Table.from_pylist(sorted(rows, key=lambda r: order.index(r["stage"])), schema=SCHEMA)


def savings(study: Study) -> Savings:
    """See `Savings`."""
    total = study.config.distill.epochs
    epochs, seconds = 0, 0.0
    for record in study.records():
        if record.status == "pruned" and record.history:
            left = total - len(record.history)
            epochs += left
            seconds += left * record.seconds / len(record.history)
    filled = _fill(study)
    views = _views(study) if filled else None
    if views is None:
        return Savings(stopped_epochs=epochs, stopped_hours=seconds / 3600)
    asked = int(filled["rows"])
    spared = max(0, views - asked) * _pace(filled) / 3600 if filled["timed_rows"] else None
    return Savings(
        stopped_epochs=epochs, stopped_hours=seconds / 3600, views=views, asked=asked,
        cache_hours=spared,
    )  # fmt: skip


def _fill(study: Study) -> dict[str, float]:
    path = study.path / CACHE_COST
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _pace(filled: dict[str, float]) -> float:
    """Seconds per row of the teacher's table, on one slot."""
    return filled["seconds"] / filled["timed_rows"] if filled["timed_rows"] else 0.0


def _views(study: Study) -> int | None:
    """How often runs of the study needed the teacher; None where the data set is not known here."""
    shared = study.config.distill
    try:
        total = shared.train_subset or num_train(shared.dataset, data_root=study.config.data_root)
    except (UserError, OSError):
        return None
    views = sum(
        _drawn(DistillConfig.from_dict(record.config), total, len(record.history))
        for record in study.records()
        if record.config
    )
    table = study.confirmed()
    seen = set()
    for row in table.to_pylist() if table else []:
        if row["folder"] not in seen:  # equal configurations share one run
            seen.add(row["folder"])
            config = DistillConfig.from_dict(json.loads(row["config"]))
            views += _drawn(config, total, len(read_history(study.path / row["folder"])))
    return views


def _drawn(config: DistillConfig, total: int, epochs: int) -> int:
    method = method_of(config)
    if not method.needs_teacher:
        return 0
    trained = total - held_out_size(total, config.validation_fraction)
    steps = count_steps(trained, config.batch_size)
    return epochs * steps * config.batch_size * (2 if method.strong_view else 1)
