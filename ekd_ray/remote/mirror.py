"""Bringing a working copy's changes to its URI, in an order that may be cut anywhere.

A pass looks at the study in the opposite order of how it is written, then uploads in the order
of writing: what a record points to before the record, records before the journal that says that
their trials have ended, tables after both. So what is at the URI is at any moment what a driver
that was killed could have left, but for trials that the journal there does not know yet: it is made
anew from their records when the study is continued, and a trial without one is dropped
(`ekd_ray.scale.storage.drop_unknown_trials`).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from ekd_ray.config.plugins import SOURCES
from ekd_ray.errors import UserError, name_continuation, spell_controls
from ekd_ray.files import NoSuchFile, read_bytes, read_json, write_text
from ekd_ray.remote.lease import Lease, LeaseLost, renew_lease
from ekd_ray.remote.object_store import Stamp, StorageError, Store

SECONDS = 30.0  # between two passes, unless EKD_MIRROR_SECONDS says otherwise
STATE = ".mirror.json"
# Their names in the rooms above, which this one cannot import; a test compares them.
RESULT, JOURNAL, CHECKPOINT = "result.json", "optuna.journal", "checkpoint.pt"
FAILURE, EVENTS = "failure.json", "events.out."


def is_study_file(name: str) -> bool:
    """Whether a file or folder is the study's: no scratch, lock or temporary file.

    What Ray keeps of trials of several workers lies in `trials/<number>/train`.
    """
    parts = name.split("/")
    passing = any(part.startswith(".") or part.endswith(".tmp") for part in parts)
    of_ray = parts[0] in ("trials", "confirm") and parts[2:3] == ["train"]
    return not (passing or of_ray or parts[-1].startswith(f"{JOURNAL}.lock"))


def study_files(folder: Path) -> Iterator[str]:
    """Names of a study's files, relative to its folder."""
    for path, folders, files in os.walk(folder):
        start = f"{path}/".removeprefix(f"{folder}/")
        folders[:] = [name for name in folders if is_study_file(start + name)]
        for name in files:
            if is_study_file(start + name) and not os.path.islink(f"{path}/{name}"):
                yield start + name


def read_stamp(path: Path) -> Stamp:
    """Raises FileNotFoundError."""
    found = path.stat()
    return Stamp(found.st_size, found.st_mtime_ns)


def _rank(name: str) -> int:
    """A file's place in the order of writing: it points only to files of lower ranks."""
    top, _, below = name.partition("/")
    if top == SOURCES:  # before study.yaml, in the order of names
        return 0
    if name == "best/MANIFEST":
        return 5
    if top in ("best", "report") or (not below and name.endswith((".parquet", ".md"))):
        return 4
    if name == JOURNAL:
        return 3
    if name.endswith(RESULT):
        return 2
    return 1 if below else 0


def find_changes(folder: Path, known: dict[str, Stamp]) -> list[tuple[str, Stamp]]:
    """Files whose stamps are not the known ones, in the order of uploading.

    Later ranks are looked at first, so that what they point to exists when it is looked at. The
    journal's size is that of its whole lines now: later ones wait.
    """
    seen: dict[str, Stamp] = {}
    for rank in reversed(range(6)):
        for name in study_files(folder):
            if _rank(name) == rank:
                with contextlib.suppress(FileNotFoundError):
                    seen[name] = read_stamp(folder / name)
        if rank == _rank(JOURNAL) and JOURNAL in seen:
            size = read_bytes(folder / JOURNAL).rfind(b"\n") + 1
            seen[JOURNAL] = seen[JOURNAL]._replace(size=size)
    changed = [(name, stamp) for name, stamp in seen.items() if known.get(name) != stamp]
    return sorted(changed, key=lambda item: (_rank(item[0]), item[0]))


def read_state(folder: Path) -> Lease:
    """The last lease of a working copy; a new one if there is none, or a damaged one.

    It is `released` if its driver ended with all of the copy at the URI.
    """
    path = folder / STATE
    return Lease.parse(read_bytes(path) if path.exists() else None) or Lease()


