"""Pictures of one's own: the recipes for them, and what follows from their number and the batch."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import MobileNet_V3_Large_Weights, MobileNet_V3_Small_Weights

from ekd_ray.config.targets import PictureCounts
from ekd_ray.data import fitted_held_out, load_dataset
from ekd_ray.engine.resolve import split_sizes
from ekd_ray.engine.rundata import split_ids
from ekd_ray.errors import UserError
from ekd_ray.losses.methods import METHODS, resolve_method
from ekd_ray.models import build_model
from ekd_ray.results.words import describe_few_pictures
from ekd_ray.scale.confirm import champions
from ekd_ray.studies.fitting import _why_held
from ekd_ray.studies.overlay import Given, choose_recipe, lay_over, teacher_run
from ekd_ray.studies.recipes import SEARCH_SPACES, Recipe

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "own-pictures.md"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three classes, 60 each, of one colour."""
    folder = tmp_path_factory.mktemp("own") / "pictures"
    for split, count in (("train", 60), ("val", 2)):
        for label, name in enumerate(("blue", "green", "red")):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                colour = np.roll([250 - number, 10, number], label).tolist()
                Image.new("RGB", (16, 16), tuple(colour)).save(
                    folder / split / name / f"{number}.png"
                )
    return f"folder:{folder}"


def fitted(
    data: str, *, recipe: str = "folder/small-pictures", epochs=None, space=None, **settings
):
    given = Given(settings={"dataset": data, **settings}, epochs=epochs, space=space or {})
    return lay_over(Recipe.load(recipe), given).config


@pytest.mark.parametrize(
    ("total", "classes", "held"),
    [(30, 3, 10), (180, 3, 60), (299, 3, 100), (300, 3, 100), (500, 3, 100), (1000, 3, 200),
     (360, 120, 120)],
)  # fmt: skip
def test_the_validation_share_follows_the_size(total: int, classes: int, held: int) -> None:
    assert fitted_held_out(total, classes) == held


@pytest.mark.parametrize(
    ("total", "words"),
    [(180, "a third"), (297, "a third"), (360, "the least"), (500, "20 %"), (900, "20 %")],
)
def test_the_plan_says_which_part_of_the_rule_decides(total: int, words: str) -> None:
    held = fitted_held_out(total, 3)
    assert words in _why_held(held, total, 3), held


def test_own_pictures_validate_on_a_stratified_third(pictures: str) -> None:
    config = fitted(pictures).distill
    assert split_sizes(config) == (120, 60)
    labels = load_dataset(pictures, "train").labels
    train, validation = split_ids(config, labels)
    assert np.bincount(labels[validation]).tolist() == [20, 20, 20]
    assert not {*train} & {*validation}
    assert split_sizes(fitted(pictures, train_subset=90).distill) == (60, 30)
    assert fitted(pictures, validation_fraction=0.1).distill.validation_fraction == 0.1


def test_published_recipes_fit_nothing() -> None:
    for path in SEARCH_SPACES.rglob("*.yaml"):
        assert bool(Recipe.load(path).fit) == (path.parent.name == "folder"), path


def test_the_rate_follows_the_users_batch(pictures: str) -> None:
    plain, larger = fitted(pictures), fitted(pictures, batch_size=64)
    assert larger.distill.lr == pytest.approx(2 * plain.distill.lr)
    for end in ("low", "high"):
        assert larger.space["lr"][end] == pytest.approx(2 * plain.space["lr"][end])
    assert any("linear" in text for text in larger.distill.fitted)
    assert not any("linear" in text for text in plain.distill.fitted)
    adam = fitted(pictures, batch_size=64, optimizer="adamw").distill
    assert adam.lr == pytest.approx(math.sqrt(2) * plain.distill.lr, rel=1e-3)
    assert any("square-root" in text for text in adam.fitted)


def test_a_belief_of_the_rate_follows_the_batch_with_its_range(
    pictures: str, tmp_path: Path
) -> None:
    believed = tmp_path / "believed.yaml"
    believed.write_text(
        "extends: folder/small-pictures\n"
        "space: {lr: {low: 0.01, high: 0.1, prior: {center: 0.02}}}\nfit: {lr: {batch_size: 32}}\n"
    )
    spec = fitted(pictures, recipe=str(believed), batch_size=64).space["lr"]
    assert spec["prior"]["center"] / 0.02 == pytest.approx(spec["low"] / 0.01) != 1


def test_a_rate_that_was_given_stays(pictures: str) -> None:
    config = fitted(pictures, batch_size=64, lr=0.007)
    assert config.distill.lr == 0.007 and "lr" not in config.space
    own = {"lr": {"low": 0.001, "high": 0.5, "log": True}}
    assert fitted(pictures, batch_size=64, space=own).space["lr"] == own["lr"]
    searched = fitted(pictures, space={"batch_size": {"choices": [16, 64]}}, batch_size=16)
    assert searched.distill.batch_size == 16  # a value and a range: the value wins


