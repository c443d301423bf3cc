"""`StudyReader`: loads a study from disk and ranks what it holds."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.arguments import checks_arguments
from ekd_ray.config.plugins import SOURCES, files_trusted, load_named, stamps_in_study
from ekd_ray.config.study_config import EXTENDED_FROM
from ekd_ray.config.targets import (
    PictureCounts,
    as_loss,
    evenly_spaced,
    pareto_front,
    total_violation,
)
from ekd_ray.engine.history import is_epoch
from ekd_ray.engine.measure.teacher_figures import TeacherFigures
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.errors import MOST_LISTED, Damaged, UserError, shorten
from ekd_ray.files import atomic_path, check_format, check_name, check_plain, read_json
from ekd_ray.remote.location import is_uri
from ekd_ray.remote.session import open_folder
from ekd_ray.results.chance import warn_of_chance
from ekd_ray.results.importance import effects_table
from ekd_ray.results.leaderboard import Leaderboard, Row, make_leaderboard
from ekd_ray.results.paired import Paired, paired_difference
from ekd_ray.results.records import (
    BEST,
    CONFIG,
    CONFIRMED,
    FORMAT_VERSION,
    MANIFEST,
    PLACE,
    STUDY_FILE,
    RunRecord,
    check_kinds,
    check_settings,
    confirmed_run,
    milestone_epochs,
    read_record,
    spent_seconds,
    table_of_rows,
    trial_folders,
)
from ekd_ray.results.study_file import describe_missing, describe_other_settings, read_study_file
from ekd_ray.results.words import describe_few_pictures, warn_of_teacher

if TYPE_CHECKING:
    import pyarrow as pa

T = TypeVar("T")
PARQUET_KEY = "ekd_ray.format_version"  # in the metadata of a table's file


class Trials(list[RunRecord]):
    """Trials of a search in some order."""

    def to_table(self) -> pa.Table:
        """One row a trial: `trial` (its number), `status`, `reason`, `epoch` and the metrics of
        its last one, `seconds`, and the searched values as `param_<name>`."""
        return table_of_rows([_trial_row(trial, trial.history) for trial in self])

    def to_pandas(self) -> Any:
        """`to_table` as a `pandas.DataFrame`."""
        return self.to_table().to_pandas()  # pyarrow imports pandas, which nothing else here needs


@dataclass(frozen=True, kw_only=True)
class StudyReader:
    """A running or finished study in a folder, without what is made of it (`Study`).

    Its files are read when they are first asked for, and once: load the study again to see what
    has come since.
    """

    path: Path
    config: StudyConfig
    header: dict[str, Any]

    @classmethod
    @checks_arguments
    def load(cls, path: str | Path, *, trust_plugins: bool = False) -> Self:
        """Open a study's folder, or what is at its URI now.

        Args:
            path: of a URI (`s3://bucket/runs/one`) a copy is read, which later changes there
                do not reach.
            trust_plugins: run the plugins that it names, where they were not loaded before.

        Raises:
            UserError: there is no study, a newer one, no way to it, or plugins that are not
                trusted.
        """
        folder = open_folder(path)
        if not (folder / STUDY_FILE).is_file():
            if (missing := describe_missing(folder)) and not is_uri(str(path)):
                raise UserError(missing)
            found = sorted(str(file.parent) for file in folder.glob(f"*/{STUDY_FILE}"))[
                :MOST_LISTED
            ]
            if found:
                cure = f"there are {', '.join(found)}"
            elif (folder / CONFIG).is_file():
                cure = "it is a single run, whose figures are in its result.json"
            elif (folder / MANIFEST).is_file():
                cure = "it is a bundle, whose figures ekd-ray evaluate has"
            else:
                cure = "give the folder of a study"
            raise UserError(f"{path} holds no study (no {STUDY_FILE}): {cure}.")
        file = read_study_file(folder / STUDY_FILE)
        check_format(folder / STUDY_FILE, file.values.get("format_version", 1), FORMAT_VERSION)
        with files_trusted(trust_plugins):
            load_named(stamps_in_study(file.values), folder / SOURCES, named_by=folder / STUDY_FILE)
        with file.locate_errors("study"):
            config = StudyConfig.from_dict(file.values.get("study") or {})
        if changed := describe_other_settings(folder / STUDY_FILE, file.values, config):
            warnings.warn(f"{changed}.", stacklevel=2)
        return cls(path=folder, config=config, header=file.values)

    @property
    def place(self) -> str:
        """Its URI, of which the folder is a copy, or its folder."""
        return str(self.header.get(PLACE) or self.path)

    @property
    def validation_images(self) -> int | None:
        """How many images its trials are compared on; None where nothing tells."""
        return self._counts.validation_images

    def warnings(self) -> list[str]:
        """Sentences on what the winner and the teacher may not be, and on each split whose
        pictures are so few that its figures tell little."""
        few = describe_few_pictures(self._counts, self.config.watched)
        return [*self._warn_of_winner(), *warn_of_teacher(self.teacher()), *few]

    def _warn_of_winner(self) -> list[str]:
        path = self.path / BEST / "metrics.json"
        if EXTENDED_FROM in self.header or not path.is_file():  # of a winner of before
            return []
        # A damaged bundle is said where it is opened.
        with contextlib.suppress(UserError, LookupError, TypeError, ValueError, ArithmeticError):
            return [*filter(None, [warn_of_chance(read_json(path))])]
        return []

    @property
    def _counts(self) -> PictureCounts:
        names = (field.name for field in fields(PictureCounts))
        found = {name: self.header.get(name) for name in names}
        return PictureCounts(**{n: c for n, c in found.items() if type(c) is int and c >= 0})

    @cached_property
    def runs(self) -> list[RunRecord]:
        """Every run that has begun, ended or not: trials by number, then confirm runs by folder."""
        folders = [*trial_folders(self.path).values()]
        for stage in (RunStage.SELECT, RunStage.FINAL):
            folders += sorted(self.path.glob(f"confirm/{stage}-*"))
        known = {run.folder: run for run in reversed(self.confirm_runs)}
        runs = [run for f in folders if (run := self._read(f, known.get(f))) is not None]
        for run in runs:  # only its end records the searched values of a trial
            if run.stage is RunStage.SEARCH and run.status == "running":
                values = {name: run.config.get(name) for name in self.config.space or {}}
                run.params.update({k: v for k, v in values.items() if v is not None})
        return runs

    @cached_property
    def teacher_runs(self) -> list[RunRecord]:
        """The trainings of its teacher that have begun, ended or not."""
        folders = (self.path / "teacher", *sorted(self.path.glob("teacher/seed-*")))
        return [run for folder in folders if (run := self._read(folder)) is not None]

    def damaged(self) -> list[str]:
        """A sentence on each file that is left out because it holds what no study writes.

        Such of runs, of the table of the confirm stage and of the teacher.
        """
        _ = self.runs, self.teacher_runs, self.teacher()
        return list(dict.fromkeys(self._damaged))

    @cached_property
    def _damaged(self) -> list[str]:
        return []

    def _whole(self, read: Callable[[], T]) -> T | None:
        """The result of `read`; None, and a word in `damaged`, if its file is damaged."""
        try:
            return read()
        except Damaged as error:
            self._damaged.append(str(error))
            return None

    def _read(self, folder: Path, known: RunRecord | None = None) -> RunRecord | None:
        def read() -> RunRecord | None:
            run = read_record(folder, known, needed=self.config.all_objectives)
            if run:
                check_settings(run)
            return run

        return self._whole(read)

    def records(self) -> Trials:
        """Every trial that has ended, by number."""
        return Trials(run for run in self._trials if run.status != "running")

    def running(self) -> Trials:
        """Trials that have begun and not ended, with their epochs so far."""
        return Trials(run for run in self._trials if run.status == "running")

    @property
    def _trials(self) -> list[RunRecord]:
        return [run for run in self.runs if run.stage is RunStage.SEARCH]

    def ranked(self) -> Trials:
        """Complete trials, best first by the study's metric on the validation split.

        Those that break a constraint come after all that keep them, the nearest first.
        """
        return rank_trials(self.records(), self.config)

    def feasible(self) -> Trials:
        """Those of `ranked` that keep all constraints."""
        return Trials(t for t in self.ranked() if not total_violation(self.config.bounds, t.last))

    def pareto(self) -> Trials:
        """The Pareto front over the study's objectives, best by its metric first.

        Complete trials that keep the constraints and that none of the others is at least as
        good as in every objective and better in one. With one objective: the best trials.
        """
        trials = self.feasible()
        front = pareto_front([trial.last for trial in trials], self.config.all_objectives)
        return Trials(trials[index] for index in front)

    def finalists(self) -> Trials:
        """The trials that are to be confirmed: the best, or evenly along the Pareto front.

        With one objective the best are those that a model of all trials expects most of
        (`rank_by_model`), because the best of many noisy scores has been lucky.
        """
        # It loads SciPy, which a reader does without.
        from ekd_ray.results.study_model import rank_by_model

        count = self.config.confirm_top_k
        if not self.config.objectives:
            return Trials(rank_by_model(self.feasible(), self.records(), self.config)[:count])
        return Trials(evenly_spaced(self.pareto(), count))

    def trials(self) -> pa.Table:
        """Every trial that has ended, by number; columns as in `Trials.to_table`."""
        return self.records().to_table()

    def rungs(self) -> pa.Table:
        """One row per ended trial and rung (its last epoch included), columns as `trials`."""
        milestones = set(milestone_epochs(self.config))
        return table_of_rows(
            [
                _trial_row(trial, trial.history[:count])
                for trial in self.records()
                for count, row in enumerate(trial.history, start=1)
                if row["epoch"] in milestones or count == len(trial.history)
            ]
        )

    def teacher(self) -> TeacherFigures | None:
        """The teacher's own validation figures; None before they are measured, and without one."""
        return self._whole(lambda: TeacherFigures.read(self.path))

    def write_tables(self) -> None:
        """Write `trials.parquet` (one row per trial and rung) atomically."""
        write_parquet(self.path / "trials.parquet", self.rungs())

    def confirmed(self) -> pa.Table | None:
        """The table of `confirm.parquet` (one row per stage, configuration and seed), or None."""
        path = self.path / CONFIRMED
        return read_parquet(path) if path.exists() else None

    @cached_property
    def confirm_runs(self) -> list[RunRecord]:
        """The runs of the confirm stage, as `confirm.parquet` has them; before its end none.

        Configurations are compared seed by seed: one that a damaged row has lost, all lose.
        """
        table = self._whole(self.confirmed)
        rows = [] if table is None else table.to_pylist()
        runs = [self._whole(functools.partial(self._confirmed_run, row)) for row in rows]
        lost = [(row.get("stage"), row.get("seed"))
                for row, run in zip(rows, runs, strict=True) if run is None]  # fmt: skip
        return [run for run in runs if run is not None and (run.stage, run.seed) not in lost]

    def _confirmed_run(self, row: dict[str, Any]) -> RunRecord:
        """The run of a row; raises `Damaged` unless it has what a leaderboard needs of it."""
        path, text = self.path / CONFIRMED, f"the row of {shorten(row.get('name'))}"
        try:
            run = confirmed_run(row, self.path)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise Damaged(path, f"{text} is none of a confirm run") from None
        check_name(run.folder)
        check_kinds(path, run.to_dict())
        check_settings(run)
        needed = "test_top1" if run.stage is RunStage.FINAL else self.config.metric
        figures = {"epoch": 1, **run.metrics}
        if not is_epoch(figures) or (run.reason is None and needed not in figures):
            raise Damaged(path, f"{text} has no finite {needed}")
        return run

    def leaderboard(self) -> Leaderboard:
        """Confirmed configurations, the winner first, then champions and baselines, then finalists.

        The winner is the champion or finalist with the best mean validation score over the
        confirm seeds; its test figures played no part. Before confirm: empty.
        """
        board = make_leaderboard(self.confirm_runs, self.config)
        board.damaged = list(dict.fromkeys(self._damaged))
        return board

    def differences(self) -> dict[str, Paired]:
        """The winner's metric on the test split (`Leaderboard.test_metric`) minus that of each
        champion and baseline, paired over the seeds.

        What failed under a seed is left out. Before confirm: empty.
        """
        board = self.leaderboard()
        metric = board.test_metric
        own = board[0].tested(metric) if board and not board[0].failed else ()
        return {
            row.name: paired_difference(own, row.tested(metric))
            for row in board[1:]
            if len(row.tested(metric)) == len(own) > 0 and not row.failed
        }

    def validation_differences(self) -> dict[str, Paired]:
        """The winner's metric on the validation split minus that of each champion, paired over the
        confirm seeds that both had. What failed under a seed is left out. Before confirm: empty."""
        board = self.leaderboard()
        return {
            row.name: paired_difference(board[0].val[: len(row.val)], row.val)
            for row in board[1:]
            if row.entered_as == "champion" and 0 < len(row.val) <= len(board[0].val)
        }

    def importance(self, metric: str | None = None) -> pa.Table:
        """How much each parameter mattered for a metric (the study's own).

        The study's model of all its trials is asked, so that those that were stopped early count
        too: `main` is the share of the variance over the space that comes of a parameter alone,
        `total` what it has together with others. What the model knows stands beside it: `error`,
        of trials of full length that it has not seen, against `spread`, the error of their mean,
        and `coverage` of its 95 % intervals.

        Returns:
            One row a parameter, the most important first; empty with fewer than 8 trials of full
            length, or where all scored the same.

        Raises:
            UserError: an unknown metric.
        """
        # It loads SciPy, which a reader does without.
        from ekd_ray.results.model_figures import fit_study_model

        model = fit_study_model(self.records(), self.config, metric)
        return effects_table(model.find(None) if model else None)

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
            name=top.name,
            number=top.number,
            config=DistillConfig.from_dict(top.config),
            val=() if value is None else (value,),
        )


