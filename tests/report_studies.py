"""Small studies on disk for tests, made without Ray: with figures by hand, or real ones."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.distill import distill
from ekd_ray.engine.measure.gallery import FILE as GALLERY
from ekd_ray.engine.measure.gallery import Gallery
from ekd_ray.engine.measure.predictions import FILE, Predictions, kept_images
from ekd_ray.engine.pictures import validation_predictions
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.files import file_name, write_json
from ekd_ray.losses.methods import with_method
from ekd_ray.models import build_model, save_weights
from ekd_ray.results import Study, export_bundle
from ekd_ray.results.finish import finish_run
from ekd_ray.results.records import (
    FORMAT_VERSION,
    RunRecord,
    spent_seconds,
    trial_folder,
    trial_name,
)
from ekd_ray.results.study_reader import write_parquet

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


@dataclass
class Maker:
    """Writes a study folder piece by piece, in the formats that the search writes."""

    path: Path

    def study(self, *, version: int = FORMAT_VERSION, **settings: Any) -> Study:
        config = StudyConfig(**{"distill": BASE, **settings})
        header = {"format_version": version, "study": config.to_dict()}
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "study.yaml").write_text(yaml.safe_dump(header))
        return Study.load(self.path)

    def trial(
        self, number: int, values: list[float], *, status: str = "complete",
        reason: str | None = None, metric: str = "val_top1",
        also: dict[str, float] | None = None, **params: Any,
    ) -> RunRecord:  # fmt: skip
        history = [
            {"epoch": epoch, metric: value, **(also or {}), "lr": 0.05, "seconds": 0.5}
            for epoch, value in enumerate(values, start=1)
        ]
        config = {**BASE.to_dict(), "seed": number}
        record = RunRecord(
            folder=trial_folder(self.path, number), stage=RunStage.SEARCH,
            name=trial_name(number), number=number, params=params, config=config,
            status=status, reason=reason, history=history, seconds=spent_seconds(history),
        )  # fmt: skip
        record.write()
        return record

    def confirm(self, rows: list[dict[str, Any]]) -> None:
        """Rows of `confirm.parquet`; `config` may be a DistillConfig."""
        names = list(dict.fromkeys(name for row in rows for name in row))
        plain = [{name: row.get(name) for name in names} for row in rows]
        for row in plain:
            row["config"] = json.dumps((row.get("config") or BASE).to_dict())
        write_parquet(self.path / "confirm.parquet", pa.Table.from_pylist(plain))


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


def gallery(found: Predictions) -> Gallery:
    """Its surest mistakes and the first images of which the teacher's logits were kept."""
    wrong = (found.predicted != found.labels).nonzero().squeeze(1)[:5]
    images = torch.cat((wrong, found.kept[:3]))
    draw = torch.Generator().manual_seed(0)
    return Gallery(
        mistakes=len(wrong), images=images, teacher=found.labels[images],
        distances=torch.linspace(0.9, 0.1, len(images)),
        thumbnails=torch.randint(0, 256, (len(images), 3, 40, 40), generator=draw).byte(),
    )  # fmt: skip


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
            gallery(found).save(maker.path / folder / GALLERY)
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


@pytest.fixture(scope="session")
def winner_config(tmp_path_factory):
    """EKD under a teacher of random weights; resolved, as the search's trials are."""
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    torch.manual_seed(0)
    save_weights(
        build_model("resnet8", 10), path, model_name="resnet8", num_classes=10,
        mean=(0.5,) * 3, std=(0.5,) * 3, log_prior=-0.75,
    )  # fmt: skip
    base = BASE.replace(epochs=1)
    return resolve(
        with_method(base, "ekd", teacher="resnet8", teacher_weights=str(path), kd_weight=2.0)
    )


@pytest.fixture(scope="session")
def real_study(winner_config, tmp_path_factory):
    """(Study, TrainedStudent of the winner's first final run); what confirm leaves, in small."""
    maker = Maker(tmp_path_factory.mktemp("real") / "run")
    study = maker.study(distill=BASE.replace(epochs=1), confirm_seeds=2)
    run = winner_config.replace(validation_fraction=0.0, seed=1)
    folder = maker.path / "confirm" / f"final-{run.fingerprint()}"
    result = distill(run, out=folder, threads=1)
    record = RunRecord(folder=folder, stage=RunStage.FINAL, name="trial 1", config=run.to_dict())
    metrics = finish_run(record, result, data_root=None).metrics
    twin = maker.path / "confirm" / "select-trial 1-1"
    twin.mkdir()
    held = replace(result, config=run.replace(validation_fraction=0.4))
    validation_predictions(held, data_root=None)[1].save(twin)
    chosen, whole = winner_config.replace(seed=1), run
    relative = str(folder.relative_to(maker.path))
    maker.confirm(
        [
            select("trial 0", 1, 0.30, BASE.replace(seed=1)),
            select("trial 0", 2, 0.40, BASE.replace(seed=1)),
            select("trial 1", 1, 0.45, chosen),
            select("trial 1", 2, 0.55, chosen),
            {**final("trial 1", 1, metrics["test_top1"], whole, relative), "test_nll": 2.0},
            {**final("trial 1", 2, 0.25, whole, "confirm/gone"), "test_nll": 2.5},
            final("none", 1, 0.9, BASE.replace(seed=1, validation_fraction=0.0)),
            final("none", 2, 0.8, BASE.replace(seed=1, validation_fraction=0.0)),
        ]
    )
    return study, result


@pytest.fixture(scope="session")
def exported(real_study, tmp_path_factory):
    """A bundle that no test may change."""
    return export_bundle(real_study[0], tmp_path_factory.mktemp("bundle") / "best")
