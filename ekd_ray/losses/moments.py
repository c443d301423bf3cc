"""Several teachers as one Dirichlet per image, whose moments are theirs.

Malinin, Mlodozeniec and Gales, "Ensemble distribution distillation", ICLR 2020, fit it by maximum
likelihood; here its mean and its variance are matched, which is closed.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ekd_ray.losses.inputs import without_autocast
from ekd_ray.losses.late_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

# Softmax members that agree to rounding have no variance, which would be a precision without end;
# members that are certain of different classes leave none, and with it the mean would be lost.
MOST_PRECISION = 1e6
LEAST_PRECISION = 1e-6


@without_autocast
def ensemble_log_concentration(
    log_probabilities: Tensor, log_precisions: Tensor | None = None
) -> Tensor:
    """`log a` of the Dirichlet that has the moments of K members, for each of B images.

    `m = mean_k p_k` and `a0 = sum_c m_c (1 - m_c) / sum_c v_c - 1` with the law of total variance,
    `v_c = mean_k (p_kc - m_c)^2 + mean_k p_kc (1 - p_kc) / (a0_k + 1)`; then `a = a0 * m`. The
    softmax of what is returned is m. One evidential member gives back its own Dirichlet. a0 is kept
    from 1e-6 to 1e6, or to the largest precision of a member where that is more.

    Args:
        log_probabilities: [K, B, C], any float dtype, nats: the log of each member's softmax, or of
            its Dirichlet's mean.
        log_precisions: [K, B], the log of each member's total concentration `a0_k`: infinite for a
            softmax, which has no variance of its own. None: all members are softmaxes.

    Returns:
        [B, C], computed in float64 and returned in float32, or float64 for float64; no gradient.

    Raises:
        ValueError: other shapes, or a single member whose precision is not given, which says
            nothing about a variance.
    """
    logs = log_probabilities.detach().double()
    if logs.dim() != 3 or logs.shape[0] < 1 or logs.shape[2] < 2:
        shape = tuple(logs.shape)
        raise ValueError(f"log_probabilities must be [K, B, C] with K >= 1 and C >= 2, got {shape}")
    if log_precisions is None:
        log_precisions = logs.new_full(logs.shape[:2], math.inf)
        if len(logs) == 1:
            raise ValueError("one softmax has no variance: give 2 or more log_probabilities")
    if log_precisions.shape != logs.shape[:2]:
        expected, got = tuple(logs.shape[:2]), tuple(log_precisions.shape)
        raise ValueError(f"log_precisions must be {expected} like log_probabilities, got {got}")
    precisions = log_precisions.detach().double()
    p = logs.exp()
    mean = p.mean(dim=0)
    between = (p - mean).square().mean(dim=0).sum(dim=1)
    # 1 / (a0_k + 1), which is 0 for a softmax.
    own = (_spread(p) * torch.sigmoid(-precisions)).mean(dim=0)
    spread, variance = _spread(mean), between + own
    # Where neither is left (one class is certain) they agree.
    precision = (spread / variance).nan_to_num(math.inf, math.inf) - 1
    finite = precisions.exp().where(precisions.isfinite(), torch.zeros_like(precisions))
    most = finite.amax(dim=0).clamp(min=MOST_PRECISION)
    log_a0 = precision.clamp(min=LEAST_PRECISION).minimum(most).log()
    log_mean = logs.logsumexp(dim=0) - math.log(len(logs))
    dtype = torch.float64 if log_probabilities.dtype == torch.float64 else torch.float32
    return (log_a0[:, None] + log_mean).to(dtype)


def _spread(p: Tensor) -> Tensor:
    """`sum_c p_c (1 - p_c)` of probabilities [..., C], to the last digit where one is nearly 1."""
    top = p.max(dim=-1, keepdim=True)
    others = p.scatter(-1, top.indices, 0.0)
    rest = others.sum(dim=-1)
    return top.values.squeeze(-1) * rest + (others * (1 - others)).sum(dim=-1)
