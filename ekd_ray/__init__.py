"""ekd_ray: search the best way to distil a big image classifier into a small one.

The public names are loaded when they are first used: `import ekd_ray` needs neither torch nor Ray.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ekd_ray import losses
    from ekd_ray.config import DistillConfig, StudyConfig
    from ekd_ray.data.registry import register_dataset
    from ekd_ray.errors import UserError
    from ekd_ray.losses.methods import register_method
    from ekd_ray.models.zoo import register_model
    from ekd_ray.results.bundle import Bundle
    from ekd_ray.results.run_result import RunResult
    from ekd_ray.results.study import Study
    from ekd_ray.studies.api import (
        choice,
        distill,
        evaluate,
        integer,
        log,
        train_teacher,
        tune,
        uniform,
    )
    from ekd_ray.studies.callbacks import Callback

__version__ = "0.1.0"

# The module of each public name.
_PLACES = {
    "tune": "ekd_ray.studies.api",
    "distill": "ekd_ray.studies.api",
    "train_teacher": "ekd_ray.studies.api",
    "evaluate": "ekd_ray.studies.api",
    "log": "ekd_ray.studies.api",
    "uniform": "ekd_ray.studies.api",
    "integer": "ekd_ray.studies.api",
    "choice": "ekd_ray.studies.api",
    "Callback": "ekd_ray.studies.callbacks",
    "Study": "ekd_ray.results.study",
    "Bundle": "ekd_ray.results.bundle",
    "RunResult": "ekd_ray.results.run_result",
    "StudyConfig": "ekd_ray.config",
    "DistillConfig": "ekd_ray.config",
    "UserError": "ekd_ray.errors",
    "register_method": "ekd_ray.losses.methods",
    "register_model": "ekd_ray.models.zoo",
    "register_dataset": "ekd_ray.data.registry",
}

__all__ = [
    "Bundle",
    "Callback",
    "DistillConfig",
    "RunResult",
    "Study",
    "StudyConfig",
    "UserError",
    "choice",
    "distill",
    "evaluate",
    "integer",
    "log",
    "losses",
    "register_dataset",
    "register_method",
    "register_model",
    "train_teacher",
    "tune",
    "uniform",
]


def __getattr__(name: str) -> Any:
    if name == "losses":
        return importlib.import_module("ekd_ray.losses")
    if name not in _PLACES:
        raise AttributeError(f"module 'ekd_ray' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
