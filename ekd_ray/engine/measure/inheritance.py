"""How much of its teacher's uncertainty a student has: on which images, and how far apart."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from ekd_ray.engine.measure.metrics import log_probabilities
from ekd_ray.engine.measure.uncertainty import score_images
from ekd_ray.errors import UserError, require
from ekd_ray.files import read_json, write_json
from ekd_ray.losses.inputs import categorical_kl

FILE = "inherited.json"
MOST_POINTS = 400  # of a split, that a figure shows


def spearman(one: Tensor, other: Tensor) -> float:
    """Rank correlation of two scores [N], equal ones sharing their mean rank; NaN if all are equal,
    or one is NaN."""
    if one.isnan().any() or other.isnan().any():
        return math.nan
    ranks = torch.stack([_mean_ranks(one), _mean_ranks(other)])
    centred = ranks - ranks.mean(dim=1, keepdim=True)
    product, (a, b) = (centred[0] * centred[1]).sum(), centred.square().sum(dim=1)
    return float(product / (a * b).sqrt()) if a * b > 0 else math.nan


def _mean_ranks(scores: Tensor) -> Tensor:
    _, group, counts = torch.unique(
        scores.detach().cpu().double(), return_inverse=True, return_counts=True
    )
    return (counts.cumsum(0) - (counts - 1) / 2)[group].double()


def dirichlet_vacuity(logits: Tensor) -> Tensor:
    """The negative log of the total evidence [N], which ranks images as vacuity does, from logits
    [N, C] or an ensemble's log of the concentration; of a softmax's logits it is the energy."""
    return score_images("energy", logits, None)


def compare_uncertainty(
    student: Tensor, teacher: Tensor, *, log_prior: float | None, teacher_log_prior: float | None
) -> dict[str, float]:
    """The student's uncertainty against the teacher's, on the same images.

    Args:
        student, teacher: logits [N, C], any float dtype.
        log_prior, teacher_log_prior: log of the prior mass per class; None where the logits are
            those of a softmax or of an ensemble.

    Returns:
        `vacuity_corr` and `entropy_corr`, Spearman's correlations of the two sides' vacuity
        (`dirichlet_vacuity`) and of the entropy of their class probabilities, -1 to 1 and left out
        where one side has the same for all images; `teacher_kl`, the mean over the images of
        `KL(p_t || p_s)` of these probabilities, nats.

    Raises:
        ValueError: the shapes differ.
    """
    if student.shape != teacher.shape:
        expected, got = tuple(student.shape), tuple(teacher.shape)
        raise ValueError(f"teacher must have the shape of student, {expected}, got {got}")
    mine = log_probabilities(student.double(), log_prior)
    theirs = log_probabilities(teacher.double().to(student.device), teacher_log_prior)
    values = {
        "vacuity_corr": spearman(dirichlet_vacuity(student), dirichlet_vacuity(teacher)),
        "entropy_corr": spearman(
            score_images("entropy", student, log_prior),
            score_images("entropy", teacher, teacher_log_prior),
        ),
    }
    found = {name: value for name, value in values.items() if not math.isnan(value)}
    return found | {"teacher_kl": float(categorical_kl(theirs, mine).mean())}


@dataclass(frozen=True, kw_only=True)
class Inheritance:
    """Figures of `compare_uncertainty` by set of images (`test`, `noise`, ...), and some points.

    `points` are [teacher's, student's] `dirichlet_vacuity` of up to `MOST_POINTS` images of each
    set, which is the negative log of the total evidence.
    """

    figures: dict[str, dict[str, float]]
    points: dict[str, list[list[float]]]

    @classmethod
    def of(
        cls, splits: dict[str, tuple[Tensor, Tensor]], *, log_prior: float | None,
        teacher_log_prior: float | None,
    ) -> Self:  # fmt: skip
        """From the logits [N, C] of student and teacher on each split."""
        figures = {
            name: compare_uncertainty(
                *pair, log_prior=log_prior, teacher_log_prior=teacher_log_prior
            )
            for name, pair in splits.items()
        }
        points = {}
        for name, (student, teacher) in splits.items():
            both = torch.stack([dirichlet_vacuity(teacher), dirichlet_vacuity(student)], dim=1)
            count = min(len(both), MOST_POINTS)
            chosen = both[torch.arange(count) * len(both) // count]
            points[name] = [[round(value, 4) for value in pair] for pair in chosen.tolist()]
        return cls(figures=figures, points=points)

    def save(self, path: Path) -> None:
        """Write to a JSON file, atomically."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote; raises `UserError` for any other content."""
        values: Any = read_json(path)
        try:
            found = cls(**values)
            numbers = [v for of in found.figures.values() for v in of.values()]
            pairs = [pair for of in found.points.values() for pair in of]
            require(all(len(pair) == 2 for pair in pairs), "pairs")
            numbers += [value for pair in pairs for value in pair]
            require(all(type(v) is float and math.isfinite(v) for v in numbers), "numbers")
            require("test" in found.figures and {*found.figures} == {*found.points}, "sets")
        except Exception as error:  # damage comes as errors of every kind
            raise UserError(
                f"{path} is damaged: remove it, and the figures do without it."
            ) from error
        return found
