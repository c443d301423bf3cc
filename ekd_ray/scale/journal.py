"""The Optuna journal of a study, mended of what a writer that was killed left in it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from ekd_ray.results.study import JOURNAL


def open_journal(path: Path) -> JournalStorage:
    """The journal in a file, created on first use.

    Only for the process that drives the study, and so is the only one to write: a lock that
    is there belongs to nobody any more.
    """
    _drop_locks(path)
    _cut_torn_line(path)
    return JournalStorage(JournalFileBackend(str(path)))


def _drop_locks(path: Path) -> None:
    """Optuna waits 30 s for a lock that was left, and for ever where the path is relative: the
    link then points nowhere, so that it has no age."""
    for lock in path.parent.glob(f"{path.name}.lock*"):
        lock.unlink()


def _cut_torn_line(path: Path) -> None:
    """Optuna leaves a last line without an end unread, but appends to it: both would be lost."""
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)


def drop_unknown(run: Path) -> list[str]:
    """Remove trials that the journal does not know; their folders' names, `trials/0007`.

    A study fetched from a URI may have some: a kill came between the upload of a trial and
    that of the journal. Their numbers will be those of other trials.
    """
    known = set()
    if (run / JOURNAL).exists():
        storage = open_journal(run / JOURNAL)
        for study in storage.get_all_studies():
            trials = storage.get_all_trials(study._study_id, deepcopy=False)
            known |= {trial.number for trial in trials if trial.state != TrialState.WAITING}
    dropped = []
    for folder in sorted((run / "trials").glob("[0-9]*")):
        if int(folder.name) not in known:
            shutil.rmtree(folder)
            dropped.append(f"trials/{folder.name}")
    return dropped
