"""Checks before a study starts, and who may run it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from filelock import FileLock

from ekd_ray.cli.plan_text import study_plan
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.checkpoint import CHECKPOINT
from ekd_ray.engine.history import HISTORY
from ekd_ray.engine.measure.teacher_figures import TeacherFigures
from ekd_ray.engine.measure.teacher_pass import WeakTeacher
from ekd_ray.engine.precision import pick_device
from ekd_ray.engine.train_teacher import teacher_config, train_teacher
from ekd_ray.errors import UserError
from ekd_ray.files import sha256_file
from ekd_ray.results import Study
from ekd_ray.scale.cluster import local_cpus
from ekd_ray.scale.confirm import baselines
from ekd_ray.studies import pipeline
from ekd_ray.studies.pipeline import (
    check_folder,
    check_study,
    check_unchanged,
    conduct_study,
    open_run,
    run_study,
)

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


TAUGHT = DistillConfig(dataset="digits", student="resnet8", teacher="resnet14", method="kd")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"space": {}}, "search space is empty"),
        ({"cpus_per_trial": 1024}, r"1,024 CPUs .*: lower --cpus-per-trial\."),
        ({"gpus_per_trial": 64.0}, "GPU"),
        (
            {"distill": DistillConfig(dataset="digits", student="resnet8", method="none",
                                      validation_fraction=0.0)},
            "validation_fraction must be > 0",
        ),
        ({"distill": TAUGHT.replace(teacher_normalization="imagent")}, "Did you mean 'imagenet'"),
        ({"teacher_training": {"epoch": 5}, "distill": TAUGHT}, "teacher_training: .*'epoch'"),
        (
            {"teacher_training": {"epoch": 5}, "distill": TAUGHT.replace(teacher_weights="w")},
            "teacher_training: .*'epoch'",
        ),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_before_it_starts(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_study(study(**changes))


@pytest.mark.parametrize("given", [True, False])
def test_a_teacher_that_is_too_weak_leaves_no_folder_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: bool
) -> None:
    """But of one that the study has trained, which may be used with a lower bound."""

    def stop(study: Study, observer: object) -> None:
        (study.path / "teacher").mkdir()
        raise WeakTeacher("too weak")

    shared = DistillConfig(
        dataset="digits", student="resnet8", teacher="resnet8", teacher_weights="w" * given or None
    )
    config = StudyConfig(distill=shared, space=SPACE)
    monkeypatch.setattr(pipeline, "run_study", stop)
    with pytest.raises(WeakTeacher):
        conduct_study(config, tmp_path / "run", Mock())
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == ({".lock"} if given else {".lock", "study.yaml", "teacher"})
    if given:
        with pytest.raises(WeakTeacher):  # the folder is free
            conduct_study(config, tmp_path / "run", Mock())


@pytest.mark.parametrize("begun", ["", "trials/0000", "teacher", "teacher.json"])
def test_a_study_that_is_refused_before_it_computes_leaves_its_folder_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: str
) -> None:
    """Such as one whose cluster is not there; the same command may begin again."""

    def stop(study: Study, observer: object) -> None:
        if begun:
            (study.path / begun).mkdir(parents=True)
        raise UserError("there is no Ray at that address")

    config = StudyConfig(distill=DistillConfig(dataset="digits", method="none"), space=SPACE)
    monkeypatch.setattr(pipeline, "run_study", stop)
    with pytest.raises(UserError, match="no Ray"):
        conduct_study(config, tmp_path / "run", Mock())
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert ("study.yaml" in left) == bool(begun)


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
    with pytest.raises(UserError, match=r"seed is 0 there and 5 here \(weight_decay "):
        open_run(out, other, resume=True)
    shared = other.distill.replace(method="evidential", epochs=9, batch_size=32, lr=0.5)
    other = other.replace(distill=shared, space={"momentum": SPACE["lr"]})
    with pytest.raises(UserError, match=r"method is none there .*\(\d+ other settings differ"):
        check_unchanged(out, config, other)
    with pytest.raises(UserError, match=r"configuration: lr is searched there and 0\.5 here"):
        check_unchanged(out, config, other, given=["lr"])
    longer = config.replace(distill=config.distill.replace(epochs=9, batch_size=32))
    with pytest.raises(UserError, match=r"configuration: epochs is \d+ there and 9 here"):
        check_unchanged(out, config, longer)
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
    config = check_study(study())
    opened = open_run(tmp_path / "run", config, resume=False)
    with FileLock(opened.path / ".lock"):
        there = {path: path.stat() for path in opened.path.rglob("*")}
        with pytest.raises(UserError, match="another process"):
            conduct_study(config, opened.path, Mock(), resume=True)
        assert {path: path.stat() for path in opened.path.rglob("*")} == there


TAUGHT = DistillConfig(
    dataset="synthetic", student="resnet8", teacher="resnet8", train_subset=80, batch_size=16,
    validation_fraction=0.4, epochs=2, precision="float32", teacher_cache="off",
)  # fmt: skip


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"candidates": 0}, "candidates must be a whole number, 1 to 100, got 0"),
        ({"candidates": 2, "seeds": [1, 1]}, "need 2 different seeds"),
        ({"candidates": 2, "choose_by": "val_ece"}, "unknown metric in choose_by: 'val_ece'"),
        ({"candidates": 2, "validation_fraction": 0.0}, "set validation_fraction > 0"),
        ({"seeds": [0, 2**63]}, "seed must be <= 9223372036854775807"),
    ],
)
def test_candidates_that_cannot_be_chosen_from_are_refused(
    training: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        check_study(study(distill=TAUGHT, teacher_training={"epochs": 1, **training}))
    assert refused.value.keys and refused.value.keys[0] == "teacher_training"


def test_the_plan_counts_the_candidates_and_knows_a_measured_teacher(tmp_path: Path) -> None:
    training = {"epochs": 5, "candidates": 3, "choose_by": "val_aurc"}
    config = check_study(study(distill=TAUGHT, teacher_training=training))
    plan = study_plan(config, tmp_path)
    assert "3 candidates (seeds 0, 1, 2) of 5 epochs, 15 epochs in all" in plan
    assert "the best by val_aurc" in plan and "measured once it is trained" in plan
    TeacherFigures(
        model="resnet8", sha256="0", candidates=3, images=32, metrics={"val_top1": 0.5},
        log_prior=None,
    ).write(tmp_path)  # fmt: skip
    assert "accuracy 50.00 %" in study_plan(config, tmp_path)


def test_the_plan_promises_no_more_full_runs_than_trials(tmp_path: Path) -> None:
    asked = study(distill=TAUGHT, teacher_training={"epochs": 1}, trials=2, confirm_top_k=9)
    config = check_study(asked)
    assert "at least 2 run in full" in study_plan(config, tmp_path)


class Ended(Exception):
    """The stages that the test is about are over."""


@pytest.mark.slow
def test_one_candidate_needs_no_ray_and_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "connected", Mock(side_effect=Ended))
    observer = Mock()
    opened = open_run(
        tmp_path / "run",
        check_study(study(distill=TAUGHT, teacher_training={"epochs": 1, "candidates": 1})),
        resume=False,
    )
    with pytest.raises(Ended):
        run_study(opened, observer)
    weights = tmp_path / "run" / "teacher" / "teacher.safetensors"
    found = Study.load(opened.path).teacher()
    assert found and found.sha256 == sha256_file(weights) and found.candidates == 1
    notes = [call.args[0] for call in observer.note.call_args_list]
    assert "(trained by the study)" in notes[0]
    assert all(note.startswith("The teacher: ") for note in notes[1:]), "its warnings"
    alone = teacher_config(TAUGHT, "resnet8", {"epochs": 1})
    train_teacher(alone, tmp_path / "alone.safetensors", threads=local_cpus())
    assert (tmp_path / "alone.safetensors").read_bytes() == weights.read_bytes()

    monkeypatch.setattr(pipeline, "measure_teacher", Mock(side_effect=AssertionError))
    with pytest.raises(Ended):
        run_study(opened, observer)
    assert [call.args[0] for call in observer.note.call_args_list] == 2 * notes


def test_no_device_is_picked_in_a_driver_beside_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What trains and measures a teacher does so elsewhere, in a Ray that is there for it."""
    joined, asked, elsewhere = [], [], []

    def connect(config: StudyConfig, **_: Any) -> contextlib.AbstractContextManager[None]:
        if elsewhere:
            raise Ended
        joined.append(config.gpus_per_trial)
        return contextlib.nullcontext()

    def compute(config: StudyConfig, function: Any, *arguments: Any) -> Any:
        assert joined and config.gpus == 1.0
        elsewhere.append(True)
        try:
            return function(*arguments)
        finally:
            elsewhere.append(False)

    def asks() -> bool:
        asked.append(bool(elsewhere) and elsewhere[-1])
        return False

    config = check_study(study(distill=TAUGHT, teacher_training={"epochs": 1}))
    opened, observer = open_run(tmp_path / "run", config, resume=False), Mock()
    monkeypatch.setattr("ekd_ray.scale.cluster.local_nodes", lambda: [(2.0, 2.0)])
    monkeypatch.setattr("ekd_ray.engine.precision.uses_gpu", asks)
    monkeypatch.setattr(pipeline, "connected", connect)
    monkeypatch.setattr(pipeline, "compute_off_driver", compute)
    with pytest.raises(Ended):
        run_study(opened, observer)
    assert elsewhere == [True, False] * 2 and asked and all(asked)
    assert [call.args[1]["epoch"] for call in observer.epoch.call_args_list] == [1]
    assert Study.load(opened.path).teacher() is not None
    assert Study.load(opened.path).config.gpus_per_trial == "auto", "it may be resumed elsewhere"


