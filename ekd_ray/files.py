"""Atomic writing: a reader sees the old file or the new one, never half of one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ekd_ray.errors import Damaged, UserError


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


def parse_json(text: str) -> Any:
    """Strict JSON, as we write it; raises `ValueError` for anything else, NaN and infinity too."""
    return _STRICT_JSON.decode(text)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


_STRICT_JSON = json.JSONDecoder(parse_constant=_refuse_constant)  # built once: rows are many


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a file that `write_json` wrote; raises `Damaged` for any other content."""
    try:
        found = parse_json(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise Damaged(path, "it is no JSON text") from None
    except OSError as error:
        raise Damaged(path, f"it cannot be read ({error.strerror})") from None
    if not isinstance(found, dict):
        raise Damaged(path, f"it holds a {type(found).__name__} where a mapping belongs")
    return found


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
        raise Damaged(file, f"its format_version is {version!r}, not a whole number from 1")
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
