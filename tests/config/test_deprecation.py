"""What is deprecated warns the one who uses it, and is gone in the version that was named."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path

import pytest
from packaging.version import Version

import ekd_ray
from ekd_ray.config.deprecation import warn_deprecated

PACKAGE = Path(ekd_ray.__file__).parent


def overdue(source: str, version: str) -> list[int]:
    """The lines of `warn_deprecated` calls whose time has come."""
    now = Version(version)
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "warn_deprecated"
        for keyword in node.keywords
        if keyword.arg == "gone_in" and Version(ast.literal_eval(keyword.value)) <= now
    ]


def test_the_caller_is_warned_where_it_uses_the_old_name() -> None:
    def old_name() -> int:
        warn_deprecated("old_name()", "new_name()", gone_in="0.3")
        return 1

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert old_name() == 1
    (warning,) = caught
    assert warning.category is FutureWarning and warning.filename == __file__
    assert "old_name() == 1" in Path(__file__).read_text().splitlines()[warning.lineno - 1]
    assert str(warning.message) == (
        "old_name() is deprecated and will be gone in ekd_ray 0.3: use new_name()."
    )


@pytest.mark.parametrize(("version", "lines"), [("0.2.9", []), ("0.3.0", [1]), ("0.10.0", [1])])
def test_a_call_whose_time_has_come_is_found(version: str, lines: list[int]) -> None:
    assert overdue("warn_deprecated('a', 'b', gone_in='0.3')", version) == lines


def test_nothing_is_overdue() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert overdue(path.read_text(encoding="utf-8"), ekd_ray.__version__) == [], path
