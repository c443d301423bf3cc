"""How much each searched parameter mattered, by two methods of Optuna.

fANOVA (Hutter et al., ICML 2014) says which share of the score's variance over the space a
parameter explains by itself; PED-ANOVA (Watanabe et al., IJCAI 2023) which parameters the best
tenth of the trials have in common.
"""

from __future__ import annotations

import math
import statistics
import typing
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.targets import COSTS, DIRECTIONS
from ekd_ray.errors import UserError
from ekd_ray.results.records import RunRecord, milestone_epochs

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

# Fewer say little: of ten, PED-ANOVA's best tenth is a single trial.
LEAST_TRIALS = 20
SCHEMA = pa.schema(
    [
        ("parameter", pa.string()),
        ("fanova", pa.float64()),
        ("ped_anova", pa.float64()),
        ("metric", pa.string()),
        ("epoch", pa.int64()),
        ("trials", pa.int64()),
    ]
)
_HINTS = typing.get_type_hints(DistillConfig)


def score_at(record: RunRecord, metric: str, epoch: int) -> float | None:
    """A trial's metric after an epoch, or None if it did not come so far; a cost is of no epoch."""
    if metric in COSTS:
        return record.last.get(metric)
    row = next((row for row in record.history if row["epoch"] == epoch), {})
    return row.get(metric)


def judged_epoch(records: Sequence[RunRecord], config: StudyConfig, metric: str) -> int:
    """The last rung that `LEAST_TRIALS` trials reached, or the first one if none did.

    Trials of full length alone would be few, and chosen: they are what the rungs let through.
    """
    rungs = milestone_epochs(config)
    reached = [
        epoch
        for epoch in rungs
        if sum(score_at(record, metric, epoch) is not None for record in records) >= LEAST_TRIALS
    ]
    return reached[-1] if reached else rungs[0]


def coordinate(value: Any, entry: Mapping[str, Any]) -> Any:
    """A parameter's value as the search draws it: a logarithmic one by its logarithm."""
    return math.log10(value) if entry.get("log") and "choices" not in entry else value


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
        epoch: trials are judged by the metric after this epoch (see `judged_epoch`).

    Returns:
        Columns `parameter`, `fanova`, `ped_anova` (each sums to 1; fanova is null for a
        parameter that not every trial has), `metric`, `epoch` and `trials` (how many were
        judged). Empty with fewer than two trials, or where all scored the same.

    Raises:
        UserError: an unknown metric.
    """
    metric = metric or config.metric
    if metric not in DIRECTIONS:
        raise UserError(
            f"metric of the importance must be one of {', '.join(DIRECTIONS)}, got {metric!r}."
        )
    epoch = judged_epoch(records, config, metric) if epoch is None else epoch
    scored = [(r, s) for r in records if (s := score_at(r, metric, epoch)) is not None and r.params]
    if len(scored) < 2 or statistics.pstdev(score for _, score in scored) == 0:
        return SCHEMA.empty_table()
    fanova, ped = _evaluate(scored, config.space or {}, DIRECTIONS[metric])
    order = sorted(ped, key=lambda name: (-fanova.get(name, -1.0), -ped[name], name))
    rows = [
        {
            "parameter": name, "fanova": fanova.get(name), "ped_anova": ped[name],
            "metric": metric, "epoch": epoch, "trials": len(scored),
        }
        for name in order
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def _evaluate(
    scored: Sequence[tuple[RunRecord, float]], space: Mapping[str, Any], direction: str
) -> tuple[dict[str, float], dict[str, float]]:
    """(fANOVA, PED-ANOVA) by parameter."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(direction="maximize" if direction == "max" else "minimize")
        ranges = {name: _distribution(name, entry, scored) for name, entry in space.items()}
        for record, score in scored:
            params = {n: v for n, v in record.params.items() if n in ranges}
            study.add_trial(
                optuna.trial.create_trial(
                    params={n: coordinate(v, space[n]) for n, v in params.items()},
                    distributions={n: ranges[n] for n in params},
                    value=score,
                )
            )
        with warnings.catch_warnings():  # Optuna's remarks on few trials: we say how many
            warnings.simplefilter("ignore")
            fanova = optuna.importance.get_param_importances(
                study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
            )
            ped = optuna.importance.get_param_importances(
                study, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
            )
    finally:
        optuna.logging.set_verbosity(before)
    return fanova, ped


def _distribution(
    name: str, entry: Mapping[str, Any], scored: Sequence[tuple[RunRecord, float]]
) -> BaseDistribution:
    """The range of a parameter in `coordinate`s, wide enough for what was tried.

    A study that was extended may have tried values outside of its present range.
    """
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    tried = [record.params[name] for record, _ in scored if name in record.params]
    if "choices" in entry:
        return CategoricalDistribution(tuple(dict.fromkeys([*entry["choices"], *tried])))
    ends = [coordinate(value, entry) for value in (entry["low"], entry["high"], *tried)]
    kinds = set(typing.get_args(_HINTS[name])) or {_HINTS[name]}
    if float not in kinds and not entry.get("log"):
        return IntDistribution(int(min(ends)), int(max(ends)))
    return FloatDistribution(float(min(ends)), float(max(ends)))
