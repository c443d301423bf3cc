"""A few configurations that together are good for all studies at hand, for a pair that is new.

The idea is that of ZeroShot portfolios (Winkelmolen et al., Practical and sample efficient
zero-shot HPO, 2020), with the model of each study in the place of a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ekd_ray.config import StudyConfig
from ekd_ray.config.method_settings import REGISTRY
from ekd_ray.config.phrases import several, short_name
from ekd_ray.config.yaml_files import dump_yaml
from ekd_ray.errors import UserError, spell_controls
from ekd_ray.results.study_model import encode_points, mean_basis, record_outcome
from ekd_ray.results.study_reader import StudyReader
from ekd_ray.results.surrogate import Array
from ekd_ray.scale.model_sampler import APART, distinct_maxima
from ekd_ray.scale.space import Space
from ekd_ray.studies.warm_start import LEAST_TRIALS, map_point

SIZE = 10
MOST = 1000  # configurations
OBSERVED = 3  # of each study, its best trials, are looked at beside the maxima of its model
_KIND = ("method", "standardize", "evidence")  # what carries over between equals only
Point = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Portfolio:
    """Configurations, the one that adds most first.

    Attributes:
        points: their searched values.
        expected: [points, studies] what the model of each study expects of each, in standard
            deviations over the space, 0 for the mean; NaN where it searches none of the values.
        studies: a line for each study that it is of.
        distill: the settings that a study has to share for it.
        space: the ranges of all studies together.
    """

    points: Sequence[Point]
    expected: Array
    studies: Sequence[str]
    distill: Mapping[str, Any]
    space: Mapping[str, Any]

    def to_yaml(self) -> str:
        """As a recipe, which others may extend."""
        count = len(self.studies)
        named = f"portfolio of {count} {'study' if count == 1 else 'studies'}"
        lines = [f"# Written by ekd-ray: {named}:"]
        lines += [f"#   {spell_controls(line)}" for line in self.studies]
        values = {
            "description": named,
            "distill": {**self.distill},
            "space": {**self.space},
            "first_points": [{**point} for point in self.points],
        }
        return "\n".join(lines) + "\n" + dump_yaml(values)


def choose_portfolio(studies: Mapping[str, StudyReader], *, size: int = SIZE) -> Portfolio:
    """The `size` configurations that together are best over studies: `Portfolio`.

    Candidates are the best trials of each study and the maxima of its model. One after the other
    is chosen that raises most the mean, over the studies, of what the best one so far is expected
    to reach there. When none raises it, the count begins anew, with what is left. All are at
    a distance of `APART` of each other, so that there may be fewer.

    Args:
        studies: by name, each with `LEAST_TRIALS` of full length.

    Raises:
        UserError: no study, too few trials, a size that is not 1 to `MOST`, or studies of
            different methods.
    """
    if not 1 <= size <= MOST:
        raise UserError(f"a portfolio has 1 to {MOST} configurations, got {size}.")
    if not studies:
        raise UserError("a portfolio is made of studies: give one or more.")
    for name, study in studies.items():
        if (count := len(study.ranked())) < LEAST_TRIALS:
            raise UserError(
                f"{name} has {several(count, 'trial')} of full length, and a portfolio needs "
                f">= {LEAST_TRIALS}: go on with it (--resume --extend N), or leave it out."
            )
    configs = [study.config for study in studies.values()]
    distill, space = _common_settings(configs), _common_space(configs)
    spaces = [Space(config.space) for config in configs]
    bases = [
        mean_basis(
            [[record_outcome(record, study.config) for record in study.records()]],
            study.config.space or {},
        )
        for study in studies.values()
    ]
    candidates: list[Point] = []
    columns: list[list[float]] = []
    for source, basis, own in zip(studies.values(), bases, spaces, strict=True):
        observed = [record.params for record in source.ranked()[:OBSERVED]]
        for point in [*observed, *distinct_maxima(basis, own, size)]:
            candidates.append({name: value for name, value in point.items() if name in space})
            columns.append([
                _expect(other, map_point(candidates[-1], source, config, theirs), config)
                for other, config, theirs in zip(bases, configs, spaces, strict=True)
            ])  # fmt: skip
    expected = np.array(columns)
    chosen = choose_greedily(expected, encode_points(candidates, space), size)
    return Portfolio(
        points=[candidates[index] for index in chosen], expected=expected[chosen],
        studies=[_describe(name, study) for name, study in studies.items()],
        distill=distill, space=space,
    )  # fmt: skip


def choose_greedily(expected: Array, places: Array, size: int) -> list[int]:
    """Rows that together are best, in the order of their choice.

    Args:
        expected: [candidates, studies], NaN where a study says nothing of one.
        places: [candidates, D], of which the chosen ones are `APART`.
    """
    chosen: list[int] = []
    known = np.nan_to_num(expected, nan=0.0)  # as good as a random draw
    best = np.zeros(expected.shape[1])
    left = np.ones(len(expected), bool)
    while len(chosen) < size and left.any():
        gains = np.where(left, np.maximum(known - best, 0).mean(axis=1), -1.0)
        # Of equal gains, such as none, what is best in the mean.
        index = int(np.lexsort((known.mean(axis=1), gains))[-1])
        if gains[index] <= 0 and best.any():
            best = np.zeros_like(best)
            continue
        chosen.append(index)
        best = np.maximum(best, known[index])
        left &= np.linalg.norm(places - places[index], axis=1) >= APART
    return chosen


def _expect(basis: Any, point: Point, config: StudyConfig) -> float:
    if not point:
        return float("nan")
    return float(basis(encode_points([point], config.space or {}))[0])


def _common_settings(configs: Sequence[StudyConfig]) -> dict[str, Any]:
    """The settings that a study has to share with all of these."""
    shared = [{**config.distill.to_dict(), "space": config.space or {}} for config in configs]
    found: dict[str, Any] = {}
    for name in _KIND:
        values = [None if name in one["space"] else one.get(name) for one in shared]
        if any(value != values[0] for value in values):
            words = sorted({"searched" if v is None else str(v) for v in values})
            raise UserError(
                f"these studies differ in {name} ({', '.join(words)}), and what is good for one "
                "is not for the other: make a portfolio of each kind."
            )
        if values[0]:
            found[name] = values[0]
    if len({one["epochs"] for one in shared}) == 1:
        found["epochs"] = shared[0]["epochs"]
    return found


def _common_space(configs: Sequence[StudyConfig]) -> dict[str, Any]:
    """The parameters that all have, each as wide as all of them together."""
    spaces = [config.space or {} for config in configs]
    epochs = {config.distill.epochs for config in configs}
    found: dict[str, Any] = {}
    for name, entry in spaces[0].items():
        entries = [space[name] for space in spaces if name in space]
        in_epochs = name in REGISTRY and REGISTRY[name].in_epochs
        if len(entries) < len(spaces) or (in_epochs and len(epochs) > 1):
            continue
        merged = {key: value for key, value in entry.items() if key not in ("prior", "when")}
        if all("choices" in other for other in entries):
            listed = [choice for other in entries for choice in other["choices"]]
            merged["choices"] = [c for i, c in enumerate(listed) if c not in listed[:i]]
        elif any("choices" in other for other in entries):
            continue
        else:
            merged |= {"low": min(other["low"] for other in entries),
                       "high": max(other["high"] for other in entries)}  # fmt: skip
        found[name] = merged | ({"when": entry["when"]} if "when" in entry else {})
    if not found:
        raise UserError("these studies have no searched setting in common: leave some out.")
    return found


def _describe(name: str, study: StudyReader) -> str:
    run, trials = study.config.distill, len(study.ranked())
    return (  # without the way to it, because others read the file
        f"{Path(name).name}: {run.teacher or 'no teacher'} into {run.student} on "
        f"{short_name(run.dataset)}, "
        f"{several(run.epochs, 'epoch')}, {several(trials, 'trial')} of full length, "
        f"fingerprint {study.config.fingerprint()[:12]}"
    )
