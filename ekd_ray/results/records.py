"""The record of a training run, and where it lies in a study.

Every run leaves in its folder `config.yaml` (its resolved settings, from the beginning),
`history.jsonl` and TensorBoard events (by epoch) and `result.json` (its record, written once, at
its end); a run of the final stage, or of no study, also its weights.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import types
import typing
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ekd_ray.config import DistillConfig, StudyConfig, YamlFile
from ekd_ray.config.plugins import write_sources
from ekd_ray.config.targets import COSTS, MOST_FIGURE
from ekd_ray.engine.history import is_epoch, leading_epochs, read_history
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.engine.schedule import first_decayed_epoch
from ekd_ray.errors import Damaged, UserError, shorten
from ekd_ray.files import (
    check_format,
    damaged_name,
    parse_json,
    read_json,
    write_json,
    write_text,
)
from ekd_ray.results.study_file import STUDY_FILE as STUDY_FILE
from ekd_ray.results.study_file import read_study_file

if TYPE_CHECKING:
    import pyarrow as pa

# Of studies, their records and tables, candidates and bundles. 1: the records of confirm runs were
# without their settings, and those of trials without what finished runs have.
FORMAT_VERSION = 2
REPORT = Path("report") / "index.html"
BEST = "best"  # the bundle of a study's winner
MANIFEST = "MANIFEST"  # the files of a bundle, and the SHA-256 of each
PLACE = "uri"  # in the study's file: where the study is kept, of which its folder is a copy
DATA = "data"  # in that file: what `pin_data` found; in a bundle a key of metrics.json
PIN = "data-pin.json"  # the same of a run of no study
JOURNAL = "optuna.journal"
JOURNAL_LOCKS = f"{JOURNAL}.lock*"  # Optuna's, symbolic links
LOCK = ".lock"  # held by the process that runs what is in the folder
CONFIG = "config.yaml"
FAILURE = "failure.json"
RESULT = "result.json"
STATUSES = ("running", "complete", "pruned", "failed")
CONFIRMED = "confirm.parquet"
CACHE_COST = "cache.json"
CANDIDATES = "candidates.json"
_TRIAL = re.compile(r"[0-9]{4,}")


def trial_folder(run: Path, number: int) -> Path:
    """`<run>/trials/<number, 4 digits>`."""
    return run / "trials" / f"{number:04d}"


def trial_folders(run: Path) -> dict[int, Path]:
    """The folders of the trials that have begun, by their numbers, ascending."""
    found = [path for path in run.glob("trials/*") if _TRIAL.fullmatch(path.name)]
    return dict(sorted((int(p.name), p) for p in found if p.name == f"{int(p.name):04d}"))


def candidate_folder(teacher: Path, seed: int) -> Path:
    """The folder of one of several trainings of a teacher, `<teacher>/seed-<seed>`."""
    return teacher / f"seed-{seed}"


def trial_name(number: int, full_run_of: int | None = None) -> str:
    """The name of a trial, and of its configuration once it is confirmed: `trial 7`, or `trial 23
    (full run of trial 7)`."""
    name = f"trial {number}"
    return name if full_run_of is None else f"{name} (full run of {trial_name(full_run_of)})"


def milestone_epochs(config: StudyConfig) -> list[int]:
    """Epochs at which trials are compared, ascending; the last is the full budget.

    The study's own `rungs`; or `grace` epochs, and the first one after the learning rate has
    fallen by a step; where it falls smoothly, `grace` times each power of `reduction_factor`.
    """
    full = config.distill.epochs
    if config.scheduler not in ("asha", "hyperband"):
        return [full]
    decayed = first_decayed_epoch(config.distill)
    epochs = sorted({*config.rungs})
    if not epochs:
        epochs = [config.grace] if decayed is None else sorted({config.grace, decayed})
        while decayed is None and epochs[-1] < full:
            epochs.append(epochs[-1] * config.reduction_factor)
    return [*(epoch for epoch in epochs if epoch < full), full]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A training run: what it is, and what has come of it so far.

    Attributes:
        folder: where its files lie; not part of the file.
        name: of its configuration: `trial 7`, a baseline's, the student's of a single run.
        number: of the trial that has this configuration; None for all others.
        role: champion, finalist or baseline, of a run of the confirm stage.
        equals: other champions that have the same configuration.
        full_run_of: the number of the trial, stopped early, that this one runs in full.
        config: its resolved settings; empty where they are illegal or not known.
        params: the searched values of a trial.
        status: running, complete (all epochs), pruned (stopped early) or failed, with a `reason`.
        history: a row for each epoch that ended, see `distill`.
        metrics: the last row, and the metrics on the test split where it was read.
        seconds: the time of its epochs; of a finished run, from its start to its end.
    """

    folder: Path
    stage: RunStage
    name: str
    number: int | None = None
    role: str | None = None
    equals: list[str] = field(default_factory=list)
    full_run_of: int | None = None
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    params: dict[str, Any] = field(default_factory=dict)
    status: str = "running"
    reason: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list, repr=False)
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    log_prior: float | None = None
    precision: str | None = None
    compiled: bool = False
    fingerprint: str | None = None
    data_fingerprint: str | None = None
    environment: dict[str, Any] | None = None

    @property
    def seed(self) -> int:
        """The seed of its settings."""
        return self.config["seed"]

    @property
    def title(self) -> str:
        """The name for people, with the seed where a name has several."""
        confirms = self.stage in (RunStage.SELECT, RunStage.FINAL)
        return f"{self.name} seed {self.seed}" if confirms else self.name

    @property
    def last(self) -> dict[str, Any]:
        """The row of the last epoch that ended; empty before the first."""
        return self.history[-1] if self.history else {}

    def value(self, metric: str) -> float | None:
        """The metric after the last epoch, or None if no epoch ended."""
        return self.last.get(metric)

    def write_config(self) -> None:
        """Write the settings beside the run's events."""
        config = DistillConfig.from_dict(self.config)
        if self.stage is RunStage.SINGLE:  # no study has them
            write_sources(self.folder, config.plugins)
        write_text(self.folder / CONFIG, config.to_yaml())

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values, which Ray carries to a process without this class."""
        # Not `asdict`, which copies every row of the history.
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**values, "folder": str(self.folder), "stage": str(self.stage)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The record back from `to_dict`; other keys are ignored."""
        known = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        typed = {"folder": Path(values["folder"]), "stage": RunStage(values["stage"])}
        return cls(**{**known, **typed})

    def write(self) -> None:
        """Write `result.json` atomically; from then on the run has ended."""
        content = self.to_dict()
        del content["folder"]
        write_json(self.folder / RESULT, {"format_version": FORMAT_VERSION, **content})

    def close(self, status: str, *, reason: str | None = None) -> Self:
        """Write the record of a run that has ended, from what it left in its folder.

        Args:
            reason: of a failure; without it the one that the run has left.
        """
        # They load torch, which a reader does not need.
        from ekd_ray.engine.environment import deciding_versions
        from ekd_ray.engine.runlog import end_session

        if status == "failed" and reason is None:
            reason = failure_reason(self.folder)
        history = read_history(self.folder)
        record = replace(
            self, status=status, reason=reason, history=history,
            metrics=history[-1] if history else {}, seconds=spent_seconds(history),
            environment=self.environment or deciding_versions(),
        )  # fmt: skip

        end_session(self.folder, failed=status == "failed")
        record.write()
        return record


