"""The few collective operations of a run; each is free when there is one process."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


def world_size() -> int:
    """Number of data-parallel processes (1 without a process group)."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's rank, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """True on rank 0, which alone writes and reports."""
    return rank() == 0


def data_parallel(module: nn.Module, device: torch.device) -> nn.Module:
    """`module` wrapped in DDP where there are several processes."""
    if world_size() == 1:
        return module
    return DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None)


def mean(values: Tensor) -> Tensor:
    """Mean of a tensor over the ranks, as a new tensor of the same shape."""
    values = values.clone()
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


def from_first(value: T) -> T:
    """Rank 0's picklable value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def agree(decision: bool) -> bool:
    """Rank 0's decision, on every rank: clocks differ, collectives must not."""
    return from_first(decision)
