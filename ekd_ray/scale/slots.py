"""Trials on a cluster whose nodes come and go: how many at once, and what a lost node means."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import ConcurrencyLimiter, Searcher

from ekd_ray.config import StudyConfig
from ekd_ray.scale.cluster import concurrency, end_without_ray, on_cluster

LOOK_SECONDS = 5.0  # between two looks at the nodes
NODE_LOSSES = 8  # of one trial, before it counts as what has ended its nodes
_NODE_DIED = "node has died"
_LOW_ON_MEMORY = "running low on memory"
DIED = "died"  # in the result of a trial that failed: what is known of its process's death


class Slots(ConcurrencyLimiter):
    """As many trials at once as there is room for, while nodes join and leave.

    Tune's own limit is the room at the start: a search that began on one node would never
    use the others. A trial that fails is told of with what `deaths` knows of it.
    """

    def __init__(self, searcher: Searcher, config: StudyConfig, deaths: Deaths) -> None:
        self._config = config
        self._deaths = deaths
        self._looked = time.monotonic()
        super().__init__(searcher, limit(config))

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self.max_concurrent = limit(self._config)
            self._looked = time.monotonic()
        return super().suggest(trial_id)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        if error:
            end_without_ray()
            result = {**(result or {}), DIED: self._deaths.reason(trial_id)}
        super().on_trial_complete(trial_id, result=result, error=error)


def wait_for_own_process(scheduler: TrialScheduler) -> None:
    """Let a trial whose process is starting have that one, and no other.

    A process that has ended its trial goes by Tune's default to the trial that waits longest,
    and the one that was being started for it is ended. Where trials are shorter than the start
    of a process, few processes then do all the work and the others never come up: 5 of 32 did
    in a search of trials of 3 s. Without a choice of the scheduler's, Tune gives the process to
    the trial that is drawn in its place. (Not for schedulers that pause trials.)
    """
    scheduler.choose_trial_to_run = _no_choice


def _no_choice(controller: Any) -> None:
    return None


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


class Deaths(tune.Callback):
    """Processes of trials that died: which deaths count, and what is known of them.

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
        """Why the process of a trial that failed has died, if that is known of its last death."""
        found = [trial for trial in self._trials if trial.trial_id == trial_id]
        path = found[0].error_file if found else None
        if path is None or _LOW_ON_MEMORY not in last_failure(Path(path)):
            return None
        return (
            "the trial's process was ended twice, the last time by Ray because its node ran low on "
            "memory: lower --max-concurrent, or give each trial more CPUs"
        )

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
