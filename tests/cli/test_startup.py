"""A command or a trial imports nothing heavy that it does not need."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from report_studies import Maker

import ekd_ray
from ekd_ray.results.importance import write_importance
from ekd_ray.results.model_figures import fit_study_model

ROOT = Path(ekd_ray.__file__).parents[1]
LAUNCHERS = sorted((ROOT / "launchers").glob("*.py"))
HEAVY = {"torch", "torchvision", "ray", "optuna", "sklearn", "pyarrow", "tensorboard", "plotly"}


def modules_after(code):
    """Names of the modules that a new process has loaded after `code`.

    torch may be there and not loaded (`ekd_ray.losses.late_torch`).
    """
    code += (
        "\nimport json, sys; names = {*sys.modules}"
        "\nprint(json.dumps(sorted(names if 'torch._C' in names else names - {'torch'})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


READ_FLAGS = (
    "import argparse\n"
    "from ekd_ray.cli import request, tune_command\n"
    "parser = argparse.ArgumentParser()\n"
    "tune_command.add_arguments(parser)\n"
    "args = parser.parse_args(['--dataset', 'digits', '--pair', 'resnet20-resnet8'])\n"
)


@pytest.mark.parametrize("code", [READ_FLAGS, READ_FLAGS + "request.study_request(args)"])
def test_the_command_line_loads_nothing_heavy(code):
    """The settings of methods, which a recipe has, stand beside their losses."""
    assert not {name.split(".")[0] for name in modules_after(code)} & HEAVY


def test_settings_of_methods_need_no_torch_and_their_losses_get_it():
    loaded = modules_after("from ekd_ray import losses; assert losses.METHODS['dkd'].settings")
    assert "ekd_ray.losses.dkd" in loaded and "torch" not in loaded
    assert "torch.nn" in modules_after(
        "from ekd_ray.losses.late_torch import torch; import ekd_ray.losses as losses\n"
        "losses.kd_loss(torch.zeros(2, 3), torch.ones(2, 3), 4.0); import torch as own\n"
        "assert own is torch and losses.Objective"
    )


def test_a_list_is_refused_by_the_first_look_at_a_methods_setting():
    """These are declared beside the losses, which are loaded when a setting is asked for."""
    modules_after(
        "from ekd_ray.cli import request; from ekd_ray.errors import UserError\n"
        "try: request._refuse_several('kd_weight', '1,2')\n"
        "except UserError: pass\n"
        "else: raise SystemExit('not refused')"
    )


def after_command(*words, start="runpy.run_module('ekd_ray', run_name='__main__')"):
    """Names of the modules that a command has loaded when it ends."""
    return modules_after(
        f"import runpy, sys; sys.argv = {['ekd-ray', *words]!r}\n"
        f"try: {start}\n"
        f"except SystemExit as left: assert not left.code; print('ended')"
    )


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_help_of_a_launcher_loads_nothing_heavy(path):
    loaded = after_command("--help", start=f"runpy.run_path({str(path)!r}, run_name='__main__')")
    assert not {name.split(".")[0] for name in loaded} & {*HEAVY, "rich"}


def test_help_of_no_command_loads_anything_heavy():
    """All of them in one process: `--help-all` imports each."""
    loaded = after_command("--help-all")
    assert "ekd_ray.cli.tune_command" in loaded and "ekd_ray.cli.doctor_command" in loaded
    assert not {name.split(".")[0] for name in loaded} & {*HEAVY, "rich"}


@pytest.mark.parametrize("reported", [False, True])
def test_a_study_is_shown_without_what_makes_a_report(tmp_path, reported):
    """Of a search that has ended, its importance computed by a report or not."""
    study = Maker(tmp_path).study(space={"lr": {"low": 0.001, "high": 0.1}})
    for number in range(9):
        Maker(tmp_path).trial(number, [0.1 + number / 20] * 9, lr=0.01 * (number + 1))
    if reported:
        found = fit_study_model(study.records(), study.config).find(None)
        write_importance(found, study.records(), study.config, study.path)
    loaded = {name.split(".")[0] for name in after_command("show", str(tmp_path))}
    assert not loaded & {*HEAVY, "numpy", "pandas", "scipy", "jinja2", "PIL"}


# What the first call of a session waits for, beside the standard library.
FIRST = {"ekd_ray", "ekd_ray.errors", "ekd_ray.files", "ekd_ray.config"}
OVERVIEW = {
    *("ekd_ray.__main__", "ekd_ray.cli", "ekd_ray.cli.main", "ekd_ray.cli.help_text"),
    *("ekd_ray.cli.output", "ekd_ray.cli.interrupts"),
}


@pytest.mark.parametrize(
    ("loaded", "ours"),
    [
        (lambda: modules_after("import ekd_ray"), FIRST),
        (lambda: after_command("--help"), FIRST | OVERVIEW),
        (lambda: after_command("--version"), FIRST | OVERVIEW),
    ],
    ids=["import", "--help", "--version"],
)
def test_what_is_loaded_first(loaded, ours):
    found = {name for name in loaded() - modules_after("") if "cython" not in name}
    own = {name for name in found if name.startswith("ekd_ray")}
    assert {name for name in own if not name.startswith("ekd_ray.config.")} <= ours
    assert {name.split(".")[0] for name in found - own} - sys.stdlib_module_names <= {"yaml"}


def test_a_trial_does_not_wait_for_what_only_others_need():
    loaded = modules_after("import ekd_ray.engine.distill, ekd_ray.scale.worker")
    slow = {"sklearn", "scipy.stats", "torch._dynamo", "torch.distributed.fsdp", "triton"}
    assert "torch" in loaded and not loaded & {*slow, "torch.distributed.tensor"}
