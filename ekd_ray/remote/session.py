"""A study at a URI, worked on here: begun, continued, read."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path, PurePosixPath

from filelock import FileLock, Timeout

from ekd_ray.errors import UserError
from ekd_ray.remote.lease import LEASE, Lease, take_lease
from ekd_ray.remote.location import Location, working_copy
from ekd_ray.remote.mirror import (
    CHECKPOINT,
    RESULT,
    STATE,
    Mirror,
    belongs,
    read_stamp,
    read_state,
    study_files,
    write_state,
)
from ekd_ray.remote.object_store import Stamp, Store, open_store

HEADERS = ("study.yaml", "config.yaml")  # of a study, of a single run
_THREADS = 8


class StaleCopy(UserError):
    """The work is done, and its copy at the URI is behind."""

    exit_code = 1


@contextlib.contextmanager
def mirrored(
    location: Location | None,
    folder: Path,
    *,
    resume: bool,
    settle: Callable[[Path], object] = lambda folder: None,
) -> Iterator[None]:
    """Work in `folder` on what is at `location`, and bring there what changes.

    Without a location nothing is done. The copy at the URI is the study: what it has is fetched
    first, unless the last driver of it was the one of this very folder, whose files are then as
    new or newer.

    Args:
        resume: whether the URI must hold a study already, or must not.
        settle: called with the folder before the study goes on; what it removes is removed at
            the URI too.

    Raises:
        UserError: the storage cannot be reached or written, it holds a study or none, or
            another process drives it. StaleCopy: the end of the study could not be uploaded.
    """
    if location is None:
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(FileLock(f"{folder}.lock", timeout=0))
        except Timeout:
            raise UserError(
                f"{location} is being run by another process of this machine: wait for it or end "
                "it."
            ) from None
        mirror = _begin(location, folder, resume, settle)
        mirror.start()
        try:
            yield
        except BaseException:
            if stale := mirror.close():
                print(f"warning: {stale}", file=sys.stderr)
            raise
        if stale := mirror.close():
            raise StaleCopy(stale)


def _begin(
    location: Location, folder: Path, resume: bool, settle: Callable[[Path], object]
) -> Mirror:
    """Take the study at a URI, and make the working copy as new as it is there, or newer."""
    store = open_store(location)
    there = _list_study(store)
    if resume and not any(name in there for name in HEADERS):
        raise _no_study(location)
    if there and not resume:
        raise UserError(f"{location} holds a study already: add --resume, or choose another --out.")
    held, last = Lease.parse(store.read(LEASE)), read_state(folder)
    ours = bool(there and held and held.session == last.session)
    lease = Lease(session=last.session) if ours else Lease()
    take_lease(store, lease, held)
    # When the copy was last known to be the same as the URI, in ns.
    same = read_stamp(folder / STATE).changed if last.released else 0
    if not ours:
        _make_room(folder, aside=not last.released)
    write_state(folder, lease)

    def is_needed(name: str) -> bool:
        """Whether it is no checkpoint of a trial that has ended."""
        result = PurePosixPath(name).with_name(RESULT)
        ended = str(result) in there or (folder / result).exists()
        return not (name.endswith(CHECKPOINT) and ended)

    missing = {n: s for n, s in there.items() if is_needed(n) and not (folder / n).exists()}
    _fetch(store, folder, missing)
    here = {name: read_stamp(folder / name) for name in study_files(folder)}
    known = {n: s for n, s in here.items() if n in missing or (n in there and s.changed <= same)}
    known = dict.fromkeys(there, Stamp(-1, -1)) | known
    settle(folder)
    for name in [name for name in there if not (folder / name).exists()]:
        store.delete(name)
        del known[name]
    return Mirror(store, folder, known, lease)


def _make_room(folder: Path, *, aside: bool) -> None:
    """Remove a working copy that its URI is ahead of, or set `aside` what never got there."""
    if aside and any(study_files(folder)):
        kept = folder.with_name(f"{folder.name}.aside-{datetime.now():%Y%m%dT%H%M%S.%f}")
        folder.rename(kept)
        print(
            f"warning: what this machine had of the study and never uploaded is no part of it "
            f"any more, and is set aside in {kept}.",
            file=sys.stderr,
        )
    shutil.rmtree(folder, ignore_errors=True)


def _no_study(location: Location) -> UserError:
    return UserError(f"{location} holds no study to resume: check --out, or drop --resume.")


def _list_study(store: Store) -> dict[str, Stamp]:
    """A study's own files at its URI; whatever else is there is never fetched."""
    return {name: stamp for name, stamp in store.list_objects().items() if belongs(name)}


def _fetch(store: Store, folder: Path, objects: dict[str, Stamp]) -> None:
    """Download objects; the files are as old as the objects."""

    def download(name: str) -> None:
        store.download(name, folder / name)
        os.utime(folder / name, ns=(objects[name].changed, objects[name].changed))

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(download, objects))


def header_folder(location: Location) -> Path:
    """A folder with the header of the study at a URI, to say what `--resume` continues.

    The working copy, if it is as new; else a folder beside it, which nothing else uses.

    Raises:
        UserError: the storage cannot be reached, or holds no study there.
    """
    store, folder = open_store(location), working_copy(location)
    held = Lease.parse(store.read(LEASE))
    if held and held.session == read_state(folder).session:
        return folder
    headers = {name: stamp for name in HEADERS if (stamp := store.stat(name))}
    if not headers:
        raise _no_study(location)
    return _refresh(store, folder.with_name(f"{folder.name}.head"), headers)


def reading_copy(location: Location) -> Path:
    """A folder with what is at a URI now, to read from; checkpoints are left out.

    It is not the working copy, which a driver of this machine may be changing.

    Raises:
        UserError: the storage cannot be reached.
    """
    store, folder = open_store(location), working_copy(location)
    objects = {n: s for n, s in _list_study(store).items() if not n.endswith(CHECKPOINT)}
    return _refresh(store, folder.with_name(f"{folder.name}.read"), objects)


def _refresh(store: Store, folder: Path, objects: dict[str, Stamp]) -> Path:
    """Make a folder hold the objects, and no other files of a study."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        here = {name: read_stamp(folder / name) for name in study_files(folder)}
        _fetch(store, folder, {n: stamp for n, stamp in objects.items() if here.get(n) != stamp})
        for name in here.keys() - objects.keys():
            (folder / name).unlink()
    return folder


def holds(location: Location, name: str) -> bool:
    """Whether there is such a file at a location. Raises `UserError` if that cannot be known."""
    return open_store(location).stat(name) is not None


def put_files(location: Location, folder: Path, names: Iterable[str]) -> None:
    """Bring single files to a location. Raises `UserError`."""
    store = open_store(location)
    for name in names:
        store.upload(folder / name, name)
