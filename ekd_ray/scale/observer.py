"""Who is told of a study's progress."""

from __future__ import annotations

from typing import Any, Protocol


class Observer(Protocol):
    """Who is told of a study's progress (the terminal, a test)."""

    def filled(self, done: int, total: int) -> None:
        """So many parts of the teacher's logits, of all that the next stage needs, are there."""

    def stage(self, title: str, total: int, epochs: int) -> None:
        """A stage of `total` runs of at most `epochs` epochs begins; of none: a single step."""

    def started(self, name: str, number: int, settings: dict[str, Any]) -> None:
        """A run begins."""

    def epoch(self, number: int, row: dict[str, Any]) -> None:
        """A run has finished an epoch."""

    def ended(self, number: int, *, failed: bool) -> None:
        """A run has ended: all epochs done, stopped early, or failed."""
