"""A teacher's own figures: how good it is by itself on the images that a study validates on."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from ekd_ray.config import DistillConfig
from ekd_ray.engine.determinism import arithmetic
from ekd_ray.engine.measure.metrics import classification_metrics
from ekd_ray.engine.measure.predictions import teacher_predictions
from ekd_ray.engine.precision import cpu_threads, pick_device, resolve_precision
from ekd_ray.engine.rundata import load_run_data
from ekd_ray.engine.runlog import is_epoch
from ekd_ray.errors import Damaged
from ekd_ray.files import read_json, write_json
from ekd_ray.losses.methods import method_of
from ekd_ray.models import read_metadata

FILE = "teacher.json"
# ImageNet's split holds out 128,000; from 10,000 an accuracy is known to half a point.
MOST_IMAGES = 10_000


@dataclass(frozen=True, kw_only=True)
class TeacherFigures:
    """The figures of a teacher on images without augmentation, in the study's precision.

    `metrics` as `val_<name>`, see `classification_metrics`, from `images` validation images.
    `log_prior` is the one in the teacher's file, and makes its class probabilities. Where the file
    has none, they are made by the study's prior under an evidential method, else by the softmax.
    `candidates` of it were trained by the study, 0 if it was given.
    """

    model: str
    sha256: str
    candidates: int
    images: int
    metrics: dict[str, float]
    log_prior: float | None

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
            figures = {"epoch": found.images, **found.metrics, "log_prior": found.log_prior}
        except TypeError:
            figures = {}
        if not is_epoch(figures):
            raise Damaged(path, "it has not the finite figures of a teacher")
        return found

    def write(self, study: Path) -> None:
        """Write them into a study's folder, atomically."""
        write_json(study / FILE, asdict(self))


def measure_teacher(
    config: DistillConfig, *, candidates: int, data_root: str | None, threads: int
) -> TeacherFigures:
    """One pass of the teacher over the validation split; the test split is not opened.

    Args:
        config: resolved, with a teacher and a validation split; of more than `MOST_IMAGES`
            images so many are taken, evenly spaced.
    """
    assert config.teacher and config.teacher_weights and config.teacher_sha256
    device = pick_device()
    data = load_run_data(config, data_root=data_root, device=device)
    held_out = data.validation_ids
    count = min(len(held_out), MOST_IMAGES)
    ids = held_out[[index * len(held_out) // count for index in range(count)]]
    with cpu_threads(threads), arithmetic(deterministic=False):
        precision = resolve_precision(config.precision, device)
        logits = teacher_predictions(config, data, ids, precision=precision)
    assert logits is not None
    learned = prior = read_metadata(config.teacher_weights, whole_classifier=False).log_prior
    if learned is None and method_of(config).evidential:
        settings: Any = config  # the settings of methods are found by name
        own = settings.teacher_log_prior
        prior = settings.log_prior if own is None else own
    labels = data.images.labels.cpu()[ids]
    found: dict[str, Any] = classification_metrics(logits, labels, log_prior=prior)
    return TeacherFigures(
        model=config.teacher,
        sha256=config.teacher_sha256,
        candidates=candidates,
        images=count,
        # A damaged teacher's may be NaN, which JSON does not have.
        metrics={f"val_{name}": value for name, value in found.items() if math.isfinite(value)},
        log_prior=learned,
    )
