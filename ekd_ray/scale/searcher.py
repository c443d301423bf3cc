"""Optuna behind Ray Tune, with the credit that multi-fidelity search needs.

Ray's own `OptunaSearch` tells Optuna that a trial stopped early is COMPLETE with its
low-epoch value. Here every epoch's value is reported, an early-stopped trial ends as
PRUNED and a failed one as FAIL. Optuna hears of a trial's epochs when it ends, from its
record: a trial that a kill interrupted may be stopped earlier than it had come before, and
what Optuna has heard it does not forget. The Optuna journal and each trial's `result.json`
are the truth of a study; Tune's own snapshots are not needed to resume.
"""

from __future__ import annotations

import json
import statistics
from collections import deque
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from optuna.trial import FrozenTrial, Trial, TrialState
from ray.tune.search import Searcher

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.checkpoint import forget_checkpoint
from ekd_ray.engine.history import read_history
from ekd_ray.engine.resolve import resolve
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.errors import UserError
from ekd_ray.results.records import (
    FAILURE,
    RunRecord,
    read_or_put_aside,
    read_whole,
    trial_folder,
    trial_name,
)
from ekd_ray.scale.budget import Budget
from ekd_ray.scale.journal_rebuild import open_or_rebuild
from ekd_ray.scale.model_sampler import SECONDS, costs_differ
from ekd_ray.scale.optuna_private import reopen_trial, stored_trial
from ekd_ray.scale.space import Space, first_points, point_config
from ekd_ray.scale.stop_rule import StopRule
from ekd_ray.scale.storage import FULL_RUN, REPEATED, write_together
from ekd_ray.scale.trial_slots import DEATH_REASON
from ekd_ray.scale.worker import RUN, check_halted

REPEATS = 64  # points in a row that were tried before: then the space holds no new one
_EXHAUSTED = "exhausted"
_STATES = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}


def death_reason(folder: Path, result: dict[str, Any] | None) -> str | None:
    """The reason of a failure that only Tune knows, unless the run has left one of its own."""
    return None if (folder / FAILURE).exists() else (result or {}).get(DEATH_REASON)


def _point_key(params: dict[str, Any]) -> str:
    """Equal for equal points; choices may be of types that no set can hold."""
    return json.dumps(params, sort_keys=True, default=str)


