"""The confirm stage: finalists over several seeds, then the winner and the baselines on
all training data, with one reading of the test split.

1. *select*: the best `confirm_top_k` trials run again over up to `confirm_seeds` fresh seeds
   on the training split; a finalist that is clearly worse than the best gets no further
   ones. The best mean validation score is the winner.
2. *final*: the winner and the baselines train on train + validation over the same seeds;
   each final model reads the test split once. No decision follows from it.
"""

from __future__ import annotations

import functools
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.engine.checkpoint import forget_checkpoint
from ekd_ray.engine.resolve import resolve, without_teacher
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.engine.runlog import end_session
from ekd_ray.errors import Interrupted, UserError
from ekd_ray.files import file_name, write_json
from ekd_ray.losses.methods import with_method
from ekd_ray.results.leaderboard import leaderboard_rows, winner_of
from ekd_ray.results.paired import clearly_worse
from ekd_ray.results.records import (
    CONFIRMED,
    FAILURE,
    RESULT,
    RunRecord,
    confirm_table,
    failure_reason,
    read_record,
)
from ekd_ray.results.study import Study, write_parquet
from ekd_ray.scale.fill_tasks import fill_cache
from ekd_ray.scale.samplers import NoStopping
from ekd_ray.scale.search import run_tuner
from ekd_ray.scale.searcher import death_reason
from ekd_ray.scale.space import point_config
from ekd_ray.scale.tracking import Observer
from ekd_ray.scale.worker import RUN, TrainOptions, check_disk, train_run


def confirm(run: Path, config: StudyConfig, base: DistillConfig, observer: Observer) -> None:
    """Run (or continue) both steps; writes `confirm.parquet`.

    A finalist that fails under one of the seeds cannot win; a baseline that fails is
    reported as failed.

    Raises:
        UserError: every finalist failed, or a run's process died twice.
        Interrupted: stopped by the user.
    """
    seeds = fresh_seeds(config, base)
    trials = {trial.name: trial for trial in Study.load(run).finalists()}
    finalists = {name: DistillConfig.from_dict(trial.config) for name, trial in trials.items()}
    for name, finalist in finalists.items():
        if finalist.teacher_weights is not None:  # the study may come from another machine
            finalists[name] = finalist.replace(teacher_weights=base.teacher_weights)
    if not (run / CONFIRMED).exists():
        # The views of a sample do not depend on the split: those of all images serve both steps.
        everything = base.replace(validation_fraction=0.0)
        fill_cache(config, everything, seeds, observer, run=run)
    select = _select(run, config, finalists, seeds, observer)
    winner = _winner(run, select, config)
    # Compared with others of its own architecture, where that was searched.
    compared = base.replace(student=finalists[winner].student)
    final = plan_runs(
        run,
        RunStage.FINAL,
        {
            name: resolve(entry.replace(validation_fraction=0.0), data_root=config.data_root)
            for name, entry in {winner: finalists[winner], **baselines(config, compared)}.items()
        },
        seeds,
    )
    ended = [*select, *run_all(run, config, final, observer)]
    numbered = [
        replace(record, number=trials[record.name].number) if record.name in trials else record
        for record in ended
    ]
    write_parquet(run / CONFIRMED, confirm_table(numbered, run))


def fresh_seeds(config: StudyConfig, base: DistillConfig) -> list[int]:
    """The seeds of the confirm stage: none of them is the one that all trials had."""
    return [base.seed + 1 + index for index in range(config.confirm_seeds)]


def _select(
    run: Path,
    config: StudyConfig,
    finalists: dict[str, DistillConfig],
    seeds: list[int],
    observer: Observer,
) -> list[RunRecord]:
    """The runs of the finalists, seed by seed where some may be left out of the later ones."""
    races = config.confirm_elimination and not (config.objectives or config.constraints)
    # One seed shows no spread, so that nothing can be said after it.
    rounds = [seeds[:2], *([seed] for seed in seeds[2:])] if races else [seeds]
    ended: list[RunRecord] = []
    for batch in rounds:
        planned = plan_runs(run, RunStage.SELECT, finalists, batch)
        ended += run_all(run, config, planned, observer)
        rows = leaderboard_rows(ended, config)
        # What failed under a seed cannot win.
        scores = {row.name: row.val for row in rows if row.name in finalists and not row.failed}
        sign = 1 if config.mode == "max" else -1
        worse = clearly_worse({n: [sign * v for v in found] for n, found in scores.items()})
        left = {name: finalists[name] for name in scores if name not in worse}
        if len(finalists) > 1 >= len(left):
            break
        finalists = left
    return ended


