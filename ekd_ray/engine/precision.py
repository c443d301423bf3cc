"""The arithmetic of a run on this machine."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ekd_ray.config.settings import MOST_THREADS
from ekd_ray.engine.control_groups import cpu_quota
from ekd_ray.engine.environment import output_of, processor_name
from ekd_ray.engine.gpu_share import uses_gpu
from ekd_ray.errors import UserError, shorten

# CUDA's compute capabilities from which on a precision is computed in hardware, at a multiple of
# float32's speed: tensor cores came with 7.0 (V100, T4), their bfloat16 with 8.0 (A100).
CAPABILITIES = {"float16": (7, 0), "bfloat16": (8, 0)}
# What a CPU must have one of for bfloat16.
CPU_FEATURES = ("amx_tile", "avx512_bf16")


def resolve_precision(precision: str, device: torch.device) -> str:
    """`auto` becomes what the device computes fast in hardware.

    On a GPU that is bfloat16, else float16, else float32; on a CPU bfloat16, else float32.
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16"
        found = torch.cuda.get_device_capability(device)
        return "float16" if found >= CAPABILITIES["float16"] else "float32"
    return "bfloat16" if _cpu_has_bfloat16() else "float32"


def _cpu_has_bfloat16() -> bool:
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in CPU_FEATURES)


def planned_precision(precision: str, *, on_gpu: bool) -> str | None:
    """As `resolve_precision` for this machine, without starting CUDA on it.

    None where its GPUs do not say what they are, or differ.
    """
    if precision != "auto" or not on_gpu:
        return resolve_precision(precision, torch.device("cpu"))
    names = ("bfloat16", "float16")
    found = {
        next((name for name in names if capability >= CAPABILITIES[name]), "float32")
        for capability, _ in _gpus()
    }
    return found.pop() if len(found) == 1 else None


def describe_slowness(precision: str, *, on_gpu: bool) -> str | None:
    """Why this machine trains slowly in a precision, in words; None if it does not."""
    if precision not in CAPABILITIES:
        return None
    if not on_gpu and precision == "float16":
        # Measured with avx512_fp16 and amx_tile: tens of times more slowly than in float32.
        return "torch trains very slowly in it on CPUs"
    if on_gpu:
        slow = [name for capability, name in _gpus() if capability < CAPABILITIES[precision]]
    else:
        slow = [] if _cpu_has_bfloat16() else [processor_name()]
    return f"{slow[0]} has not got it in hardware" if slow else None


def _gpus() -> Iterator[tuple[tuple[int, ...], str]]:
    """(compute capability, name) of each GPU of this machine that has one.

    Asked by way of their driver: this process may be one that is to leave them alone.
    """
    query = ["nvidia-smi", "--query-gpu=compute_cap,name", "--format=csv,noheader"]
    for line in (output_of(query) or "").splitlines():
        capability, _, name = line.partition(", ")
        found = tuple(int(part) for part in capability.split(".") if part.isdecimal())
        if found:  # it may say "[N/A]"
            yield found, name


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Autocast for `bfloat16` and `float16`, nothing for `float32`."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=getattr(torch, precision))


def make_scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """The scale of the loss under `float16`, whose small gradients would vanish; else a no-op.

    A step whose gradients overflow is skipped and halves the scale; many good ones double it. With
    a fused optimizer the host learns of neither.
    """
    return torch.amp.GradScaler(device.type, enabled=precision == "float16")


def local_cpus() -> int:
    """CPUs that this process may run on, and that a container's limit leaves it."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(count, int(cpu_quota())))


@contextlib.contextmanager
def cpu_threads(count: int | None) -> Iterator[None]:
    """Compute with `count` CPU threads (as many as before if None), afterwards as before.

    Raises:
        UserError: none, or more than `MOST_THREADS`: what a bundle recorded may be anything.
    """
    if count is not None and not 1 <= count <= MOST_THREADS:
        raise UserError(f"threads must be 1 to {MOST_THREADS}, got {shorten(count)}.")
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
