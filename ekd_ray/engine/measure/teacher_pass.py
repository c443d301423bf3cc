"""A teacher's one pass over the images that a study validates on, which gives its figures."""

from __future__ import annotations

import math
from typing import Any

from ekd_ray.config import DistillConfig
from ekd_ray.engine.determinism import arithmetic
from ekd_ray.engine.measure.metrics import classification_metrics
from ekd_ray.engine.measure.predictions import teacher_predictions
from ekd_ray.engine.measure.teacher_figures import TeacherFigures
from ekd_ray.engine.precision import cpu_threads, pick_device, resolve_precision
from ekd_ray.engine.rundata import load_run_data
from ekd_ray.losses.methods import method_of
from ekd_ray.models import read_metadata

# ImageNet's split holds out 128,000; from 10,000 an accuracy is known to half a point.
MOST_IMAGES = 10_000


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
    learned, prior = teacher_priors(config)
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


def teacher_priors(config: DistillConfig) -> tuple[float | None, float | None]:
    """The log prior in the teacher's file, and the one that makes its class probabilities.

    Either is None where there is none: the latter for a softmax.
    """
    assert config.teacher_weights
    learned = read_metadata(config.teacher_weights, whole_classifier=False).log_prior
    if learned is not None or not method_of(config).evidential:
        return learned, learned
    settings: Any = config  # the settings of methods are found by name
    own = settings.teacher_log_prior
    return None, settings.log_prior if own is None else own
