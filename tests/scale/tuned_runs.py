"""Searches on a real Ray with runs that a test makes up."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import ray

from ekd_ray.config import StudyConfig
from ekd_ray.engine.resolve import resolve
from ekd_ray.results.records import RunRecord
from ekd_ray.scale.cluster import connected
from ekd_ray.scale.schedulers import NoStopping
from ekd_ray.scale.search import run_tuner
from ekd_ray.scale.searcher import OptunaSearcher
from ekd_ray.scale.worker import Report
from ekd_ray.studies.pipeline import open_run


def tune_with(
    run: Path, config: StudyConfig, train: Callable[[RunRecord, Report], object]
) -> OptunaSearcher:
    """Search with `train`, a function of a test's module, in the place of training."""
    open_run(run, config, resume=False)
    searcher = OptunaSearcher(run, config, resolve(config.distill))
    module = sys.modules[train.__module__]  # which Ray's processes cannot import
    ray.cloudpickle.register_pickle_by_value(module)
    try:
        with connected():
            run_tuner(
                run, config, train, searcher=searcher, scheduler=NoStopping(), observer=Mock()
            )
    finally:
        ray.cloudpickle.unregister_pickle_by_value(module)
    return searcher
