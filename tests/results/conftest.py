"""A small real study folder, made without Ray: one winner with real weights, figures by hand."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import yaml
from report_studies import BASE, final, finished, select

from ekd_ray.config import StudyConfig
from ekd_ray.engine.distill import distill
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.losses.methods import with_method
from ekd_ray.models import build_model, save_weights
from ekd_ray.results import Bundle, Study, export_bundle
from ekd_ray.results.finish import finish_run
from ekd_ray.results.records import (
    FORMAT_VERSION,
    RunRecord,
    spent_seconds,
    trial_folder,
    trial_name,
)
from ekd_ray.results.report import measures, write_report
from ekd_ray.results.study_reader import write_parquet

measures.TSNE_STEPS = 250  # a quick one is as good for tests


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


@pytest.fixture(scope="session")
def reported(tmp_path_factory):
    """(Study, its report's HTML) of a finished study; read only."""
    study = finished(Maker(tmp_path_factory.mktemp("reported") / "run"))
    return study, write_report(study).read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def make_study():
    """`Maker`, for studies that several tests share."""
    return Maker


@pytest.fixture
def maker(tmp_path):
    return Maker(tmp_path / "run")


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


@pytest.fixture
def copied_study(real_study, tmp_path):
    """The real study in a folder that a test may damage."""
    shutil.copytree(real_study[0].path, tmp_path / "study")
    return Study.load(tmp_path / "study")


@pytest.fixture(scope="session")
def exported(real_study, tmp_path_factory):
    """A bundle that no test may change."""
    return export_bundle(real_study[0], tmp_path_factory.mktemp("bundle") / "best")


@pytest.fixture
def bundle(exported, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(exported.path, tmp_path / "best")
    return Bundle.load(tmp_path / "best")
