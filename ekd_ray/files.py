"""Files, written and read: a reader sees the old file or the new one, never half of one, and
what others hand over is a plain file of bounded size."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import hashlib
import io
import itertools
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ekd_ray.errors import Damaged, UserError, shorten

# Bytes of a file, at most: of one that is read as text, and of one that is mapped or hashed.
MOST_TEXT = 64 * 2**20
MOST_DATA = 64 * 2**30
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a symbolic link",
}


class Unreadable(Damaged):
    """A file that cannot be read: too large, no plain file, without permission, no UTF-8 text."""

    def __init__(self, path: str | os.PathLike[str], reason: str, cure: str = "") -> None:
        name = str(path)
        if len(name) > os.pathconf("/", "PC_PATH_MAX"):
            name = shorten(name)
        UserError.__init__(self, f"cannot read {name}: {reason}{'; ' * bool(cure)}{cure}.")


class NoSuchFile(Unreadable):
    """A file that is to be read is not there."""


def check_name(path: str | os.PathLike[str]) -> Path:
    """The path; raises `UserError` for one that no file could have, such as one too long."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        pass
    except (OSError, ValueError) as error:  # ValueError: a null character
        reason = getattr(error, "strerror", None) or str(error)
        raise Unreadable(path, reason, "give another path") from None
    return Path(path)


def check_plain(path: str | os.PathLike[str], *, most: int = MOST_DATA, cure: str = "") -> None:
    """Check a file before a library opens it by its path; links to plain files are followed.

    Args:
        most: its size in bytes, at most. cure: the end of the sentence.

    Raises:
        UserError: it cannot be read, is larger, or is a folder, FIFO, device or socket, which may
            have no end or never answer.
    """
    with open_plain(path, most=most, cure=cure):
        pass


@contextlib.contextmanager
def open_plain(
    path: str | os.PathLike[str], *, most: int = MOST_DATA, cure: str = ""
) -> Iterator[io.BufferedReader]:
    """Open a file that is read to its end, whoever wrote it. As `check_plain`."""
    try:
        # A FIFO without a writer would not return, and a device may act on being opened.
        kind = os.stat(path).st_mode
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(path, flags) if stat.S_ISREG(kind) else None
    except FileNotFoundError as error:
        raise NoSuchFile(path, str(error.strerror), cure) from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise Unreadable(path, getattr(error, "strerror", None) or str(error), cure) from None
    if descriptor is None:
        raise Unreadable(path, f"it is {_kind_of(kind)}", cure or "name a plain file")
    with open(descriptor, "rb") as file:
        size = os.fstat(descriptor).st_size
        if size > most:
            reason = f"it has {size:,} bytes, of which {most:,} may be"
            raise Unreadable(path, reason, cure)
        yield file


def read_bytes(path: str | os.PathLike[str], *, most: int = MOST_DATA, cure: str = "") -> bytes:
    """The content of a file. As `check_plain`."""
    with open_plain(path, most=most, cure=cure) as file:
        size, unknown = os.fstat(file.fileno()).st_size, min(most, MOST_TEXT)
        try:
            # What is appended meanwhile is left out. Files of /proc say that they are empty.
            content = file.read(size or unknown + 1)
        except OSError as error:
            raise Unreadable(path, str(error.strerror), cure) from None
    if not size and len(content) > unknown:
        raise Unreadable(path, f"it has more than {unknown:,} bytes", cure)
    return content


def read_text(path: str | os.PathLike[str], *, most: int = MOST_TEXT, cure: str = "") -> str:
    """The text of a UTF-8 file. As `check_plain`; `UserError` too where it is no such text."""
    try:
        # As in text mode: Windows's ends of lines become one character.
        return io.TextIOWrapper(io.BytesIO(read_bytes(path, most=most, cure=cure)), "utf-8").read()
    except UnicodeDecodeError:
        raise Unreadable(path, "not UTF-8 text", cure) from None


def read_tail(path: str | os.PathLike[str], *, most: int) -> str:
    """The last `most` bytes of a file as text, what is no UTF-8 replaced. As `check_plain`."""
    with open_plain(path) as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - most))
        return file.read(most).decode(errors="replace")


def read_json(path: str | os.PathLike[str], *, cure: str = "") -> dict[str, Any]:
    """The mapping in a JSON file; raises `Damaged` for any other content."""
    try:
        found = parse_json(read_bytes(path, most=MOST_TEXT, cure=cure))
    except ValueError:
        raise Damaged(path, "it is no JSON text of ours") from None
    if not isinstance(found, dict):
        raise Damaged(path, f"it holds a {type(found).__name__} where a mapping belongs")
    return found