_PLAIN = (bool, int, float, str, types.NoneType)
_MOST_SIGNS = 10_000  # of a text


def _is_bounded(value: Any) -> bool:
    """Whether a text is of bounded length, and a number finite and in bounds."""
    if isinstance(value, str):
        return len(value) <= _MOST_SIGNS
    return not isinstance(value, int | float) or abs(value) <= MOST_FIGURE


def _kinds(hint: Any) -> tuple[type, ...]:
    """The classes of the values that JSON has for a type."""
    hints = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = tuple(typing.get_origin(one) or one for one in hints)
    return (*kinds, int) if float in kinds else kinds


_KINDS = {
    name: _kinds(hint)
    for name, hint in {**typing.get_type_hints(RunRecord), "stage": str}.items()
    if name != "folder"
}


def single_run(config: DistillConfig, folder: Path) -> RunRecord:
    """The record of a run of no study, before it begins."""
    return RunRecord(
        folder=folder, stage=RunStage.SINGLE, name=config.student, config=config.to_dict()
    )


def find_pin(folder: Path) -> Any:
    """The pin (`pin_data`) that a study, or a run of no study, has kept; a teacher's folder
    has it from the study around it. None where nothing is kept."""
    for place in (folder, folder.parent):
        if (place / STUDY_FILE).exists():
            return read_study_file(place / STUDY_FILE).values.get(DATA)
        if (place / PIN).exists():
            return read_json(place / PIN)
    return None


