"""Date the head of CHANGELOG.md, before `make release` builds what will be published."""

from __future__ import annotations

import datetime
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSION_FILE = ROOT / "ekd_ray" / "__init__.py"


def dated(changelog: str, version: str, day: datetime.date) -> str:
    """The text with `## VERSION (DAY)` as its first heading of a version.

    Raises:
        SystemExit: the head is of another version.
    """
    head = re.search(r"^## (\S+) \((unreleased|\d{4}-\d{2}-\d{2})\)$", changelog, re.MULTILINE)
    if head is None or head[1] != version:
        found = head[1] if head else "missing"
        sys.exit(
            f"error: the head of CHANGELOG.md is {found}, ekd_ray is {version}: write there under "
            f"'## {version} (unreleased)' what is new, or correct __version__."
        )
    return changelog[: head.start()] + f"## {version} ({day})" + changelog[head.end() :]


def main() -> None:
    found = re.search(r'^__version__ = "(.+)"$', VERSION_FILE.read_text(), re.MULTILINE)
    assert found
    path = ROOT / "CHANGELOG.md"
    text = path.read_text(encoding="utf-8")
    path.write_text(dated(text, found[1], datetime.date.today()), encoding="utf-8")
    if "OWNER" in (ROOT / "pyproject.toml").read_text(encoding="utf-8"):
        print("note: name the repository in pyproject.toml and CITATION.cff, in place of OWNER.")


if __name__ == "__main__":
    main()
