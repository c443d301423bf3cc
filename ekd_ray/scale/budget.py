"""When a search starts no further trial: epochs, hours, GPU-hours."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from ekd_ray.config import StudyConfig
from ekd_ray.errors import UserError
from ekd_ray.scale.cluster import Node, gpus_per_worker


class Budget:
    """The epochs and hours that the trials of a search have used, and their limits.

    Hours count from construction; epochs and GPU-hours are those of all trials of the study,
    also before it was interrupted.
    """

    def __init__(self, config: StudyConfig) -> None:
        self._config = config
        self._started = time.monotonic()
        self._used: dict[int, tuple[int, float]] = {}
        self._epochs, self._seconds = 0, 0.0  # of all trials

    def record(self, number: int, history: Sequence[dict[str, Any]]) -> None:
        """Take these rows for all epochs of a trial."""
        self._use(number, len(history), sum(row.get("seconds", 0.0) for row in history))

    def add(self, number: int, row: dict[str, Any]) -> None:
        """Count one more epoch of a trial."""
        epochs, seconds = self._used.get(number, (0, 0.0))
        self._use(number, epochs + 1, seconds + row.get("seconds", 0.0))

    def _use(self, number: int, epochs: int, seconds: float) -> None:
        before = self._used.get(number, (0, 0.0))
        self._used[number] = (epochs, seconds)
        self._epochs += epochs - before[0]
        self._seconds += seconds - before[1]

    def is_spent(self) -> bool:
        """Whether no further trial should start."""
        config = self._config
        gpus = config.gpus * config.workers_per_trial if config.budget_gpu_hours else 0.0
        limits = (
            (config.budget_epochs, self._epochs),
            (config.budget_hours, (time.monotonic() - self._started) / 3600),
            (config.budget_gpu_hours, self._seconds / 3600 * gpus),
        )
        return any(limit is not None and used >= limit for limit, used in limits)


def check_budget(config: StudyConfig, nodes: Iterable[Node] | None) -> None:
    """Raise `UserError` for a limit that this study cannot have on these nodes (None: unknown)."""
    if config.stop_below is not None and (config.objectives or config.constraints):
        raise UserError(
            f"stop_below is an improvement of {config.metric} alone, and this study has further "
            "objectives or constraints: drop stop_below, or these.",
            keys=("stop_below",),
        )
    if config.budget_gpu_hours is None or nodes is None:
        return
    if not gpus_per_worker(config.gpus_per_trial, nodes):
        raise UserError(
            "budget_gpu_hours needs trials with a GPU, got gpus_per_trial "
            f"{config.gpus_per_trial}{' without a GPU' if config.gpus_per_trial else ''}: give "
            "--gpus-per-trial, or --budget-hours instead."
        )
