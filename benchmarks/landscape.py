"""Learning curves of every configuration of a space, out of those that were recorded."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from sklearn.ensemble import ExtraTreesRegressor

from ekd_ray.scale.space import Parameter, Space

NEAR = 16  # recorded configurations that lend each other their noise
METRIC = "val_top1"
Point = Mapping[str, Any]


class Landscape:
    """Learning curves of all configurations of a space, out of those of some.

    Where some configurations were trained under several seeds, the noise is what a seed does to
    them: each one's curve minus its mean over the seeds, and minus what the seed does to all of
    them alike, which no search can mistake for quality. Otherwise it is what the forest leaves
    unexplained, in which the forest's own errors are.
    """

    def __init__(self, table: Path, space: Space, *, seed: int = 0) -> None:
        self.space = space
        curves: dict[int, dict[int, list[float]]] = {}
        points: dict[int, Point] = {}
        for row in pq.read_table(table).to_pylist():
            of_seed = curves.setdefault(row["number"], {})
            of_seed.setdefault(row.get("seed") or 0, []).append(row[METRIC])
            points[row["number"]] = row
        self.epochs = max(len(c) for of_seed in curves.values() for c in of_seed.values())
        # A run that diverged stays where it was.
        whole = {
            number: {s: np.array([*c, *[c[-1]] * (self.epochs - len(c))]) for s, c in own.items()}
            for number, own in curves.items()
        }
        self.recorded = [points[number] for number in whole]
        repeated, deviations, effects = _seeds_apart(whole)
        measured = np.array(
            [
                np.mean([curve - effects.get(s, 0.0) for s, curve in own.items()], axis=0)
                for own in whole.values()
            ]
        )
        inputs = np.array([unit_coordinates(self.space, point) for point in self.recorded])
        self._forest = ExtraTreesRegressor(
            n_estimators=100, min_samples_leaf=2, bootstrap=True, oob_score=True, random_state=seed
        ).fit(inputs, measured, sample_weight=[len(own) for own in whole.values()])
        expected = self._forest.oob_prediction_
        unexplained = measured - expected
        self.explained = float(1 - unexplained[:, -1].var() / measured[:, -1].var())
        if repeated:
            rows = [list(whole).index(number) for number in repeated]
            self._levels, self._noise = expected[rows, -1], deviations
        else:
            self._levels, self._noise = expected[:, -1], unexplained[:, None, :]
        better = self._levels >= np.quantile(self._levels, 2 / 3)
        # One spread of a single final score, in the better third of what shows it.
        self.noise = float(np.sqrt((self._noise[better][:, :, -1] ** 2).mean()))
        candidates = np.random.default_rng(seed).random((20_000, inputs.shape[1]))
        self.best = float(self._forest.predict(np.vstack([inputs, candidates]))[:, -1].max())

    def curve(self, point: Point) -> tuple[list[float], float]:
        """(noisy value after each epoch, true final value) of a configuration."""
        unit = unit_coordinates(self.space, point)
        digest = hashlib.sha256(np.round(unit, 9).tobytes()).digest()
        true = self._forest.predict([unit])[0]
        near = np.argsort(np.abs(self._levels - true[-1]))[:NEAR]
        lent = self._noise[near].reshape(-1, self.epochs)
        noise = lent[int.from_bytes(digest[:8], "little") % len(lent)]
        return (true + noise).tolist(), float(true[-1])


def unit_coordinates(space: Space, point: Point) -> list[float]:
    """Coordinates of a point in [0, 1]: numbers along their (logarithmic) range, a choice as one
    coordinate per value, parameters that the point lacks in the middle."""
    coordinates: list[float] = []
    for name, parameter in space.parameters.items():
        value = point.get(name)
        if parameter.choices is not None:
            coordinates += [float(value == choice) for choice in parameter.choices]
        else:
            coordinates.append(0.5 if value is None else _scale_to_unit(parameter, value))
    return coordinates


def _scale_to_unit(parameter: Parameter, value: float) -> float:
    low, high, number = float(parameter.low), float(parameter.high), float(value)
    if low == high:
        return 0.5
    if parameter.log:
        low, high, number = math.log(low), math.log(high), math.log(number)
    return (number - low) / (high - low)


def _seeds_apart(
    curves: Mapping[int, Mapping[int, np.ndarray]],
) -> tuple[list[int], np.ndarray, dict[int, np.ndarray]]:
    """The spread over seeds, from the configurations that were trained under all of them.

    Returns:
        Their numbers; the deviation of each run's curve from its configuration's mean and its
        seed's effect [numbers, seeds, epochs], scaled to the spread of a single run; and the
        effect of each seed on all configurations alike [epochs]. Empty without repeats.
    """
    seeds = sorted({seed for own in curves.values() for seed in own})
    repeated = [number for number, own in curves.items() if len(own) == len(seeds)]
    if len(seeds) < 2 or len(repeated) < NEAR:
        return [], np.empty(0), {}
    table = np.array([[curves[number][seed] for seed in seeds] for number in repeated])
    grand = table.mean(axis=(0, 1))
    by_seed = table.mean(axis=0) - grand
    left = table - table.mean(axis=1, keepdims=True) - by_seed
    # Both means have taken a part of the spread with them.
    freedom = (1 - 1 / len(seeds)) * (1 - 1 / len(repeated))
    return repeated, left / np.sqrt(freedom), dict(zip(seeds, by_seed, strict=True))
