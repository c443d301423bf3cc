"""Studies of populations for tests without a cluster."""

from __future__ import annotations

from typing import Any

from ekd_ray.config import DistillConfig, StudyConfig

EPOCHS, TRIALS = 12, 8
# A comparison of PB2 takes seconds, and its first one has nothing to model yet.
EVERY = {"pbt": 3, "pb2": 4}
SPACE = {
    "lr": {"low": 0.001, "high": 0.1, "log": True},
    "weight_decay": {"low": 0.0, "high": 0.01},
}


def study_of(scheduler: str, **values: Any) -> StudyConfig:
    shared = DistillConfig(dataset="digits", student="resnet8", method="none", epochs=EPOCHS)
    defaults: dict[str, Any] = {
        "distill": shared, "space": SPACE, "sampler": "random", "scheduler": scheduler,
        "trials": TRIALS, "perturbation_epochs": EVERY[scheduler],
    }  # fmt: skip
    return StudyConfig(**(defaults | values))
