"""Prints the oldest releases that pyproject allows, as requirements for `make test-lowest`.

What a dependency needs in turn is pip's to choose, but for the names below.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
# Neither of the old tensorboard and ray says that they need these.
TRANSITIVE = ("protobuf<6", "pandas<3")
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
