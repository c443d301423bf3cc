"""What a run writes while it trains: one JSON line per epoch, and TensorBoard events."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from ekd_ray.config.targets import COSTS
from ekd_ray.engine.hparams import (
    EVENTS,
    Session,
    experiment,
    of_values,
    session_end,
    session_start,
)
from ekd_ray.files import write_text

HISTORY = "history.jsonl"


def grouped(name: str) -> str:
    """TensorBoard tag of a metric: `val_top1` -> `val/top1`, `lr` -> `solver/lr`, and what the
    student costs, `parameters` -> `cost/parameters`."""
    if name in COSTS:
        return f"cost/{name}"
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

    Args:
        hyperparameters: the run's settings; `session` says which of them HParams shows, None
            shows all.
    """

    def __init__(
        self, folder: Path, *, hyperparameters: dict[str, Any], history: list[dict[str, Any]],
        session: Session | None = None,
    ) -> None:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / HISTORY, "".join(json.dumps(row) + "\n" for row in history))
        self._history = open(folder / HISTORY, "a", encoding="utf-8")  # noqa: SIM115
        for left in folder.glob(EVENTS):
            left.unlink()
        self._events = SummaryWriter(str(folder))
        self._writer = self._events._get_file_writer()
        if session is None:  # a run of no study says itself what it shows
            self._writer.add_summary(experiment(of_values(hyperparameters), ["val/top1"]))
            session = Session(settings=tuple(hyperparameters))
        self._shown = bool(session.settings)
        if self._shown:
            shown = {name: hyperparameters.get(name) for name in session.settings}
            self._writer.add_summary(session_start(shown, group=session.group))
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

    def close(self, *, failed: bool = False) -> None:
        """End the HParams session and close both files."""
        if self._shown:
            self._writer.add_summary(session_end(failed=failed))
        self._events.close()
        self._history.close()
