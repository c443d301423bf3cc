"""Several trainings of a teacher: the choice, what a kill leaves, and failures."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.candidates import Candidates
from ekd_ray.data import load_dataset
from ekd_ray.engine import rundata
from ekd_ray.engine.distill import Diverged
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.engine.train_teacher import teacher_config, train_teacher
from ekd_ray.errors import UserError
from ekd_ray.models import read_metadata
from ekd_ray.results.records import RunRecord
from ekd_ray.scale import run_list, worker
from ekd_ray.scale import teacher_candidates as candidates_module
from ekd_ray.scale.teacher_candidates import (
    candidate_study,
    check_candidate_folder,
    choose_candidate,
    train_candidates,
)
from ekd_ray.scale.worker import RUN

ROOT = Path(__file__).parents[2]
BASE = DistillConfig(
    dataset="synthetic", student="resnet8", method="none", train_subset=80, batch_size=16,
    validation_fraction=0.4, precision="float32", epochs=2, lr=0.05,
)  # fmt: skip
SETTINGS = {"candidates": 3}
TRAINING = teacher_config(BASE, "resnet8", SETTINGS)
CANDIDATES = Candidates(seeds=(0, 1, 2))

TABLE = [  # status, val_nll, val_top1, val_aurc by seed
    ("complete", 0.50, 0.80, 0.10),
    ("failed", 0.01, 0.99, 0.01),
    ("complete", 0.40, 0.70, 0.05),
    ("complete", 0.45, 0.85, 0.05),
    ("complete", 0.40, 0.85, 0.20),
]


@pytest.mark.parametrize(("metric", "seed"), [("val_nll", 2), ("val_top1", 3), ("val_aurc", 2)])
def test_the_best_complete_one_is_chosen_and_of_equals_the_first(metric: str, seed: int) -> None:
    names = ("val_nll", "val_top1", "val_aurc")
    runs = [
        RunRecord(
            folder=Path(), stage=RunStage.TEACHER, name="x", config={"seed": number},
            status=status, metrics=dict(zip(names, values, strict=True)),
        )
        for number, (status, *values) in enumerate(TABLE)
    ]  # fmt: skip
    chosen = choose_candidate(runs, metric)
    assert chosen is not None and chosen.seed == seed
    assert choose_candidate(runs[1:2], metric) is None


class Killed(BaseException):
    """The end of a process."""


class Trainings:
    """Stands in for Tune: trains in this process, and dies after the row `kill_after`."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int]] = []  # (seed, epoch)
        self.kill_after: tuple[int, int] | None = None

    def run(self, run: Path, config: StudyConfig, train: Any, *, searcher: Any, **_: Any) -> None:
        names = map(str, itertools.count())
        while isinstance(found := searcher.suggest(name := next(names)), dict):
            job = RunRecord.from_dict(found[RUN])

            def report(row: dict[str, Any], seed: int = job.seed) -> None:
                self.rows.append((seed, row["epoch"]))
                if self.rows[-1] == self.kill_after:
                    raise Killed

            train(job, report, checkpoint_seconds=0.0)
            searcher.on_trial_complete(name, {})


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Trainings:
    found = Trainings()
    monkeypatch.setattr(run_list, "run_tuner", found.run)
    return found


def train(folder: Path) -> dict[str, Any]:
    study = StudyConfig(distill=TRAINING)
    return train_candidates(folder / "teacher.safetensors", CANDIDATES, study, Mock())


