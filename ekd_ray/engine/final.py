"""Final evaluation: the one place that reads the test split."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ekd_ray.config import DistillConfig
from ekd_ray.data import Stage, dataset_info
from ekd_ray.engine import ranks
from ekd_ray.engine.distill import TrainedStudent
from ekd_ray.engine.evaluate import Evaluation, predict, sized_images
from ekd_ray.engine.measure.assessment import assess
from ekd_ray.engine.measure.gallery import FILE as GALLERY
from ekd_ray.engine.measure.gallery import (
    MOST_SHOWN,
    Gallery,
    find_mistakes,
    measure_distances,
    shrink_images,
)
from ekd_ray.engine.measure.inheritance import FILE as INHERITED
from ekd_ray.engine.measure.inheritance import Inheritance
from ekd_ray.engine.measure.predictions import (
    TEACHER_BATCH,
    Predictions,
    kept_images,
    teacher_predictions,
)
from ekd_ray.engine.measure.teacher_pass import teacher_priors
from ekd_ray.engine.outside import generated_sets, set_names
from ekd_ray.engine.precision import pick_device
from ekd_ray.engine.resolve import input_normalization
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.engine.rundata import RunData, load_test_data
from ekd_ray.engine.teacher.source import live_teacher
from ekd_ray.losses.methods import method_of
from ekd_ray.models import save_weights

WEIGHTS = "model.safetensors"
Outside = tuple[Stage, np.ndarray | None]


def evaluate_test(
    result: TrainedStudent, *, stage: RunStage, data_root: str | None, keep: Path | None = None
) -> dict[str, float]:
    """Read the test split: metrics as `test_<name>`, see `assess_model`.

    Where there are several ranks, all of them must call: each looks at its share.

    With `keep`, the model's `Predictions` are written there, and beside them a `Gallery` and, where
    there is a teacher, the `Inheritance`, so that nothing in a report has to read the split again.

    Raises:
        ValueError: a run of this stage must not open the test split.
    """
    config, precision, log_prior = result.config, result.precision, result.log_prior
    data = load_test_data(config, stage=stage, data_root=data_root, device=pick_device())
    outside = own_outside(config, data)
    found = assess_model(
        result.model, data, outside, config=config, precision=precision, log_prior=log_prior
    )
    if keep and ranks.is_first():
        _keep_predictions(keep, found, data, result)
    if keep and method_of(config).needs_teacher:
        _keep_inheritance(keep, data, outside, result)
    return {f"test_{name}": value for name, value in found.metrics.items()}


def own_outside(config: DistillConfig, data: RunData) -> dict[str, Outside]:
    """The out-of-distribution sets of a final evaluation: the run's own, and generated images."""
    found = {kind: (stage, None) for kind, stage in generated_sets(data).items()}
    if config.ood_dataset is None or data.ood_images is None:
        return dict(found)
    name, *_ = set_names([config.ood_dataset])
    return {name: (data.ood_images, data.ood_ids), **found}


def assess_model(
    model: nn.Module,
    data: RunData,
    outside: Mapping[str, Outside],
    *,
    config: DistillConfig,
    precision: str,
    log_prior: float | None,
    classes: Tensor | None = None,
    **options: Any,
) -> Evaluation:
    """Evaluate a model on the images that `data` holds out, with all metrics of `assess`.

    Where there are several ranks, all of them must call: each looks at its share.

    Args:
        outside: a stage of each out-of-distribution set, and which of its images (None: all).
        classes: int64 [K], the student's class of each of the data's; None where they are equal.
        **options: of `assess`.
    """
    model.eval()
    logits, labels = predict(model, data, data.images, data.validation_ids, config, precision)
    labels = labels if classes is None else classes.to(labels.device)[labels]
    others = {}
    for name, (stage, ids) in outside.items():
        chosen = np.arange(len(stage)) if ids is None else ids
        others[name], _ = predict(model, data, stage, chosen, config, precision)
    metrics = {}
    if ranks.is_first():  # one set of figures must decide
        metrics = assess(logits, labels, log_prior=log_prior, outside=others, **options)
        if config.ood_dataset is not None and data.ood_images is not None:
            name, *_ = set_names([config.ood_dataset])
            if f"ood_{name}_auroc" in metrics:
                metrics["ood_auroc"] = metrics[f"ood_{name}_auroc"]
    return Evaluation(logits, labels, ranks.from_first(metrics))


