"""The public names keep their signatures, and cost nothing before they are used."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import ekd_ray as ekd

FROZEN = Path(__file__).with_name("public_names.json")
HEAVY = {"torch", "ray", "optuna", "pyarrow", "numpy", "plotly", "rich", "pandas", "tqdm"}


def signatures() -> dict[str, str]:
    """Every public name with its signature, and the members of every public class."""
    found = {}
    for name in ekd.__all__:
        value = getattr(ekd, name)
        if inspect.ismodule(value):
            found |= {f"{name}.{inner}": _signature(getattr(value, inner))
                      for inner in value.__all__}  # fmt: skip
            continue
        settings = dataclasses.is_dataclass(value) and name.endswith("Config")
        found[name] = "class" if settings or not callable(value) else _signature(value)
        if inspect.isclass(value) and not settings:
            found |= {
                f"{name}.{member}": _signature(getattr(value, member))
                for member in sorted(dir(value))
                if not member.startswith("_") and hasattr(value, member)
            }
    return found


def _signature(value: object) -> str:
    try:
        return str(inspect.signature(value)) if callable(value) else "value"  # type: ignore[arg-type]
    except ValueError:
        return "value"


def test_signatures_are_those_that_were_promised() -> None:
    """A change here is one for the people who call it: see the deprecation rule, then write the
    file again by `python tests/studies/test_public_names.py`."""
    assert signatures() == json.loads(FROZEN.read_text())


def test_the_types_are_those_of_the_names() -> None:
    """What a type checker is told (the imports under TYPE_CHECKING) is what is loaded."""
    tree = ast.parse(Path(ekd.__file__).read_text())
    told = {
        alias.name: node.module
        for block in ast.walk(tree)
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert told.pop("losses") == "ekd_ray"
    assert told == ekd._PLACES
    assert sorted([*told, "losses"]) == sorted(ekd.__all__)
    assert {*ekd.__all__} <= {*dir(ekd)}
    with pytest.raises(AttributeError, match="no attribute 'tunes'"):
        ekd.tunes  # noqa: B018


def test_the_package_loads_nothing_heavy() -> None:
    code = "import json, sys, ekd_ray; ekd_ray.UserError; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {name.split(".")[0] for name in json.loads(done.stdout)} & HEAVY


if __name__ == "__main__":
    FROZEN.write_text(json.dumps(signatures(), indent=1) + "\n")
