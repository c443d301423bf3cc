"""Trials of several workers that are stopped early, while another Ray runs on the machine."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.resolve import resolve
from ekd_ray.results import Study
from ekd_ray.scale.cluster import connected
from ekd_ray.scale.search import run_tuner
from ekd_ray.scale.searcher import OptunaSearcher
from ekd_ray.scale.worker import TrainOptions, train_run
from ekd_ray.studies.pipeline import open_run

OTHER = """
import ray, sys
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
print("ready", flush=True)
sys.stdin.read()
"""


class StopsAtOnce(FIFOScheduler):
    """A trial that reports is stopped."""

    def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
        return TrialScheduler.STOP


@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.skipif(not os.environ.get("EKD_WORKERS"), reason="minutes: make chaos")
def test_a_group_that_was_stopped_leaves_its_room_to_the_next(tmp_path: Path) -> None:
    shared = DistillConfig(
        dataset="digits", student="resnet8", method="none", epochs=200, batch_size=16,
        train_subset=120, lr=0.02,
    )  # fmt: skip
    config = StudyConfig(
        distill=shared, space={"lr": {"low": 0.01, "high": 0.1}}, trials=3, workers_per_trial=2,
        baselines=(), scheduler="none",
    )  # fmt: skip
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout and other.stdout.readline() == "ready\n"
        open_run(tmp_path / "run", config, resume=False)
        options = TrainOptions.of_study(config, tmp_path / "run")
        with connected(config):
            run_tuner(
                tmp_path / "run", config, functools.partial(train_run, options=options),
                searcher=OptunaSearcher(tmp_path / "run", config, resolve(shared)),
                scheduler=StopsAtOnce(), observer=Mock(),
            )  # fmt: skip
    finally:
        other.communicate("", timeout=60)
    records = Study.load(tmp_path / "run").records()
    assert [record.status for record in records] == ["pruned"] * 3, [r.reason for r in records]
    # Ray Train keeps records of each group, which nobody needs afterwards.
    kept = {path.name.split(".")[0] for path in (tmp_path / "run" / "trials").glob("*/*")}
    assert kept <= {"config", "history", "result", "events"}, kept