def rank_trials(trials: Iterable[RunRecord], config: StudyConfig) -> Trials:
    """The complete ones of a study's trials, in the order of `StudyReader.ranked`."""
    metric = config.metric

    def key(trial: RunRecord) -> tuple[float, float, int]:
        value = trial.value(metric)
        violation = total_violation(config.bounds, trial.last)
        score = float("inf") if value is None else as_loss(value, metric)
        return violation, score, trial.number or 0

    return Trials(sorted((t for t in trials if t.status == "complete"), key=key))


def _trial_row(trial: RunRecord, history: list[dict[str, Any]]) -> dict[str, Any]:
    """A trial as a row of a table, after the epochs of `history`."""
    last = history[-1] if history else {}
    return {
        "trial": trial.number,
        "status": trial.status,
        "reason": trial.reason,
        "epoch": last.get("epoch", 0),
        **{name: value for name, value in last.items() if name != "seconds"},
        "seconds": spent_seconds(history),
        **{f"param_{name}": value for name, value in trial.params.items()},
    }


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a table to Parquet atomically, with the format of its study."""
    import pyarrow.parquet as pq  # slow to import, and most readers open no table

    format_version = {PARQUET_KEY: str(FORMAT_VERSION)}
    with atomic_path(path) as temporary:
        pq.write_table(
            table.replace_schema_metadata((table.schema.metadata or {}) | format_version), temporary
        )


def read_parquet(path: Path) -> pa.Table:
    """Read what `write_parquet` wrote.

    Raises:
        Damaged: it is no such table. UserError: it is newer than this ekd_ray.
    """
    import pyarrow as pa  # as above
    import pyarrow.parquet as pq

    check_plain(path)
    try:
        table = pq.read_table(path)
        version = int((table.schema.metadata or {}).get(PARQUET_KEY.encode(), b"1"))
    except (pa.ArrowException, OSError, ValueError):
        raise Damaged(path, "it is no Parquet table of ours") from None
    check_format(path, version, FORMAT_VERSION)
    return table
