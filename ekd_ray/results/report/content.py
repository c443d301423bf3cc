"""Everything that a report shows, read from the study once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ekd_ray.config import StudyConfig
from ekd_ray.engine.measure.predictions import FILE as PREDICTIONS
from ekd_ray.engine.measure.predictions import Predictions
from ekd_ray.results.importance import parameter_importance
from ekd_ray.results.leaderboard import Row
from ekd_ray.results.paired import Paired
from ekd_ray.results.progress import Progress, Savings, progress, savings, time_table
from ekd_ray.results.records import RunRecord
from ekd_ray.results.study import Study


@dataclass(frozen=True, kw_only=True)
class Content:
    """A study as its report sees it; `predictions` by leaderboard row, one per final run."""

    study: Study
    config: StudyConfig
    ended: list[RunRecord]
    running: list[RunRecord]
    ranked: list[RunRecord]
    board: list[Row]
    differences: dict[str, Paired]
    confirmed: list[dict[str, Any]]
    importance: pa.Table
    predictions: dict[str, list[Predictions]]
    progress: Progress
    time: pa.Table
    saved: Savings

    @property
    def winner(self) -> Row | None:
        """The confirmed winner, or None before it is chosen."""
        return self.board[0] if self.board and self.board[0].winner else None

    @property
    def winner_number(self) -> int | None:
        """The number of the winner's trial; before confirm, of the best trial so far."""
        if self.winner:
            return self.winner.number
        return self.ranked[0].number if self.ranked else None


def gather(study: Study) -> Content:
    """Read a study, running or finished."""
    table = study.confirmed()
    confirmed = table.to_pylist() if table else []
    ended = study.records()
    return Content(
        study=study,
        config=study.config,
        ended=ended,
        running=study.running(),
        ranked=study.ranked(),
        board=study.leaderboard(),
        differences=study.differences(),
        confirmed=confirmed,
        importance=parameter_importance(ended, study.config),
        predictions=_predictions(study, confirmed),
        progress=progress(study),
        time=time_table(study),
        saved=savings(study),
    )


def _predictions(study: Study, confirmed: list[dict[str, Any]]) -> dict[str, list[Predictions]]:
    found: dict[str, list[Predictions]] = {}
    for row in confirmed:
        path = study.path / row["folder"] / PREDICTIONS
        if row["stage"] == "final" and not row.get("reason") and path.is_file():
            found.setdefault(row["name"], []).append(Predictions.load(path))
    return found
