"""A teacher's own figures: how good it is by itself on the images that a study validates on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from ekd_ray.engine.history import is_epoch
from ekd_ray.errors import Damaged
from ekd_ray.files import read_json, write_json

FILE = "teacher.json"


@dataclass(frozen=True, kw_only=True)
class TeacherFigures:
    """The figures of a teacher on images without augmentation, in the study's precision.

    `metrics` as `val_<name>`, see `classification_metrics`, from `images` validation images.
    `log_prior` is the one in the teacher's file, and makes its class probabilities. Where the file
    has none, they are made by the study's prior under an evidential method, else by the softmax.
    `candidates` of it were trained by the study, 0 if it was given. `warnings` say why it may not
    be what its user thinks, and what to do.
    """

    model: str
    sha256: str
    candidates: int
    images: int
    metrics: dict[str, float]
    log_prior: float | None
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # A list in JSON.
        object.__setattr__(self, "warnings", tuple(map(str, self.warnings)))

    @classmethod
    def read(cls, study: Path) -> Self | None:
        """The figures in a study's folder; None where there are none, as in older studies.

        Raises:
            Damaged: the file holds something else.
        """
        path = study / FILE
        if not path.exists():
            return None
        try:
            found = cls(**read_json(path))
            figures = {
                "epoch": 1,
                "images": found.images,
                **found.metrics,
                "log_prior": found.log_prior,
            }
        except TypeError:
            figures = {}
        if not is_epoch(figures):
            raise Damaged(path, "it has not the finite figures of a teacher")
        return found

    def write(self, study: Path) -> None:
        """Write them into a study's folder, atomically."""
        write_json(study / FILE, asdict(self))
