"""Final evaluation: the one place that reads the test split."""

from __future__ import annotations

from pathlib import Path

from ekd_ray.data import dataset_info
from ekd_ray.engine.distill import RunResult
from ekd_ray.engine.evaluate import evaluate_model
from ekd_ray.engine.precision import pick_device
from ekd_ray.engine.rundata import load_test_data
from ekd_ray.models import save_weights

WEIGHTS = "model.safetensors"


def evaluate_test(result: RunResult, *, data_root: str | None) -> dict[str, float]:
    """Read the test split: metrics as `test_<name>`, see `classification_metrics`."""
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
