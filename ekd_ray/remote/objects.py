"""The objects of a study in storage, through pyarrow.fs, with bounded waiting.

Nothing here knows what the objects mean. Every failure of the storage is `StorageError`, whose
message shows no secret.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from ekd_ray.errors import UserError
from ekd_ray.files import atomic_path
from ekd_ray.remote.location import Location

# One request waits so long at most, and is tried so often: a dead endpoint is known within
# half a minute, a slow one is not given up.
CONNECT_SECONDS, REQUEST_SECONDS, ATTEMPTS = 5, 10, 2
_CHUNK = 8 * 2**20
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")


class StorageError(Exception):
    """The storage did not do what it was asked; the message is its reason, in one line."""


@dataclass(frozen=True)
class Entry:
    """What a listing says of an object: size in bytes, time of its last change in ns."""

    size: int
    changed: int


class Objects(Protocol):
    """The objects below a folder, by their names relative to it."""

    def entries(self) -> dict[str, Entry]:
        """All of them. Raises StorageError; UserError for a name that leaves the folder."""

    def read(self, name: str) -> bytes | None:
        """The content of a small one, None if there is none. Raises StorageError."""

    def write(self, name: str, content: bytes) -> None:
        """Put a small one, all of it or nothing. Raises StorageError."""

    def upload(self, path: Path, name: str) -> os.stat_result:
        """Put a file as it is when it is opened; its state then. Raises StorageError;
        FileNotFoundError if the file is gone."""

    def download(self, name: str, path: Path) -> None:
        """Write one to a file, atomically. Raises StorageError."""

    def delete(self, name: str) -> None:
        """Remove one; one that is not there is no error. Raises StorageError."""


class StoredObjects:
    """`Objects` below `root` (`bucket/prefix`) of a pyarrow filesystem."""

    def __init__(self, filesystem: Any, root: str) -> None:
        self._filesystem = filesystem
        self._root = root

    def entries(self) -> dict[str, Entry]:
        """See `Objects`."""
        from pyarrow.fs import FileSelector, FileType

        with _reasons():
            found = self._filesystem.get_file_info(
                FileSelector(self._root, recursive=True, allow_not_found=True)
            )
        files = (info for info in found if info.type == FileType.File)
        return {
            _inside(info.path.removeprefix(f"{self._root}/"), self._root): Entry(
                info.size, info.mtime_ns or 0
            )
            for info in files
        }

    def read(self, name: str) -> bytes | None:
        """See `Objects`."""
        with _reasons():
            try:
                with self._filesystem.open_input_stream(self._path(name)) as stream:
                    content: bytes = stream.read()
            except FileNotFoundError:
                return None
        return content

    def write(self, name: str, content: bytes) -> None:
        """See `Objects`."""
        with _reasons(), self._filesystem.open_output_stream(self._path(name)) as stream:
            stream.write(content)

    def upload(self, path: Path, name: str) -> os.stat_result:
        """See `Objects`."""
        with open(path, "rb") as file:
            state = os.fstat(file.fileno())
            # What is appended meanwhile is left for the next time.
            left = state.st_size
            with _reasons(), self._filesystem.open_output_stream(self._path(name)) as stream:
                while left > 0 and (chunk := file.read(min(_CHUNK, left))):
                    stream.write(chunk)
                    left -= len(chunk)
        return state

    def download(self, name: str, path: Path) -> None:
        """See `Objects`."""
        # Outside of `_reasons`: a local disk that is full is not the storage's failure.
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            with _reasons():
                stream = self._filesystem.open_input_stream(self._path(name))
            with stream:
                while True:
                    with _reasons():
                        chunk = stream.read(_CHUNK)
                    if not chunk:
                        break
                    file.write(chunk)

    def delete(self, name: str) -> None:
        """See `Objects`."""
        with _reasons(), contextlib.suppress(FileNotFoundError):
            self._filesystem.delete_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{_inside(name, self._root)}"


def _inside(name: str, root: str) -> str:
    """The name, if as a path it stays in the folder that it is relative to."""
    if any(part in ("", ".", "..") for part in name.split("/")) or "\\" in name or "\0" in name:
        raise UserError(
            f"{root} holds an object named {name!r}, which as a file would lie outside of the "
            "study: remove it, and ask who wrote it."
        )
    return name


@contextlib.contextmanager
def _reasons() -> Iterator[None]:
    """Failures of the storage inside become `StorageError`."""
    try:
        yield
    except OSError as error:
        raise StorageError(reason(error)) from None


def reason(error: Exception) -> str:
    """The gist of a storage library's message, in one line and without secrets."""
    text = " ".join(str(error).split())
    for name in _SECRETS:
        if os.environ.get(name):
            text = text.replace(os.environ[name], f"${name}")
    for begin in ("AWS Error ", "google::cloud::"):  # what stands before repeats the path
        text = text[text.find(begin) + len(begin) :] if begin in text else text
    for end in (" (Request ID", "; Details"):
        text = text.split(end)[0]
    return text.rstrip(". ") or type(error).__name__


def open_objects(location: Location) -> StoredObjects:
    """The objects at a location; nothing is asked of the storage that could wait long.

    Keys, region and endpoint are those of the environment: AWS_ENDPOINT_URL (or
    AWS_ENDPOINT_URL_S3) for storage that is S3-compatible, STORAGE_EMULATOR_HOST for GCS.
    """
    return StoredObjects(_filesystem(location), location.root)


def _filesystem(location: Location) -> Any:
    from pyarrow import fs

    if location.scheme == "gs":
        seconds = CONNECT_SECONDS + REQUEST_SECONDS * ATTEMPTS
        return fs.GcsFileSystem(
            retry_time_limit=timedelta(seconds=seconds),
            **_endpoint("STORAGE_EMULATOR_HOST"),
        )
    # Without a region pyarrow asks the instance's metadata service, for seconds where there is
    # none; S3-compatible storage takes any.
    endpoint = _endpoint("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    return fs.S3FileSystem(
        region=region or ("us-east-1" if endpoint else None),
        connect_timeout=CONNECT_SECONDS,
        request_timeout=REQUEST_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        # One request for a small object, instead of the three of a multipart upload.
        allow_delayed_open=True,
        **endpoint,
    )


def _endpoint(*variables: str) -> dict[str, str]:
    """pyarrow's words for the endpoint that the first of the variables names."""
    url = next((os.environ[name] for name in variables if os.environ.get(name)), None)
    if url is None:
        return {}
    split = urlsplit(url if "://" in url else f"https://{url}")
    if "@" in split.netloc:
        raise UserError(f"{variables[-1]} holds credentials, which logs would show: remove them.")
    return {"scheme": split.scheme, "endpoint_override": split.netloc}


def check_reachable(location: Location) -> None:
    """Raises `UserError` if the storage does not answer or the bucket is not there."""
    from pyarrow.fs import FileType

    try:
        with _reasons():
            found = _filesystem(location).get_file_info(location.bucket)
    except StorageError as error:
        raise unreachable(location, error) from None
    if found.type == FileType.NotFound:
        raise UserError(
            f"{location} cannot be used, for there is no bucket {location.bucket}: create it, or "
            "check --out and AWS_ENDPOINT_URL."
        )


def unreachable(location: Location, error: StorageError) -> UserError:
    """The sentence for storage that does not answer, or refuses."""
    return UserError(
        f"{location} cannot be reached ({error}): check the URI, the network, and the "
        "environment's keys, AWS_REGION and AWS_ENDPOINT_URL."
    )
