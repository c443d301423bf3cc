"""The arithmetic of a run on this machine, and the record of what it ran on."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ekd_ray.engine.gpu_share import uses_gpu

PACKAGES = (
    *("ekd_ray", "torch", "torchvision", "timm", "numpy", "scipy", "scikit-learn"),
    *("pillow", "safetensors", "pyarrow", "ray", "optuna", "cmaes"),
)


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` becomes bfloat16 where the device has it in hardware, float32 elsewhere."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    found = torch.cpu.get_capabilities()
    return "bfloat16" if found.get("amx_tile") or found.get("avx512_bf16") else "float32"


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast for `bfloat16`, nothing for `float32`."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def local_cpus() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Compute with `count` CPU threads (as many as before if None), afterwards as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def float32_head(model: nn.Module) -> None:
    """Let the last linear layer of a model compute in float32 under `autocast` too, in place.

    In bfloat16 a logit has three digits: what is near the maximum would often be equal to it.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not layers:
        return
    compute = layers[-1].forward

    def forward(inputs: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, enabled=False):
            return compute(inputs.float())

    layers[-1].forward = forward  # type: ignore[assignment, method-assign]


def pick_device() -> torch.device:
    """The current GPU if there is one and it is not hidden, else the CPU."""
    if uses_gpu():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


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
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda if cuda else None,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "driver": _driver() if cuda else None,
        **_git(),
    }


def _version(package: str) -> str | None:
    with contextlib.suppress(PackageNotFoundError):
        return version(package)
    return None


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _driver() -> str | None:
    """Version of the NVIDIA driver."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return (_output_of(query) or "").partition("\n")[0] or None


def _git() -> dict[str, Any]:
    """The revision of this library and whether its files differ from it; None outside of git."""
    room = Path(__file__).parent.parent
    git = ["git", "-C", str(room)]
    # An installed copy may lie in a repository that is not ours.
    if _output_of([*git, "ls-files", "--error-unmatch", "__init__.py"]) is None:
        return {"git_revision": None, "git_dirty": None}
    changed = _output_of([*git, "status", "--porcelain", "--", "."])
    return {
        "git_revision": _output_of([*git, "rev-parse", "HEAD"]),
        "git_dirty": None if changed is None else bool(changed),
    }


def _output_of(command: list[str]) -> str | None:
    """The output of a command; None if it fails or is not there."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    return None
