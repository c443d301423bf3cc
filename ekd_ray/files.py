"""Atomic writing: a reader sees the old file or the new one, never half of one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ekd_ray.errors import UserError


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it into place.

    On any exception the temporary file is removed and `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


CACHE_KINDS = ("compiled", "datasets", "given", "studies", "teachers")  # the folders of a cache


def default_cache_dir() -> Path:
    """$EKD_CACHE_DIR, else $XDG_CACHE_HOME/ekd_ray, else ~/.cache/ekd_ray; `~` is expanded.

    As `private_cache` has it.
    """
    folder = os.environ.get("EKD_CACHE_DIR")
    if not folder:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "ekd_ray")
    return private_cache(Path(folder).expanduser())


def private_cache(folder: Path) -> Path:
    """The folder itself, or `u<uid>` in it where another user could write, with a warning.

    Nothing is made here: see `make_private`.

    Raises:
        UserError: another user could write that one as well.
    """
    places = (folder, *(folder / kind for kind in CACHE_KINDS))
    if not any(map(others_could_write, places)):
        return folder
    own = folder / f"u{os.geteuid()}"
    if others_could_write(own):
        raise UserError(
            f"other users can write the cache {own}, and so plant what runs would read: name a "
            "folder of your own by EKD_CACHE_DIR."
        )
    warnings.warn(
        f"other users can write the cache {folder}: going on with {own}; `chmod -R go-w` makes a "
        "cache of your own usable.",
        stacklevel=1,  # one place, so that it is said once
    )
    return own


def make_private(folder: Path) -> None:
    """Make a folder, and those above it that lack, for nobody else to write, whatever the umask."""
    for part in reversed([part for part in (folder, *folder.parents) if not part.exists()]):
        part.mkdir(mode=0o755, exist_ok=True)


def others_could_write(path: Path) -> bool:
    """Whether a user who is neither this one nor root could have written what is at `path`.

    It is theirs, or leads there by a link of theirs, or is open to them. What is not there is
    nobody's.
    """
    try:
        link, status = path.lstat(), path.stat()
    except OSError:
        return False
    known = {os.geteuid(), 0}
    is_open = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return bool(is_open) or not {link.st_uid, status.st_uid} <= known


def is_own_entry(path: Path) -> bool:
    """Whether only this user and root could have written an entry of the cache; else warns.

    Args:
        path: a file, or a folder of files.
    """
    try:
        files = [*path.iterdir()] if path.is_dir() else []
    except OSError:  # readable to others alone
        return False
    if not any(map(others_could_write, (path, *files))):
        return True
    warnings.warn(
        f"another user could have written {path}: it is not read, but made again.", stacklevel=2
    )
    return False


def close_to_others(path: Path) -> None:
    """Take the right to write a file, or a folder and what is in it, from all other users."""
    for part in (path, *path.rglob("*")):
        part.chmod(stat.S_IMODE(part.stat().st_mode) & ~(stat.S_IWGRP | stat.S_IWOTH))


def is_temporary(path: Path) -> bool:
    """Whether it is named as unfinished; where nobody writes, a kill has left it."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def remove_temporaries(folder: Path) -> None:
    """Remove what writers that were killed have left below `folder`, files and folders."""
    for left in filter(is_temporary, list(folder.rglob(".*"))):
        remove_path(left)


def remove_path(path: Path) -> None:
    """Remove a file, a link, or a folder with all that is in it, as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as strict JSON (no NaN) to `path` atomically."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def check_format(file: str | os.PathLike[str], version: object, newest: int) -> None:
    """Refuse a file of a newer ekd_ray, whose content this one would misread.

    Args:
        file: its path, or words that name it.
        version: the `format_version` that the file says; 1 where it says none, as the first did.
        newest: the format that this ekd_ray writes; it reads all before.

    Raises:
        UserError: the number is higher, or none at all.
    """
    if type(version) is not int or version < 1:
        raise UserError(
            f"{file} is damaged: its format_version is {version!r}, not a whole number from 1."
        )
    if version > newest:
        raise UserError(
            f"{file} has format version {version}, and this ekd_ray reads up to {newest}: upgrade "
            "ekd_ray."
        )


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_name(text: str) -> str:
    """A name that any file-system takes: `timm:pit_ti_224` becomes `timm-pit_ti_224`."""
    return re.sub(r"[^\w.+-]+", "-", text)
