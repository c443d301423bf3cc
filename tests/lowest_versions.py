"""Prints the oldest releases that pyproject allows, as requirements for `make test-lowest`.

What a dependency needs in turn is pip's to choose, but for pandas.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
# The oldest ray does not say that it needs this.
TRANSITIVE = ("pandas<3",)
RUNNERS = ("pytest", "pytest-timeout", "pytest-xdist", "hypothesis")


def oldest(requirement: str) -> str:
    """`numpy==1.26.4` of `numpy>=1.26.4,<3`."""
    return re.sub(r">=([^,]+).*", r"==\1", requirement)


def main() -> None:
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    needed = [*project["dependencies"], *project["optional-dependencies"]["cmaes"]]
    print("\n".join([*map(oldest, needed), *TRANSITIVE, *RUNNERS]))


if __name__ == "__main__":
    main()
