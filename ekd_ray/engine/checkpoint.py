"""Checkpoints of a running training: one file of `torch.save` and its checksum, exact to the bit.

One file means that one rename makes it atomic; the checksum finds what is torn or has a bit
that flipped on the disk, which would else go on training.
"""

from __future__ import annotations

import io
import pickle
import zlib
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import nn

from ekd_ray.errors import UserError
from ekd_ray.files import atomic_path, check_format, read_bytes

CHECKPOINT = "checkpoint.pt"
FORMAT_VERSION = 2
_MAGIC = b"ekd_ray checkpoint\n"
_CHECKSUM_BYTES = 4


class DamagedCheckpoint(UserError):
    """A file that is torn, changed, of an older format, or no checkpoint: nothing can be
    continued from it."""


def save_checkpoint(
    path: Path, *, learner: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any]
) -> None:
    """Write the whole state of a run atomically.

    Args:
        learner: student and objective.
        progress: counters, fingerprint, history and running sums: tensors and plain values.
    """
    state = {
        "format_version": FORMAT_VERSION,
        "progress": progress,
        "learner": learner.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(_MAGIC)
        summed = _Summed(file)
        try:
            torch.save(state, cast(IO[bytes], summed))
        except RuntimeError as error:  # torch's complaint of its archive hides the system's error
            raise summed.error or error from None
        file.write(summed.checksum.to_bytes(_CHECKSUM_BYTES, "big"))


class _Summed(io.RawIOBase):
    """Passes on to a file, with the CRC-32 of all that is written: no second copy in memory."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file, self.checksum = file, 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self.checksum = zlib.crc32(data, self.checksum)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise


def load_checkpoint(
    path: Path, *, fingerprint: str, learner: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Restore what `save_checkpoint` wrote, in place; returns its `progress`.

    Args:
        fingerprint: the run's; the file's must be the same. With it every tensor has the memory
            format that the fused optimizers, which pair raw memory, find in the learner.

    Raises:
        DamagedCheckpoint: the file is damaged, foreign or of an older format.
        UserError: it is of a newer format, or of a run whose configuration has another
            fingerprint.
    """
    state = _read(path)
    check_format(path, state["format_version"], FORMAT_VERSION)
    if state["format_version"] < FORMAT_VERSION:
        raise DamagedCheckpoint(f"checkpoint {path} was written by an older ekd_ray.")
    progress: dict[str, Any] = state["progress"]
    if progress["fingerprint"] != fingerprint:
        raise UserError(
            f"checkpoint {path} belongs to another configuration (fingerprint "
            f"{progress['fingerprint']}, this run's is {fingerprint}): choose another --out."
        )
    learner.load_state_dict(state["learner"])
    optimizer.load_state_dict(state["optimizer"])
    return progress


def _read(path: Path) -> dict[str, Any]:
    """The content of a file that is whole and ours; nothing in it is executed."""
    if path.is_dir():
        raise UserError(f"{path} is a folder where a checkpoint belongs: remove it.")
    try:
        data = read_bytes(path)
        content = memoryview(data)[len(_MAGIC) : -_CHECKSUM_BYTES]
        checksum = zlib.crc32(content).to_bytes(_CHECKSUM_BYTES, "big")
        if not data.startswith(_MAGIC) or data[-_CHECKSUM_BYTES:] != checksum:
            raise ValueError("checksum")
        state: dict[str, Any] = torch.load(
            io.BytesIO(content), map_location="cpu", weights_only=True
        )
    except (UserError, ValueError, pickle.UnpicklingError) as error:
        raise DamagedCheckpoint(
            f"checkpoint {path} is damaged or not ours ({type(error).__name__})."
        ) from None
    return state


def forget_checkpoint(folder: Path) -> None:
    """Remove an ended run's checkpoint: a study keeps those of running trials only."""
    (folder / CHECKPOINT).unlink(missing_ok=True)
