"""Runs that are known beforehand, as trials of Ray Tune: none is drawn, none is stopped."""

from __future__ import annotations

import functools
from collections import deque
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from ekd_ray.config import StudyConfig
from ekd_ray.config.phrases import command_text
from ekd_ray.engine.checkpoint import forget_checkpoint
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.engine.runlog import end_session
from ekd_ray.errors import Interrupted, UserError, name_continuation
from ekd_ray.files import write_json
from ekd_ray.results.progress import CONFIRM_STAGES
from ekd_ray.results.records import (
    FAILURE,
    RESULT,
    RunRecord,
    failure_reason,
    read_or_put_aside,
    read_record,
)
from ekd_ray.scale.one_run import note_continued
from ekd_ray.scale.schedulers import NoStopping
from ekd_ray.scale.search import run_tuner
from ekd_ray.scale.searcher import death_reason
from ekd_ray.scale.tracking import Observer
from ekd_ray.scale.worker import RUN, TrainOptions, check_halted, train_run


class RunList(Searcher):
    """Hands Tune a fixed list of runs, in order."""

    def __init__(self, runs: list[RunRecord]) -> None:
        super().__init__(metric="train_loss", mode="min")
        self._waiting = deque(runs)
        self._begun: dict[str, RunRecord] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        if not self._waiting:
            return Searcher.FINISHED
        self._begun[trial_id] = self._waiting.popleft()
        return {RUN: self._begun[trial_id].to_dict()}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Leave word of a run whose process died, retries included."""
        if error:
            folder = self._begun[trial_id].folder
            check_halted(folder)
            end_session(folder, failed=True)
            reason = death_reason(folder, result) or failure_reason(folder)
            write_json(folder / FAILURE, {"reason": reason})


def run_all(
    study: Path, config: StudyConfig, runs: list[RunRecord], observer: Observer
) -> list[RunRecord]:
    """The records of these runs, once those without one have run; equal configurations once.

    Raises:
        UserError: a run's process died twice. Interrupted: stopped by the user.
    """
    waiting: dict[Path, RunRecord] = {}
    for run in runs:
        read_or_put_aside(run.folder, run)
        if (run.folder / RESULT).exists():
            forget_checkpoint(run.folder)  # a kill may have come between the result and this
        elif run.folder not in waiting:
            (run.folder / FAILURE).unlink(missing_ok=True)
            run.write_config()
            waiting[run.folder] = run
    stage = runs[0].stage if runs else RunStage.TEACHER
    title = CONFIRM_STAGES.get(stage, str(stage))
    if waiting:
        if stage is RunStage.TEACHER:
            for run in waiting.values():
                note_continued(observer, run.name, run.folder, config.distill.epochs)
        observer.stage(title, len(waiting), config.distill.epochs)
        run_tuner(
            study,
            config,
            functools.partial(train_run, options=TrainOptions.of_study(config, study)),
            searcher=RunList(list(waiting.values())),
            scheduler=NoStopping(),
            observer=observer,
        )
    missing = [run for run in waiting.values() if not (run.folder / RESULT).exists()]
    for run in missing:
        if (run.folder / FAILURE).exists():
            name = run.folder.name
            raise UserError(
                f"{title}: {run.name} (seed {run.seed}) did not finish: "
                f"{failure_reason(run.folder).rstrip('.')}; see "
                f"{command_text('logs', study, name)}, and continue with {name_continuation()}."
            )
    if missing:
        raise Interrupted
    return [record for run in runs if (record := read_record(run.folder, run))]
