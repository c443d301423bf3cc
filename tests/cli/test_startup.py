"""A command or a trial imports nothing heavy that it does not need."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import ekd_ray

ROOT = Path(ekd_ray.__file__).parents[1]
LAUNCHERS = sorted((ROOT / "launchers").glob("*.py"))
HEAVY = {"torch", "torchvision", "ray", "optuna", "sklearn", "pyarrow", "tensorboard", "plotly"}


def modules_after(code):
    """Names of the modules that a new process has loaded after `code`."""
    code += "\nimport json, sys; print(json.dumps(list(sys.modules)))"
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


@pytest.mark.parametrize(
    ("code", "needed"),
    [(READ_FLAGS, set()), (READ_FLAGS + "request.study_request(args)", {"torch"})],
)
def test_the_command_line_loads_nothing_heavy(code, needed):
    """The settings of methods, which a recipe has, stand beside their losses: they need torch."""
    assert {name.split(".")[0] for name in modules_after(code)} & HEAVY == needed


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_help_loads_nothing_heavy(path):
    loaded = modules_after(
        f"import runpy, sys; sys.argv = ['x', '--help']\n"
        f"try: runpy.run_path({str(path)!r}, run_name='__main__')\n"
        f"except SystemExit: print('ended')"
    )
    assert not {name.split(".")[0] for name in loaded} & {*HEAVY, "rich"}


def test_a_trial_does_not_wait_for_what_only_others_need():
    loaded = modules_after("import ekd_ray.engine.distill, ekd_ray.scale.worker")
    slow = {"sklearn", "scipy.stats", "torch._dynamo", "torch.distributed.fsdp", "triton"}
    assert "torch" in loaded and not loaded & {*slow, "torch.distributed.tensor"}
