"""All flags of all launchers as text.

`python tests/cli_surface.py` renews the snapshot in `tests/cli_surface.txt`.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
SNAPSHOT = Path(__file__).with_suffix(".txt")


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


def _line(action: argparse.Action) -> str:
    name = ", ".join(action.option_strings) or str(action.metavar or action.dest)
    kind = type(action).__name__.strip("_").removesuffix("Action").lower()
    parts = [f"  {name}", kind]
    for key in ("type", "nargs", "choices", "default"):
        value = getattr(action, key)
        if key == "type" and value is not None:
            value = value.__name__
        if key == "choices" and value is not None:
            value = sorted(value)
        if value not in (None, argparse.SUPPRESS, False, []):
            parts.append(f"{key}={value}")
    if action.required and action.option_strings:
        parts.append("required")
    return "  ".join(parts)


def _lines(name: str, parser: argparse.ArgumentParser) -> list[str]:
    lines, commands = [name], {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            commands = action.choices
        if not isinstance(action, argparse._HelpAction):
            lines.append(_line(action))
    for command, child in commands.items():
        lines += _lines(f"{name} {command}", child)
    return lines


def surface() -> str:
    """One paragraph for each launcher and command, one line for each flag."""
    found = []
    for launcher in sorted((ROOT / "launchers").glob("*.py")):
        found += _lines(launcher.stem, parser_of(launcher))
    return "\n".join(found) + "\n"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    SNAPSHOT.write_text(surface(), encoding="utf-8")
    print(f"wrote {SNAPSHOT.relative_to(ROOT)}")
