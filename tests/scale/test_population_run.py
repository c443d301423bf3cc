"""One population on a real local Ray: its lineages, its journal, its folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.distill import distill
from ekd_ray.engine.resolve import resolve
from ekd_ray.results import Study
from ekd_ray.scale.cluster import connected
from ekd_ray.scale.search import search
from ekd_ray.scale.searcher import open_study
from ekd_ray.studies.pipeline import check_study, open_run

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
EPOCHS = 4


class Silent:
    """An observer that remembers the epochs."""

    def __init__(self) -> None:
        self.epochs: list[tuple[int, int]] = []

    def filled(self, done: int, total: int) -> None: ...
    def stage(self, title: str, total: int, epochs: int) -> None: ...
    def started(self, name: str, number: int, settings: dict[str, Any]) -> None: ...
    def ended(self, number: int, *, failed: bool) -> None: ...
    def epoch(self, number: int, row: dict[str, Any]) -> None:
        self.epochs.append((number, row["epoch"]))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Silent]:
    """Four members, one of which diverges at once; compared after epoch 2."""
    shared = DistillConfig(
        dataset="digits", student="resnet8", method="none", epochs=EPOCHS, batch_size=16,
        train_subset=120, validation_fraction=0.4,
    )  # fmt: skip
    config = StudyConfig(
        distill=shared, sampler="random", scheduler="pbt", trials=4, perturbation_epochs=2,
        space={
            "lr": {"low": 1e-5, "high": 1e30, "log": True},
            "momentum": {"low": 0.5, "high": 0.95},
        },
        first_points=(
            {"lr": 0.02, "momentum": 0.9}, {"lr": 1e30, "momentum": 0.5},
            {"lr": 1e-5, "momentum": 0.5}, {"lr": 0.01, "momentum": 0.9},
        ),
        metric="val_nll", baselines=(),
    )  # fmt: skip
    out = tmp_path_factory.mktemp("population") / "run"
    config, observer = check_study(config), Silent()
    open_run(out, config, resume=False)
    with connected(config):
        search(out, config, resolve(config.distill), observer)
    return Study.load(out), observer


def test_the_worst_member_went_on_from_the_best_and_one_failed(
    trained: tuple[Study, Silent],
) -> None:
    study, observer = trained
    records = study.records()
    assert [record.status for record in records] == ["complete", "failed", "complete", "complete"]
    assert [len(record.config["changes"]) for record in records] == [0, 0, 1, 0]
    heir = records[2]
    assert heir.config["changes"][0]["epoch"] == 3
    parent = next(r for r in (records[0], records[3]) if r.params["lr"] == heir.params["lr"])
    assert heir.history[:2] == parent.history[:2]
    assert heir.history[2] != parent.history[2]
    assert sorted(observer.epochs) == [(n, e) for n in (0, 2, 3) for e in range(1, EPOCHS + 1)]


def test_its_schedule_trained_from_scratch_is_the_same_run(trained: tuple[Study, Silent]) -> None:
    heir = trained[0].records()[2]
    again = distill(DistillConfig.from_dict(heir.config), threads=1)

    def figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]

    assert figures(again.history) == figures(heir.history)


def test_the_journal_and_the_folders_agree_with_the_lineage(trained: tuple[Study, Silent]) -> None:
    study, _ = trained
    ended = {"complete": TrialState.COMPLETE, "failed": TrialState.FAIL}
    trials = open_study(study.path, study.config).get_trials()
    for trial, record in zip(trials, study.records(), strict=True):
        folder = study.path / "trials" / f"{record.number:04d}"
        assert trial.state == ended[record.status]
        assert trial.intermediate_values == {r["epoch"]: r["val_nll"] for r in record.history}
        written = DistillConfig.from_yaml(folder / "config.yaml")
        assert written == DistillConfig.from_dict(record.config)
    assert trials[2].user_attrs["lineage"]["changes"] == study.records()[2].config["changes"]
    assert trials[2].params["lr"] == 1e-5
    assert list(Path(study.path).rglob("*checkpoint*")) == []