def read_sent(folder: Path) -> dict[str, Stamp]:
    """The files of a released working copy, by the stamps that they were sent with.

    No order of times says this: a clock may have been set back since.
    """
    try:
        sent = read_json(folder / STATE)["sent"]
        return {name: Stamp(*stamp) for name, stamp in sent.items()}
    except (UserError, TypeError, KeyError, AttributeError):
        return {}


def write_state(folder: Path, lease: Lease, sent: Mapping[str, Stamp] | None = None) -> None:
    """Replace the lease of a working copy; `sent` as `read_sent` gives it."""
    write_text(folder / STATE, json.dumps({**asdict(lease), "sent": sent or {}}))


class Mirror:
    """Keeps a URI near to a working copy, from a `thread` that the caller starts.

    Args:
        folder: the working copy.
        known: its files that are at the URI, by the local stamps that they were sent with.
    """

    def __init__(self, store: Store, folder: Path, known: dict[str, Stamp], lease: Lease) -> None:
        self._store, self._folder, self._known, self._lease = store, folder, known, lease
        self._failure: str | None = None  # of the last pass
        self._lost = False
        self._closing = threading.Event()
        self.thread = threading.Thread(target=self._run, name="ekd-mirror", daemon=True)

    def close(self) -> str | None:
        """Upload what is left and release the study; a sentence if the URI stays behind."""
        self._closing.set()
        self.thread.join()
        if self._failure is None:
            write_state(self._folder, replace(self._lease, released=True), self._known)
            return None
        cure = f"run {name_continuation()} on this machine to bring it there"
        if self._lost:
            cure = "move that folder away before you use --resume on this machine"
        return (
            f"the copy at {self._store.location} is stale ({self._failure}): all is in "
            f"{self._folder}; {cure}."
        )

    def _run(self) -> None:
        seconds = float(os.environ.get("EKD_MIRROR_SECONDS", SECONDS))
        while not self._lost and not self._closing.wait(seconds):
            self.attempt()
        if not self._lost:
            self.attempt(final=True)

    def attempt(self, *, final: bool = False) -> None:
        """`upload`; what fails is kept for `close`, and printed when it begins to fail."""
        before, self._failure = self._failure, None
        try:
            self.upload(final=final)
        except LeaseLost as error:
            self._lost, self._failure = True, f"it was taken over by {error}"
            text = f"was taken over by {error}: what happens here stays in {self._folder}."
            print(spell_controls(f"warning: {self._store.location} {text}"), file=sys.stderr)
        except StorageError as error:
            self._failure = error.reason
        except Exception as error:  # a thread that dies silently would lose all that follows
            self._failure = f"{type(error).__name__}: {error}"
        if self._failure and not (before or final or self._lost):
            text = (
                f"warning: {self._store.location} does not take the study's files "
                f"({self._failure}): the study goes on in {self._folder}, and uploading is tried "
                "again."
            )
            print(spell_controls(text), file=sys.stderr)

    def upload(self, *, final: bool = False) -> None:
        """Send what has changed; if `final`, release the study.

        Raises:
            LeaseLost: another driver has taken over; nothing more was sent.
            StorageError: the storage failed; what was sent is known.
        """
        renew_lease(self._store, self._lease)
        renewed = time.monotonic()
        for name, stamp in find_changes(self._folder, self._known):
            if time.monotonic() - renewed > SECONDS:  # a long pass must not look dead
                renew_lease(self._store, self._lease)
                renewed = time.monotonic()
            with contextlib.suppress(NoSuchFile):  # removed since; a record never is
                content = read_bytes(self._folder / name)
                self._store.write(name, content[: stamp.size] if name == JOURNAL else content)
                self._known[name] = stamp
        # Records and weights are never removed: a cleaner of old files that took them from the
        # working copy must not reach further.
        for name in [n for n in self._known if n.endswith((CHECKPOINT, FAILURE)) or EVENTS in n]:
            if not (self._folder / name).exists():
                self._store.delete(name)
                del self._known[name]
        if final:
            renew_lease(self._store, replace(self._lease, released=True))
