"""`ekd-ray space`: recipes are listed, copied and used by name, from any folder."""

from __future__ import annotations

import json

import pytest
import yaml
from launchers_run import DIGITS

from ekd_ray.losses import METHODS
from ekd_ray.studies.recipes import list_recipes, load_recipe


def test_every_recipe_is_listed(launch) -> None:
    code, out, err = launch("space", "list")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == list_recipes()
    assert "None" not in out
    rows = json.loads(launch("space", "list", "--json")[1])
    assert rows["vit/resnet56-DeiT_Ti"] == {
        "dataset": "cifar100", "teacher": "resnet56", "student": "DeiT_Ti", "epochs": 300
    }  # fmt: skip


def test_a_copy_can_be_changed_and_searched(launch, tmp_path) -> None:
    code, out, err = launch("space", "copy", "digits/resnet20-resnet8")
    assert (code, err) == (0, "") and "resnet20-resnet8.yaml" in out
    copy = tmp_path / "resnet20-resnet8.yaml"
    assert load_recipe(copy) == load_recipe("digits/resnet20-resnet8")
    copy.write_text(copy.read_text().replace("trials: 12", "trials: 5"))
    code, out, err = launch("tune", "--dry-run", "--json", "--space", copy.name)
    assert (code, err) == (0, "") and json.loads(out)["trials"] == 5


def test_a_copy_replaces_nothing(launch, tmp_path) -> None:
    (tmp_path / "mine.yaml").write_text("trials: 3\n")
    code, out, err = launch("space", "copy", "default", "mine.yaml")
    assert (code, out) == (2, "") and "mine.yaml is there already" in err
    assert yaml.safe_load((tmp_path / "mine.yaml").read_text()) == {"trials": 3}
    assert launch("space", "copy", "default", "new/mine.yaml")[0] == 0
    assert load_recipe(tmp_path / "new" / "mine.yaml") == load_recipe("default")


@pytest.mark.parametrize(
    "flags",
    [("--space", "digits/resnet20-resnet8"), ("--pair", "digits/resnet20-resnet8"),
     ("--pair", "resnet20-resnet8")],
    ids=lambda flags: " ".join(flags),
)  # fmt: skip
def test_a_recipe_is_used_by_name(flags, launch) -> None:
    code, out, err = launch("tune", "--dry-run", "--json", *flags)
    assert (code, err) == (0, "")
    assert json.loads(out) == json.loads(launch("tune", "--dry-run", "--json", *DIGITS)[1])


def test_a_recipe_is_shown_by_name(launch) -> None:
    code, out, err = launch("space", "show", "default", "--points", 1, "--json")
    assert (code, err) == (0, "") and len(json.loads(out)["points"]) == 1
    code, out, err = launch("space", "show", "defualt")
    assert (code, out) == (2, "") and "Did you mean 'default'?" in err
    fitted = [
        "fitted to the pictures" in launch("space", "show", name, "--points", 1)[1]
        for name in ("folder/from-scratch", "default")
    ]
    assert fitted == [True, False]


def test_a_launcher_is_its_command(launch) -> None:
    """With the recipes of its home."""
    flags = ("--dry-run", "--json", "--pair")
    by_launcher = launch("tune_imagenet", *flags, "resnet34-resnet18")
    assert by_launcher == launch("tune", *flags, "imagenet/resnet34-resnet18")
    assert by_launcher[0] == 2 and "imagenet" in by_launcher[2]  # its files are not here


def test_quickstart_is_the_study_on_digits(launch, monkeypatch, tmp_path) -> None:
    from ekd_ray.cli import tune_command

    code, out, err = launch("quickstart", "--dry-run", "--json")
    flags = ("--dry-run", "--json", *DIGITS, "--train-subset", 560)
    assert (code, err) == (0, "") and json.loads(out) == json.loads(launch("tune", *flags)[1])
    asked = []
    monkeypatch.setattr(tune_command, "run", lambda args: asked.append(args) or 0)
    code, out, err = launch("quickstart", "--out", "first")
    assert (code, err) == (0, "") and "ekd-ray reproduce first/best" in out
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "study.yaml").touch()
    assert launch("quickstart", "--out", "first", "--quiet")[:2] == (0, "")
    assert [(args.out, args.resume, args.quiet) for args in asked] == [
        ("first", False, False), ("first", True, True)
    ]  # fmt: skip


def test_methods_are_listed(launch):
    code, out, err = launch("space", "methods")
    names = [line.split()[0] for line in out.split("\n\n")[0].splitlines()]
    assert (code, err, names) == (0, "", list(METHODS)) and "kd-standardized" in out
    listed = json.loads(launch("space", "methods", "--json")[1])
    assert listed["rld"]["settings"] == list(METHODS["rld"].setting_names)
    assert all(row["doc"] for row in listed.values())
