"""How much each searched parameter mattered, by two methods of Optuna.

fANOVA (Hutter et al., ICML 2014) says which share of the score's variance over the space a
parameter explains by itself; PED-ANOVA (Watanabe et al., IJCAI 2023) which parameters the best
tenth of the trials have in common.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from ekd_ray.config import StudyConfig
from ekd_ray.config.targets import COSTS, DIRECTIONS, evenly_spaced
from ekd_ray.engine.history import is_epoch
from ekd_ray.errors import Damaged, UserError
from ekd_ray.files import read_json, write_json
from ekd_ray.results.optuna_study import evaluate_importance
from ekd_ray.results.records import RunRecord

FILE = "importance.json"
LEAST_TRIALS = 8  # fewer rank nothing
MOST_TRIALS = 250  # more make fANOVA slow, and its shares no surer
SCHEMA = pa.schema(
    {
        "parameter": pa.string(), "fanova": pa.float64(), "ped_anova": pa.float64(),
        "metric": pa.string(), "epoch": pa.int64(), "trials": pa.int64(),
    }
)  # fmt: skip


def score_at(record: RunRecord, metric: str, epoch: int) -> float | None:
    """A trial's metric after an epoch, or None if it did not come so far; a cost is of no epoch."""
    if metric in COSTS:
        return record.last.get(metric)
    row = next((row for row in record.history if row["epoch"] == epoch), {})
    return row.get(metric)


def judged_trials(
    records: Sequence[RunRecord], metric: str, epoch: int | None = None
) -> list[tuple[RunRecord, float]]:
    """The trials that parameters are judged by, each with its metric.

    Args:
        epoch: after which the metric is taken; without it those of full length, at their end: a
            score of few epochs says little of that of many.
    """
    if epoch is None:
        found = [(r, r.value(metric)) for r in records if r.status == "complete" and r.params]
    else:
        found = [(r, score_at(r, metric, epoch)) for r in records if r.params]
    return [(record, score) for record, score in found if score is not None]


def thin_out(scored: Sequence[tuple[RunRecord, float]], most: int) -> list[tuple[RunRecord, float]]:
    """At most so many trials, evenly over their ranking by score, the best and the worst among
    them; in the order in which they came."""
    order = sorted(range(len(scored)), key=lambda index: scored[index][1])
    return [scored[index] for index in sorted(evenly_spaced(order, most))]


def parameter_importance(
    records: Sequence[RunRecord],
    config: StudyConfig,
    *,
    metric: str | None = None,
    epoch: int | None = None,
) -> pa.Table:
    """Importance of the searched parameters, the most important by fANOVA first.

    Args:
        metric: an objective or another metric of the trials (the study's metric).
        epoch: trials are judged by the metric after this epoch; without it those of full length
            by their last, of which the rungs let through the better ones only.

    Returns:
        Columns `parameter`, `fanova`, `ped_anova` (each sums to 1; fanova is null for a
        parameter that not every trial has), `metric`, `epoch` (null without one) and
        `trials` (how many were judged, at most `MOST_TRIALS`: see `thin_out`). Empty with fewer
        than `LEAST_TRIALS` trials, or where all scored the same.

    Raises:
        UserError: an unknown metric.
    """
    metric = metric or config.metric
    if metric not in DIRECTIONS:
        raise UserError(
            f"metric of the importance must be one of {', '.join(DIRECTIONS)}, got {metric!r}."
        )
    scored = _scored(records, metric, epoch)
    if not scored:
        return pa.Table.from_batches([], schema=SCHEMA)
    fanova, ped = evaluate_importance(scored, config.space or {}, DIRECTIONS[metric])
    order = sorted(ped, key=lambda name: (-fanova.get(name, -1.0), -ped[name], name))
    rows = [
        {
            "parameter": name, "fanova": fanova.get(name), "ped_anova": ped[name],
            "metric": metric, "epoch": epoch, "trials": len(scored),
        }
        for name in order
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _scored(
    records: Sequence[RunRecord], metric: str, epoch: int | None = None
) -> list[tuple[RunRecord, float]]:
    """The trials that are evaluated; none where too few or equal scores would rank nothing."""
    scored = thin_out(judged_trials(records, metric, epoch), MOST_TRIALS)
    equal = len({score for _, score in scored}) < 2
    return [] if equal or len(scored) < LEAST_TRIALS else scored


def write_importance(
    table: pa.Table, records: Sequence[RunRecord], config: StudyConfig, study: Path
) -> None:
    """Keep the importance for the study's metric in its folder, with the mark of what it is of."""
    write_json(study / FILE, {"of": _mark(records, config), "rows": table.to_pylist()})


def read_importance(
    records: Sequence[RunRecord], config: StudyConfig, study: Path
) -> list[dict[str, Any]] | None:
    """The rows that `write_importance` has kept; None if they are of other trials, or damaged.

    Without any, as `parameter_importance`, where nothing can be ranked. Not as a table, which
    pyarrow makes of rows with the help of pandas: half a second to import.
    """
    if not _scored(records, config.metric):
        return []
    path = study / FILE
    with contextlib.suppress(Damaged):
        found = read_json(path) if path.exists() else {}
        rows = found.get("rows")
        if found.get("of") == _mark(records, config) and isinstance(rows, list):
            return rows if all(_is_row(row, config) for row in rows) else None
    return None


def _is_row(row: Any, config: StudyConfig) -> bool:
    if not isinstance(row, dict) or row.keys() != {*SCHEMA.names} or row["ped_anova"] is None:
        return False
    shares = {name: row[name] for name in ("fanova", "ped_anova", "trials")}
    known = row["metric"] == config.metric and row["parameter"] in list(config.space or {})
    return known and is_epoch({"epoch": 1, **shares})


def _mark(records: Sequence[RunRecord], config: StudyConfig) -> str:
    """A hash of all that the importance for the study's metric is computed from."""
    judged = [(r.number, r.params, score) for r, score in _scored(records, config.metric)]
    text = json.dumps([config.metric, config.space, judged], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
