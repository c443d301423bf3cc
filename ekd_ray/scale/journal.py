"""The Optuna journal of a study: mended of what a writer that was killed left in it, and flushed
once for what belongs together."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend, JournalFileBackend
from optuna.trial import TrialState

from ekd_ray.results.records import JOURNAL


class _Backend(BaseJournalBackend):
    """A journal file, for the one process that drives the study.

    Optuna flushes every value of every trial to the disk by itself, which is most of what a
    trial costs the driver. Between `hold` and `flush` lines are kept back, and seen by
    nobody but this process.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = JournalFileBackend(str(path))
        self._held: list[dict[str, Any]] | None = None
        self._seen = 0  # of those held, by the storage
        self._strange = 0  # lines of others (a dashboard's notes) that came in between

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        if self._held is None:
            self._file.append_logs(logs)
        else:
            self._held += logs

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        if self._held is None:
            yield from self._file.read_logs(log_number_from + self._strange)
            return
        new = self._held[self._seen :]
        self._seen = len(self._held)
        yield from new

    @property
    def holding(self) -> bool:
        return self._held is not None

    def hold(self) -> None:
        self._held, self._seen = [], 0
        self._size = self._path.stat().st_size

    def flush(self) -> None:
        held, self._held = self._held, None
        if held:
            with open(self._path, "rb") as file:
                file.seek(self._size)
                self._strange += file.read().count(b"\n")
            self._file.append_logs(held)


class Journal(JournalStorage):
    """Optuna's records in a file, created on first use.

    Only for the process that drives the study, and so is the only one to write: a lock that
    is there belongs to nobody any more.
    """

    def __init__(self, path: Path) -> None:
        _drop_locks(path)
        _cut_torn_line(path)
        self._lines = _Backend(path)
        super().__init__(self._lines)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """What is written within reaches the disk at its end, at once.

        Killed before that, none of it was written; killed in between, its first lines were.
        """
        if self._lines.holding:
            yield
            return
        self._sync_with_backend()  # what others have written so far comes before it
        self._lines.hold()
        try:
            yield
        finally:
            self._lines.flush()


def together(study: optuna.Study) -> contextlib.AbstractContextManager[None]:
    """`Journal.together` of a study; nothing where its records are in a database."""
    storage = study._storage
    return storage.together() if isinstance(storage, Journal) else contextlib.nullcontext()


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
        storage = Journal(run / JOURNAL)
        for study in storage.get_all_studies():
            trials = storage.get_all_trials(study._study_id, deepcopy=False)
            known |= {trial.number for trial in trials if trial.state != TrialState.WAITING}
    dropped = []
    for folder in sorted((run / "trials").glob("[0-9]*")):
        if int(folder.name) not in known:
            shutil.rmtree(folder)
            dropped.append(f"trials/{folder.name}")
    return dropped
