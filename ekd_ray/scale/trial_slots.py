"""How many trials run at once while nodes come and go, and what a lost process means for one."""

from __future__ import annotations

import time
from typing import Any

from ray import tune
from ray.tune.search import ConcurrencyLimiter, Searcher

from ekd_ray.config import StudyConfig
from ekd_ray.scale.cluster import count_at_once, end_without_ray, live_nodes, on_cluster
from ekd_ray.scale.ray_private import (
    LOW_ON_MEMORY,
    NODE_DIED,
    TRACEBACK,
    forgive_failure,
    last_failure,
)

REFRESH_SECONDS = 5.0  # between two looks at the nodes
NODE_LOSSES = 8  # of one trial, before it counts as what has ended its nodes
DEATH_REASON = "death_reason"  # in the result of a trial that failed: why its process died


class TrialSlots(ConcurrencyLimiter):
    """As many trials at once as there is room for, while nodes join and leave.

    Tune's own limit is the room at the start: a search that began on one node would never
    use the others. With a trial that fails goes what `deaths` knows of it.
    """

    def __init__(self, searcher: Searcher, config: StudyConfig, deaths: ProcessDeaths) -> None:
        self._config = config
        self._deaths = deaths
        self._refreshed = time.monotonic()
        super().__init__(searcher, max_concurrent_trials(config))

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        if time.monotonic() - self._refreshed > REFRESH_SECONDS:
            self.max_concurrent = max_concurrent_trials(self._config)
            self._refreshed = time.monotonic()
        return super().suggest(trial_id)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if error:
            end_without_ray()
            result = {**(result or {}), DEATH_REASON: self._deaths.reason(trial_id)}
        super().on_trial_complete(trial_id, result=result, error=error)

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the study's folder holds everything."""


def max_concurrent_trials(config: StudyConfig) -> int:
    """Trials at once: those that fit now, and where more are asked for, a few that wait.

    A cluster that can grow does so for those that wait. That they were drawn before others
    ended is the price, and so they are few. (A trial of several workers would not wait, but
    start without its workers.)
    """
    room = count_at_once(config, live_nodes().values())
    if on_cluster() and config.max_concurrent and config.workers_per_trial == 1:
        room = min(config.max_concurrent, room + max(1, room // 4))
    return room


class ProcessDeaths(tune.Callback):
    """Deaths of trials' processes: which of them count, and what is known of them.

    Tune counts the loss of a node as a failure of the trial, of which it has one to spare: but
    it says nothing of the trial, which is started again, elsewhere, whenever its node dies.
    """

    def __init__(self) -> None:
        self._losses: dict[str, int] = {}
        self._trials: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"_losses": {}, "_trials": []}  # for Tune's own snapshots

    def on_step_begin(self, iteration: int, trials: list[Any], **_: Any) -> None:
        self._trials = trials  # which hold those that never came to start, too

    def reason(self, trial_id: str) -> str | None:
        """Why a trial that failed has ended the last time, if that is known."""
        trial = next((trial for trial in self._trials if trial.trial_id == trial_id), None)
        failure = "" if trial is None else last_failure(trial)
        if LOW_ON_MEMORY in failure:
            return (
                "the trial's process was ended twice, the last time by Ray because its node ran "
                "low on memory: lower --max-concurrent, or give each trial more CPUs"
            )
        if TRACEBACK in failure:  # it did not die
            error = failure.strip().splitlines()[-1]
            return f"an error of the program or of a plugin ended it: {error[:300]}"
        return None

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        if NODE_DIED not in last_failure(trial):
            return
        losses = self._losses[trial.trial_id] = self._losses.get(trial.trial_id, 0) + 1
        if losses <= NODE_LOSSES:
            forgive_failure(trial)
