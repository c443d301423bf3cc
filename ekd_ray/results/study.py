"""`Study`: one object that loads a study from disk and ranks what it holds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from ekd_ray.config import DistillConfig, StudyConfig, YamlFile
from ekd_ray.config.targets import evenly_spaced, pareto_front, total_violation
from ekd_ray.errors import UserError
from ekd_ray.files import atomic_path
from ekd_ray.remote.location import is_uri, parse_location
from ekd_ray.remote.session import reading_copy
from ekd_ray.results.importance import parameter_importance
from ekd_ray.results.leaderboard import Row, leaderboard_rows, leaderboard_table, ordered
from ekd_ray.results.paired import Paired, paired_difference
from ekd_ray.results.records import (
    CONFIRMED,
    FORMAT_VERSION,
    STUDY_FILE,
    TrialRecord,
    milestone_epochs,
)


@dataclass(frozen=True, kw_only=True)
class Study:
    """A running or finished study in a folder.

    Example:
        >>> study = Study.load("runs/quickstart")      # doctest: +SKIP
        >>> study.trials().to_pandas()                 # doctest: +SKIP
        >>> study.best().config                        # doctest: +SKIP
    """

    path: Path
    config: StudyConfig
    header: dict[str, Any]

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Open a study's folder, or what is at its URI now.

        Args:
            path: of a URI (`s3://bucket/runs/one`) a copy is read, which later changes there
                do not reach.

        Raises:
            UserError: there is no study, a newer one, or no way to it.
        """
        given = path
        if isinstance(path, str) and is_uri(path):
            found = parse_location(path)
            path = found if isinstance(found, Path) else reading_copy(found)
        path = Path(path)
        if not (path / STUDY_FILE).is_file():
            raise UserError(f"{given} holds no study (no {STUDY_FILE}): give the folder of a run.")
        file = YamlFile.read(path / STUDY_FILE)
        header = file.values
        if not isinstance(header.get("format_version", 0), int):
            raise UserError(f"{path / STUDY_FILE} is damaged: its format_version is no number.")
        if header.get("format_version", 0) > FORMAT_VERSION:
            raise UserError(
                f"{path / STUDY_FILE} has format version {header['format_version']}, this "
                f"ekd_ray reads <= {FORMAT_VERSION}: upgrade ekd_ray."
            )
        with file.locate_errors("study"):
            config = StudyConfig.from_dict(header.get("study") or {})
        return cls(path=path, config=config, header=header)

    def records(self) -> list[TrialRecord]:
        """Every ended trial, by number."""
        folders = (self.path / "trials").glob("[0-9]*")
        records = (TrialRecord.read(folder) for folder in folders)
        return sorted((r for r in records if r is not None), key=lambda r: r.number)

    def ranked(self) -> list[TrialRecord]:
        """Complete trials, best first by the study's metric on the validation split.

        Those that break a constraint come after all that keep them, the nearest first.
        """
        metric, sign = self.config.metric, -1 if self.config.mode == "max" else 1
        complete = [record for record in self.records() if record.status == "complete"]
        worst = float("inf")

        def key(record: TrialRecord) -> tuple[float, float, int]:
            value = record.value(metric)
            broken = total_violation(self.config.bounds, record.last)
            return broken, worst if value is None else sign * value, record.number

        return sorted(complete, key=key)

    def feasible(self) -> list[TrialRecord]:
        """Those of `ranked` that keep all constraints."""
        bounds = self.config.bounds
        return [r for r in self.ranked() if total_violation(bounds, r.last) == 0]

    def pareto(self) -> list[TrialRecord]:
        """The Pareto front over the study's objectives, best by its metric first.

        Complete trials that keep the constraints and that none of the others is at least as
        good as in every objective and better in one. With one objective: the best trials.
        """
        records = self.feasible()
        front = pareto_front([r.last for r in records], self.config.all_objectives)
        return [records[index] for index in front]

    def finalists(self) -> list[TrialRecord]:
        """The trials that are to be confirmed: the best, or evenly along the Pareto front."""
        count = self.config.confirm_top_k
        if not self.config.objectives:
            return self.feasible()[:count]
        return evenly_spaced(self.pareto(), count)

    def trials(self) -> pa.Table:
        """One row per ended trial: number, status, reason, epochs, seconds, last metrics,
        and the searched values as `param_<name>`."""
        rows = [_trial_row(record, record.history) for record in self.records()]
        return pa.Table.from_pylist(_same_columns(rows))

    def rungs(self) -> pa.Table:
        """One row per ended trial and rung (its last epoch included), columns as `trials`."""
        milestones = set(milestone_epochs(self.config))
        rows = []
        for record in self.records():
            for index, row in enumerate(record.history, start=1):
                if row["epoch"] in milestones or index == len(record.history):
                    rows.append(_trial_row(record, record.history[:index]))
        return pa.Table.from_pylist(_same_columns(rows))

    def write_tables(self) -> None:
        """Write `trials.parquet` (one row per trial and rung) atomically."""
        write_parquet(self.path / "trials.parquet", self.rungs())

    def confirmed(self) -> pa.Table | None:
        """The table of `confirm.parquet` (one row per stage, configuration and seed), or None."""
        path = self.path / CONFIRMED
        return pq.read_table(path) if path.exists() else None

    def leaderboard(self) -> list[Row]:
        """Confirmed configurations, the winner first, baselines and finalists after it.

        The winner is the finalist with the best mean validation score over the confirm
        seeds; its test figures played no part. Before confirm: empty.
        """
        table = self.confirmed()
        if table is None:
            return []
        return ordered(leaderboard_rows(table.to_pylist(), self.config), self.config)

    def differences(self) -> dict[str, Paired]:
        """The winner's test top-1 minus that of each baseline, paired over the final seeds.

        A baseline that failed under a seed is left out. Before confirm: empty.
        """
        board = self.leaderboard()
        return {
            row.name: paired_difference(board[0].test, row.test)
            for row in board[1:]
            if board[0].test and row.test and not (row.failed or board[0].failed)
        }

    def leaderboard_table(self) -> pa.Table:
        """`leaderboard` as a table: a row per configuration, mean, sd and n of each figure."""
        return leaderboard_table(self.leaderboard(), self.config)

    def pareto_table(self) -> pa.Table:
        """`pareto` as a table: the trials of the front with their figures and parameters."""
        return pa.Table.from_pylist(
            _same_columns([_trial_row(r, r.history) for r in self.pareto()])
        )

    def importance(self, metric: str | None = None, *, epoch: int | None = None) -> pa.Table:
        """How much each parameter mattered (fANOVA, PED-ANOVA): see `parameter_importance`."""
        return parameter_importance(self.records(), self.config, metric=metric, epoch=epoch)

    def best(self) -> Row:
        """The confirmed winner; before confirm, the best complete trial of the search.

        Raises:
            UserError: no trial has finished all of its epochs yet.
        """
        board = self.leaderboard()
        if board:
            return board[0]
        ranked = self.ranked()
        if not ranked:
            raise UserError(f"no trial of {self.path} has finished: let the search go on.")
        top = ranked[0]
        value = top.value(self.config.metric)
        return Row(
            name=f"trial {top.number}",
            config=DistillConfig.from_dict(top.config),
            val=() if value is None else (value,),
        )


def _trial_row(record: TrialRecord, history: list[dict[str, Any]]) -> dict[str, Any]:
    last = history[-1] if history else {}
    metrics = {key: value for key, value in last.items() if key != "seconds"}
    return {
        "trial": record.number,
        "status": record.status,
        "reason": record.reason,
        "epoch": last.get("epoch", 0),
        **metrics,
        "seconds": sum(row.get("seconds", 0.0) for row in history),
        **{f"param_{name}": value for name, value in record.params.items()},
    }


def _same_columns(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one schema: a column that any row has, all rows have; mixed types become text."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    kinds: dict[str, set[type]] = {}
    for row in rows:
        for name, value in row.items():
            if value is not None:
                kinds.setdefault(name, set()).add(type(value))
    mixed = {n for n, found in kinds.items() if len(found) > 1 and found != {int, float}}

    def cell(name: str, value: Any) -> Any:
        if value is None or name not in mixed:
            return float(value) if kinds.get(name) == {int, float} and value is not None else value
        return str(value)

    return [{name: cell(name, row.get(name)) for name in names} for row in rows]


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a table to Parquet atomically."""
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)
