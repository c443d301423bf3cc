"""The model of a study's whole space, as its trials tell it: a `Surrogate` fitted to their scores.

The search proposes by it, finalists are chosen by it, and other studies are learned from by it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ekd_ray.config import StudyConfig
from ekd_ray.config.ranges import place_in_range, reach_tried
from ekd_ray.config.targets import as_loss, evenly_spaced
from ekd_ray.results.importance import Validation
from ekd_ray.results.records import RunRecord, milestone_epochs
from ekd_ray.results.surrogate import Array, Basis, Observations, Surrogate

MOST_TRIALS = 150  # that a model is fitted to, because its cost is their third power
LEAST_TRIALS = 4  # with a score of full length, to choose by
REACH = 1.959964  # standard deviations, to the ends of a 95 % interval
_GRID = 2048  # points over which the mean of a study is standardised

Entries = Mapping[str, Mapping[str, Any]]  # of a space


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A trial as a model sees it.

    Attributes:
        params: its searched values.
        scores: by level, larger is better: 0 for full length, 1 for the last rung, 2 for the one
            before. Of a trial that diverged -inf at level 0.
    """

    params: Mapping[str, Any]
    scores: Mapping[int, float]


def trial_outcome(
    params: Mapping[str, Any], values: Mapping[int, float], config: StudyConfig, *,
    complete: bool = False, diverged: bool = False,
) -> Outcome:  # fmt: skip
    """The outcome of a trial of a study, from its metric by epoch, larger is better.

    Args:
        complete: the last epoch is the one of full length.
    """
    milestones = milestone_epochs(config)
    scores = {
        len(milestones) - 1 - index: values[epoch]
        for index, epoch in enumerate(milestones)
        if epoch in values
    }
    if complete and values:
        scores[0] = values[max(values)]
    return Outcome(params=params, scores={0: -math.inf} if diverged else scores)


def record_outcome(record: RunRecord, config: StudyConfig, metric: str | None = None) -> Outcome:
    """The outcome of a recorded trial of a study, by its own metric or another one."""
    metric = metric or config.metric
    values = {
        row["epoch"]: -as_loss(row[metric], metric)
        for row in record.history
        if row.get(metric) is not None
    }
    return trial_outcome(
        record.params, values, config, complete=record.status == "complete",
        diverged=record.status == "failed" and is_divergence(record.reason),
    )  # fmt: skip


def is_divergence(reason: str | None) -> bool:
    """Whether a run failed because of its settings: a loss or a weight became infinite."""
    return " became " in (reason or "")


def encode_points(points: Sequence[Mapping[str, Any]], space: Entries) -> Array:
    """Points of a space as coordinates in [0, 1], [N, D].

    A number lies along its (logarithmic) range; a choice has one coordinate per value; a
    parameter that a point lacks, because its condition does not hold, lies in the middle.
    """
    return np.array([_encode(point, space) for point in points]).reshape(len(points), -1)


def _encode(point: Mapping[str, Any], space: Entries) -> list[float]:
    coordinates: list[float] = []
    for name, entry in space.items():
        value = point.get(name)
        if "choices" in entry:
            coordinates += [float(value == choice) for choice in entry["choices"]]
        else:
            coordinates.append(0.5 if value is None else _place(value, entry))
    return coordinates


def _place(value: float, entry: Mapping[str, Any]) -> float:
    """A place in [0, 1], because a trial may lie outside of a range that was narrowed since."""
    place = place_in_range(value, entry["low"], entry["high"], log=entry.get("log", False))
    return min(max(place, 0.0), 1.0)


def fit_model(
    outcomes: Iterable[Outcome], space: Entries, *, basis: Basis | None = None,
    like: Surrogate | None = None,
) -> Surrogate | None:  # fmt: skip
    """The surrogate of what trials have scored; None without any score or
    searched setting.

    Of more than `MOST_TRIALS` some stand for all, see `thin_out`.

    Args:
        basis, like: see `Surrogate`.
    """
    known = thin_out(list(outcomes), MOST_TRIALS)
    if not (known and space):
        return None
    scored = [
        (index, level, score)
        for index, outcome in enumerate(known)
        for level, score in outcome.scores.items()
    ]
    places, levels, scores = (np.array(column) for column in zip(*scored, strict=True))
    inputs = encode_points([outcome.params for outcome in known], space)[places]
    return Surrogate(Observations(inputs, levels, scores.astype(float)), basis=basis, like=like)


def validate_model(model: Surrogate) -> Validation:
    """The validation of a model that has seen two trials of full length, or more."""
    scores, means, deviations = model.leave_one_out()
    others = (scores.sum() - scores) / (len(scores) - 1)
    error, spread = (float(np.sqrt(((scores - m) ** 2).mean())) for m in (means, others))
    coverage = float((np.abs(scores - means) <= REACH * deviations).mean())
    return Validation(trials=len(scores), error=error, spread=spread, coverage=coverage)


def thin_out(outcomes: Sequence[Outcome], most: int) -> list[Outcome]:
    """At most so many of the outcomes that have a score, in their order: the best half of these,
    and of the others some that are spread evenly."""
    scored = [outcome for outcome in outcomes if outcome.scores]
    if len(scored) <= most:
        return scored

    def key(index: int) -> tuple[int, float]:
        level, score = min(scored[index].scores.items())
        return level, -score

    order = sorted(range(len(scored)), key=key)
    best, others = order[: most // 2], sorted(order[most // 2 :])
    chosen = sorted([*best, *evenly_spaced(others, most - len(best))])
    return [scored[index] for index in chosen]


def mean_basis(studies: Iterable[Sequence[Outcome]], space: Entries) -> Basis:
    """The mean over studies of their posterior means, each with mean 0 and variance 1 over the
    space."""
    models = [model for study in studies if (model := fit_model(study, space)) is not None]
    dims = len(_encode({}, space))
    grid = np.random.default_rng(0).random((_GRID, dims))
    known = [model.mean(grid) for model in models]
    scales = [(float(mean.mean()), float(mean.std()) or 1.0) for mean in known]

    def basis(inputs: Array) -> Array:
        means = [
            (model.mean(inputs) - center) / scale
            for model, (center, scale) in zip(models, scales, strict=True)
        ]
        return np.mean(means, axis=0)

    return basis


def known_basis(config: StudyConfig) -> Basis | None:
    """The mean expectation of the other studies that a study knows; None without any."""
    if not config.known_studies:
        return None
    studies = [
        [
            Outcome(
                params=trial["point"],
                scores={lv: score for lv, score in enumerate(trial["scores"]) if score is not None},
            )
            for trial in trials
        ]
        for trials in config.known_studies.values()
    ]
    return mean_basis(studies, config.space or {})


def rank_by_model(
    ranked: Sequence[RunRecord], records: Sequence[RunRecord], config: StudyConfig
) -> list[RunRecord]:
    """Complete trials, the best first by what the model of a study expects of them.

    The best of many noisy scores has been lucky; the model takes a share of that away.

    Args:
        ranked: they, the best first by their own scores; fewer than `LEAST_TRIALS` stay so.
        records: all trials of the study.
    """
    space = reach_tried(config.space, [record.params for record in records])
    basis = known_basis(config.replace(space=space))
    outcomes = [record_outcome(record, config) for record in records]
    model = fit_model(outcomes, space, basis=basis)
    if model is None or len(ranked) < LEAST_TRIALS:
        return [*ranked]
    means = model.mean(encode_points([record.params for record in ranked], space))
    return [ranked[index] for index in np.argsort(-means, kind="stable")]
