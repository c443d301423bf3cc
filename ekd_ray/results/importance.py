"""The answers of a study's model on its parameters and on its best trial, and its own error.

It takes seconds to compute (`model_figures`): the report keeps it for `show`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ekd_ray.config import StudyConfig
from ekd_ray.config.phrases import several
from ekd_ray.config.targets import DIRECTIONS, evenly_spaced
from ekd_ray.engine.history import is_epoch
from ekd_ray.errors import Damaged, UserError
from ekd_ray.files import read_json, write_json
from ekd_ray.results.records import RunRecord
from ekd_ray.results.words import figure_text, metric_name, percent, width_text

if TYPE_CHECKING:
    import pyarrow as pa

FILE = "importance.json"
LEAST_TRIALS = 8  # fewer rank nothing
FEW_TRIALS = 20  # of fewer the model's error is a rough figure itself


@dataclass(frozen=True, kw_only=True)
class Effect:
    """The share of the variance of the expected metric over the space that comes of a parameter.

    Attributes:
        main: alone.
        total: with what depends on others too; larger where parameters work together.
    """

    parameter: str
    main: float
    total: float


@dataclass(frozen=True, kw_only=True)
class Validation:
    """How well a model foretells trials of full length that it has not seen, see
    `Surrogate.leave_one_out`; in the unit of their scores.

    Attributes:
        trials: how many, which are those of full length that it is fitted to.
        error: root mean square; spread: the same, if the mean of the others is foretold.
        coverage: the share of them in the 95 % interval that is foretold of a run.
    """

    trials: int
    error: float
    spread: float
    coverage: float

    @property
    def informed(self) -> bool:
        """Whether the model foretells trials better than their mean does."""
        return self.error < self.spread


@dataclass(frozen=True, kw_only=True)
class Findings(Validation):
    """All that the model of a study says, its validation first, in the unit of the metric.

    Attributes:
        effects: of the parameters, the largest first.
        best: the number of the winner's trial, before confirm the best trial's; None without any.
        expected: of full length of `best`, as a mean over seeds; low, high: its 95 % interval.
        regret: by how much the best point of the space is expected to be better than `best`.
    """

    metric: str
    effects: list[Effect]
    best: int | None = None
    expected: float | None = None
    low: float | None = None
    high: float | None = None
    regret: float | None = None


def effects_table(found: Findings | None) -> pa.Table:
    """The effects as a table, empty without any.

    Columns `parameter`, `main` and `total`, and the same in each row `metric`, `trials`, `error`,
    `spread` and `coverage`.
    """
    import pyarrow as pa  # slow to import

    text, number, whole = pa.string(), pa.float64(), pa.int64()
    shared = {"metric": text, "trials": whole, "error": number, "spread": number,
              "coverage": number}  # fmt: skip
    schema = pa.schema({"parameter": text, "main": number, "total": number, **shared})
    same = {name: getattr(found, name, None) for name in shared}
    rows = [{**asdict(effect), **same} for effect in (found.effects if found else ())]
    return pa.Table.from_pylist(rows, schema=schema)


def judged_trials(records: Sequence[RunRecord], metric: str) -> list[tuple[RunRecord, float]]:
    """The trials of full length, each with its metric."""
    found = [(r, r.value(metric)) for r in records if r.status == "complete" and r.params]
    return [(record, score) for record, score in found if score is not None]


def has_enough(scored: Sequence[tuple[RunRecord, float]]) -> bool:
    """Whether trials are enough, and differ, to say anything of the parameters."""
    return len(scored) >= LEAST_TRIALS and len({score for _, score in scored}) > 1


def thin_out(scored: Sequence[tuple[RunRecord, float]], most: int) -> list[tuple[RunRecord, float]]:
    """At most so many trials, evenly over their ranking by score, the best and the worst among
    them; in the order in which they came."""
    order = sorted(range(len(scored)), key=lambda index: scored[index][1])
    return [scored[index] for index in sorted(evenly_spaced(order, most))]


def check_metric(metric: str) -> None:
    """Raise `UserError` for a metric that no trial has."""
    if metric not in DIRECTIONS:
        raise UserError(
            f"metric of the importance must be one of {', '.join(DIRECTIONS)}, got {metric!r}."
        )


def describe_error(found: Findings) -> str:
    """The model's error in a sentence, and what it is worth."""
    metric = found.metric
    error, spread = width_text(metric, found.error), width_text(metric, found.spread)
    if not found.informed:
        return (
            f"The model knows no more than the mean: of a trial that it has not seen its error is "
            f"{error}, that of the mean {spread} ({several(found.trials, 'trial')} of full "
            "length). Its other figures rest on too little."
        )
    rough = f" Of fewer than {FEW_TRIALS} trials that is rough." * (found.trials < FEW_TRIALS)
    return (
        f"The model's error on a trial that it has not seen is {error} (that of the mean: "
        f"{spread}), and {percent(found.coverage)} are in its 95 % intervals "
        f"({several(found.trials, 'trial')} of full length).{rough}"
    )


