"""Optuna behind Ray Tune, with the credit that multi-fidelity search needs.

Ray's own `OptunaSearch` tells Optuna that a trial stopped early is COMPLETE with its
low-epoch value. Here every epoch's value is reported, an early-stopped trial ends as
PRUNED and a failed one as FAIL. The Optuna journal and each trial's `result.json` are
the truth of a study; Tune's own snapshots are not needed to resume.
"""

from __future__ import annotations

import time
import warnings
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState
from ray.tune.search import Searcher

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.distill import forget_checkpoint
from ekd_ray.engine.plan import resolve
from ekd_ray.errors import UserError
from ekd_ray.results.study import JOURNAL, TrialRecord, trial_folder
from ekd_ray.scale.samplers import make_sampler
from ekd_ray.scale.space import Space, first_points, point_config, quiet
from ekd_ray.scale.worker import Job

STUDY_NAME = "ekd_ray"
REPEATS = 64  # points in a row that were tried before: then the space holds no new one
_EXHAUSTED = "exhausted"
_REPEATED = "repeats trial"
_STATES = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


def open_study(run: Path, config: StudyConfig) -> optuna.Study:
    """The study's Optuna journal, created on first use."""
    quiet()
    storage = JournalStorage(JournalFileBackend(str(run / JOURNAL)))
    study = optuna.create_study(
        storage=storage,
        study_name=STUDY_NAME,
        direction="maximize" if config.mode == "max" else "minimize",
        load_if_exists=True,
    )
    study.sampler = make_sampler(config, begun=len(study.get_trials(deepcopy=False)))
    return study


