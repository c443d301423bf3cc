"""Landscapes of the recorded pairs, and what a search of one may know of the others.

The tables hold the first so many configurations of one list. What a search knows of a
configuration from another pair must not be known to the landscape too, or it is told a part of
the answer: the fit of a target leaves out the first configurations (`Table.left_out`), and its
sources show only rows that the fit has not.

| target | fitted to | sources show |
|---|---|---|
| resnet56a-resnet8, in float32 and in bfloat16 | numbers from 40 on | all of the two small tables |
| resnet20a-resnet8, resnet56a-resnet14 | numbers from 8 on | the first 8, and what it lacks |

Without its first eight a small table explains as much, out of bag, as with them. The two
tables of resnet56a-resnet8 are one pair: neither is the other's source, and to the other pairs the
one in float32, in which they were recorded themselves, stands for both.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.curves import recorded_study
from benchmarks.landscape import Landscape, Point, Recorded, read_recorded, repeated_noise
from ekd_ray.results.study_model import Outcome
from ekd_ray.scale.space import Space

CURVES = Path(__file__).parent / "curves"


@dataclass(frozen=True, kw_only=True)
class Table:
    """Recorded curves of a pair; `left_out`: of its first configurations, as a target."""

    file: str
    pair: str
    left_out: int
    is_source: bool = True

    def read(self) -> dict[int, Recorded]:
        """All that was recorded, by number."""
        return read_recorded(CURVES / f"cifar10_{self.file}.parquet")


TABLES = {
    "resnet20a-resnet8": Table(
        file="resnet20a-resnet8_2026-11-23", pair="resnet20a-resnet8", left_out=8
    ),
    "resnet56a-resnet14": Table(
        file="resnet56a-resnet14_2026-11-23", pair="resnet56a-resnet14", left_out=8
    ),
    "resnet56a-resnet8": Table(
        file="resnet56a-resnet8_2026-11-23", pair="resnet56a-resnet8", left_out=40
    ),
    "resnet56a-resnet8-bf16": Table(
        file="resnet56a-resnet8_bf16_2026-11-26", pair="resnet56a-resnet8", left_out=40,
        is_source=False,
    ),
}  # fmt: skip
REPEATED = "resnet56a-resnet8-bf16"  # what a seed does was measured here, and holds for all


@dataclass(frozen=True, kw_only=True)
class SourceRow:
    """A configuration of another pair, and its score after each epoch (larger is better)."""

    number: int
    point: Point
    scores: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Source:
    """The findings for another pair, by its name."""

    name: str
    rows: Sequence[SourceRow]

    def ranked(self) -> list[SourceRow]:
        """The rows, the best at full length first."""
        return sorted(self.rows, key=lambda row: -row.scores[-1])

    def outcomes(self) -> list[Outcome]:
        """The rows as a study's model takes them: their scores of full length."""
        return [Outcome(params=row.point, scores={0: row.scores[-1]}) for row in self.rows]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A pair that is searched: its landscape, the numbers it was fitted to, other pairs' rows."""

    landscape: Landscape
    fitted: frozenset[int]
    sources: Sequence[Source]


def fitted_numbers(table: Table, recorded: Mapping[int, Recorded]) -> frozenset[int]:
    """The configurations that the landscape of a target is fitted to."""
    return frozenset(number for number in recorded if number >= table.left_out)


def show_source(
    name: str, recorded: Mapping[int, Recorded], space: Space, hidden: frozenset[int]
) -> Source:
    """A table as a source, without the `hidden` numbers: each configuration's first run."""
    rows = [
        SourceRow(
            number=number,
            point=space.searched_part(own.point),
            scores=tuple(own.curves[min(own.curves)].tolist()),
        )
        for number, own in recorded.items()
        if number not in hidden
    ]
    return Source(name=name, rows=rows)


@functools.cache
def open_target(name: str) -> Target:
    """The target of a table by its name in `TABLES`."""
    table, space = TABLES[name], Space(recorded_study().space)
    recorded = table.read()
    fitted = fitted_numbers(table, recorded)
    noise = repeated_noise(TABLES[REPEATED].read())
    return Target(
        landscape=Landscape({n: recorded[n] for n in sorted(fitted)}, space, noise=noise),
        fitted=fitted,
        sources=[
            show_source(other, found.read(), space, fitted)
            for other, found in TABLES.items()
            if found.is_source and found.pair != table.pair
        ],
    )


def reverse_source(source: Source) -> Source:
    """A source that misleads: the best configuration has the worst one's curve, and so on."""
    ranked = sorted(source.rows, key=lambda row: row.scores[-1])
    swapped = zip(ranked, reversed(ranked), strict=True)
    return replace(source, rows=[replace(row, scores=other.scores) for row, other in swapped])
