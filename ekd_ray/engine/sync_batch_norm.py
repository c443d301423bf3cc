"""Batch normalisation over the batch of all ranks, for every layer that calls `batch_norm`.

torch's own `SyncBatchNorm` refuses the CPU, waits for the GPU in every layer, and replaces the
layers, which loses what a subclass adds (timm's have the activation inside). Here the layers
stay what they are: only what they compute while training is exchanged for the duration.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from ekd_ray.engine import ranks


@contextlib.contextmanager
def synchronized_batch_norm(model: nn.Module) -> Iterator[None]:
    """While it lasts, the batch norm layers of `model` train on the batch of all ranks.

    Names, parameters, buffers and evaluation mode are those of the layers. Every rank must
    have at least one row; shares may differ. Nothing changes where there is one process.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    if ranks.world_size() == 1:
        layers = []
    if layers:
        # A collective inside of autograd is nothing that a compiler could fuse. Said here, for
        # to say it at the import loads the compiler, which takes a second.
        forward = torch.compiler.disable(_forward)
    for layer in layers:
        layer.forward = functools.partial(forward, layer.forward)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def _forward(forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    with _OverAllRanks():
        return forward(inputs)


class _OverAllRanks(TorchFunctionMode):
    """Exchanges `functional.batch_norm`, whoever calls it."""

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
        parts = torch.stack(ranks.gather(torch.cat([own_mean, own_var, own_count])))
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
            gradients[0], input, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
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