class OptunaSearcher(Searcher):
    """Suggests configurations, and ends each trial in Optuna and on disk.

    Args:
        run: the study's folder.
        config: the study.
        base: `config.distill` resolved, so that trials share the teacher's hash and prior.

    On construction it settles what a killed run left: a trial whose `result.json` is
    there is told to Optuna, and one that had not ended is continued under its number.
    """

    def __init__(self, run: Path, config: StudyConfig, base: DistillConfig) -> None:
        super().__init__(metric=config.metric, mode=config.mode)
        self.run = run
        self.config = config
        self.base = base
        self.space = Space(config.space)
        self.study = open_study(run, config)
        self._began = time.monotonic()
        self._running: dict[str, Trial] = {}
        self._records: dict[str, TrialRecord] = {}
        self._interrupted: deque[FrozenTrial] = deque()
        if not self.study.get_trials(deepcopy=False):
            for point in first_points(config):
                self.study.enqueue_trial(self.space.searched(point), skip_if_exists=True)
        self._settle()

    def _settle(self) -> None:
        for frozen in self.study.get_trials(deepcopy=True, states=(TrialState.RUNNING,)):
            record = TrialRecord.read(trial_folder(self.run, frozen.number))
            if record is not None:
                self._tell(frozen.number, record)
            else:
                self._interrupted.append(frozen)

    @property
    def remaining(self) -> int:
        """Trials that this run still has to start: interrupted ones and new ones."""
        known = self._own_trials()
        begun = sum(trial.state != TrialState.WAITING for trial in known)
        over = _EXHAUSTED in self.study.user_attrs or self._spent(known)
        return len(self._interrupted) + (0 if over else max(0, self.config.trials - begun))

    def _spent(self, known: list[FrozenTrial]) -> bool:
        """Whether the budget of epochs or of hours is used up."""
        epochs, hours = self.config.budget_epochs, self.config.budget_hours
        if hours is not None and time.monotonic() - self._began >= 3600 * hours:
            return True
        if epochs is None:
            return False
        return sum(max(trial.intermediate_values, default=0) for trial in known) >= epochs

    def _own_trials(self) -> list[FrozenTrial]:
        """All trials but those that repeat another one's point."""
        known = self.study.get_trials(deepcopy=False)
        return [trial for trial in known if _REPEATED not in trial.user_attrs]

    @property
    def unfinished(self) -> bool:
        """Whether a trial was begun and has not ended, or has still to begin."""
        running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return bool(running) or self.remaining > 0

    def finished(self) -> list[FrozenTrial]:
        """Ended trials that were run, for the scheduler to learn its rungs from."""
        return [trial for trial in self._own_trials() if trial.state.is_finished()]

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self._interrupted:
            # Its stored values are suggested again, whatever it had of them when it died.
            trial = Trial(self.study, self._interrupted.popleft()._trial_id)
            point = self.space(trial) | self._lineage(trial.number)
        else:
            asked = self._ask() if self.remaining else None
            if asked is None:
                return Searcher.FINISHED
            trial, point = asked
        try:
            config = resolve(point_config(self.base, point), data_root=self.config.data_root)
        except UserError as error:
            return self._refuse(trial_id, trial, str(error))
        folder = trial_folder(self.run, trial.number)
        record = TrialRecord(number=trial.number, params=trial.params, config=config.to_dict())
        record.write_config(folder)
        self._running[trial_id] = trial
        self._records[trial_id] = record
        return Job(
            name=f"trial {trial.number}",
            number=trial.number,
            folder=str(folder),
            settings=config.to_dict(),
            data_root=self.config.data_root,
            threads=self.config.cpus_per_trial,
        ).as_config()

    def _lineage(self, number: int) -> dict[str, Any]:
        """What a member of a population had come to train with; empty for other trials."""
        path = trial_folder(self.run, number) / "config.yaml"
        stored = DistillConfig.from_yaml(path) if path.exists() else self.base
        if stored.changes == self.base.changes:
            return {}
        return {name: getattr(stored, name) for name in (*self.space.parameters, "changes")}

    def follow(self, trial_id: str, settings: dict[str, Any]) -> None:
        """A member of a population trains with these settings from now on: its files, and what
        will be its record, say so."""
        trial, record = self._running[trial_id], self._records[trial_id]
        params = {name: settings[name] for name in record.params}
        if (params, settings) != (record.params, record.config):
            record = replace(record, params=params, config=settings)
            record.write_config(trial_folder(self.run, trial.number))
            trial.set_user_attr("lineage", {**params, "changes": settings["changes"]})
            self._records[trial_id] = record

    def _ask(self) -> tuple[Trial, dict[str, Any]] | None:
        """A trial at a point that no other has, None if there is none left.

        Runs are functions of their configuration: a point that comes again is ended in Optuna
        as the first one was, without being run, and counts for nothing.
        """
        for _ in range(REPEATS):
            trial = self.study.ask()
            point = self.space(trial)
            first = next(
                other
                for other in self.study.get_trials(deepcopy=False)
                if other.params == trial.params and other.state != TrialState.WAITING
            )
            if first.number == trial.number:
                return trial, point
            self._repeat(trial, first)
        self.study.set_user_attr(_EXHAUSTED, True)
        return None

    def _repeat(self, trial: Trial, first: FrozenTrial) -> None:
        trial.set_user_attr(_REPEATED, first.number)
        for epoch, reported in first.intermediate_values.items():
            trial.report(reported, epoch)
        # Of one that still runs nothing is known but what it has reported.
        state = TrialState.PRUNED if first.state == TrialState.RUNNING else first.state
        value = first.value if state == TrialState.COMPLETE else None
        self.study.tell(trial.number, value, state=state)

    def _refuse(self, trial_id: str, trial: Trial, reason: str) -> dict[str, Any] | str | None:
        """A point that is no legal configuration counts as a failed trial; ask for another."""
        record = TrialRecord(number=trial.number, params=trial.params, config={})
        ended = record.ended("failed", reason=reason, folder=trial_folder(self.run, trial.number))
        self._tell(trial.number, ended)
        return self.suggest(trial_id) if self.remaining else None

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        trial = self._running.get(trial_id)
        if trial is not None and self.metric in result:
            self._report(trial, result)

    def _report(self, trial: Trial, row: dict[str, Any]) -> None:
        with warnings.catch_warnings():
            # A continued trial repeats the epochs after its checkpoint.
            warnings.simplefilter("ignore", UserWarning)
            trial.report(row[self.metric], row["epoch"])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        trial = self._running.pop(trial_id, None)
        if trial is None:
            return
        folder = trial_folder(self.run, trial.number)
        record = self._records.pop(trial_id)
        status = record.status_of(folder, error=error, epochs=self.base.epochs)
        self._tell(trial.number, record.ended(status, folder=folder))
        forget_checkpoint(folder)

    def _tell(self, number: int, record: TrialRecord) -> None:
        state = _STATES[record.status]
        value = record.value(self.metric) if state == TrialState.COMPLETE else None
        stored = self.study.get_trials(deepcopy=False)[number]
        trial = Trial(self.study, stored._trial_id)
        for row in record.history:
            # Tune keeps the epoch at which a trial stops to itself.
            if row["epoch"] not in stored.intermediate_values and self.metric in row:
                self._report(trial, row)
        if record.reason:
            trial.set_user_attr("reason", record.reason)
        self.study.tell(number, value, state=state)

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the journal holds everything."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: the journal holds everything."""
