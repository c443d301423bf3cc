"""Launchers as processes of their own, and the parsers that they build."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

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


class _Built(Exception):
    """Carries a launcher's parser out of its main, before it reads any argument."""


def _stop(parser: argparse.ArgumentParser, *_: object) -> None:
    raise _Built(parser)


def parser_of(launcher: Path) -> argparse.ArgumentParser:
    """The parser that a launcher builds."""
    spec = importlib.util.spec_from_file_location(launcher.stem, launcher)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with mock.patch.object(argparse.ArgumentParser, "parse_args", _stop):
        try:
            module.main()
        except _Built as built:
            return built.args[0]
    raise AssertionError(f"{launcher.name} reads no arguments")
