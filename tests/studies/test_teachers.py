"""Teachers as they are given: their priors, the authors' files, and the softmax baseline."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml

import ekd_ray as ekd
from ekd_ray.cli import tune_command
from ekd_ray.cli.plan_text import study_plan
from ekd_ray.cli.request import study_request
from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.errors import Interrupted, UserError
from ekd_ray.files import sha256_file
from ekd_ray.models import build_model, save_weights
from ekd_ray.results.records import STUDY_FILE
from ekd_ray.results.run_result import RunResult
from ekd_ray.scale.confirm import baselines
from ekd_ray.scale.space import around_prior
from ekd_ray.studies import training
from ekd_ray.studies.pipeline import TEACHER, check_study, open_run
from ekd_ray.studies.recipes import Recipe

RANGE = {"low": -3.0, "high": 1.0, "around_prior": 1.0}
LRS = {"low": 0.01, "high": 0.1}
SOFTMAX = ("none", "kd", "ekd-softmax")


@pytest.fixture
def save(tmp_path: Path) -> Any:
    """Write resnet8 weights of ours, or a foreign file; returns the path as text."""

    def write(name: str, log_prior: float | None = None, *, seed: int = 0, foreign=False) -> str:
        torch.manual_seed(seed)
        model, path = build_model("resnet8", 10), tmp_path / name
        if foreign:
            torch.save({"model": model.state_dict()}, path)
        else:
            save_weights(
                model, path, model_name="resnet8", num_classes=10, mean=[0.5] * 3, std=[0.5] * 3,
                log_prior=log_prior,
            )  # fmt: skip
        return str(path)

    return write


def study(
    weights: str | None, authors: dict[str, Any] | None = None, **changes: Any
) -> StudyConfig:
    shared = DistillConfig(
        dataset="digits", student="resnet8", teacher="resnet8", teacher_weights=weights,
        teacher_normalization="half",
    )  # fmt: skip
    values = {"distill": shared, "space": {"log_prior": RANGE}, "authors": authors, **changes}
    return StudyConfig(**values)


# The middle of the range of priors


@pytest.mark.parametrize(
    ("learned", "pair", "low", "high", "start", "words"),
    [
        (-0.5, None, -1.5, 0.5, -0.5, "log_prior -0.5: the teacher has learned it"),
        (-0.5, -1.0, -1.5, 0.5, -0.5, "the teacher has learned it"),
        (-0.5, -2.25, -2.25, 0.5, -0.5, "the teacher has learned it"),  # holds the pair's point
        (None, -1.0, -2.0, 0.0, -1.0, "the pair's, because the teacher's file has none"),
        (None, None, -3.0, 1.0, 0.0, "log_prior 0: neither the teacher nor the pair has one"),
    ],
)
def test_priors_are_searched_around_the_known_one(
    save: Any, tmp_path: Path, learned, pair, low, high, start, words
) -> None:
    authors = None if pair is None else {"log_prior": pair}
    config = check_study(study(save("t", learned), authors))
    assert config.space["log_prior"]["low"] == pytest.approx(low)
    assert config.space["log_prior"]["high"] == pytest.approx(high)
    assert config.distill.log_prior == pytest.approx(start)
    assert words in study_plan(config, tmp_path)
    assert check_study(config).fingerprint() == config.fingerprint()


def test_the_prior_of_a_teacher_to_be_trained_is_known_later(save: Any, tmp_path: Path) -> None:
    config = check_study(study(None, teacher_training={"epochs": 1}))
    assert config.space["log_prior"] == RANGE
    plan = study_plan(config, tmp_path)
    assert "the one that the teacher will have learned" in plan and "to be trained first" in plan
    (tmp_path / TEACHER).parent.mkdir()
    shutil.copy(save("there", 0.75), tmp_path / TEACHER)
    plan = study_plan(config, tmp_path)
    assert "to be trained first" not in plan and "log_prior 0.75" in plan, "it is there"
    assert "log_prior -0.25 .. 1.75" in plan, "the range around what it has learned"
    trained = config.distill.replace(teacher_weights=save("t", 0.75))
    space = around_prior(config, trained).space
    assert space["log_prior"] == {"low": -0.25, "high": 1.75}


def test_a_prior_that_is_given_stays(save: Any) -> None:
    given = study(save("t"), {"log_prior": -1.0})
    fixed = given.replace(distill=given.distill.replace(log_prior=0.25))
    assert check_study(fixed).distill.log_prior == 0.25
    learned = given.replace(distill=given.distill.replace(learn_log_prior=True))
    found = check_study(learned).distill
    assert (found.log_prior, found.teacher_log_prior) == (1.0, -1.0)


def test_a_range_around_a_prior_stays_within_the_bounds_of_the_setting(save: Any) -> None:
    found = check_study(study(save("t", 19.5))).space["log_prior"]
    assert (found["low"], found["high"]) == (pytest.approx(18.5), 20)
    with pytest.raises(UserError, match="has learned must be -20 to 20, got 25: give a log_prior"):
        check_study(study(save("t", 25.0)))


# The baseline ekd-softmax


def test_ekd_under_a_softmax_teacher_is_a_row_where_it_is_asked_for(save: Any) -> None:
    given, softmax = save("t", -0.5), save("s", seed=1)
    authors = {"log_prior": -1.25, "kd_weight": 3.0}
    config = check_study(study(given, authors, baselines=SOFTMAX, softmax_teacher_weights=softmax))
    row = baselines(config, config.distill)["ekd-softmax"]
    assert (row.method, row.log_prior, row.kd_weight) == ("ekd", -1.25, 3.0)
    assert (row.teacher_weights, row.teacher_sha256) == (softmax, None)
    assert row.teacher_normalization is None, "that of its own file"
    assert config.distill.teacher_weights == given
    assert "ekd-softmax" not in baselines(config.replace(baselines=("kd",)), config.distill)
    without = check_study(study(given, baselines=SOFTMAX, softmax_teacher_weights=softmax))
    assert baselines(without, without.distill)["ekd-softmax"].log_prior == pytest.approx(-0.5)


def test_a_study_that_trains_its_teacher_trains_the_softmax_one_too(tmp_path: Path) -> None:
    config = check_study(study(None, teacher_training={"epochs": 1}, baselines=SOFTMAX))
    assert list(baselines(config, config.distill)) == list(SOFTMAX)
    assert "softmax teacher of ekd-softmax: to be trained too" in study_plan(config, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "needs a softmax resnet8: give --softmax-teacher-weights FILE, or a --teacher-zoo"),
        ({"softmax": (-1.0, 1)}, "trained by plain cross-entropy, got .* learned prior of -1"),
        ({"teacher": None, "softmax": (None, 1)}, "what this study does already"),
        ({"teacher": "foreign", "softmax": "same"}, "what this study does already"),
        ({"teacher": "none", "teacher_training": {"method": "none"}}, "does already, because"),
        ({"method": "kd"}, "ekd-softmax needs an evidential method with a teacher, got 'kd'"),
        ({"softmax": (None, 1), "baselines": ("none",)}, "serves the baseline ekd-softmax only"),
    ],
    ids=str,
)
def test_a_softmax_baseline_that_says_nothing_is_refused(save: Any, changes, message) -> None:
    kind = changes.pop("teacher", -0.5)
    given = None if kind == "none" else save("t", kind if kind != "foreign" else None,
                                              foreign=kind == "foreign")  # fmt: skip
    match changes.pop("softmax", None):
        case "same":
            changes["softmax_teacher_weights"] = given
        case (prior, seed):
            changes["softmax_teacher_weights"] = save("s", prior, seed=seed)
    if method := changes.pop("method", None):
        changes |= {"distill": study(given).distill.replace(method=method), "space": {"lr": LRS}}
    with pytest.raises(UserError, match=message) as refused:
        check_study(study(given, **{"baselines": SOFTMAX, **changes}))
    assert "\n" not in str(refused.value)


# A folder of teachers


def studies(*flags: str) -> dict[str, Recipe]:
    parser = argparse.ArgumentParser()
    tune_command.add_arguments(parser)
    return dict(study_request(parser.parse_args(flags)).studies)


def tuned(*flags: str) -> StudyConfig:
    return studies(*flags)[""].config


def test_a_zoo_of_both_kinds_serves_the_study_and_its_baseline(tmp_path: Path) -> None:
    for name in ("ResNet56/student_200", "resnet56_vanilla/a.pth"):
        path = tmp_path / name
        path.parent.mkdir()
        torch.manual_seed(len(name))
        torch.save({"model": build_model("resnet56", 100).state_dict()}, path)
    flags = ["--pair", "resnet56-resnet20", "--teacher-zoo", str(tmp_path)]
    config = tuned(*flags, "--baselines", "none", "kd", "ekd-softmax")
    assert config.distill.teacher_weights == str(tmp_path / "ResNet56/student_200")
    assert config.softmax_teacher_weights == str(tmp_path / "resnet56_vanilla/a.pth")
    assert config.baselines == SOFTMAX
    both = studies(*flags, "--methods", "ekd,kd", "--baselines", *SOFTMAX)
    assert [recipe.config.baselines for recipe in both.values()] == [SOFTMAX, SOFTMAX[:2]]
    assert [bool(r.config.softmax_teacher_weights) for r in both.values()] == [True, False]
    softmax = tuned(*flags, "--method", "kd")
    assert softmax.distill.teacher_weights == str(tmp_path / "resnet56_vanilla/a.pth")
    assert softmax.softmax_teacher_weights is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("page", "and no checkpoint"),
        ("truncated", "is truncated, damaged or no checkpoint"),
        ("another", "holds a 'resnet20', not a 'resnet8': give --teacher resnet20"),
        ("unknown", "that the model lacks .*the nearest of the zoo is resnet8"),
        ("classes", "has 7 classes but dataset 'digits' has 10"),
        ("missing", "No such file"),
    ],
)
def test_a_wrong_teacher_file_is_one_sentence_before_compute(
    tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "student_200"
    state = build_model("resnet8", 10).state_dict()
    torch.save({"model": state}, path)
    match content:
        case "page":
            path.write_text("<!DOCTYPE html><html>404</html>")
        case "truncated":
            path.write_bytes(path.read_bytes()[:5000])
        case "another":
            torch.save({"model": build_model("resnet20", 10).state_dict()}, path)
        case "unknown":
            torch.save({"model": {**state, "extra.weight": torch.zeros(3)}}, path)
        case "classes":
            torch.save({"model": build_model("resnet8", 7).state_dict()}, path)
        case "missing":
            path.unlink()
    with pytest.raises(UserError, match=message) as refused:
        check_study(study(str(path), {"log_prior": -1.0}))
    assert "\n" not in str(refused.value)


# Studies of before


@pytest.mark.parametrize(("searched", "refused"), [("temperature", True), ("kd_weight", False)])
def test_an_older_study_is_continued_only_where_its_trials_stay_alike(
    save: Any, tmp_path: Path, searched: str, refused: bool
) -> None:
    space = {searched: {"low": 1.0, "high": 4.0}}
    config = check_study(study(save("t", -0.5), space=space))
    out = tmp_path / "run"
    open_run(out, config, resume=False)
    header = yaml.safe_load((out / STUDY_FILE).read_text())
    del header["checksum"], header["study"]["distill"]["ekd_temperature"]
    (out / STUDY_FILE).write_text(yaml.safe_dump(header))
    if not refused:
        assert open_run(out, config, resume=True).config == config
        return
    with pytest.raises(UserError, match="searches temperature and was begun by a release"):
        open_run(out, config, resume=True)


# The teacher of a single training


@pytest.mark.slow
def test_a_student_without_a_teacher_trains_the_one_of_its_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted while the teacher trains, and again while the student does; then as if the
    teacher had been given."""
    recipe = {
        "distill": {"dataset": "synthetic", "teacher": "resnet8", "student": "resnet8",
                    "train_subset": 100, "epochs": 1, "teacher_cache": "off"},
        "teacher_training": {"epochs": 1, "lr": 0.03},
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    given = {"recipe": tmp_path / "mine.yaml", "progress": False}
    asked = {**given, "out": tmp_path / "run"}
    for name in ("teach", "_train"):
        resume = name == "_train"
        with monkeypatch.context() as patch:
            patch.setattr(training, name, Mock(side_effect=Interrupted))
            with pytest.raises(KeyboardInterrupt):
                ekd.distill(**asked, resume=resume)
    with pytest.raises(UserError, match="choose another"):
        ekd.distill(**asked)
    found = ekd.distill(**asked, resume=True)
    teacher = tmp_path / "run" / "teacher" / "teacher.safetensors"
    assert found.config.teacher_sha256 == sha256_file(teacher)
    assert RunResult.load(tmp_path / "run").record.fingerprint == found.record.fingerprint
    told = ekd.distill(**given, teacher_weights=str(teacher), out=tmp_path / "told")
    assert sha256_file(told.weights) == sha256_file(found.weights)
    alone = ekd.distill(out=tmp_path / "run", resume=True, progress=False)
    assert alone.record.fingerprint == found.record.fingerprint
