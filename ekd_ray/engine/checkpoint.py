"""Checkpoints of a running training: one safetensors file, exact to the bit.

Tensors are stored as tensors; everything else (counters, history, the optimizer's
scalars) is JSON in the file's header. One file means that one rename makes it atomic.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ekd_ray.engine import ranks
from ekd_ray.errors import UserError
from ekd_ray.files import atomic_path


class DamagedCheckpoint(UserError):
    """A file that is torn, changed, or no checkpoint: nothing can be continued from it."""


FORMAT_VERSION = 1
_KEY = "ekd_ray_checkpoint"
_HEADER = ("format_version", "progress", "optimizer_groups", "optimizer_scalars")


def save_checkpoint(
    path: Path,
    *,
    learner: nn.Module,
    optimizer: torch.optim.Optimizer,
    sums: Tensor,
    progress: dict[str, Any],
) -> None:
    """Write the whole state of a run atomically; all ranks must call it, the first one writes.

    The file is the same whatever the number of ranks.

    Args:
        learner: student and objective; `sums`: the epoch's running sums, [K] float64.
        progress: JSON-ready counters, fingerprint and history; NaN is refused.
    """
    tensors = {f"learner.{key}": _stored(value) for key, value in learner.state_dict().items()}
    tensors["sums"] = _stored(sums)
    state = optimizer.state_dict()
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = _stored(value)
            else:
                scalars.setdefault(str(index), {})[name] = value
    if not ranks.is_first():
        return
    header = {
        "format_version": FORMAT_VERSION,
        "progress": progress,
        "optimizer_groups": state["param_groups"],
        "optimizer_scalars": scalars,
    }
    header["crc32"] = _checksum(header, tensors)
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata={_KEY: json.dumps(header, allow_nan=False)})


def _stored(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous()


def load_checkpoint(
    path: Path,
    *,
    fingerprint: str,
    learner: nn.Module,
    optimizer: torch.optim.Optimizer,
    sums: Tensor,
) -> dict[str, Any]:
    """Restore what `save_checkpoint` wrote, in place; returns its `progress`.

    Args:
        fingerprint: the run's; the file's must be the same.

    Raises:
        DamagedCheckpoint: the file is damaged or foreign.
        UserError: it is of a newer format, or of a run whose configuration has another
            fingerprint.
    """
    header, tensors = _read(path)
    progress = header["progress"]
    if progress["fingerprint"] != fingerprint:
        raise UserError(
            f"checkpoint {path} belongs to another configuration (fingerprint "
            f"{progress['fingerprint']}, this run's is {fingerprint}): choose another "
            "--out."
        )
    prefix = "learner."
    stored = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    learner.load_state_dict(stored)
    state: dict[int, dict[str, Any]] = {
        int(k): dict(v) for k, v in header["optimizer_scalars"].items()
    }
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": header["optimizer_groups"]})
    # The file is row-major, and the fused kernels pair raw memory: every buffer must take
    # its parameter's memory format (channels_last) again.
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                entries[name] = torch.empty_like(parameter).copy_(value)
    sums.copy_(tensors["sums"])
    return progress


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file that is whole, ours and not newer than this code."""
    if path.is_dir():
        raise UserError(f"{path} is a folder where a checkpoint belongs: remove it.")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = json.loads((file.metadata() or {})[_KEY])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        stated = header.get("crc32")  # files of before there was one have none
        header = {key: header[key] for key in _HEADER}
        if stated is not None and stated != _checksum(header, tensors):
            raise ValueError("checksum")
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DamagedCheckpoint(
            f"checkpoint {path} is damaged or not ours ({type(error).__name__})."
        ) from None
    if header["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"checkpoint {path} has format version {header['format_version']}, this ekd_ray "
            f"reads <= {FORMAT_VERSION}: upgrade ekd_ray."
        )
    return header, tensors


def _checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    """CRC-32 of the header's entries and of every tensor's bytes: a bit that flipped on the disk
    would else go on training."""
    text = json.dumps({key: header[key] for key in _HEADER}, sort_keys=True)
    value = zlib.crc32(text.encode())
    for name in sorted(tensors):
        data = tensors[name].reshape(-1).view(torch.uint8)
        value = zlib.crc32(data.numpy().data, zlib.crc32(name.encode(), value))
    return value
