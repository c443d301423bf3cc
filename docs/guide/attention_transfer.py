"""Attention transfer: the student looks where the teacher looks.

Zagoruyko & Komodakis, "Paying more attention to attention", ICLR 2017, eq. 2, with the squared
difference that their code has. Layers are those of the zoo's CIFAR ResNets.

    ekd-ray tune --plugin attention_transfer.py --method at ...
"""

from torch import Tensor
from torch.nn import functional

from ekd_ray.losses import (
    CE_WEIGHT,
    CROSS_ENTROPY,
    Method,
    MethodSetting,
    Outputs,
    Term,
    log_range,
    register_method,
)


def attention_map(features: Tensor) -> Tensor:
    """Where a layer is active: [B, C, H, W] -> rows of norm 1, [B, H * W]."""
    return functional.normalize(features.square().mean(dim=1).flatten(1))


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the attention maps of two square [B, C, H, W], 0-d."""
    side = min(student.shape[-1], teacher.shape[-1])
    maps = [attention_map(functional.adaptive_avg_pool2d(x, side)) for x in (student, teacher)]
    return (maps[0] - maps[1]).square().mean()


def _losses(out: Outputs) -> dict[str, Tensor]:
    pairs = zip(out.student_features, out.teacher_features, strict=True)
    return {"at": sum(attention_loss(student, teacher) for student, teacher in pairs)}


AT_WEIGHT = MethodSetting(
    name="at_weight", kind=float, default=1000.0, low=0,
    doc="weight of attention transfer", search=log_range(100.0, 10000.0),
)  # fmt: skip
AT = register_method(
    "at",
    Method(
        settings=(CE_WEIGHT, AT_WEIGHT),
        terms=(
            CROSS_ENTROPY,
            Term(names=("at",), weight="at_weight", loss=_losses, is_divergence=True),
        ),
        features=("layer1", "layer2", "layer3"),
    ),
)
