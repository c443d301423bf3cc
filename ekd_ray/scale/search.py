"""The search stage: Optuna suggests, ASHA stops early, Ray Tune runs the trials."""

from __future__ import annotations

import contextlib
import functools
import operator
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.phrases import command_text
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.errors import Interrupted, UserError, halting_error, name_continuation
from ekd_ray.results.records import FAILURE, RESULT, RunRecord, failure_reason, read_record
from ekd_ray.results.study_reader import StudyReader, rank_trials
from ekd_ray.results.words import figure_text
from ekd_ray.scale.cluster import with_gpus
from ekd_ray.scale.fill_tasks import fill_cache
from ekd_ray.scale.full_runs import FullRuns
from ekd_ray.scale.ray_private import last_failure, memory_kills_are_deaths, no_variables_passed_on
from ekd_ray.scale.schedulers import ARRIVALS, Chance, NoStopping, make_scheduler
from ekd_ray.scale.searcher import OptunaSearcher
from ekd_ray.scale.tracking import Observer, Tracker
from ekd_ray.scale.trainer import SCRATCH, make_trainable
from ekd_ray.scale.trial_slots import ProcessDeaths, TrialSlots
from ekd_ray.scale.worker import RUN, Train, TrainOptions, train_run
from ekd_ray.scale.worker_output import keep_failure_log


class NoWinner(UserError):
    """All trials have ended, and none of them can be confirmed."""


def search(run: Path, config: StudyConfig, base: DistillConfig, observer: Observer) -> None:
    """Run (or continue) the search of a study until all of its trials have ended.

    Where early stops left fewer than `confirm_top_k` trials of full length, the most promising
    of those that were stopped then run in full.

    Args:
        run: the study's folder; base: `config.distill` resolved.

    Raises:
        NoWinner: every trial failed, or none keeps the constraints. Halted: the disk is
            full, or the data are others. Interrupted: stopped by the user. After both of these the
            study can be resumed.
    """
    config = with_gpus(config)
    train = functools.partial(train_run, options=TrainOptions.of_study(config, run))
    chance = Chance.of_study(base, config.data_root)
    searcher = OptunaSearcher(run, config, base)
    before = searcher.found()
    scheduler = make_scheduler(
        config, chance=chance, records=searcher.records(), log=run / ARRIVALS
    )
    searcher.end_stopped(scheduler.stopped)
    if searcher.remaining:
        _note_best(before, config, observer)

    def run_all(title: str, searcher: OptunaSearcher, scheduler: TrialScheduler) -> None:
        if not searcher.remaining:
            return
        fill_cache(config, base, [base.seed], observer, run=run)
        observer.stage(title, searcher.remaining, base.epochs)
        run_tuner(run, config, train, searcher=searcher, scheduler=scheduler, observer=observer)

    run_all("search", searcher, scheduler)
    if searcher.stop and searcher.stop.holds():
        observer.note(searcher.stop.describe())
    unfinished = searcher.unfinished
    if not unfinished:
        full_runs = FullRuns(run, config, base, budget=searcher.budget, chance=chance)
        run_all("full runs of stopped trials", full_runs, NoStopping())
        unfinished = full_runs.unfinished
    study = StudyReader.load(run)
    study.write_tables()
    for text in study.damaged():
        observer.note(f"left out: {text}")
    if unfinished:
        raise Interrupted
    if not study.feasible():
        nearest = study.ranked()[:1]
        if nearest:
            figures = ", ".join(f"{b.metric} {nearest[0].value(b.metric)}" for b in config.bounds)
            raise NoWinner(
                f"no trial of {run} keeps {', '.join(config.constraints)}; the nearest is trial "
                f"{nearest[0].number} with {figures}: loosen the constraints, or search longer "
                f"by --extend {config.half_more} with {name_continuation()}."
            )
        reasons = {record.reason.rstrip(".") for record in study.records() if record.reason}
        more = f" (more by: {command_text('logs', run)})" if reasons else ""
        raise NoWinner(
            f"no trial of {run} finished its {config.distill.epochs} epochs; "
            f"reasons: {'; '.join(sorted(reasons)) or 'all were stopped early'}{more}."
        )


