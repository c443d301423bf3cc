"""Recipes of which a stranger has changed anything are planned, or refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st
from mutations import Data, changed_file

from ekd_ray.results.records import milestone_epochs
from ekd_ray.scale.samplers import check_sampler
from ekd_ray.scale.space import check_space, first_points
from ekd_ray.studies.recipes import SEARCH_SPACES, Recipe

# Its data and student cost nothing, so that the whole plan is made.
SMALL = {
    "description": "a study of made-up pictures",
    "distill": {
        "dataset": "synthetic", "student": "resnet8", "method": "kd", "teacher": "resnet8",
        "epochs": 3, "train_subset": 200, "lr_milestones": [0.5, 0.75], "precision": "float32",
    },
    "space": {
        "lr": {"low": 0.001, "high": 0.1, "log": True}, "temperature": {"low": 1.0, "high": 8.0},
        "optimizer": {"choices": ["sgd", "adamw"]}, "batch_size": {"low": 16, "high": 64},
    },
    "trials": 4, "metric": "val_top1", "rungs": [1, 2], "constraints": ["val_ece<=0.2"],
    "objectives": ["val_nll"], "budget_hours": 1.0, "confirm_seeds": 2, "sampler": "tpe",
}  # fmt: skip


@st.composite
def changed_recipes(draw: Any, files: dict[str, Data]) -> Data:
    name = draw(st.sampled_from([*["small.yaml"] * len(files), *sorted(files)]))
    return draw(changed_file(".yaml", files[name]))


def use_recipe(path: Path) -> None:
    recipe = Recipe.load(path)
    with recipe.locate_errors():
        config = recipe.config
        space = check_space(config)
        check_sampler(config, space)
        space.sample(3, seed=0)
        first_points(config)
        milestone_epochs(config)
        type(config).from_dict(config.to_dict())
        config.fingerprint()


def test_recipes(tmp_path, fuzzer):
    files = {path.name: Data(path.read_bytes()) for path in SEARCH_SPACES.glob("*.yaml")}
    files["small.yaml"] = Data(yaml.safe_dump(SMALL).encode())
    path = tmp_path / "recipe.yaml"
    path.write_bytes(files["small.yaml"])
    use_recipe(path)

    def use(given: Data) -> None:
        path.write_bytes(given)
        use_recipe(path)

    fuzzer.run("recipes", changed_recipes(files), use)
