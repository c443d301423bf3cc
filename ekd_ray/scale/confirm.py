"""The confirm stage: finalists over several seeds, then the winner and the baselines on
all training data, with one reading of the test split.

1. *select*: the best `confirm_top_k` trials run again over up to `confirm_seeds` fresh seeds
   on the training split; a finalist that is clearly worse than the best gets no further
   ones. The best mean validation score is the winner.
2. *final*: the winner and the baselines train on train + validation over the same seeds;
   each final model reads the test split once. No decision follows from it.
"""

from __future__ import annotations

import json
import warnings
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from ray.tune.search import Searcher

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.targets import COSTS
from ekd_ray.engine import ranks
from ekd_ray.engine.checkpoint import forget_checkpoint
from ekd_ray.engine.distill import RunResult
from ekd_ray.engine.final import WEIGHTS, evaluate_test, save_student
from ekd_ray.engine.measure.predictions import FILE as PREDICTIONS
from ekd_ray.engine.measure.predictions import Predictions
from ekd_ray.engine.pictures import validation_predictions, write_pictures
from ekd_ray.engine.precision import environment
from ekd_ray.engine.resolve import resolve, without_teacher
from ekd_ray.engine.runlog import end_session
from ekd_ray.errors import Interrupted, UserError
from ekd_ray.files import file_name, write_json
from ekd_ray.losses.methods import with_method
from ekd_ray.results.leaderboard import leaderboard_rows, winner_of
from ekd_ray.results.paired import clearly_worse
from ekd_ray.results.records import CONFIRMED, FAILURE, RESULT, failure_reason
from ekd_ray.results.study import Study, write_parquet
from ekd_ray.scale.fill_tasks import fill_cache
from ekd_ray.scale.samplers import NoStopping
from ekd_ray.scale.search import run_tuner
from ekd_ray.scale.searcher import why
from ekd_ray.scale.space import point_config
from ekd_ray.scale.tracking import Observer
from ekd_ray.scale.worker import Job, Report, check_room, run_job


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of the confirm stage: a named configuration under one seed."""

    stage: str
    name: str
    config: DistillConfig
    label: str = ""

    def folder(self, study: Path) -> Path:
        """Keyed by what is run, so that equal configurations share one run.

        The fingerprint is the key; what stands before it is for people, and may be of another
        row, or of an earlier round of an extended study.
        """
        home, key = study / "confirm", self.config.fingerprint()
        there = sorted(home.glob(f"{self.stage}-*{key}"))
        name = "-".join(part for part in (self.stage, file_name(self.label), key) if part)
        return there[0] if there else home / name


def confirm(run: Path, config: StudyConfig, base: DistillConfig, observer: Observer) -> None:
    """Run (or continue) both steps; writes `confirm.parquet`.

    A finalist that fails under one of the seeds cannot win; a baseline that fails is
    reported as failed.

    Raises:
        UserError: every finalist failed, or a run's process died twice.
        Interrupted: stopped by the user.
    """
    study = Study.load(run)
    seeds = [base.seed + 1 + index for index in range(config.confirm_seeds)]
    finalists = {
        f"trial {record.number}": _here(DistillConfig.from_dict(record.config), base)
        for record in study.finalists()
    }
    if not (run / CONFIRMED).exists():
        # The views of a sample do not depend on the split: those of all images serve both steps.
        whole = base.replace(validation_fraction=0.0)
        fill_cache(config, whole, seeds, observer, run=run)
    select = _select(run, config, finalists, seeds, observer)
    winner = _winner(run, config, select, seeds)
    # Compared with others of its own architecture, where that was searched.
    compared = base.replace(student=finalists[winner].student)
    entries = {winner: finalists[winner], **baselines(config, compared)}
    everything = {
        name: resolve(entry.replace(validation_fraction=0.0), data_root=config.data_root)
        for name, entry in entries.items()
    }
    final = _over_seeds("final", everything, seeds)
    _run_all(run, config, final, observer)
    write_parquet(run / CONFIRMED, _table(_rows(run, [*select, *final], seeds)))


def _here(config: DistillConfig, base: DistillConfig) -> DistillConfig:
    """With the teacher's file where it is now: the study may have come from another machine."""
    if config.teacher_weights is None:
        return config
    return config.replace(teacher_weights=base.teacher_weights)


def _select(
    run: Path,
    config: StudyConfig,
    finalists: dict[str, DistillConfig],
    seeds: list[int],
    observer: Observer,
) -> list[Run]:
    """Run the finalists, seed by seed where some may be left out of the later ones."""
    races = config.confirm_elimination and not (config.objectives or config.constraints)
    # One seed shows no spread, so that nothing can be said after it.
    rounds = [seeds[:2], *([seed] for seed in seeds[2:])] if races else [seeds]
    done: list[Run] = []
    for batch in rounds:
        runs = _over_seeds("select", finalists, batch)
        _run_all(run, config, runs, observer)
        done += runs
        rows = leaderboard_rows(_rows(run, done, seeds), config)
        # What failed under a seed cannot win.
        scores = {row.name: row.val for row in rows if row.name in finalists and not row.failed}
        sign = 1 if config.mode == "max" else -1
        out = clearly_worse({n: [sign * v for v in found] for n, found in scores.items()})
        left = {name: finalists[name] for name in scores if name not in out}
        if len(finalists) > 1 >= len(left):
            break
        finalists = left
    return done


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


def _over_seeds(stage: str, configs: dict[str, DistillConfig], seeds: list[int]) -> list[Run]:
    first: dict[str, str] = {}  # rows of equal configurations have one run, of one label
    for name, entry in configs.items():
        first.setdefault(entry.replace(seed=seeds[0]).fingerprint(), name)
    return [
        Run(
            stage=stage,
            name=name,
            config=entry.replace(seed=seed),
            label=f"{first[entry.replace(seed=seeds[0]).fingerprint()]} seed {seed}",
        )
        for name, entry in configs.items()
        for seed in seeds
    ]


