"""The memory of a further concurrent trial: data and teacher cache are shared pages."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from ekd_ray.config import DistillConfig

CONCURRENT = (1, 4, 16)
TEACHER, STUDENT = "resnet56", "resnet20"


def _resident() -> tuple[float, float]:
    """(RSS, PSS) of this process in MB; PSS counts a page that n processes share as 1/n."""
    figures = {}
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split()[:2]
        figures[name] = int(value) / 1000 * 1.024
    return figures["Rss:"], figures["Pss:"]


def _trial(settings: dict[str, Any], ready: Any, count: int) -> tuple[float, float]:
    """Train a little, then measure when all `count` trials have come as far."""
    import ray

    from ekd_ray.engine.distill import distill

    result = distill(DistillConfig.from_dict(settings), threads=1)
    ray.get(ready.arrived.remote())
    while ray.get(ready.count.remote()) < count:
        time.sleep(0.2)
    found = _resident()
    ray.get(ready.measured.remote())
    while ray.get(ready.done.remote()) < count:  # no one leaves before all have measured
        time.sleep(0.2)
    assert result.metrics
    return found


class _Gate:
    """Counts the trials that have trained and those that have measured."""

    def __init__(self) -> None:
        self._arrived = self._measured = 0

    def arrived(self) -> None:
        self._arrived += 1

    def count(self) -> int:
        return self._arrived

    def measured(self) -> None:
        self._measured += 1

    def done(self) -> int:
        return self._measured


def measure(folder: Path, note: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """(details, flat ratios): RSS and PSS of 1, 4 and 16 trials that run at the same time."""
    # A trial's process imports this module, and is to hold no more than in a study.
    import ray

    from benchmarks.reference import random_teacher
    from benchmarks.step import BATCH, DATASET

    weights = folder / "memory.safetensors"
    random_teacher(TEACHER, DATASET, weights)
    base = DistillConfig(
        dataset=DATASET, teacher=TEACHER, student=STUDENT, teacher_weights=str(weights),
        teacher_cache="on", method="kd", temperature=4.0, ce_weight=0.1, kd_weight=0.9,
        batch_size=BATCH, train_subset=4 * BATCH, validation_fraction=0.25, epochs=1,
    )  # fmt: skip
    details: dict[str, Any] = {}
    for count in CONCURRENT:
        ray.init(
            num_cpus=count + 1, include_dashboard=False, log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": {"PYTHONPATH": os.getcwd()}},
        )  # fmt: skip
        try:
            gate = ray.remote(num_cpus=0)(_Gate).remote()
            task = ray.remote(num_cpus=1)(_trial)
            found = ray.get([task.remote(base.to_dict(), gate, count) for _ in range(count)])
        finally:
            ray.shutdown()
        rss, pss = zip(*found, strict=True)
        details[str(count)] = {"rss_per_trial_mb": max(rss), "pss_of_all_trials_mb": sum(pss)}
        note(f"memory {count} trial(s): {details[str(count)]}")
    few, many = str(CONCURRENT[1]), str(CONCURRENT[-1])
    more = details[many]["pss_of_all_trials_mb"] - details[few]["pss_of_all_trials_mb"]
    return details, {"memory/extra_mb_per_trial": more / (CONCURRENT[-1] - CONCURRENT[1])}
