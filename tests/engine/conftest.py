"""One tiny configuration and one tiny evidential teacher for this folder."""

from __future__ import annotations

import pytest
import torch

from ekd_ray.config import DistillConfig
from ekd_ray.engine.rundata import load_run_data
from ekd_ray.engine.train_teacher import teacher_config, train_teacher

# 48 images train (3 steps of 16), 32 validate; seconds on one slow core.
TINY = {
    "dataset": "synthetic",
    "student": "resnet8",
    "method": "none",
    "train_subset": 80,
    "validation_fraction": 0.4,
    "batch_size": 16,
    "epochs": 2,
    "precision": "float32",
    "lr": 0.05,
}


@pytest.fixture(scope="session")
def tiny():
    """Builds a tiny configuration; keywords replace its settings."""
    return lambda **values: DistillConfig(**{**TINY, **values})


@pytest.fixture(scope="session")
def learnable():
    """Settings with which 24 steps on `synthetic` take a resnet8 from chance to 40 % and more."""
    return {
        "train_subset": 120,
        "validation_fraction": 0.2,
        "epochs": 4,
        "augment": "none",
        "optimizer": "adamw",
        "lr": 0.01,
        "schedule": "cosine",
    }


@pytest.fixture(scope="session")
def teacher_run(tiny, learnable, tmp_path_factory):
    """(path, TrainedStudent) of the one evidential teacher that `train_teacher` made."""
    path = tmp_path_factory.mktemp("teacher") / "resnet8.safetensors"
    config = teacher_config(tiny(**learnable), "resnet8", {})
    return path, train_teacher(config, path, threads=1)


@pytest.fixture(scope="session")
def with_teacher(teacher_run):
    """The two settings that name the teacher."""
    return {"teacher": "resnet8", "teacher_weights": str(teacher_run[0])}


@pytest.fixture(scope="session")
def run_data():
    """The staged training data of a resolved configuration."""
    return lambda config: load_run_data(config, data_root=None, device=torch.device("cpu"))


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache folder that no other test has filled; returns its folder of teacher tables."""
    monkeypatch.setenv("EKD_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "teachers"