class _JobList(Searcher):
    """Hands Tune a fixed list of jobs, in order."""

    def __init__(self, jobs: list[Job]) -> None:
        super().__init__(metric="train_loss", mode="min")
        self._jobs = deque(jobs)
        self._given: dict[str, Job] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        if not self._jobs:
            return Searcher.FINISHED
        self._given[trial_id] = self._jobs.popleft()
        return self._given[trial_id].as_config()

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """A run whose process died, retries included, leaves word of it."""
        if error:
            folder = Path(self._given[trial_id].folder)
            check_room(folder)
            end_session(folder, failed=True)
            reason = why(folder, result) or failure_reason(folder)
            write_json(folder / FAILURE, {"reason": reason})

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: finished runs have their `result.json`."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""


def _run_all(study: Path, config: StudyConfig, runs: list[Run], observer: Observer) -> None:
    """Run those without a result; equal configurations once."""
    open_runs = {r.folder(study): r for r in runs if not (r.folder(study) / RESULT).exists()}
    for ended in {r.folder(study) for r in runs} - open_runs.keys():
        forget_checkpoint(ended)  # a kill may have come between the result and this
    jobs = []
    for number, (folder, item) in enumerate(open_runs.items()):
        (folder / FAILURE).unlink(missing_ok=True)
        jobs.append(
            Job(
                name=f"{item.name} seed {item.config.seed}",
                number=number,
                folder=str(folder),
                settings=item.config.to_dict(),
                data_root=config.data_root,
                threads=config.cpus_per_trial,
                costs=config.costs,
                shown=tuple(config.space or {}),
                group=f"{item.stage} {item.name}",
            )
        )
    if jobs:
        observer.stage(f"confirm: {runs[0].stage}", len(jobs), config.distill.epochs)
        run_tuner(
            study,
            config,
            searcher=_JobList(jobs),
            scheduler=NoStopping(),
            num_samples=len(jobs),
            observer=observer,
            body=confirm_job,
        )
    _check_all_done(open_runs)


def _check_all_done(open_runs: dict[Path, Run]) -> None:
    missing = {f: item for f, item in open_runs.items() if not (f / RESULT).exists()}
    for folder, item in missing.items():
        if (folder / FAILURE).exists():
            raise UserError(
                f"{item.name} (seed {item.config.seed}) did not finish the {item.stage} step: "
                f"{failure_reason(folder)}; continue with --resume."
            )
    if missing:
        raise Interrupted


def confirm_job(job: Job, report: Report) -> None:
    """One confirm run; without a validation split it is a final one, and reads the test split."""
    result, folder = run_job(job, report), Path(job.folder)
    if result is None:
        if ranks.is_first():
            write_json(folder / RESULT, {"reason": failure_reason(folder)})
        return
    metrics = dict(result.metrics)
    if result.config.validation_fraction == 0.0:
        if ranks.is_first():
            save_student(result, folder / WEIGHTS)
        # Each rank its share.
        tested = evaluate_test(result, data_root=job.data_root, keep=folder / PREDICTIONS)
        metrics |= tested
    else:
        tested = {}
    _draw(result, folder, job, tested)
    if not ranks.is_first():
        return
    record = {
        "metrics": metrics,
        "precision": result.precision,
        "data_fingerprint": result.data_fingerprint,
        "environment": environment(),
        "seconds": result.seconds,
    }
    write_json(folder / RESULT, record)
    forget_checkpoint(folder)


def _draw(result: RunResult, folder: Path, job: Job, tested: dict[str, float]) -> None:
    """Reliability and confusion for TensorBoard; a run that cannot draw them is as good."""
    try:
        split = "test" if tested else "val"
        # All ranks look at the validation images, each at its share.
        found = None if tested else validation_predictions(result, data_root=job.data_root)
        if ranks.is_first():
            found = found or Predictions.load(folder / PREDICTIONS)
            step = result.metrics["epoch"]
            write_pictures(folder, found, split=split, scalars=tested, step=step)
    except Exception as error:
        warnings.warn(f"{folder.name}: no images for TensorBoard ({error}).", stacklevel=2)


def _winner(study: Path, config: StudyConfig, runs: list[Run], seeds: list[int]) -> str:
    """The name of the finalist that has won."""
    rows = leaderboard_rows(_rows(study, runs, seeds), config)
    winner = winner_of(rows, config)
    if winner is None:
        failed = {row.name: row.failed for row in rows}
        raise UserError(f"every finalist of {study} failed under a fresh seed: {failed}.")
    return winner.name


def _result(study: Path, item: Run) -> dict[str, Any]:
    return json.loads((item.folder(study) / RESULT).read_text())


def _rows(study: Path, runs: list[Run], seeds: list[int]) -> list[dict[str, Any]]:
    """What `confirm.parquet` says of each run."""
    rows = []
    for item in runs:
        result = _result(study, item)
        metrics = result.get("metrics", {})
        shown = {k: v for k, v in metrics.items() if k.startswith(("val_", "test_")) or k in COSTS}
        rows.append(
            {
                "stage": item.stage,
                "name": item.name,
                "seed": item.config.seed,
                "config": json.dumps(item.config.replace(seed=seeds[0]).to_dict()),
                "folder": str(item.folder(study).relative_to(study)),
                "reason": result.get("reason"),
                "seconds": result.get("seconds"),
                **shown,
            }
        )
    return rows


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    names = list(dict.fromkeys(key for row in rows for key in row))
    return pa.Table.from_pylist([{key: row.get(key) for key in names} for row in rows])