def read_record(
    folder: Path, known: RunRecord | None = None, *, needed: Iterable[str] = ()
) -> RunRecord | None:
    """The record of the run in a folder, ended or running; None if it has not begun.

    Args:
        known: what else is known of the run: its name and role (runs of equal configurations
            share a folder) and, for a file of the first format, its settings.
        needed: metrics that every epoch of a trial has, such as the study's objectives.

    Raises:
        Damaged: its files hold what no run writes. UserError: it is of a newer ekd_ray.
    """
    path, found = folder / RESULT, known or _from_path(folder)
    needed = tuple(needed)
    content: dict[str, Any] = {}
    if ended := path.exists():
        content = read_json(path)
        check_format(path, content.get("format_version", 1), FORMAT_VERSION)
    if "history" not in content:  # still running, or of the first format
        settings, content["history"] = folder / CONFIG, read_history(folder, needed)
        if not (ended or settings.exists() or content["history"]):
            return None
        if settings.exists() and not found.config:
            content["config"] = _read_settings(settings)
    if "format_version" not in content:
        history = content["history"]
        content.setdefault("seconds", spent_seconds(history))
        if ended:
            content.setdefault("status", "failed" if content.get("reason") else "complete")
            content.setdefault("metrics", history[-1] if history else {})
    if ended:
        _check_content(path, content, found, needed)
    if known:
        content |= {name: getattr(known, name) for name in ("name", "number", "role", "equals")}
    content["stage"] = RunStage(content.get("stage", found.stage))
    return replace(found, **{name: content[name] for name in content.keys() & _KINDS.keys()})


def read_or_put_aside(
    folder: Path, known: RunRecord | None = None, *, needed: Iterable[str] = ()
) -> RunRecord | None:
    """As `read_record`; a file of it that is damaged is renamed, with a warning.

    Its run is then one that has not ended, and goes on from its checkpoint if it has left one.
    """
    from ekd_ray.engine.checkpoint import CHECKPOINT  # loads torch, which a reader does without

    for _ in (RESULT, CONFIG):
        try:
            return read_record(folder, known, needed=needed)
        except Damaged as error:
            os.replace(error.path, damaged_name(Path(error.path)))
            then = "goes on" if (folder / CHECKPOINT).exists() else "is run again"
            warnings.warn(f"{error} It is put aside, and its run {then}.", stacklevel=2)
    return read_record(folder, known, needed=needed)


def read_whole(folder: Path, *, needed: Iterable[str] = ()) -> RunRecord | None:
    """As `read_record`; None for one that is damaged, too."""
    with contextlib.suppress(Damaged):
        return read_record(folder, needed=needed)
    return None


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return YamlFile.read(path).values
    except UserError as error:
        raise Damaged(path, str(error).rstrip(".")) from None


def _check_content(
    path: Path, content: Mapping[str, Any], found: RunRecord, needed: Iterable[str]
) -> None:
    """Raise `Damaged` if the content of a record is none that we write."""
    unknown = content.keys() - _KINDS.keys() - {"format_version"}
    if unknown and "format_version" in content:
        raise Damaged(path, f"{shorten(min(unknown))} is no part of a record")
    check_kinds(path, content)
    stages = {*RunStage} if found.stage in (RunStage.TEACHER, RunStage.SINGLE) else {found.stage}
    legal: dict[str, set[Any]] = {"status": {*STATUSES}, "stage": stages}
    if found.stage is RunStage.SEARCH:
        legal["number"] = {found.number}
    for name, values in legal.items():
        if content.get(name, getattr(found, name)) not in values:
            got = shorten(content.get(name))
            raise Damaged(path, f"its {name} is {got}, not {' or '.join(sorted(map(str, values)))}")
    history, metrics = content["history"], {"epoch": 1, **content.get("metrics", {})}
    scored = content.get("status", found.status) in ("complete", "pruned")
    scored &= found.stage is RunStage.SEARCH
    whole = leading_epochs(history, needed if scored else ()) == history
    if not is_epoch(metrics) or not (whole or leading_epochs(history) == history):
        raise Damaged(path, "its history or its metrics are no numbers that epochs have")
    if scored and not (whole and history):
        raise Damaged(path, f"its history has not {' and '.join(needed) or 'an epoch'}")
    _check_params(path, content)


def _check_params(path: Path, content: Mapping[str, Any]) -> None:
    """Raise `Damaged` unless the searched values are such as the settings could have."""
    config = content.get("config") or {}
    for name, value in content.get("params", {}).items():
        try:
            known = isinstance(value, _PLAIN) and _is_bounded(value)
            if known and name in config and name in DistillConfig.names():
                DistillConfig.check_value(name, value)
        except UserError:
            known = False
        if not known:
            raise Damaged(path, f"its params have {shorten(value)} as {shorten(name)}")


