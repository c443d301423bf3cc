"""Population based bandits behind Ray Tune: a population explored by a Gaussian process."""

from __future__ import annotations

import math
import warnings
from typing import Any

from ray.tune.schedulers.pb2 import PB2
from sklearn.exceptions import ConvergenceWarning

from ekd_ray.config import StudyConfig
from ekd_ray.scale.population import InStep
from ekd_ray.scale.space import Parameter, Space


class Pb2(InStep, PB2):
    """Parker-Holder et al. 2020, in Ray's form; a logarithmic range is explored by its logarithm.

    Args:
        space: ranges only (`check_population`).
    """

    def __init__(self, config: StudyConfig, space: Space) -> None:
        bounds = {
            name: [self._coordinate(entry, entry.low), self._coordinate(entry, entry.high)]
            for name, entry in space.parameters.items()
        }
        super().__init__(config, space, hyperparam_bounds=bounds)

    def _coordinate(self, parameter: Parameter, value: Any) -> Any:
        return math.log(value) if parameter.log else value

    def _value(self, parameter: Parameter, coordinate: Any) -> Any:
        return math.exp(coordinate) if parameter.log else coordinate

    def _perturb(self, controller: Any, members: list[Any]) -> None:
        with warnings.catch_warnings():
            # A model of a handful of points, which is asked for a good guess only.
            warnings.simplefilter("ignore", ConvergenceWarning)
            super()._perturb(controller, members)