def describe_expectation(found: Findings) -> str:
    """Sentences on what is expected of the best trial and of the rest of the space; empty without
    one."""
    if found.expected is None or found.regret is None:
        return ""
    figures = (found.expected, found.low, found.high)
    value, low, high = (figure_text(found.metric, figure) for figure in figures)
    return (
        f"Of trial {found.best} the model expects {value} {metric_name(found.metric)} over seeds "
        f"(95 % interval {low} to {high}); the best point of the space is expected to be "
        f"{width_text(found.metric, found.regret)} better."
    )


def write_importance(
    found: Findings | None, records: Sequence[RunRecord], config: StudyConfig, study: Path
) -> None:
    """Keep what was found in a study's folder, with the mark of what it is of."""
    values = {"of": _mark(records, config), "found": None if found is None else asdict(found)}
    write_json(study / FILE, values)


def read_importance(
    records: Sequence[RunRecord], config: StudyConfig, study: Path
) -> Findings | None:
    """The findings that were kept; None if they are of other trials, or damaged."""
    path = study / FILE
    with contextlib.suppress(Damaged):
        kept = read_json(path) if path.exists() else {}
        if kept.get("of") and kept.get("of") == _mark(records, config):
            return _findings_of(kept.get("found"), config)
    return None


def _findings_of(values: Any, config: StudyConfig) -> Findings | None:
    """Findings from a file; None unless they are some of this study."""
    if not isinstance(values, dict) or values.keys() != {f.name for f in fields(Findings)}:
        return None
    rows, space = values["effects"], list(config.space or {})
    whole = isinstance(rows, list) and all(_is_effect(row, space) for row in rows)
    numbers = {n: v for n, v in values.items() if n not in ("effects", "metric")}
    given = all(numbers[name] is not None for name in ("trials", "error", "spread", "coverage"))
    expected = {type(numbers[n]) for n in ("best", "expected", "low", "high", "regret")}
    one = expected == {type(None)} or type(None) not in expected
    if not (whole and given and one and is_epoch({"epoch": 1, **numbers})):
        return None
    if values["metric"] != config.metric:
        return None
    return Findings(**{**values, "effects": [Effect(**row) for row in rows]})


def _is_effect(row: Any, space: Sequence[str]) -> bool:
    if not isinstance(row, dict) or row.keys() != {f.name for f in fields(Effect)}:
        return False
    shares = all(type(row[n]) in (int, float) and 0 <= row[n] <= 1 for n in ("main", "total"))
    return shares and row["parameter"] in space


def _mark(records: Sequence[RunRecord], config: StudyConfig) -> str:
    """A hash of the trials that the findings are of."""
    ended = [(r.number, r.status, len(r.history), r.value(config.metric)) for r in records]
    text = json.dumps([config.metric, config.space, ended], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
