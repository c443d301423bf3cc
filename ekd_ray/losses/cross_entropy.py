"""The student alone: cross-entropy with the labels, which every softmax method adds to."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from ekd_ray.config.method_settings import MethodSetting
from ekd_ray.losses.inputs import at_least_float32, check_logits, check_target, without_autocast
from ekd_ray.losses.methods import Method, Outputs, Term, register_method


@without_autocast
def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """`-log softmax(z)[y]`, mean over the batch.

    Args:
        logits: [B, C], any float dtype; computed in float32, in float64 if it is that.
        target: [B] int64 class indices.

    Returns:
        0-d, nats.

    Raises:
        ValueError: logits that are not [B, C] with B >= 1, C >= 2; a target that is not int64
            [B].
    """
    check_logits(logits=logits)
    check_target(target, logits)
    return functional.cross_entropy(at_least_float32(logits), target)


def _losses(out: Outputs) -> dict[str, Tensor]:
    first, *strong = (cross_entropy(student, out.target) for student, _ in out.views)
    return {"ce": sum(strong, first)}


CE_WEIGHT = MethodSetting(
    name="ce_weight", kind=float | None, default=1.0, low=0, neutral=False,
    doc="weight of the (evidential) cross-entropy",
)  # fmt: skip
CROSS_ENTROPY = Term(names=("ce",), weight="ce_weight", loss=_losses)

NONE = register_method(
    "none", Method(settings=(CE_WEIGHT,), terms=(CROSS_ENTROPY,), needs_teacher=False)
)
