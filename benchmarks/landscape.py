"""Learning curves of every configuration of a space, out of those that were recorded."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from sklearn.ensemble import ExtraTreesRegressor

from ekd_ray.scale.model_sampler import Coordinates
from ekd_ray.scale.space import Space

NEAR = 16  # recorded configurations that lend each other their noise
METRIC = "val_top1"
Point = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A configuration's point, and its curves [epochs] by the seed that it was trained under."""

    point: Point
    curves: Mapping[int, NDArray[np.float64]]


def read_recorded(table: Path) -> dict[int, Recorded]:
    """The configurations of a table by number; a run that diverged stays where it was."""
    curves: dict[int, dict[int, list[float]]] = {}
    points: dict[int, Point] = {}
    for row in pq.read_table(table).to_pylist():
        curves.setdefault(row["number"], {}).setdefault(row.get("seed") or 0, []).append(
            row[METRIC]
        )
        points[row["number"]] = row
    epochs = max(len(curve) for own in curves.values() for curve in own.values())
    return {
        number: Recorded(
            point=points[number],
            curves={s: np.array([*c, *[c[-1]] * (epochs - len(c))]) for s, c in own.items()},
        )
        for number, own in curves.items()
    }


@dataclass(frozen=True, kw_only=True)
class Noise:
    """The effect of a seed on runs, by how well they do.

    Attributes:
        levels: final metric of some configurations, noise left out [configurations].
        deviations: of single runs of theirs [configurations, runs, epochs].
    """

    levels: NDArray[np.float64]
    deviations: NDArray[np.float64]

    def draw(self, level: float, key: int) -> NDArray[np.float64]:
        """The deviation [epochs] of one of the runs that did about as well as `level`."""
        near = np.argsort(np.abs(self.levels - level))[:NEAR]
        lent = self.deviations[near].reshape(-1, self.deviations.shape[-1])
        return lent[key % len(lent)]

    @property
    def spread(self) -> float:
        """The spread of a single final score, in the better third of the configurations."""
        better = self.levels >= np.quantile(self.levels, 2 / 3)
        return float(np.sqrt((self.deviations[better][:, :, -1] ** 2).mean()))


def repeated_noise(recorded: Mapping[int, Recorded]) -> Noise | None:
    """The noise of configurations that were trained under several seeds; None without these.

    It is what a seed does to them: each one's curve minus its mean over the seeds, and minus what
    the seed does to all of them alike, which no search can mistake for quality.
    """
    seeds, effects, repeated = _seeds_apart(recorded)
    if not repeated:
        return None
    table = np.array([[recorded[n].curves[s] - effects[s] for s in seeds] for n in repeated])
    means = table.mean(axis=1)
    # Both means have taken a part of the spread with them.
    freedom = (1 - 1 / len(seeds)) * (1 - 1 / len(repeated))
    return Noise(levels=means[:, -1], deviations=(table - means[:, None]) / np.sqrt(freedom))


class Landscape:
    """Learning curves of all configurations of a space, out of those of some.

    A forest fitted to the recorded curves says what a configuration is worth; noise comes on top,
    anew for every seed.

    Args:
        recorded: what the forest is fitted to.
        noise: of other runs; otherwise that of `recorded` (`repeated_noise`) or, without repeats,
            what the forest leaves unexplained, in which the forest's own errors are.

    Attributes:
        explained: share of the variance of the final metric, out of bag.
        best: the largest value among random configurations of the space. None of them was
            recorded: what the forest makes of a recorded one has the luck of that run in it.
    """

    def __init__(
        self,
        recorded: Mapping[int, Recorded],
        space: Space,
        *,
        noise: Noise | None = None,
        seed: int = 0,
    ) -> None:
        self.space = space
        self.recorded = [own.point for own in recorded.values()]
        _, effects, _ = _seeds_apart(recorded)
        measured = np.array(
            [
                np.mean([curve - effects.get(s, 0.0) for s, curve in own.curves.items()], axis=0)
                for own in recorded.values()
            ]
        )
        self.epochs = measured.shape[1]
        inputs = np.array([unit_coordinates(space, point) for point in self.recorded])
        weights = [len(own.curves) for own in recorded.values()]
        forest = ExtraTreesRegressor(
            n_estimators=100, min_samples_leaf=2, bootstrap=True, oob_score=True, random_state=seed
        ).fit(inputs, measured, sample_weight=weights)
        unexplained = measured - forest.oob_prediction_
        self.explained = float(1 - unexplained[:, -1].var() / measured[:, -1].var())
        self._noise = (
            noise
            or repeated_noise(recorded)
            or Noise(levels=forest.oob_prediction_[:, -1], deviations=unexplained[:, None, :])
        )
        self.noise = self._noise.spread
        self._trees = [tree.tree_ for tree in forest.estimators_]
        drawn = np.random.default_rng(seed).random((20_000, inputs.shape[1]))
        ends = self._expected(drawn)[:, -1]
        self.best = float(ends.max())
        self._extremes = drawn[[ends.argmax(), ends.argmin()]]

    def curve(self, point: Point, seed: int = 0) -> tuple[list[float], float]:
        """(noisy value after each epoch, true final value) of a configuration.

        Args:
            seed: of the run, see `draw_noise`: equal ones give equal curves.
        """
        unit = np.array([unit_coordinates(self.space, point)])
        true = self._expected(unit)[0]
        text = np.round(unit[0], 9).tobytes() + str(seed).encode()
        key = int.from_bytes(hashlib.sha256(text).digest()[:8], "little")
        return (true + self._noise.draw(true[-1], key)).tolist(), float(true[-1])

    def extreme_points(self) -> tuple[Point, Point]:
        """The best and the worst of the random configurations."""
        coordinates = Coordinates(self.space)
        best, worst = (coordinates.point(row) for row in self._extremes)
        return best, worst

    def _expected(self, units: NDArray[np.float64]) -> NDArray[np.float64]:
        """Curves [points, epochs]: the forest's `predict` without its checks, which cost a single
        point a hundred times what the trees do."""
        given = units.astype(np.float32)
        return np.mean([tree.predict(given)[..., 0] for tree in self._trees], axis=0)


def unit_coordinates(space: Space, point: Point) -> list[float]:
    """Coordinates of a point in [0, 1]: numbers along their (logarithmic) range, a choice as one
    coordinate per value, parameters that the point lacks in the middle."""
    coordinates: list[float] = []
    for name, parameter in space.parameters.items():
        value = point.get(name)
        if parameter.choices is not None:
            coordinates += [float(value == choice) for choice in parameter.choices]
        else:
            coordinates.append(0.5 if value is None else parameter.place(value))
    return coordinates


def _seeds_apart(
    recorded: Mapping[int, Recorded],
) -> tuple[list[int], dict[int, NDArray[np.float64]], Collection[int]]:
    """(all seeds, the effect of each on all configurations alike [epochs], the numbers of those
    that were trained under all seeds), empty without enough repeats."""
    seeds = sorted({seed for own in recorded.values() for seed in own.curves})
    repeated = [number for number, own in recorded.items() if len(own.curves) == len(seeds)]
    if len(seeds) < 2 or len(repeated) < NEAR:
        return [], {}, []
    table = np.array([[recorded[n].curves[s] for s in seeds] for n in repeated])
    effects = table.mean(axis=0) - table.mean(axis=(0, 1))
    return seeds, dict(zip(seeds, effects, strict=True)), repeated
