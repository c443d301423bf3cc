"""The record of the machine and the packages that a run had, and how two of them compare."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import subprocess
import warnings
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ekd_ray.engine.determinism import FLOAT32

PACKAGES = (
    *("ekd_ray", "torch", "torchvision", "timm", "numpy", "scipy", "scikit-learn"),
    *("pillow", "safetensors", "pyarrow", "ray", "optuna", "cmaes"),
)
# How many GPUs of a kind there are changes no bit. Before `float32` was recorded, a GPU computed it
# as torch does by itself.
GPU_FACTS = ("gpus", "cuda", "cudnn", "float32")


def environment() -> dict[str, Any]:
    """Versions, processor, threads and git revision, as plain values for JSON.

    Nothing in it tells whose machine it was: no names of users or hosts, no paths, no
    environment variables.
    """
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "driver": _driver() if cuda else None,
        "float32": FLOAT32,
        **_git(),
    }


def hardware(found: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an `environment` that decides a run's bits, for `warn_of_change`."""
    names = ("processor", "gpus", "cuda", "cudnn")
    return {"torch": found["packages"]["torch"], **{name: found[name] for name in names}}


def warn_of_change(folder: Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Warn that what began in a folder goes on under other conditions, by name: they may decide
    its bits."""
    changed = [
        f"{name} {here[name]} instead of {there[name]}"
        for name in here.keys() & there.keys()
        if there[name] != here[name]
    ]
    if changed:
        warnings.warn(
            f"{folder} goes on with {', '.join(sorted(changed))}: what is trained from here on "
            "need not have the bits that it would have had.",
            stacklevel=2,
        )


def deciding_versions() -> dict[str, dict[str, str | None]]:
    """The part of an `environment` that a record has whose run was not finished."""
    return {"packages": {name: _version(name) for name in ("ekd_ray", "torch", "ray", "optuna")}}


@functools.cache
def _version(package: str) -> str | None:
    with contextlib.suppress(PackageNotFoundError):
        return version(package)
    return None


def processor_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    """Version of the NVIDIA driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return (output_of(query) or "").partition("\n")[0] or None


def _git() -> dict[str, Any]:
    """The revision of this library and whether its files differ from it; None outside of git."""
    room = Path(__file__).parent.parent
    git = ["git", "-C", str(room)]
    # An installed copy may lie in a repository that is not ours.
    if output_of([*git, "ls-files", "--error-unmatch", "__init__.py"]) is None:
        return {"git_revision": None, "git_dirty": None}
    changed = output_of([*git, "status", "--porcelain", "--", "."])
    return {
        "git_revision": output_of([*git, "rev-parse", "HEAD"]),
        "git_dirty": None if changed is None else bool(changed),
    }


def output_of(command: list[str]) -> str | None:
    """The output of a command; None if it fails or is not there."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    return None


def same_arithmetic(there: dict[str, Any], here: dict[str, Any]) -> bool:
    """Whether two environments round alike: processor, GPUs and torch are the same."""
    old, new = (compared(found) for found in (there, here))
    return all(old[name] == new[name] for name in ("processor", "torch", *GPU_FACTS))


def compared(environment: dict[str, Any]) -> dict[str, Any]:
    """An environment with its packages beside the rest, and each kind of GPU once."""
    found = {**dict.fromkeys(("processor", "torch", *GPU_FACTS)), **environment}
    found |= found.get("packages", {})
    found["gpus"] = sorted({*(found["gpus"] or ())})
    if not found["gpus"]:
        found["float32"] = None
    return found
