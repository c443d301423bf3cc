"""What `make release` writes, and the files that a publication needs."""

from __future__ import annotations

import datetime
import importlib.util
from pathlib import Path

import pytest
import yaml

import ekd_ray

ROOT = Path(ekd_ray.__file__).parents[1]
DAY = datetime.date(2026, 12, 24)


@pytest.fixture(scope="module")
def release():
    spec = importlib.util.spec_from_file_location("release", ROOT / "deploy" / "release.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("state", ["unreleased", "2026-12-01"])
def test_the_head_of_the_changelog_is_dated_and_nothing_else(release, state):
    text = "# Changelog\n\n## {}\n\n- New.\n\n## 0.1.0 (2026-11-30)\n\n- Old.\n"
    found = release.dated(text.format(f"0.2.0 ({state})"), "0.2.0", DAY)
    assert found == text.format("0.2.0 (2026-12-24)")


def test_a_head_of_another_version_is_refused(release):
    for text in ("# Changelog\n\n## 0.1.0 (2026-11-30)\n", "# Changelog\n"):
        with pytest.raises(SystemExit, match=r"ekd_ray is 0\.2\.0: write there"):
            release.dated(text, "0.2.0", DAY)


def test_the_changelog_begins_with_the_version_of_the_code(release):
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert release.dated(text, ekd_ray.__version__, DAY)


def test_the_version_stands_in_one_place():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert "version" not in citation
    places = [
        path.relative_to(ROOT)
        for name in ("*.toml", "*.py", "*.cff", "Makefile", "deploy/*", "ekd_ray/**/*.py")
        for path in ROOT.glob(name)
        if f'"{ekd_ray.__version__}"' in path.read_text(encoding="utf-8")
    ]
    assert places == [Path("ekd_ray/__init__.py")]