def test_epochs_follow_the_steps(pictures: str, tmp_path: Path) -> None:
    # 120 pictures in batches of 32 are 3 steps: 3,000 of them would be 1,000 epochs.
    assert fitted(pictures).distill.epochs == 100
    path = tmp_path / "mine.yaml"
    path.write_text(
        "extends: folder/small-pictures\nfit: {epochs: {steps: 90, low: 2, high: 99}}\n"
    )
    config = fitted(pictures, recipe=str(path)).distill
    assert config.epochs == 30
    assert config.lr_warmup == 2  # half of 3 of 60, rounded as `with_epochs` does
    assert fitted(pictures, recipe=str(path), epochs=7).distill.epochs == 7
    assert fitted(pictures, recipe=str(path), batch_size=8).distill.epochs == 6


@pytest.mark.parametrize("method", [name for name, m in METHODS.items() if m.needs_teacher])
def test_authors_values_and_defaults_differ_in_nothing_that_is_not_shown(
    pictures: str, method: str
) -> None:
    """Of the small networks both have the same warm-ups."""
    given = Given(settings={"dataset": pictures, "image_size": 32}, method=method)
    for epochs in (6, 12, 14, 20, 50):
        recipe = Recipe.load("folder/small-pictures", method)
        config = lay_over(recipe, replace(given, epochs=epochs)).config
        rows = champions(config, resolve_method(config.distill))
        first, second = (resolve_method(rows[name]) for name in ("authors' values", "defaults"))
        differ = {*first.changes(second)}
        assert differ <= {*config.shown_settings}
        assert not {name for name in differ if name.endswith("_warmup")}
    larger = fitted(pictures, recipe="folder/from-scratch")
    assert "ekd_warmup" in larger.shown_settings  # the authors' own, which nobody searches


def test_values_of_a_recipe_of_ones_own_stay(pictures: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "extends: folder/small-pictures\ndistill: {epochs: 9, validation_fraction: 0.25}\n"
    )
    config = fitted(pictures, recipe=str(path), batch_size=64).distill
    assert (config.epochs, config.validation_fraction) == (9, 0.25)
    assert config.lr == pytest.approx(0.04)  # of which it says nothing
    path.write_text("extends: folder/small-pictures\nfit: {lr: null}\n")
    assert fitted(pictures, recipe=str(path), batch_size=64).distill.lr == 0.02


def test_values_of_a_method_in_a_recipe_of_ones_own_stay(pictures: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "extends: folder/small-pictures\nmethods: {kd: {distill: {epochs: 9, lr: 0.5}}}\n"
    )
    settings = {"dataset": pictures, "batch_size": 64}
    for method, expected in (("kd", (9, 0.5)), ("dkd", (100, 0.04)), (None, (100, 0.04))):
        recipe = Recipe.load(str(path), method)
        config = lay_over(recipe, Given(settings=settings, method=method)).config.distill
        assert (config.epochs, config.lr) == expected
        assert config.validation_fraction == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fit: 3", "must be a mapping"),
        ("fit: {epoch: {}}", "epochs"),
        ("fit: {epochs: {steps: 10}}", "steps, low, high"),
        ("fit: {lr: {batch_size: 0.5}}", "whole number >= 1"),
    ],
)
def test_a_mistake_in_the_rules_is_located(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"trials: 3\n{text}\n")
    with pytest.raises(UserError, match=words) as raised:
        Recipe.load(path)
    assert f"{path}:2" in str(raised.value)


def chosen(**settings: object) -> str:
    given = Given(settings=settings)
    return choose_recipe(recipe=None, pair=None, given=given, home=None).path.stem


