"""The rows of a teacher's classifier, for methods that compare classes by them.

They lie beside the rows of the teacher's table, so that who reads a full one needs no network.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from ekd_ray.errors import UserError
from ekd_ray.files import atomic_path, close_to_others, read_bytes

_FILE = "classifier.safetensors"
_MOST_BYTES = 2**30  # 21,841 classes of 4,096 features have 0.36 GB


def find_classifier(model: nn.Module, num_classes: int) -> nn.Linear:
    """The last linear layer that has a row for each class.

    Raises:
        UserError: there is none.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for layer in reversed(layers):
        if layer.out_features == num_classes:
            return layer
    name = getattr(model, "ekd_name", type(model).__name__)
    raise UserError(
        f"the method compares the {num_classes} classes by the rows of the teacher's last linear "
        f"layer, and {name} has none with {num_classes} rows: choose another teacher, or another "
        "method."
    )


def read_rows(folder: Path, num_classes: int) -> Tensor | None:
    """The rows float32 [C, D] beside a table; None where they lack or are damaged."""
    from safetensors.torch import load

    try:
        found = load(read_bytes(folder / _FILE, most=_MOST_BYTES))
        rows, digest = found["rows"], found["sha256"]
    except Exception:  # of a library, whatever the bytes are
        return None
    whole = rows.dtype == torch.float32 and rows.dim() == 2 and len(rows) == num_classes
    return rows if whole and torch.equal(digest, _digest(rows)) else None


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
