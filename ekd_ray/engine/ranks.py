"""The data-parallel processes of one run; every function is free where there is one process.

Each process holds the whole student (DDP) and sees every n-th row of each batch. Losses and
batch norm are those of the batch of all ranks: losses couple the samples of a batch (medians,
Gram matrices).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

T = TypeVar("T")

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
# Devices on which torch has kernels for a batch norm over several processes.
_WITH_KERNELS = ("cuda", "xpu")


def world_size() -> int:
    """Number of data-parallel processes (1 without a process group)."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's rank, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """True on rank 0, which alone writes and reports."""
    return rank() == 0


def from_first(value: T) -> T:
    """Rank 0's picklable value, on every rank: clocks and disks differ, decisions must not."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


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
    """`gather_rows` of several [B, C] of one dtype, or of none, in one message."""
    if world_size() == 1 or not parts:
        return parts
    return list(gather_rows(torch.cat(parts, dim=1), total).chunk(len(parts), dim=1))


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, total: int) -> Tensor:
        # The ranks' shares differ by at most one row. A rank that has one less sends a row of
        # zeros, which ends up behind the last one.
        longest = -(-total // world_size())
        padded = rows.new_zeros((longest, *rows.shape[1:]))
        padded[: len(rows)] = rows
        return torch.stack(gather(padded), dim=1).flatten(0, 1)[:total]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # No communication: the other ranks have the same gradient already.
        return gradients[0][rank() :: world_size()] * world_size(), None


def parallelize(learner: nn.Module, device: torch.device) -> nn.Module:
    """The module to call in a training step; `learner` itself where there is one process."""
    if world_size() == 1:
        return learner
    # Buffers need no broadcast: batch norm is the same on every rank.
    return DistributedDataParallel(
        learner,
        device_ids=[device] if device.type == "cuda" else None,
        forward_sync_buffers=False,
    )


def exchange_gradients(
    module: Callable[..., Any], *, last: bool
) -> contextlib.AbstractContextManager[None]:
    """Around forward and backward of a part of a batch: ranks exchange gradients in the last."""
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return contextlib.nullcontext()


def all_finite(module: nn.Module) -> bool:
    """Whether every weight is finite, on every rank (waits for the device)."""
    finite = torch.stack([value.isfinite().all() for value in module.parameters()]).all()
    return all(bool(value) for value in gather(finite))


@contextlib.contextmanager
def synchronized_batch_norm(model: nn.Module) -> Iterator[None]:
    """While it lasts, the batch norm layers of `model` train on the batch of all ranks.

    torch's own `SyncBatchNorm` refuses the CPU, waits for the GPU in every layer, and replaces
    the layers, which loses what a subclass adds (timm's have the activation inside). Here names,
    parameters, buffers and evaluation mode stay those of the layers: only what they compute
    while training is exchanged, on a GPU for the kernels of `SyncBatchNorm`. Every rank must have
    at least one row; shares may differ.
    """
    layers = [module for module in model.modules() if isinstance(module, _BATCH_NORMS)]
    if world_size() == 1 or not layers:
        yield
        return
    # A collective inside of autograd is nothing that a compiler could fuse. Said here, because
    # to say it at the import loads the compiler, which takes a second.
    forward = torch.compiler.disable(_forward_over_all_ranks)
    for layer in layers:
        layer.forward = functools.partial(forward, layer.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def _forward_over_all_ranks(forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    with _ExchangeBatchNorm():
        return forward(inputs)


class _ExchangeBatchNorm(TorchFunctionMode):
    """Takes `_batch_norm` in the place of `functional.batch_norm`."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is functional.batch_norm:
            function = _batch_norm
        return function(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`functional.batch_norm`, its batch being that of all ranks."""
    if not training:
        return functional.batch_norm(
            input, running_mean, running_var, weight, bias, False, momentum, eps
        )
    if input.device.type in _WITH_KERNELS:
        return cast(
            Tensor,
            _NormalizeByKernels.apply(
                input, weight, bias, running_mean, running_var, momentum, eps
            ),
        )
    output, mean, var, count = _Normalize.apply(input, weight, bias, eps)
    if running_mean is not None and running_var is not None:
        # As torch does it: normalised with the biased variance, recorded the unbiased one.
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    return cast(Tensor, output)


class _Normalize(torch.autograd.Function):
    """(output, mean, biased variance, count), statistics over all ranks; no host waits."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = input.double() if input.dtype == torch.float64 else input.float()
        dims = [0, *range(2, input.dim())]
        own_var, own_mean = torch.var_mean(wide, dims, correction=0)
        own_count = own_mean.new_full((1,), input.numel() // input.shape[1])
        parts = torch.stack(gather(torch.cat([own_mean, own_var, own_count])))
        means, variances = parts[:, : input.shape[1]], parts[:, input.shape[1] : -1]
        counts = parts[:, -1:]
        count = counts.sum()
        # Chan et al. 1979: no difference of large numbers, unlike a sum of squares.
        mean = (counts * means).sum(0) / count
        var = (counts * (variances + (means - mean).square())).sum(0) / count
        output = functional.batch_norm(input, mean, var, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(input, weight, mean, var, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var, count)
        return output, mean, var, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        input, weight, mean, var, count = ctx.saved_tensors
        scale = (var + ctx.eps).rsqrt()
        wanted, weight = weight is not None, torch.ones_like(var) if weight is None else weight
        # With fixed statistics; the sums over this rank's rows come out of it as well.
        fixed, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
            gradients[0], input, weight, mean, var, mean, scale, False, ctx.eps, [True, True, True]
        )
        sums = torch.stack([by_weight, by_bias])
        dist.all_reduce(sums)
        slope, level = sums / count * scale * weight
        shape = [-1, *[1] * (input.dim() - 2)]
        centred = input - mean.view(shape)
        through = centred * (slope * scale).view(shape) + level.view(shape)
        return (
            (fixed - through).to(input.dtype),
            by_weight if wanted else None,
            by_bias if wanted else None,
            None,
        )


class _NormalizeByKernels(torch.autograd.Function):
    """The output, by the kernels of `torch.nn.SyncBatchNorm`; no host waits.

    The layer itself looks on the host for processes without a row, which there are none of here.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        input, channels = _dense(input), input.shape[1]
        own_mean, own_scale = torch.batch_norm_stats(input, eps)
        own_count = own_mean.new_full((1,), input.numel() // channels)
        parts = torch.stack(gather(torch.cat([own_mean, own_scale, own_count])))
        means, scales, counts = parts.split([channels, channels, 1], dim=1)
        counts = counts.flatten()
        # It also moves the running statistics, in place.
        mean, scale = torch.batch_norm_gather_stats_with_counts(
            input, means, scales, running_mean, running_var, momentum, eps, counts
        )
        ctx.save_for_backward(input, weight, mean, scale, counts.int())
        return torch.batch_norm_elemt(input, weight, bias, mean, scale, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, mean, scale, counts = ctx.saved_tensors
        gradient = _dense(gradients[0])
        *sums, by_weight, by_bias = torch.batch_norm_backward_reduce(
            gradient, input, mean, scale, weight, True, *ctx.needs_input_grad[1:3]
        )
        both = torch.stack(sums)
        dist.all_reduce(both)
        by_input = torch.batch_norm_backward_elemt(
            gradient, input, mean, scale, weight, both[0], both[1], counts
        )
        return by_input, by_weight, by_bias, None, None, None, None


def _dense(values: Tensor) -> Tensor:
    """The values in a memory format that the kernels take: channels last, or contiguous."""
    for layout in (torch.channels_last, torch.channels_last_3d):
        if values.is_contiguous(memory_format=layout):
            return values
    return values.contiguous()
