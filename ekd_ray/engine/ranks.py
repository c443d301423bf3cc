"""The few collective operations of a run; each is free when there is one process."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

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


def gather(values: Tensor) -> list[Tensor]:
    """Every rank's tensor, by rank: equal shapes and dtypes, without gradient."""
    if world_size() == 1:
        return [values]
    values = values.detach().contiguous()
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values)
    return parts


def gather_rows(rows: Tensor, total: int) -> Tensor:
    """All rows [total, ...] in order, of which each rank has every world_size-th.

    The gradient that a rank gets is that of its own rows times the number of ranks: every
    rank computes the same loss from all rows, and the mean of the ranks' gradients, which DDP
    takes, is then exactly the gradient of that one loss.
    """
    if world_size() == 1:
        return rows
    return cast(Tensor, _GatherRows.apply(rows, total))


def gather_columns(parts: list[Tensor], total: int) -> list[Tensor]:
    """`gather_rows` of several [B, C] of one dtype, in one message."""
    if world_size() == 1 or not parts:
        return parts
    return list(gather_rows(torch.cat(parts, dim=1), total).chunk(len(parts), dim=1))


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, total: int) -> Tensor:
        # The ranks' shares differ by at most one row: who has one less sends a row of zeros,
        # which ends up behind the last one.
        longest = -(-total // world_size())
        padded = rows.new_zeros((longest, *rows.shape[1:]))
        padded[: len(rows)] = rows
        return torch.stack(gather(padded), dim=1).flatten(0, 1)[:total]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # No communication: the other ranks have the same gradient already.
        return gradients[0][rank() :: world_size()] * world_size(), None


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
