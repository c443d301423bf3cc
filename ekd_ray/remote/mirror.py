"""Bringing a working copy's changes to its URI, in an order that may be cut anywhere.

A pass looks at the study in the opposite order of how it is written, then uploads in the order
of writing: what a record points to before the record, records before the journal that says that
their trials have ended, tables after both. So what is at the URI is at any moment what a driver
that was killed could have left, but for trials that the journal there does not know yet: those
are dropped by whoever continues (`ekd_ray.scale.journal.drop_unknown`).
"""

from __future__ import annotations

import contextlib
import json
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ekd_ray.files import write_json
from ekd_ray.remote.lease import Lease, LeaseLost, renew
from ekd_ray.remote.location import Location
from ekd_ray.remote.objects import Objects, StorageError

SECONDS = 30.0  # between two passes
CHECKPOINT_SECONDS = 300.0  # between two uploads of one running trial's checkpoint
LONGEST_WAIT = 300.0  # between two tries at storage that fails
CLOSING_SECONDS = 600.0  # for what is left at the end
STATE = ".mirror.json"
# Their names in the rooms above, which this one cannot import; a test compares them.
RESULT, JOURNAL, CHECKPOINT = "result.json", "optuna.journal", "checkpoint.pt"
# Removed at the URI when the study removes them. Records and weights never are: a cleaner of
# old files in the working copy's folder must not reach further.
_PASSING = (CHECKPOINT, "failure.json")
_LATE = ("best", "report")
Stamp = tuple[int, int]  # a file's size in bytes and time of its last change in ns


@dataclass
class State:
    """What a working copy knows of its URI: which files are there, as of which local state.

    `sessions` are the driver's stay and, while that begins, the one before it: if the last
    driver of the URI is one of them, nobody else has changed it.
    """

    sessions: list[str] = field(default_factory=list)
    files: dict[str, Stamp] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> State | None:
        """The state of a working copy, None if it has none or a damaged one."""
        try:
            values = json.loads((folder / STATE).read_text(encoding="utf-8"))
            files = {name: (int(size), int(at)) for name, (size, at) in values["files"].items()}
            return cls(sessions=list(map(str, values["sessions"])), files=files)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def write(self, folder: Path) -> None:
        """Beside the study's files, never uploaded."""
        write_json(folder / STATE, {"sessions": self.sessions, "files": self.files})