def _from_path(folder: Path) -> RunRecord:
    """The record of a run of which only the folder is known."""
    name, number, kind = folder.name, None, folder.parent.name
    stage = RunStage.TEACHER if "teacher" in (name, kind) else RunStage.SINGLE
    if kind == "trials" and _TRIAL.fullmatch(name):
        stage, number = RunStage.SEARCH, int(name)
        name = trial_name(number)
    elif kind == "confirm":
        stage = RunStage(name.partition("-")[0])
    return RunRecord(folder=folder, stage=stage, name=name, number=number)


def confirm_table(runs: Iterable[RunRecord], study: Path) -> pa.Table:
    """The content of `confirm.parquet`: a row for each run of the confirm stage."""
    runs = list(runs)
    first_seeds = {run.name: run.seed for run in reversed(runs)}
    return table_of_rows(
        [
            {
                "stage": str(run.stage),
                "name": run.name,
                "role": run.role,
                "trial": run.number,
                "equals": json.dumps(run.equals),
                "seed": run.seed,
                # The settings that the runs of a name share are those under its first seed.
                "config": json.dumps({**run.config, "seed": first_seeds[run.name]}),
                "folder": str(run.folder.relative_to(study)),
                "reason": run.reason,
                "seconds": run.seconds,
                **{
                    name: value
                    for name, value in run.metrics.items()
                    if name.startswith(("val_", "test_")) or name in COSTS
                },
            }
            for run in runs
        ]
    )


def confirmed_run(row: Mapping[str, Any], study: Path) -> RunRecord:
    """The run of a row that `confirm_table` made, without its history."""
    shown = ("stage", "name", "role", "trial", "equals", "seed", "config", "folder", "reason",
             "seconds")  # fmt: skip
    return RunRecord(
        folder=study / row["folder"],
        stage=RunStage(row["stage"]),
        # Older studies had them as a baseline, `authors`.
        name="authors' values" if row["name"] == "authors" else row["name"],
        number=row["trial"] if "trial" in row else _number_in(row["name"]),
        role=row.get("role"),
        equals=parse_json(row.get("equals") or "[]"),
        config={**parse_json(row["config"]), "seed": row["seed"]},
        status="failed" if row.get("reason") else "complete",
        reason=row.get("reason"),
        seconds=row.get("seconds") or 0.0,
        metrics={k: v for k, v in row.items() if k not in shown and v is not None},
    )


def check_kinds(path: Path, values: Mapping[str, Any]) -> None:
    """Raise `Damaged` if a value is of another type than that of the record, or out of bounds."""
    for name, value in values.items():
        legal = isinstance(value, _KINDS.get(name, object)) and _is_bounded(value)
        if not legal or (name == "seconds" and not is_epoch({"epoch": 1, name: value})):
            raise Damaged(path, f"its {name} is {shorten(value)}")


def check_settings(run: RunRecord) -> None:
    """Raise `Damaged` if the settings of a run are no configuration.

    Those of a study's runs are alike: after the first, what others have else is looked at.
    """
    names = tuple(run.config)
    known = _LEGAL.get(names)
    try:
        if known is None:
            DistillConfig.from_dict(run.config)
            _LEGAL[names] = run.config
            return
        for name, value in run.config.items():
            if not _is_same(value, known[name]) and not _is_same(value, run.params.get(name)):
                if name in DistillConfig.retired:
                    DistillConfig.from_dict({name: value})
                else:
                    DistillConfig.check_value(name, value)
    except UserError as error:
        raise Damaged(run.folder, f"no settings of a run ({str(error).rstrip('.')})") from None


def _is_same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and bool(value == other)


_LEGAL: dict[tuple[str, ...], dict[str, Any]] = {}  # settings of a run, by their names


def _number_in(name: str) -> int | None:
    """The number of a trial by its name, which is all that FORMAT_VERSION 1 says of it."""
    kind, _, number = name.partition(" ")
    return int(number) if kind == "trial" else None


def table_of_rows(rows: list[dict[str, Any]]) -> pa.Table:
    """A table with every column that any row has; a column of mixed types becomes text."""
    import pyarrow as pa  # slow to import, and a reader of records needs no table

    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: _column([row.get(name) for row in rows]) for name in names})


def _column(values: list[Any]) -> list[Any]:
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) < 2:
        return values
    convert = float if kinds == {int, float} else str
    return [None if value is None else convert(value) for value in values]


def spent_seconds(history: Iterable[Mapping[str, Any]]) -> float:
    """Seconds of training and validation of the epochs that ended."""
    return sum(row.get("seconds", 0.0) for row in history)


def failure_reason(folder: Path) -> str:
    """The reason why the run in a folder failed, in its own words if it left any."""
    if (folder / FAILURE).exists():
        return str(read_json(folder / FAILURE).get("reason"))
    return "the trial's process died (killed, or out of memory)"
