"""Atomic writing: a reader sees the old file or the new one, never half of one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ekd_ray.errors import UserError


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it into place.

    On any exception the temporary file is removed and `path` stays as it was. Who may read it is
    up to the umask.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_folder(path: Path) -> Path:
    """Create an empty folder beside `path`, to be renamed into its place; the umask counts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    temporary.mkdir()
    return temporary


def _temporary_name(path: Path) -> Path:
    # Not of `tempfile`, whose files are private (0600) whatever the umask.
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def default_cache_dir() -> Path:
    """$EKD_CACHE_DIR, else $XDG_CACHE_HOME/ekd_ray, else ~/.cache/ekd_ray; `~` is expanded."""
    folder = os.environ.get("EKD_CACHE_DIR")
    if not folder:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "ekd_ray")
    return Path(folder).expanduser()


def is_temporary(path: Path) -> bool:
    """Whether it is named as unfinished; where nobody writes, a kill has left it."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


def remove_temporaries(folder: Path) -> None:
    """Remove what writers that were killed have left below `folder`, files and folders."""
    for left in filter(is_temporary, list(folder.rglob(".*"))):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


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
