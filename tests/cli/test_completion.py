"""Every flag is described, and a shell can complete it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launchers_run import LAUNCHERS, parser_of

from ekd_ray.cli import completion
from ekd_ray.data import DATASETS
from ekd_ray.losses.methods import METHODS


def test_every_flag_is_described() -> None:
    for launcher in LAUNCHERS.glob("*.py"):
        for action in completion.actions(parser_of(launcher)):
            named = action.option_strings or action.dest not in ("command", "==SUPPRESS==")
            assert action.help or not named or action.dest == "tables", (launcher, action.dest)


def completed(launcher: str, line: str, tmp_path: Path) -> set[str]:
    """The words that bash is offered at the end of `launchers/<launcher>.py <line>`."""
    script = LAUNCHERS / f"{launcher}.py"
    typed = f"python {script} {line}"
    environment = {
        **os.environ, "_ARGCOMPLETE": "2", "_ARGCOMPLETE_IFS": "\n", "COMP_TYPE": "9",
        "COMP_LINE": typed, "COMP_POINT": str(len(typed)),
        "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "offered"),
    }  # fmt: skip
    subprocess.run(
        [sys.executable, str(script)], env=environment, check=True, timeout=60, capture_output=True
    )
    return {word.strip() for word in (tmp_path / "offered").read_text().split("\n")}


@pytest.mark.parametrize(
    ("launcher", "line", "offered"),
    [
        ("tune_cifar", "--pair resnet32x4-resn", {"resnet32x4-resnet8x4"}),
        ("tune_cifar", "--trial", {"--trials"}),
        ("cache", "fi", {"fill"}),
        ("distill", "--method dkd+", {"dkd+ekd"}),
    ],
)
def test_a_shell_completes_flags_and_names(
    launcher: str, line: str, offered: set[str], tmp_path: Path
) -> None:
    assert completed(launcher, line, tmp_path) >= offered


def test_every_launcher_is_marked_for_completion() -> None:
    for launcher in LAUNCHERS.glob("*.py"):
        assert "PYTHON_ARGCOMPLETE_OK" in launcher.read_text()[:1024], launcher


def test_completion_knows_all_methods_and_data_sets() -> None:
    offered = {*completion.method_names()}
    assert offered - {"any"} == {*METHODS} | {n for n in offered if n.endswith("-standardized")}
    assert {*completion.dataset_names()} - {"folder:", "hf:"} == set(DATASETS)
