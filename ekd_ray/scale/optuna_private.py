"""Every use of what Optuna does not promise to keep, read in Optuna 5.0.0.

Each function says what it is for; `tests/scale/test_private_api.py` fails when its part of
Optuna has gone. Nothing else in the package names a private part of Optuna.
"""

from __future__ import annotations

from pathlib import Path

import optuna
from optuna.storages import BaseStorage

from ekd_ray.results.records import JOURNAL_LOCKS


def storage_of(study: optuna.Study) -> BaseStorage:
    """The storage that a study was opened with."""
    return study._storage


def reopen_trial(study: optuna.Study, number: int) -> optuna.Trial:
    """A trial that was begun and has not ended, to be continued under its number.

    What it had been suggested is suggested again.
    """
    trial_id = study._storage.get_trial_id_from_study_id_trial_number(study._study_id, number)
    return optuna.Trial(study, trial_id)


def lock_files(journal: Path) -> list[Path]:
    """Locks of a journal file, under the names that `JournalFileSymlinkLock` gives them."""
    return list(journal.parent.glob(JOURNAL_LOCKS))
