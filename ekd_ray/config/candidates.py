"""Candidates of a teacher: trainings that differ by seed, one of which is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from ekd_ray.config.phrases import several
from ekd_ray.errors import UserError, shorten, unknown_name

CHOOSE_BY = ("val_nll", "val_top1", "val_aurc")  # directions stand in `targets.DIRECTIONS`
SETTINGS = ("candidates", "seeds", "choose_by")
MOST = 100  # far beyond use: a number that is a slip must not cost days, or all memory


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The seed of each training, and the validation metric by which one of them is chosen."""

    seeds: tuple[int, ...]
    choose_by: str = CHOOSE_BY[0]

    @classmethod
    def parse(cls, settings: Mapping[str, Any], *, seed: int) -> Self:
        """From `candidates`, `seeds` and `choose_by` of `settings`, each of which may be missing.

        Args:
            seed: of the first candidate, the next ones count from it, unless `seeds` are given.

        Raises:
            UserError: a number that is not 1 to `MOST`, seeds that are not as many different
                numbers >= 0, or an unknown metric.
        """
        seeds = settings.get("seeds")
        count = settings.get("candidates")
        if count is None:
            count = len(seeds) if isinstance(seeds, list | tuple) else 1
        if not _is_whole(count) or not 1 <= count <= MOST:
            raise UserError(
                f"candidates must be a whole number, 1 to {MOST}, got {shorten(count)}: it says "
                "how many teachers are trained.",
                keys=("candidates",) if settings.get("candidates") is not None else ("seeds",),
            )
        if seeds is None:
            seeds = range(seed, seed + count)
        elif not isinstance(seeds, list | tuple) or not all(_is_whole(s) and s >= 0 for s in seeds):
            raise UserError(
                f"seeds of the candidates must be whole numbers >= 0, got {shorten(seeds)}: leave "
                f"them out for {seed} and the numbers after it.",
                keys=("seeds",),
            )
        if len(seeds) != count or len(set(seeds)) != count:
            raise UserError(
                f"{count} candidate(s) need {count} different seeds, got {shorten(list(seeds))}: "
                f"name so many, or leave them out for {seed} and the numbers after it.",
                keys=("seeds",),
            )
        chosen = settings.get("choose_by")
        chosen = CHOOSE_BY[0] if chosen is None else chosen
        if chosen not in CHOOSE_BY:
            raise unknown_name("metric in choose_by:", chosen, CHOOSE_BY, keys=("choose_by",))
        return cls(seeds=tuple(seeds), choose_by=chosen)

    def describe_cost(self, epochs: int) -> str:
        """The number of trainings and epochs that they take, in words."""
        count = len(self.seeds)
        return (
            f"{count} candidates (seeds {', '.join(map(str, self.seeds))}) of "
            f"{several(epochs, 'epoch')}, {several(count * epochs, 'epoch')} in all; the best by "
            f"{self.choose_by} is kept, the others leave their figures"
        )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