def stamp(path: Path) -> Stamp:
    """Raises FileNotFoundError."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def belongs(name: str) -> bool:
    """Whether a file or folder is the study's: no scratch, lock or temporary file.

    What Ray keeps of trials of several workers lies in `trials/<number>/train`.
    """
    parts = name.split("/")
    passing = any(part.startswith(".") or part.endswith(".tmp") for part in parts)
    of_ray = parts[0] in ("trials", "confirm") and parts[2:3] == ["train"]
    return not (passing or of_ray or parts[-1].startswith(f"{JOURNAL}.lock"))


def study_files(folder: Path, *, late: bool = False) -> Iterator[str]:
    """Names of a study's files (`belongs`), relative to its folder.

    With `late` only those that are written from all the others, and the journal.
    """
    pending = [folder]
    while pending:
        try:
            inside = sorted(pending.pop().iterdir())
        except FileNotFoundError:
            continue
        for path in inside:
            name = path.relative_to(folder).as_posix()
            if not belongs(name) or path.is_symlink():
                continue
            if not path.is_dir():
                yield name
            elif not late or name in _LATE:
                pending.append(path)


def _rank(name: str) -> int:
    """In which order files are written: a file points only to those of lower rank."""
    parts = PurePosixPath(name).parts
    if name == "best/MANIFEST":
        return 5
    if parts[0] in _LATE or (len(parts) == 1 and name.endswith((".parquet", ".md"))):
        return 4
    if name == JOURNAL:
        return 3
    if parts[-1] == RESULT:
        return 2
    return 1 if len(parts) > 1 else 0  # the study's own header comes first


def changes(folder: Path, state: State) -> list[tuple[str, Stamp]]:
    """Files that are not at the URI as they are here, in the order of uploading.

    Later ranks are looked at first, so that what they point to is there when it is looked at.
    """
    seen: dict[str, Stamp] = {}

    def look(names: Iterable[str]) -> None:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                seen[name] = stamp(folder / name)

    late = [name for name in study_files(folder, late=True) if _rank(name) >= 3]
    look(sorted(late, key=_rank, reverse=True))
    if JOURNAL in seen:  # as long as it is now: later lines wait
        seen[JOURNAL] = (_whole_lines(folder / JOURNAL), seen[JOURNAL][1])
    look(name for name in list(study_files(folder)) if _rank(name) == 2)
    look(name for name in study_files(folder) if _rank(name) < 2)
    found = {name: at for name, at in seen.items() if state.files.get(name) != at}
    return sorted(found.items(), key=lambda item: (_rank(item[0]), item[0]))


def _whole_lines(path: Path) -> int:
    """Bytes of the journal up to the end of its last whole line."""
    return path.read_bytes().rfind(b"\n") + 1


class Mirror:
    """Keeps the copy at a URI near to a working copy, from a thread of its own.

    Args:
        objects: at the URI; folder: the working copy; state: what is at the URI already.
        say: told once when the storage fails, and once when it answers again.
    """

    def __init__(
        self,
        objects: Objects,
        location: Location,
        folder: Path,
        state: State,
        lease: Lease,
        *,
        say: Callable[[str], None] | None = None,
        seconds: float = SECONDS,
        checkpoint_seconds: float = CHECKPOINT_SECONDS,
    ) -> None:
        self._objects, self._location, self._folder = objects, location, folder
        self._state, self._lease = state, lease
        self._say = say or (lambda text: print(text, file=sys.stderr))
        self._seconds, self._checkpoint_seconds = seconds, checkpoint_seconds
        self._seen: dict[str, float] = {}  # when a checkpoint was first met, or uploaded
        self._failing: str | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ekd-mirror", daemon=True)
        self.lost: str | None = None  # who drives the study instead

    def start(self) -> None:
        """Begin to upload in the background."""
        self._thread.start()

    def close(self, timeout: float = CLOSING_SECONDS) -> str | None:
        """Upload what is left and release the study; why the copy is stale, None if it is not."""
        self._closing.set()
        self._thread.join(timeout)
        if self.lost:
            return f"it was taken over by {self.lost}"
        if self._thread.is_alive():
            return f"uploading took longer than {timeout:.0f} s"
        return self._failing

    def _run(self) -> None:
        wait = self._seconds
        while not self._closing.wait(wait) and not self.lost:
            self._attempt(final=False)
            wait = min(2 * wait, LONGEST_WAIT) if self._failing else self._seconds
        if not self.lost:
            self._attempt(final=True)

    def _attempt(self, *, final: bool) -> None:
        before = self._failing
        try:
            renew(self._objects, self._lease)
            self.upload(final=final)
            if final:
                renew(self._objects, self._lease, released=True)
            self._failing = None
        except LeaseLost as error:
            self.lost = str(error)
            self._say(
                f"warning: {self._location} was taken over by {error}: what happens here stays in "
                f"{self._folder}."
            )
        except StorageError as error:
            self._failing = str(error)
        except Exception as error:  # a thread that dies silently would lose all that follows
            self._failing = f"{type(error).__name__}: {error}"
        if self._failing and not before and not final:
            self._say(
                f"warning: {self._location} does not take the study's files ({self._failing}): "
                f"the study goes on in {self._folder}, and uploading is tried again."
            )
        elif before and not self._failing and not final:
            self._say(f"{self._location} takes the study's files again.")

    def upload(self, *, final: bool) -> None:
        """One pass; `final` sends the checkpoints of running trials too, due or not.

        Raises:
            StorageError: the storage failed; what was uploaded is known.
        """
        changed = False
        try:
            for name, at in changes(self._folder, self._state):
                if PurePosixPath(name).name == CHECKPOINT and not (final or self._due(name)):
                    continue
                with contextlib.suppress(FileNotFoundError):  # removed since; a record never is
                    self._state.files[name] = self._put(name, at)
                    changed = True
            for name in [name for name in self._state.files if self._is_gone(name)]:
                changed = True
                self._objects.delete(name)
                del self._state.files[name]
                self._seen.pop(name, None)
        finally:
            if changed:
                self._state.write(self._folder)

    def _put(self, name: str, at: Stamp) -> Stamp:
        """Upload one file; its state as it was uploaded. Raises FileNotFoundError."""
        path = self._folder / name
        if name == JOURNAL:
            with open(path, "rb") as file:
                self._objects.write(name, file.read(at[0]))
            return at
        state = self._objects.upload(path, name)
        return state.st_size, state.st_mtime_ns

    def _due(self, name: str) -> bool:
        now = time.monotonic()
        if now - self._seen.setdefault(name, now) < self._checkpoint_seconds:
            return False
        self._seen[name] = now
        return True

    def _is_gone(self, name: str) -> bool:
        path = PurePosixPath(name)
        passing = path.name in _PASSING or path.name.startswith("events.out.")
        return passing and not (self._folder / name).exists()
