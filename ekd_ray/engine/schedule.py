"""The learning rate as a function of the step: nothing to save, nothing to drift."""

from __future__ import annotations

import math

from ekd_ray.config import DistillConfig


def learning_rate(config: DistillConfig, step: int, steps_per_epoch: int) -> float:
    """Learning rate of global step `step` (from 0).

    `step` schedule: `lr * lr_decay ** k`, k the milestones passed; milestone m passes
    after epoch `round(m * epochs)`. `cosine`: half a cosine from `lr` to `lr_min`, per
    step, after the warm-up. Warm-up is linear over `lr_warmup` epochs.
    """
    warmup = config.lr_warmup * steps_per_epoch
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "step":
        epoch = step // steps_per_epoch
        passed = sum(epoch >= round(m * config.epochs) for m in config.lr_milestones)
        return config.lr * config.lr_decay**passed
    share = (step - warmup) / max(1, config.epochs * steps_per_epoch - warmup)
    return config.lr_min + (config.lr - config.lr_min) * 0.5 * (1 + math.cos(math.pi * share))


def settled_since(config: DistillConfig, epoch: int) -> int:
    """The first epoch (from 1) since which the rate has been at most twice that of `epoch`.

    What a network scores at a high rate says little of what it will score once the rate has
    fallen: the epochs since then are of one kind.
    """
    last = learning_rate(config, epoch - 1, 1)
    first = epoch
    while first > 1 and learning_rate(config, first - 2, 1) <= 2 * last:
        first -= 1
    return first


def first_decayed_epoch(config: DistillConfig) -> int | None:
    """The first epoch (from 1) after a `step` schedule's first milestone, None without one."""
    if config.schedule != "step" or not config.lr_milestones:
        return None
    epoch = round(min(config.lr_milestones) * config.epochs) + 1
    return epoch if epoch <= config.epochs else None
