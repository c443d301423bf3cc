"""The batch norm kernels that torch has for GPUs, in plain torch on the CPU, for tests.

Each of them first hands its arguments to torch's own function, which takes them and then finds no
kernel for the CPU: that a name, a type or the number of arguments is wrong is seen without a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import pytest
import torch

from ekd_ray.engine import ranks

CALLS: list[str] = []


def _taken_by_torch(original, *arguments):
    CALLS.append(original.__name__)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="'CPU' backend"):
        original(*arguments)


def _over_channels(values, like):
    return values.view(-1, *[1] * (like.dim() - 2))


def _check_layout(values):
    assert values.is_contiguous() or values.is_contiguous(memory_format=torch.channels_last)


def _sums(values):
    return values.sum([0, *range(2, values.dim())])


def batch_norm_stats(input, eps):
    _check_layout(input)
    dims = [0, *range(2, input.dim())]
    var, mean = torch.var_mean(input.to(_wide(input)), dims, correction=0)
    return mean, (var + eps).rsqrt()


def batch_norm_gather_stats_with_counts(
    input, means, scales, running_mean, running_var, momentum, eps, counts
):
    count, weights = counts.sum(), counts[:, None]
    mean = (weights * means).sum(0) / count
    squares = scales**-2 - eps + means**2
    var = (weights * squares).sum(0) / count - mean**2
    if running_mean is not None:
        assert counts.dtype == running_mean.dtype
        running_mean.mul_(1 - momentum).add_(momentum * mean)
        running_var.mul_(1 - momentum).add_(momentum * var * count / (count - 1))
    return mean, (var + eps).rsqrt()


def batch_norm_elemt(input, weight, bias, mean, scale, eps):
    output = (input - _over_channels(mean, input)) * _over_channels(scale, input)
    if weight is not None:
        output = output * _over_channels(weight, input) + _over_channels(bias, input)
    return output.to(input.dtype)


def batch_norm_backward_reduce(
    gradient, input, mean, scale, weight, for_input, for_weight, for_bias
):
    _check_layout(gradient)
    assert for_weight == for_bias == (weight is not None) and for_input
    by_level = _sums(gradient.to(mean.dtype))
    by_slope = _sums(gradient * (input - _over_channels(mean, input)))
    return (
        by_level,
        by_slope,
        by_slope * scale if for_weight else None,
        by_level if for_bias else None,
    )


def batch_norm_backward_elemt(gradient, input, mean, scale, weight, by_level, by_slope, counts):
    assert counts.dtype == torch.int32
    count, scale_c = counts.sum(), _over_channels(scale, input)
    centred = input - _over_channels(mean, input)
    result = gradient - _over_channels(by_level / count, input)
    result = (result - centred * scale_c**2 * _over_channels(by_slope / count, input)) * scale_c
    if weight is not None:
        result = result * _over_channels(weight, input)
    return result.to(input.dtype)


def _wide(values):
    return torch.float64 if values.dtype == torch.float64 else torch.float32


KERNELS = (
    batch_norm_stats, batch_norm_gather_stats_with_counts, batch_norm_elemt,
    batch_norm_backward_reduce, batch_norm_backward_elemt,
)  # fmt: skip


def _replacing(original, ours):
    def kernel(*arguments):
        _taken_by_torch(original, *arguments)
        return ours(*arguments)

    return kernel


@contextlib.contextmanager
def on_the_cpu() -> Iterator[None]:
    """While it lasts, `ranks` takes the CPU for a device that has these kernels."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(ranks, "_WITH_KERNELS", ("cpu",)))
        for ours in KERNELS:
            name = ours.__name__
            kernel = _replacing(getattr(torch, name), ours)
            stack.enter_context(mock.patch.object(torch, name, kernel))
        yield
