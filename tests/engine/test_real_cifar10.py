"""Real CIFAR-10 and a real published teacher, where EKD_DATA_ROOT has them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from engine_runs import same_weights, state, untimed

from ekd_ray.config import DistillConfig
from ekd_ray.data import stratified_subset
from ekd_ray.engine.distill import distill
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.rundata import load_run_data
from ekd_ray.engine.teacher.source import load_teacher
from ekd_ray.engine.teacher.table import list_tables

ROOT = os.environ.get("EKD_DATA_ROOT")
TEACHER = Path(ROOT or ".") / "teachers" / "cifar10_resnet56a_jpeg.th"
pytestmark = pytest.mark.skipif(not TEACHER.is_file(), reason="EKD_DATA_ROOT has no teachers/")


def configuration(**changes: object) -> DistillConfig:
    values = {
        "dataset": "cifar10", "student": "resnet8", "teacher": "resnet56a",
        "teacher_weights": str(TEACHER), "train_subset": 160, "validation_fraction": 0.2,
        "epochs": 1, "batch_size": 32, "lr": 0.01, **changes,
    }  # fmt: skip
    return resolve(DistillConfig.from_dict(values), data_root=ROOT)


@pytest.mark.slow
def test_the_teacher_sees_its_own_normalisation() -> None:
    """It was trained on these images: near-perfect there, and worse under other statistics."""
    config = configuration()
    data = load_run_data(config, data_root=ROOT, device=torch.device("cpu"))
    ids = stratified_subset(np.asarray(data.images.labels), 120, seed=5)
    images, labels = data.images.views(ids, None)

    def accuracy(normalization: str) -> float:
        chosen = config.replace(teacher_normalization=normalization, teacher_cache="off")
        teacher = load_teacher(chosen, data, precision="float32", device=torch.device("cpu"))
        found = teacher.logits(images, ids, np.zeros_like(ids))
        return float((found.argmax(dim=1) == labels).float().mean())

    own = accuracy(str(config.teacher_normalization))
    assert own > 0.9
    assert accuracy("0,0,0/1,1,1") < own - 0.1


@pytest.mark.slow
def test_a_run_from_the_real_teachers_table_is_the_live_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this machine's own precision: of one part of the images, then of a larger one."""
    monkeypatch.setattr("ekd_ray.engine.teacher.table.default_cache_dir", lambda: tmp_path)
    settings = {"method": "kd", "augment": "none", "validation_fraction": 0.0}
    config = configuration(**settings, teacher_cache="off")
    live = distill(config, data_root=ROOT, threads=1)
    for part in (configuration(**settings, train_subset=100, seed=4), config, config):
        cached = distill(part.replace(teacher_cache="on"), data_root=ROOT, threads=1)
    (table,) = list_tables()
    assert table.filled >= 160
    assert untimed(cached.history) == untimed(live.history)
    assert same_weights(state(cached), state(live))
