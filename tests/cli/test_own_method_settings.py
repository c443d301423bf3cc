"""The settings of a method that was registered from outside are searched and fixed as others."""

import runpy
from pathlib import Path

import pytest
from test_cli_flags import DIGITS, one_run, study

from ekd_ray.errors import UserError
from ekd_ray.losses import METHODS

PLUGIN = Path(__file__).parents[2] / "docs" / "guide" / "attention_transfer.py"


@pytest.fixture(autouse=True)
def _registered():
    runpy.run_path(str(PLUGIN))
    yield
    del METHODS["at"]


def test_its_own_range_is_searched():
    config = study(*DIGITS, "--method", "at")
    assert config.distill.method == "at"
    assert config.space["at_weight"] == {"low": 100.0, "high": 10000.0, "log": True}


@pytest.mark.parametrize(
    ("text", "value", "searched"),
    [
        ("at_weight=20", 20.0, None),
        ("at_weight=log:1:10", None, {"low": 1, "high": 10, "log": True}),
    ],
)
def test_set_fixes_it_or_searches_another_range(text, value, searched):
    config = study(*DIGITS, "--method", "at", "--set", text)
    assert config.space.get("at_weight") == searched
    assert value is None or config.distill.at_weight == value


def test_one_run_takes_it_and_its_bound_holds():
    argv = (*DIGITS, "--method", "at", "--set")
    assert one_run(*argv, "at_weight=20").at_weight == 20.0
    with pytest.raises(UserError, match="at_weight must be >= 0"):
        one_run(*argv, "at_weight=-1")
