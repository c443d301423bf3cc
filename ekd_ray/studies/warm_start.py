"""Knowledge carried over: the best points of finished studies as champions of a new one."""

from __future__ import annotations

import itertools
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from ekd_ray.config import StudyConfig
from ekd_ray.errors import UserError
from ekd_ray.results.study import Study
from ekd_ray.scale.space import Space, check_space, point_config

POINTS = 3  # of each study


def warm_started(config: StudyConfig, runs: Sequence[str | Path]) -> StudyConfig:
    """The study with the best points of other studies as `warm_points`.

    Of each study in `runs` the best trials of full length, at most `POINTS`, are mapped onto
    the space of `config`: what that does not search is left out, a number becomes the nearest
    one of the range. They are tried like any other point and are champions, by the name of their
    study (`from cifar10`, its second one `from cifar10 (2)`); nothing else of the other studies
    is believed.

    Raises:
        UserError: an illegal space, a folder without a study, or a study none of whose trials
            has finished or fits.
    """
    space = check_space(config)
    authors = space.searched_part(config.authors or {})
    added = dict(config.warm_points or {})
    for run in runs:
        study = Study.load(run)
        ranked = study.ranked()
        if not ranked:
            raise UserError(f"{run} has no trial of full length to start from: finish it first.")
        found = [_mapped(record.params, study, config, space) for record in ranked[:POINTS]]
        fitting = [point for point in found if point]
        if not fitting:
            raise UserError(
                f"nothing that {run} searched is searched here ({', '.join(space.parameters)}): "
                "drop it from --warm-start."
            )
        for point in fitting:
            if point not in [authors, *added.values()]:
                added[_free_name(f"from {Path(run).absolute().name}", added)] = point
    own = [p for p in config.first_points if space.searched_part(p) not in added.values()]
    return config.replace(first_points=own, warm_points=added or None)


def _free_name(name: str, taken: Container[str]) -> str:
    """`name`, or with the first number that makes it another: `name (2)`."""
    names = itertools.chain([name], (f"{name} ({count})" for count in itertools.count(2)))
    return next(name for name in names if name not in taken)


def _mapped(
    params: dict[str, Any], study: Study, config: StudyConfig, space: Space
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
