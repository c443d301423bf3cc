"""Curriculum temperature distillation: the temperature is learned, against the student.

Li et al., "Curriculum temperature for knowledge distillation", AAAI 2023, with the global
temperature of their released code.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ekd_ray.config.method_settings import MethodSetting
from ekd_ray.losses.cross_entropy import CROSS_ENTROPY
from ekd_ray.losses.evidential import evidential
from ekd_ray.losses.inputs import Scalar, scalar_like
from ekd_ray.losses.kd import KD_CE_WEIGHT, KD_TERM, KD_WEIGHT, STANDARDIZE
from ekd_ray.losses.late_torch import torch
from ekd_ray.losses.methods import Method, log_range, register_method, share_of_epochs

if TYPE_CHECKING:
    from torch import Tensor

# Where the learned scalar starts: T = t_start + t_end * sigmoid(1).
INITIAL_LOGIT = 1.0


def reversal_strength(epoch: Tensor, warmup: int) -> Tensor:
    """Factor on the temperature's gradient in an epoch (from 1): a half cosine from 0 to -1.

    It stays at -1 once `warmup` epochs have passed, and is -1 at once for `warmup = 0`. 0-d, as
    `epoch`. Li et al. 2023, eq. 11: the cosine schedule of the curriculum.
    """
    share = (epoch / max(warmup, 1)).clamp(max=1.0)
    return (torch.cos(math.pi * share) - 1.0) / 2.0


def adversarial_temperature(
    logit: Tensor, epoch: Scalar, *, t_start: Scalar, t_end: Scalar, warmup: int
) -> Tensor:
    """`T = t_start + t_end * sigmoid(g)`, with g's gradient reversed.

    Minimising a loss at this temperature moves the student down the loss and the
    temperature up: the curriculum grows harder.

    g is a learned 0-d float32 tensor; `epoch` counts from 1. T is 0-d, float32 (also inside
    autocast) and lies in (t_start, t_start + t_end), t_start > 0; the reversal grows to full
    strength over `warmup` epochs (`reversal_strength`).

    Li et al. 2023, the global temperature of the released code.
    """
    from ekd_ray.losses.gradients import ScaledGradient  # made of torch's classes

    with torch.autocast(logit.device.type, enabled=False):
        strength = reversal_strength(scalar_like(epoch, logit.float()), warmup)
        reversed_logit: Tensor = ScaledGradient.apply(logit, strength)
        return t_start + t_end * torch.sigmoid(reversed_logit.float())


def _temperature(logit: Tensor, epoch: Tensor, settings: Any) -> Tensor:
    t_start, t_end, warmup = settings.ctkd_t_start, settings.ctkd_t_end, settings.ctkd_warmup
    return adversarial_temperature(logit, epoch, t_start=t_start, t_end=t_end, warmup=warmup)


CTKD = register_method(
    "ctkd",
    Method(
        doc="kd whose temperature is learned against the student (CTKD, AAAI 2023)",
        settings=(
            KD_CE_WEIGHT,
            KD_WEIGHT,
            MethodSetting(
                name="ctkd_t_start", kind=float, default=1.0, low=0.01, high=100, neutral=False,
                doc="CTKD: lower end of the learned temperature",
            ),
            MethodSetting(
                name="ctkd_t_end", kind=float, default=20.0, low=0.01, high=1000, neutral=False,
                doc="CTKD: width of the learned temperature's range",
                search=log_range(4.0, 40.0),
            ),
            MethodSetting(
                name="ctkd_warmup", kind=int | None, default=share_of_epochs(10), low=0,
                in_epochs=True, neutral=False,
                doc="CTKD: epochs over which the gradient reversal grows to full strength",
            ),
            STANDARDIZE,
        ),
        terms=(CROSS_ENTROPY, KD_TERM),
        learned_temperature=_temperature,
    ),
)  # fmt: skip
register_method("ctkd+ekd", evidential(CTKD, ctkd_t_end={"search": log_range(1.0, 40.0)}))
