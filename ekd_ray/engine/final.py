"""Final evaluation: the one place that reads the test split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ekd_ray.data import dataset_info
from ekd_ray.engine import ranks
from ekd_ray.engine.distill import RunResult
from ekd_ray.engine.evaluate import evaluate_model
from ekd_ray.engine.measure.predictions import Predictions, kept_images, teacher_predictions
from ekd_ray.engine.precision import environment, pick_device
from ekd_ray.engine.rundata import load_test_data
from ekd_ray.models import save_weights

WEIGHTS = "model.safetensors"


def evaluate_test(
    result: RunResult, *, data_root: str | None, keep: Path | None = None
) -> dict[str, float]:
    """Read the test split: metrics as `test_<name>`, see `classification_metrics`.

    Where there are several ranks, all of them must call: each looks at its share.

    With `keep`, the model's `Predictions` are written there, so that no figure of a report has
    to read the split again.
    """
    config, precision, log_prior = result.config, result.precision, result.log_prior
    data = load_test_data(config, data_root=data_root, device=pick_device())
    ids = data.validation_ids
    found = evaluate_model(
        result.model, data, ids, config=config, precision=precision, log_prior=log_prior
    )
    if keep and ranks.is_first():
        kept = ids[kept_images(*found.logits.shape).numpy()]
        Predictions.of(
            found.logits,
            found.labels,
            log_prior=log_prior,
            class_names=data.class_names,
            teacher=teacher_predictions(config, data, kept, precision=precision),
        ).save(keep)
    return {f"test_{name}": value for name, value in found.metrics.items()}


def save_student(result: RunResult, path: Path) -> None:
    """Write a run's student with everything that is needed to use it again."""
    config, info = result.config, dataset_info(result.config.dataset)
    save_weights(
        result.model,
        path,
        model_name=config.student,
        num_classes=info.num_classes,
        mean=info.mean,
        std=info.std,
        log_prior=result.log_prior,
        dataset=config.dataset,
        extra={"config": config.to_dict(), "precision": result.precision},
    )


def finished_run(
    result: RunResult, folder: Path, *, data_root: str | None, test: bool
) -> dict[str, Any]:
    """Write a finished run's student into its folder; returns its record, JSON-ready.

    Where there are several ranks, all of them must call; the first one writes.

    Args:
        test: read the test split, once.
    """
    if ranks.is_first():
        save_student(result, folder / WEIGHTS)
    metrics = dict(result.metrics)
    if test:
        metrics |= evaluate_test(result, data_root=data_root)
    return {
        "metrics": metrics,
        "log_prior": result.log_prior,
        "precision": result.precision,
        "data_fingerprint": result.data_fingerprint,
        "fingerprint": result.config.fingerprint(),
        "seconds": result.seconds,
        "environment": environment(),
    }
