"""How far a study has come, where its hours went, and what early stops and the cache saved."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ekd_ray.config import DistillConfig
from ekd_ray.config.study_config import EXTENDED_FROM
from ekd_ray.engine.history import HISTORY
from ekd_ray.engine.measure.teacher_figures import FILE as TEACHER_FIGURES
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.errors import Damaged, UserError
from ekd_ray.files import read_json
from ekd_ray.losses.methods import method_of
from ekd_ray.results.records import CACHE_COST, LOCK, RunRecord, spent_seconds
from ekd_ray.results.study_reader import StudyReader

SEARCH_STAGES = {
    "complete": "search: trials of full length",
    "pruned": "search: stopped early",
    "failed": "search: failed",
    "running": "search: running",
}
CONFIRM_STAGES = {
    RunStage.SELECT: "confirm: fresh seeds",
    RunStage.FINAL: "confirm: final runs",
}


@dataclass(frozen=True, kw_only=True)
class Progress:
    """`stage` is teacher, search, confirm or finished; `trials` the number of trials by status,
    `asked` how many the study is to have; `quiet_seconds` since an epoch was last recorded, None
    before the first; `driven` whether a process of this machine runs it now, None where nothing
    says so, as in a copy."""

    stage: str
    trials: dict[str, int]
    asked: int
    quiet_seconds: float | None
    driven: bool | None


def progress(study: StudyReader) -> Progress:
    """See `Progress`."""
    stage, trials = "teacher", dict(Counter(r.status for r in (*study.records(), *study.running())))
    if EXTENDED_FROM in study.header:  # its bundle and confirm runs are from before
        begun = sum(trials.values()) >= study.config.trials
        stage = "confirm" if begun and not trials.get("running") else "search"
    elif (study.path / "best" / "MANIFEST").exists():
        stage = "finished"
    elif any((study.path / "confirm").glob("*")):
        stage = "confirm"
    elif any((study.path / "trials").glob("*")) or _has_teacher(study):
        stage = "search"
    written = []
    for run in (*study.runs, *study.teacher_runs):
        with contextlib.suppress(FileNotFoundError):
            written.append((run.folder / HISTORY).stat().st_mtime)
    return Progress(
        stage=stage,
        trials=trials,
        asked=study.config.trials,
        quiet_seconds=max(0.0, time.time() - max(written)) if written else None,
        driven=_is_locked(study.path / LOCK),
    )


def _has_teacher(study: StudyReader) -> bool:
    """Whether the teacher's stage is over: measured, or not needed."""
    needed = method_of(study.config.distill).needs_teacher and study.config.distill.teacher
    return not needed or (study.path / TEACHER_FIGURES).exists()


