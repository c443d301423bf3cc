"""Training a teacher: the same loop, the network alone, its prior learned and kept."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from ekd_ray.config import DistillConfig
from ekd_ray.config.candidates import SETTINGS, Candidates
from ekd_ray.engine.checkpoint import forget_checkpoint
from ekd_ray.engine.determinism import decide_determinism
from ekd_ray.engine.distill import OnEpoch, TrainedStudent, distill
from ekd_ray.engine.final import save_student
from ekd_ray.engine.resolve import without_start, without_teacher
from ekd_ray.engine.run_stage import RunStage
from ekd_ray.engine.runlog import Session
from ekd_ray.errors import UserError
from ekd_ray.losses.methods import with_method


def teacher_config(base: DistillConfig, model: str, settings: dict[str, Any]) -> DistillConfig:
    """The training run of a teacher, of its first candidate, on the student's data and split.

    Args:
        base: data, split, seed and numerics; model: the teacher's architecture.
        settings: what differs, for example `epochs` and `lr`; the method is `evidential`
            with a learned prior unless `method` says `none` (plain cross-entropy). Those of
            `Candidates` may be among them.

    Raises:
        UserError: candidates that are illegal.
    """
    values = {name: value for name, value in settings.items() if name not in SETTINGS}
    method = values.pop("method", "evidential")
    if method == "evidential":
        values.setdefault("learn_log_prior", True)
    config = without_teacher(with_method(without_start(base), method, student=model, **values))
    candidates = teacher_candidates(config, settings)
    check_candidates(config, candidates)
    return config.replace(seed=candidates.seeds[0])


def teacher_candidates(base: DistillConfig, settings: dict[str, Any]) -> Candidates:
    """The candidates of a teacher that `settings` ask for; one, unless they say otherwise."""
    return Candidates.parse(settings, seed=settings.get("seed", base.seed))


def check_candidates(config: DistillConfig, candidates: Candidates) -> None:
    """Raise `UserError` if a seed is too large, or several candidates cannot be compared."""
    for seed in candidates.seeds:
        config.replace(seed=seed)
    if len(candidates.seeds) > 1 and config.validation_fraction == 0:
        raise UserError(
            f"{len(candidates.seeds)} candidates are compared on validation images: set "
            "validation_fraction > 0, or train one candidate.",
            keys=("validation_fraction",),
        )


def train_teacher(
    config: DistillConfig,
    path: Path,
    *,
    data_root: str | None = None,
    on_epoch: OnEpoch | None = None,
    threads: int | None = None,
    session: Session | None = None,
) -> TrainedStudent:
    """Train the network `config.student` and write it to `path` as a teacher.

    The checkpoint carries the normalisation, the class count and the learned `log_prior`
    (EKD: the prior used in distillation is the one that the teacher learned). The run's
    history and events go to the folder of `path`; an interrupted training continues there.
    `session` as in `distill`.
    """
    train = functools.partial(
        distill, data_root=data_root, out=path.parent, on_epoch=on_epoch, threads=threads,
        session=session,
    )  # fmt: skip
    result = decide_determinism(config, train, wanted=RunStage.TEACHER.exports)
    save_student(result, path, data_root=data_root)
    forget_checkpoint(path.parent)
    return result
