"""Files whose last line was cut in two by a kill, and locks that nobody holds any more."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from ekd_ray.engine.history import HISTORY, read_history
from ekd_ray.engine.runlog import RunLog
from ekd_ray.scale.storage import Journal


def study_in(path: Path) -> optuna.Study:
    return optuna.create_study(storage=Journal(path), study_name="s", load_if_exists=True)


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """An ended trial and one that has begun; its last line is that one's value."""
    path = tmp_path / "optuna.journal"
    study = study_in(path)
    first = study.ask()
    first.suggest_float("lr", 0.0, 1.0)
    study.tell(first, 0.5)
    study.ask().suggest_float("lr", 0.0, 1.0)
    return path


def facts(trials: list[FrozenTrial]) -> list[tuple[TrialState, dict[str, float]]]:
    return [(trial.state, trial.params) for trial in trials]


def test_a_journal_cut_at_any_byte_of_its_last_line_goes_on(journal: Path) -> None:
    whole = journal.read_bytes()
    last = len(whole) - whole[:-1].rfind(b"\n") - 1
    (ended, begun) = facts(study_in(journal).get_trials())
    assert begun[1]
    for cut in range(1, last + 1):
        journal.write_bytes(whole[:-cut])
        study = study_in(journal)
        assert facts(study.get_trials()) == [ended, (begun[0], {})], cut
        study.tell(study.ask(), 0.25)
        trials = study_in(journal).get_trials()
        assert facts(trials) == [ended, (begun[0], {}), (TrialState.COMPLETE, {})], cut


@pytest.mark.timeout(20)
@pytest.mark.parametrize("left", ["optuna.journal.lock", "optuna.journal.lock0f3a.rename"])
def test_a_lock_that_was_left_is_not_waited_for(
    journal: Path, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a relative path Optuna would wait for ever."""
    monkeypatch.chdir(journal.parent.parent)
    path = Path(journal.parent.name) / journal.name
    path.with_name(left).symlink_to(path)
    assert study_in(path).ask().number == 2
    assert [found.name for found in journal.parent.iterdir()] == [journal.name]


def test_a_history_cut_at_any_byte_of_its_last_line_goes_on(tmp_path: Path) -> None:
    rows = [{"epoch": epoch, "val_top1": epoch / 8, "seconds": 0.1} for epoch in (1, 2, 3)]
    log = RunLog(tmp_path, hyperparameters={}, history=[])
    for row in rows[:2]:
        log.write(row)
    log.close()
    path = tmp_path / HISTORY
    whole = path.read_bytes()
    last = len(whole) - whole[:-1].rfind(b"\n") - 1
    for cut in range(1, last + 1):
        path.write_bytes(whole[:-cut])
        # All but its end: the row itself is there.
        kept = rows[: 2 if cut == 1 else 1]
        assert read_history(tmp_path) == kept, cut
        if cut % 16 == 1:  # writing the events is slow
            log = RunLog(tmp_path, hyperparameters={}, history=kept)
            log.write(rows[2])
            log.close()
            assert read_history(tmp_path) == [*kept, rows[2]]
