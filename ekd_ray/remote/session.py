"""A study at a URI, worked on here: begun, continued, read."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout

from ekd_ray.errors import UserError
from ekd_ray.files import atomic_path
from ekd_ray.remote.lease import check_free, new_lease, read_lease, take
from ekd_ray.remote.location import Location, working_copy
from ekd_ray.remote.mirror import (
    CHECKPOINT,
    RESULT,
    SECONDS,
    Mirror,
    State,
    belongs,
    changes,
    stamp,
    study_files,
)
from ekd_ray.remote.objects import (
    Entry,
    Objects,
    StorageError,
    check_reachable,
    open_objects,
    unreachable,
)

HEADERS = ("study.yaml", "config.yaml")  # of a study, of a single run
_AT_ONCE = 8


class StaleCopy(UserError):
    """The work is done, and its copy at the URI is behind."""

    exit_code = 1


@contextlib.contextmanager
def mirrored(
    location: Location | None,
    folder: Path,
    *,
    resume: bool,
    settle: Callable[[Path], list[str]] = lambda folder: [],
    objects: Objects | None = None,
    seconds: float | None = None,
) -> Iterator[None]:
    """Work in `folder` on what is at `location`, and bring there what changes.

    Without a location nothing is done. The copy at the URI is the study: what it has is fetched
    first, unless the last driver of it was the one of this very folder, whose files are then as
    new or newer.

    Args:
        resume: whether the URI must hold a study already, or must not.
        settle: called with the folder before the study goes on; it may drop what the rest does
            not know, and says which folders those were.
        objects: instead of those at the location; seconds: between two uploads.

    Raises:
        UserError: the storage cannot be reached or written, it holds a study or none, or
            another process drives it. StaleCopy: the end of the study could not be uploaded.
    """
    if location is None:
        yield
        return
    with _only_here(folder, location):
        if objects is None:
            check_reachable(location)
            objects = open_objects(location)
        try:
            mirror = _begin(objects, location, folder, resume, settle, seconds)
        except StorageError as error:
            raise unreachable(location, error) from None
        mirror.start()
        try:
            yield
        except BaseException:
            problem = mirror.close()
            if problem:
                print(f"warning: {_stale(location, folder, problem)}", file=sys.stderr)
            raise
        problem = mirror.close()
        if problem:
            raise StaleCopy(_stale(location, folder, problem))


def _stale(location: Location, folder: Path, problem: str) -> str:
    return (
        f"the copy at {location} is stale ({problem}): all is in {folder}; run the same command "
        "with --resume on this machine to bring it there."
    )


@contextlib.contextmanager
def _only_here(folder: Path, location: Location) -> Iterator[None]:
    """Hold the working copy against other processes of this machine, before anything is asked."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{folder}.lock", timeout=0):
            yield
    except Timeout:
        raise UserError(
            f"{location} is being run by another process of this machine: wait for it or end it."
        ) from None


def _begin(
    objects: Objects,
    location: Location,
    folder: Path,
    resume: bool,
    settle: Callable[[Path], list[str]],
    seconds: float | None,
) -> Mirror:
    there = _study_entries(objects)
    if resume and not any(name in there for name in HEADERS):
        raise UserError(f"{location} holds no study to resume: check --out, or drop --resume.")
    if there and not resume:
        raise UserError(f"{location} holds a study already: add --resume, or choose another --out.")
    last, own, state = read_lease(objects), new_lease(), State.read(folder)
    ours = state is not None and last is not None and last.session in state.sessions
    # This folder's lock is ours: whoever drove the study from it on this machine is gone.
    if not (ours and last and last.host == own.host):
        check_free(objects, location, last)
    if state is None or not ours or not there:
        _set_aside(folder, state)
        state = State()
    # Both, until the lease says which: a kill may come in between.
    state.sessions = [own.session, *([last.session] if last and ours else [])]
    folder.mkdir(parents=True, exist_ok=True)
    if ours:
        state.write(folder)
    take(objects, location, own)
    for name in _fetch_missing(objects, folder, there):
        state.files[name] = stamp(folder / name)
    for name in there:  # a checkpoint that is of no more use: the mirror removes it there
        if not (folder / name).exists():
            state.files.setdefault(name, (-1, -1))
    state.sessions = [own.session]
    state.write(folder)
    for dropped in settle(folder):
        for name in [name for name in there if name.startswith(f"{dropped}/")]:
            objects.delete(name)
            state.files.pop(name, None)
    state.write(folder)
    if seconds is None:
        seconds = float(os.environ.get("EKD_MIRROR_SECONDS", SECONDS))
    return Mirror(objects, location, folder, state, own, seconds=seconds)


