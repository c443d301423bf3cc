"""Counts, lists and sizes as a sentence has them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

# Not of a URL, and not of a relative path.
_FOLDERS = re.compile(r"(?<![\w./])/(?:[^\s/'\"<>]+/)+")


def several(count: float, noun: str) -> str:
    """`1 trial`, `2 trials`, `0.25 GPUs`."""
    number = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    return f"{number} {noun}" if count == 1 else f"{number} {noun}s"


def joined(parts: Sequence[str]) -> str:
    """`a, b and c`."""
    if len(parts) < 2:
        return "".join(parts)
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def hide_folders(text: str) -> str:
    """A text that others may read: of absolute paths the last part alone, `.../data`."""
    return _FOLDERS.sub(".../", text)


def size_text(size: float) -> str:
    """Bytes: `2.30 GiB`, `4.1 MiB`."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"


def command_text(*words: object) -> str:
    """A command of ekd-ray as it can be pasted into a shell."""
    return shlex.join(["ekd-ray", *map(str, words)])


def short_name(name: str) -> str:
    """A data set's name for folders and titles: of "folder:PATH" the path's last part."""
    return name.rpartition("/")[2]