def test_a_killed_choice_goes_on_and_gives_the_file_of_one_training(
    trainings: Trainings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def load(name: str, split: str, **options: Any) -> Any:
        opened.append(split)
        return load_dataset(name, split, **options)

    monkeypatch.setattr(rundata, "load_dataset", load)
    trainings.kill_after = (1, 1)
    with pytest.raises(Killed):
        train(tmp_path)
    ended = {path: path.read_bytes() for path in (tmp_path / "seed-0").iterdir()}
    assert tmp_path / "seed-0" / "model.safetensors" in ended
    copied = []
    copy = shutil.copyfile

    def keep(source: Path, target: Path) -> None:
        after = {path: path.read_bytes() for path in ended}
        copied.append((source.parent.name, after == ended))
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", keep)
    found = train(tmp_path)
    assert trainings.rows == [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2)]
    assert copied == [(f"seed-{found['chosen']}", True)]
    assert set(opened) == {"train"}
    assert not list(tmp_path.glob("*/model.safetensors")), "figures are kept, not the weights"
    assert not list(tmp_path.glob("*/checkpoint.pt"))
    figures = {entry["seed"]: entry["metrics"]["val_nll"] for entry in found["candidates"]}
    assert found["chosen"] == min(figures, key=lambda seed: figures[seed])
    assert json.loads((tmp_path / "candidates.json").read_text()) == found
    alone = tmp_path / "alone" / "teacher.safetensors"
    result = train_teacher(TRAINING.replace(seed=found["chosen"]), alone, threads=1)
    assert alone.read_bytes() == (tmp_path / "teacher.safetensors").read_bytes()
    assert result.metrics["val_nll"] == figures[found["chosen"]]
    assert train(tmp_path) == found and len(trainings.rows) == 6
    with pytest.raises(UserError, match=r"holds candidates of the seeds \[0, 1, 2\]"):
        check_candidate_folder(tmp_path, Candidates(seeds=(0, 1)))
    with pytest.raises(UserError, match="with the same --candidates"):
        check_candidate_folder(tmp_path, None)


def test_a_candidate_that_lost_its_weights_is_trained_again(
    trainings: Trainings, tmp_path: Path
) -> None:
    trainings.kill_after = (1, 1)
    with pytest.raises(Killed):
        train(tmp_path)
    (tmp_path / "seed-0" / "model.safetensors").unlink()
    trainings.rows.clear()
    train(tmp_path)
    assert trainings.rows == [(0, 1), (0, 2), (1, 2), (2, 1), (2, 2)]


@pytest.mark.parametrize("failing", [{1}, {0, 1, 2}])
def test_one_that_failed_is_recorded_and_not_chosen(
    trainings: Trainings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: set[int]
) -> None:
    sound = worker.distill

    def distill(config: DistillConfig, **options: Any) -> Any:
        if config.seed in failing:
            raise Diverged("train_loss became nan in epoch 1 of 2")
        return sound(config, **options)

    monkeypatch.setattr(worker, "distill", distill)
    if len(failing) == 3:
        with pytest.raises(UserError, match=r"^all 3 candidates .* became nan .*: change its"):
            train(tmp_path)
        assert not (tmp_path / "teacher.safetensors").exists()
    else:
        assert train(tmp_path)["chosen"] not in failing
    found = json.loads((tmp_path / "candidates.json").read_text())["candidates"]
    assert {entry["seed"]: entry["status"] for entry in found} == {
        seed: "failed" if seed in failing else "complete" for seed in range(3)
    }
    assert "became nan" in found[1]["reason"]


def test_the_trainings_share_the_cpus_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(candidates_module, "local_cpus", lambda: 8)
    found = candidate_study(TRAINING, CANDIDATES, StudyConfig(gpus_per_trial=0.25))
    assert (found.cpus_per_trial, found.gpus_per_trial, found.space) == (2, 0.25, None)
    found = candidate_study(TRAINING, CANDIDATES, StudyConfig(cpus_per_trial=4))
    assert found.cpus_per_trial == 4


@pytest.mark.slow  # tests/studies/test_pipeline.py has one candidate, the tests above the choice
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_candidates_under_ray(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [
        sys.executable, str(ROOT / "launchers" / "train_teacher.py"), "--dataset", "digits",
        "--model", "resnet8", "--evidential", "--train-subset", "120", "--epochs", "1",
        "--candidates", "2", "--choose-by", "val_top1", "--out", str(out), "--quiet", "--json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    summary = json.loads((out / "candidates.json").read_text())
    top1 = [entry["metrics"]["val_top1"] for entry in summary["candidates"]]
    assert summary["seeds"] == [0, 1] and summary["chosen"] == top1.index(max(top1))
    assert json.loads(done.stdout)["metrics"]["val_top1"] == max(top1)
    prior = read_metadata(out / "model.safetensors").log_prior
    assert prior == pytest.approx(summary["candidates"][summary["chosen"]]["log_prior"])
    assert not list(out.glob("seed-*/model.safetensors"))