def parse_json(text: str | bytes) -> Any:
    """The value of a strict JSON text, as we write it.

    Whole numbers of more than 64 bits become floats. Raises ValueError for anything that is no
    JSON: NaN, infinity, halves of signs, what is no UTF-8, and what is nested too deep.
    """
    import orjson  # `ekd-ray --help` reads none

    return orjson.loads(text)


def _kind_of(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "no plain file")


def check_own_folder(folder: Path, *, but: tuple[str, ...] = ()) -> None:
    """Check a folder that is to be written to: with a link in it one would write elsewhere.

    Args:
        but: patterns of names, directly in the folder, that are left out.

    Raises:
        UserError: something below it is neither a plain file nor a folder.
    """
    waiting = [str(folder)]
    while waiting:
        # What goes while one looks was another process's, whose lock will be met.
        with contextlib.suppress(FileNotFoundError), os.scandir(waiting.pop()) as entries:
            for entry in entries:
                if any(fnmatch.fnmatch(entry.name, pattern) for pattern in but):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                elif not entry.is_file(follow_symlinks=False):
                    found = _kind_of(entry.stat(follow_symlinks=False).st_mode)
                    raise UserError(
                        f"{entry.path} is {found} where only plain files are written: remove it, "
                        "or choose another --out."
                    )
        but = ()


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


def check_folder_place(folder: Path) -> None:
    """Make the folder if need be; raises `UserError` if nothing can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:  # no name that a link could wait at
            probe.write(b"probe")
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror}): choose another --out."
        ) from None


def check_file_place(path: Path) -> None:
    """Raise `UserError` if no file can be written at the path, whose folder is made if need be."""
    if path.is_dir():
        raise UserError(f"--out must be a file, and {path} is a folder: give another name.")
    check_folder_place(path.parent)


def temporary_folder(path: Path) -> Path:
    """Create an empty folder beside `path`, to be renamed into its place; the umask counts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path)
    temporary.mkdir()
    return temporary


def _temporary_name(path: Path) -> Path:
    # Not of `tempfile`, whose files are private (0600) whatever the umask.
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def expand_home(path: str | os.PathLike[str]) -> Path:
    """The path with `~` and `~user` expanded; as it is where there is no such user.

    As `check_name`.
    """
    # Path's own raises for an unknown user.
    return check_name(os.path.expanduser(check_name(path)))


CACHE_KINDS = ("compiled", "datasets", "given", "studies", "teachers")  # the folders of a cache


def default_cache_dir() -> Path:
    """$EKD_CACHE_DIR, else $XDG_CACHE_HOME/ekd_ray, else ~/.cache/ekd_ray; `~` is expanded.

    As `private_cache` has it.
    """
    folder = os.environ.get("EKD_CACHE_DIR")
    if not folder:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "ekd_ray")
    return private_cache(expand_home(folder))


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


def make_closed(folder: Path) -> None:
    """Make a folder that no other user can enter; one that others could enter is made anew.

    What a library writes there by the umask may be open to others, who do not get to it.

    Raises:
        OSError: it is another user's, or on a disk that cannot be written.
    """
    make_private(folder.parent)
    if not _is_closed(folder):
        remove_path(folder)
        folder.mkdir(mode=0o700, exist_ok=True)
    if not (_is_closed(folder) and os.access(folder, os.W_OK)):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def _is_closed(folder: Path) -> bool:
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return False
    is_open = status.st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not is_open


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


def damaged_name(path: Path) -> Path:
    """Where a damaged file is kept: `<name>.damaged`, or `<name>.damaged.2` beside that one."""
    names = (f"{path.name}.damaged{f'.{count}' * (count > 1)}" for count in itertools.count(1))
    return next(p for name in names if not os.path.lexists(p := path.with_name(name)))


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
        raise Damaged(file, f"its format_version is {version!r}, not a whole number from 1")
    if version > newest:
        raise UserError(
            f"{file} has format version {version}, and this ekd_ray reads up to {newest}: upgrade "
            "ekd_ray."
        )


def sha256_file(path: str | os.PathLike[str]) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_name(text: str) -> str:
    """A name that any file-system takes: `timm:pit_ti_224` becomes `timm-pit_ti_224`."""
    return re.sub(r"[^\w.+-]+", "-", text)
