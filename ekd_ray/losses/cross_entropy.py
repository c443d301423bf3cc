"""The student alone: cross-entropy with the labels, which every softmax method adds to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ekd_ray.config.method_settings import MethodSetting
from ekd_ray.losses.inputs import at_least_float32, checked
from ekd_ray.losses.late_torch import torch
from ekd_ray.losses.methods import Method, Outputs, Term, register_method

if TYPE_CHECKING:
    from torch import Tensor


@checked
def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """`-log softmax(z)[y]` of logits [B, C] and target int64 [B]: 0-d, nats, mean over the batch.

    Raises as every loss (`ekd_ray.losses`).
    """
    return torch.nn.functional.cross_entropy(at_least_float32(logits), target)


def _losses(out: Outputs) -> dict[str, Tensor]:
    value = torch.nn.functional.cross_entropy(out.views[0], out.softened_target())
    return {"ce": out.sum_over_views(value)}


CE_WEIGHT = MethodSetting(
    name="ce_weight", kind=float | None, default=1.0, low=0, neutral=False,
    doc="weight of the (evidential) cross-entropy",
)  # fmt: skip
CROSS_ENTROPY = Term(names=("ce",), weight="ce_weight", loss=_losses)

NONE = register_method(
    "none",
    Method(
        settings=(CE_WEIGHT,),
        terms=(CROSS_ENTROPY,),
        needs_teacher=False,
        doc="the student alone",
    ),
)
