"""Several trainings of one teacher, as Ray trials, and the choice among them by validation."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ekd_ray.config import DistillConfig, StudyConfig
from ekd_ray.config.candidates import Candidates
from ekd_ray.config.targets import as_loss
from ekd_ray.engine.final import WEIGHTS
from ekd_ray.engine.history import HISTORY
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.errors import UserError
from ekd_ray.files import atomic_path, check_format, read_json, write_json
from ekd_ray.results.records import (
    CANDIDATES,
    FORMAT_VERSION,
    RESULT,
    RunRecord,
    candidate_folder,
    read_or_put_aside,
)
from ekd_ray.scale.cluster import local_cpus, on_cluster
from ekd_ray.scale.run_list import run_all
from ekd_ray.scale.tracking import Observer


def candidate_study(
    training: DistillConfig, candidates: Candidates, resources: StudyConfig
) -> StudyConfig:
    """The trainings as a study of their own, which has no settings in common with a search.

    Args:
        resources: of one trial; on this machine a candidate gets its share of the CPUs if
            that is more.
    """
    share = 1 if on_cluster() else local_cpus() // len(candidates.seeds)
    return StudyConfig(
        distill=training,
        data_root=resources.data_root,
        max_concurrent=resources.max_concurrent,
        cpus_per_trial=max(resources.cpus_per_trial, share),
        gpus_per_trial=resources.gpus_per_trial,
        limit_gpu_memory=resources.limit_gpu_memory,
    )


def train_candidates(
    path: Path, candidates: Candidates, study: StudyConfig, observer: Observer
) -> dict[str, Any]:
    """Train those candidates of a teacher that have not ended, and write the best to `path`.

    Each trains in a folder of its own beside `path`. `candidates.json` there has the figures
    of all; the weights of those that were not chosen are removed. No test split is opened.

    Args:
        study: of `candidate_study`; Ray must be connected unless `path` is there already.

    Returns:
        The content of `candidates.json`.

    Raises:
        UserError: the folder belongs to other candidates, all failed, or a process died twice.
        Interrupted: stopped by the user.
    """
    model, folder = study.distill.student, path.parent
    check_candidate_folder(folder, candidates)
    runs = [
        RunRecord(
            folder=candidate_folder(folder, seed),
            stage=RunStage.TEACHER,
            name=f"{model} seed {seed}",
            config=study.distill.replace(seed=seed).to_dict(),
        )
        for seed in candidates.seeds
    ]
    if not path.exists():
        write_json(folder / CANDIDATES, _summary(candidates, [], None))
        for run in runs:
            known = read_or_put_aside(run.folder)
            # A copy from elsewhere may have lost its weights, which are chosen with it.
            if known and known.status == "complete" and not (run.folder / WEIGHTS).exists():
                (run.folder / RESULT).unlink(missing_ok=True)
        ended = run_all(folder, study, runs, observer)
        chosen = choose_candidate(ended, candidates.choose_by)
        write_json(folder / CANDIDATES, _summary(candidates, ended, chosen))
        if chosen is None:
            raise UserError(
                f"all {len(ended)} candidates of the teacher {model} failed, the first because "
                f"{str(ended[0].reason).rstrip('.')}: change its training, and choose another "
                "--out."
            )
        with atomic_path(path) as temporary:
            shutil.copyfile(chosen.folder / WEIGHTS, temporary)
    for run in runs:
        (run.folder / WEIGHTS).unlink(missing_ok=True)
    return read_json(folder / CANDIDATES)


def choose_candidate(runs: Sequence[RunRecord], metric: str) -> RunRecord | None:
    """The complete run that is best by a metric, the first of equals; None if all failed."""
    complete = [run for run in runs if run.status == "complete"]
    return min(complete, key=lambda run: as_loss(run.metrics[metric], metric), default=None)


def check_candidate_folder(folder: Path, candidates: Candidates | None) -> None:
    """Raise `UserError` if a folder holds other candidates, or a single training."""
    path = folder / CANDIDATES
    there = read_json(path) if path.exists() else None
    if there:
        check_format(path, there.get("format_version", 1), FORMAT_VERSION)
    wanted = _summary(candidates, [], None) if candidates else None
    names = ("seeds", "choose_by")
    if there is None and not (wanted and _holds_training(folder)):
        return
    if wanted is None or there is None or any(there.get(name) != wanted[name] for name in names):
        found = "one training without candidates"
        if there:
            found = (
                f"candidates of the seeds {there.get('seeds')}, chosen by {there.get('choose_by')}"
            )
        raise UserError(
            f"{folder} holds {found}: continue it with the same --candidates, --seeds and "
            "--choose-by, or choose another --out."
        )


def _holds_training(folder: Path) -> bool:
    return any((folder / name).exists() for name in (RESULT, HISTORY))


def _summary(
    candidates: Candidates, ended: Sequence[RunRecord], chosen: RunRecord | None
) -> dict[str, object]:
    """The content of `candidates.json`."""
    return {
        "format_version": FORMAT_VERSION,
        "seeds": list(candidates.seeds),
        "choose_by": candidates.choose_by,
        "chosen": chosen.seed if chosen else None,
        "candidates": [
            {
                "seed": run.seed,
                "status": run.status,
                "reason": run.reason,
                "metrics": run.metrics,
                "log_prior": run.log_prior,
                "seconds": run.seconds,
            }
            for run in ended
        ],
    }
