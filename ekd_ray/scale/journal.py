"""The Optuna journal of a study, mended of what a writer that was killed left in it."""

from __future__ import annotations

import os
from pathlib import Path

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend


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
