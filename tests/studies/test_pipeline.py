"""Checks before a study starts, and who may run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.errors import UserError
from ekd_ray.scale.confirm import baselines
from ekd_ray.studies.pipeline import check_study, open_run, run_study

SPACE = {"lr": {"low": 0.01, "high": 0.1}}


def study(method: str = "none", **changes: Any) -> StudyConfig:
    shared = DistillConfig(dataset="digits", student="resnet8", method=method)
    return StudyConfig(**{"distill": shared, "space": SPACE, **changes})


def test_a_study_without_a_teacher_is_compared_with_the_student_alone_only() -> None:
    config = check_study(study("evidential"))
    assert list(baselines(config, config.distill)) == ["none"]


def test_an_untrained_teacher_is_planned_or_refused() -> None:
    shared = DistillConfig(dataset="digits", student="resnet8", teacher="resnet8")
    planned = check_study(StudyConfig(distill=shared, space=SPACE, teacher_training={"epochs": 2}))
    assert planned.distill.teacher_weights is None
    assert planned.distill.kd_weight == 4.5
    with pytest.raises(UserError, match="--teacher-weights FILE, or train one"):
        check_study(StudyConfig(distill=shared, space=SPACE))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {}}, "search space is empty"),
        ({"cpus_per_trial": 4096}, "lower --workers-per-trial, --cpus-per-trial"),
        ({"gpus_per_trial": 64.0}, "GPU"),
        (
            {"distill": DistillConfig(dataset="digits", student="resnet8", method="none",
                                      validation_fraction=0.0)},
            "validation_fraction must be > 0",
        ),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_it_starts(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_study(study(**changes))


def test_a_folder_is_one_study(tmp_path: Path) -> None:
    config = check_study(study())
    out = tmp_path / "run"
    with pytest.raises(UserError, match="holds no study to resume"):
        open_run(out, config, resume=True)
    open_run(out, config, resume=False)
    with pytest.raises(UserError, match="holds a study already: add --resume"):
        open_run(out, config, resume=False)
    assert open_run(out, config.replace(trials=99), resume=True).config.trials == 99
    other = config.replace(distill=config.distill.replace(seed=5, weight_decay=0.1))
    with pytest.raises(UserError, match=r"seed is 0 there and 5 here \(2 setting"):
        open_run(out, other, resume=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("x")
    with pytest.raises(UserError, match="holds no study: choose another"):
        open_run(tmp_path / "notes", config, resume=False)


def test_an_unwritable_or_full_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = check_study(study())
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write to"):
        open_run(tmp_path / "file" / "run", config, resume=False)
    monkeypatch.setattr("ekd_ray.studies.pipeline.LEAST_FREE_BYTES", 2**80)
    with pytest.raises(UserError, match="MiB free, a study needs"):
        open_run(tmp_path / "run", config, resume=False)


def test_two_drivers_do_not_run_one_study(tmp_path: Path) -> None:
    opened = open_run(tmp_path / "run", check_study(study()), resume=False)
    with FileLock(opened.path / ".lock"), pytest.raises(UserError, match="another process"):
        run_study(opened, observer=None)  # type: ignore[arg-type]