def _keep_predictions(path: Path, found: Evaluation, data: RunData, result: TrainedStudent) -> None:
    """Write the `Predictions`, and beside them the `Gallery`."""
    config, log_prior, ids = result.config, result.log_prior, data.validation_ids
    logits, labels = found.logits.cpu(), found.labels.cpu()
    kept = kept_images(*logits.shape)
    mistakes = find_mistakes(logits, labels, log_prior=log_prior)
    asked = torch.cat((mistakes, kept))
    taught = teacher_predictions(config, data, ids[asked.numpy()], precision=result.precision)
    Predictions.of(
        logits, labels, log_prior=log_prior, class_names=data.class_names,
        teacher=None if taught is None else taught[len(mistakes) :],
    ).save(path)  # fmt: skip
    shown, distances = mistakes, torch.zeros(len(mistakes))
    teacher = torch.full_like(mistakes, -1)
    if taught is not None:
        every = measure_distances(
            logits[asked], taught, log_prior=log_prior,
            teacher_log_prior=teacher_priors(config)[1],
        )  # fmt: skip
        order = every.argsort(descending=True, stable=True)
        others = order[~torch.isin(asked[order], mistakes)][:MOST_SHOWN]
        rows = torch.cat((torch.arange(len(mistakes)), others))
        shown, distances, teacher = asked[rows], every[rows], taught.argmax(dim=1)[rows]
    Gallery(
        mistakes=len(mistakes), images=shown, teacher=teacher, distances=distances.float(),
        thumbnails=shrink_images(data.images, ids[shown.numpy()]),
    ).save(path.with_name(GALLERY))  # fmt: skip


def _keep_inheritance(
    path: Path, data: RunData, outside: Mapping[str, Outside], result: TrainedStudent
) -> None:
    """Write the `Inheritance` on as many images of each set as have their logits kept.

    Where there are several ranks, all of them must call: each looks at its share.
    """
    config, precision, model = result.config, result.precision, result.model.eval()
    classes, device = data.num_classes, data.images.device
    pairs = {}
    for name, (stage, chosen) in {"test": (data.images, data.validation_ids), **outside}.items():
        ids = np.arange(len(stage)) if chosen is None else chosen
        ids = ids[kept_images(len(ids), classes).numpy()]
        student, _ = predict(model, data, stage, ids, config, precision)
        if ranks.is_first():
            network = live_teacher(config, classes, precision=precision, device=device)
            asked = sized_images(data, stage, ids, TEACHER_BATCH)
            pairs[name] = student.cpu(), torch.cat([network(images).cpu() for images, _ in asked])
    if ranks.is_first():
        Inheritance.of(
            pairs, log_prior=result.log_prior, teacher_log_prior=teacher_priors(config)[1]
        ).save(path.with_name(INHERITED))


def save_student(result: TrainedStudent, path: Path, *, data_root: str | None) -> None:
    """Write a run's student with everything that is needed to use it again, and no path."""
    info = dataset_info(result.config.dataset, data_root=data_root)
    config = result.config.without_places()
    normalization = input_normalization(config, info)
    save_weights(
        result.model,
        path,
        model_name=config.student,
        num_classes=info.num_classes,
        mean=normalization.mean,
        std=normalization.std,
        log_prior=result.log_prior,
        dataset=config.dataset,
        extra={"config": config.to_dict(), "precision": result.precision},
    )
