"""What lies on disk of a study: its layout, and the record of each trial."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.runlog import end_session, read_history
from ekd_ray.engine.schedule import first_decayed_epoch
from ekd_ray.files import write_json, write_text

FORMAT_VERSION = 1
STUDY_FILE = "study.yaml"
JOURNAL = "optuna.journal"
FAILURE = "failure.json"
RESULT = "result.json"
CONFIRMED = "confirm.parquet"
CACHE_COST = "cache.json"


def trial_folder(run: Path, number: int) -> Path:
    """`<run>/trials/<number, 4 digits>`."""
    return run / "trials" / f"{number:04d}"


def milestone_epochs(config: StudyConfig) -> list[int]:
    """Epochs at which trials are compared, ascending; the last is the full budget.

    The study's own `rungs`; or `grace` epochs, and the first one after the learning rate has
    fallen by a step; where it falls smoothly, `grace` times each power of `reduction_factor`.
    """
    full = config.distill.epochs
    if config.scheduler not in ("asha", "hyperband"):
        return [full]
    decayed = first_decayed_epoch(config.distill)
    epochs = list(config.rungs)
    if not epochs and decayed is not None:
        epochs = sorted({config.grace, decayed})
    elif not epochs:
        epoch = config.grace
        while epoch < full:
            epochs.append(epoch)
            epoch *= config.reduction_factor
    return [*(epoch for epoch in epochs if epoch < full), full]


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """What is known of one trial; `result.json` once it has ended.

    `status` is running, complete (all epochs), pruned (stopped early) or failed, with
    the `reason`. `history` has one row per epoch, `params` the searched values.
    """

    number: int
    params: dict[str, Any]
    config: dict[str, Any]
    status: str = "running"
    reason: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """The record of an ended trial, or None if it has not ended."""
        path = folder / RESULT
        return cls(**json.loads(path.read_text())) if path.exists() else None

    def write_config(self, folder: Path) -> None:
        """Write the trial's resolved configuration beside its events."""
        write_text(folder / "config.yaml", DistillConfig.from_dict(self.config).to_yaml())

    def status_of(self, folder: Path, *, error: bool, epochs: int) -> str:
        """How a trial ended, judged from what it left in its folder."""
        if error or (folder / FAILURE).exists():
            return "failed"
        last = [row["epoch"] for row in read_history(folder)][-1:]
        if not last:
            return "failed"
        return "complete" if last[0] >= epochs else "pruned"

    def ended(self, status: str, *, folder: Path, reason: str | None = None) -> TrialRecord:
        """The closed record, written atomically to `result.json`."""
        if status == "failed" and reason is None:
            reason = failure_reason(folder)
        record = replace(self, status=status, reason=reason, history=read_history(folder))
        end_session(folder, failed=status == "failed")
        write_json(folder / RESULT, asdict(record))
        return record

    @property
    def last(self) -> dict[str, Any]:
        """The row of the last epoch that ended; empty before the first."""
        return self.history[-1] if self.history else {}

    def value(self, metric: str) -> float | None:
        """The metric after the last epoch, or None if no epoch ended."""
        return self.last.get(metric)

    @property
    def seconds(self) -> float:
        """Training and validation time of the epochs that ended."""
        return sum(row.get("seconds", 0.0) for row in self.history)


def failure_reason(folder: Path) -> str:
    """Why the run in a folder failed, in its own words if it left any."""
    path = folder / FAILURE
    if path.exists():
        return json.loads(path.read_text())["reason"]
    return "the trial's process died (killed, or out of memory)"
