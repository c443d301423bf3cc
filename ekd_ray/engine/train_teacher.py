"""Training a teacher: the same loop, the network alone, its prior learned and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ekd_ray.config import DistillConfig
from ekd_ray.engine.checkpoint import forget_checkpoint
from ekd_ray.engine.distill import OnEpoch, RunResult, distill
from ekd_ray.engine.final import save_student
from ekd_ray.engine.resolve import without_teacher
from ekd_ray.engine.runlog import Session
from ekd_ray.losses.methods import with_method


def teacher_config(base: DistillConfig, model: str, settings: dict[str, Any]) -> DistillConfig:
    """The training run of a teacher on the student's data and split.

    Args:
        base: data, split, seed and numerics; model: the teacher's architecture.
        settings: what differs, for example `epochs` and `lr`; the method is `evidential`
            with a learned prior unless `method` says `none` (plain cross-entropy).
    """
    values = dict(settings)
    method = values.pop("method", "evidential")
    if method == "evidential":
        values.setdefault("learn_log_prior", True)
    return without_teacher(with_method(base, method, student=model, **values))


def train_teacher(
    config: DistillConfig,
    path: Path,
    *,
    data_root: str | None = None,
    on_epoch: OnEpoch | None = None,
    threads: int | None = None,
    session: Session | None = None,
) -> RunResult:
    """Train the network `config.student` and write it to `path` as a teacher.

    The checkpoint carries the normalisation, the class count and the learned `log_prior`
    (EKD: the prior used in distillation is the one that the teacher learned). The run's
    history and events go to the folder of `path`; an interrupted training continues there.
    `session` as in `distill`.
    """
    result = distill(
        config, data_root=data_root, out=path.parent, on_epoch=on_epoch, threads=threads,
        session=session,
    )  # fmt: skip
    save_student(result, path)
    forget_checkpoint(path.parent)
    return result