def _winner(run: Path, ended: list[RunRecord], config: StudyConfig) -> str:
    """The name of the finalist that has won."""
    rows = leaderboard_rows(ended, config)
    if (winner := winner_of(rows, config)) is None:
        failed = {row.name: row.failed for row in rows}
        raise UserError(f"every finalist of {run} failed under a fresh seed: {failed}.")
    return winner.name


def baselines(config: StudyConfig, base: DistillConfig) -> dict[str, DistillConfig]:
    """The rows that a winner is compared with, under the same budget and solver.

    `none`: the student alone; `kd`: KD with its defaults; `authors`: the authors' values
    for the pair, where the recipe knows them. The latter two need the study's teacher.
    """
    rows = {}
    for name in config.baselines:
        if name == "none":
            rows["none"] = without_teacher(with_method(base, "none"))
        elif name == "kd" and base.teacher:
            rows["kd"] = with_method(base, "kd")
        elif name == "authors" and config.authors and base.teacher:
            rows["authors"] = point_config(base, config.authors)
    return rows


def plan_runs(
    study: Path, stage: RunStage, entries: dict[str, DistillConfig], seeds: list[int]
) -> list[RunRecord]:
    """A run for each configuration and seed.

    Equal configurations share a folder, and so are run once. It is known by the fingerprint at
    the end of its name; what stands before is for people, and may be of another row, or of an
    earlier round of an extended study.
    """
    folders: dict[str, Path] = {}
    runs = []
    for name, entry in entries.items():
        for seed in seeds:
            config = entry.replace(seed=seed)
            key = config.fingerprint()
            if key not in folders:
                there = sorted((study / "confirm").glob(f"{stage}-*{key}"))
                label = f"{stage}-{file_name(name)}-seed-{seed}-{key}"
                folders[key] = there[0] if there else study / "confirm" / label
            runs.append(
                RunRecord(folder=folders[key], stage=stage, name=name, config=config.to_dict())
            )
    return runs


class RunList(Searcher):
    """Hands Tune a fixed list of runs, in order."""

    def __init__(self, runs: list[RunRecord]) -> None:
        super().__init__(metric="train_loss", mode="min")
        self._waiting = deque(runs)
        self._begun: dict[str, RunRecord] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        if not self._waiting:
            return Searcher.FINISHED
        self._begun[trial_id] = self._waiting.popleft()
        return {RUN: self._begun[trial_id].to_dict()}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """Leave word of a run whose process died, retries included."""
        if error:
            folder = self._begun[trial_id].folder
            check_disk(folder)
            end_session(folder, failed=True)
            reason = death_reason(folder, result) or failure_reason(folder)
            write_json(folder / FAILURE, {"reason": reason})


def run_all(
    study: Path, config: StudyConfig, runs: list[RunRecord], observer: Observer
) -> list[RunRecord]:
    """The records of these runs, once those without one have run; equal configurations once.

    Raises:
        UserError: a run's process died twice. Interrupted: stopped by the user.
    """
    waiting: dict[Path, RunRecord] = {}
    for run in runs:
        if (run.folder / RESULT).exists():
            forget_checkpoint(run.folder)  # a kill may have come between the result and this
        elif run.folder not in waiting:
            (run.folder / FAILURE).unlink(missing_ok=True)
            run.write_config()
            waiting[run.folder] = run
    if waiting:
        stage = runs[0].stage
        title = "teacher" if stage is RunStage.TEACHER else f"confirm: {stage}"
        observer.stage(title, len(waiting), config.distill.epochs)
        run_tuner(
            study,
            config,
            functools.partial(train_run, options=TrainOptions.of_study(config)),
            searcher=RunList(list(waiting.values())),
            scheduler=NoStopping(),
            observer=observer,
        )
    missing = [run for run in waiting.values() if not (run.folder / RESULT).exists()]
    for run in missing:
        if (run.folder / FAILURE).exists():
            raise UserError(
                f"{run.name} (seed {run.seed}) did not finish the {run.stage} step: "
                f"{failure_reason(run.folder)}; continue with --resume."
            )
    if missing:
        raise Interrupted
    return [record for run in runs if (record := read_record(run.folder, run))]
