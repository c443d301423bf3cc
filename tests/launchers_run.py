"""Launchers as processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ekd_ray

LAUNCHERS = Path(ekd_ray.__file__).parent.parent / "launchers"
DIGITS = ("--dataset", "digits", "--pair", "resnet20-resnet8")


def command(name, *argv):
    """A launcher in its own process."""
    return subprocess.run(
        [sys.executable, str(LAUNCHERS / f"{name}.py"), *argv],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
