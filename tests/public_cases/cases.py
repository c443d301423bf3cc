"""One row of the table: what somebody hands in, and how it is answered.

The rows stand in a file for each kind (`teacher_cases.py`, ...), each with a list `CASES`;
`test_public_cases.py` runs all of them. A row makes its small input itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@dataclass(frozen=True)
class Answer:
    """The end of a command, and all that its user reads."""

    code: int
    text: str


@dataclass(frozen=True)
class Hands:
    """All that a row works with.

    Attributes:
        folder: an empty one of its own, where it is run.
        launch: `launch("tune", "--dry-run", ...)` runs a command in a copy of this process.
        patch: undone at the row's end.
    """

    folder: Path
    launch: Callable[..., Answer]
    patch: pytest.MonkeyPatch


@dataclass(frozen=True)
class Case:
    """A row.

    Attributes:
        kind: such as `teacher file`; the table of docs/reliability.md has a line for each.
        name: of the row, unique in its kind.
        hand_in: makes the input, hands it in, and asserts what words cannot say (that weights
            are equal, that nothing is left behind).
        code: the exit code of the command; None for a row that runs none.
        words: each is in the answer.
        slow: run by `make test-all` only: it starts Ray or trains for long.
    """

    kind: str
    name: str
    hand_in: Callable[[Hands], Answer | None]
    code: int | None = 0
    words: tuple[str, ...] = ()
    slow: bool = False


def parameters(*modules: ModuleType) -> list[Any]:
    """The rows of these files, for `pytest.mark.parametrize`."""
    return [
        pytest.param(case, id=f"{case.kind}-{case.name}", marks=[pytest.mark.slow] * case.slow)
        for module in modules
        for case in module.CASES
    ]
