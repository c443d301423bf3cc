"""The file of a teacher's classifier, beside its table: who reads a full one needs no network."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from ekd_ray.files import atomic_path, close_to_others, read_bytes

_FILE = "classifier.safetensors"
_MOST_BYTES = 2**30  # 21,841 classes of 4,096 features have 0.36 GB


def read_rows(folder: Path, num_classes: int) -> Tensor | None:
    """The rows float32 [C, D] beside a table; None where they lack or are damaged."""
    from safetensors.torch import load

    try:
        found = load(read_bytes(folder / _FILE, most=_MOST_BYTES))
        rows, whole = found["rows"], torch.equal(found["sha256"], _digest(found["rows"]))
    except Exception:  # of a library, whatever the bytes are
        return None
    fits = rows.dtype == torch.float32 and rows.dim() == 2 and len(rows) == num_classes
    return rows if whole and fits else None


def write_rows(folder: Path, rows: Tensor) -> None:
    """Write the rows float32 [C, D] beside a table; raises OSError."""
    from safetensors.torch import save

    with atomic_path(folder / _FILE) as temporary:
        temporary.write_bytes(save({"rows": rows, "sha256": _digest(rows)}))
        close_to_others(temporary)


def _digest(rows: Tensor) -> Tensor:
    return torch.frombuffer(
        bytearray(hashlib.sha256(rows.numpy().tobytes()).digest()), dtype=torch.uint8
    )
