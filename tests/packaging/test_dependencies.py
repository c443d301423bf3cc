"""pyproject.toml asks for what the code imports, in any of its files, and for nothing else."""

from __future__ import annotations

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ekd_ray

PACKAGE = Path(ekd_ray.__file__).parent
PROJECT = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NOT_FOR_THE_CODE = ("dev", "bench")  # extras


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def imported() -> dict[str, set[str]]:
    """The foreign modules that the code imports, and the distributions that have them."""
    found: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    owners = packages_distributions()
    return {
        module: {canonicalize_name(name) for name in owners.get(module, [module])}
        for module in found - {"ekd_ray"} - sys.stdlib_module_names
    }


def test_what_is_imported_is_asked_for_and_nothing_else() -> None:
    always = names(PROJECT["dependencies"])
    extras = PROJECT["optional-dependencies"]
    asked = always.union(*(names(extras[name]) for name in extras if name not in NOT_FOR_THE_CODE))
    used = imported()
    assert [module for module, owners in used.items() if not owners & asked] == []
    assert always <= set().union(*used.values())
