"""What belongs together reaches the journal at once, and others may write in between."""

from __future__ import annotations

import os
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from ekd_ray.scale.journal import Journal, together

optuna.logging.set_verbosity(optuna.logging.ERROR)


def study_in(path: Path) -> optuna.Study:
    return optuna.create_study(storage=Journal(path), study_name="s", load_if_exists=True)


def reread(path: Path) -> optuna.Study:
    """As another program sees it."""
    return optuna.load_study(study_name="s", storage=JournalStorage(JournalFileBackend(str(path))))


def draw(study: optuna.Study) -> optuna.Trial:
    trial = study.ask()
    for name in "abc":
        trial.suggest_float(name, 0, 1)
    return trial


def test_a_trial_is_flushed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_in(tmp_path / "journal")
    flushed: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (flushed.append(file), fsync(file))[1])
    with together(study):
        trial = draw(study)
        assert study.trials[0].params == trial.params, "it is seen here before it is on the disk"
        assert not reread(tmp_path / "journal").trials
    assert len(flushed) == 1
    assert reread(tmp_path / "journal").trials[0].params == trial.params
    with together(study), together(study):
        for epoch in range(1, 10):
            trial.report(0.5, epoch)
        study.tell(trial, 0.5)
        assert len(flushed) == 1
    assert len(flushed) == 2
    (told,) = reread(tmp_path / "journal").trials
    assert told.state == TrialState.COMPLETE and len(told.intermediate_values) == 9


def test_what_was_drawn_before_an_error_is_kept(tmp_path: Path) -> None:
    study = study_in(tmp_path / "journal")

    def broken() -> None:
        with together(study):
            draw(study)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    (kept,) = reread(tmp_path / "journal").trials
    assert kept.state == TrialState.RUNNING and len(kept.params) == 3


def test_a_dashboard_may_write_in_between(tmp_path: Path) -> None:
    study = study_in(tmp_path / "journal")
    dashboard = reread(tmp_path / "journal")
    dashboard.set_user_attr("note", "before")
    with together(study):
        first = draw(study)
        dashboard.set_user_attr("note", "while")
        first.report(0.25, 1)
        study.ask()  # what would be there twice if it were read twice
    dashboard.set_user_attr("note", "after")
    second = draw(study)
    with together(study):
        study.tell(first, 0.5)
        study.tell(second, 0.75)
    draw(study)
    for seen in (study, reread(tmp_path / "journal"), study_in(tmp_path / "journal")):
        trials = seen.trials
        assert [trial.value for trial in trials] == [0.5, None, 0.75, None]
        assert trials[0].intermediate_values == {1: 0.25}
        assert [len(trial.params) for trial in trials] == [3, 0, 3, 3]


def test_other_storages_write_as_they_do() -> None:
    study = optuna.create_study()
    with together(study):
        draw(study)
    assert len(study.trials) == 1
