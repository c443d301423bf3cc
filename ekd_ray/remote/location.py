"""Where a study is kept when `--out` is a URI, and where this machine works on it."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ekd_ray.errors import UserError, hide_secrets
from ekd_ray.files import default_cache_dir, expand_home, file_name

OBJECT_STORES = ("s3", "gs")
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


@dataclass(frozen=True)
class Location:
    """A folder in object storage: `s3://bucket/runs/one`."""

    scheme: str
    bucket: str
    prefix: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.prefix}"

    @property
    def root(self) -> str:
        """`bucket/prefix`, as pyarrow names it."""
        return f"{self.bucket}/{self.prefix}"

    def child(self, name: str) -> Location:
        """A folder below this one."""
        return Location(self.scheme, self.bucket, f"{self.prefix}/{name}") if name else self


def is_uri(text: object) -> bool:
    """Whether it says where by a scheme, `s3://...`, rather than by a path."""
    return isinstance(text, str) and _URI.match(text) is not None


def parse_location(text: str) -> Location | Path:
    """The folder that a URI names: in object storage, or for `file://` a local one.

    Raises:
        UserError: an unknown scheme, no bucket or no folder in it, or credentials, which the
            study's files and logs would show.
    """
    try:
        split = urlsplit(text)
    except ValueError as error:
        raise UserError(
            f"{hide_secrets(text)} is no URI ({error}): give a folder, or s3://BUCKET/FOLDER."
        ) from None
    scheme = "gs" if split.scheme == "gcs" else split.scheme
    is_login = "@" in split.netloc or (":" in split.netloc and scheme in OBJECT_STORES)
    if is_login or split.query or split.fragment:
        what = "credentials" if is_login else "options after '?' or '#'"
        raise UserError(
            f"a URI of {scheme}:// may not hold {what}, which logs would show: give "
            f"{scheme}://BUCKET/FOLDER alone, and keys, region and endpoint in the environment "
            "(AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL)."
        )
    if scheme == "file" and split.netloc in ("", "localhost"):
        return Path(unquote(split.path))
    if scheme not in OBJECT_STORES:
        known = ", ".join(f"{name}://" for name in (*OBJECT_STORES, "file"))
        raise UserError(
            f"cannot keep a study at {hide_secrets(text)}: give a folder, or one of {known}."
        )
    parts = split.path.strip("/").split("/")
    if not split.netloc or any(part in ("", ".", "..") for part in parts):
        raise UserError(
            f"{text} must name a bucket and a folder in it, without '.' and '..': "
            f"{scheme}://BUCKET/FOLDER."
        )
    return Location(scheme, split.netloc, "/".join(parts))


def studies_dir() -> Path:
    """$EKD_STUDIES_DIR, else `studies` in the cache: where studies at URIs are worked on."""
    if folder := os.environ.get("EKD_STUDIES_DIR"):
        return expand_home(folder).absolute()
    return default_cache_dir().absolute() / "studies"


def working_copy(location: Location) -> Path:
    """This machine's folder for a study at a URI; the same one every time."""
    digest = hashlib.sha256(str(location).encode()).hexdigest()[:12]
    return studies_dir() / f"{file_name(location.prefix.rsplit('/', 1)[-1])}-{digest}"