def test_the_recipe_follows_the_size_and_the_weights(pictures, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert chosen(dataset=pictures) == "from-scratch"
    assert chosen(dataset=pictures, image_size=32) == "small-pictures"
    assert chosen(dataset=pictures, student_weights="own.pth") == "fine-tune"
    small, large = "torchvision:mobilenet_v3_small", "torchvision:mobilenet_v3_large"
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for known in (MobileNet_V3_Small_Weights, MobileNet_V3_Large_Weights):
        assert chosen(dataset=pictures, teacher=large, student=small) == "from-scratch"
        (folder / known.DEFAULT.url.rpartition("/")[2]).touch()
    assert chosen(dataset=pictures, teacher=large, student=small) == "fine-tune"
    assert chosen(dataset=pictures, teacher="resnet20", student=small) == "from-scratch"
    assert chosen(dataset="cifar100", teacher="resnet56", student="resnet8") == "default"


def test_a_teacher_trained_alone_has_the_same_split_and_length(pictures: str) -> None:
    given = Given(settings={"dataset": pictures, "image_size": 32})
    run, _ = teacher_run("resnet20", given, evidential=True)
    study = fitted(pictures, image_size=32).distill
    names = ("validation_fraction", "epochs", "lr", "batch_size", "schedule", "dataset")
    assert {n: getattr(run, n) for n in names} == {n: getattr(study, n) for n in names}
    assert (run.student, run.teacher, run.method) == ("resnet20", None, "evidential")
    assert run.learn_log_prior


def test_few_pictures_are_said_with_the_width_of_an_interval() -> None:
    def said(metric: str = "val_top1", **counts: int | None) -> list[str]:
        return describe_few_pictures(PictureCounts(**counts), [metric])

    for enough in (None, 0, 100):
        assert said(validation_images=enough, test_images=enough) == []
    (seven,) = said(validation_images=7)
    assert "7 pictures" in seven and "37 points" in seven
    (sixty,) = said(validation_images=60)  # half of 1.96 / sqrt(60) is 0.1265
    assert "13 points" in sixty
    (tested,) = said(test_images=15)
    assert tested.startswith("tests on 15 pictures") and "25 points" in tested
    assert said(smallest_class_images=4) == []
    (least,) = said("val_worst_recall", validation_images=500, smallest_class_images=4)
    assert least.startswith("validation recall of the worst class is as sure as")
    assert "4 pictures" in least and "49 points" in least


def test_the_plan_begins_with_the_warning_and_says_what_was_fitted(
    pictures: str, launch, tmp_path: Path
) -> None:
    weights = tmp_path / "weights.pth"
    torch.save(build_model("resnet8", 10).state_dict(), weights)
    code, out, err = launch(
        "tune", "--data", pictures, "--set", "image_size=32", "--set", "batch_size=8",
        "--teacher", "resnet14", "--student", "resnet8", "--student-weights", weights,
        "--set", "teacher_training={method: evidential}", "--dry-run",
    )  # fmt: skip
    assert code == 0, err
    first, second, *_ = out.splitlines()
    assert first.startswith("warning") and "60 pictures" in first and "13 points" in first
    assert "tests on" in second
    assert "10 classes before" in out and "square-root" in out and "15 steps" in out


def blocks() -> list[tuple[str, str]]:
    """(language, text) of each block of the guide that is to be run."""
    return re.findall(r"^```(python|sh)\n(.*?)^```", GUIDE.read_text(), re.DOTALL | re.MULTILINE)


def test_the_guide_begins_with_pictures_and_a_plan(launch) -> None:
    """The rest of its blocks: `test_the_guide_runs_from_the_pictures_to_the_export`."""
    (_, program), (_, parting), (_, command), *_ = blocks()
    exec(program, {})  # our own page; `launch` has gone to a folder of the test's
    assert len([*Path("pictures").rglob("*.png")]) == 240
    for number in range(10):
        own_one = Path("my-pictures", "star", f"{number}.png")
        own_one.parent.mkdir(parents=True, exist_ok=True)
        own_one.touch()
    exec(parting, {})
    stars = {side: Path("pictures", side, "star") for side in ("train", "val")}
    assert {side: len([*folder.iterdir()]) for side, folder in stars.items()} == {
        "train": 8, "val": 2,
    }  # fmt: skip
    for folder in stars.values():
        shutil.rmtree(folder)
    own, *argv = shlex.split(command)
    assert own == "ekd-ray"
    code, out, err = launch(*argv, "--json")
    assert code == 0, err
    found = json.loads(out)["distill"]
    assert (found["student"], found["epochs"]) == ("resnet8x4", 100)
    assert round(180 * found["validation_fraction"]) == 60


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_the_guide_runs_from_the_pictures_to_the_export(tmp_path: Path) -> None:
    path = os.pathsep.join(filter(None, [str(GUIDE.parents[2]), os.environ.get("PYTHONPATH")]))
    says = ""
    for language, text in blocks():
        own = f'ekd-ray() {{ {shlex.quote(sys.executable)} -m ekd_ray "$@"; }}; set -e; {text}'
        command = ["bash", "-c", own] if language == "sh" else [sys.executable, "-c", text]
        done = subprocess.run(
            command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        if text.startswith("ekd-ray show"):
            says = done.stdout
    assert "60 pictures" in says.splitlines()[0]
    page = (tmp_path / "runs" / "shapes" / "report" / "index.html").read_text()
    assert page.index("validates on 60 pictures") < page.index("<h1>")
    assert (tmp_path / "best" / "model.pt2").is_file()
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 61
