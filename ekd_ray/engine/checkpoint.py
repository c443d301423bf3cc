"""Checkpoints of a running training: one safetensors file, exact to the bit.

Tensors are stored as tensors; everything else (counters, history, the optimizer's
scalars) is JSON in the file's header. One file means that one rename makes it atomic.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ekd_ray.errors import UserError
from ekd_ray.files import atomic_path

FORMAT_VERSION = 1
_KEY = "ekd_ray_checkpoint"


def save_checkpoint(
    path: Path,
    *,
    learner: nn.Module,
    optimizer: torch.optim.Optimizer,
    sums: Tensor,
    progress: dict[str, Any],
) -> None:
    """Write the whole state of a run atomically.

    Args:
        learner: student and objective; `sums`: the epoch's running sums, [K] float64.
        progress: JSON-ready counters, fingerprint and history; NaN is refused.
    """
    tensors = {f"learner.{key}": value for key, value in learner.state_dict().items()}
    tensors["sums"] = sums
    state = optimizer.state_dict()
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                scalars.setdefault(str(index), {})[name] = value
    header = {
        "format_version": FORMAT_VERSION,
        "progress": progress,
        "optimizer_groups": state["param_groups"],
        "optimizer_scalars": scalars,
    }
    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(plain, temporary, metadata={_KEY: json.dumps(header, allow_nan=False)})


def load_checkpoint(
    path: Path,
    *,
    fingerprint: str,
    learner: nn.Module,
    optimizer: torch.optim.Optimizer,
    sums: Tensor,
) -> dict[str, Any]:
    """Restore what `save_checkpoint` wrote, in place; returns its `progress`.

    Raises:
        UserError: the file is damaged, foreign, of a newer format, or of a run whose
            configuration has another fingerprint.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = json.loads((file.metadata() or {})[_KEY])
            version, progress = header["format_version"], header["progress"]
            groups, scalars = header["optimizer_groups"], header["optimizer_scalars"]
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"checkpoint {path} is damaged or not ours ({type(error).__name__}): delete it to "
            "start this run again."
        ) from None
    if version > FORMAT_VERSION:
        raise UserError(
            f"checkpoint {path} has format version {version}, this ekd_ray "
            f"reads <= {FORMAT_VERSION}: upgrade ekd_ray."
        )
    if progress["fingerprint"] != fingerprint:
        raise UserError(
            f"checkpoint {path} belongs to another configuration (fingerprint "
            f"{progress['fingerprint']}, this run's is {fingerprint}): choose another --out."
        )
    prefix = "learner."
    learner.load_state_dict(
        {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    )
    state: dict[int, dict[str, Any]] = {int(k): dict(v) for k, v in scalars.items()}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    # The file is row-major, and the fused kernels pair raw memory: every buffer must take
    # its parameter's memory format (channels_last) again.
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                entries[name] = torch.empty_like(parameter).copy_(value)
    sums.copy_(tensors["sums"])
    return progress
