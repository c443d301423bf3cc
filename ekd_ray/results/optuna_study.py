"""Records of trials as a study of Optuna in memory, for its evaluators and its plots."""

from __future__ import annotations

import math
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ekd_ray.config import DistillConfig
from ekd_ray.config.settings import hints_of
from ekd_ray.results.records import RunRecord

Scored = tuple[RunRecord, float]  # a trial and what it is judged by


def coordinate(value: Any, entry: Mapping[str, Any]) -> Any:
    """A parameter's value as the search draws it: a logarithmic one by its logarithm."""
    return math.log10(value) if entry.get("log") and "choices" not in entry else value


def build_study(
    scored: Sequence[Scored], space: Mapping[str, Any], direction: str,
    *, by_coordinate: bool = False,
) -> Any:  # fmt: skip
    """A study of Optuna in memory with complete trials, numbered as they stand in `scored`.

    Args:
        direction: `max` or `min`, whichever is better.
        by_coordinate: hold logarithmic parameters by their logarithm.
    """
    with _quiet_optuna() as optuna:
        study = optuna.create_study(direction="maximize" if direction == "max" else "minimize")
    ranges = {
        name: _distribution(optuna.distributions, name, entry, scored, by_coordinate)
        for name, entry in space.items()
    }
    for record, score in scored:
        params = {
            n: coordinate(v, space[n]) if by_coordinate else v
            for n, v in record.params.items()
            if n in ranges
        }
        distributions = {n: ranges[n] for n in params}
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=distributions, value=score)
        )
    return study


def evaluate_importance(
    scored: Sequence[Scored], space: Mapping[str, Any], direction: str
) -> tuple[dict[str, float], dict[str, float]]:
    """(fANOVA, PED-ANOVA) by parameter.

    Args:
        direction: `max` or `min`, whichever is better.
    """
    with _quiet_optuna() as optuna:
        # By logarithms: over a range that Optuna knows to be logarithmic its fANOVA differs.
        study = build_study(scored, space, direction, by_coordinate=True)
        known = optuna.importance
        evaluators = (known.FanovaImportanceEvaluator(seed=0), known.PedAnovaImportanceEvaluator())
        fanova, ped = (known.get_param_importances(study, evaluator=e) for e in evaluators)
    return fanova, ped


def draw_plot(kind: str, study: Any, params: Sequence[str], target_name: str) -> Any:
    """A plot of `optuna.visualization` over some parameters of a study in memory.

    Args:
        kind: `slice` for `plot_slice`, and so on.
        target_name: the score in words.

    Returns:
        The plotly figure, without its title and its background's colour.
    """
    with _quiet_optuna() as optuna:
        plot = getattr(optuna.visualization, f"plot_{kind}")
        figure = plot(study, params=list(params), target_name=target_name)
    return figure.update_layout(title=None, plot_bgcolor=None, showlegend=False)


@contextmanager
def _quiet_optuna() -> Iterator[Any]:
    """Optuna without its messages and its remarks on few trials: we say how many there are."""
    import optuna  # slow to import, and not every command needs it

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield optuna
    finally:
        optuna.logging.set_verbosity(before)


def _distribution(
    kinds: Any, name: str, entry: Mapping[str, Any], scored: Sequence[Scored], by_coordinate: bool
) -> Any:
    """The range of a parameter, wide enough for what was tried.

    A study that was extended may have tried values outside of its present range.
    """
    tried = [record.params[name] for record, _ in scored if name in record.params]
    if "choices" in entry:
        return kinds.CategoricalDistribution(tuple(dict.fromkeys([*entry["choices"], *tried])))
    ends = [entry["low"], entry["high"], *tried]
    low, high, log = min(ends), max(ends), bool(entry.get("log"))
    kind = hints_of(DistillConfig)[name]
    if float not in (set(typing.get_args(kind)) or {kind}) and not log:
        return kinds.IntDistribution(int(low), int(high))
    if by_coordinate:
        low, high, log = coordinate(low, entry), coordinate(high, entry), False
    return kinds.FloatDistribution(float(low), float(high), log=log)
