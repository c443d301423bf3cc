"""A teacher's weights, tried on the CPU before anything else runs."""

from __future__ import annotations

import functools
import os

import torch

from ekd_ray.config import DistillConfig
from ekd_ray.data import dataset_info
from ekd_ray.errors import UserError
from ekd_ray.models import load_model


def try_teacher(config: DistillConfig, data_root: str | None) -> None:
    """Load the teacher's weights into its architecture, and run one batch.

    Args:
        config: resolved; one without a teacher's weights passes.

    Raises:
        UserError: the file cannot be loaded, or its logits are not finite.
    """
    if config.teacher is None or config.teacher_weights is None:
        return
    info = dataset_info(config.dataset, data_root=data_root)
    facts = os.stat(config.teacher_weights)
    _try(
        config.teacher, config.teacher_weights, config.teacher_key, info.num_classes,
        config.image_size or info.image_size, (facts.st_mtime_ns, facts.st_size),
    )  # fmt: skip


@functools.lru_cache(maxsize=8)
def _try(name: str, path: str, key: str | None, num_classes: int, size: int, stamp: object) -> None:
    """See `try_teacher`; a file of another stamp is tried again."""
    with torch.random.fork_rng(devices=[]):
        model = load_model(name, num_classes, path, key=key)
    noise = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(noise)
    if not logits.isfinite().all():
        raise UserError(
            f"the teacher {name} with the weights {path} gives logits that are not finite: its "
            "training diverged or the file is damaged, give other weights."
        )
