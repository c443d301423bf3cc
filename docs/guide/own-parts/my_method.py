"""A method of one's own: the Jensen-Shannon divergence in place of KD's Kullback-Leibler one."""

import torch
from torch import Tensor

import ekd_ray as ekd
from ekd_ray.losses import (
    CROSS_ENTROPY,
    KD_CE_WEIGHT,
    KD_WEIGHT,
    TEMPERATURE,
    Method,
    MethodSetting,
    Outputs,
    Term,
)


def jsd_loss(out: Outputs) -> dict[str, Tensor]:
    """T^2 times the mean over the batch of the divergence, in nats (Lin, 1991)."""
    student = (out.student / out.temperature).log_softmax(dim=1)
    teacher = (out.teacher.float() / out.temperature).log_softmax(dim=1)
    share = out.settings.jsd_share * torch.ones_like(student[:, :1])
    middle = torch.logaddexp(student + (1 - share).log(), teacher + share.log())
    to_student = (student.exp() * (student - middle)).sum(dim=1)
    to_teacher = (teacher.exp() * (teacher - middle)).sum(dim=1)
    both = (1 - share[:, 0]) * to_student + share[:, 0] * to_teacher
    return {"jsd": out.temperature**2 * both.mean()}


SHARE = MethodSetting(
    name="jsd_share", kind=float, default=0.5, above=0, high=0.99,
    doc="JSD: share of the teacher in the middle", search={"low": 0.1, "high": 0.9},
)  # fmt: skip

ekd.register_method(
    "jsd",
    Method(
        settings=(TEMPERATURE, KD_CE_WEIGHT, KD_WEIGHT, SHARE),
        terms=(CROSS_ENTROPY, Term(names=("jsd",), weight="kd_weight", loss=jsd_loss)),
    ),
)
