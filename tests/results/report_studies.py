"""Studies for the report's tests, made without training: figures and predictions by hand."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from ekd_ray.config import DistillConfig
from ekd_ray.engine.measure.predictions import FILE, Predictions, kept_images
from ekd_ray.files import file_name, write_json
from ekd_ray.results import Study

BASE = DistillConfig(
    dataset="synthetic", student="resnet8", method="none", train_subset=80,
    validation_fraction=0.4, batch_size=16, epochs=9, precision="float32",
)  # fmt: skip
EVIL = "<script>alert('x')</script>"
CLASSES = (EVIL, *(f"class {n}" for n in range(1, 5)))
SPACE = {
    "lr": {"low": 0.001, "high": 0.1, "log": True},
    "momentum": {"low": 0.0, "high": 0.9},
    "optimizer": {"choices": ["sgd", "adamw"]},
}
IMAGES = 120


def select(name, seed, value, config=BASE, metric="val_top1", role=None):
    return {"stage": "select", "name": name, "seed": seed, "config": config, "role": role,
            "folder": f"confirm/select-{name}-{seed}", "seconds": 1.0, metric: value}  # fmt: skip


def final(name, seed, test_top1, config=BASE, folder="confirm/none", role=None):
    return {"stage": "final", "name": name, "seed": seed, "config": config, "role": role,
            "folder": folder, "seconds": 1.0, "test_top1": test_top1}  # fmt: skip


def predictions(quality: float, seed: int, *, teacher: bool = True) -> Predictions:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, len(CLASSES), (IMAGES,), generator=draw)
    known = torch.nn.functional.one_hot(labels, len(CLASSES)).float()
    logits = quality * known + torch.randn(IMAGES, len(CLASSES), generator=draw)
    asked = 4 * known[kept_images(*logits.shape)] + 0.1
    return Predictions.of(
        logits, labels, log_prior=None, class_names=CLASSES, teacher=asked if teacher else None
    )


def searched(maker: Any, **settings: object) -> Study:
    """A search of 24 trials: some stopped early, one failed with a malicious reason."""
    study = maker.study(space=SPACE, metric="val_top1", **settings)
    draw = np.random.default_rng(0)
    for number in range(24):
        lr, momentum = float(10 ** draw.uniform(-3, -1)), float(draw.uniform(0, 0.9))
        final = 0.9 + 0.2 * np.log10(lr) + 0.02 * draw.normal()
        values = [float(final * (epoch + 3) / 12) for epoch in range(1, 10)]
        params = {"lr": lr, "momentum": momentum, "optimizer": ("sgd", "adamw")[number % 2]}
        also = {"parameters": float(1000 * (1 + number % 3))}
        if number % 3 == 1:
            maker.trial(number, values[:3], status="pruned", also=also, **params)
        elif number == 5:
            reason = f"loss became nan {EVIL}"
            maker.trial(number, values[:1], status="failed", reason=reason, also=also, **params)
        else:
            maker.trial(number, values, also=also, **params)
    return study


def finished(maker: Any, **settings: object) -> Study:
    """As `searched`, and confirmed: the winner clearly beats the authors' values and the student
    alone, and not KD; the defaults failed."""
    study = searched(maker, **settings)
    best = study.ranked()[0]
    name = f"trial {best.number}"
    confirm = [
        select(name, seed, 0.6 + 0.01 * seed, study.config.distill.replace(lr=0.05))
        for seed in (1, 2, 3)
    ]
    numbers = {name: best.number, (authors := "authors' values"): 2}
    for seed, value in enumerate((0.60, 0.615, 0.625), start=1):
        confirm.append(select(authors, seed, value, role="champion"))
    confirm.append({**select("defaults", 1, None, role="champion"), "reason": EVIL})
    scores = {
        name: (0.60, 0.61, 0.625), "kd": (0.60, 0.62, 0.60), authors: (0.55, 0.56, 0.574),
        "none": (0.50, 0.512, 0.52),
    }  # fmt: skip
    quality = {name: 3.0, "kd": 2.5, authors: 2.0, "none": 1.5}
    for row, values in scores.items():
        for seed, value in enumerate(values, start=1):
            folder = f"confirm/final-{file_name(row)}-{seed}"
            found = predictions(quality[row], seed, teacher=row != "none")
            (maker.path / folder).mkdir(parents=True)
            found.save(maker.path / folder / FILE)
            (maker.path / folder / "history.jsonl").write_text(
                json.dumps({"epoch": 1, "seconds": 3.0}) + "\n"
            )
            figures = {"test_nll": 1.0, "test_ece": 0.05 + 0.1 * (row == "kd")}
            confirm.append({**final(row, seed, value, folder=folder), **figures})
    maker.confirm([{**row, "trial": numbers.get(row["name"])} for row in confirm])
    write_json(maker.path / "cache.json", {"rows": 100, "timed_rows": 50, "seconds": 1.0})
    (maker.path / "best").mkdir()
    (maker.path / "best" / "MANIFEST").write_text("")
    return Study.load(maker.path)
