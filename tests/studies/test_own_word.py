"""Where results and keys go is said by the user's own flag, not by a file of somebody else."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.errors import UserError
from ekd_ray.studies.overlay import BY_FLAG, Given, lay_over
from ekd_ray.studies.recipes import Recipe

VALUES = {"optuna_storage": "sqlite:////tmp/x.db", "track": "mlflow:http://there.example"}
BASE = {"dataset": "digits", "student": "resnet8", "method": "none"}


def recipe_of(folder: Path, kind: str, setting: str) -> Recipe:
    """A recipe, one that extends such, one with it for its method, or a study that was begun."""
    named = {setting: VALUES[setting]}
    path = folder / "study.yaml"
    if kind == "study":
        study = StudyConfig(distill=DistillConfig(**BASE)).to_dict() | named
        path.write_text(yaml.safe_dump({"study": study}))
        return Recipe.of_study(path)
    values = {"distill": BASE}
    if kind == "extends":
        (folder / "base.yaml").write_text(yaml.safe_dump(named))
        path.write_text(yaml.safe_dump({"extends": "base.yaml", **values}))
    elif kind == "methods":
        path.write_text(yaml.safe_dump({**values, "methods": {"ekd": named}}))
        return Recipe.load(path, "ekd")
    else:
        path.write_text(yaml.safe_dump({**values, **named}))
    return Recipe.load(path)


@pytest.mark.parametrize("setting", BY_FLAG)
@pytest.mark.parametrize("kind", ["recipe", "extends", "methods", "study"])
def test_a_file_alone_names_no_place(tmp_path: Path, kind: str, setting: str) -> None:
    recipe = recipe_of(tmp_path, kind, setting)
    with pytest.raises(UserError, match=BY_FLAG[setting]) as refused:
        lay_over(recipe, Given())
    assert str(tmp_path) in str(refused.value) and VALUES[setting] in str(refused.value)
    for own in (VALUES[setting], None):
        config = lay_over(recipe, Given(settings={setting: own})).config
        assert getattr(config, setting) == own


def test_a_dry_run_connects_to_no_place_of_a_recipe(launch, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("sqlalchemy.create_engine", lambda url: pytest.fail("connected"))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
    path = tmp_path / "recipe.yaml"
    url = "sqlite:////tmp/${AWS_SECRET_ACCESS_KEY}.db"
    space = {"lr": {"low": 0.01, "high": 0.1}}
    values = {"distill": BASE, "space": space, "optuna_storage": url}
    path.write_text(yaml.safe_dump(values))
    code, out, err = launch("tune", "--space", path, "--dry-run")
    assert code == 2 and "--optuna-storage" in err and err.count("\n") == 1
    # Not even by the user's own word does a variable go anywhere but into the password.
    code, more, words = launch("tune", "--space", path, "--dry-run", "--optuna-storage", url)
    assert code == 2 and "password" in words
    assert "hush" not in out + err + more + words