def _is_locked(path: Path) -> bool | None:
    """Whether a process holds a lock of `filelock`; None where there is no such file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:  # beside other readers, and for no longer than this takes
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # of a disk without locks
        return None
    finally:
        os.close(descriptor)
    return False


def time_rows(study: StudyReader) -> list[dict[str, Any]]:
    """One row per stage that ran: `stage`, `runs`, `epochs` (None of the cache's fill) and `hours`
    of training and validation, all runs together."""
    stages: dict[str, list[RunRecord]] = {
        name: [] for name in ("teacher", *SEARCH_STAGES.values(), *CONFIRM_STAGES.values())
    }
    for run in (*study.runs, *study.teacher_runs):
        name = CONFIRM_STAGES.get(run.stage, str(run.stage))
        stages[SEARCH_STAGES[run.status] if run.stage is RunStage.SEARCH else name].append(run)
    rows: list[dict[str, Any]] = [
        {
            "stage": name,
            "runs": len(runs),
            "epochs": sum(len(run.history) for run in runs),
            "hours": sum(spent_seconds(run.history) for run in runs) / 3600,
        }
        for name, found in stages.items()
        if (runs := [run for run in found if run.history])
    ]
    fill = read_fill(study.path)
    if fill.get("rows"):
        hours = _seconds_per_row(fill) * fill["rows"] / 3600
        after_teacher = 1 if rows and rows[0]["stage"] == "teacher" else 0
        rows.insert(
            after_teacher,
            {
                "stage": "teacher's cache: network",
                "runs": None,
                "epochs": None,
                "hours": hours,
            },
        )
    return rows


@dataclass(frozen=True, kw_only=True)
class Savings:
    """Work that early stops and the teacher's cache spared.

    A trial that was stopped early and then run in full spared nothing.

    `stopped_epochs` and `stopped_hours`: the rest of the trials that were stopped early, at their
    own pace. `views`: how often a run needed the teacher's answer; `asked`: how often the
    network was asked instead of the table; `cache_hours`: the rest at the pace at which the table
    was filled, None where no pace was measured, and all three None without a record of a fill.
    """

    stopped_epochs: int
    stopped_hours: float
    views: int | None
    asked: int | None
    cache_hours: float | None


def savings(study: StudyReader) -> Savings:
    """See `Savings`."""
    total = study.config.distill.epochs
    in_full = {trial.full_run_of for trial in study.records()}
    stopped = [
        trial
        for trial in study.records()
        if trial.status == "pruned" and trial.history and trial.number not in in_full
    ]
    left = [total - len(trial.history) for trial in stopped]
    seconds = [n * t.seconds / len(t.history) for n, t in zip(left, stopped, strict=True)]
    fill = read_fill(study.path)
    views, asked, spared = _count_views(study) if fill else None, None, None
    if views is not None:
        asked = int(fill["rows"])
        if fill["timed_rows"]:
            spared = max(0, views - asked) * _seconds_per_row(fill) / 3600
    return Savings(
        stopped_epochs=sum(left),
        stopped_hours=sum(seconds) / 3600,
        views=views,
        asked=asked,
        cache_hours=spared,
    )


def read_fill(study: Path) -> dict[str, float]:
    """The cost of the fill of the teacher's cache; empty without a record that is whole."""
    path = study / CACHE_COST
    with contextlib.suppress(Damaged):
        found = read_json(path) if path.exists() else {}
        names = ("rows", "seconds", "timed_rows")
        if all(type(found.get(name)) in (int, float) and found[name] >= 0 for name in names):
            return found
    return {}


def _seconds_per_row(fill: dict[str, float]) -> float:
    """Seconds for a row of the teacher's table, on one slot."""
    return fill["seconds"] / fill["timed_rows"] if fill["timed_rows"] else 0.0


def _count_views(study: StudyReader) -> int | None:
    """How often runs that ended needed the teacher; None where the data set is not known here."""
    # Loads torch, and only a study with a cache needs it.
    from ekd_ray.engine.resolve import count_kept

    shared = study.config.distill
    try:
        total = shared.train_subset or count_kept(shared, study.config.data_root)
    except (UserError, OSError):
        return None
    by_epoch: dict[tuple[Any, ...], int] = {}  # a configuration is slow to make, and alike in these
    views = 0
    for run in study.runs:
        if run.config and run.status != "running":
            key = tuple(run.config.get(n) for n in ("method", "batch_size", "validation_fraction"))
            if key not in by_epoch:
                by_epoch[key] = _drawn_views(DistillConfig.from_dict(run.config), total)
            views += len(run.history) * by_epoch[key]
    return views


def _drawn_views(config: DistillConfig, total: int) -> int:
    """How many answers of the teacher an epoch needs."""
    from ekd_ray.data import held_out_size, steps_per_epoch  # as above

    method = method_of(config)
    if not method.needs_teacher:
        return 0
    trained = total - held_out_size(total, config.validation_fraction)
    seen = steps_per_epoch(trained, config.batch_size) * config.batch_size
    return seen * (2 if method.strong_view else 1)
