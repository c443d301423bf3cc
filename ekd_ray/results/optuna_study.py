"""Records of trials as a study of Optuna in memory, for its plots."""

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


def build_study(scored: Sequence[Scored], space: Mapping[str, Any], direction: str) -> Any:
    """A study of Optuna in memory with complete trials, numbered as they stand in `scored`.

    Args:
        direction: `max` or `min`, whichever is better.
    """
    with _quiet_optuna() as optuna:
        study = optuna.create_study(direction="maximize" if direction == "max" else "minimize")
    ranges = {
        name: _distribution(optuna.distributions, name, entry, scored)
        for name, entry in space.items()
    }
    for record, score in scored:
        params = {n: v for n, v in record.params.items() if n in ranges}
        distributions = {n: ranges[n] for n in params}
        study.add_trial(
            optuna.trial.create_trial(params=params, distributions=distributions, value=score)
        )
    return study


def draw_plot(kind: str, study: Any, params: Sequence[str], target_name: str) -> Any:
    """A plot of `optuna.visualization` over some parameters of a study in memory.

    Args:
        kind: `slice` stands for `plot_slice`, and so on.
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


def _distribution(kinds: Any, name: str, entry: Mapping[str, Any], scored: Sequence[Scored]) -> Any:
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
    return kinds.FloatDistribution(float(low), float(high), log=log)
