"""Settings that change while a run trains: when they take effect, and what a checkpoint knows.

A schedule that population based training has found (Jaderberg et al. 2017) is such a run: the
copied weights are those that its own settings, epoch by epoch, would have led to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ekd_ray.config import DistillConfig
from ekd_ray.engine.checkpoint import DamagedCheckpoint, read_progress
from ekd_ray.losses.objective import Objective


def enter_epoch(
    config: DistillConfig, epoch: int, optimizer: torch.optim.Optimizer, objective: Objective
) -> DistillConfig:
    """Put the settings of an epoch (from 1) in force; returns them, without `changes`.

    The learning rate is left to the step (`learning_rate`), of which the returned
    configuration gives the peak.
    """
    if not config.changes:
        return config
    now = config.at_epoch(epoch)
    objective.follow(now)
    for group in optimizer.param_groups:
        # A restored checkpoint has brought those of the epoch before.
        group["weight_decay"] = now.weight_decay
        if "momentum" in group:
            group["momentum"] = now.momentum
    return now


def past(config: DistillConfig, progress: dict[str, Any]) -> str:
    """Fingerprint of what a run has trained so far; `progress` has its `epoch` and `step`.

    Changes that lie ahead do not count: a checkpoint serves every run that shares its past.
    """
    begun = progress["epoch"] if progress["step"] else progress["epoch"] - 1
    return config.until(begun).fingerprint()


def continues(config: DistillConfig, checkpoint: Path) -> bool:
    """Whether a run of `config` (resolved) can go on from a checkpoint's file: not if it is
    another run's, or damaged."""
    try:
        progress = read_progress(checkpoint)
    except DamagedCheckpoint:
        return False
    return progress["fingerprint"] == past(config, progress)
