"""The points at which `make chaos` holds a process: each is there, and a kill lands at it."""

from __future__ import annotations

import functools
import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from holding import HOLDS, Holds
from holds.sitecustomize import POINTS

WRITES = """
import sys
from ekd_ray.files import write_text
for text in ("one", "two", "three"):
    write_text(sys.argv[1], text)
"""


@pytest.mark.parametrize("module", POINTS)
def test_each_point_names_something(module: str) -> None:
    for name in POINTS[module]:
        assert callable(functools.reduce(getattr, name.split("."), importlib.import_module(module)))


def test_a_kill_lands_where_it_was_aimed(tmp_path: Path) -> None:
    """Before the second file is begun, and before it has its name: the first one is whole."""
    path = tmp_path / "file.txt"
    for armed, text, left in ((("begin",) * 2, "one", 0), (("begin", "rename"), None, 1)):
        holds = Holds(tmp_path / "holds")
        path.unlink(missing_ok=True)
        child = subprocess.Popen(
            [sys.executable, "-c", WRITES, str(path)], env=holds.environment(os.environ)
        )
        holds.arm(armed[0], "file.txt")
        first = holds.wait(child)
        assert first and first.pid == child.pid and not path.exists()
        holds.arm(armed[1], "file.txt")
        first.release()
        second = holds.wait(child)
        assert second
        second.kill()
        assert child.wait(timeout=30) == -signal.SIGKILL
        assert (path.read_text() if path.exists() else None) == text
        assert len(list(tmp_path.glob(".file.txt.*.tmp"))) == left
    assert HOLDS.is_dir()


def test_a_point_that_is_passed_is_not_waited_for(tmp_path: Path) -> None:
    holds = Holds(tmp_path / "holds")
    holds.arm("begin", "another file")
    child = subprocess.Popen(
        [sys.executable, "-c", WRITES, str(tmp_path / "file.txt")],
        env=holds.environment(os.environ),
    )
    assert holds.wait(child) is None and child.wait(timeout=30) == 0
