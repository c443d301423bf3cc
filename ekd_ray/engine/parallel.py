"""How the processes of one run share its student: DDP, where each holds all of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ekd_ray.engine import ranks
from ekd_ray.engine.learner import Learner


def parallelize(learner: Learner, device: torch.device) -> nn.Module:
    """The module to call in a training step; `learner` itself where there is one process."""
    if ranks.world_size() == 1:
        return learner
    # Buffers need no broadcast: batch norm is the same on every rank.
    return DistributedDataParallel(
        learner,
        device_ids=[device] if device.type == "cuda" else None,
        forward_sync_buffers=False,
    )


@contextlib.contextmanager
def gradients_reduced(module: nn.Module, *, last: bool) -> Iterator[None]:
    """Around forward and backward of a part of a batch: ranks exchange gradients in the last."""
    with contextlib.ExitStack() as stack:
        if isinstance(module, DistributedDataParallel) and not last:
            stack.enter_context(module.no_sync())
        yield


def all_finite(learner: Learner) -> bool:
    """Whether every weight is finite, on every rank (waits for the device)."""
    finite = torch.stack([value.isfinite().all() for value in learner.parameters()]).all()
    return all(bool(value) for value in ranks.gather(finite))
