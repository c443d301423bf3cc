"""Final evaluation: the one place that reads the test split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ekd_ray.data import dataset_info
from ekd_ray.engine import ranks
from ekd_ray.engine.distill import RunResult
from ekd_ray.engine.evaluate import evaluate_model
from ekd_ray.engine.precision import environment, pick_device
from ekd_ray.engine.rundata import load_test_data
from ekd_ray.models import save_weights

WEIGHTS = "model.safetensors"


def evaluate_test(result: RunResult, *, data_root: str | None) -> dict[str, float]:
    """Read the test split: metrics as `test_<name>`, see `classification_metrics`.

    All ranks must ask, where there are several: each looks at its share.
    """
    data = load_test_data(result.config, data_root=data_root, device=pick_device())
    metrics = evaluate_model(
        result.model,
        data,
        data.validation_ids,
        config=result.config,
        precision=result.precision,
        log_prior=result.log_prior,
    )
    return {f"test_{name}": value for name, value in metrics.items()}


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

    All ranks must ask, where there are several; the first one writes.

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
