"""Plugins from the command line: what runs, what is refused, and what a run leaves of them."""

import json
import re

import pytest
import yaml
from launchers_run import command, forked

NETS = """
from pathlib import Path
from torch import nn
from ekd_ray.models import register_model
Path("ran").touch()
def build(n):
    return nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, n))
register_model("netlet", build)
"""
METHOD = """
from ekd_ray.config.method_settings import MethodSetting
from ekd_ray.losses.cross_entropy import CROSS_ENTROPY, CE_WEIGHT
from ekd_ray.losses.methods import Method, Term, register_method
SQUARE = MethodSetting(name="square_weight", kind=float, default=0.25, low=0, doc="of squares",
                       search={"low": 0.1, "high": 0.9})
def squares(out):
    return {"square": out.student.square().mean()}
register_method("squares", Method(settings=(CE_WEIGHT, SQUARE), needs_teacher=False, terms=(
    CROSS_ENTROPY, Term(names=("square",), weight="square_weight", loss=squares))))
"""
RUN = ("--dataset", "digits", "--train-subset", "200", "--epochs", "1", "--quiet", "--out", "run")


@pytest.fixture
def parts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_nets.py").write_text(NETS)
    (tmp_path / "my_method.py").write_text(METHOD)
    recipe = {"plugins": ["my_nets.py", "my_method.py"],
              "distill": {"student": "netlet", "method": "squares",
                          "square_weight": 0.5}}  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return tmp_path


@pytest.mark.slow  # tests/config/test_plugins.py has what is trusted, and the plans below
def test_one_run_with_parts_of_ones_own_and_again_from_its_folder(parts):
    given = ("--plugin", "my_nets.py", "--plugin", "my_method.py")
    done = command("distill", *RUN, *given, "--student", "netlet", "--method", "squares",
                   "--set", "square_weight=0.125", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    config = yaml.safe_load((parts / "run/config.yaml").read_text())
    assert [stamp.partition("@")[0] for stamp in config["plugins"]] == ["my_method", "my_nets"]
    assert (parts / "run/plugins/my_nets.py").read_text() == NETS
    history = (parts / "run/history.jsonl").read_text().splitlines()
    assert "loss_square" in json.loads(history[0])
    # The folder has all that is needed: the files themselves may change or go.
    for file in ("my_nets.py", "my_method.py", "ran"):
        (parts / file).unlink()
    resume = ("distill", "--resume", "--out", "run", "--quiet")
    refused = command(*resume)
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "run/plugins/my_nets.py" in refused.stderr and not (parts / "ran").exists()
    assert command(*resume, "--trust-plugins").returncode == 0


def test_a_recipe_runs_no_code_unless_the_user_says_so(parts):
    recipe = ("distill", *RUN, "--space", "recipe.yaml", "--dry-run")
    refused = forked(*recipe)
    assert (refused.returncode, (parts / "ran").exists()) == (2, False)
    assert (
        refused.stderr.startswith("error: recipe.yaml names code")
        and "--trust-plugins" in refused.stderr
    )
    half = forked(*recipe, "--plugin", "my_method.py")
    assert half.returncode == 2 and "my_nets.py" in half.stderr and not (parts / "ran").exists()
    done = forked(*recipe, "--trust-plugins")
    assert done.returncode == 0, done.stderr
    assert "my_nets, SHA-256" in done.stdout and "my_method, SHA-256" in done.stdout
    same = forked(*recipe, "--plugin", "my_method.py", "--plugin", "my_nets.py")
    plans = [re.sub(r"(?m)^estimate.*", "", each.stdout) for each in (same, done)]  # measured
    assert plans[0] == plans[1]


def test_a_model_by_its_function_on_the_command_line_is_the_users_word(parts):
    plan = ("--method", "none", "--dry-run")
    done = forked("distill", *RUN, "--plugin", "my_nets.py", "--student", "my_nets:build", *plan)
    assert done.returncode == 0 and "my_nets, SHA-256" in done.stdout
    (parts / "recipe.yaml").write_text("distill: {student: 'my_nets:build', method: none}\n")
    refused = forked("distill", *RUN, "--space", "recipe.yaml", "--dry-run")
    assert refused.returncode == 2 and "my_nets" in refused.stderr


def test_the_settings_of_a_plugins_method_are_searched(parts):
    (parts / "recipe.yaml").write_text(
        "plugins: [my_method.py]\ndistill: {student: resnet8}\nmethods: {squares: {}}\n"
    )
    done = forked("space", "show", "recipe.yaml", "--method", "squares", "--trust-plugins",
                   "--json", "--points", "3")  # fmt: skip
    points = json.loads(done.stdout)["points"]
    assert all(0.1 <= point["square_weight"] <= 0.9 for point in points) and len(points) == 3


def test_a_plugin_that_is_not_there_is_one_sentence(parts):
    done = forked("distill", *RUN, "--student", "resnet8", "--method", "none",
                   "--plugin", "gone.py")  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "gone.py" in done.stderr


def test_models_anywhere_in_a_recipe_need_the_users_word(parts):
    (parts / "recipe.yaml").write_text(
        "distill: {student: resnet8, method: none}\n"
        "methods: {kd: {distill: {student: 'my_nets:build'}}}\n"
    )
    refused = forked("distill", *RUN, "--space", "recipe.yaml", "--dry-run")
    assert refused.returncode == 2 and "--plugin my_nets" in refused.stderr
