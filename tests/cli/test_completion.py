"""Every flag is described, and a shell can complete it, commands and names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launchers_run import LAUNCHERS

from ekd_ray.cli import completion
from ekd_ray.cli.help_text import all_actions
from ekd_ray.cli.main import COMMANDS, command_parser
from ekd_ray.data import DATASETS
from ekd_ray.losses.methods import METHODS


def test_every_flag_is_described() -> None:
    for name in COMMANDS:
        for action in all_actions(command_parser(name)):
            named = action.option_strings or action.dest not in ("command", "==SUPPRESS==")
            assert action.help or not named or action.dest == "tables", (name, action.dest)


def completed(program: str, line: str, tmp_path: Path) -> set[str]:
    """The words that bash is offered at the end of `<program> <line>`."""
    launcher = LAUNCHERS / f"{program}.py"
    typed = f"python {launcher} {line}" if launcher.exists() else f"{program} {line}"
    start = [str(launcher)] if launcher.exists() else ["-m", "ekd_ray"]
    environment = {
        **os.environ, "_ARGCOMPLETE": "2" if launcher.exists() else "1", "_ARGCOMPLETE_IFS": "\n",
        "COMP_TYPE": "9", "COMP_LINE": typed, "COMP_POINT": str(len(typed)),
        "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "offered"),
    }  # fmt: skip
    subprocess.run(
        [sys.executable, *start], env=environment, check=True, timeout=60, capture_output=True
    )
    return {word.strip() for word in (tmp_path / "offered").read_text().split("\n")}


@pytest.mark.parametrize(
    ("program", "line", "offered"),
    [
        ("ekd-ray", "tun", {"tune"}),
        ("ekd-ray", "tune --pair vit/resnet56-De", {"vit/resnet56-DeiT_Ti"}),
        ("ekd-ray", "cache fill --thr", {"--threads"}),
        ("ekd-ray", "space show cifar10/vgg", {"cifar10/vgg13-vgg8"}),
        ("tune_cifar", "--pair resnet32x4-resn", {"resnet32x4-resnet8x4"}),
        ("tune_cifar", "--trial", {"--trials"}),
        ("cache", "fi", {"fill"}),
        ("distill", "--method dkd+", {"dkd+ekd"}),
    ],
)
def test_a_shell_completes_flags_and_names(
    program: str, line: str, offered: set[str], tmp_path: Path
) -> None:
    assert completed(program, line, tmp_path) >= offered


def test_every_start_is_marked_for_completion() -> None:
    """argcomplete looks for the mark in a script, or in the module of an entry point."""
    package = LAUNCHERS.parent / "ekd_ray"
    for launcher in (*LAUNCHERS.glob("*.py"), package / "__main__.py", package / "cli/main.py"):
        assert "PYTHON_ARGCOMPLETE_OK" in launcher.read_text()[:1024], launcher


def test_completion_knows_all_methods_and_data_sets() -> None:
    offered = {*completion.method_names()}
    assert offered - {"any"} == {*METHODS} | {n for n in offered if n.endswith("-standardized")}
    assert {*completion.dataset_names()} - {"folder:", "hf:"} == set(DATASETS)