class OptunaSearcher(Searcher):
    """Suggests configurations, and ends each trial in Optuna and on disk.

    Args:
        run: the study's folder.
        config: the study.
        base: `config.distill` resolved, so that trials share the teacher's hash and prior.
        budget: what the study has used of its budget, where that is counted already.

    On construction it settles what a killed run left: a trial whose `result.json` is
    there is told to Optuna, and one that had not ended is continued under its number.
    """

    def __init__(
        self, run: Path, config: StudyConfig, base: DistillConfig, budget: Budget | None = None
    ) -> None:
        super().__init__(metric=config.metric, mode=config.mode)
        self.run = run
        self.config = config
        self._needed = config.all_objectives
        self.base = base
        self.space = Space(config.space)
        self.study = open_or_rebuild(run, config, self.space)
        self.budget = budget or Budget(config)
        self._running: dict[str, tuple[Trial, RunRecord]] = {}
        self._interrupted: deque[int] = deque()
        self._begun_again: set[int] = set()
        self._found: dict[int, RunRecord] = {}  # on disk at the start
        self._points: dict[str, int] = {}  # the first trial at each point
        self.stop = None if config.stop_below is None else StopRule(config, self.study)
        for point in first_points(config):  # a kill may have come after some of them
            self.study.enqueue_trial(self.space.searched_part(point), skip_if_exists=True)
        self._settle_trials()
        if self.stop:  # a kill may have come before it
            self.stop.look()
        self._begun = sum(trial.state != TrialState.WAITING for trial in self._own_trials())
        self._index_points()

    def _settle_trials(self) -> None:
        for frozen in self.study.get_trials(deepcopy=False):
            folder = trial_folder(self.run, frozen.number)
            read = read_or_put_aside if frozen.state == TrialState.RUNNING else read_whole
            record = read(folder, needed=self._needed)
            if record is not None:
                self._found[frozen.number] = record
            history = read_history(folder, self._needed) if record is None else record.history
            self.budget.record(frozen.number, history)
        for frozen in self.study.get_trials(deepcopy=True, states=(TrialState.RUNNING,)):
            record = self._found.get(frozen.number)
            if record is not None and record.status != "running":
                forget_checkpoint(record.folder)
                self._end_trial(record)
            elif self._is_own(frozen):
                self._interrupted.append(frozen.number)

    def _is_own(self, trial: FrozenTrial) -> bool:
        """Whether a trial is one of this searcher's."""
        return FULL_RUN not in trial.user_attrs

    @property
    def remaining(self) -> int:
        """Trials that this run still has to start: interrupted ones and new ones."""
        over = _EXHAUSTED in self.study.user_attrs or self.budget.is_spent()
        over = over or (self.stop is not None and self.stop.holds())
        return len(self._interrupted) + (0 if over else max(0, self.config.trials - self._begun))

    def _own_trials(self) -> list[FrozenTrial]:
        """The trials of this searcher, but those that repeat another one's point."""
        known = self.study.get_trials(deepcopy=False)
        return [t for t in known if self._is_own(t) and REPEATED not in t.user_attrs]

    @property
    def unfinished(self) -> bool:
        """Whether a trial was begun and has not ended, or has still to begin."""
        running = [trial.state == TrialState.RUNNING for trial in self._own_trials()]
        return any(running) or self.remaining > 0

    def found(self) -> list[RunRecord]:
        """All trials of the study that had begun before, until `records` has been asked."""
        return [*self._found.values()]

    def records(self) -> list[RunRecord]:
        """The trials that had begun before, ended or not, by number; can be asked for once."""
        found, self._found = self._found, {}
        own = (trial.number for trial in self._own_trials())
        return [found[number] for number in own if number in found]

    def end_stopped(self, numbers: Collection[int]) -> None:
        """End the interrupted trials that the scheduler had stopped before they were ended."""
        for number in [number for number in self._interrupted if number in numbers]:
            self._interrupted.remove(number)
            record = read_whole(trial_folder(self.run, number), needed=self._needed)
            assert record is not None
            params = stored_trial(self.study, number).params
            ended = replace(record, params=params).close("pruned")
            forget_checkpoint(ended.folder)
            self._end_trial(ended)
            self._found[number] = ended

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        with write_together(self.study):
            drawn = self._draw_point()
        if drawn is None:
            # Not over yet: one that is begun may have to begin again.
            return None if self._running else Searcher.FINISHED
        trial, point = drawn
        try:
            config = resolve(point_config(self.base, point), data_root=self.config.data_root)
        except UserError as error:
            # A point that is no legal configuration counts as a failed trial; another is drawn.
            self._end_trial(self._record(trial, {}).close("failed", reason=str(error)))
            return self.suggest(trial_id) if self.remaining else None
        record = self._record(trial, config.to_dict())
        record.write_config()
        (record.folder / FAILURE).unlink(missing_ok=True)  # of an earlier try that nobody read
        self._running[trial_id] = trial, record
        return {RUN: record.to_dict()}

    def _record(self, trial: Trial, config: dict[str, Any]) -> RunRecord:
        number, stopped = trial.number, trial.user_attrs.get(FULL_RUN)
        return RunRecord(
            folder=trial_folder(self.run, number), stage=RunStage.SEARCH,
            name=trial_name(number, stopped), number=number, full_run_of=stopped, config=config,
            params=trial.params,
        )  # fmt: skip

    def _draw_point(self) -> tuple[Trial, dict[str, Any]] | None:
        """A trial at a point that no other has, None if there is none left.

        Runs are functions of their configuration: a point that comes again is ended in Optuna
        as the first one was, without being run, and counts for nothing.
        """
        for _ in range(REPEATS):
            if not self.remaining:
                return None
            if self._interrupted:
                # Its stored values are suggested again, whatever it had of them when it died.
                trial = reopen_trial(self.study, self._interrupted.popleft())
                point = self.space(trial)
                self._index_points()
            else:
                trial = self.study.ask()
                point = self.space(trial)
                self._begun += 1
            first = self._points.setdefault(_point_key(trial.params), trial.number)
            if first == trial.number:
                return trial, point
            self._end_repetition(trial, stored_trial(self.study, first))
        self.study.set_user_attr(_EXHAUSTED, True)
        return None

    def _index_points(self) -> None:
        self._points = {}
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state != TrialState.WAITING:
                self._points.setdefault(_point_key(trial.params), trial.number)

    def _end_repetition(self, trial: Trial, first: FrozenTrial) -> None:
        trial.set_user_attr(REPEATED, first.number)
        self._begun -= 1
        self._report_epochs(trial, read_history(trial_folder(self.run, first.number)))
        for name, violation in first.constraints.items():
            trial.set_constraint(name, violation)
        # Of one that still runs nothing is known but what it has written so far.
        state = TrialState.PRUNED if first.state == TrialState.RUNNING else first.state
        values = first.values if state == TrialState.COMPLETE else None
        self.study.tell(trial.number, values, state=state)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if trial_id in self._running:
            self.budget.add(self._running[trial_id][0].number, result)

    def _report_epochs(self, trial: Trial, rows: list[dict[str, Any]]) -> None:
        if self.config.objectives:  # Optuna keeps the epochs of one objective only
            return
        known = stored_trial(self.study, trial.number).intermediate_values
        for row in rows:  # a kill may have come after some of them
            if row["epoch"] not in known and row.get(self.metric) is not None:
                trial.report(row[self.metric], row["epoch"])

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """End a trial in Optuna and on disk. Raises `Halted`: it stays begun, to be continued."""
        if trial_id not in self._running:
            return
        trial, record = self._running.pop(trial_id)
        folder, history = record.folder, read_history(record.folder)
        if error:
            check_halted(folder)
        gave_reason = (folder / FAILURE).exists()
        if error and not (history or gave_reason or trial.number in self._begun_again):
            # Tune tries a trial again whose process died at work, but not one whose process died
            # while it was handed over from another trial.
            self._begun_again.add(trial.number)
            self._interrupted.append(trial.number)
            return
        status = "failed"
        if history and not (error or gave_reason):
            status = "complete" if history[-1]["epoch"] >= self.base.epochs else "pruned"
        ended = record.close(status, reason=death_reason(folder, result))
        # Before Optuna knows: a trial that has ended there is never looked at again.
        forget_checkpoint(folder)
        self._end_trial(ended)

    def _end_trial(self, record: RunRecord) -> None:
        """End a trial in Optuna, as its record says."""
        assert record.number is not None
        self.budget.record(record.number, record.history)
        state = _STATES[record.status]
        stored = stored_trial(self.study, record.number)
        trial = reopen_trial(self.study, record.number)
        with write_together(self.study):
            self._report_epochs(trial, record.history)
            if record.reason:
                trial.set_user_attr("reason", record.reason)
            seconds = [row["seconds"] for row in record.history if row.get("seconds")]
            if seconds and costs_differ(self.config):
                # The first epoch compiles and fills caches.
                trial.set_user_attr(SECONDS, statistics.median(seconds))
            values = None
            if state == TrialState.COMPLETE:
                values = [record.last[name] for name in self.config.all_objectives]
            if state != TrialState.FAIL:
                for bound in self.config.bounds:
                    # Killed between this and the next line, it is there already.
                    if bound.text not in stored.constraints:
                        trial.set_constraint(bound.text, bound.violation(record.last))
            self.study.tell(record.number, values, state=state)
        if self.stop:
            self.stop.look()
