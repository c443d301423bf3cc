"""The folder of a Ray of our own: nobody else can look into it, and it goes when its study ends.

Ray writes logs, sockets and spilled objects below it, and makes its own folders open to all
(0777): they lie inside of one that is not.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from ekd_ray.errors import UserError, spell_controls

KEEP = "EKD_KEEP_RAY_LOGS"
# Short, because the path of a socket may have 107 characters (103 on macOS).
_REMOVED, _KEPT = "ekd.", "ekd+"
_OWNER = "owner"  # the file that its driver holds locked, for as long as it lives
_SOCKET = "/ekd.12345/r/session_2000-01-01_00-00-00_000000_4194304/sockets/plasma_store"
_LONGEST = (103 if sys.platform == "darwin" else 107) - len(_SOCKET)
REMOVE_SECONDS = 5.0  # for the last of Ray's processes, which still write while they end

_current: Path | None = None


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A folder for Ray (`_temp_dir`) below $RAY_TMPDIR, or the folder of temporary files.

    It is removed at the end, unless $EKD_KEEP_RAY_LOGS is set. What drivers left that were killed
    is removed first.

    Raises:
        UserError: $RAY_TMPDIR is too long, or cannot be written.
    """
    global _current
    base = _find_base()
    for left in base.glob(f"{_REMOVED}?????"):
        _remove_left(left)
    _current, lock = _make_folder(base)
    try:
        yield _current / "r"
    finally:
        discard_folder()
        os.close(lock)


def discard_folder() -> None:
    """Remove the folder of this process's Ray, which has ended; or say where its logs are."""
    global _current
    folder, _current = _current, None
    if folder is None:
        return
    if folder.name.startswith(_KEPT):
        logs = folder / "r" / "session_latest" / "logs"
        print(spell_controls(f"Ray's logs: {logs}"), file=sys.stderr)
        return
    deadline = time.monotonic() + REMOVE_SECONDS
    while folder.exists() and time.monotonic() < deadline:
        shutil.rmtree(folder, ignore_errors=True)
        if folder.exists():
            time.sleep(0.1)


def _find_base() -> Path:
    given = os.environ.get("RAY_TMPDIR")
    base = Path(given or tempfile.gettempdir()).absolute()
    if len(str(base)) > _LONGEST and not given:
        base = Path("/tmp")
    if len(os.fsencode(base)) > _LONGEST:
        raise UserError(
            f"RAY_TMPDIR must have at most {_LONGEST} characters, because Ray's sockets lie below "
            f"it, got {base}: name a shorter path."
        )
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write to RAY_TMPDIR {base} ({error.strerror}): name another folder."
        ) from None
    return base


def _make_folder(base: Path) -> tuple[Path, int]:
    """A new folder (0700) and the lock that says that its driver lives."""
    prefix = _KEPT if os.environ.get(KEEP, "") not in ("", "0") else _REMOVED
    while True:
        folder = base / f"{prefix}{secrets.token_hex(3)[:5]}"
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(
                f"cannot write to {base} ({error.strerror}): set RAY_TMPDIR to another folder."
            ) from None
        # Another start may have taken it for a left one just now.
        if (lock := _lock_owner(folder)) is not None:
            return folder, lock


def _lock_owner(folder: Path) -> int | None:
    """The lock of a folder, to be closed; None where another process holds it, or removed it."""
    try:
        lock = os.open(folder / _OWNER, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(lock).st_nlink:
            return lock
    except OSError:
        pass
    os.close(lock)
    return None


def _remove_left(folder: Path) -> None:
    """Remove a folder of ours whose driver has died."""
    try:
        owner = folder.lstat().st_uid
    except FileNotFoundError:
        return
    if folder.is_symlink() or not folder.is_dir() or owner != os.getuid():
        return
    if (lock := _lock_owner(folder)) is not None:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
