"""Looks at the node that it runs on; the standard library alone, because it is sent by value to
nodes that may lack everything else."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import platform
import shutil
import tempfile
from typing import Any

PACKAGES = ("ray", "torch", "ekd_ray", "optuna")


def look_around(folder: str | None, count_gpus: bool) -> dict[str, Any]:
    """The conditions that a study meets on this node.

    Args:
        folder: of the results; its state is `missing`, `read-only` or `fine`.
        count_gpus: ask torch, which takes seconds to load.

    Returns:
        `versions` by package (None: it is not there), `gpus` that torch sees (None: not asked),
        free and total bytes of `cache`, `temporary` and `shm`, the `folder`'s state.
    """
    versions = {name: _version(name) for name in PACKAGES}
    base = os.environ.get("EKD_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    state = None
    if folder is not None:
        state = "missing" if not os.path.isdir(folder) else "fine"
        if state == "fine" and not os.access(folder, os.W_OK | os.X_OK):
            state = "read-only"
    return {
        "versions": {"python": platform.python_version(), **versions},
        "gpus": _count_gpus() if count_gpus else None,
        "cache": _room(os.path.expanduser(base)),
        "temporary": _room(tempfile.gettempdir()),
        "shm": _room("/dev/shm") if os.path.isdir("/dev/shm") else None,
        "folder": state,
    }


def _version(package: str) -> str | None:
    try:
        if package != "ekd_ray":
            return importlib.metadata.version(package)
        # Of a job's working directory, there is no record of an installation.
        return str(importlib.import_module(package).__version__)
    except Exception:
        return None


def _count_gpus() -> int:
    try:
        return int(importlib.import_module("torch").cuda.device_count())
    except Exception:
        return 0


def _room(folder: str) -> list[int]:
    """Free and total bytes of the disk of a folder that need not be there yet."""
    while not os.path.exists(folder):
        folder = os.path.dirname(folder) or "/"
    usage = shutil.disk_usage(folder)
    return [usage.free, usage.total]


def leave_word(path: str) -> bool:
    """Write a file that other nodes look for; whether that was possible."""
    try:
        with open(path, "x") as file:
            file.write(path)
        return True
    except OSError:
        return False


def sees_word(path: str) -> bool:
    """Whether the file is there, also where a network file system has an old listing."""
    try:
        os.listdir(os.path.dirname(path))
        with open(path) as file:
            return file.read() == path
    except OSError:
        return False


def remove_word(path: str) -> None:
    """Remove the file, where it is."""
    with contextlib.suppress(OSError):
        os.unlink(path)
