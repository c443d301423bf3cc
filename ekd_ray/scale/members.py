"""The members of a population: how they are drawn and told of, and what a trial runs."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from ray import tune

from ekd_ray.config import DistillConfig
from ekd_ray.engine.changes import continues
from ekd_ray.engine.distill import CHECKPOINT, RunResult
from ekd_ray.files import atomic_path
from ekd_ray.scale.searcher import OptunaSearcher
from ekd_ray.scale.worker import Job, Report, run_job


class Members(tune.Callback):
    """The members that a searcher has drawn, and their way back to it.

    Ray's populations refuse a search algorithm: all members are drawn ahead, and this tells the
    searcher how they end. What a member reports before it takes over is not its lineage's;
    the searcher therefore hears of the epochs at the end only.
    """

    def __init__(self, searcher: OptunaSearcher) -> None:
        self._searcher: OptunaSearcher | None = searcher
        self._keys: dict[int, str] = {}
        self.jobs: list[dict[str, Any]] = []
        for index in range(searcher.remaining):
            suggested = searcher.suggest(str(index))
            if isinstance(suggested, dict):
                self.jobs.append(suggested["job"])
                self._keys[Job.from_config(suggested).number] = str(index)

    def __getstate__(self) -> dict[str, Any]:
        return {"_searcher": None, "_keys": {}, "jobs": []}  # for Tune's own snapshots

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        job = Job.from_config(trial.config)
        if self._searcher:
            self._searcher.follow(self._keys[job.number], job.settings)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._end(trial, error=False)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._end(trial, error=True)

    def _end(self, trial: Any, *, error: bool) -> None:
        if self._searcher:
            key = self._keys[Job.from_config(trial.config).number]
            self._searcher.on_trial_complete(key, error=error)


def run_member(job: Job, report: Report, *, every: int) -> RunResult | None:
    """Run a member of a population, in a Tune trial's own process.

    It goes on from the checkpoint that Tune hands it, its own or a better member's, else from
    the one in its folder; after every `every` epochs but the last it leaves one with Tune.
    """
    config, path = DistillConfig.from_dict(job.settings), Path(job.folder) / CHECKPOINT
    given = tune.get_checkpoint()
    if given is not None:
        with given.as_directory() as folder, atomic_path(path) as temporary:
            shutil.copyfile(Path(folder) / CHECKPOINT, temporary)
    elif path.exists() and not continues(config, path):
        # It died between taking over and having the checkpoint: its lineage begins anew.
        path.unlink()

    def compared(row: dict[str, Any]) -> None:
        if row["epoch"] % every or row["epoch"] == config.epochs:
            report(row)
            return
        with tempfile.TemporaryDirectory() as folder:
            shutil.copyfile(path, Path(folder) / CHECKPOINT)
            tune.report(row, checkpoint=tune.Checkpoint.from_directory(folder))

    return run_job(job, compared, checkpoint_seconds=0.0)
