"""Metrics of a classifier by corruption and severity, and their file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Self

from ekd_ray.data.corruptions import SEVERITIES
from ekd_ray.errors import UserError, require
from ekd_ray.files import read_json, write_json

FILE = "corruptions.json"
METRICS = ("top1", "nll", "ece", "aurc")


@dataclass(frozen=True, kw_only=True)
class ShiftRow:
    """Metrics of a split under one corruption at one severity; of the clean one ("", 0)."""

    corruption: str
    severity: int
    top1: float
    nll: float
    ece: float
    aurc: float


@dataclass(frozen=True, kw_only=True)
class Shift:
    """Metrics of `images` pictures, clean first, then by corruption and severity.

    `seed` is that of pictures made here, None for published files; `weights` the SHA-256 of the
    file of the model's weights, once it is known.
    """

    rows: tuple[ShiftRow, ...]
    images: int
    seed: int | None
    weights: str | None = None

    @property
    def corruption_errors(self) -> dict[str, float]:
        """The error of each corruption, a mean over the severities."""
        names = dict.fromkeys(row.corruption for row in self.rows if row.severity)
        return {
            name: fmean(1 - row.top1 for row in self.rows if row.corruption == name)
            for name in names
        }

    @property
    def mean_corruption_error(self) -> float:
        """The mean over the corruptions of `corruption_errors`: against no baseline, as is usual
        of CIFAR-10-C. (That of ImageNet-C divides each by AlexNet's first.)"""
        return fmean(self.corruption_errors.values())

    def by_severity(self, metric: str) -> list[float]:
        """The mean over the corruptions of a metric of `METRICS` at severity 0 (clean) to 5."""
        rows = ([r for r in self.rows if r.severity == at] for at in (0, *SEVERITIES))
        return [fmean(getattr(row, metric) for row in found) for found in rows]

    def covers(self, other: Shift) -> bool:
        """Whether it is of the same weights, of more pictures, and of all its corruptions."""
        names = {row.corruption for row in other.rows} <= {row.corruption for row in self.rows}
        return self.weights == other.weights and self.images > other.images and names

    def save(self, path: Path) -> None:
        """Write to a JSON file, atomically."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote; raises `UserError` for any other content."""
        values = read_json(path)
        try:
            rows = tuple(ShiftRow(**row) for row in values["rows"])
            found = cls(**{**values, "rows": rows})
            found._check()
        except Exception as error:  # damage comes as errors of every kind
            raise UserError(f"{path} is damaged: measure it again.") from error
        return found

    def _check(self) -> None:
        """Raise `AssertionError` unless every severity is there, and every figure is one."""
        severities = {row.severity for row in self.rows}
        figures = [getattr(row, name) for row in self.rows for name in METRICS]
        sound = (
            severities == {0, *SEVERITIES}
            and all(isinstance(row.corruption, str) for row in self.rows)
            and all(type(value) is float and abs(value) < float("inf") for value in figures)
            and type(self.images) is int
            and isinstance(self.weights, str | None)
        )
        require(sound, "no metrics of corruptions")
