"""The objects of a study in storage, through pyarrow.fs, with bounded waiting."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from ekd_ray.errors import UserError, halting_error
from ekd_ray.files import MOST_TEXT, atomic_path
from ekd_ray.remote.location import Location

# One request waits so long at most, and is tried so often: a dead endpoint is known within
# half a minute, a slow one is not given up.
CONNECT_SECONDS, REQUEST_SECONDS, ATTEMPTS = 5, 10, 2
_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")


class StorageError(UserError):
    """The storage did not do what it was asked; `reason` is its own, in one line, no secret."""

    def __init__(self, location: Location, reason: str) -> None:
        super().__init__(
            f"{location} cannot be reached ({reason}): check the URI, the network, and the "
            "environment's keys, AWS_REGION and AWS_ENDPOINT_URL."
        )
        self.reason = reason


class Stamp(NamedTuple):
    """A file's or an object's size in bytes and time of its last change in ns."""

    size: int
    changed: int


class Store:
    """The objects below a location, by their names relative to it.

    Every method raises `StorageError` if the storage fails.

    Args:
        filesystem: of pyarrow, on which the location is a folder.
    """

    def __init__(self, filesystem: Any, location: Location) -> None:
        from pyarrow.fs import SubTreeFileSystem

        self._files = SubTreeFileSystem(location.root, filesystem)
        self.location = location

    def list_objects(self) -> dict[str, Stamp]:
        """All objects; raises `UserError` for a name that as a path leaves the folder."""
        from pyarrow.fs import FileSelector

        with _failures(self.location):
            found = self._files.get_file_info(
                FileSelector("", recursive=True, allow_not_found=True)
            )
        objects = {info.path: _stamp(info) for info in found if info.is_file}
        for name in objects:
            if {"", ".", ".."} & {*name.split("/")} or {"\\", "\0"} & {*name}:
                raise UserError(
                    f"{self.location} holds an object named {name!r}, which as a file would lie "
                    "outside of the study: remove it, and ask who wrote it."
                )
        return objects

    def stat(self, name: str) -> Stamp | None:
        """One object's stamp; None if there is no such object."""
        with _failures(self.location):
            info = self._files.get_file_info(name)
        return _stamp(info) if info.is_file else None

    def read(self, name: str) -> bytes | None:
        """An object's content, `MOST_TEXT` bytes at most; None if there is no such object."""
        with _failures(self.location):
            try:
                return bytes(self._files.open_input_stream(name).read(MOST_TEXT))
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """Put an object."""
        with _failures(self.location), self._files.open_output_stream(name) as stream:
            stream.write(content)

    def download(self, name: str, path: Path) -> None:
        """Write an object to a file, atomically; raises `NoSpace` if the disk is full."""
        with (
            atomic_path(path) as temporary,
            _failures(self.location),
            self._files.open_input_stream(name) as stream,
            open(temporary, "wb") as file,
        ):
            shutil.copyfileobj(stream, file, 8 * 2**20)

    def delete(self, name: str) -> None:
        """Remove an object; one that does not exist may be removed."""
        with _failures(self.location), contextlib.suppress(FileNotFoundError):
            self._files.delete_file(name)


def _stamp(info: Any) -> Stamp:
    return Stamp(info.size, info.mtime_ns or 0)


@contextlib.contextmanager
def _failures(location: Location) -> Iterator[None]:
    """Failures of the storage inside become `StorageError`."""
    try:
        yield
    except OSError as error:
        raise halting_error(error) or StorageError(location, redact(error)) from None


def redact(error: OSError) -> str:
    """The gist of a storage library's message, in one line and without secrets."""
    text = " ".join(str(error).split())
    for name in _SECRETS:
        if os.environ.get(name):
            text = text.replace(os.environ[name], f"${name}")
    for begin in ("AWS Error ", "google::cloud::"):  # what stands before repeats the path
        text = text.rpartition(begin)[2]
    for end in (" (Request ID", "; Details"):
        text = text.partition(end)[0]
    return text.rstrip(". ") or type(error).__name__


def open_store(location: Location) -> Store:
    """The objects at a location, after the storage was asked for its bucket.

    Keys, region and endpoint are those of the environment: AWS_ENDPOINT_URL (or
    AWS_ENDPOINT_URL_S3) for storage that is S3-compatible, STORAGE_EMULATOR_HOST for GCS.

    Raises:
        UserError: the storage does not answer, or has no such bucket.
    """
    from pyarrow import fs

    if location.scheme == "gs":
        seconds = CONNECT_SECONDS + REQUEST_SECONDS * ATTEMPTS
        filesystem = fs.GcsFileSystem(
            retry_time_limit=timedelta(seconds=seconds), **_endpoint("STORAGE_EMULATOR_HOST")
        )
    else:
        # Without a region pyarrow asks the instance's metadata service, for seconds where there
        # is none; S3-compatible storage takes any.
        endpoint = _endpoint("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        filesystem = fs.S3FileSystem(
            region=region or ("us-east-1" if endpoint else None),
            connect_timeout=CONNECT_SECONDS,
            request_timeout=REQUEST_SECONDS,
            retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
            # One request for a small object, instead of the three of a multipart upload.
            allow_delayed_open=True,
            **endpoint,
        )
    with _failures(location):
        found = filesystem.get_file_info(location.bucket)
    if found.type == fs.FileType.NotFound:
        raise UserError(
            f"{location} cannot be used, because there is no bucket {location.bucket}: create it, "
            "or check --out and AWS_ENDPOINT_URL."
        )
    return Store(filesystem, location)


def _endpoint(*variables: str) -> dict[str, str]:
    """pyarrow's words for the endpoint that the first of the variables names."""
    url = next((os.environ[name] for name in variables if os.environ.get(name)), None)
    if url is None:
        return {}
    split = urlsplit(url if "://" in url else f"https://{url}")
    if "@" in split.netloc:
        raise UserError(f"{variables[-1]} holds credentials, which logs would show: remove them.")
    return {"scheme": split.scheme, "endpoint_override": split.netloc}
