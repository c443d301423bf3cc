"""A study at a URI, worked on here: begun, continued, read."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock, Timeout

from ekd_ray.config.plugins import SOURCES, names_plugins
from ekd_ray.errors import UserError, spell_controls
from ekd_ray.files import expand_home, make_private, read_bytes
from ekd_ray.remote.lease import LEASE, Lease, take_lease
from ekd_ray.remote.location import Location, is_uri, parse_location, working_copy
from ekd_ray.remote.mirror import (
    CHECKPOINT,
    RESULT,
    Mirror,
    is_study_file,
    read_sent,
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
    first, and replaces `folder`, unless the last driver of it was the one of this very folder,
    whose files are then as new or newer. Files that never got there are not replaced.

    Args:
        resume: whether the URI must hold a study already, or must not.
        settle: called with the folder before the study goes on; what it removes is removed at
            the URI too.

    Raises:
        UserError: the storage cannot be reached or written, it holds a study or none,
            another process drives it, or `folder` has files of a driver that lost it.
            StaleCopy: the end of the study could not be uploaded.
    """
    if location is None:
        yield
        return
    make_private(folder.parent)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(FileLock(f"{folder}.lock", timeout=0))
        except Timeout:
            raise UserError(
                f"{location} is being run by another process of this machine: wait for it or end "
                "it."
            ) from None
        mirror = _begin(location, folder, resume, settle)
        mirror.thread.start()
        try:
            yield
        except BaseException:
            if stale := mirror.close():
                print(spell_controls(f"warning: {stale}"), file=sys.stderr)
            raise
        if stale := mirror.close():
            raise StaleCopy(stale)


def _begin(
    location: Location, folder: Path, resume: bool, settle: Callable[[Path], object]
) -> Mirror:
    """Take the study at a URI, and make the working copy as new as it is there, or newer."""
    store = open_store(location)
    there = {name: stamp for name, stamp in store.list_objects().items() if is_study_file(name)}
    if resume and not any(name in there for name in HEADERS):
        raise _no_study(location)
    if there and not resume:
        raise UserError(f"{location} holds a study already: add --resume, or choose another --out.")
    held, last = Lease.parse(store.read(LEASE)), read_state(folder)
    ours = bool(there and held and held.session == last.session)
    if there and not ours and not last.released and any(study_files(folder)):
        raise UserError(
            f"{folder} holds what this machine never brought to {location}, where another driver "
            "has gone on since: move that folder away, then run the same command."
        )
    lease = Lease(session=last.session) if ours else Lease()
    take_lease(store, lease, held)
    sent = read_sent(folder)
    if not ours:
        shutil.rmtree(folder, ignore_errors=True)
    write_state(folder, lease)
    missing = {n: stamp for n, stamp in there.items() if not (folder / n).exists()}
    _fetch(store, folder, missing)
    for checkpoint in folder.rglob(CHECKPOINT):  # of trials that ended as their driver was lost
        if checkpoint.with_name(RESULT).exists():
            checkpoint.unlink()
    here = {name: read_stamp(folder / name) for name in study_files(folder)}
    known = {n: s for n, s in here.items() if n in missing or (n in there and sent.get(n) == s)}
    known = dict.fromkeys(there, Stamp(-1, -1)) | known
    settle(folder)
    for name in [name for name in there if not (folder / name).exists()]:
        store.delete(name)
        del known[name]
    return Mirror(store, folder, known, lease)


def _no_study(location: Location) -> UserError:
    return UserError(f"{location} holds no study to resume: check --out, or drop --resume.")


def _fetch(store: Store, folder: Path, objects: dict[str, Stamp]) -> None:
    """Download objects; the files are as old as the objects."""
    make_private(folder)

    def download(name: str) -> None:
        store.download(name, folder / name)
        os.utime(folder / name, ns=(objects[name].changed, objects[name].changed))

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(download, objects))


def _reading_folder(location: Location) -> Path:
    """Not the working copy, which a driver of this machine may be changing."""
    folder = working_copy(location)
    return folder.with_name(f"{folder.name}.read")


def header_folder(location: Location) -> Path:
    """A folder with the header of the study at a URI, which says what `--resume` continues, and the
    sources of its plugins.

    The working copy, if it is as new as the URI; else the folder that is read from.

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
    folder = _reading_folder(location)
    _fetch(store, folder, headers)
    if any(map(names_plugins, map(folder.joinpath, headers))):
        found = store.list_objects()
        _fetch(store, folder, {n: s for n, s in found.items() if n.startswith(f"{SOURCES}/")})
    return folder


def reading_copy(location: Location) -> Path:
    """A folder with what is at a URI now, to read from; checkpoints are left out.

    Raises:
        UserError: the storage cannot be reached.
    """
    store, folder = open_store(location), _reading_folder(location)
    found = store.list_objects()
    objects = {n: found[n] for n in found if is_study_file(n) and not n.endswith(CHECKPOINT)}
    make_private(folder)
    with FileLock(f"{folder}.lock"):
        here = {name: read_stamp(folder / name) for name in study_files(folder)}
        _fetch(store, folder, {n: stamp for n, stamp in objects.items() if here.get(n) != stamp})
        for name in here.keys() - objects.keys():
            (folder / name).unlink()
    return folder


def open_folder(path: str | Path) -> Path:
    """A folder to read from: the one of this path, or a copy of what is at this URI now."""
    if isinstance(path, str) and is_uri(path):
        found = parse_location(path)
        return found if isinstance(found, Path) else reading_copy(found)
    return expand_home(path)


def holds(location: Location, name: str) -> bool:
    """Whether there is such a file at a location. Raises `UserError` if that cannot be known."""
    return open_store(location).stat(name) is not None


def put_files(location: Location, folder: Path, names: Iterable[str]) -> None:
    """Bring single files to a location. Raises `UserError`."""
    store = open_store(location)
    for name in names:
        store.write(name, read_bytes(folder / name))