def test_a_study_without_gpus_hides_them_from_its_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def train(*_: Any, **__: Any) -> None:
        seen.append(pick_device().type)
        raise Ended

    config = study(distill=TAUGHT, teacher_training={"epochs": 1}, gpus_per_trial=0.0)
    opened = open_run(tmp_path / "run", check_study(config), resume=False)
    monkeypatch.setattr(pipeline, "train_teacher", train)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    with pytest.raises(Ended):
        run_study(opened, Mock())
    assert seen == ["cpu"]


def test_a_teacher_that_goes_on_from_its_checkpoint_is_announced_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    observer = SimpleNamespace(
        note=notes.append, stage=lambda *_: None, started=lambda *_: None,
        epoch=lambda *_: None, ended=lambda *_, **__: None,
    )  # fmt: skip
    monkeypatch.setattr(pipeline, "compute_off_driver", lambda *_: None)
    base = DistillConfig(dataset="digits", student="resnet8", teacher="resnet8", method="kd")
    path = tmp_path / "teacher" / "teacher.safetensors"
    path.parent.mkdir()
    (path.parent / CHECKPOINT).write_bytes(b"")
    rows = [{"epoch": epoch, "train_loss": 1.0} for epoch in (1, 2)]
    (path.parent / HISTORY).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for _ in range(2):  # the second time its checkpoint is gone
        pipeline.teach(path, StudyConfig(distill=base, gpus_per_trial=0), {"epochs": 3}, observer)
    (note,) = notes
    assert "teacher is continued" in note and "2 of 3 epochs" in note


def test_a_plan_refuses_a_disk_without_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is made there."""
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda path: Mock(free=2**20))
    with pytest.raises(UserError, match="1 MiB free"):
        check_folder(tmp_path / "new" / "run", study(), resume=False)
    assert not [*tmp_path.iterdir()]
