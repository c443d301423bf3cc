"""Functions whose gradients are written out; apart, because torch is needed to define them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# From e^40 on digamma is the logarithm to the last bit of float64 (the next term is 2e-18).
_LOGARITHM_FROM = 40.0


class ScaledGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor, 0-d."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (factor,) = ctx.saved_tensors
        return gradients[0] * factor, None


class ExpectedCrossEntropy(torch.autograd.Function):
    """`psi(S) - psi(a_y)` of `log a` [B, C], mean over the batch, finite for every finite log.

    The target is int64 [B]; or shares of the classes [B, C], whose rows sum to 1, for the mean of
    `psi(a_y)` under them. Of classes [B] only [B, 2] values reach digamma. In float64, because
    trigamma, its derivative, is 1 / x^2 near zero, which a small prior takes out of float32's
    range.
    """

    @staticmethod
    def forward(ctx: Any, log_a: Tensor, target: Tensor) -> Tensor:
        log_total = log_a.logsumexp(dim=1, keepdim=True)
        labelled = log_a if target.dim() == 2 else log_a.gather(1, target[:, None])
        logs = torch.cat([labelled, log_total], dim=1).double()
        near = logs.clamp(max=_LOGARITHM_FROM)
        x = near.exp()
        ctx.save_for_backward(log_a, target, log_total, x)
        digamma = torch.digamma(x) + (logs - near)
        of_label = (digamma[:, :-1] * target).sum(dim=1) if target.dim() == 2 else digamma[:, 0]
        return (digamma[:, -1] - of_label).mean().to(log_a.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        log_a, target, log_total, x = ctx.saved_tensors
        # By the logs: x psi'(x), which is 1 where the logarithm has taken over.
        slopes = (x * torch.polygamma(1, x)).to(log_a.dtype) * (gradients[0] / len(x))
        of_total = (log_a - log_total).exp() * slopes[:, -1:]
        if target.dim() == 2:
            return of_total - target * slopes[:, :-1], None
        return of_total.scatter_add(1, target[:, None], -slopes[:, :1]), None


class DirichletKL(torch.autograd.Function):
    """`KL(Dir(p) || Dir(q))` [B] of float64 [B, C], as a sum of Bregman divergences of lgamma.

    The row's total is one more column, so that every special function is called once.
    """

    @staticmethod
    def forward(ctx: Any, p: Tensor, q: Tensor) -> Tensor:
        p, q = (torch.cat([a, a.sum(dim=1, keepdim=True)], dim=1) for a in (p, q))
        digamma = torch.digamma(p)
        ctx.save_for_backward(p, q, digamma)
        columns = torch.lgamma(p) - torch.lgamma(q) - (p - q) * digamma
        return columns[:, -1] - columns[:, :-1].sum(dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        p, q, digamma = ctx.saved_tensors
        by_p, by_q = ctx.needs_input_grad
        gradient = gradients[0][:, None]
        return (
            gradient * _less_the_total((p - q) * torch.polygamma(1, p)) if by_p else None,
            gradient * _less_the_total(torch.digamma(q) - digamma) if by_q else None,
        )


def _less_the_total(columns: Tensor) -> Tensor:
    """Each of C columns minus the last one: [B, C + 1] -> [B, C]."""
    return columns[:, :-1] - columns[:, -1:]
