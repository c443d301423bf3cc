"""A damaged or missing Optuna journal, made anew from what the trials have left."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState

from ekd_ray.config import StudyConfig
from ekd_ray.config.phrases import several
from ekd_ray.errors import Damaged
from ekd_ray.files import damaged_name, remove_path
from ekd_ray.results.records import (
    JOURNAL,
    RunRecord,
    read_or_put_aside,
    trial_folder,
    trial_folders,
)
from ekd_ray.scale.optuna_private import lock_files
from ekd_ray.scale.space import Space
from ekd_ray.scale.storage import (
    FULL_RUN,
    REPEATED,
    SETTINGS,
    Journal,
    begun_trials,
    has_record,
    open_study,
    write_together,
)

_REBUILT = f".{JOURNAL}.rebuilt.tmp"  # swept as temporary files are


def open_or_rebuild(run: Path, config: StudyConfig, space: Space) -> optuna.Study:
    """As `open_study`; a journal that is damaged, or lacks trials that are there, is made anew.

    Its trials have then begun and not ended: whoever settles them asks their records.
    """
    path, journal = run / JOURNAL, None
    if config.optuna_storage is None:
        try:
            if path.exists():
                journal = Journal(path)
                _check_knows_trials(journal, run)
            elif trial_folders(run):
                raise Damaged(path, "it is not there")
        except Damaged as error:
            count = _rebuild(run, config, space)
            kept = ""
            if path.exists():
                aside = damaged_name(path)
                shutil.copyfile(path, aside)
                kept = f" The old one is kept as {aside.name}."
            os.replace(run / _REBUILT, path)
            warnings.warn(
                f"{error} It is made anew from what {several(count, 'trial')} left.{kept}",
                stacklevel=2,
            )
            journal = None
    return open_study(run, config, journal=journal)


def _check_knows_trials(journal: Journal, run: Path) -> None:
    """Raise `Damaged` if a trial has a record and is not in the journal, which was cut.

    Its number would be given again, and another point would get its results.
    """
    known = begun_trials(journal)
    lost = [n for n, folder in trial_folders(run).items() if n not in known and has_record(folder)]
    if lost:
        raise Damaged(run / JOURNAL, f"it lacks trial {min(lost)}, which has a record")


def _rebuild(run: Path, config: StudyConfig, space: Space) -> int:
    """Write the journal beside its place; returns the number of trials that have left something."""
    new = run / _REBUILT
    for left in (new, *lock_files(new)):
        remove_path(left)
    study = open_study(run, config, journal=Journal(new))
    folders = trial_folders(run)
    needed = config.all_objectives
    with write_together(study):
        for number in range(max(folders, default=-1) + 1):
            folder = trial_folder(run, number)
            record = read_or_put_aside(folder, needed=needed) if number in folders else None
            params = _drawn(record, config)
            if params:
                study.enqueue_trial(params)
            trial = study.ask()
            if number not in folders:  # it repeated another one's point, or never began
                trial.set_user_attr(REPEATED, number)
                study.tell(trial, state=TrialState.FAIL)
                continue
            if params:
                space(trial)  # asks for what was enqueued
            if record and record.full_run_of is not None:
                trial.set_user_attr(FULL_RUN, record.full_run_of)
    return len(folders)


def _drawn(record: RunRecord | None, config: StudyConfig) -> dict[str, object]:
    """The searched values of a trial; only its end records them as such."""
    if record is None:
        return {}
    known = {name: record.config.get(name) for name in config.space or {}}
    return record.params or {name: value for name, value in known.items() if value is not None}


def left_in_journal(run: Path) -> tuple[dict[str, Any] | None, dict[str, dict[str, Any]]]:
    """The settings of a study as its journal has them, if it does, and the ranges of what its
    trials have drawn, as entries of a space."""
    if not (run / JOURNAL).exists():
        return None, {}
    try:
        storage = Journal(run / JOURNAL)
    except Damaged:
        return None, {}
    names = optuna.get_all_study_names(storage)
    if not names:
        return None, {}
    study = optuna.load_study(study_name=names[0], storage=storage)
    ranges = {
        name: _as_range(drawn)
        for trial in study.get_trials(deepcopy=False)
        for name, drawn in trial.distributions.items()
    }
    return study.user_attrs.get(SETTINGS), ranges


def _as_range(drawn: BaseDistribution) -> dict[str, Any]:
    if isinstance(drawn, CategoricalDistribution):
        return {"choices": [*drawn.choices]}
    assert isinstance(drawn, FloatDistribution | IntDistribution)
    known = {"low": drawn.low, "high": drawn.high, "log": drawn.log}
    is_default = drawn.step in (None, 1)
    return known if is_default else {**known, "step": drawn.step}