def _study_entries(objects: Objects) -> dict[str, Entry]:
    """What is at the URI of a study's own files; whatever else is there is never fetched."""
    return {name: entry for name, entry in objects.entries().items() if belongs(name)}


def _set_aside(folder: Path, state: State | None) -> None:
    """Make room for what is at the URI; what never got there is kept under another name."""
    if not folder.exists():
        return
    if state is not None and changes(folder, state):
        aside = folder.with_name(f"{folder.name}.aside-{time.strftime('%Y%m%dT%H%M%S')}")
        folder.rename(aside)
        print(
            f"warning: what this machine had of the study and never uploaded is no part of it "
            f"any more, and is set aside in {aside}.",
            file=sys.stderr,
        )
    else:
        shutil.rmtree(folder)


def _fetch_missing(objects: Objects, folder: Path, there: Iterable[str]) -> list[str]:
    """Fetch what is not here: all of it, or what a cleaner of old files has removed."""
    fetched: list[str] = []

    def wanted(name: str) -> bool:
        path = folder / name
        # An ended trial's checkpoint was removed here, and is about to be there.
        ended = path.name == CHECKPOINT and (path.parent / RESULT).exists()
        return not (path.exists() or ended)

    # Records first, so that it is known which trials have ended.
    for of_records in (True, False):
        names = [n for n in there if (PurePosixPath(n).name == RESULT) is of_records]
        missing = [name for name in names if wanted(name)]
        _fetch(objects, folder, missing)
        fetched += missing
    return fetched


def _fetch(objects: Objects, folder: Path, names: Iterable[str]) -> None:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for done in [pool.submit(objects.download, name, folder / name) for name in names]:
            done.result()


def header_folder(location: Location, objects: Objects | None = None) -> Path:
    """A folder with the header of the study at a URI, to say what `--resume` continues.

    The working copy, if it is as new; else a folder beside it, which nothing else uses.

    Raises:
        UserError: the storage cannot be reached, or holds no study there.
    """
    if objects is None:
        check_reachable(location)
        objects = open_objects(location)
    folder = working_copy(location)
    try:
        state, last = State.read(folder), read_lease(objects)
        if state and last and last.session in state.sessions:
            return folder
        found = {name: objects.read(name) for name in HEADERS}
    except StorageError as error:
        raise unreachable(location, error) from None
    head = folder.with_name(f"{folder.name}.head")
    if not any(found.values()):
        raise UserError(f"{location} holds no study to resume: check --out, or drop --resume.")
    shutil.rmtree(head, ignore_errors=True)
    for name, content in found.items():
        if content is not None:
            with atomic_path(head / name) as temporary:
                temporary.write_bytes(content)
    return head


def holds(location: Location, name: str) -> bool:
    """Whether there is such a file at a location. Raises `UserError` if that cannot be known."""
    try:
        return open_objects(location).read(name) is not None
    except StorageError as error:
        raise unreachable(location, error) from None


def put_files(location: Location, folder: Path, names: Iterable[str]) -> None:
    """Bring single files to a location. Raises `UserError`."""
    objects = open_objects(location)
    try:
        for name in names:
            objects.upload(folder / name, name)
    except StorageError as error:
        raise unreachable(location, error) from None


def reading_copy(location: Location, objects: Objects | None = None) -> Path:
    """A folder with what is at a URI now, to read from; checkpoints are left out.

    It is not the working copy, which a driver of this machine may be changing.

    Raises:
        UserError: the storage cannot be reached.
    """
    if objects is None:
        check_reachable(location)
        objects = open_objects(location)
    folder = working_copy(location)
    folder = folder.with_name(f"{folder.name}.read")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        state = State.read(folder) or State()
        try:
            there = {
                name: (entry.size, entry.changed)
                for name, entry in _study_entries(objects).items()
                if PurePosixPath(name).name != CHECKPOINT
            }
            _fetch(objects, folder, [n for n, at in there.items() if state.files.get(n) != at])
        except StorageError as error:
            raise unreachable(location, error) from None
        for name in [name for name in study_files(folder) if name not in there]:
            (folder / name).unlink()
        folder.mkdir(exist_ok=True)
        State(files=there).write(folder)
    return folder
