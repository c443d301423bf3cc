"""Searches driven as Tune drives them, without Ray: made-up scores, real journals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.history import HISTORY
from ekd_ray.engine.resolve import resolve
from ekd_ray.results.records import RunRecord
from ekd_ray.scale.samplers import SAMPLERS
from ekd_ray.scale.searcher import OptunaSearcher
from ekd_ray.scale.worker import RUN

EPOCHS = 9
FLOATS = {
    "lr": {"low": 0.001, "high": 0.1, "log": True},
    "momentum": {"low": 0.5, "high": 0.99},
}
MIXED = {
    **FLOATS,
    "batch_size": {"low": 16, "high": 64, "step": 16},
    "optimizer": {"choices": ["sgd", "adamw"]},
    "nesterov": {"choices": [True, False], "when": {"optimizer": ["sgd"]}},
}
# 2 x 2 x 3 with sgd, 2 x 3 with adamw.
FINITE = {
    "optimizer": {"choices": ["sgd", "adamw"]},
    "nesterov": {"choices": [True, False], "when": {"optimizer": ["sgd"]}},
    "batch_size": {"low": 16, "high": 32, "step": 16},
    "lr": {"choices": [0.01, 0.02, 0.05]},
}
COMBINATIONS = 18


def study_of(sampler: str, **values: Any) -> StudyConfig:
    kind = SAMPLERS[sampler]
    defaults: dict[str, Any] = {
        "distill": DistillConfig(dataset="digits", student="resnet8", method="none", epochs=EPOCHS),
        "space": FINITE if kind.finite else MIXED,
        "sampler": sampler,
        "scheduler": "none" if kind.full_length else "asha",
        "trials": 12,
    }
    return StudyConfig(**(defaults | values))


def score(settings: dict[str, Any]) -> float:
    """An accuracy, best at lr 0.01, momentum 0.9."""
    loss = abs(np.log(settings["lr"] / 0.01)) + 5 * abs(settings["momentum"] - 0.9)
    return float(np.exp(-loss))


def also(settings: dict[str, Any]) -> dict[str, float]:
    return {"val_ece": settings["lr"], "parameters": settings["batch_size"]}


def run(folder: Path, config: StudyConfig, count: int, at_once: int = 2) -> list[dict[str, Any]]:
    """Drive a searcher as Tune does; the settings of the trials that it let run, in order.

    A trial's calibration error falls with its learning rate, its parameters are its batch size.

    Every third trial is stopped after three epochs where the scheduler would do that.
    """
    searcher = OptunaSearcher(folder, config, resolve(config.distill))
    ran, running = [], []

    def end(trial_id: str, job: RunRecord) -> None:
        stopped = config.scheduler != "none" and job.number % 3 == 2
        epochs = 3 if stopped else EPOCHS
        with open(job.folder / HISTORY, "a") as file:
            for epoch in range(1, epochs + 1):
                value = score(job.config) * epoch / EPOCHS
                row = {"epoch": epoch, "val_top1": value, "seconds": 1.0, **also(job.config)}
                file.write(json.dumps(row) + "\n")
                file.flush()
                if epoch < epochs:
                    searcher.on_trial_result(trial_id, row)
        searcher.on_trial_complete(trial_id, {"epoch": epochs})

    for index in range(count):
        suggested = searcher.suggest(f"t{index}")
        if not isinstance(suggested, dict):
            break
        job = RunRecord.from_dict(suggested[RUN])
        ran.append(job.config)
        running.append((f"t{index}", job))
        if len(running) == at_once:
            end(*running.pop(0))
    for item in running:
        end(*item)
    return ran


def points(settings: list[dict[str, Any]], space: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [tuple(entry[name] for name in space) for entry in settings]
