"""What a run writes while it trains: one JSON line per epoch, and TensorBoard events."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from ekd_ray.files import write_text

HISTORY = "history.jsonl"


def grouped(name: str) -> str:
    """TensorBoard tag of a metric: `val_top1` -> `val/top1`, `lr` -> `solver/lr`."""
    group, _, rest = name.partition("_")
    return f"{group}/{rest}" if group in ("train", "val", "test", "loss") else f"solver/{name}"


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The epochs recorded in a run's folder, oldest first; a torn last line is left out."""
    path = folder / HISTORY
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


class RunLog:
    """Appends epochs to `history.jsonl` and to the TensorBoard events of a run's folder.

    It starts from `history`, the rows of the checkpoint: whatever an interrupted run
    recorded beyond them is dropped, in both places. The events are written anew into one
    file: readers order several by name, which two of one second need not follow.
    """

    def __init__(
        self, folder: Path, *, hyperparameters: dict[str, Any], history: list[dict[str, Any]]
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / HISTORY, "".join(json.dumps(row) + "\n" for row in history))
        self._history = open(folder / HISTORY, "a", encoding="utf-8")  # noqa: SIM115
        for left in folder.glob("events.out.tfevents.*"):
            left.unlink()
        self._events = SummaryWriter(str(folder))
        self._hyperparameters = {
            key: value if isinstance(value, int | float | str | bool) else str(value)
            for key, value in hyperparameters.items()
            if value is not None
        }
        writer = self._events._get_file_writer()
        start, info, _ = hparams(self._hyperparameters, {"val/top1": None})
        writer.add_summary(start)
        writer.add_summary(info)
        for row in history:
            self._add_scalars(row)

    def write(self, row: dict[str, Any]) -> None:
        """Record one epoch (flushed to the operating system before it returns)."""
        self._history.write(json.dumps(row, allow_nan=False) + "\n")
        self._history.flush()
        os.fsync(self._history.fileno())
        self._add_scalars(row)
        self._events.flush()

    def _add_scalars(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            if name != "epoch" and isinstance(value, int | float):
                self._events.add_scalar(grouped(name), value, row["epoch"])

    def close(self) -> None:
        """End the HParams session and close both files."""
        _, _, end = hparams(self._hyperparameters, {"val/top1": None})
        self._events._get_file_writer().add_summary(end)
        self._events.close()
        self._history.close()