def _note_best(trials: Iterable[RunRecord], config: StudyConfig, observer: Observer) -> None:
    """Say which of the trials that have ended is the best: an observer sees those to come alone."""
    metric = config.metric
    for best in rank_trials(trials, config)[:1]:
        figure = figure_text(metric, best.value(metric))
        observer.note(f"best before: {metric} {figure} (trial {best.number})")


class ObserverCallback(tune.Callback):
    """Passes Tune's events to an observer, which stays out of Tune's pickled snapshots."""

    def __init__(self, observer: Observer) -> None:
        self._observer: Observer | None = observer
        self._order: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_observer": None, "_order": {}}

    def _number(self, trial: Any) -> int:
        """The trial's number in the search, in other stages its position among those that began."""
        run = RunRecord.from_dict(trial.config[RUN])
        if run.stage is RunStage.SEARCH and run.number is not None:
            return run.number
        return self._order.setdefault(trial.trial_id, len(self._order))

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        if self._observer:
            run = RunRecord.from_dict(trial.config[RUN])
            self._observer.started(run.title, self._number(trial), run.config)

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **_: Any
    ) -> None:
        if self._observer and "epoch" in result:
            self._observer.epoch(self._number(trial), result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        if self._observer:
            folder = RunRecord.from_dict(trial.config[RUN]).folder
            failure = failure_reason(folder) if (folder / FAILURE).exists() else None
            self._observer.ended(self._number(trial), failure=failure)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        folder = RunRecord.from_dict(trial.config[RUN]).folder
        record = read_record(folder) if (folder / RESULT).exists() else None
        # One of which nothing is recorded has not failed: it begins again.
        if self._observer and (record or (folder / FAILURE).exists()):
            failure = (record and record.reason) or failure_reason(folder)
            self._observer.ended(self._number(trial), failure=failure)


class FailureLogs(tune.Callback):
    """Keeps the log of each run that fails, while the files of its processes are there."""

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        said = last_failure(trial)
        folder = RunRecord.from_dict(trial.config[RUN]).folder
        keep_failure_log(folder, said and f"failure {said.strip()}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        folder = RunRecord.from_dict(trial.config[RUN]).folder
        if (folder / FAILURE).exists():
            keep_failure_log(folder, "")


def run_tuner(
    run: Path,
    config: StudyConfig,
    train: Train,
    *,
    searcher: Searcher,
    scheduler: TrialScheduler,
    observer: Observer,
) -> None:
    """Let Tune run what `searcher` suggests; a failed trial does not stop it.

    Args:
        run: the study's folder.
        train: trains a run, in the trial's own process or in each of its workers.
    """
    config = with_gpus(config)
    deaths = ProcessDeaths()
    scratch = (run / SCRATCH).absolute()
    shutil.rmtree(scratch, ignore_errors=True)
    trackers = [Tracker(run, config)] if config.track else []
    tuner = tune.Tuner(
        make_trainable(config, train, scratch),
        tune_config=tune.TuneConfig(
            search_alg=TrialSlots(searcher, config, deaths),
            scheduler=scheduler,
            num_samples=-1,  # the searcher says when it is over
            reuse_actors=config.workers_per_trial == 1,
            trial_dirname_creator=operator.attrgetter("trial_id"),
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(scratch),
            callbacks=[deaths, FailureLogs(), *trackers, ObserverCallback(observer)],
            failure_config=tune.FailureConfig(max_failures=1),
            verbose=0,
        ),
    )
    try:
        # Tune prints of a trial that ends without a report, which a resumed one may, also at
        # verbose=0: standard output is for results.
        with (
            contextlib.redirect_stdout(sys.stderr),
            memory_kills_are_deaths(),
            no_variables_passed_on(),
        ):
            tuner.fit()
    except Exception as error:
        halted = halting_error(error)  # Tune wraps what its searchers raise
        if halted is None:
            raise
        raise halted from None
    shutil.rmtree(scratch, ignore_errors=True)
