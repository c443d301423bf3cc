"""Trials on a cluster whose nodes come and go: how many at once, and what a lost node means."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search import ConcurrencyLimiter, Searcher

from ekd_ray.config import StudyConfig
from ekd_ray.scale.cluster import concurrency, on_cluster

LOOK_SECONDS = 5.0  # between two looks at the nodes
NODE_LOSSES = 8  # of one trial, before it counts as what has ended its nodes
_NODE_DIED = "node has died"


class Slots(ConcurrencyLimiter):
    """As many trials at once as there is room for, while nodes join and leave.

    Tune's own limit is the room at the start: a search that began on one node would never
    use the others.
    """

    def __init__(self, searcher: Searcher, config: StudyConfig) -> None:
        self._config = config
        self._looked = time.monotonic()
        super().__init__(searcher, limit(config))

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self.max_concurrent = limit(self._config)
            self._looked = time.monotonic()
        return super().suggest(trial_id)


def limit(config: StudyConfig) -> int:
    """Trials at once: those that fit now, and where more are asked for, a few that wait.

    A cluster that can grow does so for those that wait. That they were drawn before others
    ended is the price, and so they are few. (A trial of several workers would not wait, but
    start without its workers.)
    """
    room = concurrency(config)
    if on_cluster() and config.max_concurrent and config.workers_per_trial == 1:
        room = min(config.max_concurrent, room + max(1, room // 4))
    return max(1, room)


class LostNodes(tune.Callback):
    """A trial is started again, elsewhere, whenever its node dies: that says nothing of it.

    Tune counts the loss of a node as a failure of the trial, of which it has one to spare.
    """

    def __init__(self) -> None:
        self._losses: dict[str, int] = {}

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        path = trial.error_file
        if path is None or _NODE_DIED not in last_failure(Path(path)):
            return
        losses = self._losses[trial.trial_id] = self._losses.get(trial.trial_id, 0) + 1
        if losses <= NODE_LOSSES:
            trial.run_metadata.num_failures -= 1
            trial.run_metadata.invalidate_cache()


def last_failure(path: Path) -> str:
    """What Tune has written of a trial's latest failure; empty without one."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return text.rpartition("Failure #")[2]
