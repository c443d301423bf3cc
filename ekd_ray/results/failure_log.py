"""The log of a run that failed: `failure.log`, the end of what its processes wrote.

Ray's own files, in which that stood, go with Ray's folder, or with their node.
"""

from __future__ import annotations

import contextlib
import os
import re
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

from ekd_ray.errors import hide_secrets
from ekd_ray.files import read_tail, write_text

FAILURE_LOG = "failure.log"
MOST_OF_PART = 32 * 2**10  # bytes: of a process, and of what Ray says
MOST_PARTS = 9
_MOST = (MOST_OF_PART + 2**10) * MOST_PARTS
# Of bounded length, because a log may be one long word.
_URL = re.compile(r"(?<![\w.+-])[A-Za-z][\w.+-]{0,20}://[^\s'\"<>]{1,2000}")
_SECRET_NAME = re.compile(
    r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|CONNECTION_STRING|COOKIE|SIGNATURE|DATABASE"
    r"|_(PWD|PAT|AUTH|DSN)$"
)
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_SHORTEST_SECRET = 6


def hide_in_log(text: str) -> str:
    """A text of any process without passwords in URLs, and without what this process's environment
    has under names such as `AWS_SECRET_ACCESS_KEY`: `$NAME` stands there."""
    secrets = {
        value: name
        for name, value in os.environ.items()
        if len(value) >= _SHORTEST_SECRET and _SECRET_NAME.search(name.upper())
    }
    for value in sorted(secrets, key=len, reverse=True):
        text = text.replace(value, f"${secrets[value]}")
    return _URL.sub(lambda url: hide_secrets(url[0]), text)


def write_failure_log(folder: Path, parts: Iterable[tuple[str, str]]) -> None:
    """Write titles and texts; of each text the end, and no more than `MOST_PARTS` of them."""
    texts = []
    for title, text in [*parts][:MOST_PARTS]:
        kept = _COLOUR.sub("", text).strip()[-MOST_OF_PART:]
        texts.append(f"== {title}\n{kept or '(nothing)'}\n")
    write_text(folder / FAILURE_LOG, "\n".join(texts))


@contextlib.contextmanager
def error_kept(folder: Path) -> Iterator[None]:
    """Leave the traceback of an error inside as `failure.log` in a folder; no log without one."""
    try:
        yield
    except Exception:
        with contextlib.suppress(OSError):  # a full disk is said elsewhere
            text = hide_in_log(traceback.format_exc())
            write_failure_log(folder, [("the error of this process", text)])
        raise
    (folder / FAILURE_LOG).unlink(missing_ok=True)


def read_failure_log(folder: Path) -> str | None:
    """The text of `failure.log` as it may be shown; None where a folder has none."""
    path = folder / FAILURE_LOG
    return hide_in_log(read_tail(path, most=_MOST)) if path.exists() else None
