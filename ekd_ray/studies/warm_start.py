"""Knowledge carried over: what finished studies found, for the search of a new one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ekd_ray.config import StudyConfig
from ekd_ray.errors import UserError
from ekd_ray.results.study import Study
from ekd_ray.results.study_model import (
    Outcome,
    encode_points,
    known_basis,
    record_outcome,
    thin_out,
)
from ekd_ray.results.study_reader import StudyReader
from ekd_ray.results.surrogate import Array
from ekd_ray.scale.model_sampler import Coordinates, distinct_maxima
from ekd_ray.scale.prior import fade
from ekd_ray.scale.space import Space, check_space, point_config

POINTS = 3  # that are tried first: of the model of all studies, and of each that is too small
LEAST_TRIALS = 8  # of full length, for a study to be learned from by a model
MOST_TRIALS = 60  # of each study that are kept
DIGITS = 6  # of their scores


def warm_started(config: StudyConfig, runs: Sequence[str | Path]) -> StudyConfig:
    """The study with what other studies know: `known_studies`, and first points, `warm_points`.

    The trials of each study in `runs` are mapped onto the space of `config`: what that does not
    search is left out, a number becomes the nearest one of the range. From studies with at least
    `LEAST_TRIALS` of full length the search learns, see `learn_from`; of a smaller one the best
    `POINTS` are tried first. First points are champions by the name of their study (`from
    cifar10 trial 4`; `from cifar10` and `from cifar10 (2)` are those of which it expects most),
    and judged like any other.

    Raises:
        UserError: an illegal space, a folder without a study, or a study none of whose trials
            has finished or fits.
    """
    space = check_space(config)
    known: dict[str, list[Outcome]] = {}
    for run in runs:
        study = Study.load(run)
        ranked = study.ranked()
        if not ranked:
            raise UserError(f"{run} has no trial of full length to start from: finish it first.")
        mapped = {r.number: map_point(r.params, study, config, space) for r in study.records()}
        fitting = [r.number for r in ranked if mapped[r.number]]
        if not fitting:
            _refuse_other_method(run, study, config, space)
            raise UserError(
                f"nothing that {run} searched is searched here ({', '.join(space.parameters)}): "
                "drop it from --warm-start."
            )
        name = Path(run).absolute().name
        if len(fitting) < LEAST_TRIALS:
            named = {f"from {name} trial {n}": mapped[n] for n in fitting[:POINTS]}
            config = _with_points(config, space, named)
            continue
        outcomes = [
            replace(record_outcome(r, study.config, config.metric), params=mapped[r.number])
            for r in study.records()
            if mapped[r.number]
        ]
        known[_free_name(name, known)] = outcomes
    return learn_from(config, known) if known else config


def _refuse_other_method(
    run: str | Path, study: StudyReader, config: StudyConfig, space: Space
) -> None:
    """Raise `UserError` if none of the study's trials is of a method that is tried here."""
    shared = study.config.distill.method
    theirs = sorted({record.params.get("method", shared) for record in study.records()})
    here = space.parameters.get("method")
    tried = here.choices if here and here.choices else (config.distill.method,)
    if not {*theirs} & {*tried}:
        raise UserError(
            f"{run} searched with method {' and '.join(theirs)}, this study would with "
            f"{' and '.join(tried)}, and what is good for one method says little of another: "
            f"give --method {theirs[0]}, or drop it from --warm-start."
        )


def learn_from(config: StudyConfig, known: Mapping[str, Sequence[Outcome]]) -> StudyConfig:
    """The study with the outcomes of other ones as `known_studies`, at most `MOST_TRIALS` of each,
    and with the `POINTS` of which all of these together, and the user's priors, expect most among
    its `warm_points`.

    Where they expect less of the authors' values than of a random draw, the search does not try
    these (`try_authors`), because the first trials take the longest to learn from: they are
    confirmed alone.

    Args:
        known: by the name of the study, with the searched values of this one's space.
    """
    space = Space(config.space)
    kept = dict(config.known_studies or {})
    for name, outcomes in known.items():
        whole = [outcome for outcome in outcomes if -math.inf not in outcome.scores.values()]
        trials = [_kept(outcome) for outcome in thin_out(whole, MOST_TRIALS)]
        if trials not in kept.values():
            kept[_free_name(name, kept)] = trials
    config = config.replace(known_studies=kept)
    basis = known_basis(config)
    assert basis is not None
    coordinates = Coordinates(space)

    def worth(rows: Array) -> Array:
        return basis(rows) + fade(0) * coordinates.log_prior(rows)

    tried = {name for trials in kept.values() for trial in trials for name in trial["point"]}
    sources = " + ".join(kept) if len(kept) <= POINTS else f"{len(kept)} studies"
    points: dict[str, dict[str, Any]] = {}
    for point in distinct_maxima(worth, space, POINTS):
        name = _free_name(f"from {sources}", {*points, *(config.warm_points or {})})
        points[name] = {key: value for key, value in point.items() if key in tried}
    if config.authors and config.try_authors is None:
        authors = encode_points([space.searched_part(config.authors)], config.space or {})
        config = config.replace(try_authors=bool(basis(authors)[0] >= 0))
    return _with_points(config, space, points)


def _with_points(
    config: StudyConfig, space: Space, points: Mapping[str, dict[str, Any]]
) -> StudyConfig:
    """The study with further `warm_points`, but for those that it has."""
    authors = space.searched_part(config.authors or {})
    added = dict(config.warm_points or {})
    for name, point in points.items():
        if point not in [authors, *added.values()]:
            added[_free_name(name, added)] = point
    own = [p for p in config.first_points if space.searched_part(p) not in added.values()]
    return config.replace(first_points=own, warm_points=added or None)


def _kept(outcome: Outcome) -> dict[str, Any]:
    """An outcome as a study's file has it: its point, and a score for each level or null."""
    top = min(outcome.scores)
    scores = [None] * top + [round(outcome.scores[top], DIGITS)]
    return {"point": dict(outcome.params), "scores": scores}


def _free_name(name: str, taken: Container[str]) -> str:
    """`name`, or with the first number that makes it another: `name (2)`."""
    names = itertools.chain([name], (f"{name} ({count})" for count in itertools.count(2)))
    return next(name for name in names if name not in taken)


def map_point(
    params: Mapping[str, Any], study: StudyReader, config: StudyConfig, space: Space
) -> dict[str, Any]:
    """A point of another study in this space; empty if nothing of it is searched here."""
    shared = study.config.distill.to_dict()
    method = params.get("method", shared["method"])
    # What was found under one evidence function does not carry over to another.
    given = {"evidence": shared["evidence"], **params, "method": method}
    if "method" not in space.parameters and method != config.distill.method:
        return {}
    point: dict[str, Any] = {}
    for name, parameter in space.parameters.items():
        value = given.get(name)
        if value is None or not parameter.applies(point):
            continue
        if parameter.choices is None:
            value = parameter.nearest(value)
        if parameter.contains(value):
            point[name] = value
    if "method" in space.parameters and "method" not in point:
        return {}
    try:
        point_config(config.distill, point)
    except UserError:
        return {}
    return point
